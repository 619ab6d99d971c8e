"""The cache keeps arrays, heals itself and never stands in the way."""

import numpy as np
import pytest

from jmeta.data.cache import cached


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JMETA_CACHE", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


def make():
    return {"x": np.arange(1000, dtype=np.uint8), "names": np.array(["a", "bc"])}


def never():
    raise AssertionError("made again")


def test_makes_once_and_reads_afterwards(folder):
    made, read = cached("a", make), cached("a", never)
    assert made.keys() == read.keys()
    for name in made:
        assert made[name].dtype == read[name].dtype
        np.testing.assert_array_equal(made[name], read[name])
    assert [file.name for file in folder.iterdir()] == ["a.npz"]


def test_names_are_kept_apart(folder):
    cached("a", make)
    assert cached("b", lambda: {"y": np.zeros(2)}).keys() == {"y"}


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped"])
def test_a_damaged_file_is_made_again(folder, damage):
    cached("a", make)
    file = folder / "a.npz"
    whole = file.read_bytes()
    flipped = whole[:60] + bytes(255 - byte for byte in whole[60:120]) + whole[120:]
    file.write_bytes({"empty": b"", "text": b"hello", "truncated": whole[:-200], "flipped": flipped}[damage])
    np.testing.assert_array_equal(cached("a", make)["x"], make()["x"])
    np.testing.assert_array_equal(cached("a", never)["x"], make()["x"])


def test_goes_on_where_the_folder_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")  # root may write everywhere, but not below a file
    monkeypatch.setenv("JMETA_CACHE", str(tmp_path / "file" / "cache"))
    assert cached("a", make).keys() == {"x", "names"}


def test_a_failed_write_leaves_nothing(folder, monkeypatch):
    def full(stream, **arrays):
        stream.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    assert cached("a", make).keys() == {"x", "names"}
    assert list(folder.iterdir()) == []


def test_an_error_of_make_is_not_swallowed(folder):
    with pytest.raises(AssertionError, match="made again"):
        cached("a", never)


def test_the_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("JMETA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cached("a", make)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    cached("a", make)
    assert (tmp_path / "xdg/jmeta/a.npz").is_file() and (tmp_path / ".cache/jmeta/a.npz").is_file()
