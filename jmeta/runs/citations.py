"""What to cite: the BibTeX entry of each learner's paper."""

from collections.abc import Mapping

from jmeta.errors import lookup

_MAML = """\
@inproceedings{finn2017maml,
  title={Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks},
  author={Finn, Chelsea and Abbeel, Pieter and Levine, Sergey},
  booktitle={International Conference on Machine Learning},
  year={2017}
}"""
_CLOSER_LOOK = """\
@inproceedings{chen2019closer,
  title={A Closer Look at Few-shot Classification},
  author={Chen, Wei-Yu and Liu, Yen-Cheng and Kira, Zsolt and Wang, Yu-Chiang Frank and Huang, Jia-Bin},
  booktitle={International Conference on Learning Representations},
  year={2019}
}"""
_PROTOTYPICAL = """\
@inproceedings{snell2017prototypical,
  title={Prototypical Networks for Few-shot Learning},
  author={Snell, Jake and Swersky, Kevin and Zemel, Richard},
  booktitle={Advances in Neural Information Processing Systems},
  year={2017}
}"""

CITATIONS: Mapping[str, str] = {
    "maml": _MAML,
    "fomaml": _MAML,
    "reptile": """\
@article{nichol2018reptile,
  title={On First-Order Meta-Learning Algorithms},
  author={Nichol, Alex and Achiam, Joshua and Schulman, John},
  journal={arXiv preprint arXiv:1803.02999},
  year={2018}
}""",
    "maml_plus_plus": """\
@inproceedings{antoniou2019how,
  title={How to Train Your {MAML}},
  author={Antoniou, Antreas and Edwards, Harrison and Storkey, Amos},
  booktitle={International Conference on Learning Representations},
  year={2019}
}""",
    "maml_rl": _MAML,
    "rl2": """\
@article{duan2016rl2,
  title={{RL}$^2$: Fast Reinforcement Learning via Slow Reinforcement Learning},
  author={Duan, Yan and Schulman, John and Chen, Xi and Bartlett, Peter L. and Sutskever, Ilya and Abbeel, Pieter},
  journal={arXiv preprint arXiv:1611.02779},
  year={2016}
}""",
    "anil": """\
@inproceedings{raghu2020rapid,
  title={Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of {MAML}},
  author={Raghu, Aniruddh and Raghu, Maithra and Bengio, Samy and Vinyals, Oriol},
  booktitle={International Conference on Learning Representations},
  year={2020}
}""",
    "boil": """\
@inproceedings{oh2021boil,
  title={{BOIL}: Towards Representation Change for Few-shot Learning},
  author={Oh, Jaehoon and Yoo, Hyungjun and Kim, ChangHwan and Yun, Se-Young},
  booktitle={International Conference on Learning Representations},
  year={2021}
}""",
    "meta_sgd": """\
@article{li2017metasgd,
  title={Meta-{SGD}: Learning to Learn Quickly for Few-Shot Learning},
  author={Li, Zhenguo and Zhou, Fengwei and Chen, Fei and Li, Hang},
  journal={arXiv preprint arXiv:1707.09835},
  year={2017}
}""",
    "meta_curvature": """\
@inproceedings{park2019metacurvature,
  title={Meta-Curvature},
  author={Park, Eunbyung and Oliva, Junier B.},
  booktitle={Advances in Neural Information Processing Systems},
  year={2019}
}""",
    "cavia": """\
@inproceedings{zintgraf2019cavia,
  title={Fast Context Adaptation via Meta-Learning},
  author={Zintgraf, Luisa and Shiarlis, Kyriacos and Kurin, Vitaly and Hofmann, Katja and Whiteson, Shimon},
  booktitle={International Conference on Machine Learning},
  year={2019}
}""",
    "imaml": """\
@inproceedings{rajeswaran2019imaml,
  title={Meta-Learning with Implicit Gradients},
  author={Rajeswaran, Aravind and Finn, Chelsea and Kakade, Sham and Levine, Sergey},
  booktitle={Advances in Neural Information Processing Systems},
  year={2019}
}""",
    "proto_maml": """\
@inproceedings{triantafillou2020metadataset,
  title={Meta-Dataset: A Dataset of Datasets for Learning to Learn from Few Examples},
  author={Triantafillou, Eleni and Zhu, Tyler and Dumoulin, Vincent and Lamblin, Pascal and Evci, Utku and Xu, Kelvin
    and Goroshin, Ross and Gelada, Carles and Swersky, Kevin and Manzagol, Pierre-Antoine and Larochelle, Hugo},
  booktitle={International Conference on Learning Representations},
  year={2020}
}""",
    "prototypical": _PROTOTYPICAL,
    "transfer": _CLOSER_LOOK,
    "linear_probe": """\
@inproceedings{tian2020rethinking,
  title={Rethinking Few-Shot Image Classification: a Good Embedding Is All You Need?},
  author={Tian, Yonglong and Wang, Yue and Krishnan, Dilip and Tenenbaum, Joshua B. and Isola, Phillip},
  booktitle={European Conference on Computer Vision},
  year={2020}
}""",
    "baseline_plus_plus": _CLOSER_LOOK,
    "matching": """\
@inproceedings{vinyals2016matching,
  title={Matching Networks for One Shot Learning},
  author={Vinyals, Oriol and Blundell, Charles and Lillicrap, Timothy and Kavukcuoglu, Koray and Wierstra, Daan},
  booktitle={Advances in Neural Information Processing Systems},
  year={2016}
}""",
    "relation": """\
@inproceedings{sung2018learning,
  title={Learning to Compare: Relation Network for Few-Shot Learning},
  author={Sung, Flood and Yang, Yongxin and Zhang, Li and Xiang, Tao and Torr, Philip H. S. and Hospedales, Timothy M.},
  booktitle={IEEE Conference on Computer Vision and Pattern Recognition},
  year={2018}
}""",
    "meta_baseline": """\
@inproceedings{chen2021meta,
  title={Meta-Baseline: Exploring Simple Meta-Learning for Few-Shot Learning},
  author={Chen, Yinbo and Liu, Zhuang and Xu, Huijuan and Darrell, Trevor and Wang, Xiaolong},
  booktitle={IEEE/CVF International Conference on Computer Vision},
  year={2021}
}""",
    "feat": """\
@inproceedings{ye2020few,
  title={Few-Shot Learning via Embedding Adaptation with Set-to-Set Functions},
  author={Ye, Han-Jia and Hu, Hexiang and Zhan, De-Chuan and Sha, Fei},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2020}
}""",
    "tip_adapter": """\
@inproceedings{zhang2022tip,
  title={Tip-Adapter: Training-free Adaption of {CLIP} for Few-shot Classification},
  author={Zhang, Renrui and Zhang, Wei and Fang, Rongyao and Gao, Peng and Li, Kunchang and Dai, Jifeng and Qiao, Yu
    and Li, Hongsheng},
  booktitle={European Conference on Computer Vision},
  year={2022}
}""",
    "tim": """\
@inproceedings{boudiaf2020transductive,
  title={Transductive Information Maximization For Few-Shot Learning},
  author={Boudiaf, Malik and Ziko, Imtiaz Masud and Rony, J{\\'e}r{\\^o}me and Dolz, Jose and Piantanida, Pablo
    and Ben Ayed, Ismail},
  booktitle={Advances in Neural Information Processing Systems},
  year={2020}
}""",
    "pt_map": """\
@inproceedings{hu2021leveraging,
  title={Leveraging the Feature Distribution in Transfer-based Few-Shot Learning},
  author={Hu, Yuqing and Gripon, Vincent and Pateux, St{\\'e}phane},
  booktitle={International Conference on Artificial Neural Networks},
  year={2021}
}""",
    "laplacian_shot": """\
@inproceedings{ziko2020laplacian,
  title={Laplacian Regularized Few-Shot Learning},
  author={Ziko, Imtiaz Masud and Dolz, Jose and Granger, Eric and Ben Ayed, Ismail},
  booktitle={International Conference on Machine Learning},
  year={2020}
}""",
    "bd_cspn": """\
@inproceedings{liu2020prototype,
  title={Prototype Rectification for Few-Shot Learning},
  author={Liu, Jinlu and Song, Liang and Qin, Yongqiang},
  booktitle={European Conference on Computer Vision},
  year={2020}
}""",
    "label_propagation": """\
@inproceedings{liu2019learning,
  title={Learning to Propagate Labels: Transductive Propagation Network for Few-shot Learning},
  author={Liu, Yanbin and Lee, Juho and Park, Minseop and Kim, Saehoon and Yang, Eunho and Hwang, Sung Ju and Yang, Yi},
  booktitle={International Conference on Learning Representations},
  year={2019}
}""",
    "soft_kmeans": """\
@inproceedings{ren2018meta,
  title={Meta-Learning for Semi-Supervised Few-Shot Classification},
  author={Ren, Mengye and Triantafillou, Eleni and Ravi, Sachin and Snell, Jake and Swersky, Kevin
    and Tenenbaum, Joshua B. and Larochelle, Hugo and Zemel, Richard S.},
  booktitle={International Conference on Learning Representations},
  year={2018}
}""",
    "r2d2": """\
@inproceedings{bertinetto2019meta,
  title={Meta-learning with differentiable closed-form solvers},
  author={Bertinetto, Luca and Henriques, Jo{\\~a}o F. and Torr, Philip H. S. and Vedaldi, Andrea},
  booktitle={International Conference on Learning Representations},
  year={2019}
}""",
    "metaoptnet": """\
@inproceedings{lee2019meta,
  title={Meta-Learning with Differentiable Convex Optimization},
  author={Lee, Kwonjoon and Maji, Subhransu and Ravichandran, Avinash and Soatto, Stefano},
  booktitle={IEEE Conference on Computer Vision and Pattern Recognition},
  year={2019}
}""",
    "simpleshot": """\
@article{wang2019simpleshot,
  title={{SimpleShot}: Revisiting Nearest-Neighbor Classification for Few-Shot Learning},
  author={Wang, Yan and Chao, Wei-Lun and Weinberger, Kilian Q. and van der Maaten, Laurens},
  journal={arXiv preprint arXiv:1911.04623},
  year={2019}
}""",
    "zero_shot": _PROTOTYPICAL,
    "late_fusion": _PROTOTYPICAL,
    "fused_cosine": _PROTOTYPICAL,
    "am3": """\
@inproceedings{xing2019adaptive,
  title={Adaptive Cross-Modal Few-shot Learning},
  author={Xing, Chen and Rostamzadeh, Negar and Oreshkin, Boris N. and Pinheiro, Pedro O.},
  booktitle={Advances in Neural Information Processing Systems},
  year={2019}
}""",
    "in_context": """\
@article{kirsch2022general,
  title={General-Purpose In-Context Learning by Meta-Learning Transformers},
  author={Kirsch, Louis and Harrison, James and Sohl-Dickstein, Jascha and Metz, Luke},
  journal={arXiv preprint arXiv:2212.04458},
  year={2022}
}""",
}


def citation(learner: str) -> str:
    """The BibTeX entry of the paper that a learner is of.

    Args:
        learner: a name in the registry, `"maml"`.

    Returns:
        The entry.

    Raises:
        UnknownNameError: there is no such learner.

    Example:
        >>> import jmeta
        >>> print(jmeta.citation("maml").splitlines()[0])
        @inproceedings{finn2017maml,
    """
    return lookup(CITATIONS, learner, "learner")
