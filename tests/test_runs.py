"""A run as one object, in memory and on disk."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta
from jmeta.runs import settings
from jmeta.runs.report import _column_names
from jmeta.runs.run import read_config

SMALL = {"learner": "maml", "data": "sinusoid", "tasks": 2, "steps": 4}


@pytest.fixture(scope="module")
def run():
    return jmeta.Run.begin(**SMALL).fit()


@pytest.fixture
def folder(run, tmp_path):
    run.save(tmp_path / "run")
    return tmp_path / "run"


def test_a_run_is_loaded_as_it_was_saved(run, folder):
    loaded = jmeta.load(folder)
    assert loaded.config == run.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, run.params)
    assert [row["step"] for row in loaded.history] == [row["step"] for row in run.history] == [1, 2, 3, 4]
    assert loaded.evaluate(episodes=10) == run.evaluate(episodes=10)


def test_a_run_goes_on_as_if_it_had_not_stopped(run):
    again = jmeta.Run.begin(**SMALL).fit(steps=4)

    jax.tree.map(np.testing.assert_array_equal, again.params, run.params)
    more = run.fit(steps=6)
    assert int(more.train_state.step) == 6 and more.config.steps == 6 and run.config.steps == 4
    assert [row["step"] for row in more.history] == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_a_run_on_a_mesh_has_the_numbers_of_one_device(run):
    mesh = jax.make_mesh((2,), ("tasks",), devices=jax.devices()[:2])
    more = jmeta.Run.begin(**SMALL).fit(mesh=mesh)
    assert len(jax.tree.leaves(more.params)[0].devices()) == 2
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), more.params, run.params)
    result, expected = more.evaluate(episodes=5, mesh=mesh), run.evaluate(episodes=5)
    assert result["mean_squared_error"] == pytest.approx(expected["mean_squared_error"], rel=1e-4)


def test_evaluation_is_that_of_the_learner(run):
    result = run.evaluate(episodes=10, seed=3, shots=5)
    source = jmeta.sinusoid(shots=5)
    learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), inner_rate=0.01, loss=jmeta.mean_squared_error)
    expected = jmeta.evaluate(
        jax.random.key(3), learner, run.params, run.state, source, episodes=10, metric=jmeta.mean_squared_error
    )
    np.testing.assert_allclose(result["mean_squared_error"], expected["mean_squared_error"], rtol=1e-5)
    assert (result["learner"], result["split"], result["shots"], result["seed"]) == ("maml", "test", 5, 3)
    with pytest.raises(jmeta.ConfigError, match="there is no split 'tests'"):
        run.evaluate("tests")


def test_a_run_adapts_to_a_task_of_ones_own(run):
    x = np.linspace(-5, 5, 10, dtype=np.float32)[:, None]
    predicted = run.regressor().fit(x, np.sin(x)).predict(x[:3])
    support = jmeta.Examples(jnp.asarray(x), jnp.sin(jnp.asarray(x)))
    adapted = run.learner.adapt(jax.random.key(0), run.params, run.state, support)
    expected = run.learner.predict(jax.random.key(0), adapted, support.inputs[:3])
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-5)


def test_a_folder_of_another_run_is_left_alone(run, folder):
    other = jmeta.Run.begin(**{**SMALL, "inner_rate": 0.02})
    with pytest.raises(jmeta.CheckpointError, match="holds a run of other settings; choose another folder"):
        other.save(folder)
    with pytest.raises(jmeta.CheckpointError, match="is no run of jmeta"):
        jmeta.load(folder / "checkpoint")


@pytest.mark.parametrize(
    ("model", "norm", "now"), [("conv4", "transductive", "conv4-maml"), ("conv4-max", "running", "conv4-maml-max")]
)
def test_a_run_before_the_norm_was_an_argument_keeps_its_network(tmp_path, model, norm, now):
    config = dataclasses.asdict(settings.resolve("maml", "glyphs", model=now, norm=norm))
    del config["norm"], config["network"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": model, "batch_norm": norm}))
    stored = read_config(tmp_path)
    assert (stored.model, stored.norm, stored.network) == (now, norm, {})


def test_a_run_is_shown_in_a_line_and_knows_what_an_episode_has():
    run = jmeta.Run.begin("maml", "sinusoid", tasks=1, steps=7)
    assert repr(run) == "Run(maml on sinusoid, mlp, step 0 of 7)"
    with pytest.raises(jmeta.ConfigError, match="there is no size of an episode 'shot'; did you mean 'shots'"):
        run.evaluate(shot=5)


def test_names_of_classes_are_text_and_no_markup_in_a_report():
    x, labels = np.eye(6, dtype=np.float32), np.repeat([0, 1], 3)
    source = jmeta.from_arrays(x, labels, ways=2, shots=1, queries=1, names=["a<b", "c"])
    names = _column_names(source, jax.jit(source.sample)(jax.random.key(0), source.data))
    assert sorted(names) == ["a&lt;b", "c"]
