"""Data sets: what they hold, that they are reproducible, and what they say about bad input."""

import hashlib
import io
import os
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mini_ht.datasets import (
    DATASETS,
    ImageSet,
    cache_dir,
    download,
    folder,
    glyphs,
    omniglot,
    open_dataset,
    read_class_folders,
    read_image,
)
from mini_ht.errors import InputError

MODULE = sys.modules[omniglot.__module__]  # as an attribute of the package, the function hides the module
REAL = Path(os.environ.get("MINI_HT_OMNIGLOT") or Path(__file__).parents[1] / "../shared/data/omniglot")
needs_omniglot = pytest.mark.skipif(
    not (REAL / "images_background.zip").is_file(),
    reason="Omniglot archives absent; name their folder in MINI_HT_OMNIGLOT",
)
PARTS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_HT_CACHE", str(tmp_path / "cache"))


def save(path: Path, mode: str = "L", size: tuple[int, int] = (9, 7), color=128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def files_under(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


# ImageSet


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.data())
@settings(max_examples=50, deadline=None)
def test_select_equals_a_loop_over_classes(counts, data):
    names = tuple(f"class{i}" for i in range(len(counts)))
    pixels = np.arange(sum(counts), dtype=np.uint8).reshape(-1, 1, 1, 1)
    images = ImageSet(pixels, np.array(counts, np.int64), names)
    ids = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=8))
    chosen = images.select(np.array(ids, np.int64))
    wanted = [row for i in ids for row in range(images.starts[i], images.starts[i] + counts[i])]
    assert chosen.pixels.ravel().tolist() == wanted
    assert chosen.names == tuple(names[i] for i in ids) and chosen.classes == len(ids)
    assert chosen.counts.tolist() == [counts[i] for i in ids]


def test_select_takes_lists_masks_and_single_classes():
    images = glyphs(0, 3, drawings=2)
    assert images.select([2, 0]).names == (images.names[2], images.names[0])
    assert images.select(np.array([False, True, False])).names == (images.names[1],)
    assert images.select(1).counts.tolist() == [2]


# read_image


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 257, 32896, 65535]] * 4, np.uint16)).save(path)
    assert read_image(path, 4, 1)[0, :, 0].tolist() == [0, 1, 128, 255]
    assert read_image(path, 4, 3)[0, :, 2].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("mode", "color", "suffix", "wanted"),
    [
        ("1", 1, "png", (255, 255, 255)),
        ("L", 100, "png", (100, 100, 100)),
        ("LA", (0, 0), "png", (255, 255, 255)),
        ("RGB", (10, 20, 30), "png", (10, 20, 30)),
        ("RGBA", (255, 0, 0, 255), "png", (255, 0, 0)),
        ("RGBA", (255, 0, 0, 0), "png", (255, 255, 255)),
        ("P", 0, "gif", (0, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
        ("I;16", 65535, "tif", (255, 255, 255)),
    ],
)
def test_modes(tmp_path, mode, color, suffix, wanted):
    path = save(tmp_path / f"image.{suffix}", mode, color=color)
    image = read_image(path, 5, 3)
    assert image.shape == (5, 5, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - wanted).max() <= 1
    assert read_image(path, 5, 1).shape == (5, 5, 1)


def test_transparent_palette_lies_over_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30] * 256)
    image.save(tmp_path / "p.png", transparency=0)
    assert (read_image(tmp_path / "p.png", 4, 3) == 255).all()


def test_one_bit_drawings_become_smooth_grey(tmp_path):
    board = np.indices((40, 40)).sum(0) % 2 == 0
    Image.fromarray(board).save(tmp_path / "board.png")
    assert 100 < read_image(tmp_path / "board.png", 10, 1)[4, 4, 0] < 155


def test_rotation_in_exif_is_honoured_and_the_centre_kept(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, 4:] = 255  # right half bright
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the right half comes to lie below
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png", 8, 1)[..., 0]
    assert (image[:4] == 0).all() and (image[4:] == 255).all()
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", 4, 1) == 255).all()


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def truncated_png() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()[:1000]


