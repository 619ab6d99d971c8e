import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import linen as nn

import jmeta
from jmeta.models.networks import BatchNorm, _max_pool


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def normalised(x, by, β=0.0, γ=1.0, ε=1e-3):
    """The formula, in float64."""
    x, by = np.asarray(x, np.float64), np.asarray(by, np.float64)
    axes = tuple(range(by.ndim - 1))
    return (x - by.mean(axes)) / np.sqrt(by.var(axes) + ε) * γ + β


SUPPORT, QUERY = normal(0, (5, 4, 4, 3)) * 2 + 1, normal(1, (7, 4, 4, 3)) - 1


def support_then_query(support, query, **options):
    """A `jmeta.linen` model sees the support, then the queries."""
    model = jmeta.linen(BatchNorm(**options))
    key = jax.random.key(0)
    params, state = model.init(key, support)
    on_support, state = model.apply(key, params, state, support, train=True)
    on_query, _ = model.apply(key, params, state, query, train=False)
    return on_support, on_query, state


def test_transductive_batch_norm_normalises_each_batch_by_itself():
    on_support, on_query, state = support_then_query(SUPPORT, QUERY)
    np.testing.assert_allclose(on_support, normalised(SUPPORT, SUPPORT), atol=1e-5)
    np.testing.assert_allclose(on_query, normalised(QUERY, QUERY), atol=1e-5)
    assert state == {}


def test_per_task_batch_norm_normalises_queries_by_the_support():
    on_support, on_query, state = support_then_query(SUPPORT, QUERY, policy="per_task")
    np.testing.assert_allclose(on_support, normalised(SUPPORT, SUPPORT), atol=1e-5)
    np.testing.assert_allclose(on_query, normalised(QUERY, SUPPORT), atol=1e-5)
    first_alone = support_then_query(SUPPORT, QUERY[:1], policy="per_task")[1]
    np.testing.assert_allclose(on_query[:1], first_alone, atol=1e-6)
    np.testing.assert_allclose(state["batch_stats"]["mean"], np.mean(SUPPORT, axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(state["batch_stats"]["var"], np.var(SUPPORT, axis=(0, 1, 2)), rtol=1e-5)


def test_per_task_batch_norm_forgets_the_task_before():
    model = jmeta.linen(BatchNorm("per_task"))
    params, fresh = model.init(jax.random.key(0), SUPPORT)
    _, after_another = model.apply(jax.random.key(0), params, fresh, QUERY, train=True)
    once, again = (
        model.apply(jax.random.key(0), params, state, SUPPORT, train=True) for state in (fresh, after_another)
    )
    jax.tree.map(np.testing.assert_array_equal, once, again)


def test_batch_norm_learns_a_shift_and_on_request_a_scale():
    params = {"bias": normal(2, (3,)), "scale": normal(3, (3,))}
    y = BatchNorm(scale=True).apply({"params": params}, SUPPORT, train=True)
    np.testing.assert_allclose(
        y, normalised(SUPPORT, SUPPORT, *map(np.asarray, (params["bias"], params["scale"]))), atol=1e-5
    )
    assert set(BatchNorm().init(jax.random.key(0), SUPPORT, train=True)["params"]) == {"bias"}


@pytest.mark.parametrize("policy", ["transductive", "per_task"])
def test_batch_norm_differentiates_twice_through_its_statistics(policy, float64):
    x, along, weights = (jnp.asarray(np.random.default_rng(i).normal(size=(4, 3))) for i in range(3))

    def by_layer(x):
        y = BatchNorm(policy).init_with_output(jax.random.key(0), x, train=True)[0]
        return (weights * y**2).sum()

    def by_formula(x):
        return (weights * ((x - x.mean(0)[None]) / jnp.sqrt(x.var(0) + 1e-3)[None]) ** 2).sum()

    ours, theirs = (jax.jit(lambda f=f: jax.jvp(jax.grad(f), (x,), (along,)))() for f in (by_layer, by_formula))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), ours, theirs)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (2, 3)], ids=str)
def test_max_pool_and_its_gradient_are_those_of_linen(size):
    x, weights = normal(0, (2, *size, 3)), normal(1, (2, size[0] // 2, size[1] // 2, 3))

    def value_and_gradient(pool):
        return pool(x), jax.grad(lambda x: (weights * pool(x)).sum())(x)

    ours, theirs = value_and_gradient(_max_pool), value_and_gradient(lambda x: nn.max_pool(x, (2, 2), (2, 2)))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("scale", [False, True])
def test_batch_norm_pools_before_it_normalises_to_the_same_end(scale, float64):
    x, weights = (
        jnp.asarray(np.random.default_rng(i).normal(size=s)) for i, s in enumerate([(3, 4, 4, 3), (3, 2, 2, 3)])
    )
    params = {"bias": jnp.asarray([0.3, -0.2, 0.1])} | ({"scale": jnp.asarray([1.5, -0.7, -2.0])} if scale else {})

    def value(x, params, inside):
        layer = BatchNorm(scale=scale)
        if inside:
            y = layer.apply({"params": params}, x, train=True, pool=_max_pool)
        else:
            y = nn.max_pool(layer.apply({"params": params}, x, train=True), (2, 2), (2, 2))
        return (weights * y).sum()

    ours, theirs = (jax.value_and_grad(value, argnums=(0, 1))(x, params, inside) for inside in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, theirs)


def test_max_pooling_keeps_its_gradient_when_tasks_are_vmapped(float64):
    """XLA may compute what is pooled twice, with two roundings: no entry then equals the maximum."""
    random = np.random.default_rng(0)
    images = jnp.asarray(random.random((2, 5, 28, 28, 1)))
    params = jmeta.Conv4(pooling="max").init(jax.random.key(0), images[0].astype(jnp.float32))["params"]

    def gradient(dtype):
        def value(params, images):
            return jnp.square(jmeta.Conv4(pooling="max").apply({"params": params}, images)).sum()

        def adapted(params):
            step = jax.vmap(jax.grad(value), (None, 0))(params, images.astype(dtype))
            φ = jax.tree.map(lambda p, g: p[None] - dtype(0.01) * g, params, step)
            return jax.vmap(value)(φ, images.astype(dtype)).sum()

        return jax.tree.map(np.asarray, jax.jit(jax.grad(adapted))(jax.tree.map(lambda p: p.astype(dtype), params)))

    for ours, exact in zip(*map(jax.tree.leaves, (gradient(jnp.float32), gradient(jnp.float64))), strict=True):
        assert np.linalg.norm(ours - exact) < 1e-3 * np.linalg.norm(exact)


def parameters(module, images):
    variables, outputs = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), images)[::-1])
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"])), outputs.shape


