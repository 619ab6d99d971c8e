"""Tasks over the devices of a mesh; that every learner has the numbers of one is in test_conformance_meshes."""

import contextlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import jmeta
from jmeta.cli import main
from jmeta.devices import devices_of
from jmeta.rl import Discrete, bandit
from jmeta.runs.run import read_rows
from jmeta.runs.settings import resolve
from jmeta.runs.training import on_all_cores

KEY = jax.random.key(0)
TASKS = 4

pytestmark = pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")


def mesh_of(kind=AxisType.Auto, devices=2, axis="tasks"):
    return jax.make_mesh((devices,), (axis,), axis_types=(kind,), devices=jax.devices()[:devices])


def exact(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def started(learner, optimizer, source):
    """In float64."""
    start = jmeta.init(KEY, learner, optimizer, source)
    params, state = exact((start.params, start.state))
    return start._replace(params=params, state=state, optimizer_state=optimizer.init(params))


def of_exact(source):
    return source._replace(sample=lambda key, data: exact(source.sample(key, data)))


def path(learner, optimizer, source, start, mesh, steps=3, **options):
    """θ, the state and the info after each step."""
    step = jmeta.make_step(learner, optimizer, source, tasks=TASKS, mesh=mesh, **options)

    def one(carry, _):
        new, info = step(carry, None)
        return new, (new.params, new.state, info)

    return jax.jit(lambda start: jax.lax.scan(one, start, length=steps)[1])(start)


def difference(a, b):
    """The largest of all leaves, relative to the size of the leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    pairs = [(np.asarray(x, float), np.asarray(y, float)) for x, y in pairs]
    return max(np.abs(x - y).max(initial=0.0) / max(np.abs(y).max(initial=0.0), 1e-3) for x, y in pairs)


def linear(skips=False):
    """A regression whose meta-gradient is quickly compiled; of which some tasks are not finite."""
    learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1, hidden=(4,))), inner_rate=0.01, loss=jmeta.mean_squared_error)
    source = jmeta.sinusoid(shots=3, queries=3)

    def sample(key, data):
        task = source.sample(key, data)
        broken = jax.random.bernoulli(jax.random.fold_in(key, 7), 0.4)
        return jax.tree.map(lambda x: jnp.where(broken, jnp.nan, x), task)

    return learner, source._replace(sample=sample) if skips else source


OPTIMIZERS = {
    "lbfgs": optax.lbfgs(),
    "repeated": jmeta.repeated(optax.adam(1e-2), 3),
    "trust_region": jmeta.trust_region(0.1),
}


def constrained(learner):
    """With a divergence in its info whose curvature is another one for each task."""

    def one_task(key, params, state, task):
        tasks = jax.tree.map(lambda x: x[None], task)
        value, (state, info) = learner.objective(key[None], params, state, tasks)
        moved = jax.tree.map(lambda x: jnp.square(x - jax.lax.stop_gradient(x)).sum(), params)
        return value, (state, {**info, "kl": jnp.square(task.query.targets).mean() * sum(jax.tree.leaves(moved))})

    return learner._replace(objective=jmeta.over_tasks(one_task))


@pytest.mark.parametrize("skip", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "name", ["repeated", *(pytest.param(x, marks=pytest.mark.slow) for x in ("lbfgs", "trust_region"))]
)
def test_optimisers_that_ask_for_the_loss_again(float64, name, skip):
    learner, source = linear(skip)
    learner = constrained(learner)
    start = started(learner, OPTIMIZERS[name], linear()[1])
    given = (learner, OPTIMIZERS[name], of_exact(source), start)
    alone, divided = (path(*given, mesh, skip_nonfinite=skip) for mesh in (None, mesh_of()))
    assert difference(divided, alone) < 1e-6
    assert bool(jnp.isfinite(alone[2]["loss"]).all())
    assert difference(jax.tree.map(lambda x: x[-1], alone[0]), start.params) > 1e-3  # it moves
    if skip:
        skipped = alone[2]["skipped"]
        np.testing.assert_array_equal(divided[2]["skipped"], skipped)
        assert 0 < skipped.sum() < TASKS * len(skipped)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("within", [False, True])
def test_fit_and_evaluate_on_every_kind_of_mesh(kind, within):
    learner, source = linear()
    mesh = mesh_of(kind)
    fit = {"steps": 3, "tasks": TASKS, "log_every": 2}
    ask = {"episodes": 9, "metric": jmeta.mean_squared_error}

    def run(mesh):
        fitted = jmeta.fit(KEY, learner, source, mesh=mesh, **fit)
        more = jmeta.fit(KEY, learner, source, mesh=mesh, train_state=fitted.train_state, **fit | {"steps": 4})
        result = jmeta.evaluate(KEY, learner, more.params, more.state, source, mesh=mesh, **ask)
        return more, {name: x for name, x in result.items() if name != "transductive"}

    alone, expected = run(None)
    with jax.set_mesh(mesh) if within else contextlib.nullcontext():
        divided, found = run(mesh)
    assert difference((divided.params, divided.history), (alone.params, alone.history)) < 1e-4
    assert found == pytest.approx(expected, rel=1e-4)
    # each device holds all of θ, and the same
    for leaf in jax.tree.leaves(divided.train_state.params):
        one, other = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        np.testing.assert_array_equal(one, other)
    again = jmeta.evaluate(KEY, learner, divided.params, divided.state, source, **ask)
    assert again["mean_squared_error"] == pytest.approx(expected["mean_squared_error"], rel=1e-4)


def lowered(learner, source, mesh, **options):
    start = jmeta.init(KEY, learner, optax.adam(1e-3), source)
    step = jmeta.make_step(learner, optax.adam(1e-3), source, tasks=TASKS, mesh=mesh)
    return jax.jit(lambda start: jax.lax.scan(step, start, length=2)).trace(start).lower(**options)


@pytest.mark.slow
def test_epochs_of_ppo_end_with_one_policy():
    learner = jmeta.rl2(jmeta.linen(jmeta.rl.RecurrentPolicy(Discrete(3))), inner_steps=0)
    optimizer, source = jmeta.repeated(optax.adam(1e-2), 3), bandit(arms=3, pulls=3)
    fit = {"optimizer": optimizer, "steps": 3, "tasks": TASKS}
    alone, divided = (jmeta.fit(KEY, learner, source, mesh=mesh, **fit) for mesh in (None, mesh_of()))
    assert difference((divided.params, divided.history), (alone.params, alone.history)) < 1e-4
    for leaf in jax.tree.leaves(divided.train_state._replace(key=())):
        one, other = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        np.testing.assert_array_equal(one, other)


def test_what_is_not_finite_is_told_as_on_one_device():
    learner, source = linear(skips=True)
    with pytest.raises(jmeta.NonFiniteError, match="is not finite: entry") as told:
        jmeta.fit(KEY, learner, source, steps=9, tasks=TASKS, mesh=mesh_of())
    assert told.value.train_state.step == told.value.step


def test_one_all_reduce_a_step():
    program = lowered(*linear(), mesh_of()).compile().as_text()
    assert program.count(" all-reduce(") + program.count(" all-reduce-start(") == 1
    for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {other}(" not in program


def test_a_step_on_a_mesh_lowers_for_accelerators():
    for platform in ("cuda", "tpu"):
        text = lowered(*linear(), mesh_of(), lowering_platforms=(platform,)).as_text()
        assert "all_reduce" in text


@pytest.mark.parametrize(
    ("mesh", "options", "sentence"),
    [
        (
            lambda: mesh_of(axis="data"),
            {},
            r"the axes of the mesh are \('data',\), and none is 'tasks'; name one",
        ),
        (
            mesh_of,
            {"tasks": 5},
            "2 devices of the mesh do not divide 5 tasks; take 4 or 6 tasks a step, or a",
        ),
        (mesh_of, {"tasks": 1}, "do not divide 1 tasks; take 2 tasks a step"),
        (mesh_of, {"task_chunk": 4}, "task_chunk 4 does not divide 2 tasks of each device; choose a divisor"),
    ],
)
def test_a_mesh_that_cannot_work_is_told(mesh, options, sentence):
    with pytest.raises(jmeta.ConfigError, match=sentence):
        jmeta.fit(KEY, *linear(), steps=1, mesh=mesh(), **{"tasks": TASKS} | options)


def test_evaluation_on_a_mesh_that_cannot_work_is_told():
    learner, source = linear()
    with pytest.raises(jmeta.ConfigError, match="none is 'tasks'"):
        jmeta.evaluate(KEY, learner, {}, (), source, episodes=4, mesh=mesh_of(axis="data"))
    with pytest.raises(jmeta.ConfigError, match=r"mesh is a int; give a mesh of devices: jax.make_mesh\("):
        devices_of(2)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_twenty_steps_and_an_evaluation_on_eight_devices():
    learner, source = linear()
    runs = []
    for mesh in (None, mesh_of(devices=2), mesh_of(devices=8)):
        fitted = jmeta.fit(KEY, learner, source, steps=20, tasks=16, optimizer=optax.sgd(0.01), mesh=mesh)
        ask = {"episodes": 20, "metric": jmeta.mean_squared_error, "mesh": mesh}
        result = jmeta.evaluate(KEY, learner, fitted.params, fitted.state, source, **ask)
        runs.append((fitted.params, result["mean_squared_error"], result["ci95"]))
    for other in runs[1:]:
        assert difference(other, runs[0]) < 1e-4


@pytest.mark.slow
def test_a_run_on_devices_goes_on_with_as_many(tmp_path, capsys):
    """`--devices` is recorded, gives the numbers of one device, and is kept unless another number is given."""
    flags = ["train", "--learner", "maml", "--data", "sinusoid", "--tasks", "4", "--no-report"]
    rows = {}
    for devices in ("1", "2"):
        out = tmp_path / devices
        main([*flags, "--steps", "4", "--devices", devices, "--out", str(out)])
        rows[devices] = read_rows(out)[-1]
        assert json.loads((out / "config.json").read_text())["devices"] == int(devices)
    for name in ("loss", "validation"):
        assert rows["2"][name] == pytest.approx(rows["1"][name], rel=1e-4)
    main(["train", "--resume", "--no-report", "--steps", "6", "--out", str(out)])
    assert read_rows(out)[-1]["step"] == 6
    evaluated = f"import jmeta; print(jmeta.load({str(out)!r}).evaluate(episodes=3)['episodes'])"
    alone = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run([sys.executable, "-c", evaluated], env=alone, capture_output=True, text=True, timeout=300)
    assert done.stdout == "3\n", done.stderr
    main(["train", "--resume", "--no-report", "--steps", "8", "--devices", "1", "--out", str(out)])
    assert "devices 2 -> 1" in capsys.readouterr().err and read_rows(out)[-1]["step"] == 8
    with pytest.raises(SystemExit):
        main([*flags, "--devices", "99", "--out", str(tmp_path / "99")])
    assert f"there are {jax.device_count()} devices, not 99; ask for at most" in capsys.readouterr().err
    assert not (tmp_path / "99").exists()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) != 2, reason="of two cores")
@pytest.mark.parametrize(
    ("data", "flags", "devices"),
    [
        ("glyphs", {"tasks": 8}, 2),
        ("glyphs", {"tasks": 3}, None),  # which two cores do not divide
        ("glyphs", {"tasks": 8, "devices": 1}, 1),
        ("sinusoid", {"tasks": 8}, None),  # a few numbers, which are computed together
    ],
)
def test_a_run_of_the_command_line_has_one_device_a_core(data, flags, devices):
    assert on_all_cores(resolve("maml", data, **flags)).devices == devices
