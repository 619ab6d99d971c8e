import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import linen as nn
from jax.test_util import check_grads

import jmeta
from jmeta.models.norms import BatchNorm
from jmeta.models.pooling import max_pool


def grouped(x, groups, ε=1e-3):
    """Group norm by its formula, in float64."""
    x = np.asarray(x, np.float64)
    parts = np.stack(np.split(x, groups, axis=-1))  # [groups, n, ..., features / groups]
    axes = tuple(range(2, parts.ndim))
    parts = (parts - parts.mean(axes, keepdims=True)) / np.sqrt(parts.var(axes, keepdims=True) + ε)
    return np.concatenate(list(parts), axis=-1)


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
    params, state = jax.jit(model.init)(key, support)
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
    np.testing.assert_allclose(state["task_stats"]["mean"], np.mean(SUPPORT, axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(state["task_stats"]["var"], np.var(SUPPORT, axis=(0, 1, 2)), rtol=1e-5)


def test_per_task_batch_norm_forgets_the_task_before():
    model = jmeta.linen(BatchNorm("per_task"))
    params, fresh = jax.jit(model.init)(jax.random.key(0), SUPPORT)
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

    ours, theirs = value_and_gradient(max_pool), value_and_gradient(lambda x: nn.max_pool(x, (2, 2), (2, 2)))
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
            y = layer.apply({"params": params}, x, train=True, pool=max_pool)
        else:
            y = nn.max_pool(layer.apply({"params": params}, x, train=True), (2, 2), (2, 2))
        return (weights * y).sum()

    ours, theirs = (jax.value_and_grad(value, argnums=(0, 1))(x, params, inside) for inside in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, theirs)


@pytest.mark.parametrize("norm", ["transductive", pytest.param("group", marks=pytest.mark.slow)])
def test_max_pooling_keeps_its_gradient_when_tasks_are_vmapped(norm, float64):
    """XLA may compute what is pooled twice, with two roundings: no entry then equals the maximum."""
    network = jmeta.Conv4(pooling="max", norm=norm, head_init="random")
    random = np.random.default_rng(0)
    images = jnp.asarray(random.random((2, 5, 28, 28, 1)))
    params = jax.jit(network.init)(jax.random.key(0), images[0].astype(jnp.float32))["params"]

    def gradient(dtype):
        def value(params, images):
            return jnp.square(network.apply({"params": params}, images)).sum()

        def adapted(params):
            step = jax.vmap(jax.grad(value), (None, 0))(params, images.astype(dtype))
            φ = jax.tree.map(lambda p, g: p[None] - dtype(0.01) * g, params, step)
            return jax.vmap(value)(φ, images.astype(dtype)).sum()

        return jax.tree.map(np.asarray, jax.jit(jax.grad(adapted))(jax.tree.map(lambda p: p.astype(dtype), params)))

    for ours, exact in zip(*map(jax.tree.leaves, (gradient(jnp.float32), gradient(jnp.float64))), strict=True):
        assert np.linalg.norm(ours - exact) < 1e-3 * np.linalg.norm(exact)


def test_max_pooling_goes_to_the_first_of_the_largest():
    x = jnp.asarray([[1.0, 3.0, 2.0, 2.0, 9.0], [3.0, 0.0, 2.0, 1.0, 9.0], [9.0, 9.0, 9.0, 9.0, 9.0]])[None, ..., None]
    y, gradient = jax.jit(lambda x: (max_pool(x), jax.grad(lambda x: max_pool(x).sum())(x)))(x)
    assert y.ravel().tolist() == [3.0, 2.0]
    expected = np.zeros((3, 5))
    expected[0, 1] = expected[0, 2] = 1.0
    np.testing.assert_array_equal(gradient[0, ..., 0], expected)
    assert np.isnan(max_pool(x.at[0, 1, 1].set(jnp.nan))[0, 0, 0])


# the network of MAML on Omniglot
OF_MAML = {"norm": "transductive", "scale": False, "spatial": "mean", "head_init": "random"}


def parameters(module, images):
    variables, outputs = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), images)[::-1])
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"])), outputs.shape


@pytest.mark.parametrize(
    ("options", "images", "count", "outputs"),
    [
        # 576 + 3 · 36,864 weights of convolutions, 4 · 64 shifts and as many scales, 2 · 2 · 64 · 5 + 5 of the head
        ({"outputs": 5}, (2, 28, 28, 1), 576 + 3 * 36864 + 512 + 1285, (2, 5)),
        ({"outputs": 5, **OF_MAML}, (2, 28, 28, 1), 576 + 3 * 36864 + 256 + 325, (2, 5)),
        ({"outputs": None, "pooling": "max"}, (2, 28, 28, 1), 576 + 3 * 36864 + 512, (2, 64)),
        # MAML on mini-ImageNet: 32 filters, 5 · 5 · 32 features
        (
            {"outputs": 5, "pooling": "max", "features": 32, "norm": "running"},
            (2, 84, 84, 3),
            864 + 3 * 9216 + 256 + 800 * 5 + 5,
            (2, 5),
        ),
        ({"outputs": None, "norm": "per_task"}, (3, 9, 7, 2), 2 * 576 + 3 * 36864 + 512, (3, 64)),
    ],
    ids=str,
)
def test_conv4_has_the_parameters_of_the_papers(options, images, count, outputs):
    assert parameters(jmeta.Conv4(**options), jnp.ones(images)) == (count, outputs)


