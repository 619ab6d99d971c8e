"""Seeds and hyper-parameters as an axis: the numbers of each one's own run."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType

import jmeta
from jmeta.cli import main
from jmeta.compilation import compiled
from jmeta.devices import seeds_of
from jmeta.metrics import seeds_interval
from jmeta.sweep import _cells
from jmeta.train import _run

KEYS = jax.random.split(jax.random.key(0), 2)
UNSEEN = jax.random.key(1)
SOURCE = jmeta.sinusoid(shots=3, queries=3)
FIT = {"steps": 5, "tasks": 4, "log_every": 3}
ASK = {"episodes": 4, "metric": jmeta.mean_squared_error}
MODEL = jmeta.linen(jmeta.MLP(outputs=1, hidden=(4,)))


def make(**values):
    return jmeta.maml(MODEL, **{"inner_rate": 0.01} | values, loss=jmeta.mean_squared_error)


def counting(learner):
    """With the number of meta-steps, an integer, beside its state."""

    def init(key, task):
        params, state = learner.init(key, task)
        return params, {"step": jnp.zeros((), jnp.int32), "model": state}

    def adapt(key, params, state, support):
        return learner.adapt(key, params, state["model"], support)

    def objective(keys, params, state, tasks):
        value, (model, info) = learner.objective(keys, params, state["model"], tasks)
        return value, ({"step": state["step"] + 1, "model": model}, info)

    return learner._replace(init=init, adapt=adapt, objective=objective)


LEARNER = counting(make())
LOOSE = jmeta.implicit(jmeta.conjugate_gradient(2), tolerance=9.0)


def broken_at_times(share):
    """Some tasks are not finite, which ones the key says."""

    def sample(key, data):
        broken = jax.random.bernoulli(jax.random.fold_in(key, 7), share)
        return jax.tree.map(lambda x: jnp.where(broken, jnp.nan, x), SOURCE.sample(key, data))

    return SOURCE._replace(sample=sample)


def images():
    arrays = np.random.default_rng(0).random((20, 8, 8, 1), np.float32), np.repeat(np.arange(5), 4)
    return jmeta.from_arrays(*arrays, ways=3, shots=1, queries=1)


class Convolution(nn.Module):
    """Whose kernels are those of each seed; a bias would move no distance, and have a gradient of rounding alone."""

    @nn.compact
    def __call__(self, x):
        return jmeta.Conv(4, (3, 3), strides=2, use_bias=False)(x).reshape(len(x), -1)


def mesh_of(*axes, kind=AxisType.Auto):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    shape = (2, *(1 for _ in axes[1:]))
    return jax.make_mesh(shape, axes, (kind,) * len(axes), devices=jax.devices()[:2])


def of(i, tree):
    return jax.tree.map(lambda x: x[i], tree)


def assert_near(a, b, rtol=1e-5):
    """Relative to the largest of a leaf."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, float), np.asarray(y, float)
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(np.abs(y).max(initial=0.0), 1e-3))


def assert_own_runs(fitted, singles, rtol=1e-5):
    for i, single in enumerate(singles):
        assert_near(of(i, (fitted.params, fitted.state)), (single.params, single.state), rtol)
        assert_near(of(i, fitted.train_state._replace(key=())), single.train_state._replace(key=()), rtol)
        for row, own in zip(fitted.history, single.history, strict=True):
            assert row.keys() == own.keys()
            assert_near({name: x[i] for name, x in row.items()}, own, rtol)


@pytest.fixture(scope="module")
def singles():
    return [jmeta.fit(key, LEARNER, SOURCE, **FIT) for key in KEYS]


@pytest.fixture(scope="module")
def fitted():
    return jmeta.fit(KEYS, LEARNER, SOURCE, **FIT)


def test_each_seed_has_the_numbers_of_its_own_run(fitted, singles):
    assert_own_runs(fitted, singles)
    assert fitted.state["step"].tolist() == [5, 5] and fitted.state["step"].dtype == jnp.int32
    assert [row["step"] for row in fitted.history] == [[3, 3], [5, 5]]
    assert jnp.array_equal(fitted.train_state.key, jnp.stack([single.train_state.key for single in singles]))


