"""Meta-Baseline, FEAT and Tip-Adapter against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta
from jmeta.core import Examples

KEY = jax.random.key(0)
WAYS, FEATURES = 3, 5


def task(seed=0):
    """Support, one-hot targets, class names and queries."""
    random = np.random.default_rng(seed)
    y = np.eye(WAYS)[np.repeat(np.arange(WAYS), 2)]
    x, names, q = (random.normal(size=(n, FEATURES)) for n in (len(y), WAYS, 4))
    return x, y, names, q


def run(learner, x, y, names, q, params=None):
    """θ as the learner begins, what is adapted, and what it says of the queries."""
    support = Examples(*map(jnp.asarray, (x, y, names)))

    def asked(support, q):
        begun, state = learner.init(KEY, jmeta.Task(support, Examples(q, ())))
        begun = begun if params is None else {**begun, **params}
        adapted = learner.adapt(KEY, begun, state, support)
        return begun, adapted, learner.predict(KEY, adapted, q)

    return jax.device_get(jax.jit(asked)(support, jnp.asarray(q)))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def softmax(x):
    p = np.exp(x - x.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def square(a, b):
    return np.square(a[:, None] - b[None]).sum(axis=2)


def test_meta_baseline_is_a_cosine_times_a_learned_temperature(float64):
    x, y, names, q = task()
    learner = jmeta.meta_baseline(jmeta.identity(), temperature=7.0)
    params, _, outputs = run(learner, x, y, names, q)
    assert params == {"model": {}, "temperature": 7.0}
    np.testing.assert_allclose(outputs, 7.0 * unit(q) @ unit(y.T @ x / 2).T, atol=1e-12)
    support, query = (
        Examples(jnp.asarray(x), jnp.asarray(y)),
        Examples(jnp.asarray(q), jnp.eye(WAYS)[jnp.arange(4) % 3]),
    )
    batch = jax.tree.map(lambda leaf: leaf[None], jmeta.Task(support, query))
    gradient = jax.jit(jax.grad(lambda params: learner.objective(KEY, params, {"model": {}}, batch)[0]))(params)
    assert abs(gradient["temperature"]) > 1e-3


def attended(x, params):
    """LayerNorm(x + W softmax(x Q Kᵀ xᵀ / √d) x V + b)."""
    query, key, value = (x @ params[name]["kernel"] for name in ("query", "key", "value"))
    said = softmax(query @ key.T / np.sqrt(x.shape[1])) @ value @ params["out"]["kernel"] + params["out"]["bias"]
    moved = x + said
    centred = moved - moved.mean(axis=1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + 1e-6)


@pytest.fixture
def promoting():
    """Flax's layer norm mixes dtypes in float64."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_feat_adapts_prototypes_by_attention_and_keeps_classes_together(float64, promoting):
    x, y, names, q = task()
    learner = jmeta.feat(jmeta.identity(), temperature=2.0, balance=0.5, balance_temperature=3.0, dropout=0.0)
    params, adapted, outputs = run(learner, x, y, names, q)
    transformer = params["transformer"]
    moved = attended(y.T @ x / 2, transformer)
    np.testing.assert_allclose(adapted.params.points, moved, atol=1e-9)
    np.testing.assert_allclose(outputs, -square(q, moved) / 2, atol=1e-9)
    # the loss of training, but for the dropout of attention, which is the authors' own
    labels = np.eye(WAYS)[[0, 1, 2, 0]]
    every, of = np.concatenate([x, q]), np.concatenate([y, labels])
    centres = np.stack([attended(every[of[:, k] > 0], transformer).mean(axis=0) for k in range(WAYS)])
    first = -(labels * np.log(softmax(outputs))).sum(axis=1).mean()
    second = -(of * np.log(softmax(-square(every, centres) / 3))).sum(axis=1).mean()
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], jmeta.Task(Examples(x, y), Examples(q, labels)))
    objective = jax.jit(lambda key: learner.objective(key, params, {"model": {}}, batch)[0])
    losses = [objective(jax.random.key(i)) for i in range(8)]
    assert np.std(losses) > 0
    assert np.mean(losses) == pytest.approx(first + 0.5 * second, rel=0.1)


def tip(x, y, names, q, α=1.0, β=5.5, s=100.0):
    return s * unit(q) @ unit(names).T + α * np.exp(-β * (1 - unit(q) @ unit(x).T)) @ y


def test_tip_adapter_is_a_classifier_of_names_and_a_cache(float64):
    x, y, names, q = task()
    learner = jmeta.tip_adapter(jmeta.identity(), aligned=True)
    np.testing.assert_allclose(run(learner, x, y, names, q)[2], tip(x, y, names, q), atol=1e-9)
    learned = {"residual": jnp.asarray(0.1), "sharpness": jnp.asarray(-0.05), "scale": jnp.asarray(-0.2)}
    expected = tip(x, y, names, q, np.exp(2.0), 5.5 * np.exp(-1.0), 100 * np.exp(-4.0))
    np.testing.assert_allclose(run(learner, x, y, names, q, learned)[2], expected, atol=1e-6)


