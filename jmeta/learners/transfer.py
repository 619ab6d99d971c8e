"""Transfer learning: the simpler rival that meta-learning must beat (Chen et al. 2019, Tian et al. 2020)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from jmeta.adjoint import first_order
from jmeta.core import (
    Adapted,
    Examples,
    Info,
    MetaLearner,
    Model,
    Params,
    State,
    Task,
    check_examples,
    check_model,
    measured,
    outputs_of,
    over_tasks,
)
from jmeta.distances import cosine, unit
from jmeta.embedding import at_test
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, violated
from jmeta.inner import InnerProblem, Loss, answers, check_inner, descend, rate_for, support_loss
from jmeta.losses import softmax_cross_entropy
from jmeta.tree import everything, under

Head = Mapping[str, Array]
Logits = Callable[[Float[Array, "n features"], Head], Float[Array, "n ways"]]


def transfer(
    model: Model,
    *,
    inner_rate: Number | None = None,
    inner_steps: int = 20,
    body: bool = True,
    new_head: bool = True,
    loss: Loss = softmax_cross_entropy,
    inner_optimizer: Callable[[Number], optax.GradientTransformation] = optax.sgd,
) -> MetaLearner:
    """Transfer learning: pre-train one classifier of all training classes, then fine-tune it on each new task.

    Pre-training minimises L(W f_θ(x), y) over all classes at once. A task gets a new head W = 0, and then K steps of
    gradient descent on its support, in head and body.

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width; `jmeta.Conv4(outputs=None)`.
        inner_rate: α, of fine-tuning. Default: 0.05 for cross entropy, 0.01 for any other loss.
        inner_steps: K.
        body: whether the body is fine-tuned as well as the head; without, this is the Baseline of Chen et al.
        new_head: whether a task gets a new head; a regression rather goes on with that of pre-training.
        loss: L, in pre-training and on the support.
        inner_optimizer: any optax optimiser of a rate.

    Returns:
        The learner. Train it on a source with `batch=...`, whose queries are examples of all training classes, and
        evaluate it on episodes. Its parameters are `{"body": θ, "head": W}`.

    Raises:
        ConfigError: α is not positive or K is negative; from `init` and `fit`, episodes in place of batches.

    Example:
        >>> import jax, jmeta
        >>> learner = jmeta.transfer(jmeta.linen(jmeta.Conv4(outputs=None, norm="running")))
        >>> fitted = jmeta.fit(jax.random.key(0), learner, jmeta.glyphs(batch=64), steps=2, tasks=1)

    Reference: Chen, Liu, Kira, Wang, Huang 2019, "A Closer Look at Few-shot Classification", section 3.2,
    https://arxiv.org/abs/1904.04232.

    Differences from the paper: fine-tuning takes full batches of the support; the paper takes mini-batches of 4, 100
    times. Batch norm keeps the averages of pre-training, for support and queries.
    """
    α = rate_for(loss, inner_rate, classes=0.05)
    check_inner(α, inner_steps, inner_optimizer)
    adaptable = everything if body else under("head")
    return _fine_tuned(
        model,
        linear,
        lambda key, head, ways: jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], ways), x.dtype), head),
        InnerProblem(support_loss(with_head(at_test(model), linear), loss), inner_optimizer(α), inner_steps, adaptable),
        loss,
        new_head,
    )


def baseline_plus_plus(
    model: Model,
    *,
    inner_rate: Number = 1.0,
    inner_steps: int = 50,
    scale: Number = 10.0,
    inner_optimizer: Callable[[Number], optax.GradientTransformation] = optax.sgd,
) -> MetaLearner:
    """Baseline++: transfer learning whose head compares directions, in pre-training and on a new task.

    The logit of class k is s cos(wₖ, f_θ(x)). On a task the body stays as it is and new wₖ are learned.

    Args:
        model: the embedding f_θ, as for `transfer`.
        inner_rate: α, of fine-tuning.
        inner_steps: K.
        scale: s.
        inner_optimizer: any optax optimiser of a rate.

    Returns:
        The learner, trained and evaluated as `transfer`.

    Raises:
        ConfigError: α is not positive or K is negative.

    Example:
        >>> import jmeta
        >>> learner = jmeta.baseline_plus_plus(jmeta.linen(jmeta.Conv4(outputs=None, norm="running")))

    Reference: Chen, Liu, Kira, Wang, Huang 2019, "A Closer Look at Few-shot Classification", section 3.3,
    https://arxiv.org/abs/1904.04232.

    Differences from the paper: full batches of the support. From the authors' code: it has s = 2 for few training
    classes and learns a norm for each wₖ (weight normalisation).
    """
    check_inner(inner_rate, inner_steps, inner_optimizer)

    def logits(z: Float[Array, "n features"], head: Head) -> Float[Array, "n ways"]:
        return scale * (1.0 - cosine(z, head["kernel"].T))

    def draw(key: Key[Array, ""], head: Head, ways: int) -> Head:
        kernel = head["kernel"]
        return {"kernel": jax.random.normal(key, (len(kernel), ways), kernel.dtype)}

    loss = support_loss(with_head(at_test(model), logits), softmax_cross_entropy)
    problem = InnerProblem(loss, inner_optimizer(inner_rate), inner_steps, under("head"))
    return _fine_tuned(model, logits, draw, problem, softmax_cross_entropy, new_head=True)


def linear_probe(
    model: Model,
    *,
    penalty: Number = 1e-2,
    maxiter: int = 30,
    teacher: tuple[Params, State] | None = None,
    distillation: Number = 0.5,
    temperature: Number = 4.0,
) -> MetaLearner:
    """Linear probe: transfer learning with logistic regression on frozen embeddings, solved by L-BFGS.

    With z = f_θ(x) / ‖f_θ(x)‖ of the pre-trained body: min over W, b of L(W z + b, y) + ½ λ ‖W‖² on the support.

    With a teacher, which is the classifier that an earlier pre-training left, pre-training minimises

        (1 − γ) L(s, y) + γ T² KL(softmax(t / T) ‖ softmax(s / T))

    for its logits t and those s of the new classifier: self-distillation, of one generation or more in turn.

    Args:
        model: the embedding f_θ, as for `transfer`.
        penalty: λ.
        maxiter: steps of L-BFGS.
        teacher: parameters and state of this learner after an earlier pre-training on the same classes,
            `(fitted.params, fitted.state)`.
        distillation: γ.
        temperature: T.

    Returns:
        The learner, trained and evaluated as `transfer`.

    Raises:
        ConfigError: λ or T is not positive, γ not from 0 to 1, or `maxiter` below 1.

    Example:
        >>> import jax, jmeta
        >>> model, batches = jmeta.linen(jmeta.Conv4(outputs=None, features=8)), jmeta.glyphs(batch=64)
        >>> first = jmeta.fit(jax.random.key(0), jmeta.linear_probe(model), batches, steps=2, tasks=1)
        >>> learner = jmeta.linear_probe(model, teacher=(first.params, first.state))
        >>> second = jmeta.fit(jax.random.key(1), learner, batches, steps=2, tasks=1)

    Reference: Tian, Wang, Krishnan, Tenenbaum, Isola 2020, "Rethinking Few-Shot Image Classification: a Good Embedding
    Is All You Need?", section 3, https://arxiv.org/abs/2003.11539.

    Differences from the paper: it augments the support of one shot five times, which is left to the source of tasks
    here.
    """
    if violated(penalty > 0):
        raise ConfigError(
            f"penalty is {penalty}; give a positive one, without which separable classes have no minimum."
        )
    if maxiter < 1:
        raise ConfigError(f"maxiter is {maxiter}; give at least 1.")
    if violated(distillation >= 0) or violated(distillation <= 1):
        raise ConfigError(f"distillation is {distillation}; give a share from 0 to 1.")
    if violated(temperature > 0):
        raise ConfigError(f"temperature is {temperature}; give a positive number.")

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        check_examples("support", support)
        z, state = outputs_of(at_test(model), key, params["body"], state, support, train=True)
        head, value = logistic_regression(unit(z), support.targets, penalty=penalty, maxiter=maxiter)
        return Adapted({"body": params["body"], "head": head}, state, {"inner_loss": value})

    def pretraining(key: Key[Array, ""], outputs: Float[Array, "n ways"], query: Examples) -> Float[Array, ""]:
        loss = measured(softmax_cross_entropy, outputs, query)
        if teacher is None:
            return loss
        told, _ = outputs_of(with_head(model, linear), key, *teacher, query, train=False)
        soft = query._replace(targets=jax.nn.softmax(told / temperature))
        cross, entropy = (measured(softmax_cross_entropy, a / temperature, soft) for a in (outputs, told))
        return (1 - distillation) * loss + distillation * temperature**2 * (cross - entropy)

    learner = _pretrained(model, linear, pretraining)
    probe = with_head(model, lambda z, head: linear(unit(z), head))
    return learner._replace(adapt=adapt, predict=answers(probe))


def logistic_regression(
    z: Float[Array, "n features"], targets: Float[Array, "n ways"], *, penalty: Number, maxiter: int
) -> tuple[Head, Float[Array, ""]]:
    """The head that minimises the mean cross-entropy + ½ λ ‖W‖², by `maxiter` steps of L-BFGS from 0.

    Args:
        z: `[n, features]`.
        targets: `[n, ways]` one-hot.
        penalty: λ.
        maxiter: number of steps.

    Returns:
        `{"kernel": W [features, ways], "bias": b [ways]}` and the objective before the last step.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.learners.transfer import logistic_regression
        >>> head, value = logistic_regression(jnp.eye(2), jnp.eye(2), penalty=0.1, maxiter=10)
        >>> head["kernel"].shape
        (2, 2)
    """
    solver = optax.lbfgs()

    def objective(head: Head) -> Float[Array, ""]:
        return softmax_cross_entropy(linear(z, head), targets) + 0.5 * penalty * jnp.square(head["kernel"]).sum()

    def step(carry: Any, _: None) -> Any:
        head, state = carry
        value, gradient = jax.value_and_grad(objective)(head)
        extra = {"value": value, "grad": gradient, "value_fn": objective}
        return descend(solver, gradient, state, head, **extra), value

    ways = targets.shape[-1]
    head = {"kernel": jnp.zeros((z.shape[-1], ways), z.dtype), "bias": jnp.zeros((ways,), z.dtype)}
    (head, _), values = jax.lax.scan(step, (head, solver.init(head)), length=maxiter)
    return head, values[-1]


def linear(z: Float[Array, "n features"], head: Head) -> Float[Array, "n ways"]:
    """The logits of a linear head."""
    return z @ head["kernel"] + head["bias"][None]


def with_head(model: Model, logits: Logits) -> Model:
    """An embedding with a head as one model of `{"body": θ, "head": ...}`; its `init` remains that of the embedding."""

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool, **mask: Any
    ) -> tuple[Float[Array, "n ways"], State]:
        z, state = model.apply(key, params["body"], state, inputs, train=train, **mask)
        return logits(z, params["head"]), state

    return model._replace(apply=apply)


def check_batches(task: Task) -> None:
    """Raises `ConfigError` where a task is an episode, whose classes are others each time, and no batch of all."""
    if jax.tree.leaves(task.support):
        raise ConfigError(
            "this learner pre-trains on batches of all classes at once, and these are episodes, whose first class is "
            "another one each time; make its training source with batch=64, and evaluate on episodes."
        )


def init_classifier(model: Model, key: Key[Array, ""], task: Task) -> tuple[Params, State]:
    """θ and state of an embedding with a linear head, as wide as the targets of the queries."""
    body_key, head_key = jax.random.split(key)
    body, state = model.init(body_key, task.query.inputs)
    z, _ = jax.eval_shape(lambda: model.apply(key, body, state, task.query.inputs, train=True))
    shape = (z.shape[-1], task.query.targets.shape[-1])
    kernel = jax.nn.initializers.lecun_normal()(head_key, shape, z.dtype)
    return {"body": body, "head": {"kernel": kernel, "bias": jnp.zeros(shape[1:], z.dtype)}}, state


def _pretrained(
    model: Model, logits: Logits, loss: Callable[..., Float[Array, ""]], batches: bool = True
) -> MetaLearner:
    """Pre-training by `loss(key, outputs, query)`: no inner loop, and the queries are examples of all classes."""
    check_model(model)
    network = with_head(model, logits)

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        if batches:
            check_batches(task)
        return init_classifier(model, key, task)

    def one_task(
        key: Key[Array, ""], params: Params, state: State, task: Task
    ) -> tuple[Float[Array, ""], tuple[State, Info]]:
        outputs, state = outputs_of(network, key, params, state, task.query, train=True)
        return loss(key, outputs, task.query), (state, {})

    def not_adapted(key: Key[Array, ""], params: Params, state: State, support: PyTree) -> Adapted:
        return Adapted(params, state, {})

    return MetaLearner(init, not_adapted, answers(network), over_tasks(one_task))


def _fine_tuned(
    model: Model,
    logits: Logits,
    draw: Callable[[Key[Array, ""], Head, int], Head],
    problem: InnerProblem,
    loss: Loss,
    new_head: bool,
) -> MetaLearner:
    solve = first_order()(problem)

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        check_examples("support", support)
        draw_key, key = jax.random.split(key)
        head = draw(draw_key, params["head"], support.targets.shape[-1]) if new_head else params["head"]
        return solve(key, {"body": params["body"], "head": head}, state, support)

    # targets of a regression mean the same in each task, so that its tasks can be pre-trained on
    batches = new_head and loss is softmax_cross_entropy
    return _pretrained(model, logits, lambda _, *outcome: measured(loss, *outcome), batches)._replace(adapt=adapt)
