"""jmeta on one accelerator: `python -m benchmarks.accelerator [--parts ...] [--omniglot FILE]`, six minutes on a GPU.

It needs jax, flax, optax and NumPy of any version from 0.11 of JAX on, no network and no data set; PyTorch is compared
with where it is installed. Processes compile side by side and then time one after the other, each alone. A line of JSON
a result goes to the screen and to `--out`, so that a run that is cut keeps what it has. `--pack FILE` writes Omniglot
into one file, for a machine without tensorflow-datasets.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jmeta
from benchmarks.packed import pack, packed
from jmeta.models.convolution import conv_general_dilated
from jmeta.models.networks import Conv4
from jmeta.models.norms import Norm, norm_layer

PARTS = ("device", "agree", "speed", "torch", "reward", "train")
WORKERS = 8  # processes that share the programs of `speed`
COMPILING_S, TIMING_S = 120, 100  # how long the parts may compile together, and each of them may time
Note = Callable[..., None]


class Size(NamedTuple):
    """How much is done: on an accelerator, or in the small form that a CPU does in half a minute."""

    tasks: tuple[int, ...] = (32, 4, 256)
    cases: tuple[tuple[str, int, int], ...] = tuple(product(("stride", "max"), (15, 1), (1, 5)))
    scan: int = 10
    matmul: int = 8192
    train: int = 20_000
    train_s: int = 75
    episodes: int = 600
    environments: int = 4096


def at_once() -> None:
    """For a part that is alone."""


SMALL = Size((2,), (("stride", 1, 1),), 2, 256, 4, 75, 10, 8)


class Job(NamedTuple):
    """What one process does.

    Args:
        note: takes the results, a keyword each.
        ready: to be called when all is compiled; returns when the device is free for this process alone.
        size: how much is done.
        omniglot: a file of `--pack`, or None.
        share: `(i, n)`: the process does every nth case, from the ith on.
    """

    note: Note
    ready: Callable[[], None] = at_once
    size: Size = SMALL
    omniglot: Path | None = None
    share: tuple[int, int] = (0, 1)


class Network(nn.Module):
    """Conv4 of MAML's paper with a convolution and a normalisation of choice.

    Args:
        conv: a convolution layer.
        pooling: `"stride"` or `"max"`.
        norm: as in `jmeta.Conv4`.
        dtype: of the computation.
    """

    conv: Callable[..., Any]
    pooling: str = "stride"
    norm: Norm = "transductive"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        strides = (2, 2) if self.pooling == "stride" else (1, 1)
        for i in range(4):
            layer = self.conv(64, (3, 3), strides=strides, use_bias=False, dtype=self.dtype, name=f"conv_{i}")
            x = norm_layer(self.norm)(layer(x), train=train)
            x = nn.relu(x if self.pooling == "stride" else nn.max_pool(x, (2, 2), (2, 2)))
        x = x.mean((1, 2)) if self.pooling == "stride" else x.reshape(len(x), -1)
        return nn.Dense(5, name="head")(x.astype(jnp.float32))


# The convolution as jmeta lowers it, patches and a batched product off the CPU; as its kernels for NVIDIA GPUs, which
# a CPU interprets; and as JAX batches its own, in groups.
LOWERINGS: Mapping[str, Callable[..., Any]] = {
    "patches": jmeta.Conv,
    "pallas": partial(nn.Conv, conv_general_dilated=partial(conv_general_dilated, lowering="pallas")),
    "grouped": partial(nn.Conv, conv_general_dilated=jax.lax.conv_general_dilated),
}


def episodes(queries: int, size: int = 28) -> jmeta.TaskSource:
    """Random pictures of 200 classes: the arithmetic does not depend on what they show."""
    images = np.random.default_rng(0).integers(0, 256, (200 * 20, size, size, 1), dtype=np.uint8)
    return jmeta.from_arrays(images, np.repeat(np.arange(200), 20), ways=5, shots=1, queries=queries)


def seconds(function: Callable[..., Any], *inputs: Any, repeats: int = 5, most: float = 2.0) -> float:
    """Median seconds of a compiled function, fewer times where they sum up to `most`; its first call does not count."""
    jax.block_until_ready(function(*inputs))
    times: list[float] = []
    while len(times) < repeats and sum(times) < most:
        begin = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


PRODUCTS: Mapping[str, tuple[Any, str | None]] = {
    "float32": (jnp.float32, "highest"),
    "TF32": (jnp.float32, None),
    "bfloat16": (jnp.bfloat16, None),
}


def device(job: Job) -> None:
    """What the machine is, and its fastest matrix products and copy."""
    first, n = jax.devices()[0], job.size.matmul
    job.note(kind=first.device_kind, platform=first.platform, jax=jax.__version__, devices=len(jax.devices()))
    job.ready()
    for name, (dtype, precision) in PRODUCTS.items():
        a = jax.random.normal(jax.random.key(0), (n, n), dtype)
        taken = seconds(jax.jit(partial(jnp.matmul, precision=precision)), a, a)
        job.note(product=name, tflops=2 * n**3 / taken / 1e12)
    a = jnp.ones((n, n), jnp.float32)
    job.note(copy_gb_s=2 * a.nbytes / seconds(jax.jit(lambda a: a + 1), a) / 1e9)


def agree(job: Job) -> None:
    """Meta-gradients of the lowerings, of all norms and of a transformer, in float64 and float32, by two adjoints."""
    key, small = jax.random.key(0), job.size.scan <= 2
    source = episodes(3, 16 if small else 28)

    def gradient(module: nn.Module, tasks: jmeta.Task, adjoint: Any) -> np.ndarray:
        learner = jmeta.maml(jmeta.linen(module), inner_rate=0.1, inner_steps=1 if small else 2, adjoint=adjoint)
        params, state = learner.init(key, jax.tree.map(lambda x: x[0], tasks))
        params = jax.tree.map(lambda x: x.astype(tasks.query.targets.dtype), params)
        with jax.default_matmul_precision("highest"):
            got = jax.jit(jax.grad(lambda p: learner.objective(key, p, state, tasks)[0]))(params)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(got)])

    def cast(x: jax.Array, dtype: str) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    networks: dict[str, Callable[[Callable[..., Any]], nn.Module]] = {
        **{
            f"conv4 {pooling}": partial(Network, pooling=pooling)
            for pooling in dict.fromkeys(case[0] for case in job.size.cases)
        },
        "conv4 group norm": partial(Network, norm="group"),
        "transformer": lambda conv: Transformer(),
    }
    i, n = job.share
    for dtype, (name, make) in list(product(("float64", "float32"), networks.items()))[i::n]:
        with jax.enable_x64(dtype == "float64"):
            tasks = jax.vmap(source.sample, (0, None))(jax.random.split(key, 2), source.data)
            tasks = jax.tree.map(partial(cast, dtype=dtype), tasks)
            expected = gradient(make(LOWERINGS["grouped"]), tasks, jmeta.exact())
            for lowering, adjoint in product(LOWERINGS, ("exact", "mixed_mode")):
                if lowering != "grouped" and (lowering == "patches" or dtype == "float32"):
                    got = gradient(make(LOWERINGS[lowering]), tasks, getattr(jmeta, adjoint)())
                    difference = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
                    job.note(dtype=dtype, network=name, lowering=lowering, adjoint=adjoint, difference=difference)


class Transformer(nn.Module):
    """One block of attention over the rows of a picture."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(32)(x.reshape(*x.shape[:2], -1))
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        return nn.Dense(5, name="head")((x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))).mean(1))