@pytest.mark.parametrize(
    ("axes", "kind"),
    [(("seeds",), AxisType.Explicit), (("seeds", "tasks"), AxisType.Auto)],
)
def test_on_a_mesh(axes, kind, fitted):
    mesh = mesh_of(*axes, kind=kind)
    divided = jmeta.fit(KEYS, LEARNER, SOURCE, mesh=mesh, **FIT)
    assert_near((divided.params, divided.state, divided.history), (fitted.params, fitted.state, fitted.history))
    alone, result = (
        jmeta.evaluate(UNSEEN, LEARNER, one.params, one.state, SOURCE, seeds=2, mesh=on, **ASK)
        for one, on in ((fitted, None), (divided, mesh))
    )
    assert result["mean_squared_error"] == pytest.approx(alone["mean_squared_error"], rel=1e-5)
    assert of(1, divided.params)  # which an array that is divided by Explicit axes would refuse


def test_in_double_precision(float64):
    def cast(dtype, tree):
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def init(key, task):
        return cast(float, make().init(key, cast(jnp.float32, task)))

    learner, source = make()._replace(init=init), SOURCE._replace(sample=lambda *x: cast(float, SOURCE.sample(*x)))
    fitted = jmeta.fit(KEYS, learner, source, **FIT)
    one = jmeta.fit(KEYS[1], learner, source, **FIT)
    assert jax.tree.leaves(one.params)[0].dtype == jnp.float64
    assert_near(of(1, fitted.params), one.params, 1e-10)


def test_of_embeddings_of_images():
    learner, source = jmeta.prototypical(jmeta.linen(Convolution())), images()
    options = {"steps": 2, "tasks": 2, "log_every": 2}
    fitted = jmeta.fit(KEYS, learner, source, **options)
    assert_own_runs(fitted, [jmeta.fit(key, learner, source, **options) for key in KEYS])


def test_a_seed_that_is_not_finite_stops_alone():
    """At the step of its own run, with what that had."""
    keys, source = jax.random.split(jax.random.key(5), 4), broken_at_times(0.05)
    ends = []
    for key in keys:
        try:
            ends.append(jmeta.fit(key, LEARNER, source, **FIT).train_state)
        except jmeta.NonFiniteError as error:
            ends.append(error.train_state)
    steps = [int(end.step) for end in ends]
    assert min(steps) < 5 == max(steps)
    stopped = next(i for i in range(4) if steps[i] < 5)
    with pytest.warns(UserWarning, match=rf"at step {steps[stopped]} of seed {stopped}.*the other seeds go on") as told:
        fitted = jmeta.fit(keys, LEARNER, source, **FIT)
    assert "is not finite: entry" in str(told[0].message)  # what `diagnosis` finds
    assert fitted.train_state.step.tolist() == steps
    for i, end in enumerate(ends):
        assert_near(of(i, (fitted.params, fitted.state)), (end.params, end.state))
    assert np.isfinite(jax.tree.leaves(fitted.params)[0]).all()


def test_no_seed_is_left():
    start = jmeta.init(KEYS, LEARNER, optax.adam(1e-3), SOURCE)
    start = start._replace(params=jax.tree.map(lambda x: x * jnp.nan, start.params))
    with pytest.raises(
        jmeta.NonFiniteError, match=r"at step 0 of seed 0, at step 0 of seed 1: .*no seed is left"
    ) as told:
        jmeta.fit(KEYS, LEARNER, SOURCE, train_state=start, **FIT)
    assert told.value.train_state.step.tolist() == [0, 0]


def test_tasks_that_are_left_out_are_those_of_its_own_run():
    """Also where the optimiser asks for the loss again, of which a task left out has none."""
    options = {"optimizer": jmeta.repeated(optax.adam(1e-2), 2), "skip_nonfinite": True} | FIT
    source = broken_at_times(0.3)
    fitted = jmeta.fit(KEYS, LEARNER, source, **options)
    assert_own_runs(fitted, [jmeta.fit(key, LEARNER, source, **options) for key in KEYS])
    assert np.sum(fitted.history[0]["skipped"]) > 0


def test_going_on(fitted, tmp_path, capsys):
    rows = []
    begun = jmeta.fit(KEYS, LEARNER, SOURCE, **FIT | {"steps": 3})
    jmeta.save(tmp_path / "seeds", begun.train_state)
    restored = jmeta.restore(tmp_path / "seeds", begun.train_state)
    call = {"callback": lambda train_state, row: rows.append(row), "progress": True}
    more = jmeta.fit(KEYS, LEARNER, SOURCE, train_state=restored, **FIT, **call)
    assert "meta-training" in capsys.readouterr().err
    for x, y in zip(jax.tree.leaves(more.params), jax.tree.leaves(fitted.params), strict=True):
        np.testing.assert_array_equal(x, y)
    assert rows == fitted.history[1:]
    with pytest.warns(UserWarning, match="train_state is at step 5 and steps is 5"):
        jmeta.fit(KEYS, LEARNER, SOURCE, train_state=more.train_state, **FIT)


