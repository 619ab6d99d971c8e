"""Reptile (Nichol et al. 2018)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from jmeta.adjoint import first_order
from jmeta.core import Info, MetaLearner, Model, Params, State, Task, check_model, episodic, over_tasks
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number
from jmeta.inner import InnerProblem, Loss, answers, check_inner, check_learns_by_steps, rate_for, support_loss
from jmeta.losses import softmax_cross_entropy
from jmeta.tree import widened


def reptile(
    model: Model,
    *,
    inner_rate: Number | None = None,
    inner_steps: int = 5,
    inner_batch: int | None = 10,
    loss: Loss = softmax_cross_entropy,
    inner_optimizer: Callable[[Number], optax.GradientTransformation] = lambda rate: optax.adam(rate, b1=0.0),
) -> MetaLearner:
    """Reptile: move the initialisation towards the weights that each task was trained to.

    φ_K is K steps of the inner optimiser on mini-batches of a task; the objective is the mean over tasks of
    ½ ‖θ − φ_K‖² with φ_K a constant, whose gradient is θ − φ_K. With `optax.sgd(ε)` outside, θ ← θ + ε (φ_K − θ).

    Args:
        model: the network, with as many outputs as the tasks have ways.
        inner_rate: α. Default: 1e-3 for cross entropy, 0.01 for any other loss.
        inner_steps: K.
        inner_batch: examples of a mini-batch, drawn without replacement for each step; all where there are no more, or
            None.
        loss: L, inner.
        inner_optimizer: any optax optimiser of a rate; it starts anew for each task.

    Returns:
        The learner. In training a task has no queries: its support and its queries are one set, of which the inner loop
        learns, so that `shots=1, queries=9` are the 10 training shots of the paper. Transductive or not is up to the
        model's batch norm, as for every learner. Train it with `optimizer=optax.sgd(optax.linear_schedule(1, 0,
        steps))`.

    Raises:
        ConfigError: α is not positive, K is negative, or a batch is empty; from `init` and `fit`, K is 0.

    Example:
        >>> import jax, jmeta, optax
        >>> learner = jmeta.reptile(jmeta.linen(jmeta.MLP(outputs=1)), inner_rate=0.01, loss=jmeta.mean_squared_error)
        >>> source, outer = jmeta.sinusoid(), optax.sgd(optax.linear_schedule(1.0, 0.0, 10))
        >>> fitted = jmeta.fit(jax.random.key(0), learner, source, optimizer=outer, steps=10, tasks=1)

    Reference: Nichol, Achiam, Schulman 2018, "On First-Order Meta-Learning Algorithms", algorithm 2 (batched),
    https://arxiv.org/abs/1803.02999.

    Differences from the paper: none in the algorithm. From the authors' code: it keeps the inner optimiser's state from
    task to task; and it draws mini-batches by walking through the shuffled examples, where here each is drawn anew.
    """
    check_model(model)
    α = rate_for(loss, inner_rate, classes=1e-3)
    check_inner(α, inner_steps, inner_optimizer)
    if inner_batch is not None and inner_batch < 1:
        raise ConfigError(f"inner_batch is {inner_batch}; give at least 1 example, or None for all.")
    whole = support_loss(model, loss)

    def inner_loss(key: Key[Array, ""], params: Params, state: State, support: PyTree) -> tuple[Array, State]:
        rows_key, key = jax.random.split(key)
        n = len(support.targets)
        score = jax.random.uniform(rows_key, (n,))
        score = score if isinstance(support.mask, tuple) else jnp.where(support.mask, score, -1.0)
        rows = jax.lax.top_k(score, min(inner_batch or n, n))[1]
        return whole(key, params, state, jax.tree.map(lambda x: x[rows], support))

    adapt = first_order()(InnerProblem(inner_loss, inner_optimizer(α), inner_steps))

    def one_task(
        key: Key[Array, ""], params: Params, state: State, task: Task
    ) -> tuple[Float[Array, ""], tuple[State, Info]]:
        support = task.support._replace(descriptions=())  # which queries have not
        examples = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), support, task.query)
        adapted = jax.lax.stop_gradient(adapt(key, params, state, examples))
        distance = optax.tree.norm(widened(jax.tree.map(jnp.subtract, params, adapted.params)), squared=True)
        return 0.5 * distance, (adapted.state, adapted.info)

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        check_learns_by_steps(inner_steps)
        return model.init(key, task.support.inputs)

    learner = episodic(init, adapt, answers(model), loss)
    return learner._replace(objective=over_tasks(one_task))
