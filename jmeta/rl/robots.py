"""Robots of Brax: half-cheetah and ant told by reward alone where or how fast to run, a walker of unknown body."""

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jmeta.core import TaskSource
from jmeta.errors import ConfigError
from jmeta.rl.adapters import from_brax
from jmeta.rl.environment import Environment, environment_tasks

FASTEST = {"halfcheetah": 2.0, "ant": 3.0}  # target velocities, m/s
EFFORT = {"halfcheetah": 0.05, "ant": 0.005}  # what a squared action costs
ALIVE = {"halfcheetah": 0.0, "ant": 1.05}  # so that falling, which ends an episode, is not the least evil


class Body(NamedTuple):
    """A robot in units of the one that Brax has.

    Args:
        mass: of all its parts.
        length: of all its parts.
        friction: of the ground.
        damping: of its joints.
    """

    mass: Float[Array, ""]
    length: Float[Array, ""]
    friction: Float[Array, ""]
    damping: Float[Array, ""]


@lru_cache
def _brax(robot: str, backend: str) -> Any:
    try:
        from brax import envs
    except ImportError as error:
        raise ConfigError("robots need Brax: pip install 'jmeta[robotics]'.") from error
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.ensure_compile_time_eval(),
        warnings.catch_warnings(),
    ):
        # its environments are as they will stay; those that are still developed are slower on a CPU
        warnings.filterwarnings("ignore", "Brax System, piplines and environments are not actively")
        return envs.get_environment(robot, backend=backend)


@lru_cache
def _running(robot: str, gained: Callable[[Array, Array], Array], backend: str, horizon: int) -> Environment:
    """One object for equal settings, so that tasks made twice share a program; `gained` is of velocity and task."""

    def reward(state: Any, action: Array, task: Array) -> Array:
        effort = EFFORT[robot] * jnp.square(action).sum()
        return gained(state.metrics["x_velocity"], task) + ALIVE[robot] - effort

    return from_brax(_brax(robot, backend), jnp.ones(()), reward=reward, horizon=horizon)


def _near(velocity: Array, target: Array) -> Array:
    return -jnp.abs(velocity - target)


def _along(velocity: Array, direction: Array) -> Array:
    return direction * velocity


@lru_cache
def _walking(backend: str, horizon: int) -> Environment:
    return from_brax(_brax("walker2d", backend), Body(*(jnp.ones(()),) * 4), body=resized, horizon=horizon)


def resized(system: Any, body: Body) -> Any:
    """A system of Brax with another body.

    Args:
        system: of Brax.
        body: what its parts are multiplied by.

    Returns:
        The system; its moments of inertia grow with mass and squared length.

    Example:
        >>> from jmeta.rl.robots import resized  # doctest: +SKIP
        >>> heavy = resized(environment.sys, body)  # doctest: +SKIP
    """
    mass, length, friction, damping = body
    link, inertia = system.link, system.link.inertia

    def moved(transform: Any) -> Any:
        return transform.replace(pos=transform.pos * length)

    inertia = inertia.replace(
        transform=moved(inertia.transform), i=inertia.i * mass * length**2, mass=inertia.mass * mass
    )
    return system.replace(
        link=link.replace(transform=moved(link.transform), joint=moved(link.joint), inertia=inertia),
        dof=system.dof.replace(damping=system.dof.damping * damping),
        geom_pos=system.geom_pos * length,
        geom_size=system.geom_size * length,
        geom_friction=system.geom_friction * friction,
    )


def _velocity(robot: str, backend: str, horizon: int, queries: int) -> TaskSource:
    def draw(key: Key[Array, ""]) -> Array:
        return jax.random.uniform(key, (), minval=0.0, maxval=FASTEST[robot])

    return environment_tasks(_running(robot, _near, backend, horizon), draw, queries=queries)


def _direction(robot: str, backend: str, horizon: int, queries: int) -> TaskSource:
    def draw(key: Key[Array, ""]) -> Array:
        return jax.random.rademacher(key, (), jnp.float32)

    return environment_tasks(_running(robot, _along, backend, horizon), draw, queries=queries)


def cheetah_velocity(*, horizon: int = 100, queries: int = 20, backend: str = "spring") -> TaskSource:
    """A half-cheetah in the plane that shall run at a velocity that is told by the reward alone.

    Each task draws its velocity v from U[0, 2] m/s. The reward of a step is `−|ẋ − v| − 0.05 ‖a‖²`.

    Args:
        horizon: steps of an episode, of 0.05 s each.
        queries: fresh episodes that measure the return of an adapted policy.
        backend: Brax's physics: `"spring"` is the fastest on a CPU; `"positional"`, `"generalized"` or `"mjx"`.

    Returns:
        A source of tasks whose `support` is an `Environment` with v as its parameter.

    Raises:
        ConfigError: Brax is not installed, or a horizon or queries below 1.

    Example:
        >>> from jmeta.rl import cheetah_velocity
        >>> source = cheetah_velocity()  # doctest: +SKIP

    Reference: Finn et al. 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", section 5.3.

    Differences from the paper: Brax's robot and physics in place of MuJoCo's; episodes of 100 steps in place of 200.
    """
    return _velocity("halfcheetah", backend, horizon, queries)


