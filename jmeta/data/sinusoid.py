"""Regression of sine waves, the first experiment of MAML."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jmeta.core import Examples, Task, TaskSource
from jmeta.errors import DataError


def sinusoid(*, shots: int = 10, queries: int = 10) -> TaskSource:
    """Few-shot regression of sine waves `y = A sin(x - φ)` of a random amplitude A and phase φ.

    Each task draws A from U[0.1, 5] and φ from U[0, π], and every point draws x from U[-5, 5]. There is no noise, and
    no finite data behind the tasks.

    Args:
        shots: support points of a task.
        queries: query points of a task.

    Returns:
        A source of tasks whose `support` is `Examples([shots, 1], [shots, 1])` and whose `query` is
        `Examples([queries, 1], [queries, 1])`, all float32.

    Raises:
        DataError: fewer than one shot or query.

    Example:
        >>> import jax, jmeta
        >>> source = jmeta.sinusoid(shots=5)
        >>> task = source.sample(jax.random.key(0), source.data)
        >>> task.support.inputs.shape, task.query.targets.shape
        ((5, 1), (10, 1))

    Reference: Finn et al. 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", section 5.1.
    """
    for name, value in (("shots", shots), ("queries", queries)):
        if value < 1:
            raise DataError(f"{name} is {value}; give at least 1.")

    def sample(key: Key[Array, ""], data: PyTree) -> Task:
        amplitude_key, phase_key, x_key = jax.random.split(key, 3)
        amplitude = jax.random.uniform(amplitude_key, (), jnp.float32, 0.1, 5.0)
        phase = jax.random.uniform(phase_key, (), jnp.float32, 0.0, jnp.pi)
        x = jax.random.uniform(x_key, (shots + queries, 1), jnp.float32, -5.0, 5.0)
        y = amplitude * jnp.sin(x - phase)
        return Task(Examples(x[:shots], y[:shots]), Examples(x[shots:], y[shots:]))

    return TaskSource((), sample, {"shots": shots, "queries": queries})
