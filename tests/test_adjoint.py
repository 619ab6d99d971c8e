"""Meta-gradients against closed forms, finite differences and an independent NumPy implementation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree

import jmeta
from jmeta.inner import _equations
from jmeta.models.convolution import conv_p
from jmeta.models.norms import norm_layer
from jmeta.models.pooling import max_pool

α = 0.1


class Quadratic(NamedTuple):
    """L(θ) = ½ (θ − c)ᵀ H (θ − c), as the support and the query of a task."""

    H: jax.Array
    c: jax.Array


def example(seed=0):
    """θ, a support and a query."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return jax.random.normal(keys[0], (4,)), quadratic(keys[1]), quadratic(keys[2])


def quadratic_loss(θ, task):
    return 0.5 * (θ - task.c) @ task.H @ (θ - task.c)


def quadratic(key, n=4):
    a, b = jax.random.split(key)
    A = jax.random.normal(a, (n, n))
    return Quadratic(A @ A.T / n + jnp.eye(n), jax.random.normal(b, (n,)))


def meta_gradient(adjoint, θ, support, query, steps, optimiser=None, adaptable=lambda path: True):
    problem = jmeta.InnerProblem(
        lambda key, params, state, support: (quadratic_loss(params["θ"], support), state),
        optimiser or optax.sgd(α),
        steps,
        adaptable,
    )
    solve = adjoint(problem)

    def outer(θ):
        φ = solve(jax.random.key(0), {"θ": θ}, (), support).params["θ"]
        return quadratic_loss(φ, query)

    return jax.jit(jax.grad(outer))(θ)


def adapted_by_hand(θ, support, steps):
    for _ in range(steps):
        θ = θ - α * support.H @ (θ - support.c)
    return θ


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_exact_is_the_closed_form_on_quadratic_tasks(float64, steps):
    θ, support, query = example(steps)
    g = query.H @ (adapted_by_hand(θ, support, steps) - query.c)
    factor = np.linalg.matrix_power(np.eye(4) - α * np.asarray(support.H), steps)
    np.testing.assert_allclose(meta_gradient(jmeta.exact(), θ, support, query, steps), factor.T @ g, rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_first_order_is_the_query_gradient_at_phi(float64, steps):
    θ, support, query = example(steps)
    g = query.H @ (adapted_by_hand(θ, support, steps) - query.c)
    np.testing.assert_allclose(meta_gradient(jmeta.first_order(), θ, support, query, steps), g, rtol=1e-12)


@pytest.mark.parametrize("optimiser", [optax.adam(α, eps_root=1e-8), optax.sgd(α, momentum=0.9), optax.rmsprop(α)])
def test_exact_differentiates_through_any_optax_optimiser(float64, optimiser):
    θ, support, query = example()

    def value(θ):
        state, φ = optimiser.init(θ), θ
        for _ in range(3):
            updates, state = optimiser.update(support.H @ (φ - support.c), state, φ)
            φ = optax.apply_updates(φ, updates)
        return quadratic_loss(φ, query)

    with jax.numpy_dtype_promotion("standard"):
        expected = finite_differences(value, θ)
    np.testing.assert_allclose(meta_gradient(jmeta.exact(), θ, support, query, 3, optimiser), expected, rtol=1e-5)


def finite_differences(function, x, size=1e-5):
    function = jax.jit(function)
    eye = np.eye(x.size)
    return np.asarray([(function(x + size * e) - function(x - size * e)) / (2 * size) for e in eye])


def test_an_adaptable_path_that_matches_nothing_lists_the_leaves():
    with pytest.raises(jmeta.ConfigError, match="choose among θ"):
        meta_gradient(
            jmeta.exact(),
            jnp.zeros(4),
            quadratic(jax.random.key(0)),
            quadratic(jax.random.key(1)),
            1,
            adaptable=bool_no,
        )


def bool_no(path):
    return False


@pytest.mark.parametrize("adjoint", [jmeta.exact(), jmeta.exact(checkpoint=True), jmeta.truncated(last=2)])
def test_info_holds_the_inner_losses(adjoint):
    support = quadratic(jax.random.key(0))
    problem = jmeta.InnerProblem(
        lambda key, params, state, support: (quadratic_loss(params, support), state), optax.sgd(α), 6
    )
    adapted = jax.jit(adjoint(problem))(jax.random.key(0), jnp.zeros(4), (), support)
    expected = [quadratic_loss(adapted_by_hand(jnp.zeros(4), support, k), support) for k in range(6)]
    np.testing.assert_allclose(adapted.info["inner_loss"], expected, rtol=1e-5)


def images_task(key, ways=2, queries=2, size=8):
    keys = jax.random.split(key, 2)
    examples = [
        jmeta.Examples(jax.random.normal(k, (ways * n, size, size, 1)), jnp.repeat(jnp.eye(ways), n, axis=0))
        for k, n in zip(keys, (1, queries), strict=True)
    ]
    return jmeta.Task(*examples)


def in_float64(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64), tree)


