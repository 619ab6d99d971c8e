"""jmeta on one accelerator: `python -m benchmarks.accelerator [--parts ...] [--omniglot FILE]`, eight minutes on a GPU.

It needs jax, flax, optax and NumPy of any version from 0.11 of JAX on, no network and no data set; PyTorch is compared
with where it is installed. A line of JSON a result goes to the screen and to `--out`, so that a run that is cut keeps
what it has; each part stands alone. `--pack FILE` writes Omniglot into one file, for a machine without
tensorflow-datasets.
"""

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jmeta
from benchmarks.packed import pack, packed
from jmeta.models.networks import Conv4
from jmeta.models.norms import Norm, norm_layer

PARTS = ("device", "agree", "speed", "torch", "train", "reward")
Note = Callable[..., None]


class Size(NamedTuple):
    """How much is done: on an accelerator, or in the small form that a CPU does in half a minute."""

    tasks: tuple[int, ...] = (4, 32, 256)
    cases: tuple[tuple[str, int, int], ...] = tuple(product(("stride", "max"), (15, 1), (1, 5)))
    scan: int = 20
    matmul: int = 8192
    train: int = 20_000
    episodes: int = 600
    environments: int = 4096


SMALL = Size((2,), (("stride", 1, 1),), 2, 256, 4, 10, 8)


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


# The convolution as jmeta lowers it, patches and a batched product off the CPU, and as JAX batches its own, in groups.
LOWERINGS: Mapping[str, Callable[..., Any]] = {
    "patches": jmeta.Conv,
    "grouped": partial(nn.Conv, conv_general_dilated=jax.lax.conv_general_dilated),
}


def episodes(queries: int, size: int = 28) -> jmeta.TaskSource:
    """Random pictures of 200 classes: the arithmetic does not depend on what they show."""
    images = np.random.default_rng(0).integers(0, 256, (200 * 20, size, size, 1), dtype=np.uint8)
    return jmeta.from_arrays(images, np.repeat(np.arange(200), 20), ways=5, shots=1, queries=queries)


def seconds(function: Callable[..., Any], *inputs: Any, repeats: int = 5) -> float:
    """Median seconds of a compiled function; its first call does not count."""
    jax.block_until_ready(function(*inputs))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


PRODUCTS: Mapping[str, tuple[Any, str | None]] = {
    "float32": (jnp.float32, "highest"),
    "TF32": (jnp.float32, None),
    "bfloat16": (jnp.bfloat16, None),
}


@cache
def peak(product: str, n: int) -> float:
    """FLOP/s of a matrix product of a precision."""
    dtype, precision = PRODUCTS[product]
    a = jnp.ones((n, n), dtype)
    return 2 * n**3 / seconds(jax.jit(partial(jnp.matmul, precision=precision)), a, a)


@cache
def bandwidth(n: int) -> float:
    """Bytes a second of a copy."""
    a = jnp.ones((n, n), jnp.float32)
    return 2 * a.nbytes / seconds(jax.jit(lambda a: a + 1), a)


def device(note: Note, size: Size, omniglot: Path | None) -> None:
    """What the machine is, and its fastest matrix products and copy."""
    first = jax.devices()[0]
    note(kind=first.device_kind, platform=first.platform, jax=jax.__version__, devices=len(jax.devices()))
    for name in PRODUCTS:
        note(product=name, tflops=peak(name, size.matmul) / 1e12)
    note(copy_gb_s=bandwidth(size.matmul) / 1e9)


def agree(note: Note, size: Size, omniglot: Path | None) -> None:
    """Meta-gradients of both lowerings, of all norms and of a transformer, in float64 and float32, by two adjoints."""
    key, source = jax.random.key(0), episodes(3, 28 if size.scan > 2 else 16)
    steps = (1, 3) if size.scan > 2 else (1,)
    poolings = ("stride", "max") if size.scan > 2 else ("stride",)

    def gradient(module: nn.Module, tasks: jmeta.Task, inner: int, adjoint: Any) -> np.ndarray:
        learner = jmeta.maml(jmeta.linen(module), inner_rate=0.1, inner_steps=inner, adjoint=adjoint)
        params, state = learner.init(key, jax.tree.map(lambda x: x[0], tasks))
        params = jax.tree.map(lambda x: x.astype(tasks.query.targets.dtype), params)
        with jax.default_matmul_precision("highest"):
            got = jax.jit(jax.grad(lambda p: learner.objective(key, p, state, tasks)[0]))(params)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(got)])

    def cast(x: jax.Array, dtype: str) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    for dtype in ("float64", "float32"):
        with jax.enable_x64(dtype == "float64"):
            tasks = jax.vmap(source.sample, (0, None))(jax.random.split(key, 2), source.data)
            tasks = jax.tree.map(partial(cast, dtype=dtype), tasks)
            networks: dict[str, Callable[[Callable[..., Any]], nn.Module]] = {
                **{f"conv4 {pooling}": partial(Network, pooling=pooling) for pooling in poolings},
                "conv4 group norm": partial(Network, norm="group"),
                "transformer": lambda conv: Transformer(),
            }
            for name, make in networks.items():
                for inner in steps:
                    expected = gradient(make(LOWERINGS["grouped"]), tasks, inner, jmeta.exact())
                    for adjoint in ("exact", "mixed_mode"):
                        got = gradient(make(LOWERINGS["patches"]), tasks, inner, getattr(jmeta, adjoint)())
                        difference = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
                        note(dtype=dtype, network=name, inner_steps=inner, adjoint=adjoint, difference=difference)