def test_evaluation_of_all_seeds(fitted):
    result = jmeta.evaluate(UNSEEN, LEARNER, fitted.params, fitted.state, SOURCE, seeds=2, **ASK)
    own = [jmeta.evaluate(UNSEEN, LEARNER, *of(i, fitted[:2]), SOURCE, **ASK) for i in range(2)]
    for one, expected in zip(result["results"], own, strict=True):
        assert one == pytest.approx(expected, rel=1e-5)
    a, b = (one["mean_squared_error"] for one in own)
    assert result["mean_squared_error"] == pytest.approx((a + b) / 2, rel=1e-5)
    assert result["ci95"] == pytest.approx(12.706 * abs(a - b) / 2, rel=1e-3)  # t of one degree of freedom
    assert (result["seeds"], result["episodes"], result["shots"]) == (2, 4, 3)
    assert np.isnan(seeds_interval([1.0])[1])
    with pytest.raises(jmeta.ConfigError, match=r"seeds is 3, and '.*' has the shape \[2"):
        jmeta.evaluate(UNSEEN, LEARNER, fitted.params, fitted.state, SOURCE, seeds=3, **ASK)


@pytest.mark.parametrize(
    ("keys", "options", "sentence"),
    [
        (lambda: KEYS[:, None], {}, r"the keys have the shape \[2, 1\]; give one key, or one for each seed"),
        (lambda: KEYS[:0], {}, r"the keys have the shape \[0\]"),
        (lambda: KEYS, {"mesh": ("data",)}, "none is 'seeds' or 'tasks'; name one"),
        (lambda: KEYS[0], {"mesh": ("seeds",)}, "none is 'tasks'; name one"),
        (lambda: jax.random.split(KEYS[0], 3), {"mesh": ("seeds",)}, "do not divide 3 seeds; take 2 or 4 seeds, or a"),
        (lambda: jax.random.split(KEYS[0], 3), {"state": True}, "train_state is of 2 seeds, and there is 3 keys"),
        (lambda: KEYS[0], {"state": True}, "train_state is of 2 seeds, and there is one key; give as many keys"),
    ],
)
def test_what_cannot_be_is_told(keys, options, sentence, fitted):
    given = {"mesh": mesh_of(*options["mesh"])} if "mesh" in options else {}
    given |= {"train_state": fitted.train_state} if "state" in options else {}
    with pytest.raises(jmeta.ConfigError, match=sentence):
        jmeta.fit(keys(), LEARNER, SOURCE, **FIT, **given)


def test_keys_of_the_old_kind():
    assert seeds_of(jax.random.PRNGKey(0)) is None
    assert seeds_of(jnp.stack([jax.random.PRNGKey(0)] * 3)) == 3


FOUR = """
import jax, jmeta, numpy as np
from jax.sharding import AxisType
learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1, hidden=(4,))), inner_rate=0.01, loss=jmeta.mean_squared_error)
keys, source, runs = jax.random.split(jax.random.key(0), 4), jmeta.sinusoid(shots=3, queries=3), []
for shape, axes in (((), ()), ((4,), ("seeds",)), ((2, 2), ("seeds", "tasks"))):
    mesh = jax.make_mesh(shape, axes, (AxisType.Explicit,) * len(axes)) if axes else None
    fitted = jmeta.fit(keys, learner, source, steps=5, tasks=4, mesh=mesh)
    ask = {"episodes": 5, "metric": jmeta.mean_squared_error, "seeds": 4, "mesh": mesh}
    result = jmeta.evaluate(keys[0], learner, fitted.params, fitted.state, source, **ask)
    runs.append((fitted.params, result["mean_squared_error"], result["ci95"]))
for other in runs[1:]:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), other, runs[0])
print("equal")
"""


@pytest.mark.slow
def test_four_devices():
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run([sys.executable, "-c", FOUR], env=environment, capture_output=True, text=True, timeout=500)
    assert done.stdout == "equal\n", done.stderr


