"""mini-ImageNet, tieredImageNet and CIFAR-FS in the forms in which they are published: converted once, then mapped."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mini_ht.datasets import cache_dir, folder, imagenet, open_dataset, pickles, read_image
from mini_ht.datasets.images import ImageSet
from mini_ht.datasets.mapped import MappedSet
from mini_ht.datasets.pickles import read_pickle
from mini_ht.episodes import sample
from mini_ht.errors import InputError

FILES = {"train": "train", "validation": "val", "test": "test"}


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_HT_CACHE", str(tmp_path / "cache"))


def pixels(seed: int, count: int, size: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def mini_part(seed: int) -> dict:
    """Three classes whose images do not lie side by side."""
    order = np.random.default_rng(seed).permutation(12)
    return {"image_data": pixels(seed, 12), "class_dict": {f"n0{seed}{k}": order[k::3].tolist() for k in range(3)}}


def write_mini(path: Path, protocol: int = 4) -> dict[str, dict]:
    path.mkdir(exist_ok=True)
    parts = {part: mini_part(seed) for seed, part in enumerate(FILES)}
    for part, content in parts.items():
        (path / f"mini-imagenet-cache-{FILES[part]}.pkl").write_bytes(pickle.dumps(content, protocol))
    return parts


def png(image: np.ndarray) -> np.ndarray:
    """As an encoder of that time gives it: a column of bytes."""
    Image.fromarray(image).save(stream := io.BytesIO(), "PNG")
    return np.frombuffer(stream.getvalue(), np.uint8)[:, None]


def write_tiered(path: Path, protocol: int = 2) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    path.mkdir(exist_ok=True)
    parts = {}
    for seed, (part, name) in enumerate(FILES.items()):
        labels, names = np.array([2, 0, 1, 0, 2, 1, 0]), [f"n{seed}{k}" for k in range(3)]
        images = pixels(seed, len(labels))
        about = {"label_specific": labels, "label_general": labels % 2, "label_specific_str": names}
        (path / f"{name}_labels.pkl").write_bytes(pickle.dumps(about, protocol))
        (path / f"{name}_images_png.pkl").write_bytes(pickle.dumps([png(image) for image in images], protocol))
        parts[part] = images, labels, names
    return parts


def cached() -> list[str]:
    return sorted(place.name for place in cache_dir().glob("*")) + sorted(x.name for x in cache_dir().glob(".*"))


# What plain pickles hold


scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text()
arrays = st.builds(
    lambda shape, dtype, seed: np.random.default_rng(seed).integers(0, 2, shape).astype(dtype),
    st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(all),
    st.sampled_from(["u1", "<i8", ">i4", "f4", "bool", "U3", "S2", "F"]).map(
        lambda name: "f8" if name == "F" else name
    ),
    st.integers(0, 99),
)
plain = st.recursive(
    scalars | st.binary(max_size=600) | arrays,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def same(a, b) -> bool:
    if isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and (a == b).all()
    if isinstance(b, bytes):
        return bytes(a) == b
    if isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in b)
    return type(a) is type(b) and a == b


@given(plain, st.integers(2, 5), st.booleans())
@settings(deadline=None)
def test_plain_pickles_are_read_as_python_reads_them(tmp_path_factory, value, protocol, fortran):
    """A pickle of plain values, of any protocol, gives the same values, arrays in either order of memory."""
    if fortran and isinstance(value, np.ndarray):
        value = np.asfortranarray(value)
    file = tmp_path_factory.getbasetemp() / "plain.pkl"
    file.write_bytes(pickle.dumps(value, protocol))
    assert same(read_pickle(file), value)


def test_large_arrays_stay_in_the_file(tmp_path):
    """An array is a read-only view, and shared values stay shared."""
    array, name = np.arange(4000, dtype=np.uint8), "n" * 300
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": array, "b": array, "names": [name, name]}, 2))
    found = read_pickle(tmp_path / "a.pkl")
    assert found["a"] is found["b"] and not found["a"].flags.writeable and found["names"] == [name, name]
    base = read_pickle_base(tmp_path, pickle.dumps(array, 5))
    assert type(base).__name__ == "mmap"


def read_pickle_base(tmp_path: Path, data: bytes):
    """What an array's bytes belong to."""
    (tmp_path / "b.pkl").write_bytes(data)
    array = read_pickle(tmp_path / "b.pkl")
    while isinstance(array, np.ndarray):
        array = array.base
    return array.obj


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_as_many_arrays_as_are_published_fit(tmp_path, protocol):
    """For the 448,695 training images of tieredImageNet, instructions and values kept stay within the bounds."""
    steps, kept = [], []
    for count in (500, 1000):
        images = [np.full((2000 + number % 7, 1), number % 256, np.uint8) for number in range(count)]
        machine = pickles._Machine(memoryview(pickle.dumps(images, protocol)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(machine, "step", lambda code, step=machine.step, n=count: (steps.append(n), step(code)))
            assert same(machine.run(), images)
        kept.append(len(machine.memo) + machine.items)
    each = steps.count(1000) - steps.count(500), kept[1] - kept[0]
    assert 448_695 * each[0] / 500 < pickles.MOST_STEPS and 448_695 * each[1] / 500 < pickles.MOST_ITEMS


# Sets


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_mini_imagenet_holds_the_published_images(tmp_path, protocol):
    """Each class has its images, in the order of its list, bit for bit."""
    parts = write_mini(tmp_path / "data", protocol)
    sets = open_dataset("mini-imagenet", tmp_path / "data", size=12, channels=3)
    assert list(sets) == list(FILES)
    for part, images in sets.items():
        content = parts[part]
        assert images.names == tuple(content["class_dict"]) and isinstance(images.pixels, np.memmap)
        rows = [row for some in content["class_dict"].values() for row in some]
        assert np.array_equal(images.pixels, content["image_data"][rows]) and images.counts.tolist() == [4, 4, 4]


def test_tiered_imagenet_holds_the_published_images(tmp_path):
    """Each class has the images with its label, decoded, bit for bit."""
    parts = write_tiered(tmp_path / "data")
    sets = open_dataset("tiered-imagenet", tmp_path / "data", size=12, channels=3)
    for part, images in sets.items():
        published, labels, names = parts[part]
        assert images.names == tuple(names) and images.counts.tolist() == [3, 2, 2]
        assert np.array_equal(images.pixels, published[np.argsort(labels, kind="stable")])


@pytest.mark.parametrize("name", ["mini-imagenet", "tiered-imagenet"])
def test_other_sizes_are_scaled_like_files(tmp_path, name):
    """Of another size or in grey, images come out as from files of their own."""
    parts = write_mini(tmp_path / "data") if name == "mini-imagenet" else write_tiered(tmp_path / "data")
    image = open_dataset(name, tmp_path / "data", size=7, channels=1)["train"].pixels[0]
    first = parts["train"]
    published = first["image_data"][first["class_dict"]["n000"][0]] if isinstance(first, dict) else first[0][1]
    Image.fromarray(published).save(tmp_path / "one.png")
    assert np.array_equal(image, read_image(tmp_path / "one.png", 7, 1))


def test_conversion_happens_once_and_follows_the_files(tmp_path, monkeypatch):
    """A second start reads no pickle; another file is converted anew; another size has its own copy."""
    write_mini(tmp_path / "data")
    first = imagenet.mini_imagenet(tmp_path / "data", 12)["test"]
    with monkeypatch.context() as patch:
        patch.setattr(imagenet, "read_pickle", lambda file: pytest.fail("read again"))
        again = imagenet.mini_imagenet(tmp_path / "data", 12)["test"]
    assert np.array_equal(first.pixels, again.pixels) and len(cached()) == 1
    other = {"image_data": 255 - pixels(9, 2), "class_dict": {"new": [1], "newer": [0]}}
    (tmp_path / "data" / "mini-imagenet-cache-test.pkl").write_bytes(pickle.dumps(other))
    assert imagenet.mini_imagenet(tmp_path / "data", 12)["test"].names == ("new", "newer")
    imagenet.mini_imagenet(tmp_path / "data", 5)
    assert len(cached()) == 3


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\x93NUMPY\x01\x00\xff\xff", b'{"train": [["a"], [1]]}', b"[1]"])
def test_a_damaged_cache_is_made_anew(tmp_path, damage):
    write_mini(tmp_path / "data")
    wanted = {part: np.array(x.pixels) for part, x in imagenet.mini_imagenet(tmp_path / "data", 12).items()}
    for file in ("classes.json", "train.npy"):
        (place,) = cache_dir().iterdir()
        (place / file).write_bytes(damage)
        found = imagenet.mini_imagenet(tmp_path / "data", 12)
        assert all(np.array_equal(found[part].pixels, wanted[part]) for part in wanted)
    assert len(cached()) == 1


def test_episodes_of_a_mapped_set_are_those_of_an_array(tmp_path):
    """Sampling reads only what it draws, and the same; another process gets the file's name, not its content."""
    write_mini(tmp_path / "data")
    images = imagenet.mini_imagenet(tmp_path / "data", 12)["train"]
    held = ImageSet(np.array(images.pixels), images.counts, images.names)
    drawn = [sample(x, np.random.default_rng(0), 3, way=2, shot=1, queries=2, rotate=True) for x in (images, held)]
    assert type(drawn[0].support) is np.ndarray and np.array_equal(drawn[0].support, drawn[1].support)
    assert np.array_equal(drawn[0].query, drawn[1].query)
    sent = pickle.dumps(images)
    assert len(sent) < 1000 < images.pixels.nbytes
    there = pickle.loads(sent)
    assert isinstance(there, MappedSet) and np.array_equal(there.pixels, images.pixels) and there.names == images.names
    assert type(images.select([1, 0]).pixels) is np.ndarray


MINI_DAMAGE = {
    "a class of another part": lambda part: part["class_dict"].update(n010=[0]),
    "a row too far": lambda part: part["class_dict"].update(n000=[0, 12]),
    "a negative row": lambda part: part["class_dict"].update(n000=[-1]),
    "no number": lambda part: part["class_dict"].update(n000=["0"]),
    "no rows": lambda part: part["class_dict"].update(n000=[]),
    "no classes": lambda part: part["class_dict"].clear(),
    "no images": lambda part: part.pop("image_data"),
    "floats": lambda part: part.update(image_data=part["image_data"] / 255),
    "a list": lambda part: part.update(class_dict=[]),
    "two channels": lambda part: part.update(image_data=part["image_data"][..., :2]),
    "no pixels": lambda part: part.update(image_data=part["image_data"][:, :0]),
}


@pytest.mark.parametrize("damage", MINI_DAMAGE)
def test_mini_imagenet_that_does_not_fit_is_refused(tmp_path, damage):
    """One sentence, and nothing is left in the cache."""
    part = write_mini(tmp_path / "data")["train"]
    MINI_DAMAGE[damage](part)
    (tmp_path / "data" / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps(part))
    with pytest.raises(InputError, match=r"use |get |give |put "):
        imagenet.mini_imagenet(tmp_path / "data", 12)
    assert cached() == []


def test_tiered_imagenet_that_does_not_fit_is_refused(tmp_path):
    """A damaged image is named; labels and images must be as many; nothing is left in the cache."""
    write_tiered(tmp_path / "data")
    images, labels = tmp_path / "data" / "val_images_png.pkl", tmp_path / "data" / "val_labels.pkl"
    good, about = pickle.loads(images.read_bytes()), pickle.loads(labels.read_bytes())
    for bad in (b"no image", good[0][:40], 10**12, ["x"], good[0].astype(np.int64)):
        images.write_bytes(pickle.dumps([bad if k == 3 else image for k, image in enumerate(good)]))
        with pytest.raises(InputError, match=r"image 3 of .*val_images_png.pkl"):
            imagenet.tiered_imagenet(tmp_path / "data", 12)
        assert cached() == []
    images.write_bytes(pickle.dumps(good[:-1]))
    with pytest.raises(InputError, match="6 images, 7 labels, 3 names"):
        imagenet.tiered_imagenet(tmp_path / "data", 12)
    images.write_bytes(pickle.dumps(good))
    for change in ({"label_specific": about["label_specific"] + 1}, {"label_specific_str": ["a", "a", "b"]}):
        labels.write_bytes(pickle.dumps(about | change))
        with pytest.raises(InputError, match="label"):
            imagenet.tiered_imagenet(tmp_path / "data", 12)
    labels.unlink()
    with pytest.raises(InputError, match=r"cannot read .*val_labels.pkl"):
        imagenet.tiered_imagenet(tmp_path / "data", 12)
    assert cached() == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    write_mini(tmp_path / "data")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINI_HT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"cannot write .*MINI_HT_CACHE"):
        imagenet.mini_imagenet(tmp_path / "data", 12)
    monkeypatch.setenv("MINI_HT_CACHE", str(tmp_path / "cache"))

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(InputError, match="No space left"):
        imagenet.mini_imagenet(tmp_path / "data", 12)
    assert cached() == []


# CIFAR-FS


def write_cifar(path: Path) -> dict[str, list[str]]:
    parts = {"train": ["apple", "bee"], "val": ["cup"], "test": ["dog", "elm"]}
    (path / "splits" / "bertinetto").mkdir(parents=True)
    for part, names in parts.items():
        (path / "splits" / "bertinetto" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for seed, name in enumerate(names):
            (path / "data" / name).mkdir(parents=True)
            for k, image in enumerate(pixels(seed, 3, 8)):
                Image.fromarray(image).save(path / "data" / name / f"{name}_s_{k}.png")
    return parts


@pytest.mark.parametrize("large", [False, True])
def test_cifar_fs(tmp_path, monkeypatch, large):
    """Its lists of classes make the parts, the same in memory and mapped."""
    parts = write_cifar(tmp_path / "data")
    monkeypatch.setattr(sys.modules[folder.__module__], "SMALL", 0 if large else 1 << 20)
    sets = open_dataset("folder", tmp_path / "data", size=8, channels=3)
    assert {part: list(x.names) for part, x in sets.items()} == {k: parts[name] for k, name in FILES.items()}
    assert np.array_equal(sets["train"].pixels[3:], pixels(1, 3, 8))
    assert isinstance(sets["train"], MappedSet) == large and len(cached()) == large
    if large:
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / "data" / "dog" / "new.png")
        assert open_dataset("folder", tmp_path / "data", size=8, channels=3)["test"].counts.tolist() == [4, 3]
    for name, classes in (("train", "apple"), ("val", "bee\ncup")):  # one class moves over, and no file is another
        (tmp_path / "data" / "splits" / "bertinetto" / f"{name}.txt").write_text(classes)
    moved = open_dataset("folder", tmp_path / "data", size=8, channels=3)
    assert [list(moved[part].names) for part in ("train", "validation")] == [["apple"], ["bee", "cup"]]


def test_lists_of_classes_that_do_not_fit(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "secret").mkdir()
    file = tmp_path / "splits" / "bertinetto" / "val.txt"
    for text, message in (("cup\n../secret", r"'\.\./secret', which is no folder"), ("cup\nbee", "'bee' is in more")):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            folder(tmp_path, 8, 3)
    for content in ("", b"\xff\xfe"):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError, match=r"has no classes|cannot read .*val.txt"):
            folder(tmp_path, 8, 3)
    (tmp_path / "splits" / "vinyals").mkdir()
    with pytest.raises(InputError, match="2 splits"):
        folder(tmp_path, 8, 3)


def test_val_is_validation(tmp_path):
    write_cifar(tmp_path / "cifar")
    for part in ("train", "val", "test"):
        for name in (tmp_path / "cifar" / "splits" / "bertinetto" / f"{part}.txt").read_text().split():
            shutil.copytree(tmp_path / "cifar" / "data" / name, tmp_path / "own" / part / name)
    sets = folder(tmp_path / "own", 8, 3)
    assert list(sets) == list(FILES) and sets["validation"].names == ("cup",)
    assert json.dumps([len(x.pixels) for x in sets.values()]) == "[6, 3, 6]"
