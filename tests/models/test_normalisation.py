"""How learners use statistics of batches: each policy against NumPy, and its meta-gradient against finite differences.

The same network, z = norm(x W) and a linear head, in Linen, NNX and Haiku, in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.flatten_util import ravel_pytree

import jmeta

KEY, ε, KEPT = jax.random.key(0), 1e-3, 0.5
pytestmark = pytest.mark.usefixtures("float64")


class LinenNet(nn.Module):
    policy: str
    outputs: int | None

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, use_bias=False, param_dtype=float, name="body")(x)
        x = jmeta.BatchNorm(self.policy, momentum=KEPT)(x, train=train)
        return x if self.outputs is None else nn.Dense(self.outputs, param_dtype=float, name="head")(x)


class TaskStatistics(nnx.Module):
    """Statistics of the support in NNX: any variable that is called `task_stats`."""

    def __init__(self, features, rngs):
        self.task_stats = nnx.Variable(jnp.zeros((2, features), float))
        self.bias = nnx.Param(jnp.zeros(features, float))
        self.training = True

    def set_attributes(self, *args, **attributes):
        pass

    def __call__(self, x, use_running_average):
        if not use_running_average:
            self.task_stats[...] = jnp.stack([x.mean(0), x.var(0)])
        mean, var = self.task_stats[...]
        return (x - mean[None]) / jnp.sqrt(var + ε)[None] + self.bias[...][None]


class NnxNet(nnx.Module):
    def __init__(self, policy, outputs, rngs):
        self.body = nnx.Linear(3, 4, use_bias=False, param_dtype=float, rngs=rngs)
        average = {"momentum": KEPT, "epsilon": ε, "use_scale": False, "param_dtype": float}
        self.norm = nnx.BatchNorm(4, rngs=rngs, **average) if policy == "running" else TaskStatistics(4, rngs)
        for average in nnx.iter_graph(self.norm):
            if isinstance(average[1], nnx.BatchStat):  # NNX makes its averages in float32
                average[1].set_value(average[1].get_value().astype(float))
        self.head = None if outputs is None else nnx.Linear(4, outputs, param_dtype=float, rngs=rngs)
        self.use_running_average = False

    def __call__(self, x):
        with jax.numpy_dtype_promotion("standard"):  # with a scale of no dtype NNX mixes float32 in
            x = self.norm(self.body(x), use_running_average=self.use_running_average)
        return x if self.head is None else self.head(x)


def haiku_net(policy, outputs):
    hk = pytest.importorskip("haiku", exc_type=Exception)

    def net(x, train):
        x = hk.Linear(4, with_bias=False, name="body")(x)
        if policy == "running":
            with jax.numpy_dtype_promotion("standard"):  # Haiku counts in integers
                x = hk.BatchNorm(False, True, KEPT, eps=ε)(x, is_training=train)
        else:
            start = hk.get_state("task_stats", (2, 4), x.dtype, jnp.zeros)
            now = jnp.stack([x.mean(0), x.var(0)]) if train else start
            hk.set_state("task_stats", now)
            x = (x - now[:1]) / jnp.sqrt(now[1:] + ε) + hk.get_parameter("bias", (4,), x.dtype, jnp.zeros)[None]
        return x if outputs is None else hk.Linear(outputs, name="head")(x)

    return net


MODELS = {
    "linen": lambda policy, outputs: jmeta.linen(LinenNet(policy, outputs)),
    "nnx": lambda policy, outputs: jmeta.nnx(lambda rngs: NnxNet(policy, outputs, rngs)),
    "haiku": lambda policy, outputs: jmeta.haiku(haiku_net(policy, outputs)),
}


def examples(seed, n):
    random = np.random.default_rng(seed)
    return jmeta.Examples(jnp.asarray(2.0 * random.normal(size=(n, 3)) + 1.0), jnp.eye(2)[jnp.arange(n) % 2])


@functools.cache
def task():  # made inside of a test, where it is float64
    return jmeta.Task(examples(0, 4), examples(1, 6))


def leaf(tree, part, name):
    """The leaf of a layer, whatever its library calls it."""
    names = {"kernel": ("kernel", "w"), "bias": ("bias", "b", "offset")}[name]
    paths = [(jax.tree_util.keystr(path).lower(), np.asarray(x)) for path, x in jax.tree.leaves_with_path(tree)]
    return next(x for path, x in paths if (part in path) and any(f"'{n}'" in path for n in names))


def embed(params, x, by):
    """(x W − μ) / √(σ² + ε) with the statistics of `by`, in NumPy; shifts are 0 unless trained."""
    kernel = leaf(params, "body", "kernel")
    z, by = np.asarray(x) @ kernel, np.asarray(by) @ kernel
    return (z - by.mean(0)) / np.sqrt(by.var(0) + ε)


def check_gradient(learner, params, state):
    flat, unravel = ravel_pytree(params)
    tasks = jax.tree.map(lambda x: x[None], task())

    @jax.jit
    def objective(flat):
        return learner.objective(KEY, unravel(flat), state, tasks)[0]

    gradient, size = jax.grad(objective)(flat), 1e-6
    for direction in np.random.default_rng(0).normal(size=(4, flat.size)):
        numeric = (objective(flat + size * direction) - objective(flat - size * direction)) / (2 * size)
        np.testing.assert_allclose(gradient @ direction, numeric, rtol=1e-6, atol=1e-9)
    return objective(flat)


@pytest.mark.parametrize("library", MODELS)
def test_maml_answers_by_the_statistics_of_the_support_at_φ(library):
    model = MODELS[library]("per_task", 2)
    learner = jmeta.maml(model, inner_rate=0.5, inner_steps=2)
    params, state = jax.jit(learner.init)(KEY, task())
    adapted = learner.adapt(KEY, params, state, task().support)
    z = embed(adapted.params, task().query.inputs, task().support.inputs) + norm_bias(adapted.params)
    expected = z @ leaf(adapted.params, "head", "kernel") + leaf(adapted.params, "head", "bias")
    np.testing.assert_allclose(learner.predict(KEY, adapted, task().query.inputs), expected, rtol=1e-6)
    np.testing.assert_allclose(learner.predict(KEY, adapted, task().query.inputs[2:3]), expected[2:3], rtol=1e-6)
    check_gradient(learner, params, state)


def norm_bias(params):
    """The shift of the normalisation: the only bias that is not the head's."""
    paths = [(jax.tree_util.keystr(path).lower(), np.asarray(x)) for path, x in jax.tree.leaves_with_path(params)]
    return next(x for path, x in paths if ("bias" in path or "offset" in path) and "head" not in path)