class System(NamedTuple):
    """What is timed.

    Args:
        lowering: of the convolution.
        product: the precision of matrix products.
        norm: as in `jmeta.Conv4`.
        adjoint: of the inner loop.
    """

    lowering: str = "patches"
    product: str = "TF32"
    norm: Norm = "transductive"
    adjoint: str = "exact"


def programs(size: Size) -> list[tuple[str, int, int, int, System]]:
    """Pooling, queries, inner steps, tasks and system of all that is timed, the most telling first."""
    usual = [*(System(name) for name in LOWERINGS), System(adjoint="first_order"), System(norm="group")]
    precise = [System(name, "bfloat16") for name in LOWERINGS] + [System(product="float32")]
    first, *others = size.tasks
    every = [(*case, first, system) for case in size.cases for system in usual]
    every += [(*case, first, system) for case in size.cases if case[1:] == size.cases[0][1:] for system in precise]
    scaled = [(*case, tasks) for case in size.cases if case[1:] == size.cases[0][1:] for tasks in others]
    return every + [(*case, System(name)) for case in scaled for name in LOWERINGS]


def speed(job: Job) -> None:
    """Meta-steps of exact and first-order MAML by lowering, precision and number of tasks."""
    i, n = job.share
    compiled = []
    for pooling, queries, inner, tasks, system in programs(job.size)[i::n]:
        about = {"pooling": pooling, "queries": queries, "inner_steps": inner, "tasks": tasks, **system._asdict()}
        source, optimizer = episodes(queries), optax.adam(1e-3)
        dtype, precision = PRODUCTS[system.product]
        try:
            model = jmeta.linen(Network(LOWERINGS[system.lowering], pooling, system.norm, dtype))
            adjoint = getattr(jmeta, system.adjoint)()
            learner = jmeta.maml(model, inner_rate=0.1, inner_steps=inner, adjoint=adjoint)
            start = jmeta.init(jax.random.key(0), learner, optimizer, source)
            step = jmeta.make_step(learner, optimizer, source, tasks=tasks)
            with jax.default_matmul_precision(precision):
                program = jax.jit(partial(jax.lax.scan, step, length=job.size.scan)).lower(start).compile()
            compiled.append((about, program, start))
        except Exception as error:  # a case that does not compile shall not end the others
            job.note(**about, error=f"{type(error).__name__}: {str(error)[:200]}")
    job.ready()
    for about, program, start in compiled:
        try:
            taken = seconds(program, start, repeats=3) / job.size.scan
            cost, memory = program.cost_analysis() or {}, program.memory_analysis()
            job.note(
                **about,
                ms=1e3 * taken,
                tasks_a_second=about["tasks"] / taken,
                temporary_mb=memory.temp_size_in_bytes / 2**20 if memory else None,
                tflops=cost.get("flops", 0.0) / taken / 1e12,  # of a scan XLA counts one step
                gb_s=cost.get("bytes accessed", 0.0) / taken / 1e9,
            )
        except Exception as error:  # as one that does not fit into memory
            job.note(**about, error=f"{type(error).__name__}: {str(error)[:200]}")


