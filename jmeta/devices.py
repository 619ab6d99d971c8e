"""Tasks and seeds over the devices of a mesh: the numbers of one device, up to the order of sums."""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jmeta.errors import ConfigError
from jmeta.tree import widened

AXIS, SEEDS, MODEL = "tasks", "seeds", "model"
DIVIDED, WHOLE, COLUMNS = PartitionSpec(AXIS), PartitionSpec(), PartitionSpec(None, AXIS)
Mesh: TypeAlias = jax.sharding.Mesh | AbstractMesh


class Columns(NamedTuple):
    """Arrays `[steps, tasks, ...]` of which each device has those of its own tasks, among arrays that all have whole.

    Args:
        arrays: a tree of them.
    """

    arrays: PyTree


def devices_of(mesh: Any, seeds: int | None = None) -> int:
    """How many parts the tasks are divided into.

    Args:
        mesh: with an axis `tasks`, of many seeds with one `seeds` instead or as well; None is one device.
        seeds: how many there are; None for one without an axis.

    Returns:
        The devices along `tasks`.

    Raises:
        ConfigError: it is no mesh, or has no such axis.
    """
    if mesh is None:
        return 1
    axes = (AXIS,) if seeds is None else (SEEDS, AXIS)
    example = f'jax.make_mesh(({jax.device_count()},), ("{axes[0]}",))'
    if not isinstance(mesh, Mesh):
        raise ConfigError(f"mesh is a {type(mesh).__name__}; give a mesh of devices: {example}.")
    if not set(axes) & set(mesh.axis_names):
        wanted = " or ".join(map(repr, axes))
        raise ConfigError(f"the axes of the mesh are {mesh.axis_names}, and none is {wanted}; name one: {example}.")
    return mesh.shape.get(AXIS, 1)


def mesh_of(devices: int | None, axis: str = AXIS) -> jax.sharding.Mesh | None:
    """The mesh of so many devices, of a CPU as well as long as JAX has not started; None for one device.

    Args:
        devices: how many; None is 1.
        axis: the name of its axis.

    Returns:
        A mesh.

    Raises:
        ConfigError: there are fewer.
    """
    if devices is None or devices == 1:
        return None
    with contextlib.suppress(RuntimeError):  # JAX has started, with the devices that it has
        jax.config.update("jax_num_cpu_devices", devices)
    if jax.device_count() < devices:
        raise ConfigError(f"there are {jax.device_count()} devices, not {devices}; ask for at most as many.")
    return jax.make_mesh((devices,), (axis,), (AxisType.Auto,), devices=jax.devices()[:devices])


def cores_for(tasks: int) -> int:
    """How many devices of a CPU, one a core, the tasks of a meta-step can be divided over; 1 on an accelerator.

    Args:
        tasks: of a meta-step, or seeds.

    Returns:
        The largest number of cores that divides them; 1 where JAX has started with fewer devices.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = max(n for n in range(1, cores + 1) if tasks % n == 0)
    with contextlib.suppress(RuntimeError):  # JAX has started, with the devices that it has
        jax.config.update("jax_num_cpu_devices", devices)
    return devices if jax.default_backend() == "cpu" and jax.device_count() >= devices else 1


def share(mesh: Mesh | None, tasks: int, seeds: int | None = None) -> int:
    """The tasks of each device; raises `ConfigError` where they, or the seeds, are not equally many."""
    devices = devices_of(mesh, seeds)
    check_seeds(mesh, seeds)
    _check_divides(devices, tasks, "tasks", "tasks a step")
    return tasks // devices


def check_seeds(mesh: Mesh | None, seeds: int | None) -> None:
    """Raises `ConfigError` where the devices along the axis `seeds`, if there is one, do not divide the seeds."""
    if mesh is not None and seeds is not None:
        if MODEL in mesh.axis_names:
            raise ConfigError(f"a mesh with an axis {MODEL!r} holds one seed at a time; give one key.")
        _check_divides(mesh.shape.get(SEEDS, 1), seeds, "seeds", "seeds")


def _check_divides(devices: int, count: int, what: str, taken: str) -> None:
    if count % devices:
        below, above = count - count % devices, count + devices - count % devices
        numbers = f"{below} or {above}" if below else f"{above}"
        fitting = ", ".join(str(n) for n in range(1, devices) if count % n == 0)
        raise ConfigError(
            f"the {devices} devices of the mesh do not divide {count} {what}; take {numbers} {taken}, or a number "
            f"of devices among {fitting}."
        )


@contextlib.contextmanager
def on_mesh(mesh: jax.sharding.Mesh | None, seeds: int | None = None) -> Iterator[jax.sharding.Mesh | None]:
    """The mesh with axes that the compiler divides (Auto), set as JAX's own inside, whatever is set outside."""
    if mesh is None:
        yield None
        return
    devices_of(mesh, seeds)
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


def divided(mesh: jax.sharding.Mesh | None, seeds: int | None, tree: PyTree) -> PyTree:
    """Arrays `[seeds, ...]` on the devices of their seeds, if the mesh has such an axis; of one seed `sharded`."""
    if seeds is None:
        return sharded(mesh, tree)
    if mesh is None or SEEDS not in mesh.axis_names:
        return replicated(mesh, tree)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(SEEDS)))


_SMALL = 2**12  # entries of a leaf below which to exchange its parts costs more than to hold all of it


