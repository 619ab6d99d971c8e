"""Episodes from more examples than the device holds are those of the same examples on the device."""

import os
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta
from jmeta.compilation import compiled
from jmeta.data.reading import Reader, Settings
from jmeta.devices import columns_here
from jmeta.feed import KeysOfSteps, Words
from jmeta.train import _run

pytest.importorskip("grain")

KEY = jax.random.key(0)
CLASSES, ROWS = 8, 10
RANDOM = np.random.default_rng(0)
LABELS = RANDOM.permutation(np.repeat(np.arange(CLASSES), ROWS))
# pictures of which those of a class look alike
IMAGES = (RANDOM.integers(0, 200, (CLASSES, 4, 4, 1))[LABELS] + RANDOM.integers(0, 50, (80, 4, 4, 1))).astype(np.uint8)
SIZES = {"ways": 3, "shots": 1, "queries": 2}
LEARNER = jmeta.prototypical(jmeta.linen(jmeta.MLP(outputs=8, hidden=(16,))))
RUN = {"tasks": 4, "log_every": 6, "optimizer": optax.adam(1e-2)}
TASK = 1 << 9  # bytes, somewhat more than a task has


@pytest.fixture
def mapped(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    return np.load(tmp_path / "images.npy", mmap_mode="r")


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def noisy(key, x):
    return x + jax.random.normal(key, x.shape)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"transform": noisy}, marks=pytest.mark.slow),
        {"ways": (2, 3), "shots": (1, 3), "queries": (1, 2)},
        pytest.param(
            {"families": np.repeat([0, 1], 4), "ordered": True, "names": list("abcdefgh")}, marks=pytest.mark.slow
        ),
        pytest.param({"descriptions": np.eye(CLASSES), "shots": 0}, marks=pytest.mark.slow),
        pytest.param({"batch": 5, "transform": noisy}, marks=pytest.mark.slow),
        {"query_balance": 2.0, "transform": noisy},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_tasks_are_those_of_from_arrays(options, mapped):
    stream = jmeta.stream(mapped, LABELS, **{**SIZES, **options})
    whole = jmeta.from_arrays(IMAGES, LABELS, **{**SIZES, **options})
    keys = jax.random.split(KEY, 5)
    data = stream.feed.load(keys)
    assert data.arrays.inputs.dtype == np.uint8  # it is bytes that are copied to the device
    for key in keys:
        assert same(stream.sample(key, data), whole.sample(key, whole.data))
    assert (stream.protocol, stream.names) == (whole.protocol, whole.names)


def test_small_classes_are_dropped_and_other_numbers_are_kept():
    inputs = RANDOM.normal(size=(80, 3))
    labels = np.where(np.arange(80) < 2, 100, LABELS)
    stream, whole = (source(inputs, labels, min_rows=3, **SIZES) for source in (jmeta.stream, jmeta.from_arrays))
    assert same(stream.sample(KEY, stream.feed.load(KEY[None])), whole.sample(KEY, whole.data))
    assert stream.protocol["dropped"] == 1


def test_of_some_rows_the_numbers_are_those_of_all(mapped):
    part = jmeta.split_classes(LABELS, (0.5, 0.5))[1]
    whole = jmeta.from_arrays(IMAGES[part], LABELS[part], **SIZES)
    for rows in (part, np.flatnonzero(part)):
        stream = jmeta.stream(mapped, LABELS, rows=rows, **SIZES)
        task, expected = stream.sample(KEY, stream.feed.load(KEY[None])), whole.sample(KEY, whole.data)
        np.testing.assert_array_equal(task.query.inputs, expected.query.inputs)
        np.testing.assert_array_equal(task.query.rows, np.flatnonzero(part)[expected.query.rows])


def test_training_is_that_of_the_arrays_whatever_the_chunks_and_goes_on_where_it_was(mapped, tmp_path):
    whole = jmeta.fit(KEY, LEARNER, jmeta.from_arrays(IMAGES, LABELS, **SIZES), steps=15, **RUN)
    one_step = jmeta.stream(mapped, LABELS, chunk_bytes=1, **SIZES)
    programs = compiled(_run)._cache_size()
    small = jmeta.fit(KEY, LEARNER, one_step, steps=15, **RUN)
    assert compiled(_run)._cache_size() == programs + 1
    assert [row["step"] for row in small.history] == [6, 12, 15]
    some = jmeta.stream(mapped, LABELS, chunk_bytes=3 * 4 * TASK, **SIZES)
    assert 3 <= some.feed.fits(4) < 6  # of log_every=6 they are 3
    begun = jmeta.fit(KEY, LEARNER, some, steps=8, **RUN)
    jmeta.save(tmp_path / "run", begun.train_state)
    restored = jmeta.restore(tmp_path / "run", begun.train_state)
    rest = jmeta.fit(KEY, LEARNER, some, steps=15, train_state=restored, **RUN)
    unbroken = jmeta.fit(KEY, LEARNER, some, steps=15, **RUN)
    assert same(rest.train_state[1:], unbroken.train_state[1:])
    for fitted in (small, rest):
        difference = jax.tree.map(lambda x, y: np.abs(x - y).max(), fitted.params, whole.params)
        assert max(jax.tree.leaves(difference)) < 1e-6
    np.testing.assert_allclose([row["loss"] for row in small.history], [row["loss"] for row in whole.history], 1e-6)
    assert small.history[-1]["loss"] < 0.8 * small.history[0]["loss"]


