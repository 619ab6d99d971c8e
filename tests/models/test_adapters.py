from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jmeta

SOURCE = jmeta.sinusoid(shots=5)
WIDTHS = (1, 8, 8, 1)
RNG = np.random.default_rng(0)
WEIGHTS = [
    (np.float32(RNG.normal(size=(a, b)) / a**0.5), np.float32(0.1 * RNG.normal(size=b))) for a, b in pairwise(WIDTHS)
]


def linen_mlp():
    def tree(weights):
        return {
            name: {"kernel": w, "bias": b} for name, (w, b) in zip(["Dense_0", "Dense_1", "head"], weights, strict=True)
        }

    return jmeta.linen(jmeta.MLP(outputs=1, hidden=(8, 8))), tree


def nnx_mlp():
    def make(rngs):
        layers = [nnx.Linear(a, b, rngs=rngs) for a, b in pairwise(WIDTHS)]
        return nnx.Sequential(layers[0], nnx.relu, layers[1], nnx.relu, layers[2])

    def tree(weights):
        return {"layers": {2 * i: {"kernel": w, "bias": b} for i, (w, b) in enumerate(weights)}}

    return jmeta.nnx(make), tree


def equinox_mlp():
    eqx = pytest.importorskip("equinox")
    model = jmeta.equinox(lambda key: eqx.nn.MLP(1, 1, 8, 2, key=key))
    like = model.init(jax.random.key(0), jnp.ones((1, 1)))[0]

    def tree(weights):
        leaves = [leaf for w, b in weights for leaf in (jnp.swapaxes(w, -1, -2), b)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    return model, tree


def haiku_mlp():
    hk = pytest.importorskip("haiku", exc_type=Exception)

    def tree(weights):
        return {f"mlp/~/linear_{i}": {"w": w, "b": b} for i, (w, b) in enumerate(weights)}

    return jmeta.haiku(lambda inputs: hk.nets.MLP(WIDTHS[1:])(inputs)), tree


ADAPTERS = {"linen": linen_mlp, "nnx": nnx_mlp, "equinox": equinox_mlp, "haiku": haiku_mlp}


def learner_of(model):
    return jmeta.maml(model, inner_rate=0.05, inner_steps=2, loss=jmeta.mean_squared_error)


def by_hand(weights, tasks):
    """φ of each task and the meta-gradient of `learner_of`, from nothing but jax.grad."""

    def loss(weights, examples):
        x = examples.inputs
        for i, (w, b) in enumerate(weights):
            x = (jax.nn.relu(x) if i else x) @ w + b[None]
        return jnp.square(x - examples.targets).mean()

    def adapt(weights, support):
        for _ in range(2):
            weights = jax.tree.map(lambda p, g: p - 0.05 * g, weights, jax.grad(loss)(weights, support))
        return weights

    def objective(weights):
        return jax.vmap(lambda task: loss(adapt(weights, task.support), task.query))(tasks).mean()

    return jax.vmap(lambda task: adapt(weights, task.support))(tasks), jax.grad(objective)(weights)


@pytest.mark.parametrize("library", ADAPTERS)
def test_each_library_gives_the_meta_gradient_written_by_hand(library):
    model, tree = ADAPTERS[library]()
    learner, params, key = learner_of(model), tree(WEIGHTS), jax.random.key(0)
    tasks = jax.vmap(SOURCE.sample, (0, None))(jax.random.split(key, 3), SOURCE.data)
    fresh, state = model.init(key, tasks.support.inputs[0])
    assert_same_shapes(fresh, params)

    @jax.jit
    def by_learner(params):
        φ = jax.vmap(lambda task: learner.adapt(key, params, state, task.support).params)(tasks)
        return φ, jax.grad(lambda params: learner.objective(key, params, state, tasks)[0])(params)

    φ, gradient = jax.jit(by_hand)(WEIGHTS, tasks)
    assert_close(by_learner(params), (tree(φ), tree(gradient)))


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), a, b)


def assert_same_shapes(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.map(np.shape, a) == jax.tree.map(np.shape, b)


@pytest.mark.parametrize("library", ADAPTERS)
def test_each_library_is_trained_by_fit(library):
    model, _ = ADAPTERS[library]()
    fitted = jmeta.fit(jax.random.key(0), learner_of(model), SOURCE, steps=4, tasks=2, log_every=2)
    assert [row["step"] for row in fitted.history] == [2, 4]
    assert np.isfinite([row["loss"] for row in fitted.history]).all()


def linen_normalised():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
            return nn.Dropout(0.5, deterministic=not train)(x)

    return jmeta.linen(Net())


def nnx_normalised():
    def make(rngs):
        return nnx.Sequential(nnx.BatchNorm(4, momentum=0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))

    return jmeta.nnx(make)


def haiku_normalised():
    hk = pytest.importorskip("haiku", exc_type=Exception)

    def net(inputs, train):
        x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.5)(inputs, is_training=train)
        with jax.numpy_dtype_promotion("standard"):  # hk.dropout multiplies by a mask of booleans
            return hk.dropout(hk.next_rng_key(), 0.5, x) if train else x

    return jmeta.haiku(net)


NORMALISED = {"linen": linen_normalised, "nnx": nnx_normalised, "haiku": haiku_normalised}


@pytest.mark.parametrize("library", NORMALISED)
def test_batch_norm_and_dropout_train_on_the_support_and_rest_on_the_queries(library):
    model = NORMALISED[library]()
    x = jnp.asarray(3 * RNG.normal(size=(64, 4)) + 1, jnp.float32)
    one, two = jax.random.split(jax.random.key(0))
    params, fresh = model.init(one, x)

    trained, state = model.apply(one, params, fresh, x, train=True)
    assert 0.3 < float((trained == 0).mean()) < 0.7
    np.testing.assert_array_equal(model.apply(one, params, fresh, x, train=True)[0], trained)
    assert (model.apply(two, params, fresh, x, train=True)[0] != trained).any()
    assert_same_shapes(fresh, state)
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), fresh, state)
    assert any(jax.tree.leaves(moved))

    asked, unmoved = model.apply(one, params, state, x, train=False)
    np.testing.assert_array_equal(model.apply(two, params, state, x, train=False)[0], asked)
    np.testing.assert_allclose(model.apply(one, params, state, x[:1], train=False)[0], asked[:1], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state, unmoved)


@pytest.mark.parametrize("library", NORMALISED)
def test_moving_averages_are_constants(library):
    model = NORMALISED[library]()
    x = jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)
    params, state = model.init(jax.random.key(0), x)

    def statistics(x):
        state_after = model.apply(jax.random.key(0), params, state, x, train=True)[1]
        return sum(leaf.sum() for leaf in jax.tree.leaves(state_after) if leaf.dtype == jnp.float32)

    np.testing.assert_array_equal(jax.grad(statistics)(x), 0)


class TwoDropouts(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return jnp.stack([self.one(x), self.two(x)])


def test_dropout_of_nnx_differs_between_layers_and_between_tasks():
    model = jmeta.nnx(TwoDropouts)
    x = jnp.ones(50)
    params, state = model.init(jax.random.key(0), x)
    assert jax.tree.leaves((params, state)) == []
    keys = jax.random.split(jax.random.key(1), 2)
    masks = jax.vmap(lambda key: model.apply(key, params, state, x, train=True)[0])(keys).reshape(4, 50)
    assert len(np.unique(masks, axis=0)) == 4
