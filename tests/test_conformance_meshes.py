"""Every learner of the registry on a mesh has the numbers of one device; with the smallest networks and tasks.

As a script, `test_conformance_meshes.py HOST:PORT PROCESS FILE`, it trains all of them in one of two processes.
"""

import functools
import inspect
import os
import pickle
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType

import jmeta
from jmeta.devices import replicated
from jmeta.models.norms import norm_layer
from jmeta.rl import Box, point_navigation
from jmeta.runs.registry import LEARNERS, MODELS
from jmeta.step import TrainState, draw

WAYS, TASKS, STEPS = 2, 8, 20
TOLERANCE = {"float64": 1e-6, "float32": 1e-4}

needs_eight = pytest.mark.skipif("jax.device_count() < 8", reason="needs eight devices")


class Network(nn.Module):
    """A layer, a normalisation, and a head."""

    outputs: int | None
    norm: str
    context: int = 0

    @nn.compact
    def __call__(self, inputs, train, mask=None):
        norm = norm_layer(self.norm, scale=True, groups=1)
        x = norm(nn.Dense(4, use_bias=False)(inputs)[:, None, None], train=train, mask=mask)
        x = nn.relu(x[:, 0, 0])
        if self.context:
            context = self.param("context", nn.initializers.zeros_init(), (self.context,), jnp.float32)
            x = x * (1 + nn.Dense(4)(context[None]))
        return x if self.outputs is None else nn.Dense(self.outputs, name="head")(x)


def smallest(name):
    """A learner of the registry, of one inner step and one layer, and eight tasks for it, drawn once.

    Args:
        name: of the learner.

    Returns:
        The learner and the source, whose `data` are the tasks.
    """
    entry = LEARNERS[name]
    network = MODELS[entry.defaults["model"]].make
    if entry.acts:
        small = {"hidden": (4,), "width": 4}
        module = network(
            Box(2), **{size: n for size, n in small.items() if size in inspect.signature(network).parameters}
        )
    else:
        norm = getattr(network, "keywords", {}).get("norm", "group")
        module = Network(None if entry.embedding else WAYS, norm, **{n: 3 for n in entry.network if n == "context"})
    sizes = {"inner_steps": 1, "layers": 1, "proximal": 20.0}  # with which the Hessian of iMAML is positive definite
    options = {name: n for name, n in sizes.items() if name in inspect.signature(entry.make).parameters}
    tasks = drawn(entry.acts, entry.pretrains)
    return entry.make(jmeta.linen(module), **options), jmeta.TaskSource(tasks, one_of, {})


@functools.cache
def drawn(acts, pretrains):
    if acts:
        source = point_navigation(horizon=3, queries=2)
    else:
        inputs = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)
        sizes = {"ways": WAYS, "shots": 1, "queries": 2, "batch": 4 if pretrains else None}
        source = jmeta.from_arrays(inputs, np.repeat(np.arange(4), 6), descriptions=np.eye(4), **sizes)
    sample = jax.jit(jax.vmap(source.sample, (0, None)))
    return jax.device_get(sample(jax.random.split(jax.random.key(0), TASKS), source.data))


def one_of(key, tasks):
    return jax.tree.map(lambda x: x[jax.random.key_data(key)[-1] % jnp.uint32(TASKS)], tasks)


def begun(learner, optimizer, source, dtype):
    """A `TrainState` of random numbers, for which no program need be compiled."""
    random = np.random.default_rng(1)

    def filled(x, numbers):
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.asarray(numbers(size=x.shape) if floating else np.zeros(x.shape), dtype if floating else x.dtype)

    key = jax.random.key(2)
    shapes = jax.eval_shape(lambda: learner.init(key, jax.tree.map(lambda x: jnp.asarray(x[0]), source.data)))
    params = jax.tree.map(functools.partial(filled, numbers=functools.partial(random.normal, scale=0.5)), shapes[0])
    state = jax.tree.map(functools.partial(filled, numbers=random.random), shapes[1])  # a variance is positive
    return TrainState(key, jnp.zeros((), jnp.int32), params, state, optimizer.init(params))