def torch(job: Job) -> None:
    """PyTorch on the same device: a loop over tasks, `torch.func.vmap`, and the latter compiled.

    Batch norm is written from primitives, as PyTorch's under `vmap` has a wrong second derivative.
    """
    try:
        import torch as t
    except ImportError as error:
        job.note(skipped=str(error))
        return
    functional = t.nn.functional
    where, small = "cuda" if t.cuda.is_available() else "cpu", job.size.scan <= 2
    t.set_float32_matmul_precision("high")
    t.backends.cudnn.allow_tf32 = True

    def network(p: Any, x: Any, pooling: str) -> Any:
        for i in range(4):
            x = functional.conv2d(x, p[f"w{i}"], stride=2 if pooling == "stride" else 1, padding=1)
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
            x = functional.relu((x - mean) * t.rsqrt(variance + 1e-3))
            x = x if pooling == "stride" else functional.max_pool2d(x, 2)
        return (x.mean((2, 3)) if pooling == "stride" else x.flatten(1)) @ p["head"] + p["bias"]

    def of_task(p: Any, derivative: Any, xs: Any, ys: Any, xq: Any, yq: Any, pooling: str, inner: int) -> Any:
        φ = p
        for _ in range(inner):
            g = derivative(lambda φ: functional.cross_entropy(network(φ, xs, pooling), ys), φ)
            φ = {name: φ[name] - 0.1 * g[name] for name in φ}
        return functional.cross_entropy(network(φ, xq, pooling), yq)

    def mapped(p: Any, xs: Any, ys: Any, xq: Any, yq: Any, *about: Any) -> Any:
        def loss(p: Any) -> Any:
            one = partial(of_task, p, lambda f, φ: t.func.grad(f)(φ))
            return t.func.vmap(lambda xs, xq: one(xs, ys, xq, yq, *about))(xs, xq).mean()

        return t.func.grad(loss)(p)

    def looped(p: Any, xs: Any, ys: Any, xq: Any, yq: Any, *about: Any) -> Any:
        def derivative(f: Any, φ: Any) -> Any:
            return dict(zip(φ, t.autograd.grad(f(φ), list(φ.values()), create_graph=True), strict=True))

        p = {name: x.clone().requires_grad_() for name, x in p.items()}
        for one_support, one_query in zip(xs, xq, strict=True):
            (of_task(p, derivative, one_support, ys, one_query, yq, *about) / len(xs)).backward()
        return {name: x.grad for name, x in p.items()}

    def case(pooling: str, queries: int, tasks: int) -> tuple[Any, ...]:
        p = {f"w{i}": 0.1 * t.randn(64, 1 if i == 0 else 64, 3, 3, device=where) for i in range(4)}
        p |= {"head": 0.1 * t.randn(64, 5, device=where), "bias": t.zeros(5, device=where)}
        xs, xq = t.rand(tasks, 5, 1, 28, 28, device=where), t.rand(tasks, 5 * queries, 1, 28, 28, device=where)
        return p, xs, t.arange(5, device=where), xq, t.arange(5, device=where).repeat_interleave(queries)

    first, *others = job.size.tasks
    every = [(*c, first, name) for name in ("vmap", "loop") for c in job.size.cases]
    usual = [c for c in job.size.cases if c[1:] == job.size.cases[0][1:]]
    every += [(*c, tasks, "vmap") for c in usual for tasks in others]
    every += [] if small else [(*c, first, "vmap, compiled") for c in usual]
    warm = []
    for pooling, queries, inner, tasks, name in every:
        about = {"pooling": pooling, "queries": queries, "inner_steps": inner, "tasks": tasks}
        about |= {"system": f"torch {t.__version__}, {name}"}
        try:
            one = {"vmap": mapped, "loop": looped}.get(name) or t.compile(partial(mapped))
            run = partial(one, *case(pooling, queries, tasks), pooling, inner)
            run()
            warm.append((about, run))
        except Exception as error:  # as in `speed`
            job.note(**about, error=f"{type(error).__name__}: {str(error)[:200]}")
    job.ready()
    for about, run in warm:
        times = []
        for _ in range(2 if small else 5):
            begin = time.perf_counter()
            run()
            if where == "cuda":
                t.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        job.note(**about, ms=1e3 * statistics.median(times))