@pytest.mark.parametrize(
    "content", [b"", b"hello", png_header(12000, 12000), png_header(60000, 60000), truncated_png(), png_header(5, 5)]
)
def test_unreadable_images_are_named(tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.png.*remove it"):
        read_image(path, 28, 1)


def test_other_bad_images(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_image(tmp_path / "absent.png", 28, 1)
    with pytest.raises(InputError, match="floating-point"):
        read_image(save(tmp_path / "float.tif", "F", color=0.5), 28, 1)
    with pytest.raises(InputError, match="16 bits"):
        read_image(save(tmp_path / "deep.tif", "I", color=70000), 28, 1)
    with pytest.raises(InputError, match="2 channels"):
        read_image(save(tmp_path / "good.png"), 28, 2)


# glyphs


def test_glyphs_are_reproducible_and_independent_of_their_number():
    few, many = glyphs(7, 3), glyphs(7, 40)
    assert many.pixels.shape == (800, 28, 28, 1) and many.pixels.dtype == np.uint8
    assert np.array_equal(few.pixels, many.pixels[:60]) and few.names == many.names[:3]
    assert np.array_equal(many.pixels, glyphs(7, 40).pixels)
    assert not np.array_equal(few.pixels, glyphs(8, 3).pixels)


def test_glyphs_are_drawings_that_pixels_alone_do_not_solve():
    pixels = glyphs(1, 100).pixels.reshape(100, 20, -1) / 255.0
    assert (pixels.max(-1) > 0.8).all() and 0.02 < pixels.mean() < 0.2
    rng = np.random.default_rng(0)
    right = []
    for _ in range(400):
        ids = rng.choice(100, 5, replace=False)
        distance = np.square(pixels[ids, None, 0] - pixels[None, ids, rng.integers(1, 20)]).sum(-1)  # support x query
        right.append(distance.argmin(0) == np.arange(5))
    assert 0.35 < np.mean(right) < 0.75


def test_glyphs_of_other_sizes_show_the_same_characters():
    large = glyphs(2, 2, drawings=3, size=56).pixels.reshape(6, 28, 2, 28, 2).mean((2, 4))
    small = glyphs(2, 2, drawings=3).pixels[..., 0]
    assert np.corrcoef(large.ravel(), small.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("bad", [(-1, 5), (0, 0), (0, 5, 0), (0, 5, 20, 4)])
def test_glyphs_reject_bad_numbers(bad):
    with pytest.raises(InputError, match="give seed"):
        glyphs(*bad)


# Omniglot


def write_archives(path: Path, classes=(964, 659), drawings: int = 20) -> Path:
    """Archives shaped like Omniglot's; every drawing is the same little image, which reads quickly."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8), 0).save(buffer, "PNG")
    path.mkdir(exist_ok=True)
    for part, number in zip(("background", "evaluation"), classes, strict=True):
        with zipfile.ZipFile(path / f"images_{part}.zip", "w") as archive:
            for i in range(number):
                for j in range(drawings):
                    archive.writestr(f"images_{part}/Alphabet/character{i:04}/{j:02}.png", buffer.getvalue())
    return path


@needs_omniglot
def test_real_omniglot(capfd):
    sets = omniglot(REAL)
    again = omniglot(REAL)  # from the cache
    assert [sets[part].classes for part in PARTS] == [1150, 50, 423]
    assert len({name for part in PARTS for name in sets[part].names}) == 1623
    assert all((sets[part].counts == 20).all() for part in PARTS)
    assert all(np.array_equal(sets[part].pixels, again[part].pixels) for part in PARTS)
    pixels = sets["test"].pixels
    assert pixels.shape == (8460, 28, 28, 1) and pixels.dtype == np.uint8
    assert pixels.min() == 0 and pixels.max() == 255 and 0.03 < pixels.mean() / 255 < 0.15  # ink is bright and rare

    sets = omniglot(REAL, split="alphabet")
    assert [sets[part].classes for part in PARTS] == [869, 95, 659]
    alphabets = [{name.split("/")[0] for name in sets[part].names} for part in PARTS]
    assert [len(a) for a in alphabets] == [27, 3, 20] and len(set.union(*alphabets)) == 50
    assert len(list(cache_dir().iterdir())) == 1
    assert capfd.readouterr() == ("", "")  # no progress bar where nobody watches


@pytest.fixture(scope="session")
def little(tmp_path_factory):
    """A data directory of archives that pass the content check with 3 and 2 characters."""
    return write_archives(tmp_path_factory.mktemp("little"), (3, 2))


@pytest.fixture
def small_check(monkeypatch):
    monkeypatch.setattr(MODULE, "ARCHIVES", {"images_background.zip": (3, ""), "images_evaluation.zip": (2, "")})


def test_cache_is_rebuilt_when_corrupt_and_follows_archives_and_size(little, small_check, tmp_path):
    wanted = omniglot(little)
    (cached,) = cache_dir().iterdir()
    whole = cached.read_bytes()
    for damaged in (b"", b"garbage", whole[: len(whole) // 2], whole[:300] + b"\xff" + whole[301:]):
        cached.write_bytes(damaged)
        sets = omniglot(little)
        assert all(np.array_equal(sets[part].pixels, wanted[part].pixels) for part in PARTS)
        assert cached.read_bytes() == whole
    omniglot(little, size=14)
    assert len(list(cache_dir().iterdir())) == 2
    changed = tmp_path / "changed"
    changed.mkdir()
    for archive in little.iterdir():
        (changed / archive.name).write_bytes(archive.read_bytes())
    omniglot(changed)
    assert len(list(cache_dir().iterdir())) == 2  # a copy shares the cache
    with zipfile.ZipFile(changed / "images_background.zip", "a") as archive:
        archive.writestr("note.txt", "changed")
    omniglot(changed)
    assert len(list(cache_dir().iterdir())) == 3


def test_unwritable_cache_and_failed_write_leave_nothing(little, small_check, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINI_HT_CACHE", str(tmp_path / "file" / "cache"))
    assert omniglot(little)["train"].pixels.max() == 255
    monkeypatch.setenv("MINI_HT_CACHE", str(tmp_path / "cache"))

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    omniglot(little)
    assert files_under(tmp_path / "cache") == []
    assert files_under(little) == ["images_background.zip", "images_evaluation.zip"]


def test_wrong_missing_and_damaged_archives(little, small_check, tmp_path, monkeypatch):
    def copy(name: str) -> Path:
        (tmp_path / name).mkdir()
        for archive in little.iterdir():
            (tmp_path / name / archive.name).write_bytes(archive.read_bytes())
        return tmp_path / name

    with pytest.raises(InputError, match=r"cannot read .*images_background\.zip.*No such file.*github"):
        omniglot(tmp_path)
    with pytest.raises(InputError, match=r"2 characters .*expected 4"):
        wrong = {"images_background.zip": (3, ""), "images_evaluation.zip": (4, "")}
        with monkeypatch.context() as patch:
            patch.setattr(MODULE, "ARCHIVES", wrong)
            omniglot(little)
    with pytest.raises(InputError, match=r"\[19\] drawings.*expected 3"):
        omniglot(write_archives(tmp_path / "fewer", (3, 2), drawings=19))
    content = (little / "images_background.zip").read_bytes()
    cut = copy("cut")
    (cut / "images_background.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cut.images_background\.zip.*not a zip file.*get .* again"):
        omniglot(cut)
    rotten = copy("rotten")
    middle = content.index(b"IDAT")
    (rotten / "images_background.zip").write_bytes(content[:middle] + b"\x00" * 8 + content[middle + 8 :])
    with pytest.raises(InputError, match=r"images_background\.zip.*get .* again"):
        omniglot(rotten)
    assert not cache_dir().exists()  # nothing wrong was cached


def test_unknown_split():
    with pytest.raises(InputError, match="'alphabet'"):
        omniglot(REAL, split="vinyals")


# Download


@pytest.fixture
def home(little, monkeypatch):
    """A public home of the archives on this very disk."""
    sizes = {"images_background.zip": 3, "images_evaluation.zip": 2}
    sums = {name: (n, hashlib.md5((little / name).read_bytes()).hexdigest()) for name, n in sizes.items()}
    monkeypatch.setattr(MODULE, "ARCHIVES", sums)
    monkeypatch.setattr(MODULE, "HOME", little.as_uri() + "/")
    return little


def test_download_once(home, monkeypatch):
    sets = open_dataset("omniglot")
    assert sum(part.classes for part in sets.values()) == 5
    data = cache_dir() / "omniglot"
    assert files_under(data) == ["images_background.zip", "images_evaluation.zip"]
    assert all((data / name).read_bytes() == (home / name).read_bytes() for name in files_under(data))
    monkeypatch.setattr(MODULE, "HOME", "file:///nowhere/")
    open_dataset("omniglot")


def test_failed_downloads_leave_nothing(home, tmp_path, monkeypatch):
    data = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "HOME", (tmp_path / "nowhere").as_uri() + "/")
        with pytest.raises(InputError, match=r"images_background\.zip could not be downloaded.*browser"):
            download(data)
    assert files_under(data) == []
    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "ARCHIVES", {"images_background.zip": (3, "0" * 32)})
        with pytest.raises(InputError, match="MD5"):
            download(data)
    assert files_under(data) == []

    class Broken(io.BytesIO):
        headers = {"Content-Length": "2000000"}  # noqa: RUF012

        def read(self, size=-1):
            if self.tell():
                raise ConnectionResetError("connection reset by peer")
            return super().read(size)

    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: Broken(b"half of it"))
    with pytest.raises(InputError, match="connection reset"):
        download(data)
    assert files_under(data) == []


# Folders


def class_folders(path: Path, names) -> Path:
    for i, name in enumerate(names):
        for j in range(2 + i % 2):
            save(path / name / f"{j}.png", color=12 * i + j, size=(5 + j, 9))
    return path


def test_class_folders_are_split_by_seed(tmp_path):
    names = [f"c{i:02}" for i in range(20)]
    data = class_folders(tmp_path / "data", names)
    (data / ".DS_Store").write_text("hidden")
    (data / "c00" / ".hidden").write_text("hidden")
    sets = open_dataset("folder", data, size=6, channels=3, seed=1)
    assert [sets[part].classes for part in PARTS] == [14, 2, 4]
    assert sorted(sum((sets[part].names for part in PARTS), ())) == names
    assert sets["train"].pixels.shape[1:] == (6, 6, 3)
    for images in sets.values():
        for name, start, count in zip(images.names, images.starts, images.counts, strict=True):
            i = int(name[1:])
            assert images.pixels[start : start + count, 0, 0, 0].tolist() == [12 * i + j for j in range(2 + i % 2)]
    assert folder(data, 6, 3, seed=1)["test"].names == sets["test"].names != folder(data, 6, 3, seed=2)["test"].names


def test_three_classes_are_enough(tmp_path):
    sets = folder(class_folders(tmp_path, "abc"), 4, 1)
    assert [sets[part].classes for part in PARTS] == [1, 1, 1]


def test_own_split(tmp_path):
    class_folders(tmp_path / "train", "ab")
    class_folders(tmp_path / "test", "cd")
    sets = folder(tmp_path, 4, 1)
    assert {part: images.names for part, images in sets.items()} == {"train": ("a", "b"), "test": ("c", "d")}
    class_folders(tmp_path / "validation", "e")
    assert folder(tmp_path, 4, 1)["validation"].names == ("e",)
    class_folders(tmp_path / "validation", "a")
    with pytest.raises(InputError, match=r"class 'a' .*seen in training"):
        folder(tmp_path, 4, 1)


def test_bad_folders(tmp_path):
    with pytest.raises(InputError, match=r"cannot list .*absent"):
        folder(tmp_path / "absent", 4, 1)
    with pytest.raises(InputError, match=r"2 class folders.*at least 3"):
        folder(class_folders(tmp_path / "two", "ab"), 4, 1)
    with pytest.raises(InputError, match="no class folders"):
        read_class_folders(tmp_path / "two" / "a", 4, 1)
    data = class_folders(tmp_path / "data", "abc")
    (data / "empty").mkdir()
    (data / "empty" / ".hidden").write_text("")
    with pytest.raises(InputError, match=r"no images in .*empty"):
        folder(data, 4, 1)
    (data / "empty" / "notes.txt").write_text("not an image")
    with pytest.raises(InputError, match=r"notes\.txt.*not an image"):
        folder(data, 4, 1)


# open_dataset


def test_open_glyphs():
    sets = open_dataset("glyphs", seed=3)
    assert [sets[part].classes for part in PARTS] == [400, 50, 200]
    assert len({image.tobytes() for images in sets.values() for image in images.pixels}) == 20 * 650


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnist"}, ", ".join(DATASETS)),
        ({"name": "folder"}, "without a data directory"),
        ({"name": "glyphs", "channels": 3}, "1 channel, 3"),
        ({"name": "omniglot", "channels": 3}, "1 channel, 3"),
        ({"name": "glyphs", "size": 0}, "size 0"),
        ({"name": "folder", "data_dir": ".", "seed": -1}, "seed -1"),
    ],
)
def test_open_dataset_rejects_what_does_not_fit(arguments, message):
    with pytest.raises(InputError, match=message):
        open_dataset(**arguments)
