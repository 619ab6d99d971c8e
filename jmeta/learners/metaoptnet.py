"""MetaOptNet: a support vector machine as the base learner (Lee et al. 2019)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from jmeta.core import Adapted, Examples, MetaLearner, Model, Params, State, Task
from jmeta.embedding import embedded
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, violated
from jmeta.learners.r2d2 import ridge
from jmeta.losses import softmax_cross_entropy
from jmeta.masks import only, shots


def metaoptnet(
    model: Model, *, head: str = "svm", margin_cost: Number = 0.1, penalty: Number = 50.0, solver_steps: int = 50
) -> MetaLearner:
    """MetaOptNet: a convex head solved on the support, differentiated through its solution.

    W is that of the multi-class support vector machine of Crammer and Singer on X = f_θ(support), or of ridge
    regression; outputs are γ f_θ(x) W with a learned γ.

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width.
        head: `"svm"` or `"ridge"`.
        margin_cost: C of the support vector machine.
        penalty: λ of the ridge regression.
        solver_steps: steps of the solver of the support vector machine.

    Returns:
        The learner, for any number of ways. `Adapted.params` is `(θ, W [features, ways], present [ways])`,
        `Adapted.info["dual_residual"]` how far the last step of the solver moved the dual, relative to C.

    Raises:
        ConfigError: an unknown head, or an option that is not positive.
        ModelError: `model` is no `Model`.

    Example:
        >>> import jmeta
        >>> learner = jmeta.metaoptnet(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))

    Reference: Lee, Maji, Ravichandran, Soatto 2019, "Meta-Learning with Differentiable Convex Optimization",
    sections 3.2 and 3.3, https://arxiv.org/abs/1904.03758; Crammer, Singer 2001, "On the Algorithmic
    Implementation of Multiclass Kernel-based Vector Machines", equation 12.

    Differences from the paper: the dual is solved by accelerated projected gradients, a fixed number, whose steps are
    differentiated, where the paper uses an interior-point solver and the implicit function theorem. Differences from
    the authors' code: none known in the problem, it too adds the identity to the kernel; its γ starts at 1 as here.
    """
    if head not in ("svm", "ridge"):
        raise ConfigError(f"head is {head!r}; give 'svm' or 'ridge'.")
    for name, value in (("margin_cost", margin_cost), ("penalty", penalty), ("solver_steps", solver_steps)):
        if violated(value > 0):
            raise ConfigError(f"{name} is {value}; give a positive number.")

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        params, state = model.init(key, task.support.inputs)
        return {"model": params, "scale": jnp.ones(())}, {"model": state}

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        x = support.inputs
        if head == "ridge":
            w, residual = ridge(x, support.targets, jnp.asarray(penalty, x.dtype)), jnp.zeros((), x.dtype)
        else:
            dual, residual = support_vectors(x, support.targets, margin_cost, solver_steps)
            w = x.T @ dual
        return Adapted((params, w, shots(support.targets) > 0), state, {"dual_residual": residual})

    def predict(key: Key[Array, ""], adapted: Adapted, x: Float[Array, "queries features"]) -> Array:
        params, w, present = adapted.params
        return only(present, params["scale"] * (x @ w))

    return embedded(model, init, adapt, predict, softmax_cross_entropy)


def support_vectors(
    x: Float[Array, "n features"], y: Float[Array, "n ways"], margin_cost: Number, steps: int
) -> tuple[Float[Array, "n ways"], Float[Array, ""]]:
    """The dual α of the multi-class support vector machine: argmin ½ tr αᵀ (X Xᵀ + I) α − Σ αᵢ,yᵢ.

    subject to αᵢₖ ≤ C 1[k = yᵢ] and Σₖ αᵢₖ = 0. With α = C (Y − β) the constraints say that every βᵢ is a distribution
    over the classes, so that Nesterov's accelerated gradient with a projection on the simplex solves it. Steps are
    1 / L with L the largest sum of a row of the kernel, a bound of its largest eigenvalue, and momentum for a strongly
    convex objective, as the identity makes it.

    Args:
        x: `[n, features]`, X.
        y: `[n, ways]` one-hot, Y; an example whose row is zeros has α = 0.
        margin_cost: C.
        steps: number of steps.

    Returns:
        α `[n, ways]`, and the largest move of β in the last step.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.learners.metaoptnet import support_vectors
        >>> support_vectors(jnp.eye(2), jnp.eye(2), 10.0, 50)[0].round(3).tolist()
        [[0.25, -0.25], [-0.25, 0.25]]
    """
    labelled = y.any(axis=1)[:, None].astype(x.dtype)
    kernel = (x * labelled) @ (x * labelled).T + jnp.eye(len(x), dtype=x.dtype)
    bound = lax.stop_gradient(jnp.abs(kernel).sum(axis=1).max())
    momentum = (jnp.sqrt(bound) - 1.0) / (jnp.sqrt(bound) + 1.0)
    there, count = y.any(axis=0)[None], jnp.arange(1, y.shape[1] + 1, dtype=x.dtype)[None]

    def project(v: Array) -> Array:
        """Each row to the nearest distribution: max(v − θ, 0) with θ = maxⱼ (Σ of the j largest − 1) / j."""
        v = jnp.where(there, v, v.max(axis=1, keepdims=True) - 2.0)  # more than 1 below the largest becomes 0
        largest = jnp.sort(v, axis=1, descending=True)
        return jnp.maximum(v - ((jnp.cumsum(largest, axis=1) - 1.0) / count).max(axis=1, keepdims=True), 0.0)

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        β, ahead = carry
        gradient = y / margin_cost - kernel @ (labelled * (y - ahead))  # of the dual over C²
        new = project(ahead - gradient / bound)
        return (new, new + momentum * (new - β)), None

    start = project(jnp.zeros_like(y))
    (β, _), _ = lax.scan(step, (start, start), length=steps - 1)
    (last, _), _ = step((β, β), None)
    return margin_cost * labelled * (y - last), jnp.abs(last - β).max()
