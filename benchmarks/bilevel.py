"""Uses of bilevel optimisation beside what they replace: `python -m benchmarks.bilevel CASE`.

`tuning`: learning rate and regularisation by hypergradients beside grid search. `reweighting`: weights of examples
under label noise beside equal weights. `learned_loss`: a loss that is learned over tasks beside the squared error.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn
from scipy import stats

import jmeta
from benchmarks.results import RESULTS, Results, machine_line, markdown_table
from jmeta import optimizers
from jmeta.data.glyphs import load_glyphs

NOISE = (0.4,)  # shares of wrong labels
INNER, ROUNDS = 100, 10  # inner steps, and meta-steps of the tuning
GRID = 10  # values of each hyper-parameter
DECAY, RATE = (1e-5, 1.0), (1e-2, 10.0)  # the ends of the grid
OPTIMIZER = optax.adam(optax.cosine_decay_schedule(1.0, ROUNDS + 2), b1=0.5, b2=0.9)


def constant(data: jmeta.Task) -> jmeta.TaskSource:
    """One task again and again."""
    return jmeta.TaskSource(jax.tree.map(jnp.asarray, data), _itself, {})


def _itself(key: Any, data: Any) -> Any:
    return data


def faces(classes: int, seed: int) -> tuple[jmeta.Task, jmeta.Examples]:
    """Some glyphs as a plain classification: four faces of each to train on, four held out, and four to test on."""
    data, random = load_glyphs(), np.random.default_rng(seed)
    names = random.choice(np.flatnonzero(np.bincount(data.labels) >= 12), classes, replace=False)
    rows = [random.permutation(np.flatnonzero(data.labels == name))[:12] for name in names]
    images = np.stack([data.images[row] for row in rows]).reshape(classes, 3, 4, -1) / np.float32(255)
    targets = np.eye(classes, dtype=np.float32).repeat(4, axis=0)
    train, held_out, test = (jmeta.Examples(x.reshape(classes * 4, -1), targets) for x in images.swapaxes(0, 1))
    return jmeta.Task(train, held_out), test


def classifier(steps: int = INNER) -> jmeta.MetaLearner:
    """Logistic regression whose θ holds the logarithms of its learning rate and of a penalty for each pixel."""

    def scores(φ: jax.Array, inputs: jax.Array) -> jax.Array:
        return inputs @ φ

    def error(φ: jax.Array, data: jmeta.Examples) -> jax.Array:
        return jmeta.softmax_cross_entropy(scores(φ, data.inputs), data.targets)

    def scaled(gradient: Any, θ: Any, step: Any) -> Any:
        return jax.tree.map(lambda g: jnp.exp(θ["log_rate"]) * g, gradient)

    return jmeta.bilevel(
        outer=lambda key, task: {
            "log_decay": jnp.full((task.support.inputs.shape[1], 1), jnp.log(0.01)),
            "log_rate": jnp.log(0.1),
        },
        inner=lambda key, θ, support: jnp.zeros((support.inputs.shape[1], support.targets.shape[1])),
        inner_loss=lambda key, φ, θ, support: error(φ, support) + 0.5 * (jnp.exp(θ["log_decay"]) * jnp.square(φ)).sum(),
        outer_loss=lambda key, φ, θ, query: error(φ, query),
        inner_optimizer=optax.chain(optimizers.learned(scaled), optax.sgd(1.0, momentum=0.9)),
        inner_steps=steps,
        adjoint=jmeta.exact(checkpoint=True),
    )


def tuning(classes: int, seed: int) -> dict[str, Any]:
    """Losses of a grid of one penalty and a learning rate, and of ten meta-steps on a penalty for each pixel too."""
    task, test = faces(classes, seed)
    learner = classifier()
    unseen = jax.tree.map(lambda x: jnp.asarray(x)[None], jmeta.Task(task.support, test))
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], task)
    loss = jax.jit(lambda θ, batch: learner.objective(jax.random.key(0), θ, (), batch)[0])
    axes = [np.geomspace(*ends, GRID) for ends in (DECAY, RATE)]
    shape = (task.support.inputs.shape[1], 1)
    points = [[{"log_decay": jnp.full(shape, np.log(d)), "log_rate": jnp.log(r)} for r in axes[1]] for d in axes[0]]
    grid = [[float(loss(θ, batch)) for θ in row] for row in points]
    best = np.unravel_index(np.nanargmin(grid), (GRID, GRID))
    path: list[dict[str, float]] = []
    state = jmeta.init(jax.random.key(seed), learner, OPTIMIZER, constant(task))

    def callback(train_state: jmeta.TrainState, metrics: Any) -> None:
        nonlocal state
        decay, rate = (float(jnp.exp(state.params[name]).mean()) for name in ("log_decay", "log_rate"))
        on_test = float(loss(state.params, unseen))  # of the θ whose held-out loss the step reports
        path.append({"loss": metrics["loss"], "test": on_test, "decay": decay, "rate": rate})
        state = train_state

    options: dict[str, Any] = {"steps": ROUNDS, "tasks": 1, "log_every": 1, "optimizer": OPTIMIZER}
    jmeta.fit(jax.random.key(seed), learner, constant(task), callback=callback, **options)
    test_of_grid = float(loss(points[best[0]][best[1]], unseen))
    return {"grid": grid, "test": test_of_grid, "axes": [axis.tolist() for axis in axes], "path": path}


def run_tuning(seeds: int) -> None:
    """The table and the picture of the tuning."""
    results = Results(RESULTS / "bilevel_tuning.json", {"inner_steps": INNER, "rounds": ROUNDS, "grid": GRID})
    rows = {seed: results.get(f"seed {seed}", partial(tuning, 30, seed)) for seed in range(seeds)}
    lines = []
    for seed, row in rows.items():
        grid, losses = np.asarray(row["grid"]), [step["loss"] for step in row["path"]]
        best, last = np.nanmin(grid), int(np.argmin(losses))
        reached = next((i + 1 for i, loss in enumerate(losses) if loss <= best), None)
        lines.append(
            [
                str(seed),
                f"{best:.4f}, {row['test']:.4f}",
                f"{losses[last]:.4f}, {row['path'][last]['test']:.4f}",
                str(reached or f"not in {ROUNDS}"),
            ]
        )
    header = [
        "seed",
        f"grid of {GRID**2} runs: held out, test",
        f"{ROUNDS} hypergradient steps",
        "runs until the grid's best",
    ]
    text = machine_line(f"python -m benchmarks.bilevel tuning --seeds {seeds}") + markdown_table(header, lines)
    print(text)
    (RESULTS / "bilevel_tuning.md").write_text(text)

    axes = _axes(5.6, 4.0)
    random = np.random.default_rng(0)
    for seed, row in rows.items():
        tried = {
            "grid, in random order": random.permutation(np.nan_to_num(np.ravel(row["grid"]), nan=np.inf)),
            "hypergradients": np.asarray([step["loss"] for step in row["path"]]),
        }
        for color, (name, values) in zip(("tab:gray", "tab:blue"), tried.items(), strict=True):
            so_far = np.minimum.accumulate(values)
            axes.plot(1 + np.arange(len(so_far)), so_far, color=color, alpha=0.7, label=None if seed else name)
    axes.set(xscale="log", xlabel="inner runs", ylabel="best held-out loss so far", ylim=(0, 2))
    axes.legend(frameon=False)
    axes.figure.savefig(RESULTS / "bilevel_tuning.png", dpi=120)


class Small(nn.Module):
    """Three convolutions and a linear layer.

    Args:
        outputs: classes.
    """

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = nn.relu(jmeta.BatchNorm()(jmeta.Conv(32, (3, 3), strides=2)(x), train=True))
        return nn.Dense(self.outputs)(x.reshape(len(x), -1))


def noisy(noise: float, classes: int, seed: int) -> tuple[jmeta.Task, jmeta.Examples, np.ndarray]:
    """Omniglot as a plain classification: 12 drawings to train on, of which some have a wrong label, and 2 clean ones
    to validate on; 6 to test on; and which labels are wrong.
    """
    source = jmeta.omniglot(ways=classes, shots=12, queries=8)
    task = source.sample(jax.random.key(seed), source.data)
    random = np.random.default_rng(seed)
    labels = np.asarray(task.support.targets).argmax(1)
    wrong = random.random(len(labels)) < noise
    labels = np.where(wrong, (labels + random.integers(1, classes, len(labels))) % classes, labels)
    train = jmeta.Examples(np.asarray(task.support.inputs), np.eye(classes, dtype=np.float32)[labels])
    clean = np.arange(len(task.query.targets)) % 8 < 2
    validation, test = (
        jmeta.Examples(np.asarray(task.query.inputs)[rows], np.asarray(task.query.targets)[rows])
        for rows in (clean, ~clean)
    )
    return jmeta.Task(train, validation), test, wrong


def reweighting(noise: float, classes: int, steps: int, seed: int) -> dict[str, Any]:
    """Test accuracy with learned and with equal weights, with the noisy examples alone and with the clean ones too."""
    data, test, wrong = noisy(noise, classes, seed)
    model = jmeta.linen(Small(classes))
    size, batch = len(data.support.targets) + len(data.query.targets), 100

    def logits(φ: Any, inputs: jax.Array) -> jax.Array:
        return model.apply(jax.random.key(0), φ, {}, inputs, train=True)[0]

    def losses(φ: Any, data: jmeta.Examples) -> jax.Array:
        return optax.softmax_cross_entropy(logits(φ, data.inputs), data.targets)

    def sample(key: Any, data: jmeta.Task) -> jmeta.Task:
        rows = jax.random.choice(key, len(data.support.targets), (batch,), replace=False)
        return jmeta.Task((jax.tree.map(lambda x: x[rows], data.support), rows), data.query)

    def weighted(key: Any, φ: Any, θ: jax.Array, support: Any) -> jax.Array:
        examples, rows = support
        return (jax.nn.sigmoid(θ[rows]) * losses(φ, examples)).mean()

    learner = jmeta.bilevel(
        outer=lambda key, task: jnp.zeros(size),
        inner=lambda key, θ, support: model.init(key, support[0].inputs)[0],
        inner_loss=weighted,
        outer_loss=lambda key, φ, θ, query: losses(φ, query).mean(),
        inner_optimizer=optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9),
        persistent=True,
    )

    def correct(φ: Any) -> float:
        answers = np.asarray(jax.jit(logits)(φ, jnp.asarray(test.inputs))).argmax(1)
        return float((answers == test.targets.argmax(1)).mean())

    def run(rate: float, data: jmeta.Task) -> jmeta.Fit:
        source = jmeta.TaskSource(jax.tree.map(jnp.asarray, data), sample, {})
        return jmeta.fit(jax.random.key(seed), learner, source, steps=steps, tasks=1, optimizer=optax.adam(rate))

    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), data.support, data.query)
    both = jmeta.Task(joined, data.query)
    fits = {
        "learned weights": run(0.1, data),
        "equal weights": run(0.0, data),
        "learned weights, clean examples too": run(0.1, both),
        "equal weights, clean examples too": run(0.0, both),
    }
    weights = np.asarray(jax.nn.sigmoid(fits["learned weights"].params))[: len(wrong)]
    return {
        **{name: correct(fitted.state[0]) for name, fitted in fits.items()},
        "weights_right": weights[~wrong].tolist(),
        "weights_wrong": weights[wrong].tolist(),
    }


def run_reweighting(seeds: int, steps: int = 600) -> None:
    """The table and the picture of the reweighting."""
    results = Results(RESULTS / "bilevel_reweighting.json", {"steps": steps})
    lines: list[list[str]] = []
    row: dict[str, Any] = {}
    for noise in NOISE:
        found = [results.get(f"{noise} {seed}", partial(reweighting, noise, 50, steps, seed)) for seed in range(seeds)]
        row = found[0]
        for name in (name for name in row if not name.startswith("weights_")):
            accuracy = np.asarray([one[name] for one in found])
            ahead = accuracy - [one[name.replace("learned", "equal")] for one in found]
            paired = f"{_percent(ahead)}, in {(ahead > 0).sum()} of {seeds}" if "learned" in name else ""
            lines.append([f"{noise:.0%}", name, _percent(accuracy), paired])
    text = machine_line(f"python -m benchmarks.bilevel reweighting --seeds {seeds}")
    text += markdown_table(["wrong labels", "training", "test accuracy", "ahead of equal weights, paired"], lines)
    print(text)
    (RESULTS / "bilevel_reweighting.md").write_text(text)
    axes = _axes(5.6, 4.0)
    bins = np.linspace(0, 1, 31)
    for name in ("right", "wrong"):
        axes.hist(row[f"weights_{name}"], bins, alpha=0.6, density=True, label=f"label is {name}")
    axes.set(xlabel="learned weight of a training example", ylabel="density")
    axes.legend(frameon=False)
    axes.figure.savefig(RESULTS / "bilevel_reweighting.png", dpi=120)


def _percent(values: np.ndarray) -> str:
    """The mean over seeds in percent, with half of its 95 % interval by Student's t."""
    half = (
        stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    )
    return f"{100 * values.mean():.1f} ± {100 * half:.1f} %"