@pytest.mark.parametrize(
    ("options", "images", "count", "outputs"),
    [
        # 576 + 3 · 36,864 weights of convolutions, 4 · 64 shifts, 64 · 5 + 5 of the head
        ({"outputs": 5}, (2, 28, 28, 1), 576 + 3 * 36864 + 256 + 325, (2, 5)),
        ({"outputs": 20, "scale": True}, (2, 28, 28, 1), 576 + 3 * 36864 + 512 + 1300, (2, 20)),
        ({"outputs": None, "pooling": "max"}, (2, 28, 28, 1), 576 + 3 * 36864 + 256, (2, 64)),
        # MAML on mini-ImageNet: 32 filters, 5 · 5 · 32 features
        (
            {"outputs": 5, "pooling": "max", "features": 32, "scale": True},
            (2, 84, 84, 3),
            864 + 3 * 9216 + 256 + 800 * 5 + 5,
            (2, 5),
        ),
        ({"outputs": None, "batch_norm": "per_task"}, (3, 9, 7, 2), 2 * 576 + 3 * 36864 + 256, (3, 64)),
    ],
    ids=str,
)
def test_conv4_has_the_parameters_of_the_papers(options, images, count, outputs):
    assert parameters(jmeta.Conv4(**options), jnp.ones(images)) == (count, outputs)


def test_conv4_is_its_four_blocks():
    images = normal(0, (3, 9, 8, 1))
    variables = jmeta.Conv4(outputs=5, features=4).init(jax.random.key(0), images)
    params, x = variables["params"], images
    for i in range(4):
        x = nn.Conv(4, (3, 3), strides=2, use_bias=False).apply({"params": params[f"Conv_{i}"]}, x)
        x = nn.relu(normalised(x, x).astype(np.float32))
    head = params["head"]
    expected = x.mean((1, 2)) @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(jmeta.Conv4(outputs=5, features=4).apply(variables, images), expected, atol=1e-4)


def test_mlp_has_the_parameters_of_the_paper():
    assert parameters(jmeta.MLP(outputs=1), jnp.ones((10, 1))) == (80 + 1640 + 41, (10, 1))
    assert set(jmeta.MLP(outputs=1).init(jax.random.key(0), jnp.ones((2, 3)))["params"]) == {
        "Dense_0",
        "Dense_1",
        "head",
    }


@pytest.mark.parametrize(("hidden", "width"), [((8, 6), 6), ((), 3)])
def test_an_embedding_of_mlp_is_its_hidden_layers_and_a_linear_one(hidden, width):
    x = normal(0, (5, 3))
    z, variables = jmeta.MLP(outputs=None, hidden=hidden).init_with_output(jax.random.key(0), x)
    params = jax.tree.map(np.asarray, variables["params"])
    *layers, last = (params[name] for name in [*(f"Dense_{i}" for i in range(len(hidden))), "embedding"])
    expected = np.asarray(x)
    for layer in layers:
        expected = np.maximum(expected @ layer["kernel"] + layer["bias"], 0)
    np.testing.assert_allclose(z, expected @ last["kernel"] + last["bias"], atol=1e-5)
    assert z.shape == (5, width)
    assert (z < 0).any()


@pytest.mark.parametrize(
    ("option", "choices"), [("batch_norm", "'transductive' or 'per_task'"), ("pooling", "'stride' or 'max'")]
)
def test_an_unknown_option_is_told(option, choices, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users do not run under the type checker
    with pytest.raises(jmeta.ConfigError, match=f"{option} is 'other'; give {choices}"):
        jmeta.Conv4(**{option: "other"})


def test_images_too_small_for_four_poolings_are_told():
    with pytest.raises(jmeta.ModelError, match="16"):
        jax.eval_shape(lambda: jmeta.Conv4(pooling="max").init(jax.random.key(0), jnp.ones((2, 15, 28, 1))))


def test_batch_norm_in_float32_is_exact_far_from_zero():
    """The mean of squares less the square of the mean would lose all digits: (1000 ± 1)² in float32."""
    x = 1000.0 + np.random.default_rng(0).normal(size=(64, 3))
    weights = np.random.default_rng(1).normal(size=(64, 3))
    layer = BatchNorm()

    def gradient(x, weights):
        variables = layer.init(jax.random.key(0), x, train=True)
        return jax.grad(lambda x: (weights * layer.apply(variables, x, train=True) ** 2).sum())(x)

    x = x.astype(np.float32)  # what both see
    low = gradient(jnp.asarray(x), jnp.asarray(weights, jnp.float32))
    with jax.enable_x64(True):
        high = gradient(jnp.asarray(x, jnp.float64), jnp.asarray(weights, jnp.float64))
    np.testing.assert_allclose(low, high, rtol=1e-3, atol=1e-4)