def place_of(mesh: Mesh, x: Any) -> NamedSharding:
    """How a leaf of θ lies on a mesh: a large one is divided over the axis `model`, any other is whole on each device.

    Args:
        mesh: with or without this axis.
        x: an array, or its shape and dtype.

    Returns:
        The sharding: divided along the longest axis of the leaf that the devices divide.
    """
    parts = mesh.shape.get(MODEL, 1)
    fitting = [axis for axis, n in enumerate(x.shape) if n % parts == 0]
    if parts == 1 or x.size < _SMALL or not fitting:
        return NamedSharding(mesh, WHOLE)
    axis = max(fitting, key=lambda axis: x.shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, MODEL))


def sharded(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """θ, or what has leaves of its shapes, as an optimiser's state, as `place_of` says; None is one device.

    Under `jit` the compiler is told to keep what is divided.
    """
    if mesh is None:
        return tree

    def put(x: Array) -> Array:
        if not isinstance(x, jax.core.Tracer):
            there = place_of(mesh, x)
            return jax.device_put(x, there) if there.is_fully_addressable else _on_all_hosts(x, there)
        return lax.with_sharding_constraint(x, place_of(mesh, x)) if MODEL in mesh.axis_names else x

    return jax.tree.map(put, tree)


def on_one_device(tree: PyTree) -> PyTree:
    """The arrays that each of several devices has, on the first of this process alone; those in parts as they are."""

    def moved(x: Any) -> Any:
        if not isinstance(x, jax.Array) or len(x.devices()) == 1 or not x.is_fully_replicated:
            return x
        return jax.device_put(x, jax.local_devices()[0]) if x.is_fully_addressable else x.addressable_data(0)

    return jax.tree.map(moved, tree)


def seeds_of(keys: Array) -> int | None:
    """The number of keys `[seeds]`, or None for a single key; raises `ConfigError` where they have more axes."""
    single = 0 if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else 1  # axes of a key, of the old kind one
    shape = keys.shape[: keys.ndim - single]
    if len(shape) > 1 or shape == (0,):
        raise ConfigError(
            f"the keys have the shape {list(shape)}; give one key, or one for each seed: "
            "jax.random.split(jax.random.key(0), 8)."
        )
    return shape[0] if shape else None


def over_seeds(
    mesh: Mesh | None, seeds: int | None, function: Callable[[Mesh | None, Any, Any], Any]
) -> Callable[[Any, Any], Any]:
    """A function of one seed, of all: in one program, divided over the axis `seeds` of the mesh where it has one.

    Args:
        mesh: with an axis `seeds` or `tasks`, or both; None for one device.
        seeds: how many; None for one, without an axis.
        function: `(mesh, own, whole) -> outputs`, of one seed: the mesh of its tasks, what is its own, what all share.

    Returns:
        `(own, whole) -> outputs`, where all that is own, and the outputs, have a leading axis of seeds.
    """
    if seeds is None:
        return partial(function, mesh)
    by_seed = mesh is not None and SEEDS in mesh.axis_names
    has_tasks = mesh is not None and AXIS in mesh.axis_names

    def each(own: Any, whole: Any) -> Any:
        inside = (jax.sharding.get_abstract_mesh() if by_seed else mesh) if has_tasks else None

        return jax.vmap(lambda own: function(inside, own, whole))(own)

    if not by_seed:
        return each
    specs = PartitionSpec(SEEDS)
    return jax.shard_map(each, mesh=mesh, in_specs=(specs, WHOLE), out_specs=specs, axis_names={SEEDS}, check_vma=False)


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
    if MODEL in mesh.axis_names:
        if mesh.axis_types[mesh.axis_names.index(MODEL)] is AxisType.Explicit:
            raise ConfigError(f"the axis {MODEL!r} of the mesh is Explicit; make it Auto, as jmeta.fit does by itself.")
        if mesh.shape[AXIS] == 1:  # XLA cannot sum over an axis of one while it divides along another
            return function
    # what is divided over `model` is left to the compiler
    axes = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is not AxisType.Manual}
    axes -= {MODEL}
    explicit = mesh.axis_types[mesh.axis_names.index(AXIS)] is AxisType.Explicit

    def mapped(divided: Any, whole: Any) -> Any:
        given = (divided, whole)
        specs = (jax.tree.map(lambda _: DIVIDED, divided), _specs_of(whole))
        if explicit:
            given = jax.tree.map(lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)), given, specs)
        # what is checked there would need each carry of each scan of each learner to be cast to varying over devices
        of_devices = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, axis_names=axes, check_vma=False)
        return of_devices(*given)

    return mapped


def _specs_of(whole: PyTree) -> PyTree:
    def of(node: Any) -> Any:
        return jax.tree.map(lambda _: COLUMNS if isinstance(node, Columns) else WHOLE, node)

    return jax.tree.map(of, whole, is_leaf=lambda node: isinstance(node, Columns))


def put_columns(mesh: jax.sharding.Mesh | None, tree: PyTree) -> Columns:
    """Arrays `[steps, tasks of this process, ...]` on the devices, each of which gets the columns of its own tasks."""
    if mesh is None:
        return Columns(jax.device_put(tree))
    sharding = NamedSharding(mesh, COLUMNS)
    return Columns(jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree))


def columns_here(mesh: jax.sharding.Mesh | None, tasks: int, is_here: Callable[[Any], bool] | None = None) -> list[int]:
    """Which of the tasks of a step the devices of this process have.

    Args:
        mesh: with an axis `tasks`, or None for one device.
        tasks: of all devices.
        is_here: whether a device is one of this process. Default: what JAX says.
    """
    if mesh is None:
        return list(range(tasks))
    here = is_here or (lambda device: device.process_index == jax.process_index())
    parts = NamedSharding(mesh, DIVIDED).devices_indices_map((tasks,))
    return sorted({i for device, (part,) in parts.items() if here(device) for i in range(*part.indices(tasks))})


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
