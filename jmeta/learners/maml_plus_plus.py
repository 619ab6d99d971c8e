"""MAML++ (Antoniou et al. 2019)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from jmeta.adjoint import annealed, exact
from jmeta.core import (
    Adapted,
    Info,
    Keys,
    MetaLearner,
    Model,
    Objective,
    Params,
    State,
    Task,
    check_model,
    episodic,
    measured,
    over_tasks,
)
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number
from jmeta.inner import Adjoint, InnerProblem, Loss, answers, check_inner, check_learns_by_steps, rate_for, support_loss
from jmeta.losses import softmax_cross_entropy
from jmeta.models.per_step import of_step
from jmeta.models.per_step import per_step as per_step_of
from jmeta.optimizers import learned
from jmeta.tree import partition


def maml_plus_plus(
    model: Model,
    *,
    inner_rate: Number | None = None,
    inner_steps: int = 5,
    learned_rates: bool = True,
    multi_step_loss: int = 5000,
    first_order_until: int = 0,
    per_step_norm: bool = True,
    norm_name: str = "Norm",
    per_step: int | None = None,
    loss: Loss = softmax_cross_entropy,
    adjoint: Adjoint = exact(),
) -> MetaLearner:
    """MAML++: MAML with six repairs, each of which can be switched off.

    φₖ₊₁ = φₖ − αₖ ∇L(φₖ; support), where αₖ holds a rate for each leaf of θ and each step k (LSLR); the objective is
    the mean over tasks of Σₖ vₖ L(φₖ; query), whose weights move from all steps to the last one (MSL). In the meta-step
    t, vₖ = (1 − t / T) / K for k < K and v_K = 1 − Σ vₖ, until T.

    Args:
        model: the network, with as many outputs as the tasks have ways.
        inner_rate: where every αₖ starts. Default: 0.1 for cross entropy, 0.01 for any other loss.
        inner_steps: K.
        learned_rates: LSLR; else all αₖ stay where they start.
        multi_step_loss: T, meta-steps over which the multi-step loss is annealed to that of the last step; 0 is off.
        first_order_until: meta-steps before second derivatives set in (derivative-order annealing, DA); 0 is off. Both
            orders lie in one compiled program, of which one is computed.
        per_step_norm: a scale and a shift of the normalisation (BNWB), and what statistics it keeps (BNRS), for each
            inner step, trained outside and left alone inside; else they are weights like all others. The per-step
            running statistics of the paper are those of `Conv4(norm="running")`; the default group norm has none.
        norm_name: what the names of the model's normalisation layers have in them.
        per_step: sets of rates and of normalisation parameters, at most K; the last one serves all further steps.
            Default K.
        loss: L, inner and outer.
        adjoint: how to differentiate through the inner loop.

    Returns:
        The learner. Its parameters are `{"model": θ, "rates": α}`, with the sets of each normalisation leaf and of each
        rate on a leading axis. It can be evaluated with more or fewer inner steps than it was trained with: further
        steps take the last set. Cosine annealing outside (CA) is the optimiser's:
        `optax.adam(optax.cosine_decay_schedule(...))`.

    Raises:
        ConfigError: `inner_rate` is not positive, K or a number of meta-steps is negative, or there are more sets than
            inner steps; from `init` and `fit`, K is 0.

    Example:
        >>> import jmeta
        >>> model = jmeta.linen(jmeta.Conv4(outputs=5, pooling="max"))
        >>> learner = jmeta.maml_plus_plus(model, inner_steps=5)

    Reference: Antoniou, Edwards, Storkey 2019, "How to Train Your MAML", section 4, https://arxiv.org/abs/1810.09502.

    Which MAML++: the default here is the paper's algorithm with a normalisation that needs no batch. The paper's text
    has batch norm with running statistics for each step, `Conv4(norm="running", pooling="max")`. The authors' code, and
    so the published numbers, normalise every batch by itself, queries by queries: `Conv4(norm="transductive",
    pooling="max")`.

    Differences from the paper: its results are of an ensemble of five checkpoints; here of one model. From the authors'
    code: it never normalises by the running statistics that it keeps, ignores the configured inner rate, leaves
    derivative-order annealing off, gives the steps before the last a least weight of 0.03 / K, and cannot take more
    steps at test than in training.
    """
    check_model(model)
    α = rate_for(loss, inner_rate, classes=0.1)
    check_inner(α, inner_steps)
    for name, value in (("multi_step_loss", multi_step_loss), ("first_order_until", first_order_until)):
        if value < 0:
            raise ConfigError(f"{name} is {value}; give a number of meta-steps, or 0 to switch it off.")
    sets = inner_steps if per_step is None else per_step
    if not 0 <= sets <= inner_steps:
        raise ConfigError(f"per_step is {sets}, but there are {inner_steps} inner steps; give at most as many sets.")

    def is_per_step(path: str) -> bool:
        return per_step_norm and any(norm_name in part for part in path.split("/"))

    def is_adapted(path: str) -> bool:
        return not is_per_step(path)

    network = per_step_of(model, sets, weights=is_per_step, statistics=lambda path: per_step_norm)
    problem = InnerProblem(support_loss(network, loss), learned(_by_rates), inner_steps, is_adapted)
    adjoint = annealed(adjoint, first_order_until)

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        check_learns_by_steps(inner_steps)
        θ, state = network.init(key, task.support.inputs)
        rates = jax.tree.map(lambda x: jnp.full((sets,), α, x.dtype), partition(is_adapted, θ)[0])
        return {"model": θ, "rates": rates}, {"meta_step": jnp.zeros((), jnp.int32), "model": state["model"]}

    def solve(problem: InnerProblem, key: Key[Array, ""], params: Params, state: State, support: PyTree) -> Adapted:
        rates = params["rates"] if learned_rates else lax.stop_gradient(params["rates"])
        return adjoint(problem)(key, params["model"], _after(jnp.zeros((), jnp.int32), state), support, rates)

    last_step = episodic(init, partial(solve, problem), answers(network), loss)
    path = partial(solve, problem._replace(trajectory=True))
    every_step = over_tasks(multi_step(path, last_step.predict, loss, partial(_weights, inner_steps, multi_step_loss)))
    whole = every_step if multi_step_loss else last_step.objective

    def objective(key: Keys, params: Params, state: State, tasks: Task) -> tuple[Float[Array, ""], tuple[State, Info]]:
        value, (new, info) = whole(key, params, state, tasks)
        return value, ({"meta_step": state["meta_step"] + 1, "model": new["model"]}, info)

    return last_step._replace(objective=objective)


def multi_step(
    adapt: Callable[[Key[Array, ""], Params, State, PyTree], Adapted],
    predict: Callable[[Key[Array, ""], Adapted, PyTree], PyTree],
    loss: Loss,
    weights: Callable[[State], Float[Array, "steps"]],
) -> Objective:
    """The objective of one task Σₖ vₖ L(φₖ; query), over all inner steps.

    Args:
        adapt: an inner loop that keeps its path, `InnerProblem(trajectory=True)`.
        predict: the learner's; `adapted.state["step"]` is the number of inner steps done.
        loss: L.
        weights: `state -> v`, of the learner's state before the meta-step.

    Returns:
        `(key, params, state, task) -> (scalar, (state, info))`, for `jmeta.over_tasks`.

    Reference: Antoniou, Edwards, Storkey 2019, "How to Train Your MAML", section 4 (MSL).
    """

    def one_task(
        key: Key[Array, ""], params: Params, state: State, task: Task
    ) -> tuple[Float[Array, ""], tuple[State, Info]]:
        adapt_key, predict_key = jax.random.split(key)
        path = adapt(adapt_key, params, state, task.support)
        v = weights(state)

        def query_loss(step: tuple[Params, Int[Array, ""], Float[Array, ""]]) -> Float[Array, ""]:
            φ, k, weight = step

            def weighted() -> Float[Array, ""]:
                adapted = path._replace(params=φ, state=_after(k + 1, path.state))
                value = measured(loss, predict(predict_key, adapted, task.query.inputs), task.query)
                return weight.astype(value.dtype) * value

            # Once annealed, the queries are looked at after the last step alone.
            return lax.cond(weight > 0, weighted, lambda: jnp.zeros_like(jax.eval_shape(weighted)))

        losses = lax.map(query_loss, (path.params, jnp.arange(len(v)), v))
        return losses.sum(), (path.state, path.info)

    return one_task


def _weights(steps: int, until: int, state: State) -> Float[Array, "steps"]:
    """v, from all steps alike to the last one alone."""
    t = jnp.minimum(jnp.asarray(state["meta_step"], float) / until, 1.0)
    v = jnp.full((steps,), (1.0 - t) / steps)
    return v.at[-1].set(1.0 - v[:-1].sum())


def _by_rates(gradient: PyTree, rates: PyTree, step: Int[Array, ""]) -> PyTree:
    # SGD as optax writes it, so that without learned rates this is MAML to the last bit.
    return jax.tree.map(lambda rates, g: -of_step(rates, step) * g, rates, gradient)


def _after(step: Int[Array, ""], state: State) -> State:
    """The state after so many inner steps."""
    return {**state, "step": step}