def test_tip_adapter_f_trains_the_keys_on_the_support(float64):
    x, y, names, q = task()
    options = {"aligned": True, "scale": 2.0, "residual": 3.0, "tuning_rate": 0.05}
    kept, trained = (
        run(jmeta.tip_adapter(jmeta.identity(), finetune=True, tuning_steps=steps, **options), x, y, names, q)[1]
        for steps in (0, 20)
    )
    np.testing.assert_allclose(kept.params.keys, unit(x), atol=1e-12)
    p = softmax(tip(x, y, names, x, α=3.0, s=2.0))
    assert kept.info["inner_loss"] == pytest.approx(-(y * np.log(p)).sum(axis=1).mean(), abs=1e-9)
    assert trained.info["inner_loss"] < kept.info["inner_loss"] - 0.01


def test_a_class_without_a_name_or_an_example_is_known_by_the_other():
    x, y, names, q = (part.astype(np.float32) for part in task())
    learner = jmeta.tip_adapter(jmeta.identity(), aligned=True)
    untold, unseen = names * np.asarray([[1.0], [1.0], [0.0]], np.float32), y * np.asarray([1.0, 1.0, 0.0], np.float32)
    by_name = 100 * unit(q) @ unit(names).T
    outputs = run(learner, x, y, untold, q)[2]
    cache = np.exp(-5.5 * (1 - unit(q) @ unit(x).T)) @ y
    np.testing.assert_allclose(outputs[:, 2], by_name[:, :2].mean(axis=1) + cache[:, 2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(run(learner, x, unseen, names, q)[2][:, 2], by_name[:, 2], rtol=1e-4, atol=1e-4)
    assert (run(learner, x, unseen, untold, q)[2].argmax(axis=1) != 2).all()


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (jmeta.meta_baseline, {"temperature": 0.0}, "temperature is 0.0; give a positive number"),
        (jmeta.feat, {"balance_temperature": 0.0}, "balance_temperature is 0.0; give a positive number"),
        (jmeta.feat, {"dropout": 1.0}, "dropout is 1.0; give a share from 0 to below 1"),
        (jmeta.fused_cosine, {"worth": 0.0}, "worth is 0.0; give a positive number"),
        (jmeta.tip_adapter, {"residual": 0.0}, "residual is 0.0; give a positive number"),
        (jmeta.tip_adapter, {"tuning_steps": -1}, "tuning_steps is -1; give 0 or more"),
    ],
)
def test_numbers_that_cannot_work_are_refused(make, options, sentence):
    with pytest.raises(jmeta.ConfigError, match=sentence):
        make(jmeta.identity(), **options)


@pytest.mark.parametrize("make", [jmeta.tip_adapter, jmeta.fused_cosine])
def test_names_go_through_the_network_of_the_examples(make):
    x, y, names, q = task()
    given = [a.astype(np.float32) for a in (x, y, names, q)]
    turned = jmeta.linen(jmeta.MLP(outputs=None, hidden=()))  # a turn of the space, which changes no cosine
    plain, found = (run(make(model, aligned=True), *given)[2] for model in (jmeta.identity(), turned))
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-3)
    with pytest.raises(jmeta.DataError, match=r"descriptions are of shape \[3, 4\] and inputs \[n, 5\]; give such"):
        run(make(jmeta.identity(), aligned=True), x, y, names[:, :4], q)


def test_names_of_another_width_go_through_the_network_of_the_texts():
    random = np.random.default_rng(0)
    ids, names = random.integers(1, 50, (6, 7), np.int32), random.integers(1, 50, (WAYS, 4), np.int32)
    learner = jmeta.fused_cosine(jmeta.linen(jmeta.TextEncoder(buckets=50, features=8)), aligned=True)
    targets = jnp.asarray(task()[1], jnp.float32)

    def answers(descriptions, inputs=ids):
        support, key = Examples(jnp.asarray(inputs), targets, descriptions), jax.random.key(0)
        params, state = learner.init(key, jmeta.Task(support, Examples(jnp.asarray(inputs), targets)))
        return learner.predict(key, learner.adapt(key, params, state, support), jnp.asarray(inputs))

    filled = jnp.asarray(np.pad(names, ((0, 0), (0, 3))))
    found = answers(jmeta.TokenIds(jnp.asarray(names)))
    np.testing.assert_allclose(found, answers(jmeta.TokenIds(filled)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, answers(filled), rtol=1e-5, atol=1e-5)
    with pytest.raises(jmeta.DataError, match=r"descriptions are token ids and inputs \[n, 7\]; give such"):
        answers(jmeta.TokenIds(filled), ids.astype(np.float32))


def test_fused_cosines_are_those_with_mean_and_name_through_one_network(float64):
    x, y, names, q = task()
    y[:2, 0], y[2, 1] = (0.0, 0.0), 0.0  # no shot, one and two
    learner = jmeta.fused_cosine(jmeta.identity(), aligned=True, temperature=3.0, worth=0.5)
    found = run(learner, x, y, names, q)[2]
    count = y.sum(axis=0)
    c, w = (1 - unit(q) @ unit(a).T for a in (y.T @ x / np.maximum(count, 1)[:, None] + 1e-30, names))
    offset = (w - c)[:, 1:].mean(axis=1, keepdims=True)
    expected = -3.0 * (count * c + 0.5 * (w - offset)) / (count + 0.5)
    np.testing.assert_allclose(found, expected, atol=1e-9)