def brighter(image):
    return image // 2 + 100


def read(source, steps=range(7), length=3, mesh=None, tasks=4):
    return list(source.feed.chunks(KeysOfSteps(Words.of(KEY), tasks), steps, tasks, length, mesh))


@pytest.mark.slow
def test_processes_read_what_threads_read(mapped):
    threads, processes = (jmeta.stream(mapped, LABELS, decode=brighter, workers=n, **SIZES) for n in (0, 2))
    chunks = read(threads)
    assert same(chunks, read(processes)) and len(chunks) == 3
    assert same(chunks[1], read(threads, range(3, 6))[0])  # as if the run had been broken off after three steps
    assert {chunk.arrays.inputs.shape for chunk in chunks} == {(3, 4, 9, 4, 4, 1)}  # the last step fills up the last
    assert chunks[0].arrays.inputs.min() >= 100
    with jax.enable_x64(True):
        settings = Settings.now()
    with settings.on_host():
        assert jnp.zeros(()).dtype == jnp.float64


def test_another_process_opens_the_file_instead_of_getting_its_bytes(mapped):
    np.save(mapped.filename, np.arange(200_000, dtype=np.int16).reshape(-1, 2))
    for part in (slice(None), slice(30_000, None), slice(7, 50_000)):
        array = np.load(mapped.filename, mmap_mode="r")[part]
        sent = pickle.dumps(Reader(array, None))
        assert len(sent) < 2000
        rows = np.asarray([[0, 5], [-1, 2]])
        np.testing.assert_array_equal(pickle.loads(sent)(rows), array[rows])


def test_a_table_a_picture_and_records_are_examples():
    from PIL import Image

    class Table(list):
        column_names = ("image", "label")

        def __getitem__(self, i):
            return LABELS.tolist() if i == "label" else super().__getitem__(i)

    pictures = [Image.fromarray(image[..., 0]) for image in IMAGES]
    records = [image.tobytes() for image in IMAGES]
    table = [{"image": picture, "label": int(label)} for picture, label in zip(pictures, LABELS, strict=True)]
    whole = jmeta.from_arrays(IMAGES, LABELS, **SIZES)
    expected = whole.sample(KEY, whole.data)
    for source in (
        jmeta.stream(table, "label", **SIZES),
        jmeta.stream(Table(table), "label", **SIZES),
        jmeta.stream(pictures, LABELS, **SIZES),
        jmeta.stream(records, LABELS, decode=lambda x: np.frombuffer(x, np.uint8).reshape(4, 4, 1), **SIZES),
    ):
        assert same(source.sample(KEY, source.feed.load(KEY[None])), expected)


def test_evaluation_in_parts_is_that_of_the_arrays(mapped):
    whole = jmeta.from_arrays(IMAGES, LABELS, **SIZES)
    start = jmeta.init(KEY, LEARNER, optax.sgd(0.1), whole)

    def evaluated(source, **options):
        options = {"episodes": 20, "details": True} | options
        return jmeta.evaluate(KEY, LEARNER, start.params, start.state, source, **options)

    expected = evaluated(whole)
    for chunk_bytes, options in ((1 << 28, {}), (7 * TASK, {"task_chunk": 3})):
        found = evaluated(jmeta.stream(mapped, LABELS, chunk_bytes=chunk_bytes, **SIZES), **options)
        assert found.pop("details") == expected["details"]
        assert found == pytest.approx({name: x for name, x in expected.items() if name != "details"}, rel=1e-6)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.slow
def test_devices_and_hosts_get_their_own_tasks(mapped):
    mesh = jax.make_mesh((2,), ("tasks",), devices=jax.devices()[:2])
    whole = jmeta.from_arrays(IMAGES, LABELS, **SIZES)
    stream = jmeta.stream(mapped, LABELS, chunk_bytes=2 * 4 * TASK, **SIZES)
    fitted = [jmeta.fit(KEY, LEARNER, source, steps=6, mesh=mesh, **RUN) for source in (stream, whole)]
    np.testing.assert_allclose(*(fit.history[0]["loss"] for fit in fitted), rtol=1e-6)
    start = fitted[0].train_state
    options = {"episodes": 7, "mesh": mesh, "task_chunk": 2}
    results = [jmeta.evaluate(KEY, LEARNER, *start[2:4], source, **options) for source in (stream, whole)]
    assert results[0] == pytest.approx(results[1], rel=1e-6)

    chunk = read(stream, mesh=mesh)[0].arrays.inputs
    single = read(stream)[0].arrays.inputs
    np.testing.assert_array_equal(chunk, single)
    assert [x.data.shape[:2] for x in chunk.addressable_shards] == [(3, 2), (3, 2)]
    hosts = [columns_here(mesh, 4, lambda device, host=host: device == host) for host in jax.devices()[:2]]
    assert hosts == [[0, 1], [2, 3]]
    keys = KeysOfSteps(Words.of(KEY), 4)(0)
    shares = [stream.feed.load(keys[np.asarray(host)]).arrays.inputs[0] for host in hosts]
    np.testing.assert_array_equal(np.concatenate(shares), single[0])


