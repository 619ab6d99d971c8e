"""The compiled step, fit and evaluate."""

import functools
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jmeta
from jmeta.compilation import compiled
from jmeta.models.norms import norm_layer
from jmeta.runs import config
from jmeta.train import _run

KEY = jax.random.key(0)
SOURCE = jmeta.sinusoid(shots=5, queries=5)


def sinusoid_learner(**options):
    model = jmeta.linen(jmeta.MLP(outputs=1, hidden=(8,)))
    return jmeta.maml(model, **{"inner_rate": 0.01, "loss": jmeta.mean_squared_error} | options)


LEARNER = sinusoid_learner()


def conv_source(ways=3):
    images = np.random.default_rng(0).random((40, 8, 8, 1), np.float32)
    return jmeta.from_arrays(images, np.repeat(np.arange(5), 8), ways=ways, shots=1, queries=2)


class Block(nn.Module):
    """One block of Conv4 with its head: what a convolution and a norm do is what four of them do."""

    outputs: int = 3
    norm: str = "group"

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        x = jmeta.Conv(4, (3, 3), strides=2)(x)
        x = nn.relu(norm_layer(self.norm, scale=True, groups=2)(x, train=train, mask=mask))
        return nn.Dense(self.outputs, name="head")(x.reshape(len(x), -1))


def conv_learner(ways=3, **options):
    return jmeta.maml(jmeta.linen(Block(outputs=ways, **options)))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_one_compilation_for_many_chunks_and_a_shorter_last_one():
    learner = sinusoid_learner()
    before = compiled(_run)._cache_size()
    fitted = jmeta.fit(KEY, learner, SOURCE, steps=23, tasks=2, log_every=5)
    assert int(fitted.train_state.step) == fitted.history[-1]["step"] == 23
    jmeta.fit(jax.random.key(1), learner, SOURCE, steps=40, tasks=2, log_every=5)
    assert compiled(_run)._cache_size() == before + 1


def test_a_program_is_traced_once_to_check_it_and_once_to_run_it():
    """Tracing is half of the wait where a network is large."""
    traced = []

    def objective(*args):
        traced.append(args)
        return LEARNER.objective(*args)

    jmeta.fit(KEY, LEARNER._replace(objective=objective), SOURCE, steps=3, tasks=2, log_every=2)
    assert len(traced) == 2


def test_a_step_is_sampling_objective_and_update():
    optimizer = optax.sgd(0.1)
    start = jmeta.init(KEY, LEARNER, optimizer, SOURCE)
    new, info = jax.jit(jmeta.make_step(LEARNER, optimizer, SOURCE, tasks=3, task_chunk=3))(start, None)
    sample_key, objective_key = jax.random.split(jax.random.fold_in(start.key, 0))
    tasks = jax.jit(jax.vmap(SOURCE.sample, (0, None)))(jax.random.split(sample_key, 3), SOURCE.data)
    value = jax.jit(jax.value_and_grad(lambda p: LEARNER.objective(objective_key, p, {}, tasks)[0]))
    loss, gradient = value(start.params)
    np.testing.assert_allclose(info["loss"], loss, rtol=1e-6)
    jax.tree.map(
        lambda p, g, q: np.testing.assert_allclose(p - 0.1 * g, q, rtol=1e-5, atol=1e-6),
        start.params,
        gradient,
        new.params,
    )
    assert int(new.step) == 1


@pytest.mark.parametrize("chunk", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_chunks_of_tasks_give_the_same_step(chunk):
    source, learner, optimizer = conv_source(), conv_learner(), optax.sgd(0.1)
    start = jmeta.init(KEY, learner, optimizer, source)
    steps = [jmeta.make_step(learner, optimizer, source, tasks=6, task_chunk=k) for k in (6, chunk)]
    (a, info_a), (b, info_b) = (jax.jit(step)(start, None) for step in steps)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), (a.params, info_a), (b.params, info_b)
    )


