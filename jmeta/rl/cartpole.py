"""A cart with a pole whose physics are hidden: robots of one make that differ in mass, length, friction and motor."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jmeta.core import TaskSource
from jmeta.rl.environment import Environment, environment_tasks
from jmeta.rl.spaces import Box

GRAVITY, CART_MASS, FORCE, SECONDS = 9.8, 1.0, 10.0, 0.02
FAR, STEEP = 2.4, 12 * jnp.pi / 180


class Physics(NamedTuple):
    """What differs between tasks.

    Args:
        mass: of the pole, kg.
        length: half of the pole, m.
        friction: of the cart on its track, N s/m.
        gear: of the motor: the force of a full action in units of 10 N; negative where its wires are exchanged.
    """

    mass: Float[Array, ""]
    length: Float[Array, ""]
    friction: Float[Array, ""]
    gear: Float[Array, ""]


def _reset(key: Key[Array, ""], params: Physics) -> tuple[Array, Array]:
    state = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
    return state, state


def _step(
    key: Key[Array, ""], state: Float[Array, "4"], action: Float[Array, "1"], params: Physics
) -> tuple[Array, Array, Array, Array, dict[str, Array]]:
    mass, length, friction, gear = params
    _, ẋ, θ, ω = state
    force = FORCE * gear * jnp.clip(action[0], -1.0, 1.0) - friction * ẋ
    sin, cos = jnp.sin(θ), jnp.cos(θ)
    total = CART_MASS + mass
    push = (force + mass * length * ω**2 * sin) / total
    turn = (GRAVITY * sin - cos * push) / (length * (4 / 3 - mass * cos**2 / total))
    state = state + SECONDS * jnp.stack([ẋ, push - mass * length * turn * cos / total, ω, turn])
    # for 1 a step, leaning would be as good as standing upright, and could stand for a memory of the motor
    middle, upright = 1 - jnp.abs(state[0]) / FAR, 1 - jnp.abs(state[2]) / STEEP
    fallen = (middle < 0) | (upright < 0)
    return state, state, jnp.where(fallen, 0.0, middle * upright), fallen, {}


def draw(key: Key[Array, ""]) -> Physics:
    """The physics of one task."""
    keys = jax.random.split(key, 5)
    low, high = jnp.asarray([0.05, 0.25, 0.0, 0.5]), jnp.asarray([0.5, 1.0, 1.0, 1.5])
    mass, length, friction, gear = (
        jax.random.uniform(k, (), minval=a, maxval=b) for k, a, b in zip(keys[:4], low, high, strict=True)
    )
    return Physics(mass, length, friction, gear * jax.random.rademacher(keys[4], (), gear.dtype))


def environment(params: Physics | None = None, horizon: int = 100) -> Environment:
    """A pole that is to be balanced on a cart, by pushing the cart.

    Args:
        params: its physics; default those of Barto et al.
        horizon: steps of 0.02 s of an episode.

    Returns:
        The environment: the observation is position, speed, angle and angular speed `[4]`, an action in [−1, 1] pushes
        by up to 10 N times the gear, and an episode ends where the cart is 2.4 m away or the pole leans by 12 degrees.
        The reward of a step is (1 − |position| / 2.4 m) · (1 − |angle| / 12°): 1 for a pole upright in the middle, 0 at
        the end.

    Example:
        >>> from jmeta.rl import cartpole
        >>> cartpole.environment().horizon
        100

    Reference: Barto, Sutton, Anderson 1983, "Neuronlike Adaptive Elements That Can Solve Difficult Learning Control
    Problems"; gymnasium's `CartPole`.

    Differences from gymnasium: the force is continuous, the cart has friction, and the reward is not 1 a step: for that
    a policy without memory learns to stand upright with one motor and at a lean of 4 degrees with the other, where it
    steers the other way; the lean tells the motor, and nobody needs to adapt.
    """
    default = Physics(*map(jnp.asarray, (0.1, 0.5, 0.0, 1.0)))
    return Environment(default if params is None else params, _reset, _step, Box(1, -1.0, 1.0), horizon, finite=True)


def hidden_cartpole(*, horizon: int = 100, queries: int = 20) -> TaskSource:
    """Carts with a pole of unknown mass, length and friction, and a motor of unknown strength and direction.

    Each task draws a pole of 0.05 to 0.5 kg and 0.25 to 1 m (half of it), friction of 0 to 1 N s/m, and a gear of 0.5
    to 1.5, which turns the other way in half of the tasks. None of it is observed.

    Args:
        horizon: steps of an episode, and so more than any return.
        queries: fresh episodes that measure the return of an adapted policy.

    Returns:
        A source of tasks whose `support` is an `Environment` with `Physics` as its parameters.

    Raises:
        ConfigError: a horizon or queries below 1.

    Example:
        >>> import jax
        >>> from jmeta.rl import hidden_cartpole
        >>> source = hidden_cartpole()
        >>> float(source.sample(jax.random.key(0), source.data).support.params.length) >= 0.25
        True
    """
    return environment_tasks(environment(horizon=horizon), draw, queries=queries)
