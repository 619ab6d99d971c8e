"""Meta-reinforcement learning: `python -m benchmarks.meta_rl CASE`, as navigation, bandit or cheetah_velocity.

Each row is measured once and written at once, so that a run that was cut off goes on where it stopped.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jmeta
from benchmarks.results import RESULTS, Results, machine_line, markdown_table
from jmeta.inner import Adjoint
from jmeta.rl import (
    Box,
    Discrete,
    Policy,
    RecurrentPolicy,
    ant_direction,
    ant_velocity,
    bandit,
    cheetah_direction,
    cheetah_velocity,
    collect,
    hidden_cartpole,
    navigation,
    point_navigation,
    reveal,
    walker_body,
)

Row = Mapping[str, Any]
LATER = {1: 0.01, 2: 0.05}  # α after the first of more updates than a policy was trained for


def measured(results: Results, name: str, function: Callable[[], Row]) -> Row:
    """The row of a name, with the seconds that it took."""

    def timed() -> Row:
        begin = time.monotonic()
        return {**function(), "seconds": round(time.monotonic() - begin, 1)}

    row: Row = results.get(name, timed)
    print(name, row, flush=True)
    return row


def total(result: Row) -> tuple[float, float]:
    """The mean return of `jmeta.evaluate`, with half of its 95 % interval."""
    return result["mean_return"], result["ci95"]


def write_table(results: Results, command: str, columns: tuple[str, ...]) -> None:
    """Writes the rows as a markdown table."""

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return f"{value[0]:.2f} ± {value[1]:.2f}"
        return "" if value is None else f"{value:,.0f}"

    lines = [[name, *(cell(row.get(column)) for column in columns)] for name, row in results.rows.items()]
    header = ["", *(column.replace("_", " ") for column in columns)]
    text = machine_line(f"python -m benchmarks.meta_rl {command}") + markdown_table(header, lines)
    results.file.with_suffix(".md").write_text(text)


def random_policy(actions: Box | Discrete) -> jmeta.Model:
    """All outputs 0: uniform over `Discrete`, a standard normal distribution over `Box`."""
    return jmeta.Model(
        lambda key, inputs: (jnp.zeros(()), ()),
        lambda key, params, state, inputs, *, train: (jnp.zeros((inputs.shape[0], actions.outputs)) + params, state),
    )


def train_navigation(
    seed: int, updates: int, source: jmeta.TaskSource, steps: int, adjoint: Adjoint
) -> tuple[Callable[[int], jmeta.MetaLearner], jmeta.Fit]:
    """A policy trained for some updates at rate 0.1, and its learner by the number of updates."""
    network = jmeta.linen(Policy(Box(2, -0.1, 0.1)))
    learner = partial(jmeta.maml_rl, network, adjoint=adjoint, trace=0.9, clip=float("inf"))
    rate = optax.cosine_decay_schedule(5e-3, steps)
    fitted = jmeta.fit(
        jax.random.key(seed),
        learner(inner_rate=0.1, inner_steps=updates),
        source,
        steps=steps,
        tasks=20,
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
    )

    def after(k: int) -> jmeta.MetaLearner:
        later = LATER[updates] if k > updates > 0 else None
        return learner(inner_rate=0.1, later_rate=later, inner_steps=k)

    return after, fitted


def run_navigation(seed: int, steps: int, episodes: int) -> None:
    """Return before and after 1, 2 and 3 updates, of MAML, of no adaptation and of an oracle; and at random."""
    results = Results(RESULTS / "meta_rl_navigation.json", {"steps": steps, "episodes": episodes})
    source = point_navigation()
    score = partial(jmeta.evaluate, jax.random.key(1000), episodes=episodes, metric=jmeta.mean_return)

    def maml(updates: int, adjoint: Adjoint) -> dict[str, Any]:
        learner, fitted = train_navigation(seed, updates, source, steps, adjoint)
        after = {k: score(learner(k), fitted.params, fitted.state, source) for k in (0, 1, 2, 3)}
        return {f"return_{k}": total(result) for k, result in after.items()}

    def without(tasks: jmeta.TaskSource) -> dict[str, Any]:
        learner, fitted = train_navigation(seed, 0, tasks, steps, jmeta.exact())
        return {"return_0": total(score(learner(0), fitted.params, fitted.state, tasks))}

    def at_random() -> dict[str, Any]:
        learner = jmeta.maml_rl(random_policy(Box(2, -0.1, 0.1)), inner_steps=0)
        return {"return_0": total(score(learner, jnp.zeros(()), (), source))}

    measured(results, "random", at_random)
    for name, updates, adjoint in (
        ("maml_rl", 1, jmeta.exact()),
        ("maml_rl", 2, jmeta.exact()),
        ("first-order maml_rl", 1, jmeta.first_order()),
    ):
        measured(results, f"{name}, trained for {updates}, seed {seed}", partial(maml, updates, adjoint))
    measured(results, f"no adaptation, seed {seed}", partial(without, source))
    measured(results, f"oracle, seed {seed}", partial(without, reveal(source)))
    columns = (*(f"return_{k}" for k in (0, 1, 2, 3)), "seconds")
    write_table(results, f"navigation --seed {seed} --steps {steps}", columns)


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
    reward = np.zeros(bandits)
    rows = np.arange(bandits)
    for t in range(pulls):
        arm = choose(random, successes, failures, t)
        won = random.random(bandits) < p[rows, arm]
        successes[rows, arm] += won
        failures[rows, arm] += ~won
        reward += won
    return {"total_reward": (float(reward.mean()), float(1.96 * reward.std(ddof=1) / np.sqrt(bandits)))}


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
    results = Results(RESULTS / "meta_rl_bandit.json", {"steps": steps, "episodes": episodes})
    source = bandit(arms=arms, pulls=pulls)

    def trained() -> dict[str, Any]:
        network = jmeta.linen(RecurrentPolicy(Discrete(arms), width=64))
        learner = jmeta.rl2(network, inner_steps=0, value_weight=0.5)
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
        return {"total_reward": total(result)}

    label = f"{arms} arms, {pulls} pulls"
    for name, choose in strategies(pulls).items():
        measured(results, f"{name}, {label}", partial(play, choose, arms, pulls, 100_000, 0))
    measured(results, f"rl2, {label}, seed {seed}", trained)
    write_table(
        results, f"bandit --arms {arms} --pulls {pulls} --seed {seed} --steps {steps}", ("total_reward", "seconds")
    )


class Physics(NamedTuple):
    """Tasks that a memory of one episode tells, and the size of their trainings.

    Args:
        make: `queries -> tasks`.
        width: of the recurrent policy.
        tasks: trials of a meta-step.
        steps: meta-steps.
        episodes: test tasks.
        rate: of Adam.
        discount: γ.
    """

    make: Callable[..., jmeta.TaskSource]
    width: int = 64
    tasks: int = 64
    steps: int = 300
    episodes: int = 600
    rate: float = 3e-3
    discount: float = 0.99


CASES = {
    "cartpole": Physics(hidden_cartpole),
    **{
        make.__name__: Physics(make, width=128, tasks=32, episodes=100, rate=1e-3)
        for make in (cheetah_velocity, cheetah_direction, ant_velocity, ant_direction, walker_body)
    },
}


def run_physics(case: str, seed: int, steps: int | None, episodes: int | None) -> None:
    """Return where something is hidden: RL² before and after one episode, beside no adaptation and an oracle.

    The oracle is RL² that is told what is hidden, in its first episode; no adaptation is a policy without memory.
    """
    about = CASES[case]
    steps, episodes = steps or about.steps, episodes or about.episodes
    results = Results(RESULTS / f"meta_rl_{case}.json", {"steps": steps, "episodes": episodes})
    source = about.make(queries=5)
    actions = jax.eval_shape(source.sample, jax.random.key(0), source.data).support.actions
    recurrent = jmeta.linen(RecurrentPolicy(actions, width=about.width))
    rl2 = partial(jmeta.rl2, recurrent, value_weight=0.5, discount=about.discount)

    def train(learner: jmeta.MetaLearner, tasks: jmeta.TaskSource) -> jmeta.Fit:
        epochs = 8
        rate = optax.cosine_decay_schedule(about.rate, steps * epochs)
        optimizer = jmeta.repeated(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)), epochs)
        sizes: dict[str, Any] = {"tasks": about.tasks, "task_chunk": about.tasks}
        return jmeta.fit(jax.random.key(seed), learner, tasks, steps=steps, **sizes, optimizer=optimizer)

    def score(learner: jmeta.MetaLearner, fitted: jmeta.Fit, tasks: jmeta.TaskSource) -> tuple[float, float]:
        key = jax.random.key(1000)
        return total(
            jmeta.evaluate(
                key, learner, fitted.params, fitted.state, tasks, episodes=episodes, metric=jmeta.mean_return
            )
        )

    def with_memory() -> Row:
        fitted = train(rl2(inner_steps=1), source)
        return {f"return_{k}": score(rl2(inner_steps=k), fitted, source) for k in (0, 1, 2)}

    def at_once(learner: jmeta.MetaLearner, tasks: jmeta.TaskSource) -> Row:
        return {"return_0": score(learner, train(learner, tasks), tasks)}

    policy = jmeta.linen(Policy(actions, log_deviation=0.0))
    without = jmeta.maml_rl(policy, inner_steps=0, trajectories=2, trace=0.95, discount=about.discount)
    low = measured(results, f"no adaptation, seed {seed}", partial(at_once, without, source))["return_0"][0]
    oracle = partial(at_once, rl2(inner_steps=0), reveal(source))
    high = measured(results, f"oracle, seed {seed}", oracle)["return_0"][0]
    found = measured(results, f"rl2, seed {seed}", with_memory)["return_1"][0]
    print(f"one episode recovers {(found - low) / (high - low):.0%} of the gap from {low:.1f} to {high:.1f}")
    columns = (*(f"return_{k}" for k in (0, 1, 2)), "seconds")
    write_table(results, f"{case} --seed {seed} --steps {steps}", columns)


def run_collector(episodes: int = 400) -> None:
    """Steps per second of the compiled collector, and of the same task in NumPy through gymnasium's vector API."""
    import gymnasium

    horizon = 100

    class Navigation(gymnasium.Env):
        """The point of `jmeta.rl.navigation`."""

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

    results = Results(RESULTS / "meta_rl_collector.json", {})
    fast = measured(results, "jmeta, compiled", compiled)["steps_per_second"]
    slow = measured(results, "gymnasium SyncVectorEnv, NumPy", partial(stepped, episodes))["steps_per_second"]
    print(f"{fast / slow:.0f} times as many steps")
    write_table(results, "collector", ("steps_per_second", "environments"))


def main(
    case: Annotated[str, tyro.conf.Positional],
    seed: int = 0,
    steps: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    episodes: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    arms: int = 5,
    pulls: int = 10,
) -> None:
    """Runs a case.

    Args:
        case: navigation, bandit, collector, cartpole, or a robot of Brax: cheetah_velocity, cheetah_direction,
            ant_velocity, ant_direction, walker_body.
        seed: of meta-training; test tasks are the same for all.
        steps: meta-steps; default 600 for navigation, 1500 for bandits, 300 for others.
        episodes: unseen tasks; default 600 goals or carts, 2000 bandits, 100 robots.
        arms: of the bandits.
        pulls: of the bandits.
    """
    RESULTS.mkdir(exist_ok=True)
    if case == "navigation":
        run_navigation(seed, steps or 600, episodes or 600)
    elif case == "bandit":
        run_bandit(arms, pulls, seed, steps or 1500, episodes or 2000)
    elif case == "collector":
        run_collector()
    elif case in CASES:
        run_physics(case, seed, steps, episodes)
    else:
        raise SystemExit(f"there is no case {case!r}; choose navigation, bandit, collector or {', '.join(CASES)}.")


if __name__ == "__main__":
    tyro.cli(main)
