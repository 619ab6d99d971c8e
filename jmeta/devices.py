"""Tasks over the devices of a mesh: the numbers of one device, up to the order of sums."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jmeta.errors import ConfigError
from jmeta.tree import widened

AXIS = "tasks"
DIVIDED, WHOLE = PartitionSpec(AXIS), PartitionSpec()
Mesh: TypeAlias = jax.sharding.Mesh | AbstractMesh


def devices_of(mesh: Any) -> int:
    """How many parts the tasks are divided into; raises `ConfigError` unless it is a mesh with an axis `tasks`."""
    if mesh is None:
        return 1
    example = f'jax.make_mesh(({jax.device_count()},), ("{AXIS}",))'
    if not isinstance(mesh, Mesh):
        raise ConfigError(f"mesh is a {type(mesh).__name__}; give a mesh of devices: {example}.")
    if AXIS not in mesh.axis_names:
        raise ConfigError(f"the axes of the mesh are {mesh.axis_names}, and none is {AXIS!r}; name one: {example}.")
    return mesh.shape[AXIS]


def mesh_of(devices: int | None) -> jax.sharding.Mesh | None:
    """The mesh of so many devices, of a CPU as well as long as JAX has not started; None for one device.

    Args:
        devices: how many; None is 1.

    Returns:
        A mesh with an axis `tasks`.

    Raises:
        ConfigError: there are fewer.
    """
    if devices is None or devices == 1:
        return None
    with contextlib.suppress(RuntimeError):  # JAX has started, with the devices that it has
        jax.config.update("jax_num_cpu_devices", devices)
    if jax.device_count() < devices:
        raise ConfigError(f"there are {jax.device_count()} devices, not {devices}; ask for at most as many.")
    return jax.make_mesh((devices,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[:devices])


def cores_for(tasks: int) -> int:
    """How many devices of a CPU, one a core, the tasks of a meta-step can be divided over; 1 on an accelerator.

    Args:
        tasks: of a meta-step.

    Returns:
        The largest number of cores that divides them; 1 where JAX has started with fewer devices.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = max(n for n in range(1, cores + 1) if tasks % n == 0)
    with contextlib.suppress(RuntimeError):  # JAX has started, with the devices that it has
        jax.config.update("jax_num_cpu_devices", devices)
    return devices if jax.default_backend() == "cpu" and jax.device_count() >= devices else 1


def share(mesh: Mesh | None, tasks: int) -> int:
    """The tasks of each device; raises `ConfigError` where they are not equally many."""
    devices = devices_of(mesh)
    if tasks % devices:
        below, above = tasks - tasks % devices, tasks + devices - tasks % devices
        numbers = f"{below} or {above}" if below else f"{above}"
        fitting = ", ".join(str(n) for n in range(1, devices) if tasks % n == 0)
        raise ConfigError(
            f"the {devices} devices of the mesh do not divide {tasks} tasks; take {numbers} tasks a step, or a number "
            f"of devices among {fitting}."
        )
    return tasks // devices


@contextlib.contextmanager
def on_mesh(mesh: jax.sharding.Mesh | None) -> Iterator[jax.sharding.Mesh | None]:
    """The mesh with axes that the compiler divides (Auto), set as JAX's own inside, whatever is set outside."""
    if mesh is None:
        yield None
        return
    devices_of(mesh)
    automatic = jax.sharding.Mesh(mesh.devices, mesh.axis_names, (AxisType.Auto,) * len(mesh.axis_names))
    with jax.set_mesh(automatic):
        yield automatic


def replicated(mesh: jax.sharding.Mesh | None, tree: PyTree) -> PyTree:
    """The arrays on each device of the mesh, so that they are not copied there again for each call."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, WHOLE)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: _on_all_hosts(x, sharding), tree)


def _on_all_hosts(x: Any, sharding: NamedSharding) -> Any:
    """An array that each process has, as one that lies on the devices of all."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return x
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _on_all_hosts(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    value = np.asarray(x)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def on_one_device(tree: PyTree) -> PyTree:
    """The arrays that lie on several devices, on the first of this process alone; parts and all others as they are."""

    def moved(x: Any) -> Any:
        if not isinstance(x, jax.Array) or len(x.devices()) == 1:
            return x
        if x.is_fully_addressable:
            return jax.device_put(x, jax.local_devices()[0])
        return x.addressable_data(0) if x.is_fully_replicated else x

    return jax.tree.map(moved, tree)


def gathered(tree: PyTree) -> PyTree:
    """All of arrays of numbers that are divided over devices, those of other hosts included, as NumPy's."""

    def whole(x: jax.Array) -> np.ndarray:
        return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)


def over_devices(mesh: Mesh | None, function: Callable[[Any, Any], Any], out: Any) -> Callable[[Any, Any], Any]:
    """A function of which each device computes its part.

    Args:
        mesh: with an axis `tasks`, or None for one device.
        function: `(divided, whole) -> outputs`; on a device it gets the part of `divided` that is its own by the
            leading axis, and all of `whole`. What it needs of all tasks it takes by `total` and `averaged`.
        out: for each of the outputs `DIVIDED`, that they have this axis too, or `WHOLE`, the same on each device.

    Returns:
        The function of all tasks. Differentiate inside, before anything is averaged, or all of it from outside.
    """
    if mesh is None:
        return function
    # what is checked there would need each carry of each scan of each learner to be cast to varying over the devices
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(DIVIDED, WHOLE), out_specs=out, check_vma=False)
    if mesh.axis_types[mesh.axis_names.index(AXIS)] is not AxisType.Explicit:
        return mapped

    def resharded(divided: Any, whole: Any) -> Any:
        return mapped(
            *(
                jax.tree.map(lambda x: jax.sharding.reshard(x, NamedSharding(mesh, spec)), tree)  # noqa: B023
                for tree, spec in ((divided, DIVIDED), (whole, WHOLE))
            )
        )

    return resharded


def total(tree: PyTree) -> PyTree:
    """The sum over the devices among which the tasks are divided: for a statistic of a whole batch in `collect`.

    Args:
        tree: sums over the tasks of this device.

    Returns:
        The sums over all tasks; on one device what was given.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.devices import total
        >>> float(total(jnp.ones(())))
        1.0
    """
    try:
        return lax.psum(tree, AXIS)
    except NameError:  # there is no axis of this name
        return tree


def averaged(sums: PyTree, count: Array | int) -> PyTree:
    """The mean over all tasks.

    Args:
        sums: of each floating leaf the sum over some tasks of this device; every other leaf is that of the first.
        count: how many those are, or in which unit; 0 is none.

    Returns:
        Floating leaves: the sums of all devices by the counts of all. Others: those of the first device that has any.
    """
    leaves, tree = jax.tree.flatten(sums)
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
    # one all-reduce, as they are one argument
    totals = iter(total(widened([x for x, yes in zip(leaves, floating, strict=True) if yes])))
    n = total(count)
    means = [
        (next(totals) / jnp.asarray(n, widened(x).dtype)).astype(x.dtype) if yes else _of_first(x, count)
        for x, yes in zip(leaves, floating, strict=True)
    ]
    return jax.tree.unflatten(tree, means)


def _of_first(x: Array, count: Array | int) -> Array:
    try:
        every = lax.all_gather(x, AXIS)
        return every[jnp.argmax(lax.all_gather(jnp.asarray(count), AXIS) > 0)]
    except NameError:
        return x