def test_conv4_is_its_four_blocks():
    images = normal(0, (3, 9, 8, 1))
    network = jmeta.Conv4(outputs=5, features=4, **OF_MAML)
    variables = network.init(jax.random.key(0), images)
    params, x = variables["params"], images
    for i in range(4):
        x = nn.Conv(4, (3, 3), strides=2, use_bias=False).apply({"params": params[f"Conv_{i}"]}, x)
        x = nn.relu(normalised(x, x).astype(np.float32))
    head = params["head"]
    expected = x.mean((1, 2)) @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(network.apply(variables, images), expected, atol=1e-4)


def test_conv4_by_default_is_four_blocks_with_group_norm_and_a_head_of_zeros():
    images = normal(0, (3, 17, 16, 1))
    network = jmeta.Conv4(outputs=None, features=4, groups=2, pooling="stride")
    variables = jax.jit(network.init)(jax.random.key(0), images)
    x = images
    for i in range(4):
        kernel = {"params": variables["params"][f"Conv_{i}"]}
        x = nn.Conv(4, (3, 3), strides=2, use_bias=False).apply(kernel, x)
        x = nn.relu(grouped(x, 2).astype(np.float32))
    np.testing.assert_allclose(jax.jit(network.apply)(variables, images), x.reshape(3, -1), atol=1e-4)
    logits = jax.jit(jmeta.Conv4(outputs=5).init_with_output)(jax.random.key(0), images)[0]
    assert not np.asarray(logits).any()


def test_mlp_has_the_parameters_of_the_paper():
    assert parameters(jmeta.MLP(outputs=1), jnp.ones((10, 1))) == (80 + 1640 + 41, (10, 1))
    assert set(jmeta.MLP(outputs=1).init(jax.random.key(0), jnp.ones((2, 3)))["params"]) == {
        "Dense_0",
        "Dense_1",
        "head",
    }


@pytest.mark.parametrize(("hidden", "width"), [((8, 6), 6), ((), 3)])
def test_an_embedding_of_mlp_is_a_linear_map_and_what_its_hidden_layers_add(hidden, width):
    x, network = normal(0, (5, 3)), jmeta.MLP(outputs=None, hidden=hidden)
    start, variables = network.init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(
        jmeta.squared_euclidean(start, start), jmeta.squared_euclidean(x, x), rtol=1e-4, atol=1e-4
    )
    params = jax.tree.map(lambda p: np.asarray(p) + 0.1, variables["params"])
    z = network.apply({"params": params}, x)
    *layers, last = (params[name] for name in [*(f"Dense_{i}" for i in range(len(hidden))), "embedding"])
    expected = np.asarray(x)
    for layer in layers:
        expected = np.maximum(expected @ layer["kernel"] + layer["bias"], 0)
    linear = np.asarray(x) @ params["linear"]["kernel"]
    np.testing.assert_allclose(z, linear + expected @ last["kernel"] + last["bias"], atol=1e-5)
    assert z.shape == (5, width)
    assert (z < 0).any()


@pytest.mark.parametrize(("option", "choices"), [("norm", "'group' or 'layer'"), ("pooling", "'stride' or 'max'")])
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


@pytest.mark.parametrize("shape", [(5, 4, 3, 6), (7, 6)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_is_its_formula(shape, groups):
    x = normal(0, shape) * 2 + 100.0
    layer = jmeta.GroupNorm(groups)
    params = {"bias": normal(1, (6,)), "scale": normal(2, (6,))}
    expected = grouped(x, groups) * np.asarray(params["scale"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=2e-4)
    np.testing.assert_allclose(layer.apply({"params": params}, x[2:3]), expected[2:3], atol=2e-4)
    assert set(jmeta.GroupNorm(groups, scale=False).init(jax.random.key(0), x)["params"]) == {"bias"}


@pytest.mark.parametrize("layer", [jmeta.GroupNorm(2), jmeta.GroupNorm(1), BatchNorm(scale=True)], ids=str)
@pytest.mark.parametrize("pool", [None, max_pool])
def test_derivatives_of_a_norm_are_those_of_finite_differences(layer, pool, float64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 4)))
    params = {name: jnp.asarray(np.random.default_rng(i).normal(size=4)) for i, name in enumerate(("bias", "scale"))}

    def apply(x, p):
        return layer.apply({"params": jax.tree.map(jnp.asarray, p)}, jnp.asarray(x), train=True, pool=pool)

    check_grads(apply, (x, params), order=2, eps=1e-5)


@pytest.mark.parametrize("policy", ["transductive", "per_task", "running"])
def test_rows_outside_of_the_mask_do_not_enter_batch_statistics(policy):
    layer = BatchNorm(policy, scale=True)
    variables = layer.init(jax.random.key(0), SUPPORT, train=True)
    padded = jnp.concatenate([SUPPORT, 1e3 * QUERY])
    mask = jnp.arange(len(padded)) < len(SUPPORT)
    run = {"train": True, "mutable": ["task_stats", "batch_stats"]}
    expected, statistics = layer.apply(variables, SUPPORT, **run)
    y, padded_statistics = layer.apply(variables, padded, mask=mask, **run)
    np.testing.assert_allclose(y[: len(SUPPORT)], expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), padded_statistics, statistics)