def test_a_task_that_was_not_read_is_no_number_and_a_bare_step_is_refused(mapped):
    stream = jmeta.stream(mapped, LABELS, **SIZES)
    assert jnp.isnan(stream.sample(KEY, stream.data).query.targets).all()
    assert jnp.isnan(stream.sample(jax.random.key(0, impl="rbg"), stream.data).query.targets).all()
    with pytest.raises(jmeta.ConfigError, match=r"make_step takes no stream.*jmeta\.fit"):
        jmeta.make_step(LEARNER, optax.sgd(0.1), stream)


class Broken:
    """Examples of which one is wrong."""

    def __init__(self, wrong):
        self.wrong = wrong

    def __len__(self):
        return 80

    def __getitem__(self, i):
        if i != 70:
            return IMAGES[i].astype(np.float32)
        if isinstance(self.wrong, Exception):
            raise self.wrong
        return self.wrong(IMAGES[i].astype(np.float32)) if callable(self.wrong) else os._exit(3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (KeyError("gone"), "example 70 cannot be read: 'gone'"),
        (IndexError("the file ends at 70"), "example 70 cannot be read: the file ends at 70"),
        (
            lambda x: x[:2],
            r"example 70 is float32\[2, 4, 1\], and example 0 float32\[4, 4, 1\]; bring all to one shape",
        ),
        (lambda x: x.astype(np.uint8), r"example 70 is uint8\[4, 4, 1\], and example 0 float32"),
        (lambda x: x * np.nan, "example 70 is not finite"),
        (lambda x: "text", "example 70 is a str and no array of numbers; make one of it by decode="),
        (lambda x: {"a": x}, "example 70 has a, and none of image, inputs, img; pick one by decode="),
    ],
)
def test_a_broken_example_is_named(wrong, message):
    source = jmeta.stream(Broken(wrong), LABELS, **SIZES)
    with pytest.raises(jmeta.DataError, match=message) as caught:
        read(source, range(100), tasks=8)
    assert isinstance(wrong, Exception) == isinstance(caught.value.__cause__, LookupError)


def test_what_a_worker_raises_arrives():
    source = jmeta.stream(Broken(KeyError("gone")), LABELS, workers=1, **SIZES)
    with pytest.raises(jmeta.DataError, match="example 70 cannot be read: 'gone'") as caught:
        read(source, range(100), tasks=8)
    assert isinstance(caught.value.__cause__, KeyError)
    assert "in __getitem__" in caught.value.__cause__.__notes__[0]  # where in the user's code it was


@pytest.mark.slow
def test_a_worker_that_dies_is_told():
    source = jmeta.stream(Broken(None), LABELS, workers=1, **SIZES)
    with pytest.raises(jmeta.DataError, match="a worker process of the stream has ended"):
        read(source, range(100), tasks=8)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((IMAGES[:70], LABELS), {}, "there are 70 examples but 80 labels"),
        ((iter(IMAGES), LABELS), {}, "examples are a .*iterator, which has no length"),
        ((IMAGES, LABELS), {"ways": 9}, "9 ways need 9 classes, but there are 8"),
        ((IMAGES, LABELS), {"queries": 10}, r"class 0 has 10 examples, but 1 shots \+ 10 queries need 11"),
        ((IMAGES, "label"), {}, "examples have no entry 'label' to be their label"),
        ((IMAGES[..., 0], LABELS), {}, "may be pictures or numbers; give pictures a channel axis"),
        ((IMAGES, LABELS), {"rows": [0, 80]}, r"rows are int64\[2\]; give numbers from 0 to 79, or \[80\] booleans"),
        ((IMAGES, LABELS), {"workers": -1}, "workers is -1"),
        ((IMAGES, LABELS), {"chunk_bytes": 0}, "chunk_bytes is 0"),
    ],
)
def test_what_cannot_be_is_told_at_once(arguments, options, message):
    with pytest.raises(jmeta.JmetaError, match=message):
        jmeta.stream(*arguments, **{**SIZES, **options})


def test_a_missing_grain_gives_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(jmeta.ConfigError, match=r"jmeta\.stream needs grain: pip install grain"):
        jmeta.stream(IMAGES, LABELS)
