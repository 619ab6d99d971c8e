"""Images in folders come out in order, with the right polarity, size and labels, and errors name the file."""

import jax
import numpy as np
import pytest
from PIL import Image

from jmeta.data.folders import from_folder, read_images
from jmeta.errors import DataError


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return path


def grey(value, height=12, width=12):
    return np.full((height, width), value)


@pytest.fixture
def animals(tmp_path):
    for value, name in enumerate(("zebra", "ant", "cat")):
        for i in range(4):
            save(tmp_path / name / f"{i}.png", grey(50 * value + i))
    return tmp_path


def test_one_sub_folder_a_class_sorted_by_name(animals):
    found = read_images(animals, size=5)
    assert found.names == ("ant", "cat", "zebra")
    assert found.images.shape == (12, 5, 5, 1) and found.images.dtype == np.uint8
    np.testing.assert_array_equal(found.labels, np.repeat([0, 1, 2], 4))
    assert [file.relative_to(animals).as_posix() for file in found.files[:5]] == [
        *(f"ant/{i}.png" for i in range(4)),
        "cat/0.png",
    ]
    np.testing.assert_array_equal(found.images[:, 2, 2, 0], [50, 51, 52, 53, 100, 101, 102, 103, 0, 1, 2, 3])


def test_a_flat_folder_has_no_classes(tmp_path):
    for name in ("b.png", "a.bmp", "c.gif"):
        save(tmp_path / name, grey(7))
    found = read_images(str(tmp_path), size=28)
    assert [file.name for file in found.files] == ["a.bmp", "b.png", "c.gif"]
    assert found.labels.tolist() == [-1, -1, -1] and found.names == ()
    assert found.images.shape == (3, 28, 28, 1)


@pytest.mark.parametrize("suffix", ["png", "PNG", "jpg", "jpeg", "bmp", "gif", "webp", "tif", "tiff"])
def test_reads_the_usual_formats(tmp_path, suffix):
    save(tmp_path / f"x.{suffix}", grey(200))
    np.testing.assert_allclose(read_images(tmp_path).images, 200, atol=2)


def test_hidden_and_other_files_are_passed_over(animals):
    (animals / ".DS_Store").write_bytes(b"")
    (animals / "notes.txt").write_text("hello")
    (animals / ".hidden").mkdir()
    (animals / "ant" / ".x.png").write_bytes(b"")
    (animals / "ant" / "Thumbs.db").write_bytes(b"")
    assert len(read_images(animals).files) == 12


def test_colour_and_grey(tmp_path):
    save(tmp_path / "red.png", np.broadcast_to([255, 0, 0], (6, 6, 3)))
    np.testing.assert_array_equal(read_images(tmp_path, size=2, channels=3).images[0, 0, 0], [255, 0, 0])
    assert read_images(tmp_path, size=2, channels=1).images[0, 0, 0, 0] == 76  # 0.299 of red


def test_size_is_height_by_width(tmp_path):
    save(tmp_path / "x.png", np.concatenate([grey(0, 20, 30), grey(255, 20, 30)], axis=0))
    images = read_images(tmp_path, size=(4, 6)).images
    assert images.shape == (1, 4, 6, 1)
    assert images[0, 0].max() < 10 and images[0, 3].min() > 245


def test_one_bit_images_are_shrunk_to_greys(tmp_path):
    checks = np.indices((40, 40)).sum(axis=0) % 2 * 255
    Image.fromarray(checks.astype(np.uint8)).convert("1", dither=Image.Dither.NONE).save(tmp_path / "x.png")
    np.testing.assert_allclose(read_images(tmp_path, size=10).images[0, 3:7, 3:7], 127.5, atol=10)


def test_sixteen_bit_images_are_scaled(tmp_path):
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_images(tmp_path, size=4).images, 128)


def test_transparent_pixels_are_white(tmp_path):
    save(tmp_path / "x.png", np.zeros((8, 8, 4)))
    np.testing.assert_array_equal(read_images(tmp_path, size=4).images, 255)


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was upside down
    save(tmp_path / "x.png", np.concatenate([grey(0), grey(255)], axis=0), exif=exif)
    assert read_images(tmp_path, size=4).images[0, 0].min() > 245


def test_invert_makes_ink_bright(tmp_path):
    save(tmp_path / "x.png", grey(250))
    np.testing.assert_array_equal(read_images(tmp_path, invert=True).images, 5)


def test_episodes_from_a_folder(animals):
    source = from_folder(animals, ways=2, shots=1, queries=3, size=(6, 4), channels=3, invert=True)
    task = jax.jit(source.sample)(jax.random.key(0), source.data)
    assert task.support.inputs.shape == (2, 6, 4, 3) and task.query.targets.shape == (6, 2)
    assert source.names == ("ant", "cat", "zebra")
    assert dict(source.protocol) == {"data": str(animals), "ways": 2, "shots": 1, "queries": 3}
    assert 0.5 < float(task.support.inputs.min()) <= float(task.support.inputs.max()) <= 1


def test_the_episode_names_the_class_that_is_too_small(animals):
    (animals / "cat" / "3.png").unlink()
    with pytest.raises(DataError, match=r"class 'cat' has 3 examples, but 1 shots [+] 3 queries need 4"):
        from_folder(animals, ways=2, shots=1, queries=3)


def test_refuses_a_folder_without_classes_for_episodes(tmp_path):
    save(tmp_path / "x.png", grey(0))
    with pytest.raises(DataError, match="holds images but no classes; put the images of each class into a sub-folder"):
        from_folder(tmp_path)


def test_refuses_a_missing_folder_and_a_file(tmp_path):
    with pytest.raises(DataError, match="nowhere is missing; give a folder of images"):
        read_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"x\.png is not a folder"):
        read_images(save(tmp_path / "x.png", grey(0)))