class Transformer(nn.Module):
    """One block of attention over the rows of a picture."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(32)(x.reshape(*x.shape[:2], -1))
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        return nn.Dense(5, name="head")((x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))).mean(1))


def systems() -> Iterator[tuple[str, Callable[..., Any], Any, Any, str | None]]:
    """Name, convolution, dtype, adjoint and precision of what is timed."""
    for lowering, conv in LOWERINGS.items():
        yield f"{lowering}, TF32", conv, None, jmeta.exact(), None
        yield f"{lowering}, bfloat16", conv, jnp.bfloat16, jmeta.exact(), None
    yield "patches, float32", jmeta.Conv, None, jmeta.exact(), "highest"
    yield "patches, first order, TF32", jmeta.Conv, None, jmeta.first_order(), None


def speed(note: Note, size: Size, omniglot: Path | None) -> None:
    """Meta-steps of exact and first-order MAML by lowering, precision and number of tasks."""
    for (pooling, queries, inner), tasks in ((case, tasks) for case in size.cases for tasks in size.tasks):
        about = {"pooling": pooling, "queries": queries, "inner_steps": inner, "tasks": tasks}
        source, optimizer = episodes(queries), optax.adam(1e-3)
        for name, conv, dtype, adjoint, precision in systems():
            try:
                model = jmeta.linen(Network(conv, pooling, dtype=dtype))
                learner = jmeta.maml(model, inner_rate=0.1, inner_steps=inner, adjoint=adjoint)
                start = jmeta.init(jax.random.key(0), learner, optimizer, source)
                step = jmeta.make_step(learner, optimizer, source, tasks=tasks)
                with jax.default_matmul_precision(precision):
                    begin = time.perf_counter()
                    program = jax.jit(partial(jax.lax.scan, step, length=size.scan)).lower(start).compile()
                compiled_in = time.perf_counter() - begin
                s = seconds(program, start, repeats=3) / size.scan
                cost, memory = program.cost_analysis() or {}, program.memory_analysis()
                note(
                    **about,
                    system=name,
                    ms=1e3 * s,
                    tasks_a_second=tasks / s,
                    compile_s=compiled_in,
                    temporary_mb=memory.temp_size_in_bytes / 2**20 if memory else None,
                    # of a scan XLA counts one step
                    share_of_peak=cost.get("flops", 0.0) / s / peak(name.rpartition(", ")[2], size.matmul),
                    share_of_bandwidth=cost.get("bytes accessed", 0.0) / s / bandwidth(size.matmul),
                )
            except Exception as error:  # a case that does not fit into memory shall not end the others
                note(**about, system=name, error=f"{type(error).__name__}: {str(error)[:200]}")


def torch(note: Note, size: Size, omniglot: Path | None) -> None:
    """torch.func on the same device, eager and compiled; batch norm from primitives, as its vmapped one is wrong."""
    try:
        import torch as t
    except ImportError as error:
        note(skipped=str(error))
        return
    functional = t.nn.functional
    where = "cuda" if t.cuda.is_available() else "cpu"

    def network(p: Any, x: Any, pooling: str) -> Any:
        for i in range(4):
            x = functional.conv2d(x, p[f"w{i}"], stride=2 if pooling == "stride" else 1, padding=1)
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
            x = functional.relu((x - mean) * t.rsqrt(variance + 1e-3))
            x = x if pooling == "stride" else functional.max_pool2d(x, 2)
        return (x.mean((2, 3)) if pooling == "stride" else x.flatten(1)) @ p["head"] + p["bias"]

    def gradient(p: Any, xs: Any, ys: Any, xq: Any, yq: Any, pooling: str, inner: int) -> Any:
        def task(xs: Any, xq: Any) -> Any:
            φ = p
            for _ in range(inner):
                g = t.func.grad(lambda φ: functional.cross_entropy(network(φ, xs, pooling), ys))(φ)
                φ = {name: φ[name] - 0.1 * g[name] for name in φ}
            return functional.cross_entropy(network(φ, xq, pooling), yq)

        return t.func.vmap(task)(xs, xq).mean()

    for (pooling, queries, inner), tasks in ((case, tasks) for case in size.cases for tasks in size.tasks):
        about = {"pooling": pooling, "queries": queries, "inner_steps": inner, "tasks": tasks}
        for name, compiles in (("eager", False), ("torch.compile", True)):
            if compiles and size.scan <= 2:
                continue
            try:
                t.set_float32_matmul_precision("high")
                t.backends.cudnn.allow_tf32 = True
                p = {f"w{i}": 0.1 * t.randn(64, 1 if i == 0 else 64, 3, 3, device=where) for i in range(4)}
                p |= {"head": 0.1 * t.randn(64, 5, device=where), "bias": t.zeros(5, device=where)}
                xs, xq = t.rand(tasks, 5, 1, 28, 28, device=where), t.rand(tasks, 5 * queries, 1, 28, 28, device=where)
                ys, yq = t.arange(5, device=where), t.arange(5, device=where).repeat_interleave(queries)
                one = t.func.grad(partial(gradient, pooling=pooling, inner=inner))
                one = t.compile(one) if compiles else one
                times = []
                for _ in range(3 if size.scan <= 2 else 8):
                    begin = time.perf_counter()
                    one(p, xs, ys, xq, yq)
                    if where == "cuda":
                        t.cuda.synchronize()
                    times.append(time.perf_counter() - begin)
                note(**about, system=f"torch.func {t.__version__}, {name}", ms=1e3 * statistics.median(times[2:]))
            except Exception as error:  # as in `speed`
                note(**about, system=name, error=f"{type(error).__name__}: {str(error)[:200]}")


def train(note: Note, size: Size, omniglot: Path | None) -> None:
    """MAML until 98 % of unseen tasks of Omniglot, or of glyphs without a packed file: seconds, with compilation."""
    source, unseen = (packed(omniglot, split) if omniglot else jmeta.glyphs(split=split) for split in ("train", "test"))
    learner = jmeta.maml(jmeta.linen(Conv4(outputs=5)), inner_rate=0.4)
    steps, begin = size.train, time.perf_counter()
    tasks = 32 if size.scan > 2 else 2

    def until(train_state: jmeta.TrainState, row: Mapping[str, Any]) -> bool:
        θ, state = train_state.params, train_state.state
        got = jmeta.evaluate(jax.random.key(1), learner, θ, state, unseen, episodes=size.episodes)
        note(
            data="omniglot" if omniglot else "glyphs",
            step=row["step"],
            seconds=time.perf_counter() - begin,
            accuracy=got["accuracy"],
            ci95=got["ci95"],
        )
        return bool(got["accuracy"] >= 0.98)

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    every = max(1, steps // 20)
    jmeta.fit(
        jax.random.key(0),
        learner,
        source,
        optimizer=optimizer,
        steps=steps,
        tasks=tasks,
        log_every=every,
        callback=until,
    )


def reward(note: Note, size: Size, omniglot: Path | None) -> None:
    """The collector and a meta-step of RL²: environment steps a second."""
    from jmeta.rl import Discrete, RecurrentPolicy, bandit

    episodes, pulls = 10, 10
    source, optimizer = bandit(pulls=pulls), optax.adam(1e-3)
    learner = jmeta.rl2(jmeta.linen(RecurrentPolicy(Discrete(5))), inner_steps=episodes - 1)
    start = jmeta.init(jax.random.key(0), learner, optimizer, source)
    step = jmeta.make_step(learner, optimizer, source, tasks=size.environments)
    program = jax.jit(partial(jax.lax.scan, step, length=2)).lower(start).compile()
    s = seconds(program, start, repeats=3) / 2
    steps = size.environments * episodes * pulls
    note(learner="rl2", data="bandit", tasks=size.environments, ms=1e3 * s, environment_steps_a_second=steps / s)


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


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs the parts, one after the other.

    Args:
        arguments: of the command line.

    Returns:
        All results.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--small", action="store_true", help="the small form, for a CPU")
    parser.add_argument("--omniglot", type=Path, help="a file of --pack, to train on")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write Omniglot into one file, and end")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accelerator.jsonl"))
    flags = parser.parse_args(arguments)
    if flags.pack:
        pack(flags.pack)
        return []
    rows: list[dict[str, Any]] = []
    begin = time.monotonic()
    for part in flags.parts:

        def note(*, part: str = part, **row: Any) -> None:
            rows.append({"part": part, **row, "at_s": round(time.monotonic() - begin, 1)})
            print(json.dumps(rows[-1]), flush=True)
            with flags.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")

        try:
            globals()[part](note, SMALL if flags.small else Size(), flags.omniglot)
        except Exception:  # one part shall not end the others
            note(error=traceback.format_exc()[-600:])
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
