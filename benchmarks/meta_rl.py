"""Meta-reinforcement learning: `python -m benchmarks.meta_rl CASE`: navigation, bandit, cartpole or collector.

Each row is measured once and written at once, so that a run that was cut off goes on where it stopped.
"""

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jmeta
from benchmarks.machine import environment as machine
from jmeta.envs import Box, Discrete, bandit, collect, hidden_cartpole, navigation, point_navigation, reveal
from jmeta.models import Policy, RecurrentPolicy

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class Rows:
    """The rows of a case in its JSON file; one that is there is not measured again."""

    def __init__(self, case: str) -> None:
        self.file = RESULTS / f"meta_rl_{case}.json"
        here: dict[str, Any] = {"case": case, "machine": machine(PACKAGES), "rows": {}}
        self.stored: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else here

    def measure(self, name: str, function: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """The row of a name."""
        rows = self.stored["rows"]
        if name not in rows:
            begin = time.monotonic()
            rows[name] = {**function(), "seconds": round(time.monotonic() - begin, 1)}
            self.file.write_text(json.dumps(self.stored, indent=2) + "\n")
        print(name, rows[name], flush=True)
        return rows[name]

    def table(self, columns: tuple[str, ...]) -> None:
        """Writes the rows as a markdown table."""
        lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, row in self.stored["rows"].items():
            cells = [f"{row[c]:,.2f}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        self.file.with_suffix(".md").write_text("\n".join(lines) + "\n")


def random_policy(actions: Box | Discrete) -> jmeta.Model:
    """All outputs 0: uniform over `Discrete`, a standard normal distribution over `Box`."""
    return jmeta.Model(
        lambda key, inputs: (jnp.zeros(()), ()),
        lambda key, params, state, inputs, *, train: (jnp.zeros((inputs.shape[0], actions.outputs)) + params, state),
    )


def halved(k: int) -> float:
    """α of update k: halved after the first, as in the code of MAML's authors."""
    return 0.1 if k == 0 else 0.05


def train_navigation(
    seed: int, updates: int, source: jmeta.TaskSource, steps: int
) -> tuple[Callable[[int], jmeta.MetaLearner], jmeta.Fit]:
    """A policy trained for some updates at rate 0.1, and its learner by the number of updates."""
    network = jmeta.linen(Policy(Box(2, -0.1, 0.1), hidden=(64, 64), log_deviation=-0.7))
    learner = partial(jmeta.maml_rl, network, trace=0.9, clip=float("inf"))
    rate = optax.cosine_decay_schedule(5e-3, steps)
    fitted = jmeta.fit(
        jax.random.key(seed),
        learner(inner_rate=0.1, inner_steps=updates),
        source,
        steps=steps,
        tasks=20,
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
    )
    return lambda k: learner(inner_rate=0.1 if k <= updates else halved, inner_steps=k), fitted


def run_navigation(seed: int, steps: int, episodes: int) -> None:
    """Return before and after 1, 2 and 3 updates, of MAML, of no adaptation and of an oracle; and at random."""
    rows = Rows("navigation")
    source = point_navigation()
    score = partial(jmeta.evaluate, jax.random.key(1000), episodes=episodes, metric=jmeta.mean_return)

    def maml(updates: int) -> dict[str, Any]:
        learner, fitted = train_navigation(seed, updates, source, steps)
        row: dict[str, Any] = {"meta_steps": steps}
        for k in (0, 1, 2, 3):
            result = score(learner(k), fitted.params, fitted.state, source)
            row |= {f"return_{k}": result["mean_return"], f"ci95_{k}": result["ci95"]}
        return row

    def without(tasks: jmeta.TaskSource) -> dict[str, Any]:
        learner, fitted = train_navigation(seed, 0, tasks, steps)
        result = score(learner(0), fitted.params, fitted.state, tasks)
        return {"meta_steps": steps, "return_0": result["mean_return"], "ci95_0": result["ci95"]}

    def at_random() -> dict[str, Any]:
        learner = jmeta.maml_rl(random_policy(Box(2, -0.1, 0.1)), inner_steps=0)
        result = score(learner, jnp.zeros(()), (), source)
        return {"return_0": result["mean_return"], "ci95_0": result["ci95"]}

    rows.measure("random", at_random)
    for updates in (1, 2):
        rows.measure(f"maml_rl, trained for {updates}, seed {seed}", partial(maml, updates))
    rows.measure(f"no adaptation, seed {seed}", partial(without, source))
    rows.measure(f"oracle, seed {seed}", partial(without, reveal(source)))
    columns = tuple(f"{name}_{k}" for k in (0, 1, 2, 3) for name in ("return", "ci95"))
    rows.table(("meta_steps", *columns, "seconds"))


def gittins_indices(pulls: int, discount: float) -> np.ndarray:
    """Gittins indices of a Bernoulli arm with a Beta(1 + a, 1 + b) posterior, `[a, b]` for a + b < pulls.

    By calibration: the index is the sure reward λ at which a bandit of this arm and one that always pays λ is
    indifferent, found by bisection over the optimal stopping problem, backwards from 4 · pulls + 50 observations.
    """
    depth = 4 * pulls + 50
    low, high = np.zeros((pulls, pulls)), np.ones((pulls, pulls))
    for _ in range(14):
        middle = (low + high) / 2
        # the value of stopping at λ for good is λ / (1 − γ); one λ for each (a, b) that is asked for
        λ = middle[..., None]
        stop = λ / (1 - discount)
        n = depth
        value = np.maximum(stop, 0.5 / (1 - discount) * np.ones(1))
        starts = np.arange(pulls)
        a0, b0 = np.meshgrid(starts, starts, indexing="ij")
        extra = np.arange(n + 1)
        mean = (1 + a0[..., None] + extra) / (2 + a0[..., None] + b0[..., None] + n)
        value = np.maximum(stop, mean / (1 - discount))
        for m in range(n - 1, -1, -1):
            extra = np.arange(m + 1)
            p = (1 + a0[..., None] + extra) / (2 + a0[..., None] + b0[..., None] + m)
            go = p * (1 + discount * value[..., 1:]) + (1 - p) * discount * value[..., :-1]
            value = np.maximum(stop, go) if m else go
        better = value[..., 0] > stop[..., 0]
        low, high = np.where(better, middle, low), np.where(better, high, middle)
    return (low + high) / 2


def play(choose: Callable[..., np.ndarray], arms: int, pulls: int, bandits: int, seed: int) -> dict[str, Any]:
    """The total reward of a strategy, `(random, successes, failures, t) -> arms`, over bandits drawn anew, in NumPy."""
    random = np.random.default_rng(seed)
    p = random.random((bandits, arms))
    successes, failures = np.zeros((2, bandits, arms))
    total = np.zeros(bandits)
    rows = np.arange(bandits)
    for t in range(pulls):
        arm = choose(random, successes, failures, t)
        won = random.random(bandits) < p[rows, arm]
        successes[rows, arm] += won
        failures[rows, arm] += ~won
        total += won
    return {"mean_return": float(total.mean()), "ci95": float(1.96 * total.std(ddof=1) / np.sqrt(bandits))}


def strategies(pulls: int) -> dict[str, Callable[..., np.ndarray]]:
    """Gittins, Thompson sampling and UCB1; ties are broken at random."""
    indices = gittins_indices(pulls, 0.99 if pulls > 10 else 0.9)

    def best(random: np.random.Generator, x: np.ndarray) -> np.ndarray:
        return (x + 1e-9 * random.random(x.shape)).argmax(axis=1)

    def gittins(random: np.random.Generator, s: np.ndarray, f: np.ndarray, t: int) -> np.ndarray:
        return best(random, indices[s.astype(int), f.astype(int)])

    def thompson(random: np.random.Generator, s: np.ndarray, f: np.ndarray, t: int) -> np.ndarray:
        return random.beta(1 + s, 1 + f).argmax(axis=1)

    def ucb1(random: np.random.Generator, s: np.ndarray, f: np.ndarray, t: int) -> np.ndarray:
        n = np.maximum(s + f, 1e-9)
        return best(random, s / n + np.sqrt(2 * np.log(max(t, 1)) / n) + 1e6 * (s + f == 0))

    return {"gittins": gittins, "thompson": thompson, "ucb1": ucb1}


def run_bandit(arms: int, pulls: int, seed: int, steps: int, episodes: int) -> None:
    """RL² on Bernoulli bandits, beside Gittins indices, Thompson sampling and UCB1 on as many bandits."""
    rows = Rows("bandit")
    source = bandit(arms=arms, pulls=pulls)

    def trained() -> dict[str, Any]:
        network = jmeta.linen(RecurrentPolicy(Discrete(arms), width=64))
        learner = jmeta.rl2(network, inner_steps=0)
        epochs = 8
        rate = optax.cosine_decay_schedule(3e-3, steps * epochs)
        optimizer = jmeta.repeated(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)), epochs)
        fitted = jmeta.fit(
            jax.random.key(seed), learner, source, steps=steps, tasks=512, task_chunk=512, optimizer=optimizer
        )
        result = jmeta.evaluate(
            jax.random.key(1000),
            learner,
            fitted.params,
            fitted.state,
            source,
            episodes=episodes,
            metric=jmeta.mean_return,
        )
        return {"mean_return": result["mean_return"], "ci95": result["ci95"], "meta_steps": steps}

    label = f"{arms} arms, {pulls} pulls"
    for name, choose in strategies(pulls).items():
        rows.measure(f"{name}, {label}", partial(play, choose, arms, pulls, 100_000, 0))
    rows.measure(f"rl2, {label}, seed {seed}", trained)
    rows.table(("mean_return", "ci95", "meta_steps", "seconds"))


