"""What was adapted, in files that are read without the code that found it."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jmeta
from jmeta.export import exported, read_program, read_sealed, write_sealed
from jmeta.runs.registry import LEARNERS

RANDOM = np.random.default_rng(0)
KEY = jax.random.key(0)
SHAPE, WAYS = (6, 6, 1), 3
QUICK = ("maml", "relation", "in_context")  # a network with a head, pairs of queries and classes, attention


class Tiny(nn.Module):
    """A convolution with a norm, and a head."""

    outputs: int | None
    norm: str = "group"
    context: int = 0

    @nn.compact
    def __call__(self, images, train, mask=None):
        x = jmeta.Conv(4, (3, 3), strides=2)(images)
        x = jmeta.models.norms.norm_layer(self.norm, groups=2)(x, train=train, mask=mask).reshape(x.shape[0], -1)
        return jmeta.MLP(self.outputs, hidden=(8,), context=self.context)(x)


def support_and_queries():
    images = RANDOM.normal(size=(WAYS * 2, *SHAPE)).astype(np.float32)
    support = jmeta.Examples(jnp.asarray(images), jnp.eye(WAYS).repeat(2, axis=0), jnp.eye(WAYS, 5))
    return support, RANDOM.normal(size=(7, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in LEARNERS if not LEARNERS[n].acts],
)
def test_every_learner_answers_in_a_program_of_any_number_of_inputs(name):
    entry = LEARNERS[name]
    network = {option: value for option, value in entry.network.items() if option == "context"}
    learner = entry.make(jmeta.linen(Tiny(None if entry.embedding else WAYS, **network)))
    support, queries = support_and_queries()
    batch = jmeta.Examples(support.inputs, jnp.eye(10)[: len(support.inputs)])
    task = jmeta.Task((), batch) if entry.pretrains else jmeta.Task(support, support)
    params, state = jax.jit(learner.init)(KEY, task)
    adapted = jax.jit(learner.adapt)(KEY, params, state, support)
    expected = jax.jit(learner.predict)(KEY, adapted, jnp.asarray(queries))
    program = read_program(exported(lambda x: learner.predict(KEY, adapted, x), SHAPE, np.float32))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    for n in (1, 7):
        if entry.transductive:  # what it says of some is not a part of what it says of all
            expected = jax.jit(learner.predict)(KEY, adapted, jnp.asarray(queries[:n]))
        np.testing.assert_allclose(program.call(queries[:n]), expected[:n], rtol=1e-4, atol=1e-4)


def fitted(norm="group"):
    learner = jmeta.prototypical(jmeta.linen(Tiny(None, norm)))
    support, queries = support_and_queries()
    params, state = learner.init(KEY, jmeta.Task(support, support))
    classifier = jmeta.FewShotClassifier(learner, params, state, queries=7, temperature=2.0)
    return classifier.fit(np.asarray(support.inputs), ["c", "c", "a", "a", "b", "b"]), queries


def without_jmeta(code, *arguments):
    """What a process prints that knows JAX and NumPy alone."""
    refuse = "import sys; sys.modules['jmeta'] = sys.modules['flax'] = None\n"
    done = subprocess.run([sys.executable, "-c", refuse + code, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_an_exported_classifier_answers_in_a_process_that_does_not_import_jmeta(tmp_path):
    classifier, queries = fitted()
    classifier.export(tmp_path / "classifier.stablehlo")
    np.save(tmp_path / "queries.npy", queries)
    answers = without_jmeta(
        "import json, jax, numpy as np\n"
        "program = jax.export.deserialize(bytearray(open(sys.argv[1], 'rb').read()))\n"
        "print(json.dumps([program.call(np.load(sys.argv[2])[:n]).tolist() for n in (7, 1)]))",
        *(str(tmp_path / name) for name in ("classifier.stablehlo", "queries.npy")),
    )
    expected = classifier.predict_proba(queries)
    np.testing.assert_allclose(answers[0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(answers[1], expected[:1], rtol=1e-4, atol=1e-6)


def test_a_saved_classifier_answers_as_it_did_and_tells_that_it_is_adapted(tmp_path):
    classifier, queries = fitted()
    classifier.save(tmp_path / "classifier")
    loaded = jmeta.FewShotClassifier.load(tmp_path / "classifier")
    assert loaded.classes_.tolist() == ["a", "b", "c"] and loaded.queries == 7 and loaded.n_features_in_ == 36
    np.testing.assert_allclose(loaded.predict_proba(queries), classifier.predict_proba(queries), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(loaded.predict(queries), classifier.predict(queries))
    assert loaded.score(queries, classifier.predict(queries)) == 1.0
    with pytest.raises(jmeta.ModelError, match="is adapted already and was loaded without its learner; fit the one"):
        loaded.fit(queries, range(7))
    loaded.save(tmp_path / "again")
    again = jmeta.FewShotClassifier.load(tmp_path / "again")
    np.testing.assert_allclose(again.predict_proba(queries), classifier.predict_proba(queries), rtol=1e-4, atol=1e-6)


def test_a_saved_model_that_is_transductive_says_so_still(tmp_path):
    classifier, queries = fitted("transductive")
    classifier.save(tmp_path / "classifier")
    loaded = jmeta.FewShotClassifier.load(tmp_path / "classifier")
    np.testing.assert_allclose(loaded.predict_proba(queries), classifier.predict_proba(queries), rtol=1e-4, atol=1e-5)
    with pytest.warns(jmeta.TransductiveWarning, match="of 2 at once it is worse than of the 7"):
        loaded.predict(queries[:2])


@pytest.mark.parametrize("flat", [True, False])
def test_a_saved_regressor_answers_in_the_shape_of_its_targets(tmp_path, flat):
    learner = jmeta.maml(jmeta.linen(jmeta.MLP(1, hidden=(4,))), inner_rate=0.01, loss=jmeta.mean_squared_error)
    x, y = RANDOM.normal(size=(6, 2)).astype(np.float32), RANDOM.normal(size=(6, 1)).astype(np.float32)
    params, state = learner.init(KEY, jmeta.Task(jmeta.Examples(jnp.asarray(x), jnp.asarray(y)), ()))
    regressor = jmeta.FewShotRegressor(learner, params, state).fit(x, y[:, 0] if flat else y)
    regressor.save(tmp_path / "regressor")
    loaded = jmeta.FewShotRegressor.load(tmp_path / "regressor")
    assert loaded.predict(x).shape == ((6,) if flat else (6, 1))
    np.testing.assert_allclose(loaded.predict(x), regressor.predict(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(jmeta.CheckpointError, match=r"holds no FewShotClassifier; read it by FewShotRegressor.load"):
        jmeta.FewShotClassifier.load(tmp_path / "regressor")


def test_labels_survive_and_those_that_cannot_are_told(tmp_path):
    x = np.eye(3, dtype=np.float32)
    nearest = jmeta.FewShotClassifier(jmeta.prototypical(jmeta.identity()), {}, {})
    for labels in ([3, -1, 7], [0.5, 1.5, -2.0], np.asarray(["ö", "b", "c"], object), [True, False, True]):
        nearest.fit(x, labels).save(tmp_path / "x")
        np.testing.assert_array_equal(jmeta.FewShotClassifier.load(tmp_path / "x").predict(x), np.asarray(labels))
    mixed = np.empty(3, object)
    mixed[:] = [(1,), (1, 2), (3,)]
    with pytest.raises(jmeta.DataError, match=r"labels as \(1,\) cannot be saved; give text or numbers"):
        nearest.fit(x, mixed).save(tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_a_file_that_is_damaged_or_anothers_is_told(tmp_path):
    classifier, _ = fitted()
    file = tmp_path / "classifier"
    classifier.save(file)
    content = file.read_bytes()
    for name, damaged in {
        "cut": content[: len(content) // 2],
        "flipped": content[:3000] + bytes([content[3000] ^ 1]) + content[3001:],
        "empty": b"",
        "text": b"hello",
    }.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(
            jmeta.CheckpointError, match=f"{name} is damaged, or no file that jmeta saved; save it anew"
        ):
            jmeta.FewShotClassifier.load(tmp_path / name)
    np.savez(tmp_path / "foreign.npz", x=np.arange(3))
    with pytest.raises(jmeta.CheckpointError, match=r"foreign\.npz is damaged, or no file that jmeta saved"):
        jmeta.FewShotClassifier.load(tmp_path / "foreign.npz")
    with pytest.raises(jmeta.CheckpointError, match="none cannot be read"):
        jmeta.FewShotClassifier.load(tmp_path / "none")
    with np.load(file) as stored:
        np.savez(tmp_path / "altered.npz", **{**stored, "classes": stored["classes"][::-1]})
    with pytest.raises(jmeta.CheckpointError, match=r"altered\.npz is damaged"):
        jmeta.FewShotClassifier.load(tmp_path / "altered.npz")
    arrays, about = read_sealed(file)
    write_sealed(file, {**arrays, "program": np.arange(9, dtype=np.uint8)}, about)
    with pytest.raises(jmeta.CheckpointError, match=r"holds a program that jax \S+ cannot read"):
        jmeta.FewShotClassifier.load(file)


def test_a_file_of_a_later_version_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("jmeta.export._FORMAT", 2)
    write_sealed(tmp_path / "x", {}, {})
    monkeypatch.undo()
    with pytest.raises(jmeta.CheckpointError, match=r"x was written by jmeta \S+; install that version or a newer one"):
        read_sealed(tmp_path / "x")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    classifier, _ = fitted()
    (tmp_path / "folder").mkdir()
    for write in (classifier.save, classifier.export):
        with pytest.raises(jmeta.CheckpointError, match=r"nowhere/x cannot be written .*; name another file"):
            write(tmp_path / "nowhere" / "x")
        with pytest.raises(jmeta.CheckpointError, match="folder cannot be written"):
            write(tmp_path / "folder")
    unfitted = jmeta.FewShotClassifier(classifier.learner, classifier.params, classifier.state)
    for write in (unfitted.save, unfitted.export):
        with pytest.raises(jmeta.NotFittedError, match="has no task yet"):
            write(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


class Counting(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x) / float(len(x))


def test_a_network_that_counts_its_inputs_in_python_is_told(tmp_path):
    learner = jmeta.prototypical(jmeta.linen(Counting()))
    x = np.eye(4, dtype=np.float32)
    params, state = learner.init(KEY, jmeta.Task(jmeta.Examples(jnp.asarray(x), jnp.eye(4)), ()))
    classifier = jmeta.FewShotClassifier(learner, params, state).fit(x, range(4))
    with pytest.raises(jmeta.ModelError, match=r"cannot be exported for any number of inputs .*; write x.shape\[0\]"):
        classifier.export(tmp_path / "x")
