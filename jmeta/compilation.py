"""`jax.jit` with the compiler's options that suit meta-learning on the backend at hand."""

import contextlib
import dataclasses
import os
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax

from jmeta.errors import ConfigError

# Of XLA's newer library on CPU, its convolutions are left away: their weight gradients take up to twice as long as
# those of the library that it replaces. Its reductions, which batch norm is made of, and small products are faster.
_CPU_OPTIONS: dict[str, Any] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
}


@cache
def compiler_options() -> dict[str, Any] | None:
    """What `jmeta.fit` and `jmeta.evaluate` pass to the compiler, for a `jax.jit` of your own around `jmeta.make_step`.

    They pass it where there is no mesh: over several devices of a CPU a program with them was seen to be wrong.

    Returns:
        On CPU the options that leave convolutions to the library that is fast on their gradients, if this XLA knows
        them; None elsewhere.

    Example:
        >>> import jax, jmeta
        >>> double = jax.jit(lambda x: 2 * x, compiler_options=jmeta.compiler_options())
        >>> int(double(2))
        4
    """
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=_CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:  # the options are experimental, and another XLA may not have them
        return None
    return _CPU_OPTIONS


_PROGRAMS = 64  # of a function, each of 10 to 40 MB; the least recently used goes first
_LIBRARIES = frozenset({"jmeta", "optax", "flax", "jax", "functools"})


class Compiled:
    """`jax.jit` of a function whose keyword-only arguments are static, found again by what those are made of.

    A learner, a source's `sample` or an optimiser is a handful of closures, and two that equal calls made are not equal
    for Python. Here they are one, so that they share a program; and programs that nobody asked for lately are let go.
    """

    def __init__(self, function: Callable[..., Any], size: int = _PROGRAMS, nested: bool = False) -> None:
        self._function, self._size, self._nested, self._lock = function, size, nested, threading.Lock()
        self._programs: OrderedDict[Hashable, tuple[Any, Any]] = OrderedDict()

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        program = self.program(**static)
        if not self._nested and not program._cache_size() and jax.default_backend() == "cpu":
            _check_fits(program.lower(*arguments).compile())  # which the call then finds
        return program(*arguments)

    def lower(self, *arguments: Any, **static: Any) -> Any:
        """As `jax.jit(...).lower`."""
        return self.program(**static).lower(*arguments)

    def program(self, **static: Any) -> Any:
        """The jitted function of these static arguments."""
        key = tuple((name, made_of(value)) for name, value in sorted(static.items()))
        with self._lock:
            if key not in self._programs:
                # with options a program over several devices of a CPU gave a wrong sum (JAX 0.10.2, 16 tasks a device)
                options = None if self._nested or static.get("mesh") is not None else compiler_options()
                jitted = jax.jit(partial(self._function, **static), compiler_options=options)
                # the static arguments are kept with it, so that an identity in the key is not given to another object
                self._programs[key] = (jitted, static)
            self._programs.move_to_end(key)
            while len(self._programs) > self._size:
                self._programs.popitem(last=False)
            return self._programs[key][0]

    def _cache_size(self) -> int:
        return sum(program._cache_size() for program, _ in self._programs.values())

    def __len__(self) -> int:
        return len(self._programs)


def _check_fits(program: Any) -> None:
    """Raises `ConfigError` where a program takes more memory than there is; the system would kill the process."""
    needs, there = program.memory_analysis(), memory()
    if needs is None or there is None:
        return
    needed = needs.temp_size_in_bytes + needs.output_size_in_bytes
    if needed > there:
        raise ConfigError(
            f"this needs {needed / 2**30:,.1f} GB while it runs, and this machine has {there / 2**30:,.1f} GB; ask for "
            "fewer shots, queries, inner steps or tasks at a time, or give jmeta.fit or jmeta.evaluate a task_chunk."
        )


def memory() -> int | None:
    """The bytes of memory that the process can have, or None where the system does not tell."""
    found: list[int] = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(ValueError, OSError):  # "max" where a container has no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)


@cache
def compiled(function: Callable[..., Any], nested: bool = False) -> Compiled:
    """The `Compiled` of a function, one for all who ask; without options if it is called inside of other programs."""
    return Compiled(function, nested=nested)


def made_of(value: Any) -> Hashable:
    """What tells two static arguments apart: the content of what cannot change, the identity of all else.

    A function of jmeta, JAX, Flax or optax is its code and what it closes over. One of a user is itself: it may read
    global names, which say something else the next time that a cell of a notebook is run.

    Args:
        value: a learner, a function, an optimiser, a number, ...

    Returns:
        A key, equal for arguments that give the same program.

    Example:
        >>> import jmeta, optax
        >>> from jmeta.compilation import made_of
        >>> one = made_of(optax.adam(1e-3))
        >>> one == made_of(optax.adam(1e-3)), one == made_of(optax.adam(1e-2))
        (True, False)
    """
    return _key(value, ())


def _key(value: Any, above: tuple[int, ...]) -> Hashable:
    if id(value) in above:  # a function that closes over itself
        return ("above", above.index(id(value)))
    above = (*above, id(value))
    if isinstance(value, float):
        return (type(value), float(value).hex())  # 0.0 and -0.0 are equal
    if isinstance(value, tuple):
        return (type(value), *(_key(part, above) for part in value))
    if isinstance(value, partial):
        return (partial, *(_key(x, above) for x in (value.func, value.args, tuple(sorted(value.keywords.items())))))
    if isinstance(value, types.MethodType):
        return (types.MethodType, _key(value.__func__, above), _key(value.__self__, above))
    if isinstance(value, jax.custom_vjp | jax.custom_jvp):
        own = {name: x for name, x in vars(value).items() if not name.startswith("__")}
        return (type(value), *((name, _key(x, above)) for name, x in sorted(own.items())))
    if isinstance(value, types.FunctionType) and _library(value) == "jaxtyping":  # whose checks change nothing
        return _key(value.__wrapped__, above)  # type: ignore[attr-defined]
    if isinstance(value, types.FunctionType) and _library(value) in _LIBRARIES:
        cells = tuple(_content(cell) for cell in value.__closure__ or ())
        keywords = tuple((value.__kwdefaults__ or {}).items())
        return (value.__code__, *(_key(x, above) for x in (cells, value.__defaults__ or (), keywords)))
    if dataclasses.is_dataclass(value) and type(value).__module__.partition(".")[0] == "jmeta":
        with contextlib.suppress(TypeError):
            return (type(value), hash(value), value)
        fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return (type(value), *((name, _key(x, above)) for name, x in fields))
    with contextlib.suppress(TypeError):
        return (type(value), hash(value), value)
    return ("identity", id(value))


def _library(function: types.FunctionType) -> str:
    """The package whose global names it reads; `__module__` may be copied from a function that it wraps."""
    return str(function.__globals__.get("__name__", "")).partition(".")[0]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a name that is not bound yet
        return None
