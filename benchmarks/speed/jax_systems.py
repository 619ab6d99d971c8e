"""The contestants on JAX: jmeta, jmeta's learner with `nn.Conv` under `vmap`, and jax-meta.

Each takes a case and returns a function that does some meta-steps and returns their losses.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.custom_batching import custom_vmap

import jmeta
from benchmarks.speed.cases import (
    CLASSES,
    EPSILON,
    FEATURES,
    HIDDEN,
    ROWS,
    SIZE,
    Case,
    arrays,
    batch,
    draw,
    learner,
    weights,
)
from jmeta.compilation import compiled
from jmeta.devices import replicated
from jmeta.models.norms import BatchNorm
from jmeta.train import _run

Step = Callable[[], np.ndarray]


def run_jmeta(case: Case) -> Step:
    """The compiled scan of `jmeta.fit`."""
    return _scan(case, learner(case), None)


def run_default_norm(case: Case) -> Step:
    """The same with the network as jmeta has it by default, group norm above all, from weights of its own."""
    outputs = case.ways if case.inner_steps else None
    network = jmeta.Conv4(outputs, pooling="max" if case.network == "conv4-max" else "stride")
    return _scan(case, learner(case, jmeta.linen(network)), None, own_weights=True)


def run_two_devices(case: Case) -> Step:
    """The same over two devices, of a CPU two cores; the first thing that its process does."""
    jax.config.update("jax_num_cpu_devices", 2)
    return _scan(case, learner(case), None, mesh=jax.make_mesh((2,), ("tasks",)))


def run_fixed_batch(case: Case) -> Step:
    """The same without sampling."""
    return run_jmeta(replace(case, source="fixed"))


def run_nn_conv(case: Case) -> Step:
    """jmeta with `nn.Conv` in place of `jmeta.Conv` and a plain `jax.vmap` over all tasks, one meta-step a call."""
    return _scan(replace(case, steps=1), learner(case, jmeta.linen(NnConv4(case))), case.tasks)


class NnConv4(nn.Module):
    """`jmeta.Conv4` with the convolution and the max-pooling of Flax.

    Args:
        case: says pooling and width.
    """

    case: Case

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        pool = self.case.network == "conv4-max"
        for _ in range(4):
            # named, as jmeta.linen would put its own in the place of the default
            conv = jax.lax.conv_general_dilated
            x = nn.Conv(FEATURES, (3, 3), strides=1 if pool else 2, use_bias=False, conv_general_dilated=conv)(x)
            x = BatchNorm()(x, train=train)
            x = nn.relu(nn.max_pool(x, (2, 2), (2, 2)) if pool else x)
        return nn.Dense(self.case.ways, name="head")(x.reshape(len(x), -1) if pool else x.mean((1, 2)))


def _scan(
    case: Case,
    learner: jmeta.MetaLearner,
    task_chunk: int | None,
    *,
    own_weights: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> Step:
    optimizer, source = optax.adam(case.rate, eps=EPSILON), _source(case)
    state = jmeta.init(jax.random.key(0), learner, optimizer, source)
    if not own_weights:
        state = state._replace(params=jax.tree.map(jnp.array, weights(replace(case, source="fixed"))))
    state, data = replicated(mesh, (state, source.data))  # as fit does, so that nothing compiles twice

    def step() -> np.ndarray:
        nonlocal state
        state, info = compiled(_run)(
            state,
            data,
            jnp.asarray(10**9, jnp.int32),
            learner=learner,
            optimizer=optimizer,
            sample=source.sample,
            tasks=case.tasks,
            task_chunk=task_chunk,
            length=case.steps,
            mesh=mesh,
        )
        return np.asarray(info["loss"])

    return step


def _source(case: Case) -> jmeta.TaskSource:
    shape: dict[str, Any] = {"ways": case.ways, "shots": case.shots, "queries": case.queries}
    if case.source == "glyphs":
        return jmeta.glyphs(**shape)
    if case.source == "arrays":
        images = arrays().reshape(-1, SIZE, SIZE, 1)
        return jmeta.from_arrays(images, np.repeat(np.arange(CLASSES), ROWS), **shape)
    return jmeta.TaskSource(jax.tree.map(jnp.asarray, batch(case)), _fixed, shape)


@custom_vmap
def _fixed(key: jax.Array, tasks: jmeta.Task) -> jmeta.Task:
    """The fixed batch as a sampler: a key draws the first task, a batch of keys the whole batch or a device's part."""
    return jax.tree.map(lambda x: x[0], tasks)


@_fixed.def_vmap
def _fixed_batch(size: int, is_mapped: Any, key: jax.Array, tasks: jmeta.Task) -> tuple[jmeta.Task, Any]:
    if size < len(tasks.query.targets):  # those of this device
        begin = jax.lax.axis_index("tasks") * size
        tasks = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, size), tasks)
    return tasks, jax.tree.map(lambda _: True, tasks)


def run_jax_meta(case: Case) -> Step:
    """jax-meta's `MAML` and its jitted step on the network in Haiku, as in its own examples."""
    import haiku as hk
    from jax_meta.metalearners import MAML

    class Regression(MAML):
        def loss(self, params: Any, state: Any, inputs: Any, targets: Any, args: Any) -> Any:
            outputs, state = self.model.apply(params, state, inputs, *args)
            loss = jnp.square(outputs - targets).mean()
            return loss, (state, {"loss": loss})

    def network(x: jax.Array, is_training: bool) -> jax.Array:
        if case.network == "mlp":
            for i, width in enumerate(HIDDEN):
                x = jax.nn.relu(hk.Linear(width, name=f"Dense_{i}")(x))
            return hk.Linear(1, name="head")(x)
        pool = case.network == "conv4-max"
        for i in range(4):
            x = hk.Conv2D(FEATURES, 3, stride=1 if pool else 2, with_bias=False, name=f"Conv_{i}")(x)
            x = hk.BatchNorm(False, True, 0.9, eps=1e-3, name=f"BatchNorm_{i}")(x, is_training)
            x = jax.nn.relu(hk.max_pool(x, 2, 2, padding="VALID") if pool else x)
        return hk.Linear(case.ways, name="head")(x.reshape(len(x), -1) if pool else x.mean((1, 2)))

    def examples(part: jmeta.Examples) -> jmeta.Examples:
        targets = part.targets if case.network == "mlp" else part.targets.argmax(-1)
        return jmeta.Examples(
            jnp.asarray(part.inputs), jnp.asarray(targets, None if case.network == "mlp" else jnp.int32)
        )

    maml = (Regression if case.network == "mlp" else MAML)(
        hk.without_apply_rng(hk.transform_with_state(network)), num_steps=case.inner_steps, alpha=case.inner_rate
    )
    fixed = jmeta.Task(*map(examples, batch(case)))
    params, state = maml.init(jax.random.key(0), optax.adam(case.rate, eps=EPSILON), fixed.support.inputs[0], True)
    names = {"kernel": "w", "bias": "b"}
    params = {
        module: {
            "offset" if "BatchNorm" in module else names[name]: jnp.array(leaf).reshape(
                params[module].get("offset", leaf).shape
            )
            for name, leaf in leaves.items()
        }
        for module, leaves in weights(replace(case, source="fixed")).items()
    }
    random = np.random.default_rng(0)

    def meta_step() -> float:
        nonlocal params, state
        tasks = fixed if case.source == "fixed" else jmeta.Task(*map(examples, draw(case, random)))
        params, state, logs = maml.step(params, state, tasks.support, tasks.query, True)
        return float(cast(jax.Array, logs["outer/loss"]).mean())

    return lambda: np.array([meta_step() for _ in range(case.steps)])
