import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta
from jmeta.checkpoint import latest_step


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
        with pytest.raises(jmeta.CheckpointError, match=r"^the checkpoint .*7 is damaged; remove it to .*\.$"):
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
    with pytest.raises(jmeta.CheckpointError, match="another model or learner"):
        jmeta.restore(folder, other)


@pytest.mark.parametrize("seal", ["[]", "{}", "null", '{"sha256": 1, "leaves": 2}'])
def test_a_seal_of_another_kind_is_damage(folder, seal):
    (folder / "7" / "seal.json").write_text(seal)
    with pytest.raises(jmeta.CheckpointError, match="damaged"):
        jmeta.restore(folder, begin())


def test_the_seal_lists_the_leaves(folder):
    seal = json.loads((folder / "7" / "seal.json").read_text())
    assert seal["leaves"]["params/head/kernel"] == "float32[4, 1]"
    assert seal["leaves"]["step"] == "int32[]"