def test_a_cell_of_a_sweep_has_the_numbers_of_its_own_run(tmp_path):
    before = compiled(_run)._cache_size()
    options = {**FIT, "evaluation_source": SOURCE, **ASK}
    swept = jmeta.sweep(make, {"inner_rate": [0.001, 0.02]}, KEYS[0], SOURCE, **options)
    assert compiled(_run)._cache_size() == before + 1
    row = swept.rows[1]
    learner = make(**row.values)
    own = jmeta.fit(KEYS[0], learner, SOURCE, **FIT)
    assert row.values == {"inner_rate": 0.02}
    assert_near((row.params, row.state, row.last), (own.params, own.state, own.history[-1]))
    result = jmeta.evaluate(UNSEEN, learner, own.params, own.state, SOURCE, **ASK)
    assert row.evaluation == pytest.approx(result, rel=1e-5)
    assert swept.rows[0].last["loss"] != pytest.approx(row.last["loss"])
    table = swept.table().splitlines()
    assert table[0] == "| inner_rate | step | loss | mean_squared_error |" and len(table) == 4
    swept.plot(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_sweep_in_two_numbers_and_all_seeds(tmp_path):
    """iMAML differentiates by a rule of its own, and a rate of 1e30 stops alone."""
    imaml = functools.partial(jmeta.imaml, MODEL, loss=jmeta.mean_squared_error, inner_steps=2, adjoint=LOOSE)
    values, options = {"inner_rate": [0.01, 1e30], "proximal": [2.0]}, {"steps": 2, "tasks": 2, "log_every": 2}
    with pytest.warns(UserWarning, match="these stopped") as told:
        swept = jmeta.sweep(imaml, values, KEYS, SOURCE, mesh=mesh_of("seeds"), **options)
    sentence = "these stopped before step 2: inner_rate 1e+30, proximal 2."
    assert sentence in " ".join(str(warning.message) for warning in told)
    assert [row.last["step"] for row in swept.rows] == [[2, 2], [0, 0]]
    own = jmeta.fit(KEYS[1], imaml(inner_rate=0.01, proximal=2.0), SOURCE, **options)
    assert_near(of(1, swept.rows[0].params), own.params)
    assert swept.rows[0].evaluation == {} and swept.table().splitlines()[0] == "| inner_rate | proximal | step | loss |"
    swept.plot(tmp_path / "sweep.png")


def test_cells_are_all_combinations():
    cells = [dict(cell) for cell in _cells(lambda a, b: None, {"a": [1, 2], "b": np.linspace(0.5, 1.0, 2)})]
    assert cells == [{"a": 1, "b": 0.5}, {"a": 1, "b": 1.0}, {"a": 2, "b": 0.5}, {"a": 2, "b": 1.0}]


@pytest.mark.parametrize(
    ("made", "values", "sentence"),
    [
        (make, {}, "there is nothing to sweep over"),
        (make, {"inner_rate": []}, r"the values of inner_rate are \[\]; give a list of numbers"),
        (make, {"inner_rate": [True]}, "give a list of numbers"),
        (make, {"inner_rate": [0.1, -0.1]}, "inner_rate is -0.1; give a positive rate"),
        (
            lambda inner_rate: make(inner_rate=inner_rate),
            {"iner_rate": [0.1]},
            "'iner_rate'; did you mean 'inner_rate'",
        ),
        (lambda k: make(inner_steps=int(k)), {"k": [1, 2]}, "it decides what is compiled"),
    ],
)
def test_a_sweep_that_cannot_be_is_told(made, values, sentence):
    with pytest.raises(jmeta.ConfigError, match=sentence):
        jmeta.sweep(made, values, KEYS[0], SOURCE, **FIT)


def test_a_sweep_of_the_command_line(tmp_path, capsys):
    flags = [
        "train",
        "--learner",
        "maml",
        "--data",
        "sinusoid",
        "--steps",
        "3",
        "--tasks",
        "2",
        "--out",
        str(tmp_path / "a"),
    ]
    main([*flags, "--sweep", "inner_rate=0.005,0.01"])
    table = (tmp_path / "a" / "sweep.md").read_text()
    assert table in capsys.readouterr().out and "| 0.005 | 3 |" in table
    stored = json.loads((tmp_path / "a" / "sweep.json").read_text())
    assert stored["rows"][1]["values"] == {"inner_rate": 0.01} and stored["config"]["steps"] == 3
    assert stored["rows"][1]["validation"]["episodes"] == 600
    assert (tmp_path / "a" / "sweep.png").exists()
    for option, sentence in (
        ("iner_rate=1,2", "there is no number of maml to sweep over, 'iner_rate'; did you mean 'inner_rate'"),
        ("inner_rate=high", "write inner_rate=0.1,0.2,0.4"),
        ("inner_rate=0.1,-1", "--inner-rate is -1.0; give a positive number"),
    ):
        with pytest.raises(SystemExit):
            main([*flags[:-1], str(tmp_path / "b"), "--sweep", option])
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
