"""CLINC150: divisions of the intents, text, and what is out of scope."""

import json

import jax
import numpy as np
import pytest

import jmeta
from jmeta.data.clinc150 import load_clinc150, out_of_scope
from jmeta.errors import ConfigError, DataError


@pytest.fixture
def small(tmp_path):
    """Six intents with twelve utterances each, and two out of scope."""
    intents = [f"intent_{i}" for i in range(6)]
    data = {
        part: [[f"say {intent} number {j}", intent] for intent in intents for j in range(4)]
        for part in ("train", "val", "test")
    }
    data |= {f"oos_{part}": [["what is love", "oos"], [f"odd {part}", "oos"]] for part in ("train", "val", "test")}
    (tmp_path / "data_full.json").write_text(json.dumps(data))
    folds = {f"{fold:02}": {"train": intents[:2], "valid": intents[2:4], "test": intents[4:]} for fold in range(1, 6)}
    (tmp_path / "few_shot_class_splits.json").write_text(json.dumps(folds))
    return tmp_path


def test_a_task_holds_utterances_and_the_names_of_their_intents(small):
    source = jmeta.clinc150(split="test", ways=2, shots=(0, 3), queries=4, folder=small, descriptions="text")
    assert source.names == ("intent 4", "intent 5")
    task = jax.jit(source.sample)(jax.random.key(0), source.data)
    (ids,) = task.support.descriptions
    assert ids.dtype == "int32"
    assert task.query.inputs.shape == (8, 128)
    names = {tuple(row) for row in jmeta.hashed_text(source.names, width=64)}
    assert {tuple(row) for row in np.asarray(ids)} == names
    without = jmeta.clinc150(split="test", ways=2, shots=1, queries=4, folder=small)
    assert jax.jit(without.sample)(jax.random.key(0), without.data).support.descriptions == ()


def test_a_model_of_text_learns_from_it(small):
    learner = jmeta.am3(jmeta.linen(jmeta.TextEncoder(features=8, buckets=2**14)))
    source = jmeta.clinc150(split="train", ways=2, shots=(0, 2), queries=2, folder=small, descriptions="text")
    fitted = jmeta.fit(jax.random.key(0), learner, source, steps=2, tasks=2, log_every=2)
    assert np.isfinite(fitted.history[-1]["loss"])


def test_utterances_out_of_scope_are_inputs_like_the_others(small):
    outside = out_of_scope(split="test", folder=small)
    task = jmeta.clinc150(split="train", ways=2, shots=1, queries=1, folder=small)
    assert outside.shape[1:] == task.sample(jax.random.key(0), task.data).query.inputs.shape[1:]
    assert len(outside) == 2 and (outside[0] != outside[1]).any()
    np.testing.assert_array_equal(outside[0], jmeta.hashed_text(["what is love"], width=128)[0])


def test_what_is_not_there_is_told(small, tmp_path_factory, monkeypatch):
    with pytest.raises(DataError, match=r"CLINC150 is not in .*curl -LO .*data_full.json, then set CLINC150_DIR"):
        jmeta.clinc150(folder=tmp_path_factory.mktemp("empty"))
    with pytest.raises(ConfigError, match="fold is 6; give 1 to 5"):
        jmeta.clinc150(fold=6, folder=small)
    with pytest.raises(ConfigError, match="split is 'dev'; choose one of train, validation, test"):
        jmeta.clinc150(split="dev", folder=small)
    with pytest.raises(ConfigError, match="descriptions is 'attributes'; give 'text' or None"):
        jmeta.clinc150(descriptions="attributes", folder=small)
    monkeypatch.delenv("CLINC150_DIR", raising=False)
    with pytest.raises(DataError, match="CLINC150_DIR, which is not set"):
        jmeta.clinc150()
    monkeypatch.setenv("CLINC150_DIR", str(small))
    assert len(load_clinc150(split="validation").texts) == 24


def test_the_real_data():
    try:
        parts = [load_clinc150(split=split, fold=2) for split in ("train", "validation", "test")]
    except DataError as error:
        pytest.skip(str(error))
    names = [set(part.intents) for part in parts]
    assert [len(part) for part in names] == [50, 50, 50]
    assert len(set.union(*names)) == 150
    assert all((np.bincount(part.labels) == 150).all() for part in parts)
    assert [len(part.out_of_scope) for part in parts] == [100, 100, 1000]