def test_a_chunk_that_does_not_divide_the_tasks_is_refused():
    with pytest.raises(jmeta.ConfigError, match="task_chunk 4 does not divide 6 tasks"):
        jmeta.make_step(LEARNER, optax.sgd(0.1), SOURCE, tasks=6, task_chunk=4)


def test_a_chunk_of_no_tasks_is_refused():
    with pytest.raises(jmeta.ConfigError, match="task_chunk 0 does not divide"):
        jmeta.make_step(LEARNER, optax.sgd(0.1), SOURCE, tasks=6, task_chunk=0)


def test_info_does_not_hide_the_loss_nor_the_step():
    def objective(key, params, state, tasks):
        loss, (state, info) = LEARNER.objective(key, params, state, tasks)
        return loss, (state, {**info, "loss": jnp.zeros(()), "step": jnp.zeros(())})

    fitted = jmeta.fit(KEY, LEARNER._replace(objective=objective), SOURCE, steps=2, tasks=2, log_every=2)
    assert fitted.history[0]["loss"] > 0
    assert fitted.history[0]["step"] == 2


def test_the_same_key_gives_the_same_run_and_another_another():
    runs = [jmeta.fit(jax.random.key(seed), LEARNER, SOURCE, steps=5, tasks=2).params for seed in (0, 0, 1)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_going_on_gives_the_parameters_of_an_uninterrupted_run():
    whole = jmeta.fit(KEY, LEARNER, SOURCE, steps=10, tasks=2, log_every=5)
    half = jmeta.fit(KEY, LEARNER, SOURCE, steps=5, tasks=2, log_every=5)
    rest = jmeta.fit(KEY, LEARNER, SOURCE, steps=10, tasks=2, log_every=5, train_state=half.train_state)
    assert same(whole.params, rest.params)
    assert [row["step"] for row in rest.history] == [10]


def test_a_callback_logs_and_stops():
    seen = []
    fitted = jmeta.fit(
        KEY,
        LEARNER,
        SOURCE,
        steps=10,
        tasks=2,
        log_every=2,
        callback=lambda _, m: seen.append(m["step"]) or len(seen) == 2,
    )
    assert seen == [2, 4]
    assert int(fitted.train_state.step) == 4


@pytest.mark.parametrize("answer", [50, "text", {"loss": 1.0}, [True], np.ones(3, bool), 1.0, np.asarray(1), False])
def test_what_is_no_true_does_not_stop(answer):
    fitted = jmeta.fit(KEY, LEARNER, SOURCE, steps=4, tasks=2, log_every=2, callback=lambda *_: answer)
    assert int(fitted.train_state.step) == 4


@pytest.mark.parametrize("true", [True, np.True_, np.asarray(True), jnp.asarray(True)], ids=repr)
def test_true_at_once_stops_and_is_told(true):
    with pytest.warns(UserWarning, match="returned True, which stops the run at step 2 of 4; to go on"):
        fitted = jmeta.fit(KEY, LEARNER, SOURCE, steps=4, tasks=2, log_every=2, callback=lambda *_: true)
    assert int(fitted.train_state.step) == 2


def test_a_loss_that_becomes_non_finite_stops_with_the_last_good_parameters():
    def sample(key, data):
        task = SOURCE.sample(key, data)
        broken = jax.random.bernoulli(key, 0.1)
        return task._replace(query=task.query._replace(targets=task.query.targets + jnp.where(broken, jnp.nan, 0.0)))

    with pytest.raises(jmeta.NonFiniteError, match="at step") as caught:
        jmeta.fit(KEY, LEARNER, SOURCE._replace(sample=sample), steps=100, tasks=1, log_every=20)
    step = caught.value.step
    assert f"at step {step}" in str(caught.value)
    good = jmeta.fit(KEY, LEARNER, SOURCE, steps=step, tasks=1, log_every=20)
    # Another program, hence other rounding.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        caught.value.train_state.params,
        good.params,
    )


def fails_with(sentence, learner, source=SOURCE, **options):
    with pytest.raises(jmeta.NonFiniteError, match=sentence) as caught:
        jmeta.fit(KEY, learner, source, **{"steps": 3, "tasks": 4, "log_every": 3} | options)
    return caught.value


