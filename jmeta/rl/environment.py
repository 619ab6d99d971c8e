"""An environment as two pure functions and its parameters, and tasks made of it."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from jmeta.core import Examples, Task, TaskSource
from jmeta.errors import ConfigError, DataError
from jmeta.rl.spaces import Space
from jmeta.tree import path_name

Reset = Callable[[Key[Array, ""], PyTree], tuple[PyTree, PyTree]]
Step = Callable[[Key[Array, ""], PyTree, Array, PyTree], tuple[PyTree, PyTree, Array, Array, Any]]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params"],
    meta_fields=["reset", "step", "actions", "horizon", "finite"],
)
@dataclasses.dataclass(frozen=True)
class Environment:
    """A Markov decision process: pure functions with gymnax's interface, and the parameters that tell tasks apart.

    It is a pytree whose leaves are the parameters, so that it can be the support of a `Task`: a batch of tasks is one
    `Environment` with a leading task axis on its parameters, and `jax.vmap` takes it as it is.

    Args:
        params: the parameters of this environment (a goal, masses, probabilities): what differs between tasks.
        reset: `(key, params) -> (observation, state)`; the observation is an array or any pytree of arrays.
        step: `(key, state, action, params) -> (observation, state, reward, done, info)`, the reward a scalar, done a
            bool.
        actions: the action space.
        horizon: after how many steps an episode ends at the latest.
        finite: whether the task itself ends at the horizon, as a bandit of ten pulls, so that nothing that follows has
            a value. Else the horizon is a limit of time: learners credit an episode that it cut with the value of where
            it was cut.

    Raises:
        ConfigError: a horizon below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.rl import Discrete, Environment
        >>> coin = Environment(  # an observation that says nothing, and 1 for the right guess
        ...     params=jnp.asarray(1),
        ...     reset=lambda key, params: (jnp.zeros(1), ()),
        ...     step=lambda key, state, action, params: (
        ...         jnp.zeros(1), state, (action == params).astype(jnp.float32), jnp.asarray(False), {}),
        ...     actions=Discrete(2),
        ...     horizon=5,
        ... )
        >>> float(coin.step(jax.random.key(0), (), jnp.asarray(1), coin.params)[2])
        1.0
    """

    params: PyTree
    reset: Reset
    step: Step
    actions: Space
    horizon: int
    finite: bool = False

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ConfigError(f"the environment has a horizon of {self.horizon}; give at least 1 step.")

    def with_params(self, params: PyTree) -> "Environment":
        """The same environment with other parameters."""
        return dataclasses.replace(self, params=params)


def environment_tasks(
    environment: Environment,
    sample_params: Callable[[Key[Array, ""]], PyTree],
    *,
    queries: int = 1,
    protocol: Mapping[str, Any] | None = None,
) -> TaskSource:
    """Tasks that differ in the parameters of an environment.

    Args:
        environment: any; its own parameters do not matter.
        sample_params: `key -> params`, the distribution over tasks.
        queries: how many fresh episodes measure the return of an adapted policy.
        protocol: what else stands in every result, beside `horizon` and `queries`.

    Returns:
        A source of tasks. `support` is an `Environment`, which `adapt` may act in; `query.inputs` is the same
        environment with a leading axis of `queries` on its parameters, and a learner's answer to each is an episode, a
        `Trajectory`. `query.targets` is empty: nobody knows the best return.

    Raises:
        ConfigError: fewer than one query.
        DataError: the environment cannot be traced, its reward is no scalar, done is no bool, a leaf of the observation
            or the state has another shape after a step, or observations or rewards are not finite; found by one episode
            of random actions.

    Example:
        >>> import jax, jmeta
        >>> from jmeta.rl import environment_tasks, navigation
        >>> near = lambda key: jax.random.uniform(key, (2,), minval=-0.1, maxval=0.1)
        >>> source = environment_tasks(navigation.environment(), near)
        >>> source.sample(jax.random.key(0), source.data).support.params.shape
        (2,)
    """
    if queries < 1:
        raise ConfigError(f"queries is {queries}; give at least 1 episode.")
    check_environment(environment, sample_params)
    environment = environment.with_params(())  # an array would tell equal sources apart, which share a program

    def sample(key: Key[Array, ""], data: PyTree) -> Task:
        params = sample_params(key)
        many = jax.tree.map(lambda x: jnp.broadcast_to(x, (queries, *jnp.shape(x))), params)
        return Task(environment.with_params(params), Examples(environment.with_params(many), ()))

    return TaskSource((), sample, {**(protocol or {}), "horizon": environment.horizon, "queries": queries})


def check_environment(environment: Environment, sample_params: Callable[[Key[Array, ""]], PyTree]) -> None:
    """Raises `DataError` unless an episode of random actions can be compiled, of the shapes and numbers it should have.

    Args:
        environment: any; its own parameters do not matter.
        sample_params: `key -> params`.

    Raises:
        DataError: one sentence, what the environment does wrong.
    """
    from jmeta.rl.rollout import rollout

    def policy(carry: PyTree, observation: PyTree, previous: PyTree) -> tuple[PyTree, Float[Array, "outputs"]]:
        return carry, jnp.zeros(environment.actions.outputs)

    def episode(key: Key[Array, ""]) -> tuple[Array, Array, PyTree]:
        params_key, key = jax.random.split(key)
        drawn = environment.with_params(sample_params(params_key))
        _check_step(key, drawn)
        trajectory = rollout(key, drawn, policy, ())[1]
        finite = [jnp.isfinite(x).all() for x in jax.tree.leaves((trajectory.observations, trajectory.last))]
        return jnp.stack(finite).all(), jnp.isfinite(trajectory.rewards), drawn.params

    try:
        observed, rewarded, params = jax.jit(episode)(jax.random.key(0))
    except DataError:
        raise
    except Exception as error:  # whatever a function raises that was not written for tracers
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(
            f"the environment cannot be compiled ({reason}); write reset and step with jax.numpy and no `if` on values."
        ) from error
    named = ((path_name(path), np.asarray(leaf)) for path, leaf in jax.tree.leaves_with_path(params))
    told = ", ".join(f"{name} {leaf}".strip() for name, leaf in named if leaf.size <= 8)
    task = f" in the task {told}" if told else ""
    if not bool(observed):
        raise DataError(f"the environment gives observations that are not finite{task}; look at its reset and step.")
    if not bool(rewarded.all()):
        step = int(jnp.argmin(rewarded))
        raise DataError(f"the environment gives a reward that is not finite{task} at step {step}; look at its step.")


def _check_step(key: Key[Array, ""], environment: Environment) -> None:
    """Raises `DataError` where what `reset` and `step` return has not the shapes of the contract; when traced."""
    first = _parts("reset", environment.reset(key, environment.params), "(observation, state)")
    action = environment.actions.sample(
        jnp.zeros(environment.actions.outputs), jnp.zeros_like(environment.actions.noise(key, 1)[0])
    )
    state = jax.tree.map(jnp.asarray, first[1])
    after = _parts(
        "step",
        environment.step(key, state, environment.actions.execute(action), environment.params),
        "(observation, state, reward, done, info)",
    )
    reward, done = jnp.asarray(after[2]), jnp.asarray(after[3])
    if reward.shape != ():
        raise DataError(f"the reward has shape {list(reward.shape)}; give a scalar.")
    if done.shape != () or done.dtype != bool:
        raise DataError(f"done is {done.dtype} of shape {list(done.shape)}; give a single bool, as done > 0.")
    for name, before, now in (("observation", first[0], after[0]), ("state", first[1], after[1])):
        then, there = ({path_name(p): jnp.shape(x) for p, x in jax.tree.leaves_with_path(t)} for t in (before, now))
        for leaf in {**then, **there}:
            if then.get(leaf) != there.get(leaf):
                shapes = ["nothing" if s is None else str(list(s)) for s in (then.get(leaf), there.get(leaf))]
                raise DataError(
                    f"the {name}{leaf and f' {leaf!r}'} is {shapes[0]} from reset and {shapes[1]} from step; let both "
                    "give one shape."
                )


def _parts(name: str, returned: Any, wanted: str) -> tuple[Any, ...]:
    parts = returned if isinstance(returned, tuple) else (returned,)
    if len(parts) != len(wanted.split(",")):
        raise DataError(f"{name} returns {len(parts)} values; let it return {wanted}.")
    return parts


def flat_observation(observation: PyTree, axes: int = 0) -> Float[Array, "..."]:
    """All numbers of an observation as one vector, of the type of its first float.

    Args:
        observation: an array, or any pytree of arrays.
        axes: how many leading axes (episodes, steps) all leaves share and keep.

    Returns:
        `[..., features]`, with `axes` axes before the last.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.rl import flat_observation
        >>> flat_observation({"place": jnp.zeros(2), "speed": jnp.ones(())}).tolist()
        [0.0, 0.0, 1.0]
    """
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(observation)]
    dtype = next((x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)), jnp.zeros(()).dtype)
    return jnp.concatenate([x.reshape(*x.shape[:axes], -1).astype(dtype) for x in leaves], axis=-1)


def reveal(source: TaskSource) -> TaskSource:
    """The same tasks with the parameters of the environment in every observation: the tasks of an oracle.

    Args:
        source: tasks of environments whose observations and parameters are arrays, or trees of them.

    Returns:
        Tasks whose observation is `[observation, parameters]`, flat.

    Example:
        >>> import jax, jmeta
        >>> from jmeta.rl import point_navigation, reveal
        >>> source = reveal(point_navigation())
        >>> goal = source.sample(jax.random.key(0), source.data).support
        >>> goal.reset(jax.random.key(1), goal.params)[0].shape
        (4,)
    """

    hidden = source.sample

    def sample(key: Key[Array, ""], data: PyTree) -> Task:
        return jax.tree.map(_revealed, hidden(key, data), is_leaf=lambda x: isinstance(x, Environment))

    return source._replace(sample=sample)


def _revealed(environment: Environment) -> Environment:
    return dataclasses.replace(environment, reset=_Revealed(environment.reset, 1), step=_Revealed(environment.step, 3))


@dataclasses.dataclass(frozen=True)
class _Revealed:
    """`reset` or `step`, equal where they wrap the same function, so that nothing compiles twice."""

    function: Callable[..., Any]
    params: int

    def __call__(self, *arguments: Any) -> Any:
        observation, *rest = self.function(*arguments)
        return flat_observation((observation, arguments[self.params])), *rest
