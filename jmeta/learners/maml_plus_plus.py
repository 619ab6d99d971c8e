"""MAML++ (Antoniou et al. 2019)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from jmeta.adjoint import exact, first_order
from jmeta.core import (
    Adapted,
    Info,
    Keys,
    MetaLearner,
    Model,
    Params,
    State,
    Task,
    check_model,
    episodic,
    measured,
    over_tasks,
)
from jmeta.errors import ConfigError
from jmeta.inner import Adjoint, InnerProblem, Loss, check_inner, initialiser, rate_for, support_loss
from jmeta.losses import softmax_cross_entropy
from jmeta.tree import partition, path_name


def maml_plus_plus(
    model: Model,
    *,
    inner_rate: float | None = None,
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
        ConfigError: `inner_rate` is not positive, K is below 1, a number of meta-steps is negative, or there are more
            sets than inner steps.

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
    init_model, inner_loss = initialiser(model, inner_steps), support_loss(model, loss)

    def is_per_step(path: str) -> bool:
        return per_step_norm and any(norm_name in part for part in path.split("/"))

    def is_adapted(path: str) -> bool:
        return not is_per_step(path)

    def repeat(x: Array) -> Array:
        return jnp.broadcast_to(x[None], (sets, *x.shape))

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        θ, statistics = init_model(key, task)
        θ = _where(is_per_step, repeat, θ)
        statistics = jax.tree.map(repeat, statistics) if per_step_norm else statistics
        rates = jax.tree.map(lambda x: jnp.full((sets,), α, x.dtype), partition(is_adapted, θ)[0])
        return {"model": θ, "rates": rates}, {"meta_step": jnp.zeros((), jnp.int32), "model": statistics}

    def at(step: Int[Array, ""], params: Params, statistics: State) -> tuple[Params, State]:
        """The parameters and statistics of one inner step."""
        params = _where(is_per_step, lambda x: _set(x, step), params)
        return params, jax.tree.map(lambda x: _set(x, step), statistics) if per_step_norm else statistics

    def loss_of_step(key: Key[Array, ""], params: Params, state: State, support: PyTree) -> tuple[Array, State]:
        step, statistics = state
        value, new = inner_loss(key, *at(step, params, statistics), support)
        if per_step_norm:
            new = jax.tree.map(lambda all, x: all.at[jnp.minimum(step, len(all) - 1)].set(x), statistics, new)
        return value, (step + 1, new)

    def update(
        gradient: PyTree, step: Int[Array, ""], φ: PyTree = None, *, hyper: PyTree, **extra: Any
    ) -> tuple[PyTree, Int[Array, ""]]:
        # SGD as optax writes it, so that without learned rates this is MAML to the last bit.
        return jax.tree.map(lambda rates, g: -_set(rates, step) * g, hyper, gradient), step + 1

    optimiser = optax.GradientTransformationExtraArgs(lambda φ: jnp.zeros((), jnp.int32), update)
    problem = InnerProblem(loss_of_step, optimiser, inner_steps, is_adapted)

    def solve(key: Key[Array, ""], params: Params, state: State, support: PyTree, trajectory: bool) -> Adapted:
        rates = params["rates"] if learned_rates else lax.stop_gradient(params["rates"])
        start = (jnp.zeros((), jnp.int32), state["model"])

        def through(how: Adjoint) -> Callable[[], Adapted]:
            descent = how(problem._replace(trajectory=trajectory))
            return lambda: descent(key, params["model"], start, support, rates)

        if first_order_until == 0:
            return through(adjoint)()
        return lax.cond(state["meta_step"] < first_order_until, through(first_order()), through(adjoint))

    def answer(key: Key[Array, ""], adapted: Adapted, step: Int[Array, ""], inputs: PyTree) -> PyTree:
        """The outputs after an inner step, with its set of the normalisation."""
        return model.apply(key, *at(step, adapted.params, adapted.state["model"]), inputs, train=False)[0]

    def finished(adapted: Adapted, state: State) -> Adapted:
        return adapted._replace(state={"meta_step": state["meta_step"], "model": adapted.state[1]})

    def adapt(key: Key[Array, ""], params: Params, state: State, support: PyTree) -> Adapted:
        return finished(solve(key, params, state, support, trajectory=False), state)

    def predict(key: Key[Array, ""], adapted: Adapted, inputs: PyTree) -> PyTree:
        return answer(key, adapted, jnp.asarray(max(inner_steps - 1, 0)), inputs)

    last_step = episodic(init, adapt, predict, loss)

    def every_step(
        key: Key[Array, ""], params: Params, state: State, task: Task
    ) -> tuple[Float[Array, ""], tuple[State, Info]]:
        adapt_key, predict_key = jax.random.split(key)
        path = finished(solve(adapt_key, params, state, task.support, trajectory=True), state)

        t = jnp.minimum(jnp.asarray(state["meta_step"], float) / multi_step_loss, 1.0)
        v = jnp.full((inner_steps,), (1.0 - t) / inner_steps)
        v = v.at[-1].set(1.0 - v[:-1].sum())

        def query_loss(step: tuple[Params, Int[Array, ""], Float[Array, ""]]) -> Float[Array, ""]:
            φ, k, weight = step

            def weighted() -> Float[Array, ""]:
                outputs = answer(predict_key, path._replace(params=φ), k, task.query.inputs)
                value = measured(loss, outputs, task.query)
                return weight.astype(value.dtype) * value

            # Once annealed, the queries are looked at after the last step alone.
            return lax.cond(weight > 0, weighted, lambda: jnp.zeros_like(jax.eval_shape(weighted)))

        losses = lax.map(query_loss, (path.params, jnp.arange(inner_steps), v))
        return losses.sum(), (path.state, path.info)

    one_program = last_step.objective if multi_step_loss == 0 else over_tasks(every_step)

    def objective(key: Keys, params: Params, state: State, tasks: Task) -> tuple[Float[Array, ""], tuple[State, Info]]:
        value, (new, info) = one_program(key, params, state, tasks)
        return value, ({**new, "meta_step": state["meta_step"] + 1}, info)

    return last_step._replace(objective=objective)


def _where(select: Callable[[str], bool], change: Callable[[Array], Array], tree: PyTree) -> PyTree:
    return jax.tree.map_with_path(lambda path, leaf: change(leaf) if select(path_name(path)) else leaf, tree)


def _set(sets: Array, step: Int[Array, ""]) -> Array:
    """That of an inner step; the last one serves all further steps."""
    return sets[jnp.minimum(step, len(sets) - 1)]