def test_a_rate_inside_that_is_too_high_is_told_by_the_inner_loss():
    # from θ a step of 1e20, then a square of it
    error = fails_with(
        r"at step 0: the inner loss of 4 tasks of 4 is not finite from inner step 1 on; lower the inner rate\.$",
        sinusoid_learner(inner_rate=1e20, inner_steps=2),
    )
    assert error.step == 0


def test_a_rate_inside_that_ruins_the_answers_alone():
    fails_with("the loss of the queries of 4 tasks of 4 is not finite, though", sinusoid_learner(inner_rate=1e20))


def test_data_that_is_not_finite_is_told_by_its_place():
    def sample(key, data):
        task = SOURCE.sample(key, data)
        return task._replace(query=task.query._replace(targets=task.query.targets.at[3, 0].set(jnp.inf)))

    fails_with(
        r"'query/targets' of task 0 is not finite: entry \[0, 3, 0\], row 3; repair the data",
        LEARNER,
        SOURCE._replace(sample=sample),
    )


def test_a_gradient_that_does_not_exist_names_its_leaf():
    def objective(key, params, state, tasks):
        loss, aux = LEARNER.objective(key, params, state, tasks)
        return loss + jnp.sqrt(jnp.square(params["head"]["bias"] * 0.0).sum()), aux

    fails_with(
        "the gradient of 4 tasks of 4 is not finite, though the loss is, first 'head/bias'; look for a root",
        LEARNER._replace(objective=objective),
    )


def test_an_update_that_is_not_finite_changes_nothing():
    error = fails_with("loss and gradient of each task are finite", LEARNER, optimizer=optax.sgd(np.inf))
    assert same(error.train_state.params, jmeta.init(KEY, LEARNER, optax.sgd(np.inf), SOURCE).params)


def test_low_precision_is_named():
    def init(key, task):
        params, state = jax.jit(LEARNER.init)(key, task)
        return jax.tree.map(lambda x: x.astype(jnp.float16), params), state

    def objective(key, params, state, tasks):
        return LEARNER.objective(key, jax.tree.map(lambda x: x.astype(jnp.float32), params), state, tasks)

    low = LEARNER._replace(init=init, objective=objective)
    fails_with(
        "low precision: 'Dense_0/bias' .float16, whose largest number is 6.55e.04.", low, optimizer=optax.sgd(6e4)
    )


@pytest.mark.parametrize("make", [optax.adam, optax.adamw, optax.lamb])
@pytest.mark.parametrize("adjoint", [jmeta.exact(), jmeta.mixed_mode(), jmeta.truncated(1)])
def test_an_inner_optimiser_without_a_derivative_at_0_is_told_before_the_run(make, adjoint):
    learner = sinusoid_learner(inner_optimizer=make, adjoint=adjoint)
    with pytest.raises(jmeta.ConfigError, match="give it an eps_root"):
        jmeta.init(KEY, learner, optax.adam(1e-3), SOURCE)
    task = jax.jit(SOURCE.sample)(KEY, SOURCE.data)
    learner.adapt(KEY, LEARNER.init(KEY, task)[0], {}, task.support)  # who does not differentiate it may use it


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(optax.adam, eps_root=1e-8),
        functools.partial(optax.adamw, eps_root=1e-8),
        optax.sgd,
        functools.partial(optax.sgd, momentum=0.9),
        optax.rmsprop,
        optax.adagrad,
        optax.adabelief,
        lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate)),
        lambda rate: optax.masked(optax.sgd(rate), {"Dense_0": True, "head": False}),
    ],
)
def test_inner_optimisers_that_can_be_differentiated_train(make):
    jmeta.init(KEY, sinusoid_learner(inner_optimizer=make), optax.adam(1e-3), SOURCE)


def test_first_order_takes_any_inner_optimiser():
    learner = sinusoid_learner(inner_optimizer=optax.adam, adjoint=jmeta.first_order())
    jmeta.fit(KEY, learner, SOURCE, steps=1, tasks=2)