def test_groups_that_do_not_divide_the_features_are_told():
    with pytest.raises(jmeta.ModelError, match="8 groups do not divide 20 features; choose a divisor"):
        jmeta.Conv4(features=20).init(jax.random.key(0), jnp.ones((1, 16, 16, 1)))


def executed(program):
    """How many operations a compiled program calls; what is inside of a fusion is one of them."""
    inside = set(re.findall(r"(?:calls|to_apply)=%([\w.-]+)", program))
    count, body = 0, ""
    for line in program.splitlines():
        if line.endswith("{"):
            body = line.split()[0].removeprefix("ENTRY").lstrip("%")
        operation = re.search(r" = \S+ ([\w-]+)\(", line)
        nothing = ("bitcast", "parameter", "constant", "get-tuple-element", "tuple")
        count += operation is not None and operation[1] not in nothing and body not in inside
    return count


@pytest.mark.slow
def test_group_norm_costs_what_batch_norm_costs():
    """Counted in the compiled meta-gradient of one task, exact MAML, the network of the papers."""
    source = jmeta.from_arrays(np.zeros((40, 28, 28, 1), np.uint8), np.repeat(np.arange(5), 8), queries=5)
    key = jax.random.key(0)

    def cost(**options):
        learner = jmeta.maml(jmeta.linen(jmeta.Conv4(outputs=5, **options)))
        task = jax.jit(source.sample)(key, source.data)
        params, state = jax.jit(learner.init)(key, task)
        tasks = jax.tree.map(lambda x: x[None], task)
        program = jax.jit(jax.grad(lambda p: learner.objective(key, p, state, tasks)[0])).lower(params).compile()
        counted = program.cost_analysis()
        return counted["flops"], counted["bytes accessed"], executed(program.as_text())

    flops, bytes_accessed, operations = np.asarray(cost()) / np.asarray(cost(norm="transductive"))
    assert flops < 1.02
    assert bytes_accessed < 1.1
    assert operations < 1.17


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "pooling", "megabytes", "operations"),
    [("group", "stride", 48, 330), ("group", "max", 112, 320), ("transductive", "stride", 48, 290)],
)
def test_a_meta_gradient_costs_no_more_than_it_did(norm, pooling, megabytes, operations):
    """Counted in the compiled exact meta-gradient of one 5-way 1-shot task of one query a class."""
    source = jmeta.from_arrays(np.zeros((40, 28, 28, 1), np.uint8), np.repeat(np.arange(5), 8), queries=1)
    key, learner = jax.random.key(0), jmeta.maml(jmeta.linen(jmeta.Conv4(outputs=5, norm=norm, pooling=pooling)))
    task = jax.jit(source.sample)(key, source.data)
    params, state = jax.jit(learner.init)(key, task)
    tasks = jax.tree.map(lambda x: x[None], task)
    program = jax.jit(jax.grad(lambda p: learner.objective(key, p, state, tasks)[0])).lower(params).compile()
    counted = program.cost_analysis()
    # the products of the convolutions alone, see `benchmarks.speed.cases.flops`
    needed = {"stride": 9.99e9 / 32, "max": 36.8e9 / 32}[pooling]
    assert counted["flops"] < 1.05 * needed
    assert counted["bytes accessed"] < 1e6 * megabytes
    assert executed(program.as_text()) < operations


@pytest.mark.slow
def test_first_order_costs_less_than_exact_with_max_pooling():
    source = jmeta.from_arrays(np.zeros((40, 28, 28, 1), np.uint8), np.repeat(np.arange(5), 8), queries=5)
    key = jax.random.key(0)

    def cost(adjoint):
        learner = jmeta.maml(jmeta.linen(jmeta.Conv4(outputs=5, features=16, pooling="max")), adjoint=adjoint)
        task = source.sample(key, source.data)
        params, state = learner.init(key, task)
        tasks = jax.tree.map(lambda x: x[None], task)
        program = jax.jit(jax.grad(lambda p: learner.objective(key, p, state, tasks)[0])).lower(params).compile()
        counted, memory = program.cost_analysis(), program.memory_analysis()
        return counted["flops"], counted["bytes accessed"], executed(program.as_text()), memory.temp_size_in_bytes

    ratios = np.asarray(cost(jmeta.first_order())) / np.asarray(cost(jmeta.exact()))
    assert (ratios < [0.8, 0.9, 0.8, 0.9]).all(), ratios