def run_cartpole(seed: int, steps: int, episodes: int) -> None:
    """Return with hidden physics: RL² before and after one episode, beside no adaptation and an oracle."""
    rows = Rows("cartpole")
    source = hidden_cartpole(queries=5)

    def train(learner: jmeta.MetaLearner, tasks: jmeta.TaskSource) -> jmeta.Fit:
        epochs = 8
        rate = optax.cosine_decay_schedule(3e-3, steps * epochs)
        optimizer = jmeta.repeated(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)), epochs)
        return jmeta.fit(
            jax.random.key(seed), learner, tasks, steps=steps, tasks=64, task_chunk=64, optimizer=optimizer
        )

    def score(learner: jmeta.MetaLearner, fitted: jmeta.Fit, tasks: jmeta.TaskSource) -> jmeta.train.Metrics:
        key = jax.random.key(1000)
        return jmeta.evaluate(
            key, learner, fitted.params, fitted.state, tasks, episodes=episodes, metric=jmeta.mean_return
        )

    def recurrent() -> dict[str, Any]:
        learner = partial(jmeta.rl2, jmeta.linen(RecurrentPolicy(Box(1), width=64)))
        fitted = train(learner(inner_steps=1), source)
        row: dict[str, Any] = {"meta_steps": steps}
        for k in (0, 1, 2):
            result = score(learner(inner_steps=k), fitted, source)
            row |= {f"return_{k}": result["mean_return"], f"ci95_{k}": result["ci95"]}
        return row

    def without(tasks: jmeta.TaskSource) -> dict[str, Any]:
        learner = jmeta.maml_rl(jmeta.linen(Policy(Box(1), hidden=(64, 64))), inner_steps=0, trajectories=2, trace=0.95)
        result = score(learner, train(learner, tasks), tasks)
        return {"meta_steps": steps, "return_0": result["mean_return"], "ci95_0": result["ci95"]}

    low = rows.measure(f"no adaptation, seed {seed}", partial(without, source))["return_0"]
    high = rows.measure(f"oracle, seed {seed}", partial(without, reveal(source)))["return_0"]
    found = rows.measure(f"rl2, seed {seed}", recurrent)["return_1"]
    print(f"one episode recovers {(found - low) / (high - low):.0%} of the gap from {low:.1f} to {high:.1f}")
    rows.table(("meta_steps", *(f"{name}_{k}" for k in (0, 1, 2) for name in ("return", "ci95")), "seconds"))