def test_adam_inside_trains_with_an_eps_root():
    """A network with units that are dead: half of its weights have a gradient of exactly 0."""
    fitted = jmeta.fit(
        KEY,
        sinusoid_learner(inner_optimizer=config.INNER_OPTIMIZERS["adam"]),
        SOURCE,
        steps=3,
        tasks=4,
        log_every=3,
    )
    assert np.isfinite(fitted.history[-1]["loss"])


def test_optimisers_with_a_line_search_work():
    fitted = jmeta.fit(KEY, LEARNER, SOURCE, optimizer=optax.lbfgs(), steps=5, tasks=8, log_every=5)
    assert np.isfinite(fitted.history[-1]["loss"])


def lowered_step(platforms):
    source, learner, optimizer = conv_source(), conv_learner(), optax.adam(1e-3)
    start = jmeta.init(KEY, learner, optimizer, source)

    def run(start, data):
        step = jmeta.make_step(learner, optimizer, source._replace(data=data), tasks=2)
        return jax.lax.scan(step, start, length=3)

    return jax.export.export(jax.jit(run), platforms=platforms)(start, source.data)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_training_step_lowers(platform):
    program = lowered_step([platform]).mlir_module()
    assert "callback" not in program
    assert not re.search(r"stablehlo\.(infeed|outfeed|send|recv)", program)


def test_the_training_step_lowers_for_three_platforms_at_once():
    assert lowered_step(["cpu", "cuda", "tpu"]).platforms == ("cpu", "cuda", "tpu")


def test_data_is_an_argument_of_the_program_not_a_constant():
    source = conv_source()
    learner, optimizer = conv_learner(), optax.adam(1e-3)
    start = jmeta.init(KEY, learner, optimizer, source)
    program = compiled(_run).program(
        learner=learner, optimizer=optimizer, sample=source.sample, tasks=2, task_chunk=None, length=3
    )
    text = program.lower(start, source.data, jnp.asarray(3, jnp.int32)).as_text()
    assert not re.search(r"stablehlo.constant dense<\"0x[0-9A-F]{4000,}", text)


def test_evaluate_reports_mean_interval_and_protocol():
    source = conv_source()
    learner = conv_learner()
    fitted = jmeta.fit(KEY, learner, source, steps=1, tasks=1)
    result = jmeta.evaluate(KEY, learner, fitted.params, fitted.state, source, episodes=20)

    def one(key):
        a, b, c = jax.random.split(key, 3)
        task = source.sample(a, source.data)
        adapted = learner.adapt(b, fitted.params, fitted.state, task.support)
        return jmeta.accuracy(learner.predict(c, adapted, task.query.inputs), task.query.targets)

    one = jax.jit(one)
    values = [float(one(key)) for key in jax.random.split(KEY, 20)]
    np.testing.assert_allclose(result["accuracy"], np.mean(values), rtol=1e-6)
    np.testing.assert_allclose(result["ci95"], 1.96 * np.std(values, ddof=1) / np.sqrt(20), rtol=1e-5)
    assert {k: result[k] for k in ("episodes", "ways", "shots", "queries")} == {
        "episodes": 20, "ways": 3, "shots": 1, "queries": 2
    }  # fmt: skip
    assert {"negative_log_likelihood_ci95", "expected_calibration_error_ci95"} < set(result)
    chunked = jmeta.evaluate(KEY, learner, fitted.params, fitted.state, source, episodes=20, task_chunk=7)
    np.testing.assert_allclose(chunked["accuracy"], result["accuracy"], atol=1e-6)


@pytest.mark.parametrize(("policy", "transductive"), [("transductive", True), ("per_task", False)])
def test_transductive_is_measured(policy, transductive):
    source, learner = conv_source(), conv_learner(norm=policy)
    params, state = learner.init(KEY, jax.jit(source.sample)(KEY, source.data))
    result = jmeta.evaluate(KEY, learner, params, state, source, episodes=2)
    assert result["transductive"] is transductive


