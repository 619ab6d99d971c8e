"""Networks of reinforcement learning, a policy without memory and one with, and how they act."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from jmeta.core import Model, Params, State, Task
from jmeta.errors import ModelError
from jmeta.rl.environment import Environment, flat_observation
from jmeta.rl.rollout import Policy as Act
from jmeta.rl.rollout import Previous, Trajectory, nothing_before, rollout
from jmeta.rl.spaces import Box, Space
from jmeta.tree import widened


class Policy(nn.Module):
    """A perceptron that gives the outputs an action space wants, for one state after the other.

    Logits for `Discrete`. For `Box` a mean, and a log standard deviation that is a parameter of its own and does not
    depend on the state.

    Args:
        actions: the action space.
        hidden: widths of the hidden layers.
        activation: after each hidden layer.
        log_deviation: where the log standard deviation starts, in units in which the bounds of the actions are ±1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.rl import Box
        >>> from jmeta.rl import Policy
        >>> Policy(Box(2)).init_with_output(jax.random.key(0), jnp.ones((10, 3)))[0].shape
        (10, 4)

    Reference: Finn et al. 2017, "Model-Agnostic Meta-Learning", section 5.3.

    Differences from the paper: two hidden layers of 64 instead of 100, and a start at half the deviation, as
    `docs/meta-rl.md` was measured.
    """

    actions: Space
    hidden: tuple[int, ...] = (64, 64)
    activation: Callable[[Array], Array] = nn.relu
    log_deviation: float = -0.7

    @nn.compact
    def __call__(self, observations: PyTree[Float[Array, "n ..."]]) -> Float[Array, "n outputs"]:
        x = flat_observation(observations, axes=1)
        for width in self.hidden:
            x = self.activation(nn.Dense(width)(x))
        return _outputs(self, self.actions, x, self.log_deviation)


class RecurrentPolicy(nn.Module):
    """A gated recurrent unit that gives a policy's outputs and the value of what it has seen so far.

    Args:
        actions: the action space.
        width: of its memory.
        log_deviation: where the log standard deviation of `Box` starts.

    Returns:
        Of `(memory, features)`, `[n, width]` and `[n, ...]`: the next memory and `[n, outputs + 1]`, the value last.
        A memory of None stands for its start, zeros.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.rl import Discrete
        >>> from jmeta.rl import RecurrentPolicy
        >>> network = RecurrentPolicy(Discrete(5), width=32)
        >>> (memory, outputs), _ = network.init_with_output(jax.random.key(0), (None, jnp.ones((10, 7))))
        >>> memory.shape, outputs.shape
        ((10, 32), (10, 6))

    Reference: Duan et al. 2016, "RL²: Fast Reinforcement Learning via Slow Reinforcement Learning", section 2.3.
    """

    actions: Space
    width: int = 128
    log_deviation: float = 0.0

    @nn.compact
    def __call__(
        self, inputs: tuple[Float[Array, "n width"] | None, Float[Array, "n features"]]
    ) -> tuple[Float[Array, "n width"], Float[Array, "n outputs"]]:
        memory, x = inputs
        if memory is None:
            memory = jnp.zeros((x.shape[0], self.width), x.dtype)
        memory, x = nn.GRUCell(self.width)(memory, x)
        outputs = _outputs(self, self.actions, x, self.log_deviation)
        return memory, jnp.concatenate([outputs, nn.Dense(1, name="value")(x)], axis=-1)


def _outputs(module: nn.Module, actions: Space, x: Float[Array, "n width"], start: float) -> Float[Array, "n outputs"]:
    """The last layer, small at first, so that a new policy acts at random whatever it sees."""
    small = nn.initializers.orthogonal(0.01)
    if not isinstance(actions, Box):
        return nn.Dense(actions.outputs, kernel_init=small, name="head")(x)
    mean = nn.Dense(actions.size, kernel_init=small, name="head")(x)
    log_σ = module.param("log_deviation", nn.initializers.constant(start), (actions.size,), x.dtype)
    return jnp.concatenate([mean, jnp.broadcast_to(log_σ[None], mean.shape)], axis=-1)


class Memoryless(NamedTuple):
    """A network `observations [n, ...] -> outputs [n, outputs]` as a policy.

    Args:
        model: the network, as `jmeta.linen(jmeta.rl.Policy(actions))` gives.

    Example:
        >>> import jax, jmeta
        >>> from jmeta.rl import Box, collect, navigation
        >>> from jmeta.rl.policies import Memoryless
        >>> network, room = Memoryless(jmeta.linen(jmeta.rl.Policy(Box(2)))), navigation.environment(horizon=5)
        >>> params, state = network.init(jax.random.key(0), jmeta.Task(room, ()))
        >>> act = network.policy(jax.random.key(1), params, state)
        >>> collect(jax.random.key(2), room, act, 3).outputs.shape
        (3, 5, 4)
    """

    model: Model

    def init(self, key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        """θ and state; `ModelError` where the outputs do not fit the action space of the task."""
        environment = task.support
        observation = jax.tree.map(lambda x: jnp.asarray(x)[None], environment.reset(key, environment.params)[0])
        params, state = self.model.init(key, observation)
        outputs = jax.eval_shape(lambda: self.model.apply(key, params, state, observation, train=False)[0])
        _check_outputs(outputs, environment.actions)
        return params, state

    def policy(self, key: Key[Array, ""], params: Params, state: State) -> Act:
        """What `rollout` runs, with `()` as its carry."""

        def act(carry: PyTree, observation: PyTree, previous: PyTree) -> tuple[PyTree, Array]:
            one = jax.tree.map(lambda x: x[None], observation)
            return carry, self.model.apply(key, params, state, one, train=False)[0][0]

        return act

    def outputs(self, key: Key[Array, ""], params: Params, state: State, episodes: Trajectory) -> Array:
        """The outputs at every step of some episodes, `[episodes, T, outputs]`, to be differentiated."""
        observations = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), episodes.observations)
        outputs, _ = self.model.apply(key, params, state, observations, train=True)
        return widened(outputs).reshape(episodes.outputs.shape)


class Recurrent(NamedTuple):
    """A network `(memory, features [n, ...]) -> (memory, outputs [n, outputs + 1])` as a policy with a value.

    The features are the observation, the last action, its reward and whether an episode began.

    Args:
        model: the network, as `jmeta.linen(jmeta.rl.RecurrentPolicy(actions))` gives; None as memory stands for its
            start.

    Example:
        >>> import jax, jmeta
        >>> from jmeta.rl import Box, navigation
        >>> from jmeta.rl.policies import Recurrent
        >>> network, room = Recurrent(jmeta.linen(jmeta.rl.RecurrentPolicy(Box(2)))), navigation.environment(horizon=5)
        >>> params, state = network.init(jax.random.key(0), jmeta.Task(room, ()))
        >>> _, episodes = network.trial(jax.random.key(1), params, state, room, 3)
        >>> episodes.outputs.shape
        (3, 5, 4)
    """

    model: Model

    def init(self, key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        """θ and state; `ModelError` where the outputs do not fit the action space of the task."""
        environment = task.support
        observation, _ = environment.reset(key, environment.params)
        x = _features(observation, nothing_before(environment))
        params, state = self.model.init(key, (None, x[None]))
        _, outputs = jax.eval_shape(lambda: self._apply(key, params, state, None, x, False))
        _check_outputs(outputs, environment.actions, value=True)
        return params, state

    def policy(self, key: Key[Array, ""], params: Params, state: State) -> Act:
        """What `rollout` runs, with the memory as its carry."""

        def act(memory: PyTree, observation: PyTree, previous: Previous) -> tuple[PyTree, Array]:
            memory, outputs = self._apply(key, params, state, memory, _features(observation, previous), False)
            return memory, outputs[:-1]

        return act

    def trial(
        self, key: Key[Array, ""], params: Params, state: State, environment: Environment, episodes: int
    ) -> tuple[tuple[PyTree, Previous], Trajectory]:
        """Episodes one after the other, over which the memory is kept: `((memory, previous), [episodes, T])`."""
        model_key, key = jax.random.split(key)
        act = self.policy(model_key, params, state)
        previous = nothing_before(environment)
        observation, _ = environment.reset(key, environment.params)
        memory = self._start(model_key, params, state, _features(observation, previous))

        def episode(carry: Any, key: Key[Array, ""]) -> Any:
            return rollout(key, environment, act, *carry)

        return lax.scan(episode, (memory, previous), jax.random.split(key, episodes))

    def outputs(
        self, key: Key[Array, ""], params: Params, state: State, steps: Trajectory
    ) -> Float[Array, "steps outputs"]:
        """The outputs along a trial `[steps, ...]`, a value last; the memory stands still in the padding."""
        inputs = jax.vmap(_features)(steps.observations, steps.previous)

        def step(memory: PyTree, x: tuple[Array, Array]) -> tuple[PyTree, Array]:
            after, outputs = self._apply(key, params, state, memory, x[0], True)
            return jax.tree.map(lambda a, b: jnp.where(x[1], a, b), after, memory), widened(outputs)

        return lax.scan(step, self._start(key, params, state, inputs[0]), (inputs, steps.alive))[1]

    def _start(self, key: Key[Array, ""], params: Params, state: State, x: Array) -> PyTree:
        memory, _ = jax.eval_shape(lambda: self._apply(key, params, state, None, x, False))
        return jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), memory)

    def _apply(self, key: Key[Array, ""], params: Params, state: State, memory: PyTree, x: Array, train: bool) -> Any:
        (memory, outputs), _ = self.model.apply(key, params, state, (memory, x[None]), train=train)
        return memory, outputs[0]


def _features(observation: PyTree, previous: Previous) -> Float[Array, "features"]:
    x = flat_observation(observation)
    return jnp.concatenate([x, previous.action, previous.reward[None], previous.done[None]], dtype=x.dtype)


def _check_outputs(outputs: Any, actions: Space, value: bool = False) -> None:
    wanted = actions.outputs + int(value)
    if outputs.shape not in ((wanted,), (1, wanted)):
        needs, network = ("and a value need", "RecurrentPolicy") if value else ("needs", "Policy")
        raise ModelError(
            f"the policy gives {outputs.shape[-1]} outputs where {actions} {needs} {wanted}; "
            f"jmeta.rl.{network}(actions) gives as many."
        )