class Block(nn.Module):
    """One block of Conv4 with its head: convolution, norm, ReLU, pooling."""

    norm: str = "group"
    pooling: str = "stride"

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        x = jmeta.Conv(2, (3, 3), strides=2 if self.pooling == "stride" else 1)(x)
        x = nn.relu(norm_layer(self.norm, scale=True, groups=1)(x, train=train, mask=mask))
        x = x if self.pooling == "stride" else max_pool(x)
        return nn.Dense(2, name="head")(x.reshape(len(x), -1))


def test_the_first_pass_over_all_supports_is_one_of_one_network():
    """Its weights are θ, which is the same for all tasks: their supports are one batch, and no pairs of a loop."""
    learner = jmeta.maml(jmeta.linen(Block()), inner_rate=α)
    tasks = jax.vmap(images_task)(jax.random.split(jax.random.key(0), 3))
    params, state = learner.init(jax.random.key(0), jax.tree.map(lambda x: x[0], tasks))

    def answered(task):
        adapted = learner.adapt(jax.random.key(0), params, state, task.support)
        return learner.predict(jax.random.key(0), adapted, task.query.inputs)

    program = jax.make_jaxpr(jax.vmap(answered))(tasks).jaxpr
    passes = [e.invars[1].aval.shape[0] for e in _equations(program) if e.primitive is conv_p]
    assert passes == [1, 3]  # the supports at θ, the queries at φ of each task


@pytest.mark.parametrize(
    ("pooling", "norm"),
    [
        ("stride", "transductive"),
        pytest.param("max", "transductive", marks=pytest.mark.slow),
        pytest.param("stride", "group", marks=pytest.mark.slow),
        ("max", "layer"),
        ("stride", "per_task"),
    ],
)
def test_maml_on_a_conv_net_against_finite_differences(float64, pooling, norm):
    learner = jmeta.maml(jmeta.linen(Block(norm, pooling)), inner_rate=0.5, inner_steps=2)
    task = images_task(jax.random.key(3))
    single = jax.tree.map(lambda x: x.astype(jnp.float32), task)
    params, state = in_float64(jax.jit(learner.init)(jax.random.key(1), single))
    flat, unravel = ravel_pytree(params)
    tasks = jax.tree.map(lambda x: x[None], task)

    def objective(flat):
        return learner.objective(jax.random.key(2), unravel(flat), state, tasks)[0]

    right = {"xla_backend_optimization_level": 1}  # see conftest.py
    both, size = jax.jit(jax.value_and_grad(objective), compiler_options=right), 1e-6
    _, gradient = both(flat)
    for direction in np.random.default_rng(0).normal(size=(5, flat.size)):
        numeric = (both(flat + size * direction)[0] - both(flat - size * direction)[0]) / (2 * size)
        np.testing.assert_allclose(gradient @ direction, numeric, rtol=1e-5)


@pytest.mark.parametrize("adjoint", [jmeta.exact(), jmeta.first_order(), jmeta.mixed_mode(), jmeta.implicit()])
def test_statistics_of_the_support_are_those_at_φ(adjoint):
    """Not those of the last inner step, which are of the parameters before it; also without any inner step."""
    model = jmeta.linen(Block("per_task"))
    task = images_task(jax.random.key(3))
    seen = jax.jit(lambda φ, state: model.apply(jax.random.key(0), φ, state, task.support.inputs, train=True))
    for steps in (0, 2):
        problem = jmeta.InnerProblem(
            jmeta.support_loss(model, jmeta.softmax_cross_entropy), optax.sgd(0.5), steps, proximal=1.0
        )
        params, state = jax.jit(model.init)(jax.random.key(1), task.support.inputs)
        adapted = jax.jit(adjoint(problem))(jax.random.key(0), params, state, task.support)
        _, expected = seen(adapted.params, state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), adapted.state, expected)


