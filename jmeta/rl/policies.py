"""Networks of reinforcement learning: a policy without memory, and one with."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from jmeta.rl.environment import flat_observation
from jmeta.rl.spaces import Box, Space


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
