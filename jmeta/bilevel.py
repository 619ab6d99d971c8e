"""Bilevel optimisation: what an outer loss wants of variables that an inner loss is minimised under."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, Float, Key, PyTree

from jmeta.adjoint import exact
from jmeta.core import Adapted, Info, MetaLearner, Params, State, Task, over_tasks
from jmeta.errors import ConfigError, ModelError
from jmeta.inner import Adjoint, InnerProblem

# (key, φ, θ, data) -> scalar
BilevelLoss = Callable[[Key[Array, ""], PyTree, PyTree, PyTree], Float[Array, ""]]


def bilevel(
    outer: Callable[[Key[Array, ""], Task], PyTree],
    inner: Callable[[Key[Array, ""], PyTree, PyTree], PyTree],
    inner_loss: BilevelLoss,
    outer_loss: BilevelLoss,
    *,
    inner_optimizer: optax.GradientTransformation = optax.sgd(0.1),
    inner_steps: int = 1,
    adjoint: Adjoint = exact(),
    persistent: bool = False,
    predict: Callable[[Key[Array, ""], PyTree, PyTree, PyTree], PyTree] | None = None,
) -> MetaLearner:
    """A bilevel problem: minimises F(φ*(θ), θ; query) in θ, φ*(θ) being what an inner loop makes of L(φ, θ; support).

    θ are hyper-parameters, weights of examples, a loss, an optimiser or an architecture; MAML is the case in which θ is
    where φ starts. The hypergradient is ∂F/∂θ + (dφ*/dθ)ᵀ ∂F/∂φ, with dφ*/dθ by the adjoint: through the inner steps,
    or through the minimum.

    The problem is a `MetaLearner`, so `jmeta.fit` solves it, checkpoints keep it, and `jmeta.evaluate` measures it. A
    task is a pair of data sets, the support for L and the query for F.

    Args:
        outer: `(key, task) -> θ`, where the outer variables start.
        inner: `(key, θ, support) -> φ₀`, where the inner variables start.
        inner_loss: L, `(key, φ, θ, support) -> scalar`; each inner step has its own key, for a minibatch or for
            dropout.
        outer_loss: F, `(key, φ, θ, query) -> scalar`.
        inner_optimizer: of φ; it is differentiated through, for which Adam needs an `eps_root` above 0 where a gradient
            can be 0. An update that names an argument `hyper` gets θ there: so is a learning rate an outer variable.
        inner_steps: K, for each meta-step.
        adjoint: any of `jmeta`: `exact()`, `truncated(last)`, `mixed_mode()`, `first_order()`, or `implicit(solver)`
            for an inner loop that ends at a minimum.
        persistent: whether φ and the state of its optimiser go on from meta-step to meta-step, and through checkpoints,
            and the hypergradient is that of the last K steps; otherwise every meta-step starts at φ₀. Of several tasks
            a step the mean is kept.
        predict: `(key, φ, θ, inputs) -> outputs`, which `jmeta.evaluate` needs.

    Returns:
        The learner: `params` is θ, `Adapted.params` is `(φ, θ)`, and where it is persistent `state` is `(φ, optimiser
        state)`. Constraints on θ: `fit(..., optimizer=jmeta.projected(optimizer, projection))`; on φ the same as
        `inner_optimizer`.

    Raises:
        ConfigError: `inner_steps` below 1.
        ModelError: from `init` and `fit`: a loss that is no scalar, or an objective that does not depend on θ; from
            `evaluate`: there is no `predict`.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta, optax
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 20, 5)), jnp.ones((2, 20))
        >>> data = jmeta.Task((x[0], y[0]), (x[1], y[1]))
        >>> error = lambda φ, data: jnp.mean((data[0] @ φ - data[1]) ** 2)
        >>> ridge = jmeta.bilevel(  # the weight of a penalty, on a logarithmic scale
        ...     outer=lambda key, task: jnp.zeros(()),
        ...     inner=lambda key, θ, support: jnp.zeros(5),
        ...     inner_loss=lambda key, φ, θ, support: error(φ, support) + jnp.exp(θ) * (φ**2).sum(),
        ...     outer_loss=lambda key, φ, θ, query: error(φ, query),
        ...     inner_steps=50,
        ...     adjoint=jmeta.implicit(),
        ... )
        >>> problem = jmeta.TaskSource(data, lambda key, data: data, {})
        >>> fitted = jmeta.fit(jax.random.key(0), ridge, problem, steps=5, tasks=1, optimizer=optax.adam(0.3))
        >>> fitted.params.shape
        ()

    Reference: Franceschi et al. 2018, "Bilevel Programming for Hyperparameter Optimization and Meta-Learning", section
    2, https://arxiv.org/abs/1806.04910; Lorraine, Vicol, Duvenaud 2020, "Optimizing Millions of Hyperparameters by
    Implicit Differentiation", https://arxiv.org/abs/1911.02590.
    """
    if inner_steps < 1:
        raise ConfigError(f"inner_steps is {inner_steps}; give at least 1.")

    def shaped_loss(key: Key[Array, ""], params: Params, state: State, support: PyTree) -> tuple[Array, State]:
        θ, data = support
        return _scalar("inner", inner_loss(key, params, θ, data)), state

    solve = adjoint(InnerProblem(shaped_loss, inner_optimizer, inner_steps))

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        outer_key, inner_key = jax.random.split(key)
        θ = outer(outer_key, task)
        φ = inner(inner_key, θ, task.support)
        return θ, (φ, inner_optimizer.init(φ)) if persistent else ()

    def adapt(key: Key[Array, ""], params: Params, state: State, support: PyTree) -> Adapted:
        inner_key, solve_key = jax.random.split(key)
        φ, optimiser_state = state if persistent else (inner(inner_key, params, support), None)
        adapted = solve(solve_key, φ, (), (params, support), params, optimiser_state)
        after = (adapted.params, adapted.optimiser_state) if persistent else ()
        return adapted._replace(params=(adapted.params, params), state=after)

    def answer(key: Key[Array, ""], adapted: Adapted, inputs: PyTree) -> PyTree:
        if predict is None:
            raise ModelError("this bilevel problem has no `predict`; give it one: (key, φ, θ, inputs) -> outputs.")
        φ, θ = adapted.params
        return predict(key, φ, θ, inputs)

    def one_task(
        key: Key[Array, ""], params: Params, state: State, task: Task
    ) -> tuple[Float[Array, ""], tuple[State, Info]]:
        adapt_key, query_key = jax.random.split(key)
        adapted = adapt(adapt_key, params, state, task.support)
        φ, θ = adapted.params
        value = _scalar("outer", outer_loss(query_key, φ, θ, task.query))
        return value, (adapted.state, adapted.info)

    return MetaLearner(init, adapt, answer, over_tasks(one_task))


def _scalar(name: str, value: Any) -> Array:
    if jax.numpy.shape(value) != ():
        raise ModelError(
            f"the {name} loss has shape {list(jax.numpy.shape(value))}; it must be a scalar: take the mean."
        )
    return value