@pytest.mark.parametrize("last", [0, 1, 3, 9])
def test_truncated_is_the_product_over_the_last_steps(float64, last):
    θ, support, query = example(last)
    g = query.H @ (adapted_by_hand(θ, support, 4) - query.c)
    factor = np.linalg.matrix_power(np.eye(4) - α * np.asarray(support.H), min(last, 4))
    np.testing.assert_allclose(meta_gradient(jmeta.truncated(last), θ, support, query, 4), factor.T @ g, rtol=1e-12)


def test_truncated_refuses_a_negative_number_of_steps():
    with pytest.raises(jmeta.ConfigError, match="last is -1"):
        jmeta.truncated(last=-1)


EXACT = {
    "checkpoint": jmeta.exact(checkpoint=True),
    "mixed": jmeta.mixed_mode(),
    "mixed-checkpoint": jmeta.mixed_mode(checkpoint=True),
    "all": jmeta.truncated(last=6),
}


@pytest.mark.parametrize("adjoint", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("optimiser", [optax.sgd(α), optax.adam(α, eps_root=1e-8)], ids=["sgd", "adam"])
@pytest.mark.parametrize("steps", [1, 5, 6])  # one segment of one, one of all, several
def test_every_exact_adjoint_gives_the_same_meta_gradient(float64, adjoint, optimiser, steps):
    gradient = meta_gradient(adjoint, *example(), steps, optimiser)
    np.testing.assert_allclose(gradient, exact_gradient(optimiser, steps), rtol=1e-10)


@functools.cache
def exact_gradient(optimiser, steps):
    return meta_gradient(jmeta.exact(), *example(), steps, optimiser)


@pytest.mark.parametrize("adaptable", [lambda path: True, lambda path: "head" in path], ids=["maml", "anil"])
def test_every_exact_adjoint_agrees_on_a_conv_net_and_a_batch_of_tasks(float64, adaptable):
    tasks = jax.tree.map(lambda *x: jnp.stack(x), *[images_task(jax.random.key(i)) for i in range(2)])
    assert_every_exact_adjoint_agrees(jmeta.linen(Block()), tasks, adaptable)


def assert_every_exact_adjoint_agrees(model, tasks, adaptable=lambda path: True):
    inputs = tasks.support.inputs[0].astype(jnp.float32)
    params = in_float64(jax.jit(model.init)(jax.random.key(1), inputs)[0])

    def gradient(adjoint):
        learner = jmeta.maml(model, inner_steps=6, adjoint=adjoint, adaptable=adaptable)
        tree = jax.jit(jax.grad(lambda p: learner.objective(jax.random.key(2), p, {}, tasks)[0]))(params)
        return ravel_pytree(tree)[0]

    expected = gradient(jmeta.exact())
    rounding = 1e-12 * np.abs(expected).max()  # of the large terms that cancel in a small element
    for name, adjoint in EXACT.items():
        np.testing.assert_allclose(gradient(adjoint), expected, rtol=1e-9, atol=rounding, err_msg=name)


class Transformer(nn.Module):
    """A pre-norm block with dropout."""

    @nn.compact
    def __call__(self, x, train):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        h = nn.Dropout(0.5, deterministic=not train)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x))))
        x = x + nn.Dense(4)(h)
        return nn.Dense(2)(x.mean(axis=1))


@pytest.mark.slow
def test_every_exact_adjoint_agrees_on_a_transformer(float64):
    inputs = jax.random.normal(jax.random.key(0), (2, 4, 3, 4))
    tasks = jax.tree.map(
        lambda x: x[None], jmeta.Task(*(jmeta.Examples(x, jnp.repeat(jnp.eye(2), 2, axis=0)) for x in inputs))
    )
    with jax.numpy_dtype_promotion("standard"):  # nn.LayerNorm mixes float32 with float64
        assert_every_exact_adjoint_agrees(jmeta.linen(Transformer()), tasks)


class TwoConvolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(jmeta.Conv(8, (3, 3))(x))
        return nn.Dense(2)(x.mean(axis=(1, 2)))


