"""Computation in bfloat16 with parameters in float32: what is computed in which, and that it still learns."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, Jaxpr

import jmeta
from jmeta import cli
from jmeta.models.norms import BatchNorm
from jmeta.runs import settings
from jmeta.runs.registry import LEARNERS

KEY = jax.random.key(0)
WAYS = 3
FLOAT32 = {jnp.dtype("float32")}


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dtypes(tree):
    return {x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


def convolutions(jaxpr):
    """The dtypes of operands and result of each convolution, also in the programs inside."""
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith(("task_conv", "conv_general")):
            yield equation.primitive.name, {x.aval.dtype.name for x in (*equation.invars, *equation.outvars)}
        is_program = lambda x: isinstance(x, ClosedJaxpr | Jaxpr)  # noqa: E731
        for leaf in filter(is_program, jax.tree.leaves(equation.params, is_leaf=is_program)):
            yield from convolutions(getattr(leaf, "jaxpr", leaf))


def distance(tree, other):
    """‖a − b‖ / ‖b‖ over all leaves."""
    a, b = (np.asarray(jax.flatten_util.ravel_pytree(t)[0], np.float64) for t in (tree, other))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def source():
    """Six classes of noisy 16x16 images."""
    random = np.random.default_rng(0)
    means = random.normal(size=(6, 1, 16, 16, 1))
    images = (means + 1.5 * random.normal(size=(6, 10, 16, 16, 1))).reshape(60, 16, 16, 1)
    return jmeta.from_arrays(images, np.repeat(np.arange(6), 10), ways=WAYS, shots=2, queries=4)


def sampled(source, tasks=2):
    return jax.jit(jax.vmap(source.sample, (0, None)))(jax.random.split(KEY, tasks), source.data)


def learner_of(name, dtype, **options):
    entry = LEARNERS[name]
    return entry.make(jmeta.linen(jmeta.Conv4(None if entry.embedding else WAYS, features=8, dtype=dtype, **options)))


def test_convolution_in_bfloat16_has_the_derivatives_of_float32():
    images, along = normal(0, (2, 9, 8, 3)), normal(1, (2, 9, 8, 3))
    params = jmeta.Conv(4, (3, 3)).init(KEY, images)
    directions = jax.tree.map(lambda x: normal(2, x.shape), params)

    def derivatives(params, images, dtype):
        layer = jmeta.Conv(4, (3, 3), strides=2, dtype=dtype)

        def gradient(*at):
            return jax.grad(lambda *at: (layer.apply(*at).astype(jnp.float32) ** 3).sum(), argnums=(0, 1))(*at)

        return layer.apply(params, images), *jax.jvp(gradient, (params, images), (directions, along))

    program = jax.make_jaxpr(derivatives, static_argnums=2)(params, images, jnp.bfloat16)
    used = list(convolutions(program.jaxpr))
    names = {name for name, _ in used}
    assert names == {"task_conv", "task_conv_input_gradient", "task_conv_weight_gradient"}
    assert all(dtypes == {"bfloat16"} for _, dtypes in used)
    low, full = (jax.jit(derivatives, static_argnums=2)(params, images, dtype) for dtype in (jnp.bfloat16, None))
    assert low[0].dtype == jnp.bfloat16 and dtypes(low[1:]) == FLOAT32
    for a, b in zip(low, full, strict=True):
        assert 0 < distance(a, b) < 0.02


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_lowered_convolution_is_in_bfloat16(platform):
    layer = jmeta.Conv(4, (3, 3), use_bias=False, dtype=jnp.bfloat16)
    params, images = layer.init(KEY, jnp.ones((2, 5, 5, 3))), jnp.ones((2, 5, 5, 3))
    gradient = jax.jit(jax.grad(lambda params: (layer.apply(params, images).astype(jnp.float32) ** 2).sum()))
    text = jax.export.export(gradient, platforms=[platform])(params).mlir_module()
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line or "stablehlo.dot_general" in line]
    assert lines and all("bf16>" in line for line in lines)


class Network(nn.Module):
    """A user's own, with Linen's dtypes."""

    outputs: int | None = WAYS

    @nn.compact
    def __call__(self, x, train=True):
        x = jmeta.Conv(8, (3, 3), strides=2, dtype=jnp.bfloat16)(x)
        x = nn.relu(jmeta.BatchNorm(dtype=jnp.bfloat16)(x, train=train))
        x = nn.relu(jmeta.Conv(8, (3, 3), strides=2, dtype=jnp.bfloat16)(x))
        x = x.mean((1, 2)).astype(jnp.float32)
        return x if self.outputs is None else nn.Dense(self.outputs, dtype=jnp.float32, name="head")(x)


MODELS = {
    "transductive": lambda outputs: jmeta.Conv4(outputs, features=8, norm="transductive", dtype="bfloat16"),
    "group": lambda outputs: jmeta.Conv4(outputs, features=8, groups=2, dtype="bfloat16"),
    "per_task": lambda outputs: jmeta.Conv4(outputs, features=8, norm="per_task", scale=True, dtype="bfloat16"),
    "max": lambda outputs: jmeta.Conv4(outputs, features=8, pooling="max", dtype=jnp.bfloat16),
    "mlp": lambda outputs: jmeta.MLP(outputs, dtype=jnp.bfloat16),
    "own": lambda outputs: Network(outputs),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "name",  # the dtype is the network's affair
    ["maml", *(pytest.param(name, marks=pytest.mark.slow) for name in ("prototypical", "fomaml", "anil"))],
)
def test_all_that_is_kept_is_float32_and_all_convolutions_are_bfloat16(name, model, source):
    entry = LEARNERS[name]
    learner = entry.make(jmeta.linen(MODELS[model](None if entry.embedding else WAYS)))
    tasks = sampled(source)
    params, state = jax.eval_shape(learner.init, KEY, jax.tree.map(lambda x: x[0], tasks))

    def everything(params, state):
        task = jax.tree.map(lambda x: x[0], tasks)
        adapted = learner.adapt(KEY, params, state, task.support)
        outputs = learner.predict(KEY, adapted, task.query.inputs)
        return adapted, outputs, jax.value_and_grad(learner.objective, 1, has_aux=True)(KEY, params, state, tasks)

    program, shapes = jax.make_jaxpr(everything, return_shape=True)(params, state)
    assert dtypes((params, state, shapes)) == FLOAT32
    used = [dtypes for _, dtypes in convolutions(program.jaxpr)]
    assert all(dtypes == {"bfloat16"} for dtypes in used) and bool(used) == (model != "mlp")
    assert "bf16" in str(program)


@pytest.mark.parametrize(
    "module", [BatchNorm("per_task"), jmeta.Conv4(features=4, groups=2), jmeta.MLP(outputs=2)], ids=type
)
def test_float32_is_the_default(module):
    model, in_float32 = jmeta.linen(module), jmeta.linen(module.clone(dtype="float32"))
    images = normal(0, (3, 9, 8, 1))
    params, state = model.init(KEY, images)
    ours, theirs = (m.apply(KEY, params, state, images, train=True) for m in (model, in_float32))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_no_dtype_leaves_float64_as_it_is(float64):
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9, 8, 1)))
    for module in (jmeta.Conv4(features=4, norm="per_task"), jmeta.MLP(outputs=2)):
        variables = jax.eval_shape(module.init, KEY, images.astype(jnp.float32))
        variables = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float64), variables)
        assert jax.eval_shape(lambda v: module.apply(v, images, mutable=True)[0], variables).dtype == jnp.float64  # noqa: B023


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_batch_norm_takes_its_statistics_in_float32(dtype):
    x = (normal(0, (64, 8, 8, 3)) * 0.5 + 20).astype(jnp.bfloat16)  # squares and sums in bfloat16 would be far off
    model = jmeta.linen(BatchNorm("per_task", scale=True, dtype=dtype))
    params, state = model.init(KEY, x)
    y, state = model.apply(KEY, params, state, x, train=True)
    assert dtypes((params, state)) == FLOAT32 and y.dtype == (dtype or "float32")
    exact = np.asarray(x, np.float64)
    mean, variance = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    np.testing.assert_allclose(state["task_stats"]["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(state["task_stats"]["var"], variance, rtol=1e-4)
    tolerance = 1e-4 if dtype is None else float(jnp.finfo(dtype).eps)  # one rounding
    np.testing.assert_allclose(
        np.asarray(y, np.float64), (exact - mean) / np.sqrt(variance + 1e-3), rtol=tolerance, atol=1e-4
    )


@pytest.mark.parametrize(
    "adjoint", [jmeta.exact(), jmeta.exact(checkpoint=True), jmeta.mixed_mode(), jmeta.truncated(last=1)],
    ids=["exact", "checkpoint", "mixed_mode", "truncated"],
)  # fmt: skip
def test_meta_gradients_in_bfloat16_are_near_those_of_float32(adjoint, source):
    def network(dtype):
        return jmeta.linen(jmeta.MLP(WAYS, (20,), dtype=dtype))

    tasks = sampled(source)
    params, state = network(None).init(KEY, tasks.support.inputs[0])

    def meta_gradient(dtype, **how):
        learner = jmeta.maml(network(dtype), inner_rate=0.4, inner_steps=2, **how)
        return jax.jit(jax.grad(learner.objective, 1, has_aux=True))(KEY, params, state, tasks)[0]

    low, full = (meta_gradient(dtype, adjoint=adjoint) for dtype in (jnp.bfloat16, None))
    of_first_order = meta_gradient(None, adjoint=jmeta.first_order())
    assert dtypes(low) == FLOAT32
    assert 0 < distance(low, full) < 0.2 * distance(of_first_order, full)


@pytest.mark.parametrize("wrong", ["float8", "int32", jnp.int32, np.dtype("int32"), jnp.float8_e4m3fn, "complex64"])
@pytest.mark.parametrize("module", [BatchNorm, jmeta.Conv4, lambda dtype: jmeta.MLP(1, dtype=dtype)])
def test_a_wrong_dtype_is_told(module, wrong, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users do not run under the type checker
    with pytest.raises(jmeta.ConfigError) as raised:
        module(dtype=wrong)
    name = wrong if isinstance(wrong, str) else jnp.dtype(wrong).name
    assert str(raised.value) == f"dtype is '{name}'; give 'bfloat16', 'float16' or 'float32'."


@pytest.mark.slow
def test_it_learns_images(source):
    learner = learner_of("prototypical", "bfloat16", norm="per_task")
    before, after = (jmeta.fit(KEY, learner, source, steps=steps, tasks=4, log_every=15) for steps in (0, 60))
    results = [jmeta.evaluate(KEY, learner, f.params, f.state, source, episodes=50) for f in (before, after)]
    assert results[0]["accuracy"] < 0.6 < 0.7 < results[1]["accuracy"]
    assert not results[1]["transductive"]
    assert dtypes((after.params, after.state)) == FLOAT32


@pytest.mark.slow
def test_it_learns_waves_as_float32_does():
    def losses(dtype):
        model = jmeta.linen(jmeta.MLP(1, dtype=dtype))
        learner = jmeta.maml(model, inner_rate=0.01, loss=jmeta.mean_squared_error)
        fitted = jmeta.fit(KEY, learner, jmeta.sinusoid(), steps=900, tasks=25, log_every=300)
        return np.asarray([row["loss"] for row in fitted.history])

    low, full = losses("bfloat16"), losses(None)
    assert low[2] < 0.75 * low[0]
    assert not np.array_equal(low, full)
    np.testing.assert_allclose(low, full, rtol=0.05)


# of a run


@pytest.fixture
def run(tmp_path):
    def train(*flags):
        out = tmp_path / "run"
        data = ("--data", "sinusoid", "--tasks", "1", "--steps", "2")
        cli.main(["train", *(() if "--resume" in flags else data), "--no-report", "--out", str(out), *flags])
        return out

    return train


def test_a_run_in_bfloat16_is_evaluated_and_resumed_as_one(run, capsys, monkeypatch):
    folder = run("--dtype", "bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    made = []
    monkeypatch.setattr("jmeta.runs.run.evaluate", lambda key, learner, *rest, **options: made.append(learner) or {})
    run("--resume")
    cli.main(["evaluate", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"
    inputs = jnp.ones((10, 1))
    examples = jmeta.Examples(inputs, inputs)
    params, state = made[-1].init(KEY, jmeta.Task(examples, examples))
    program = jax.make_jaxpr(lambda: made[-1].adapt(KEY, params, state, examples))()
    assert "bf16" in str(program)
    with pytest.raises(SystemExit):
        run("--resume", "--dtype", "float32")
    assert "was trained with --dtype bfloat16, not float32" in capsys.readouterr().err


def test_a_run_from_before_there_was_a_dtype_is_one_in_float32(run, capsys):
    folder = run()
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("dtype") == "float32"
    (folder / "config.json").write_text(json.dumps(config))
    cli.main(["evaluate", str(folder), "--episodes", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["dtype"] == "float32"
    run("--resume", "--dtype", "float32")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


def test_a_setting_of_a_run():
    config = settings.resolve("maml", dtype="bfloat16")
    assert settings.resolve(**dataclasses.asdict(config)) == config
    for wrong in ("int32", "float8"):
        with pytest.raises(jmeta.ConfigError, match=f"there is no dtype '{wrong}'.*float32, bfloat16"):
            settings.resolve(dtype=wrong)


LOW = [jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("targets_dtype", [jnp.float32, None])
def test_metrics_and_losses_of_low_outputs_are_those_of_float32(dtype, targets_dtype):
    """3001 examples are more than either dtype can count."""
    targets = jax.nn.one_hot(jnp.arange(3001) % 5, 5)
    outputs = targets.at[0].set(jnp.roll(targets[0], 1))  # one wrong
    low, low_targets = outputs.astype(dtype), targets.astype(targets_dtype or dtype)
    for function in (jmeta.accuracy, jmeta.softmax_cross_entropy, jmeta.mean_squared_error):
        value = function(low, low_targets)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, function(outputs, targets), rtol=1e-6)
    np.testing.assert_allclose(jmeta.accuracy(low, low_targets), 3000 / 3001, rtol=1e-7)


@pytest.mark.parametrize("dtype", LOW)
def test_average_precision_of_low_outputs_counts_beyond_256(dtype):
    random = np.random.default_rng(0)
    outputs = jnp.stack([jnp.zeros(301), jnp.asarray(random.integers(-9, 9, 301), jnp.float32)], axis=1)
    targets = jax.nn.one_hot(jnp.asarray(random.integers(0, 2, 301)), 2)
    low = jmeta.average_precision_gain(outputs.astype(dtype), targets.astype(dtype))
    np.testing.assert_allclose(low, jmeta.average_precision_gain(outputs, targets), rtol=1e-6)


def test_float64_losses_stay_float64(float64):
    assert jmeta.mean_squared_error(jnp.ones((2, 1)), jnp.zeros((2, 1))).dtype == jnp.float64


def test_means_over_tasks_and_steps_are_float32():
    """A loss of 301 for half of the tasks, and one of 302 for the others, which bfloat16 has not."""

    def one_task(key, params, state, task):
        return task.query.astype(jnp.bfloat16) + 0 * params.astype(jnp.bfloat16), (state, {})

    objective = jmeta.over_tasks(one_task)
    tasks = jmeta.Task((), jnp.asarray([300.0, 302.0]))  # both of which it has
    value = objective(KEY, jnp.ones(()), (), tasks)[0]
    assert value.dtype == jnp.float32 and value == 301.0


def test_a_gradient_over_many_chunks_is_summed_in_float32():
    """1/512 of each of 512 chunks is lost where a sum of bfloat16 is 1/2."""

    def one_task(key, params, state, task):
        return (params * task.query.astype(jnp.bfloat16)).sum().astype(jnp.float32), (state, {})

    learner = jmeta.MetaLearner(
        lambda key, task: (jnp.ones((), jnp.bfloat16), ()), None, None, jmeta.over_tasks(one_task)
    )
    source = jmeta.TaskSource((), lambda key, data: jmeta.Task((), jnp.ones(())), {})
    start = jmeta.init(KEY, learner, optax.sgd(0.5), source)
    new, info = jmeta.make_step(learner, optax.sgd(0.5), source, tasks=512, task_chunk=1)(start, None)
    assert new.params == 0.5 and new.params.dtype == jnp.bfloat16
    np.testing.assert_allclose(info["gradient_norm"], 1.0, rtol=1e-6)


def test_a_history_is_the_mean_of_all_its_steps():
    """Of 1, 2, ..., 400, which a sum in bfloat16 would lose."""

    def objective(key, params, state, tasks):
        return (0 * params).sum(), (state + 1, {"count": (state + 1).astype(jnp.bfloat16)})

    learner = jmeta.MetaLearner(lambda key, task: (jnp.ones(()), jnp.zeros((), jnp.int32)), None, None, objective)
    source = jmeta.TaskSource((), lambda key, data: jmeta.Task((), jnp.ones(())), {})
    fitted = jmeta.fit(KEY, learner, source, steps=400, tasks=1, log_every=400)
    values = np.asarray(jnp.arange(1, 401).astype(jnp.bfloat16), np.float64)
    assert fitted.history[0]["count"] == pytest.approx(values.mean())


def test_a_policy_in_bfloat16_is_credited_in_float32():
    from jmeta.rl import bandit
    from jmeta.rl.policy_gradients import step_mean

    alive = jnp.ones((1, 301), bool)
    assert step_mean(jnp.ones((1, 301), jnp.bfloat16), alive) == 1.0

    class Low(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            return nn.Dense(3, dtype=jnp.bfloat16)(x)

    source = bandit(arms=3, pulls=5)
    learner = jmeta.maml_rl(jmeta.linen(Low()), trajectories=3)
    tasks = jax.jit(jax.vmap(source.sample, (0, None)))(jax.random.split(KEY, 2), source.data)
    params, state = jax.jit(learner.init)(KEY, jax.tree.map(lambda x: x[0], tasks))
    collected = jax.jit(learner.collect)(KEY, params, state, tasks)
    assert dtypes(collected) == FLOAT32
    value, _ = jax.eval_shape(learner.objective, KEY, params, state, collected)
    assert value.dtype == jnp.float32
