import dataclasses
import inspect
import json
from itertools import product

import jax
import numpy as np
import pytest
from PIL import Image

import jmeta
from jmeta.errors import lookup
from jmeta.runs import settings
from jmeta.runs.entries import DataEntry
from jmeta.runs.registry import DATA, LEARNERS, MODELS
from jmeta.runs.run import read_config

QUICK = ("maml_plus_plus", "prototypical", "am3", "transfer")  # one of each family; the others are slow


def test_the_demo_is_maml_on_glyphs():
    config = settings.resolve()
    assert (config.learner, config.data, config.model, config.ways, config.shots, config.queries, config.seed) == (
        *("maml", "glyphs", "conv4"),
        *(5, 1, 15, 0),
    )


def test_given_settings_win_over_data_over_learner_over_library():
    assert settings.resolve("prototypical").model == "conv4-max"
    assert settings.resolve("maml").inner_rate == 0.4
    assert settings.resolve("maml", "sinusoid").inner_rate == 0.01
    assert settings.resolve("maml", "sinusoid", inner_rate=0.02).inner_rate == 0.02


def test_training_episodes_follow_those_of_the_report():
    config = settings.resolve("maml", ways=3, queries=2, inner_steps=4)
    assert (config.train_ways, config.train_queries, config.test_inner_steps) == (3, 5, 4)
    assert settings.resolve("maml", "sinusoid").train_queries == 10
    assert settings.resolve("prototypical", ways=3).train_ways == 20


def test_what_has_no_meaning_is_none():
    assert settings.resolve("prototypical").inner_rate is None
    assert settings.resolve("maml").distance is None
    config = settings.resolve("maml", "sinusoid")
    assert (config.ways, config.train_ways, config.norm) == (None, None, None)


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("data", DATA)
def test_a_resolved_config_resolves_to_itself(learner, data):
    if LEARNERS[learner].acts != (DATA[data].kind == "environment"):
        no_environment = (
            f"{learner} learns by acting in an environment, and {data} is none; use --data point_navigation"
        )
        sentence = (
            no_environment if LEARNERS[learner].acts else f"{data} is an environment, which {learner} cannot learn"
        )
        with pytest.raises(jmeta.ConfigError, match=sentence):
            settings.resolve(learner, data)
        return
    if LEARNERS[learner].descriptions and not DATA[data].descriptions:
        with pytest.raises(
            jmeta.ConfigError, match=f"{learner} reads descriptions of classes and {data} has none; use"
        ):
            settings.resolve(learner, data)
        return
    config = settings.resolve(learner, data, seed=3)
    assert settings.resolve(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"learner": "mamml"}, "there is no learner 'mamml'; did you mean 'maml'"),
        ({"data": "glyph"}, "there is no data set 'glyph'; did you mean 'glyphs'"),
        ({"model": "conv5"}, "there is no model 'conv5'; did you mean 'conv4'"),
        ({"norm": "per_tsk"}, "there is no normalisation 'per_tsk'; did you mean 'per_task'"),
        ({"distance": "cosin"}, "there is no distance 'cosin'; did you mean 'cosine'"),
        ({"learner": "prototypical", "inner_rate": 0.1}, "--inner-rate has no meaning for prototypical"),
        ({"learner": "prototypical", "test_inner_steps": 1}, "--test-inner-steps has no meaning"),
        ({"distance": "cosine"}, "--distance has no meaning for maml"),
        ({"model": "mlp", "norm": "per_task"}, "--norm has no meaning for maml with mlp"),
        ({"data": "sinusoid", "ways": 3}, "--ways has no meaning .* on sinusoid"),
        ({"ways": 3, "train_ways": 5}, "--train-ways must equal --ways"),
        *(
            ({name: value}, f"--{name.replace('_', '-')} is {value}; give a (positive|whole) number")
            for name, value in [
                *(("steps", 0), ("tasks", 0), ("inner_rate", -1.0), ("inner_rate", float("nan")), ("shots", 0)),
                *(("outer_rate", 0.0), ("inner_steps", 0), ("test_inner_steps", -1), ("queries", 0), ("ways", -1)),
            ]
        ),
        ({"inner_optimizer": "adm"}, "there is no inner optimiser 'adm'; did you mean 'adam'"),
        ({"learner": "fomaml", "inner_optimizer": "adam"}, "--inner-optimizer has no meaning for fomaml"),
        ({"batch": 8}, "--batch has no meaning for maml on glyphs"),
        ({"learner": "transfer", "data": "sinusoid", "batch": 8}, "--batch has no meaning for transfer on sinusoid"),
        ({"options": {"proximal": "2"}}, "maml has no options; leave --options away"),
        ({"learner": "imaml", "options": {"proxmal": "2"}}, "there is no option of imaml 'proxmal'; did you mean"),
        ({"learner": "imaml", "options": {"proximal": "much"}}, "--options proximal=much is no float"),
        ({"learner": "transfer", "options": {"body": "2"}}, "--options body=2 is no bool"),
        ({"seed": -1}, "--seed is -1; give a whole number from 0"),
        ({"seed": 2**32}, "--seed is 4294967296"),
    ],
)
def test_bad_settings(flags, sentence):
    with pytest.raises(jmeta.ConfigError, match=sentence):
        settings.resolve(**flags)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("options", [1]),
        ("network", {1: 2}),
        ("steps", "400"),
        ("steps", 400.5),
        ("steps", True),
        ("shots", 1e9),
        ("shots", 10**9),
        ("tasks", 10**9),
        ("train_shots", [5, 1]),
        ("train_shots", [1, 2, 3]),
        ("inner_rate", float("inf")),
        ("inner_rate", float("nan")),
        ("outer_rate", "fast"),
        ("distance", 3),
        ("model", ["mlp"]),
        ("norm", {}),
        ("own", "no"),
        ("seed", 0.5),
        ("patience", -1),
        ("version", "2"),
    ],
)
def test_a_setting_of_another_type_or_range_is_named_wherever_it_comes_from(name, value, tmp_path):
    sentence = rf"--{name.replace('_', '-')} is .*; give "
    with pytest.raises(jmeta.ConfigError, match=sentence):
        settings.resolve("maml", "glyphs", **{name: value})
    stored = {**dataclasses.asdict(settings.resolve("maml", "glyphs")), name: value}
    (tmp_path / "config.json").write_text(json.dumps({**stored, name: []} if name == "network" else stored))
    with pytest.raises(jmeta.CheckpointError, match=sentence):
        read_config(tmp_path)