def prototype_loss(support, query):
    means = np.stack([support[np.asarray(task().support.targets)[:, k] > 0].mean(0) for k in range(2)])
    logits = -((query[:, None] - means[None]) ** 2).sum(-1)
    p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return logits, -(p * np.asarray(task().query.targets)).sum(1).mean()


@pytest.mark.parametrize("library", MODELS)
def test_prototypes_by_the_statistics_of_the_support(library):
    learner = jmeta.prototypical(MODELS[library]("per_task", None))
    params, state = jax.jit(learner.init)(KEY, task())
    x, y = task().support.inputs, task().query.inputs
    logits, loss = prototype_loss(embed(params, x, x), embed(params, y, x))
    answers = learner.predict(KEY, learner.adapt(KEY, params, state, task().support), y)
    np.testing.assert_allclose(answers, logits, rtol=1e-6)
    np.testing.assert_allclose(check_gradient(learner, params, state), loss, rtol=1e-6)


@pytest.mark.parametrize("library", MODELS)
def test_prototypes_by_moving_averages(library):
    """In training one batch of support and queries, which moves the averages; at test the averages, for both."""
    learner = jmeta.prototypical(MODELS[library]("running", None))
    params, state = jax.jit(learner.init)(KEY, task())
    x, y = task().support.inputs, task().query.inputs
    both = np.concatenate([x, y])
    _, loss = prototype_loss(embed(params, x, both), embed(params, y, both))
    np.testing.assert_allclose(check_gradient(learner, params, state), loss, rtol=1e-6)

    _, (moved, _) = learner.objective(KEY, params, state, jax.tree.map(lambda x: x[None], task()))
    kernel = leaf(params, "body", "kernel")
    raw = both @ kernel
    if library == "haiku":  # which corrects its averages for where they started
        mean, var = raw.mean(0), raw.var(0)
    else:
        mean, var = (1 - KEPT) * raw.mean(0), KEPT + (1 - KEPT) * raw.var(0)
    by_averages = [(np.asarray(v) @ kernel - mean) / np.sqrt(var + ε) for v in (x, y)]
    answers = learner.predict(KEY, learner.adapt(KEY, params, moved, task().support), y)
    np.testing.assert_allclose(answers, prototype_loss(*by_averages)[0], rtol=1e-5)


@pytest.mark.parametrize("make", [jmeta.simpleshot, jmeta.linear_probe, jmeta.baseline_plus_plus, jmeta.transfer])
def test_a_pre_trained_network_embeds_the_support_as_it_embeds_the_queries(make):
    """By the averages of pre-training: in place of the whole learner one whose network is never in training mode."""
    model = MODELS["linen"]("running", None)

    def always_at_test(key, params, state, inputs, *, train, **mask):
        return model.apply(key, params, state, inputs, train=False, **mask)

    frozen = make(model._replace(apply=always_at_test))
    learner = make(model)
    pretraining = jmeta.Task((), task().query)
    params, state = jax.jit(learner.init)(KEY, pretraining)
    _, (state, _) = learner.objective(KEY, params, state, jax.tree.map(lambda x: x[None], pretraining))
    outputs, expected = (
        each.predict(KEY, each.adapt(KEY, params, state, task().support), task().query.inputs)
        for each in (learner, frozen)
    )
    np.testing.assert_allclose(outputs, expected, rtol=1e-9)