def test_refuses_a_folder_without_images(tmp_path):
    with pytest.raises(DataError, match="holds no images; give a folder of images or of sub-folders"):
        read_images(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="holds no images"):
        read_images(tmp_path)


def test_refuses_a_class_without_images(animals):
    (animals / "dog").mkdir()
    with pytest.raises(DataError, match=r"class folder .*dog holds no images .*; add some or remove it"):
        read_images(animals)


def test_refuses_images_beside_sub_folders(animals):
    save(animals / "x.png", grey(0))
    with pytest.raises(DataError, match="holds both images and sub-folders"):
        read_images(animals)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_refuses_an_unreadable_image_by_name(animals, damage):
    file = animals / "cat" / "2.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64))
    whole = save(file, noise).read_bytes()
    file.write_bytes({"empty": b"", "text": b"hello", "truncated": whole[: len(whole) // 2]}[damage])
    with pytest.raises(DataError, match=r"cat.2\.png cannot be read as an image .*; repair or remove it"):
        read_images(animals)


def test_size_and_colours_are_those_of_the_pictures(animals, tmp_path_factory):
    assert read_images(animals).images.shape == (12, 12, 12, 1)
    save(animals / "cat" / "9.png", np.broadcast_to([255, 0, 0], (12, 12, 3)))
    found = read_images(animals).images
    assert (
        found.shape == (13, 12, 12, 3)
        and found[8, 0, 0].tolist() == [255, 0, 0]
        and found[0, 0, 0].tolist() == 3 * [50]
    )
    grey_palette = Image.fromarray(np.full((12, 12), 7, np.uint8)).convert("P")
    folder = tmp_path_factory.mktemp("palette")
    grey_palette.save(folder / "x.png")
    assert read_images(folder).images.shape == (1, 12, 12, 1)
    save(animals / "dog" / "0.png", grey(1, 9, 12))
    with pytest.raises(DataError, match=r"is 12 x 12 pixels and .*dog.0.png is 9 x 12; give one size for all"):
        read_images(animals)
    assert read_images(animals, size=8).images.shape == (14, 8, 8, 3)


@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", "$RECYCLE.BIN"])
def test_folders_of_systems_are_passed_over(animals, name):
    save(animals / name / "0.png", grey(0))
    assert read_images(animals).names == ("ant", "cat", "zebra")


def test_folders_of_splits_are_recognised(animals, tmp_path_factory):
    root = tmp_path_factory.mktemp("splits")
    for split, names in {"Train": ("ant", "cat"), "val": ("dog", "elk")}.items():
        for name in names:
            for i in range(3):
                save(root / split / name / f"{i}.png", grey(i))
    with pytest.raises(DataError, match="holds the splits train, validation; give split='train'"):
        from_folder(root, ways=2, shots=1, queries=1)
    source = from_folder(root, split="validation", ways=2, shots=1, queries=1)
    assert source.names == ("dog", "elk") and source.protocol["split"] == "validation"
    with pytest.raises(DataError, match="has no folder of the split 'test': it has train, validation"):
        from_folder(root, split="test")
    with pytest.raises(DataError, match="has no folder of the split 'train': it has none"):
        from_folder(animals, split="train")


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train", "boat"):
        for i in range(2):
            save(tmp_path / name / f"{i}.png", grey(i))
    assert from_folder(tmp_path, ways=2, shots=1, queries=1).names == ("boat", "train")


def test_small_classes_are_dropped_on_request(animals):
    save(animals / "bat" / "0.png", grey(0))
    (animals / "dog").mkdir()
    source = from_folder(animals, ways=2, shots=1, queries=3, min_rows=4)
    assert source.names == ("ant", "cat", "zebra") and source.protocol["dropped"] == 2
    found = jax.jit(source.sample)(jax.random.key(0), source.data).query
    files, labels = read_images(animals, empty_classes=True)[2:0:-1]
    for row, number in zip(found.rows, found.classes, strict=True):
        assert files[int(row)].parent.name == source.names[int(number)]
    assert len(labels) == 13


def test_batches_of_all_classes_from_a_folder(animals):
    source = from_folder(animals, batch=5)
    task = jax.jit(source.sample)(jax.random.key(0), source.data)
    assert task.query.inputs.shape == (5, 12, 12, 1) and task.query.targets.shape == (5, 3) and task.support == ()


@pytest.mark.parametrize("options", [{"channels": 2}, {"size": 0}, {"size": (3, 0)}])
def test_refuses_impossible_sizes(tmp_path, options):
    with pytest.raises(DataError, match="cannot be made; give a size of at least 1"):
        read_images(tmp_path, **options)


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_small_file_that_claims_a_huge_picture_is_not_decoded(tmp_path, side):
    file = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(file)
    with pytest.raises(
        DataError, match=r"bomb.png (claims 10000 x 10000 pixels|cannot be read as an image).*remove it"
    ):
        read_images(tmp_path, size=28)


def test_links_are_followed_inside_a_folder_and_not_out_of_it(animals, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    secret = save(elsewhere / "class" / "secret.png", grey(9))
    (animals / "ant" / "link.png").symlink_to(animals / "cat" / "0.png")
    assert len(read_images(animals).files) == 13
    (animals / "ant" / "out.png").symlink_to(secret)
    with pytest.raises(DataError, match=r"ant/out.png is a link to .*secret.png, out of .*; put a copy there instead"):
        read_images(animals)
    (animals / "ant" / "out.png").unlink()
    (animals / "dog").symlink_to(secret.parent)
    with pytest.raises(DataError, match=r"dog is a link to .*class, out of .*; put a copy"):
        from_folder(animals, ways=2, shots=1, queries=1)
