"""The inner problem: what a learner minimises on the support of one task."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from jmeta.core import Adapted, Model, Params, State, Task, has_statistics, measured, outputs_of
from jmeta.errors import ConfigError, ModelError
from jmeta.hyperparameters import Number, violated
from jmeta.losses import softmax_cross_entropy
from jmeta.tree import combine, everything, partition, path_name

Loss = Callable[[PyTree, PyTree], Float[Array, ""]]


@runtime_checkable
class InnerLoss(Protocol):
    """The loss of the inner loop."""

    def __call__(
        self, key: Key[Array, ""], params: Params, state: State, support: PyTree
    ) -> tuple[Float[Array, ""], State]: ...


class InnerProblem(NamedTuple):
    """The inner loop φ₀ = θ, φₖ₊₁ = φₖ + update(∇L(φₖ) + λ (φₖ − θ)), apart from how to differentiate through it.

    Args:
        loss: `(key, params, state, support) -> (scalar, state)`, L.
        optimiser: any optax transformation; `optax.sgd(α)` gives φₖ₊₁ = φₖ − α ∇L(φₖ). One that is meta-learned takes
            its own parameters (a rate for each weight) as the extra argument `hyper` of its update.
        num_steps: K, the number of inner steps.
        adaptable: a predicate on the path of a leaf of θ (`"head/kernel"`): which leaves the inner loop changes.
        proximal: λ, the weight of ½ ‖φ − θ‖² in the inner loss.
        trajectory: whether `Adapted.params` is φ₁, ..., φ_K, with an axis of inner steps before all others, instead of
            φ_K alone.
    """

    loss: InnerLoss
    optimiser: optax.GradientTransformation
    num_steps: int
    adaptable: Callable[[str], bool] = everything
    proximal: Number = 0.0
    trajectory: bool = False


@runtime_checkable
class Solve(Protocol):
    """The inner loop of one task.

    `hyper` are the meta-learned parameters of the inner optimiser, if it has any; `optimiser_state` is where it goes
    on, by default its start.
    """

    def __call__(
        self,
        key: Key[Array, ""],
        params: Params,
        state: State,
        support: PyTree,
        hyper: PyTree = (),
        optimiser_state: PyTree = None,
    ) -> Adapted: ...


Adjoint = Callable[[InnerProblem], Solve]


def with_statistics(problem: InnerProblem, solve: Solve) -> Solve:
    """A solver whose statistics of the support, the entries `"task_stats"` of the state, are those at φ.

    φ answers the queries, so what normalises them must be what φ makes of the support, and not what the parameters
    before the last inner step made of it: one more pass, through which the meta-gradient goes.
    """

    def is_statistic(path: str) -> bool:
        return "task_stats" in path.split("/")

    def solve_and_look_again(
        key: Key[Array, ""],
        params: Params,
        state: State,
        support: PyTree,
        hyper: PyTree = (),
        optimiser_state: PyTree = None,
    ) -> Adapted:
        _tell_slow_convolutions(problem, key, params, state, support)
        adapted = solve(key, params, state, support, hyper, optimiser_state)
        if not has_statistics(adapted.state, "task_stats"):
            return adapted
        φ = jax.tree.map(lambda x: x[-1], adapted.params) if problem.trajectory else adapted.params
        statistics, _ = partition(is_statistic, problem.loss(key, φ, adapted.state, support)[1])
        return adapted._replace(state=combine(statistics, adapted.state))

    return solve_and_look_again


def _tell_slow_convolutions(
    problem: InnerProblem, key: Key[Array, ""], params: Params, state: State, support: PyTree
) -> None:
    """Warns of convolutions with kernels of each task that JAX makes into grouped ones, which XLA runs slowly."""
    leaves = jax.tree.leaves_with_path(params)
    kernels = {tuple(sorted(x.shape)) for path, x in leaves if x.ndim >= 3 and problem.adaptable(path_name(path))}
    if not kernels:
        return
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (key, params, state, support))
    flat, tree = jax.tree.flatten(arguments)
    loss: Any = problem.loss
    if _has_slow_convolution(loss, tree, tuple(flat), frozenset(kernels)):
        warnings.warn(
            "the inner loop adapts convolutions that are many times slower with kernels of each task than jmeta.Conv; "
            "take jmeta.Conv, or nn.Conv or nnx.Conv of Flax, which become it.",
            stacklevel=2,
        )


@lru_cache(maxsize=256)
def _has_slow_convolution(
    loss: InnerLoss, tree: Any, flat: tuple[Any, ...], kernels: frozenset[tuple[int, ...]]
) -> bool:
    try:
        jaxpr = jax.make_jaxpr(loss)(*jax.tree.unflatten(tree, flat))
    except Exception:  # a loss that cannot be traced says so where it is used
        return False
    return any(
        equation.primitive is jax.lax.conv_general_dilated_p and tuple(sorted(equation.invars[1].aval.shape)) in kernels
        for equation in _equations(jaxpr.jaxpr)
    )


def _equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                yield from _equations(inside)


def descend(
    optimiser: optax.GradientTransformation, gradient: PyTree, optimiser_state: PyTree, params: PyTree, **extra: Any
) -> tuple[PyTree, PyTree]:
    """One step of an optax optimiser, inner or outer: `(new params, new optimiser state)`."""
    # optax itself mixes dtypes, which users who switch on strict promotion would have to pay for.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        update = optax.with_extra_args_support(optimiser).update
        updates, optimiser_state = update(gradient, optimiser_state, params, **extra)
        return optax.apply_updates(params, updates), optimiser_state


def checked_when_differentiated(optimiser: optax.GradientTransformation, gradient: PyTree, params: PyTree) -> PyTree:
    """The gradient, as it is; where a derivative goes through it, the optimiser's own is looked at, once, when traced.

    Raises:
        ConfigError: the update has no derivative where an entry of the gradient is 0, as that of Adam has none in √v.
    """

    @jax.custom_jvp
    def watched(gradient: PyTree) -> PyTree:
        return gradient

    @watched.defjvp
    def derivative(primals: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[PyTree, PyTree]:
        shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(params))
        fine = True
        # an update that needs more than a gradient is somebody's own, and of a traced rate nothing is known
        with contextlib.suppress(Exception):
            fine = _has_derivative_at_zero(optimiser, jax.tree.structure(params), shapes)
        if not fine:
            raise ConfigError(
                "the inner optimiser has no derivative where an entry of the gradient is 0 (an unused weight, a dead "
                "unit), so that the meta-gradient would be NaN; give it an eps_root, as functools.partial(optax.adam, "
                "eps_root=1e-8), or the learner adjoint=jmeta.first_order()."
            )
        return primals[0], tangents[0]

    return watched(gradient)


@lru_cache(maxsize=256)
def _has_derivative_at_zero(
    optimiser: optax.GradientTransformation, tree: Any, shapes: tuple[tuple[tuple[int, ...], Any], ...]
) -> bool:
    """Whether one update has a finite derivative in a gradient of which every second entry is 0.

    Not all are: what divides by the norm of all (clipping) needs none where that is 0, at a minimum.
    """
    # apart from the devices on which this is traced, where no array may be made
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())), jax.ensure_compile_time_eval():
        single = all(math.prod(shape) == 1 for shape, _ in shapes)
        gradient, params = [], []
        for i, (shape, dtype) in enumerate(shapes):
            small = tuple(min(size, 2) for size in shape)  # what an update does to an entry, two show as well as all
            n = math.prod(small)
            entries = np.full(n, i % 2) if single else np.arange(1, n + 1) % 2 if n == 1 else np.arange(n) % 2
            gradient.append(jnp.asarray(entries.reshape(small), dtype))
            params.append(jnp.ones(small, dtype))
        if not any(bool(g.any()) for g in gradient):
            return True
        start, along = jax.tree.unflatten(tree, params), jax.tree.unflatten(tree, params)

        def update(gradient: PyTree) -> PyTree:
            return descend(optimiser, gradient, optimiser.init(start), start)[0]

        try:
            slope = jax.jit(lambda g: jax.jvp(update, (g,), (along,))[1])(jax.tree.unflatten(tree, gradient))
        except FloatingPointError:  # of jax_debug_nans
            return False
        return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(slope))


def support_loss(model: Model, loss: Loss) -> InnerLoss:
    """The inner loss of supervised learning: `loss` of the model's outputs on the support.

    Args:
        model: the network.
        loss: `(outputs, targets) -> scalar`.

    Returns:
        `(key, params, state, support) -> (scalar, state)`.

    Raises:
        ModelError: when called, the loss is not a scalar.

    Example:
        >>> import jmeta, optax
        >>> model = jmeta.linen(jmeta.MLP(outputs=1))
        >>> problem = jmeta.InnerProblem(jmeta.support_loss(model, jmeta.mean_squared_error), optax.sgd(0.01), 5)
    """

    def inner_loss(key: Key[Array, ""], params: Params, state: State, support: PyTree) -> tuple[Array, State]:
        outputs, state = outputs_of(model, key, params, state, support, train=True)
        value = measured(loss, outputs, support)
        if jnp.shape(value) != ():
            raise ModelError(f"the inner loss has shape {list(jnp.shape(value))}; it must be a scalar: take the mean.")
        return value, state

    return inner_loss


def initialiser(model: Model) -> Callable[[Key[Array, ""], Task], tuple[Params, State]]:
    """The `init` of a learner whose parameters are the model's own: θ as the model draws it."""

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        return model.init(key, task.support.inputs)

    return init