def as_(dtype, tree):
    """With floating leaves of a type."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else None), tree)


def difference(a, b):
    """The largest of all leaves, relative to the size of the leaf."""
    pairs = zip(*(map(np.asarray, jax.tree.leaves(each)) for each in (a, b)), strict=True)
    return max(np.abs(x - y).max(initial=0.0) / max(np.abs(y).max(initial=0.0), 1e-3) for x, y in pairs)


def mesh_of(devices, kind=AxisType.Auto):
    return jax.make_mesh((devices,), ("tasks",), (kind,), devices=jax.devices()[:devices])


def gradient_of_one_device(learner, source, start):
    """Of the objective of all tasks: the gradient, the state, the info."""

    @jax.jit
    def run(start, data):
        keys, tasks = draw(learner, source._replace(data=data), start, TASKS)
        (loss, (state, info)), gradient = jax.value_and_grad(learner.objective, argnums=1, has_aux=True)(
            keys, start.params, start.state, tasks
        )
        return gradient, state, {**info, "loss": loss}

    return run(start, source.data)


def step_of_many(learner, source, start, mesh):
    """The same of a meta-step of a mesh, from a step of gradient descent at the rate 1."""

    @jax.jit
    def run(start, data):
        step = jmeta.make_step(learner, optax.sgd(1.0), source._replace(data=data), tasks=TASKS, mesh=mesh)
        return step(start, None)

    new, info = run(start, source.data)
    gradient = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), start.params, new.params)
    return gradient, new.state, {name: x for name, x in info.items() if name != "gradient_norm"}


@needs_eight
@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_eight_devices_have_the_meta_gradient_of_one(name):
    """And the state and the info after it."""
    learner, source = smallest(name)
    start = begun(learner, optax.sgd(1.0), source, jnp.float32)
    alone = gradient_of_one_device(learner, source, start)
    divided = step_of_many(learner, source, start, mesh_of(8))
    assert jax.tree.map(lambda x: x.dtype, divided) == jax.tree.map(lambda x: x.dtype, alone)
    assert difference(divided, alone) < TOLERANCE["float32"]
    assert difference(alone[0], jax.tree.map(np.zeros_like, alone[0])) > 1e-3


@functools.cache
def path(name, dtype, mesh=None):
    """θ, the state and the info after each of twenty steps."""
    learner, source = smallest(name)
    # in float32, at a larger rate, rounding grows from step to step, as with task_chunk
    optimizer = optax.sgd(0.01 if dtype == "float64" else 0.001)

    def run(start, data):
        step = jmeta.make_step(learner, optimizer, source._replace(data=data), tasks=TASKS, mesh=mesh)

        def one(carry, _):
            new, info = step(carry, None)
            return new, (new.params, new.state, info)

        return jax.lax.scan(one, start, length=STEPS)[1]

    # some learners draw numbers of float32
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):
        source = source._replace(data=as_(dtype, source.data))
        start = begun(learner, optimizer, source, dtype)
        return jax.tree.map(np.asarray, jax.jit(run)(*replicated(mesh, (start, source.data))))


def assert_close(name, dtype, divided):
    alone = path(name, dtype)
    assert jax.tree.map(lambda x: x.dtype, divided) == jax.tree.map(lambda x: x.dtype, alone)
    worst = difference(divided, alone)
    print(f"{name} in {dtype}: {worst:.1e}")
    assert worst < TOLERANCE[dtype]


KINDS = [(2, AxisType.Auto), (8, AxisType.Auto), (8, AxisType.Explicit)]


@needs_eight
@pytest.mark.slow
@pytest.mark.parametrize(("devices", "kind"), KINDS, ids=["two", "eight", "explicit"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_devices_have_the_numbers_of_one(name, dtype, devices, kind):
    assert_close(name, dtype, path(name, dtype, mesh_of(devices, kind)))


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """`{(name, dtype): path}` of each of two processes of two devices, which train all learners together."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{one.getsockname()[1]}"
    files = [tmp_path_factory.mktemp("processes") / "paths" for _ in range(2)]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    commands = [[sys.executable, __file__, where, str(i), str(file)] for i, file in enumerate(files)]
    processes = [subprocess.Popen(each, env=environment, stderr=subprocess.PIPE, text=True) for each in commands]
    try:
        for process in processes:
            _, told = process.communicate(timeout=1800)
            assert process.returncode == 0, told
    finally:
        for process in processes:
            process.kill()
    return [pickle.loads(file.read_bytes()) for file in files]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_two_processes_have_the_numbers_of_one(of_two_processes, name, dtype):
    first, second = (paths[name, dtype] for paths in of_two_processes)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert_close(name, dtype, first)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_one_all_reduce_a_step(name):
    """And those of `collect`, where a learner takes moments of all tasks."""
    learner, source = smallest(name)
    optimizer, mesh = optax.sgd(0.01), mesh_of(2)
    start = begun(learner, optimizer, source, "float32")

    def all_reduces(function):
        text = jax.jit(function).lower(start).compile().as_text()
        return text.count(" all-reduce(") + text.count(" all-reduce-start(")

    step = jmeta.make_step(learner, optimizer, source, tasks=TASKS, mesh=mesh)
    collected = all_reduces(lambda start: draw(learner, source, start, TASKS, mesh))
    assert all_reduces(lambda start: jax.lax.scan(step, start, length=2)) == 1 + collected


def main(where, process, file):
    jax.distributed.initialize(where, 2, int(process))
    mesh = jax.make_mesh((jax.device_count(),), ("tasks",), (AxisType.Auto,))
    paths = {(name, dtype): path(name, dtype, mesh) for name in sorted(LEARNERS) for dtype in TOLERANCE}
    with open(file, "wb") as out:
        pickle.dump(paths, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