def wide(outputs, targets):
    return jnp.abs(outputs).mean()


def both(outputs, targets):
    return {"mean_squared_error": jmeta.mean_squared_error(outputs, targets), "wide": wide(outputs, targets)}


@pytest.mark.parametrize("metric", [{"mean_squared_error": jmeta.mean_squared_error, "wide": wide}, both])
def test_several_metrics_each_with_its_interval(metric):
    params, state = LEARNER.init(KEY, jax.jit(SOURCE.sample)(KEY, SOURCE.data))
    result = jmeta.evaluate(KEY, LEARNER, params, state, SOURCE, episodes=9, metric=metric)
    for one in (jmeta.mean_squared_error, wide):
        alone = jmeta.evaluate(KEY, LEARNER, params, state, SOURCE, episodes=9, metric=one)
        assert result[one.__name__] == pytest.approx(alone[one.__name__], rel=1e-5)
        assert result[f"{one.__name__}_ci95"] == pytest.approx(alone["ci95"], rel=1e-4)
    assert "ci95" not in result and result["episodes"] == 9


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        (lambda o, t: np.mean(np.asarray(o)), "metric 'mine' cannot be compiled: it uses NumPy"),
        (lambda o, t: float(o.mean()), "metric 'mine' cannot be compiled"),
        (lambda o, t: o.mean() if o.mean() > 0 else t.mean(), "metric 'mine' cannot be compiled"),
        (lambda o, t: o, r"metric 'mine' has shape \[5, 1\]; give one number for a task"),
        (lambda o, t: {"part": o[0]}, r"metric 'part' has shape \[1\]; give one number"),
    ],
)
def test_a_metric_that_cannot_be_compiled(metric, sentence):
    params, state = LEARNER.init(KEY, jax.jit(SOURCE.sample)(KEY, SOURCE.data))
    with pytest.raises(jmeta.JmetaError, match=sentence):
        jmeta.evaluate(KEY, LEARNER, params, state, SOURCE, episodes=2, metric={"mine": metric})


def test_evaluate_needs_two_episodes():
    params, state = LEARNER.init(KEY, jax.jit(SOURCE.sample)(KEY, SOURCE.data))
    with pytest.raises(jmeta.ConfigError, match="episodes is 1"):
        jmeta.evaluate(KEY, LEARNER, params, state, SOURCE, episodes=1)


def test_an_objective_that_is_not_scalar_is_told():
    learner = LEARNER._replace(objective=lambda key, params, state, tasks: (jnp.zeros(3), (state, {})))
    with pytest.raises(jmeta.ModelError, match="must be a scalar"):
        jmeta.fit(KEY, learner, SOURCE, steps=1)


def test_a_compiler_that_does_not_know_the_options_does_without(monkeypatch):
    monkeypatch.setattr(jmeta.compilation, "_CPU_OPTIONS", {"xla_cpu_no_such_option": True})
    assert jmeta.compiler_options.__wrapped__() is None


def test_progress_is_shown_where_somebody_watches(capsys, monkeypatch):
    learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), loss=jmeta.mean_squared_error)
    train = {"steps": 2, "tasks": 1, "log_every": 1}
    jmeta.fit(KEY, learner, jmeta.sinusoid(), **train)
    assert capsys.readouterr().err == ""
    jmeta.fit(KEY, learner, jmeta.sinusoid(), **train, progress=True)
    assert "2/2" in capsys.readouterr().err
    for kernel, shown in ((None, False), (object(), True)):  # imported, and run in
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda kernel=kernel: kernel))
        jmeta.fit(KEY, learner, jmeta.sinusoid(), **train)
        assert ("2/2" in capsys.readouterr().err) == shown
    monkeypatch.delitem(sys.modules, "IPython")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    jmeta.fit(KEY, learner, jmeta.sinusoid(), **train)
    assert "2/2" in capsys.readouterr().err
    jmeta.fit(KEY, learner, jmeta.sinusoid(), **train, progress=False)
    assert capsys.readouterr().err == ""
