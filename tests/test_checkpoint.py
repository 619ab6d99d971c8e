import functools
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta
from jmeta.files import write_whole
from jmeta.runs.checkpoint import latest_step


@functools.cache
def fresh(**network):
    learner = jmeta.maml(
        jmeta.linen(jmeta.MLP(**{"outputs": 1, "hidden": (4,), **network})), loss=jmeta.mean_squared_error
    )
    return jmeta.init(jax.random.key(0), learner, optax.adam(1e-3), jmeta.sinusoid())


def begin(step=0, **network):
    return fresh(**network)._replace(step=jnp.asarray(step, jnp.int32))


def leaves(train_state):
    data = train_state._replace(key=jax.random.key_data(train_state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(data)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for step in (3, 7):
        jmeta.save(folder, begin(step))
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoint")


def files(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_restores_bit_for_bit(folder):
    restored = jmeta.restore(folder, begin())
    assert leaves(restored) == leaves(begin(7))
    assert restored.key == begin().key


def test_restores_from_shapes_alone(folder):
    assert leaves(jmeta.restore(folder, jax.eval_shape(begin))) == leaves(begin(7))


def test_keeps_the_last_two(folder):
    jmeta.save(folder, begin(9))
    assert sorted(path.name for path in folder.iterdir()) == ["7", "9"]


def test_replaces_this_step_and_later_ones(folder):
    other = begin(3)._replace(params=jax.tree.map(lambda x: x + 1.0, begin().params))
    jmeta.save(folder, other)
    assert latest_step(folder) == 3
    assert leaves(jmeta.restore(folder, begin())) == leaves(other)


def test_no_checkpoint(tmp_path):
    assert latest_step(tmp_path / "missing") is None
    with pytest.raises(jmeta.CheckpointError, match="there is no checkpoint"):
        jmeta.restore(tmp_path / "missing", begin())
    assert not any(tmp_path.iterdir())


def test_a_kill_in_the_middle_of_a_write_leaves_the_one_before(folder):
    (folder / "7" / "seal.json").unlink()  # killed before the seal
    shutil.copytree(folder / "7" / "default", folder / "8.orbax-checkpoint-tmp" / "default")  # killed inside Orbax
    assert latest_step(folder) == 3
    assert leaves(jmeta.restore(folder, begin())) == leaves(begin(3))
    jmeta.save(folder, begin(7))
    assert leaves(jmeta.restore(folder, begin())) == leaves(begin(7))


def spoil_truncate(content):
    return content[: len(content) // 2]


def spoil_flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def spoil_remove(content):
    return None


@pytest.mark.parametrize("spoil", [spoil_truncate, spoil_flip, spoil_remove])
def test_every_damaged_file_is_told_in_one_sentence(folder, spoil, capfd):
    whole = files(folder / "7")
    assert len(whole) > 5
    for file, content in whole.items():
        spoiled = spoil(content)
        if file.name == "seal.json" and spoiled is None:
            continue  # not sealed: as if killed before the end
        file.unlink() if spoiled is None else file.write_bytes(spoiled)
        before = files(folder)
        with pytest.raises(
            jmeta.CheckpointError,
            match=r"^the checkpoint .*7 is damaged; remove it to go back to step 3, which is whole\.$",
        ):
            jmeta.restore(folder, begin())
        assert files(folder) == before
        file.write_bytes(content)
    assert leaves(jmeta.restore(folder, begin())) == leaves(begin(7))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("network", "leaf"),
    [
        ({"hidden": (5,)}, r"Dense_0/bias float32\[4\], where the run has float32\[5\]"),
        ({"hidden": (4, 4)}, r"Dense_1/bias missing, where the run has float32\[4\]"),
        ({"hidden": ()}, r"head/kernel float32\[4, 1\], where the run has float32\[1, 1\]"),
    ],
)
def test_a_foreign_checkpoint_names_a_leaf(folder, network, leaf):
    with pytest.raises(jmeta.CheckpointError, match=leaf):
        jmeta.restore(folder, begin(**network))


def test_another_optimizer_is_foreign(folder):
    other = begin()._replace(optimizer_state=optax.sgd(0.1).init(begin().params))
    with pytest.raises(jmeta.CheckpointError, match=r"another optimiser: it has optimizer_state.*only='params'\)\.$"):
        jmeta.restore(folder, other)
    restored = jmeta.restore(folder, other, only="params")
    assert leaves(other._replace(params=restored)) == leaves(other._replace(params=begin(7).params))


@pytest.mark.parametrize("seal", ["[]", "{}", "null", '{"sha256": 1, "leaves": 2}'])
def test_a_seal_of_another_kind_is_damage(folder, seal):
    (folder / "7" / "seal.json").write_text(seal)
    with pytest.raises(jmeta.CheckpointError, match="damaged"):
        jmeta.restore(folder, begin())


def test_the_seal_lists_the_leaves(folder):
    seal = json.loads((folder / "7" / "seal.json").read_text())
    assert all("\\" not in name and (folder / "7" / name).is_file() for name in seal["files"])
    assert seal["leaves"]["params/head/kernel"] == "float32[4, 1]"
    assert seal["leaves"]["step"] == "int32[]"


@pytest.mark.parametrize(
    "name", [".DS_Store", "desktop.ini", "._seal.json", "default/.DS_Store", "default/d/._x", "seal.txt"]
)
def test_what_others_leave_in_a_checkpoint_does_no_harm(folder, name):
    (folder / "7" / name).parent.mkdir(exist_ok=True)
    (folder / "7" / name).write_bytes(b"Bud1")
    assert leaves(jmeta.restore(folder, begin())) == leaves(begin(7))


def test_a_seal_of_the_first_versions_is_read(folder):
    """They hashed all files, in the order of their paths, and did not list them."""
    seal = json.loads((folder / "7" / "seal.json").read_text())
    digest = hashlib.sha256()
    for file in sorted(file for file in (folder / "7").rglob("*") if file.is_file() and file.name != "seal.json"):
        digest.update(repr((str(file.relative_to(folder / "7")), file.stat().st_size)).encode())
        digest.update(file.read_bytes())
    (folder / "7" / "seal.json").write_text(json.dumps({"sha256": digest.hexdigest(), "leaves": seal["leaves"]}))
    assert leaves(jmeta.restore(folder, begin())) == leaves(begin(7))


def test_folders_of_others_stay(folder):
    for name in ("notes", "2024", "007", "3.parts", "x.part"):
        (folder / name).mkdir()
        (folder / name / "seal").write_text("mine")
    jmeta.save(folder, begin(9))
    assert leaves(jmeta.restore(folder, begin())) == leaves(begin(9))
    assert {path.name for path in folder.iterdir()} == {"7", "9", "notes", "2024", "007", "3.parts", "x.part"}


def test_the_damaged_newest_is_not_passed_over_in_silence(folder):
    (folder / "7" / "seal.json").write_text("{}")
    with pytest.raises(jmeta.CheckpointError, match="remove it to go back to step 3, which is whole"):
        jmeta.restore(folder, begin())
    assert leaves(jmeta.restore(folder, begin(), step=3)) == leaves(begin(3))
    (folder / "3" / "seal.json").write_text("{}")
    with pytest.raises(jmeta.CheckpointError, match="remove it to train anew, as none before it is whole"):
        jmeta.restore(folder, begin())
    with pytest.raises(jmeta.CheckpointError, match=r"no checkpoint of step 4 in .*: it has 3, 7;"):
        jmeta.restore(folder, begin(), step=4)


@pytest.mark.parametrize(
    "tree",
    [
        {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3), "bias": jnp.zeros(3, jnp.bfloat16)},
        jnp.arange(3),
        (jnp.ones(2), [jnp.zeros((), jnp.int32)]),
        {"key": jax.random.key(3)},
    ],
    ids=["dict", "array", "tuple", "key"],
)
def test_any_tree_is_saved_and_restored(tree, tmp_path):
    jmeta.save(tmp_path, tree)
    restored = jmeta.restore(tmp_path, tree)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype and np.array_equal(raw(a), raw(b))


def raw(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def test_numbers_of_python_are_saved(tmp_path):
    jmeta.save(tmp_path, {"rate": 0.5, "steps": 3})
    assert jmeta.restore(tmp_path, {"rate": 0.0, "steps": 0})["rate"] == 0.5


def test_a_tree_does_not_replace_a_run(folder):
    before = files(folder)
    with pytest.raises(jmeta.CheckpointError, match="holds the checkpoints of a run"):
        jmeta.save(folder, begin().params)
    with pytest.raises(jmeta.CheckpointError, match="nothing to save"):
        jmeta.save(folder / "new", {})
    assert files(folder) == before


def test_parts_of_a_run(folder):
    for like in (begin(), begin().params, jax.eval_shape(begin).params):
        params = jmeta.restore(folder, like, only="params")
        assert jax.tree.structure(params) == jax.tree.structure(begin().params)
        jax.tree.map(np.testing.assert_array_equal, params, begin().params)
    with pytest.raises(jmeta.ConfigError, match="only is 'θ'; give one of key, step, params"):
        jmeta.restore(folder, begin(), only="θ")
    with pytest.raises(jmeta.CheckpointError, match="another model or learner: it has params/Dense_0"):
        jmeta.restore(folder, begin(hidden=(5,)), only="params")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    jmeta.save("~/runs", begin(3))
    assert latest_step("~/runs") == 3 and (tmp_path / "runs" / "3").is_dir()
    assert leaves(jmeta.restore("~/runs", begin())) == leaves(begin(3))


@pytest.mark.parametrize("step", [7, 9])
@pytest.mark.parametrize("most", [0, 100, 1000])
def test_a_full_disk_leaves_the_last_checkpoint(folder, step, most):
    """The system refuses to let any file grow beyond a limit."""
    resource = pytest.importorskip("resource")
    before, limits = files(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(
            jmeta.CheckpointError, match=r"^the checkpoint of step . cannot be written .*as they were\.$"
        ):
            jmeta.save(folder, begin(step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(folder) == before and sorted(path.name for path in folder.iterdir()) == ["3", "7"]
    jmeta.save(folder, begin(step))
    assert latest_step(folder) == step


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path):
    resource = pytest.importorskip("resource")
    write_whole(tmp_path / "x.json", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(tmp_path / "x.json", "new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"x.json": "old"}