def answers(model: Model) -> Callable[[Key[Array, ""], Adapted, PyTree], PyTree]:
    """The `predict` of a learner whose `Adapted.params` are the model's own: the model's outputs at φ."""

    def predict(key: Key[Array, ""], adapted: Adapted, inputs: PyTree) -> PyTree:
        return model.apply(key, adapted.params, adapted.state, inputs, train=False)[0]

    return predict


def rate_for(loss: Loss, given: Number | None, *, classes: float, regression: float = 0.01) -> Number:
    """α: the given one, else that which suits the kind of loss.

    A squared error grows without bound with its outputs, so that a rate of classification makes it explode.

    Args:
        loss: L.
        given: α, or None.
        classes: α for `jmeta.softmax_cross_entropy`.
        regression: α for every other loss.

    Returns:
        α.

    Example:
        >>> import jmeta
        >>> from jmeta.inner import rate_for
        >>> rate_for(jmeta.mean_squared_error, None, classes=0.4), rate_for(jmeta.mean_squared_error, 0.1, classes=0.4)
        (0.01, 0.1)
    """
    if given is not None:
        return given
    return classes if loss is softmax_cross_entropy else regression


def check_inner(inner_rate: Number, inner_steps: int, inner_optimizer: object = optax.sgd) -> None:
    """Raises `ConfigError` unless α is positive, inner steps are not negative, and the optimiser takes its rate."""
    if not callable(inner_optimizer):
        raise ConfigError(
            "inner_optimizer is an optimiser that has its rate; give a function of the rate, as "
            "functools.partial(optax.adam, eps_root=1e-8), and the rate as inner_rate."
        )
    if violated(inner_rate > 0):
        raise ConfigError(f"inner_rate is {inner_rate}; give a positive rate.")
    if inner_steps < 0:
        raise ConfigError(f"inner_steps is {inner_steps}; give 0 or more.")


def check_learns_by_steps(inner_steps: int) -> None:
    """Raises `ConfigError` where there are none; of a learner whose objective says nothing without them."""
    if inner_steps < 1:
        raise ConfigError(f"inner_steps is {inner_steps}; give at least 1.")