def test_settings_that_are_no_table_are_damaged(tmp_path):
    for text in ("[" * 100_000, "[]", "7", "null", "{", '{"learner": "maml"}', "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(jmeta.CheckpointError, match=r"config.json is damaged or of another version"):
            read_config(tmp_path)


@pytest.mark.parametrize("data", ["glyphs", "sinusoid"])
@pytest.mark.parametrize(
    ("learner", "model"),
    [
        *(
            pytest.param(name, None, marks=() if name in QUICK else pytest.mark.slow)
            for name, entry in LEARNERS.items()
            if not entry.acts
        ),
        *product(("maml", "prototypical"), ("conv4", "conv4-max", "mlp")),
    ],
)
def test_every_combination_begins_or_says_why_not(learner, data, model):
    def begin():
        ways = {} if data == "sinusoid" else {"ways": 3}
        config = settings.resolve(learner, data, model=model, **ways)
        source = settings.make_source(config, "train" if LEARNERS[learner].pretrains else "test")
        made = settings.make_learner(config, source)
        return jax.eval_shape(lambda: settings.begin(config, made, source))

    inputs = {"sinusoid": ("mlp",), "clinc150": ("mlp", "text")}.get(data, ("conv4", "conv4-max", "mlp"))
    if LEARNERS[learner].descriptions and not DATA[data].descriptions:
        with pytest.raises(jmeta.ConfigError, match="reads descriptions of classes"):
            begin()
    elif data == "sinusoid" and "loss" not in inspect.signature(LEARNERS[learner].make).parameters:
        with pytest.raises(jmeta.ConfigError, match="classifies, but sinusoid is regression; use maml or"):
            begin()
    elif model not in (None, *inputs):
        with pytest.raises(jmeta.ModelError, match=f"{model} cannot take the inputs of {data}|no token ids"):
            begin()
    else:
        assert begin().step.shape == ()


def test_options_of_a_learner_become_values():
    config = settings.resolve("maml_plus_plus", options={"learned_rates": "false", "per_step": "3"})
    assert config.options == {"multi_step_loss": 500, "learned_rates": False, "per_step": 3}
    assert settings.resolve("imaml", options={"proximal": "1"}).options == {"proximal": 1}
    wrong = settings.resolve("maml_plus_plus", options={"per_step": 9})
    source = settings.make_source(wrong, "train")
    with pytest.raises(jmeta.ConfigError, match="per_step is 9, but there are 5 inner steps"):
        settings.make_learner(wrong, source)


def test_pre_training_takes_batches_and_tests_on_episodes():
    config = settings.resolve("transfer", batch=16)
    train, test = (settings.make_source(config, split) for split in ("train", "test"))
    assert train.protocol["batch"] == 16
    assert test.protocol == {"ways": 5, "shots": 1, "queries": 15}


def test_a_regression_has_settings_of_its_own():
    config = settings.resolve("cavia", "sinusoid")
    assert (config.inner_rate, config.inner_steps, config.shots, config.model) == (1.0, 1, 10, "mlp")
    assert settings.resolve("transfer", "sinusoid").options == {"new_head": False}


def test_sources_have_the_ways_and_queries_of_their_split():
    config = settings.resolve("prototypical", ways=3, queries=2)
    train, test = (settings.make_source(config, split).protocol for split in ("train", "test"))
    assert (train["ways"], train["queries"], test["ways"], test["queries"]) == (20, 5, 3, 2)
    assert settings.make_source(config, "test", shots=4).protocol["shots"] == 4


def test_other_ways_than_trained_for():
    assert settings.make_source(settings.resolve("prototypical"), "test", ways=7).protocol["ways"] == 7
    with pytest.raises(jmeta.ConfigError, match="one output for each of its 5 ways, so it cannot take 7"):
        settings.make_source(settings.resolve("maml"), "test", ways=7)
    with pytest.raises(jmeta.ConfigError, match="--ways has no meaning for sinusoid"):
        settings.make_source(settings.resolve("maml", "sinusoid"), "test", ways=7)


def test_inner_steps_of_a_learner_without():
    config = settings.resolve("prototypical")
    with pytest.raises(jmeta.ConfigError, match="--inner-steps has no meaning for prototypical"):
        settings.make_learner(config, settings.make_source(config, "test"), inner_steps=1)


def test_lake_validates_on_training_characters(monkeypatch):
    asked = {}

    def omniglot(**options):
        asked.update(options)
        return jmeta.sinusoid()

    monkeypatch.setattr("jmeta.runs.registry.omniglot", omniglot)
    for split, expected in (("train", "train"), ("validation", "train"), ("test", "test")):
        settings.make_source(settings.resolve("maml", "omniglot-lake"), split)
        assert (asked["split"], asked["protocol"]) == (expected, "lake")
    assert "validates on training characters" in DATA["omniglot-lake"].summary


def test_the_outer_rate_falls_to_zero():
    config = settings.resolve("maml", steps=10, outer_rate=0.5)
    optimizer = settings.make_optimizer(config)
    state = optimizer.init(0.0)
    count = jax.tree.map(lambda x: x + 10 if x.dtype == "int32" else x, state)
    with jax.numpy_dtype_promotion("standard"):
        first, _ = optimizer.update(1.0, state)
        last, _ = optimizer.update(1.0, count)
    assert float(first) == pytest.approx(-0.5, rel=1e-4)
    assert float(last) == 0.0


def test_lookup():
    assert lookup({"a": 1}, "a", "thing") == 1
    with pytest.raises(jmeta.UnknownNameError) as raised:
        lookup({"cat": 1, "dog": 2}, "dig", "animal")
    assert str(raised.value) == "there is no animal 'dig'; did you mean 'dog'? There are cat, dog."


def test_entries_have_a_line_and_a_paper():
    for registry in (LEARNERS, DATA, MODELS):
        for entry in registry.values():
            assert entry.summary and entry.paper and "\n" not in entry.summary
    assert all(isinstance(entry, DataEntry) for entry in DATA.values())


ROBOTS = ("cheetah_velocity", "cheetah_direction", "ant_velocity", "ant_direction", "walker_body")


@pytest.mark.parametrize("learner", [name for name in LEARNERS if LEARNERS[name].acts])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ROBOTS else [])
        for name in DATA
        if DATA[name].kind == "environment"
    ],
)
def test_what_acts_begins_in_every_environment(learner, data):
    if data in ROBOTS:
        pytest.importorskip("brax.envs", reason="pip install jmeta[robotics]")
    config = settings.resolve(learner, data, inner_steps=0)
    source = settings.make_source(config, "test")
    made = settings.make_learner(config, source)
    assert jax.eval_shape(lambda: settings.begin(config, made, source)).step.shape == ()


def test_queries_of_data_of_ones_own_fit_beside_the_place_of_a_shot(tmp_path):
    folder = tmp_path / "own"
    for name in "abcdefgh":
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((6, 6), 60 * i, np.uint8)).save(folder / name / f"{i}.png")
    config = settings.resolve("zero_shot", str(folder))
    assert (config.shots, config.queries) == (0, 3)
    source = settings.make_source(config, "test")
    assert source.sample(jax.random.key(0), source.data).query.inputs.shape[0] == 3 * config.ways