def run_collector(episodes: int = 400) -> None:
    """Steps per second of the compiled collector, and of the same task in NumPy through gymnasium's vector API."""
    import gymnasium

    horizon = 100

    class Navigation(gymnasium.Env):
        """The point of `jmeta.envs.navigation`."""

        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        action_space = gymnasium.spaces.Box(-0.1, 0.1, (2,), np.float32)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.goal, self.position, self.time = self.np_random.uniform(-0.5, 0.5, 2), np.zeros(2), 0
            return self.position.astype(np.float32), {}

        def step(self, action: Any) -> Any:
            self.position = self.position + np.clip(action, -0.1, 0.1)
            self.time += 1
            distance = float(np.linalg.norm(self.position - self.goal))
            return self.position.astype(np.float32), -distance, distance < 0.01, self.time == horizon, {}

    def compiled() -> dict[str, Any]:
        goals = jax.random.uniform(jax.random.key(0), (episodes, 2), minval=-0.5, maxval=0.5)

        def act(carry: Any, observation: jax.Array, previous: Any) -> Any:
            return carry, jnp.zeros(4)

        @jax.jit
        def run(key: jax.Array) -> jax.Array:
            keys = jax.random.split(key, episodes)
            one = jax.vmap(lambda key, goal: collect(key, navigation.environment(goal, horizon), act, 1))
            return one(keys, goals).rewards.sum()

        run(jax.random.key(0)).block_until_ready()
        seconds = []
        for i in range(10):
            begin = time.perf_counter()
            run(jax.random.key(i)).block_until_ready()
            seconds.append(time.perf_counter() - begin)
        return {"steps_per_second": episodes * horizon / float(np.median(seconds)), "environments": episodes}

    def stepped(number: int) -> dict[str, Any]:
        vector = gymnasium.vector.SyncVectorEnv([Navigation] * number)
        vector.reset(seed=0)
        random = np.random.default_rng(0)
        begin = time.perf_counter()
        for _ in range(horizon):
            vector.step((0.1 * random.normal(size=(number, 2))).astype(np.float32))
        return {"steps_per_second": number * horizon / (time.perf_counter() - begin), "environments": number}

    rows = Rows("collector")
    fast = rows.measure("jmeta, compiled", compiled)["steps_per_second"]
    slow = rows.measure("gymnasium SyncVectorEnv, NumPy", partial(stepped, episodes))["steps_per_second"]
    print(f"{fast / slow:.0f} times as many steps")
    rows.table(("steps_per_second", "environments", "seconds"))


def main(
    case: tyro.conf.Positional[Literal["navigation", "bandit", "cartpole", "collector"]],
    seed: int = 0,
    steps: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    episodes: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    arms: int = 5,
    pulls: int = 10,
) -> None:
    """Runs a case.

    Args:
        case: navigation, bandit, cartpole or collector.
        seed: of meta-training; test tasks are the same for all.
        steps: meta-steps; default 1500 for navigation and for bandits, 300 for the cartpole.
        episodes: unseen tasks; default 600 goals, 2000 bandits.
        arms: of the bandits.
        pulls: of the bandits.
    """
    RESULTS.mkdir(exist_ok=True)
    if case == "navigation":
        run_navigation(seed, steps or 1500, episodes or 600)
    elif case == "bandit":
        run_bandit(arms, pulls, seed, steps or 1500, episodes or 2000)
    elif case == "cartpole":
        run_cartpole(seed, steps or 300, episodes or 600)
    else:
        run_collector()


if __name__ == "__main__":
    tyro.cli(main)
