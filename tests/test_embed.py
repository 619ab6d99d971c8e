"""From pretrained weights to embeddings in a file and to a run that starts from them."""

import csv
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jmeta
from jmeta import cli
from jmeta.data.labelled import Labelled, read_archive, read_sentences
from jmeta.errors import CheckpointError, ConfigError, DataError, ModelError
from jmeta.runs.embedding import Embedder, embed_file
from jmeta.runs.run import read_config
from jmeta.tree import path_name

SMALL = ("--model", "conv4", "--network", "features=2", "groups=1")


def main(*arguments):
    cli.main([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(*arguments)
    return capsys.readouterr().err


def leaves_of(tree):
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def pictures(place):
    random = np.random.default_rng(0)
    for split, names in {"train": "abcd", "test": "ef"}.items():
        for name in names:
            (place / "pictures" / split / name).mkdir(parents=True)
            for i in range(3):
                image = random.integers(0, 255, (16, 16), dtype=np.uint8)
                Image.fromarray(image).save(place / "pictures" / split / name / f"{i}.png")


def test_a_folder_is_embedded_once_and_trained_on(place, capsys):
    pictures(place)
    model = jmeta.linen(jmeta.Conv4(outputs=None, features=2, groups=1))
    images = jmeta.read_images("pictures/test").images
    params, state = model.init(jax.random.key(1), jnp.asarray(jmeta.as_inputs(images[:1])))
    np.savez("weights.npz", **leaves_of(params), **{"head/bias": np.ones(5)})
    command = ("embed", "--data", "pictures", *SMALL, "--from", "weights.npz", "--batch", "4", "--out", "z.npz")
    main(*command)
    out, err = capsys.readouterr()
    assert out == "written to z.npz: 18 embeddings of 2 numbers, 6 classes\n"
    assert "12 of 12 leaves are those of weights.npz" in err
    source = jmeta.from_embeddings("z.npz", split="test", ways=2, shots=1, queries=2)
    assert source.names == ("e", "f")
    np.testing.assert_allclose(source.data.inputs, jmeta.embed(model, params, state, images), atol=1e-5)
    assert jmeta.from_embeddings("z.npz", ways=6, shots=1, queries=2).names == tuple("abcdef")
    config = jmeta.runs.settings.resolve("prototypical", "z.npz")
    assert (config.model, list(config.own["division"]["test"])) == ("mlp", ["e", "f"])
    before = (place / "z.npz").read_bytes()
    main(*command)  # is done
    assert (place / "z.npz").read_bytes() == before
    told = fails(capsys, *command[:-3], "3", "--out", "z.npz", "--size", "8")
    assert "z.npz exists, of other data or another network; choose another --out" in told


def counting(seen, stop=None):
    def rows(x):
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(len(x))
        return np.stack([x, 2 * x], axis=1).astype(np.float32)

    return Embedder(rows, "weights", False)


def test_what_was_killed_goes_on(place):
    found = Labelled(np.arange(1.0, 11.0), np.repeat([0, 1], 5), ["a", "b"])
    out, seen, done = place / "z.npz", [], []

    def embed(embedder, found=found):
        embed_file(out, found, embedder, {"data": "own"}, batch=3, advance=done.append)

    with pytest.raises(KeyboardInterrupt):
        embed(counting(seen, stop=2))
    part = place / "z.npz.rows"
    part.write_bytes(part.read_bytes() + b"cut")  # the row that was being written
    embed(counting(seen))
    assert seen == [3, 3, 3, 1]
    assert done == [0, 3, 6, 6, 9, 10]
    assert [file.name for file in place.iterdir()] == ["z.npz"]
    with np.load(out) as stored:
        np.testing.assert_array_equal(stored["x"][:, 1], 2 * found.inputs)
        assert stored["y"].tolist() == ["a"] * 5 + ["b"] * 5
        assert json.loads(str(stored["about"]))["rows"] == 10
    out.unlink()
    with pytest.raises(KeyboardInterrupt):
        embed(counting([], stop=2))
    seen.clear()
    embed(counting(seen), found._replace(inputs=found.inputs + 1))  # other data begins anew
    assert seen == [3, 3, 3, 1]


def table(place, *rows):
    with (place / "said.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "intent", "part"), *rows])
    return place / "said.csv"


def test_a_table_of_sentences_is_read(place):
    file = table(place, ("pay it", "pay_bill", "train"), ("fly", "book", "test"), ("pay", "pay_bill", "train"))
    found = read_sentences(file, "text", "intent", "part")
    assert (list(found.inputs), found.labels.tolist()) == (["pay it", "fly", "pay"], [1, 0, 1])
    assert (found.names, found.division) == (["book", "pay_bill"], {"train": ["pay_bill"], "test": ["book"]})
    with pytest.raises(DataError, match=r"said\.csv is a table; say by --label COLUMN which of text, intent, part is"):
        read_sentences(file, "text", None)
    with pytest.raises(DataError, match="has no column 'said' for --text; it has text, intent, part"):
        read_sentences(file, "said", "intent")
    with pytest.raises(DataError, match=r"line 2 of .* has no text in column 'text'"):
        read_sentences(table(place, (" ", "a", "train")), "text", "intent")


def test_descriptions_are_the_names_of_the_classes_in_the_order_of_the_labels(place):
    found = Labelled(["x", "yy", "zzz"] * 2, np.asarray([0, 1, 2] * 2), ["pay_bill", "book", "a b c d"])
    found = found._replace(division={"train": ["a b c d"], "test": ["pay_bill", "book"]})
    embedder = Embedder(lambda texts: np.asarray([[len(t), t.count(" ") + 1.0] for t in texts]), "", True)
    embed_file(place / "z.npz", found, embedder, {}, batch=2, advance=lambda done: None)
    stored = read_archive(place / "z.npz")
    assert stored.names == ["a b c d", "book", "pay_bill"]
    np.testing.assert_array_equal(stored.descriptions, [[7, 4], [4, 1], [8, 2]])
    source = jmeta.from_embeddings(place / "z.npz", ways=3, shots=0, queries=1)
    np.testing.assert_array_equal(source.data.descriptions, stored.descriptions)
    tested = jmeta.from_embeddings(place / "z.npz", split="test", ways=2, shots=0, queries=1)
    np.testing.assert_array_equal(tested.data.descriptions, stored.descriptions[1:])


def test_files_that_do_not_fit_are_told(place, capsys):
    table(place, ("pay it", "pay", "train"))
    np.savez("x.npz", x=np.ones((4, 16, 16, 1), np.uint8), y=np.arange(4), z=np.ones(1))
    np.savez("w.npz", **{"Conv_0/kernel": np.ones((3, 3, 1, 2))})
    embed = ("embed", "--out", "z.npz", "--data")
    assert "a table needs an encoder, and --data is said.csv" in fails(capsys, *embed, "said.csv", *SMALL)
    assert "there are no weights to embed by; give a run" in fails(capsys, *embed, "x.npz", *SMALL)
    assert "w.npz does not tell the network; name it by --model" in fails(capsys, *embed, "x.npz", "--from", "w.npz")
    told = fails(capsys, *embed, "x.npz", *SMALL, "--from", "w.npz")
    assert (
        "w.npz has no weights for all of conv4: 1 of 12 leaves are those of w.npz; not there: 0/Conv_1/kernel" in told
    )
    assert "--text is for a .csv or .parquet table" in fails(capsys, *embed, "x.npz", *SMALL, "--text", "a")
    assert "no.npz does not exist" in fails(capsys, *embed, "no.npz", *SMALL)
    assert "--out z.csv is no .npz" in fails(capsys, "embed", "--out", "z.csv", "--data", "x.npz")
    with pytest.raises(DataError, match=r"x\.npz has no split 'test': it has none"):
        jmeta.from_embeddings("x.npz", split="test")
    with pytest.raises(DataError, match=r"x\.npz is a file, which has its labels"):
        jmeta.from_embeddings("x.npz", [1, 2])
    with pytest.raises(DataError, match="arrays need labels and have no split"):
        jmeta.from_embeddings(np.ones((4, 2)))


def test_a_run_starts_from_another_and_tells_what_is_drawn(place, capsys):
    first = jmeta.Run.begin("maml", "sinusoid", tasks=2, steps=2, seed=7)
    first.save("first")
    with pytest.warns(UserWarning, match=r"6 of 12 leaves are those of .*first; not there: 0/rates/Dense_0/bias"):
        run = jmeta.Run.begin("meta_sgd", "sinusoid", tasks=2, steps=2, from_="first")
    jax.tree.map(np.testing.assert_array_equal, run.params["model"], first.params)
    drawn = jmeta.Run.begin("meta_sgd", "sinusoid", tasks=2, steps=2).params
    jax.tree.map(np.testing.assert_array_equal, run.params["rates"], drawn["rates"])

    np.savez("w.npz", **{**leaves_of(first.params), "head/kernel": np.ones((40, 3))})
    command = ("train", "--learner", "maml", "--data", "sinusoid", "--tasks", "2", "--no-report", "--out", "second")
    main(*command, "--steps", "1", "--from", "w.npz")
    told = f"5 of 6 leaves are those of {place}/w.npz; of another shape: 0/head/kernel [40, 3] instead of [40, 1]"
    assert told in capsys.readouterr().err.replace("\n", "")
    assert read_config(place / "second").from_ == str(place / "w.npz")
    (place / "w.npz").unlink()
    assert "was trained with --from" in fails(capsys, *command, "--resume", "--from", "first")
    main(*command, "--resume", "--steps", "2")  # what it started from is no longer needed
    assert (jmeta.load("second").train_state.step, read_config(place / "second").from_) == (2, str(place / "w.npz"))
    shutil.rmtree("second")
    assert "w.npz cannot be read" in fails(capsys, *command, "--from", "w.npz")
    assert not (place / "second").exists()


def test_weights_that_are_none_are_told(place):
    np.savez("w.npz", x=np.ones(3))
    with pytest.raises(
        ModelError, match=r"no weights of .*w\.npz have a name of the network: there are x, and the netw"
    ):
        jmeta.Run.begin("maml", "sinusoid", from_="w.npz")
    with pytest.raises(CheckpointError, match="is no run of jmeta"):
        jmeta.Run.begin("maml", "sinusoid", from_=str(place))
    config = dataclasses.replace(jmeta.runs.settings.resolve("maml", "sinusoid"), from_="x.h5")
    with pytest.raises(ConfigError, match=r"x\.h5 is of no kind that is read"):
        jmeta.runs.training.parts_of(config)
