"""Adaptive modality mixture (Xing et al. 2019)."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jmeta.core import Adapted, Examples, MetaLearner, Model, Params, State, Task, check_model
from jmeta.distances import squared_euclidean
from jmeta.embedding import embedded
from jmeta.errors import ConfigError
from jmeta.learners.prototypical import Classes, Distance, nearest, prototypes
from jmeta.learners.zero_shot import Describe, Hidden, init_towers, read_descriptions
from jmeta.losses import softmax_cross_entropy
from jmeta.masks import described, shots
from jmeta.models.adapters import linen


def am3(
    model: Model,
    *,
    describe: Describe = None,
    gate: Model | None = None,
    dropout: float = 0.0,
    distance: Distance = squared_euclidean,
) -> MetaLearner:
    """AM3: the prototype of a class is a mixture of its images and its description, by a gate for each class.

    wₖ = g_θ(description of class k), cₖ = mean of f_θ(x) over the shots x of class k,
    λₖ = σ(h_θ(wₖ, log(1 + shotsₖ))), pₖ = λₖ cₖ + (1 − λₖ) wₖ; p(y = k | x) = softmaxₖ(−d(f_θ(x), pₖ)).

    Without a shot λₖ = 0, which is zero-shot learning, and without a description λₖ = 1, which is a prototypical
    network: trained on a range of shots, one model serves them all.

    The gate is trained on classes whose descriptions g knows by heart, and trusts those of new classes as much: where
    descriptions say little, it is far below a prototypical network. `jmeta.late_fusion` is not.

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width.
        describe: g_θ before its last linear map; default as in `jmeta.zero_shot`.
        gate: h_θ, whose outputs are `[ways, 1]`; default: a perceptron with one hidden layer of 64.
        dropout: in training, the share of the hidden units of the default g and h that are left away (of an encoder of
            text, the share of the tokens); the authors' have 0.7 or 0.9, by data set.
        distance: d, `([queries, features], [classes, features]) -> [queries, classes]`.

    Returns:
        The learner, for any number of ways; its support has descriptions. `Adapted.params` is
        `Classes(θ, prototypes [ways, features], present [ways])`, `Adapted.info["image_share"]` is the mean of λₖ.

    Raises:
        ConfigError: `dropout` is below 0, or 1 or more.
        ModelError: a model is no `Model`.
        DataError: from `init` and `fit`: the support has no descriptions.

    Example:
        >>> import jmeta
        >>> learner = jmeta.am3(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))
        >>> tasks = jmeta.glyphs(shots=(0, 10), queries=5, descriptions="attributes")

    Reference: Xing, Rostamzadeh, Oreshkin, Pinheiro 2019, "Adaptive Cross-Modal Few-shot Learning", section 3.3,
    https://arxiv.org/abs/1902.07104.

    Differences from the paper: the gate sees the number of shots beside wₖ, so that one model can serve any number; the
    paper trains one for each. From the authors' code: its networks for g and h have dropout, these have it on request.
    """
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout is {dropout}; give a share from 0 to below 1.")
    gate = gate or linen(Hidden(64, dropout, outputs=1))
    check_model(gate)

    def gate_inputs(w: Float[Array, "ways features"], targets: Float[Array, "n ways"]) -> Array:
        return jnp.concatenate([w, jnp.log1p(shots(targets))[:, None]], axis=1)

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        towers_key, gate_key, _ = jax.random.split(key, 3)
        params, state = init_towers(model, describe, towers_key, task)
        linear = jax.tree.leaves(params["map"])[0]
        w = jnp.zeros((task.support.targets.shape[-1], linear.shape[-1]), linear.dtype)
        gate_params, gate_state = gate.init(gate_key, gate_inputs(w, task.support.targets))
        return {**params, "gate": gate_params}, {**state, "gate": gate_state}

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples, train: bool = False) -> Adapted:
        describe_key, gate_key = jax.random.split(key)
        w, state = read_descriptions(describe, describe_key, params, state, support, train=train, dropout=dropout)
        inputs = gate_inputs(w, support.targets)
        logit, gate_state = gate.apply(gate_key, params["gate"], state["gate"], inputs, train=train)
        seen, told = shots(support.targets) > 0, described(support.descriptions)
        λ = jnp.where(seen & told, jax.nn.sigmoid(logit[:, 0]), seen.astype(w.dtype))
        mixed = λ[:, None] * prototypes(support.inputs, support.targets) + (1 - λ[:, None]) * w
        return Adapted(Classes(params, mixed, seen | told), {**state, "gate": gate_state}, {"image_share": λ.mean()})

    training = embedded(model, init, partial(adapt, train=True), nearest(distance), softmax_cross_entropy)
    # dropout of g and h is for training alone
    return embedded(model, init, adapt, nearest(distance), softmax_cross_entropy)._replace(objective=training.objective)