class LearnedLoss(nn.Module):
    """ℓ(ŷ, y) ≥ 0 as a perceptron of a prediction and its target."""

    @nn.compact
    def __call__(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        x = jnp.concatenate([outputs, targets], axis=-1)
        for width in (40, 40):
            x = nn.relu(nn.Dense(width)(x))
        return nn.softplus(nn.Dense(1)(x)).mean()


INNER_STEPS = (1, 2, 5, 10, 20)  # of the curve against inner steps
NETWORK, LEARNED = jmeta.linen(jmeta.MLP(outputs=1)), LearnedLoss()


def answers(φ: Any, inputs: jax.Array) -> jax.Array:
    """What the network says to inputs."""
    return NETWORK.apply(jax.random.key(0), φ, {}, inputs, train=False)[0]


def learned(key: Any, φ: Any, θ: Any, support: jmeta.Examples) -> jax.Array:
    """The loss that is learned, an inner loss."""
    return cast(jax.Array, LEARNED.apply(θ, answers(φ, support.inputs), support.targets))


def squared(key: Any, φ: Any, θ: Any, support: jmeta.Examples) -> jax.Array:
    """The squared error, an inner loss without anything learned."""
    return jmeta.mean_squared_error(answers(φ, support.inputs), support.targets)


def regression(inner_loss: Callable[..., jax.Array], rate: float, inner_steps: int) -> jmeta.MetaLearner:
    """A network that is trained from the start on each task, by some inner loss."""
    return jmeta.bilevel(
        outer=lambda key, task: LEARNED.init(key, task.support.targets, task.support.targets),
        inner=lambda key, θ, support: NETWORK.init(key, support.inputs)[0],
        inner_loss=inner_loss,
        outer_loss=squared,
        inner_optimizer=optax.sgd(rate),
        inner_steps=inner_steps,
        predict=lambda key, φ, θ, inputs: answers(φ, inputs),
    )


def curve(inner_loss: Callable[..., jax.Array], rate: float, θ: Any) -> list[float]:
    """Squared error on new sinusoids after each number of inner steps."""
    name, source = "mean_squared_error", jmeta.sinusoid(shots=20)
    return [
        jmeta.evaluate(
            jax.random.key(1), regression(inner_loss, rate, k), θ, (), source, metric=jmeta.mean_squared_error
        )[name]
        for k in INNER_STEPS
    ]


def learned_loss(steps: int, inner_steps: int, seed: int) -> list[float]:
    """The curve of a loss that was learned for so many inner steps."""
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(3e-3, steps)))
    fitted = jmeta.fit(
        jax.random.key(seed),
        regression(learned, 0.05, inner_steps),
        jmeta.sinusoid(shots=20),
        steps=steps,
        tasks=25,
        log_every=200,
        optimizer=optimizer,
    )
    return curve(learned, 0.05, fitted.params)