def train(job: Job) -> None:
    """MAML until 98 % of unseen tasks of Omniglot, or of glyphs without a packed file: seconds, with compilation."""
    file, size = job.omniglot, job.size
    source, unseen = (packed(file, split) if file else jmeta.glyphs(split=split) for split in ("train", "test"))
    learner = jmeta.maml(jmeta.linen(Conv4(outputs=5)), inner_rate=0.4)
    job.ready()
    begin = time.perf_counter()

    def until(train_state: jmeta.TrainState, row: Mapping[str, Any]) -> bool:
        taken = time.perf_counter() - begin
        θ, state = train_state.params, train_state.state
        got = jmeta.evaluate(jax.random.key(1), learner, θ, state, unseen, episodes=size.episodes)
        data = {"data": "omniglot" if file else "glyphs"}
        job.note(**data, step=row["step"], seconds=taken, accuracy=got["accuracy"], ci95=got["ci95"])
        return bool(got["accuracy"] >= 0.98 or time.perf_counter() - begin > size.train_s)

    jmeta.fit(
        jax.random.key(0),
        learner,
        source,
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-3, size.train)),
        steps=size.train,
        tasks=32 if size.scan > 2 else 2,
        log_every=max(1, size.train // 40),
        callback=until,
    )


def reward(job: Job) -> None:
    """The collector and a meta-step of RL²: environment steps a second."""
    from jmeta.rl import Discrete, RecurrentPolicy, bandit

    environments, episodes, pulls = job.size.environments, 10, 10
    source, optimizer = bandit(pulls=pulls), optax.adam(1e-3)
    learner = jmeta.rl2(jmeta.linen(RecurrentPolicy(Discrete(5))), inner_steps=episodes - 1)
    start = jmeta.init(jax.random.key(0), learner, optimizer, source)
    step = jmeta.make_step(learner, optimizer, source, tasks=environments)
    program = jax.jit(partial(jax.lax.scan, step, length=2)).lower(start).compile()
    job.ready()
    taken, steps = seconds(program, start, repeats=3) / 2, environments * episodes * pulls
    about = {"learner": "rl2", "data": "bandit", "tasks": environments}
    job.note(**about, ms=1e3 * taken, environment_steps_a_second=steps / taken)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of each part as a table of Markdown."""
    text = ""
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        names = [name for name in dict.fromkeys(name for row in own for name in row) if name not in ("part", "at_s")]
        text += f"\n{part}\n\n| {' | '.join(names)} |\n|{' --- |' * len(names)}\n"
        for row in own:
            cells = (row.get(name, "") for name in names)
            text += f"| {' | '.join(f'{c:.4g}' if isinstance(c, float) else str(c) for c in cells)} |\n"
    return text


def work(part: str, job: Job, out: Path, begin: float) -> None:
    """One part, or a share of it; what it raises is a result of its own."""

    def note(**row: Any) -> None:
        line = json.dumps({"part": part, **row, "at_s": round(time.time() - begin, 1)})
        print(line, flush=True)
        with out.open("a") as file:
            file.write(line + "\n")

    try:
        globals()[part](job._replace(note=note))
    except Exception:  # one part shall not end the others
        note(error=traceback.format_exc()[-600:])


def in_turn(pipe: Connection, part: str, job: Job, out: Path, begin: float) -> None:
    """A process of its own: tells when it has compiled, and times when it is told to."""
    waits = [True]

    def ready() -> None:
        if waits.pop() if waits else False:
            pipe.send(True)
            pipe.recv()

    work(part, job._replace(ready=ready), out, begin)


def side_by_side(jobs: list[tuple[str, Job]], out: Path, begin: float) -> None:
    """All parts compile at once, each in its process; then they time, one after the other."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # one device holds them all
    context = multiprocessing.get_context("spawn")
    children = []
    for part, job in jobs:
        here, there = context.Pipe()
        children.append((here, context.Process(target=in_turn, args=(there, part, job, out, begin))))
        children[-1][1].start()
        there.close()  # so that a process that ends is heard
    for here, _ in children:
        here.poll(max(0.0, begin + COMPILING_S - time.time()))
    for here, process in children:
        with contextlib.suppress(OSError):  # it has ended
            here.send(True)
        process.join(TIMING_S)
        process.kill()
        process.join()


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs the parts.

    Args:
        arguments: of the command line.

    Returns:
        All results.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--small", action="store_true", help="the small form, for a CPU, in one process")
    parser.add_argument("--omniglot", type=Path, help="a file of --pack, to train on")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write Omniglot into one file, and end")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator.jsonl"))
    flags = parser.parse_args(arguments)
    if flags.pack:
        pack(flags.pack)
        return []
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.unlink(missing_ok=True)
    size, begin = SMALL if flags.small else Size(), time.time()
    if flags.small:
        for part in flags.parts:
            work(part, Job(print, size=size, omniglot=flags.omniglot), flags.out, begin)
    else:
        shares = {"agree": 4, "speed": WORKERS}
        jobs = [
            (part, Job(print, size=size, omniglot=flags.omniglot, share=(i, n)))
            for part in flags.parts
            for n in [shares.get(part, 1)]
            for i in range(n)
        ]
        side_by_side(jobs, flags.out, begin)
    rows = [json.loads(line) for line in flags.out.read_text().splitlines()]
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