def temporary_bytes(adjoint, steps):
    learner = jmeta.maml(jmeta.linen(TwoConvolutions()), inner_steps=steps, adjoint=adjoint)
    task = images_task(jax.random.key(0), queries=8)
    task = task._replace(support=task.query)
    params, state = jax.jit(learner.init)(jax.random.key(1), task)

    def objective(params, task):
        return learner.objective(jax.random.key(2), params, state, jax.tree.map(lambda x: x[None], task))[0]

    # Machine code is not what is looked at: without its optimisation this compiles in less time, to the same buffers.
    compiled = jax.jit(jax.grad(objective)).lower(params, task).compile({"xla_backend_optimization_level": 0})
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_grows_by_little_more_than_phi_with_each_step_and_less_in_segments():
    φ = 4 * (9 * 8 + 8 + 9 * 8 * 8 + 8 + 8 * 2 + 2)  # bytes

    def growth(adjoint):
        return temporary_bytes(adjoint, 64) - temporary_bytes(adjoint, 4)

    # In segments 64 steps keep 16 φ, and 4 keep 4 φ.
    assert growth(jmeta.exact(checkpoint=True)) < 15 * φ
    assert growth(jmeta.mixed_mode(checkpoint=True)) < 15 * φ
    assert growth(jmeta.mixed_mode()) < 1.5 * 60 * φ
    assert growth(jmeta.exact()) > 10 * 60 * φ


class Tanh:
    """MAML on a tanh network of two layers with squared error, in NumPy: gradient and Hessian product by hand."""

    @staticmethod
    def forward(φ, x):
        W1, b1, W2, b2 = φ
        h = np.tanh(x @ W1 + b1)
        return h, h @ W2 + b2

    @classmethod
    def gradient(cls, φ, x, y):
        h, o = cls.forward(φ, x)
        δo = 2 * (o - y) / o.size
        δh = δo @ φ[2].T * (1 - h**2)
        return [x.T @ δh, δh.sum(0), h.T @ δo, δo.sum(0)]

    @classmethod
    def hessian_product(cls, φ, v, x, y):
        """Pearlmutter's R-operator: the derivative of `gradient` at φ in direction v."""
        h, o = cls.forward(φ, x)
        Rh = (1 - h**2) * (x @ v[0] + v[1])
        Ro = Rh @ φ[2] + h @ v[2] + v[3]
        δo, Rδo = 2 * (o - y) / o.size, 2 * Ro / o.size
        back, Rback = δo @ φ[2].T, Rδo @ φ[2].T + δo @ v[2].T
        Rδh = Rback * (1 - h**2) - 2 * back * h * Rh
        return [x.T @ Rδh, Rδh.sum(0), Rh.T @ δo + h.T @ Rδo, Rδo.sum(0)]

    @classmethod
    def meta_gradient(cls, θ, support, query, steps):
        path = [θ]
        for _ in range(steps):
            path.append([p - α * g for p, g in zip(path[-1], cls.gradient(path[-1], *support), strict=True)])
        v = cls.gradient(path[-1], *query)
        for φ in reversed(path[:-1]):
            v = [a - α * b for a, b in zip(v, cls.hessian_product(φ, v, *support), strict=True)]
        return v


@pytest.mark.parametrize("steps", [1, 3])
def test_maml_agrees_with_an_independent_implementation_in_numpy(float64, steps):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.tanh(nn.Dense(6, name="a", param_dtype=jnp.float64)(x))
            return nn.Dense(2, name="b", param_dtype=jnp.float64)(h)

    random = np.random.default_rng(0)
    θ = [random.normal(size=shape) for shape in ((3, 6), (6,), (6, 2), (2,))]
    data = [[(random.normal(size=(n, 3)), random.normal(size=(n, 2))) for n in (5, 7)] for _ in range(4)]
    tasks = jax.tree.map(
        lambda *x: jnp.stack(x), *[jmeta.Task(*(jmeta.Examples(*map(jnp.asarray, d)) for d in task)) for task in data]
    )
    learner = jmeta.maml(jmeta.linen(Network()), inner_rate=α, inner_steps=steps, loss=jmeta.mean_squared_error)
    params = {"a": {"kernel": θ[0], "bias": θ[1]}, "b": {"kernel": θ[2], "bias": θ[3]}}
    params = jax.tree.map(jnp.asarray, params)
    gradient = jax.jit(jax.grad(lambda p: learner.objective(jax.random.key(0), p, {}, tasks)[0]))(params)
    expected = [np.mean(g, axis=0) for g in zip(*(Tanh.meta_gradient(θ, *t, steps) for t in data), strict=True)]
    ours = [gradient["a"]["kernel"], gradient["a"]["bias"], gradient["b"]["kernel"], gradient["b"]["bias"]]
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)
