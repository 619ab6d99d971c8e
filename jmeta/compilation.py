"""`jax.jit` with the compiler's options that suit meta-learning on the backend at hand."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import jax

# Of XLA's newer library on CPU, its convolutions are left away: their weight gradients take up to twice as long as
# those of the library that it replaces. Its reductions, which batch norm is made of, and small products are faster.
_CPU_OPTIONS: dict[str, Any] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
}


@cache
def compiler_options() -> dict[str, Any] | None:
    """What `jmeta.fit` and `jmeta.evaluate` pass to the compiler, for a `jax.jit` of your own around `jmeta.make_step`.

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


@cache
def compiled(function: Callable[..., Any]) -> Any:
    """`jax.jit` of a function whose keyword-only arguments are static, with `compiler_options()`."""
    parameters = inspect.signature(function).parameters.values()
    static = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return jax.jit(function, static_argnames=static, compiler_options=compiler_options())