def run_learned_loss(seeds: int, steps: int = 5000) -> None:
    """The table and the picture of the learned loss."""
    results = Results(RESULTS / "bilevel_learned_loss.json", {"steps": steps, "inner_steps": 10})
    rows = {
        f"learned loss, seed {seed}": results.get(f"seed {seed}", partial(learned_loss, steps, 10, seed))
        for seed in range(seeds)
    }
    for rate in (0.003, 0.01, 0.015, 0.02):
        name = f"squared error, rate {rate}"
        rows[name] = results.get(name, partial(curve, squared, rate, {}))
    axes = _axes(5.6, 4.0)
    for name, values in rows.items():
        axes.plot(INNER_STEPS, values, "o-", label=name)
    axes.set(xlabel="inner steps", ylabel="mean squared error of new tasks", ylim=(0, 10))
    axes.legend(frameon=False)
    axes.figure.savefig(RESULTS / "bilevel_learned_loss.png", dpi=120)
    text = machine_line(f"python -m benchmarks.bilevel learned_loss --seeds {seeds}")
    lines = [[name, *(f"{value:.2f}" for value in values)] for name, values in rows.items()]
    text += markdown_table(["inner loss", *(f"{k} steps" for k in INNER_STEPS)], lines)
    print(text)
    (RESULTS / "bilevel_learned_loss.md").write_text(text)


def _axes(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(width, height), layout="constrained").subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def main(case: tyro.conf.Positional[Literal["tuning", "reweighting", "learned_loss"]], seeds: int = 3) -> None:
    """Runs a case.

    Args:
        case: tuning, reweighting or learned_loss.
        seeds: how many runs.
    """
    begin = time.monotonic()
    {"tuning": run_tuning, "reweighting": run_reweighting, "learned_loss": run_learned_loss}[case](seeds)
    print(f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    tyro.cli(main)