def cheetah_direction(*, horizon: int = 100, queries: int = 20, backend: str = "spring") -> TaskSource:
    """A half-cheetah in the plane that shall run forward or backward, which the reward alone tells.

    Each task draws d of −1 and 1. The reward of a step is d ẋ − 0.05 ‖a‖².

    Args:
        horizon: as in `jmeta.rl.cheetah_velocity`, like those below.
        queries: see there.
        backend: see there.

    Returns:
        A source of tasks whose `support` is an `Environment` with d as its parameter.

    Raises:
        ConfigError: as there.

    Example:
        >>> from jmeta.rl import cheetah_direction
        >>> source = cheetah_direction()  # doctest: +SKIP

    Reference: Finn et al. 2017, section 5.3.

    Differences from the paper: as there.
    """
    return _direction("halfcheetah", backend, horizon, queries)


def ant_velocity(*, horizon: int = 100, queries: int = 20, backend: str = "spring") -> TaskSource:
    """A four-legged ant that shall run at a velocity that is told by the reward alone.

    Each task draws its velocity v from U[0, 3] m/s. The reward of a step is `1.05 − |ẋ − v| − 0.005 ‖a‖²`; an episode
    ends where the ant falls.

    Args:
        horizon: as in `jmeta.rl.cheetah_velocity`, like those below.
        queries: see there.
        backend: see there.

    Returns:
        A source of tasks whose `support` is an `Environment` with v as its parameter.

    Raises:
        ConfigError: as there.

    Example:
        >>> from jmeta.rl import ant_velocity
        >>> source = ant_velocity()  # doctest: +SKIP

    Reference: Finn et al. 2017, section 5.3, and its code.

    Differences from the paper: as there; no cost of contacts.
    """
    return _velocity("ant", backend, horizon, queries)


def ant_direction(*, horizon: int = 100, queries: int = 20, backend: str = "spring") -> TaskSource:
    """A four-legged ant that shall run forward or backward, which the reward alone tells.

    Each task draws d of −1 and 1. The reward of a step is d ẋ + 1.05 − 0.005 ‖a‖²; an episode ends where the ant falls.

    Args:
        horizon: as in `jmeta.rl.cheetah_velocity`, like those below.
        queries: see there.
        backend: see there.

    Returns:
        A source of tasks whose `support` is an `Environment` with d as its parameter.

    Raises:
        ConfigError: as there.

    Example:
        >>> from jmeta.rl import ant_direction
        >>> source = ant_direction()  # doctest: +SKIP

    Reference: Finn et al. 2017, section 5.3, and its code.

    Differences from the paper: as there; no cost of contacts.
    """
    return _direction("ant", backend, horizon, queries)


def walker_body(*, horizon: int = 100, queries: int = 20, backend: str = "spring") -> TaskSource:
    """A walker in the plane that shall walk forward in a body that it is not told.

    Each task multiplies the mass of all parts, the friction of the ground and the damping of the joints by 1.5 to the
    power of U[−1, 1] each, and all lengths by U[0.9, 1.1]. The reward is Brax's: ẋ + 1 − 0.001 ‖a‖²; an episode ends
    where the walker falls.

    Args:
        horizon: as in `jmeta.rl.cheetah_velocity`, like those below.
        queries: see there.
        backend: see there.

    Returns:
        A source of tasks whose `support` is an `Environment` with a `jmeta.rl.robots.Body` as its parameters.

    Raises:
        ConfigError: as there.

    Example:
        >>> from jmeta.rl import walker_body
        >>> source = walker_body()  # doctest: +SKIP

    Reference: Rothfuss et al. 2019, "ProMP: Proximal Meta-Policy Search", section 6 (`Walker2DRandParams`).

    Differences from the paper: lengths differ as well; each factor is one for all parts of a robot, and powers of 1.5
    reach to 1 in place of 3.
    """

    def draw(key: Key[Array, ""]) -> Body:
        keys = jax.random.split(key, 4)
        mass, friction, damping = (1.5 ** jax.random.uniform(k, (), minval=-1.0, maxval=1.0) for k in keys[:3])
        return Body(mass, jax.random.uniform(keys[3], (), minval=0.9, maxval=1.1), friction, damping)

    return environment_tasks(_walking(backend, horizon), draw, queries=queries)
