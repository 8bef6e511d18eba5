"""Hostile files: every reader gives the right result or one sentence, soon, in little memory, and runs nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from fuzz.__main__ import corpus
from fuzz.edits import edited
from fuzz.rule import Broken, check
from fuzz.targets import CONFIG, HOME, TARGETS, mini, picture, scratch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mini_ht import classifier_file, draw_parameters, load, save
from mini_ht.classifier_file import load_classifier
from mini_ht.config import Config
from mini_ht.datasets import folder, read_class_folders, read_image
from mini_ht.datasets.images import MOST_PIXELS, read_upright
from mini_ht.datasets.pickles import read_pickle
from mini_ht.errors import InputError
from mini_ht.memory import keep_freed_memory
from mini_ht.support_folder import read_support

SEEDS: dict[str, list[bytes]] = {}
edits = st.lists(
    st.tuples(st.integers(0, 7), st.floats(0, 1, exclude_max=True), st.binary(max_size=8)), min_size=1, max_size=4
)


def seeds(name: str) -> list[bytes]:
    if name not in SEEDS:
        SEEDS[name] = TARGETS[name][1]()
    return SEEDS[name]


# The rule


@pytest.mark.parametrize("name", TARGETS)
def test_good_files_are_read(name):
    """Some seeds of every target are read, so that damage to them gets far."""
    outcomes = [check(TARGETS[name][0], data) for data in seeds(name)]
    assert outcomes.count("read") >= len(outcomes) / 2, outcomes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_damaged_files_keep_the_rule(name, data):
    """Cut, spliced and overwritten files are read or refused."""
    number, other = (data.draw(st.integers(0, len(seeds(name)) - 1)) for _ in range(2))
    check(TARGETS[name][0], edited(seeds(name)[number], data.draw(edits), seeds(name)[other]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", [pytest.param(file, id=file.name) for name in TARGETS for file in corpus(name)])
def test_what_once_broke_the_rule_keeps_it(file):
    """Inputs that fuzzing found; the name says which target they broke, and how."""
    check(TARGETS[file.name.split("--")[0]][0], file.read_bytes())


def test_the_rule_can_be_broken():
    """Another exception, a hang and too much memory are noticed."""

    def hang(data: bytes) -> None:
        while True:
            pass

    def crash(data: bytes) -> None:
        raise KeyError("x")

    def grow(data: bytes) -> None:
        np.ones((100 << 20) // 8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fuzz.rule.SECONDS", 0.05)
        with pytest.raises(Broken, match="work"):
            check(hang, b"")
    with pytest.raises(Broken, match="KeyError"):
        check(crash, b"")
    keep_freed_memory()  # as a training in this process may have done
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fuzz.rule.MEMORY", 50 << 20)
        for _ in range(2 if Path("/proc/self/clear_refs").exists() else 1):  # the second one, too
            with pytest.raises(Broken, match="MiB"):
                check(grow, b"")


def refused(target: str, data: bytes) -> None:
    assert check(TARGETS[target][0], data) == "refused"


# Pickles


class Runs:
    """Unpickled by Python, it makes a file."""

    def __reduce__(self):
        return os.mkdir, (str(HOME / "made"),)


def code(*parts: bytes | str) -> bytes:
    """A pickle written by hand."""
    return b"\x80\x04" + b"".join(part.encode() if isinstance(part, str) else part for part in parts) + b"."


PICKLES = {
    "runs a command": pickle.dumps(Runs()),
    "runs a command, in an array": pickle.dumps(np.array([Runs()], object)),
    "runs a command, in a dict": pickle.dumps(mini() | {"class_dict": Runs()}, 2),
    "names eval": code("cbuiltins\neval\n(X\x04\x00\x00\x001+1.tR"),
    "names a module's function": code("cnumpy\nload\n(X\x01\x00\x00\x00atR"),
    "names through a dot": code("\x8c\x05numpy\x8c\x0cndarray.tofile\x93"),
    "a codec that unpacks": code("c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R", "Rb"),
    "makes an instance": code("cnumpy\nndarray\n)\x81"),
    "old instance": code("(icollections\nOrderedDict\n"),
    "a persistent id": code("Pabc\n"),
    "an extension": code("\x82\x01"),
    "a set": pickle.dumps({1, 2}),
    "numbers as keys": pickle.dumps({1: 2}),
    "tuples as keys": pickle.dumps({((1,),): 2}),
    "tuples of tuples": code(b"K\x01\x85", *(b"\x94h%c\x86" % k for k in range(40))),
    "a memo of gigabytes": code(b"K\x01r\xff\xff\xff\x7f", b"h\x05"),
    "bytes of exabytes": code(b"\x8e" + struct.pack("<Q", 1 << 62)),
    "text of gigabytes": code(b"X\xff\xff\xff\xff"),
    "negative length": code(b"T\xff\xff\xff\xff"),
    "a frame of exabytes": code(b"\x95" + struct.pack("<Q", 1 << 63), b"\x8e" + struct.pack("<Q", 1 << 63)),
    "millions of lists": code(b"]" * 200_000),
    "millions of marks": code(b"(" * 200_000),
    "lists in lists": code(b"]\x94" * 100_000),
    "an array of exabytes": pickle.dumps(np.zeros(9), 2).replace(b"K\x09\x85", b"J\xff\xff\xff\x7f\x85"),
    "an array of negative length": pickle.dumps(np.zeros(9), 2).replace(b"K\x09\x85", b"J\xff\xff\xff\xff\x85"),
    "records": pickle.dumps(np.zeros(2, [("a", "f4")])),
    "dates": pickle.dumps(np.zeros(2, "M8[s]")),
    "an array filled twice": pickle.dumps(np.zeros(300))[:-1] + b"K\x01b.",
    "nothing": b"",
    "no end": code(b"K\x01")[:-1],
    "protocol 0": pickle.dumps([1], 0),
}


@pytest.mark.parametrize("what", PICKLES)
def test_pickles_that_do_anything_are_refused(what):
    """Nothing is imported, called or allocated; what is wanted of a pickle is said."""
    data = PICKLES[what]
    if what == "an array of exabytes":
        assert data != pickle.dumps(np.zeros(9), 2)
    refused("pickle", data)
    assert not (HOME / "made").exists()


def test_the_reason_is_given():
    file = scratch("reason.pkl", pickle.dumps(Runs()))
    with pytest.raises(InputError, match=r"posix.mkdir|nt.mkdir"):
        read_pickle(file)


# Images


def bomb(width: int, height: int) -> bytes:
    """A PNG of one grey, that many pixels from a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compress(bytes((width + 1) * height), 1)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def scans(size: int, count: int) -> bytes:
    """A progressive JPEG that goes over every pixel again and again."""
    Image.new("L", (size, size), 99).save(stream := io.BytesIO(), "JPEG", progressive=True)
    data = stream.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def pages(count: int) -> bytes:
    """A TIFF whose directories follow each other."""
    data = b"II*\x00\x08\x00\x00\x00"
    for _ in range(count):
        data += struct.pack("<HHHIII", 1, 256, 3, 1, 1, len(data) + 18)
    return data


def run_lengths() -> bytes:
    """A BMP with run lengths."""
    head = struct.pack("<IiiHHIIiiII", 40, 9, 9, 1, 8, 1, 4, 0, 0, 256, 0)
    return (
        b"BM"
        + struct.pack("<IHHI", 14 + 40 + 1024 + 4, 0, 0, 14 + 40 + 1024)
        + head
        + bytes(1024)
        + b"\x09\x01\x00\x01"
    )


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n"
IMAGES = {
    "too many pixels": bomb(MOST_PIXELS // 8192 + 1, 8192),
    "one endless row": bomb(MOST_PIXELS + 1, 1),
    "too many scans": scans(2048, 300),
    "run lengths": run_lengths(),
    "a program": POSTSCRIPT,
    "thousands of pages": pages(50_000),
    "text for pixels": b"P2 3 3 255 1 2 3 4 5 6 7 8 9",
}


@pytest.mark.parametrize("what", IMAGES)
def test_images_that_would_take_long_are_refused(what):
    refused("image", IMAGES[what])


def test_large_images_are_read():
    """A photo of 16 million pixels is no bomb, and an animation's first frame is an image, too."""
    assert check(lambda data: read_image(io.BytesIO(data), 8, 3), bomb(4096, 4096)) == "read"
    moving = next(data for data in seeds("image") if data.startswith(b"GIF") and data.count(b",\0\0\0\0") > 1)
    assert read_image(io.BytesIO(moving), 8, 1).shape == (8, 8, 1)
    with pytest.raises(InputError, match="2 frames"):
        read_upright(io.BytesIO(moving), 1, still=True)


# Archives


def zipped(names: list[str], content: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    with zipfile.ZipFile(stream := io.BytesIO(), "w", method) as archive:
        for name in names:
            archive.writestr(name, content)
    return stream.getvalue()


NAMES = [f"a/b/{number:02}.png" for number in range(20)]


def test_archives_that_unpack_to_much_are_refused():
    """Gigabytes of zeros behind an image, and sizes that lie about them."""
    bombs = zipped(NAMES, picture() + bytes(1 << 21))
    assert len(bombs) < 1 << 17
    refused("archive", bombs)
    lying = bytearray(bombs)
    at = lying.index(b"PK\x01\x02")
    while at >= 0:
        struct.pack_into("<I", lying, at + 24, 100)  # what the directory says that it unpacks to
        at = lying.find(b"PK\x01\x02", at + 1)
    assert check(TARGETS["archive"][0], bytes(lying)) == "refused"
    refused("archive", zipped([f"../../../{name}" for name in NAMES[:19]], picture()))


def test_names_in_an_archive_are_no_paths():
    """Nothing of an archive is written to the disk, whatever its names."""
    before = sorted(HOME.rglob("*"))
    assert (
        check(TARGETS["archive"][0], zipped([f"../../../../{name}" for name in NAMES], picture(size=(8, 8)))) == "read"
    )
    assert sorted(HOME.rglob("*")) == before


# Checkpoints and configs


def checkpoint(**changes: object) -> bytes:
    """A checkpoint whose config says something else."""
    parameters = draw_parameters(CONFIG)
    data = save(HOME / "changed.safetensors", parameters, CONFIG).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["config"] = json.dumps(json.loads(CONFIG.to_json()) | changes)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def tensors(dtype: str, count: int, *, end: int | None = None, **more: object) -> bytes:
    """A safetensors file of one tensor."""
    end = count if end is None else end
    text = json.dumps({"a": {"dtype": dtype, "shape": [count], "data_offsets": [0, end]}} | more).encode()
    return struct.pack("<Q", len(text)) + text + bytes(min(end, 64))


CONFIGS = {
    name: {name: value}
    for name, value in [
        *(("layers", 10**9), ("blocks", 10**9), ("blocks", 10**18), ("image_size", 10**9), ("way", 10**9)),
        *(("heads", 10**6), ("key_width", 1e300), ("inner_width", 1e308), ("channels", 10**400), ("encoding", 10**30)),
        *(("generate", "first" + 5000 * "1"), ("generate", 10**6 * "1,"), ("slope", float("nan")), ("shot", True)),
    ]
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_ask_for_too_much_are_refused(name):
    """By their JSON, and as metadata of a checkpoint."""
    text = json.dumps(json.loads(Config().to_json()) | CONFIGS[name])
    refused("config", text.encode())
    refused("checkpoint", checkpoint(**CONFIGS[name]))


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 1 << 63) + b"{}",
        struct.pack("<Q", 10**8) + b"{}",
        tensors("F32", 1 << 60),
        tensors("F32", 16, end=1 << 60),
        tensors("U8", 64),
        tensors("U8", 64, __metadata__=None),
        tensors("U8", 64, __metadata__={"format": "mini_ht 1", "config": 5000 * "["}),
        tensors("U8", 64, __metadata__={"format": "mini_ht 1", "config": 200_000 * '{"a":'}),
        tensors("U8", 64, __metadata__={"format": "mini_ht 1", "config": '{"way": ' + 5000 * "1" + "}"}),
    ],
)
def test_headers_that_lie_are_refused(data):
    refused("checkpoint", data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(value):
    parameters = draw_parameters(CONFIG)
    parameters["logits.xi"][0, 0] = value
    with pytest.raises(InputError, match=r"logits\.xi that are not finite"):
        load(save(HOME / "infinite.safetensors", parameters, CONFIG))


STATISTICS = {"conv1.mean": np.zeros(2), "conv1.variance": np.ones(2), "conv2.mean": np.zeros(2)}


@pytest.mark.parametrize("variance", [None, np.ones(3), np.ones((2, 1)), -np.ones(2)])
def test_norm_statistics_that_do_not_fit_are_refused(variance):
    parameters = draw_parameters(CONFIG) | STATISTICS | ({} if variance is None else {"conv2.variance": variance})
    with pytest.raises(InputError, match=r"conv2\.variance"):
        load(save(HOME / "statistics.safetensors", parameters, CONFIG))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool, np.complex64])
def test_other_dtypes_are_refused(dtype):
    parameters = {name: array.astype(dtype) for name, array in draw_parameters(CONFIG).items()}
    with pytest.raises(InputError, match=r"numbers of type|no safetensors file"):
        load(save(HOME / "integers.safetensors", parameters, CONFIG))


# Classifier files


def npz(**arrays: np.ndarray) -> bytes:
    np.savez_compressed(stream := io.BytesIO(), **arrays)
    return stream.getvalue()


def test_classifier_files_that_run_code_or_unpack_to_much_are_refused():
    refused("classifier-npz", npz(metadata=np.array([Runs()], object)))
    assert not (HOME / "made").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_file, "LARGEST_FILE", 1 << 20)
        with pytest.raises(InputError, match="unpacks to gigabytes"):
            load_classifier(scratch("bomb.npz", npz(metadata=np.zeros((1 << 20) + 1, np.uint8))))
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        with archive.open("metadata.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (1 << 62,)})
    refused("classifier-npz", stream.getvalue())
    about = json.loads(seeds("metadata")[0])
    for shape in ([10**6, 10**6, 1], [8, 8], [8.5, 8, 1], [-8, 8, 1], [True, 8, 1], None):
        refused("metadata", json.dumps(about | {"preprocess": json.dumps({"shape": shape})}).encode())


# Folders


def linked(path: Path) -> Path:
    for name in "abc":
        (path / name).mkdir(parents=True)
        (path / name / "1.png").write_bytes(picture())
    return path


def test_links_out_of_a_folder_are_refused(tmp_path):
    """A file, a class or a part from elsewhere is not read; a link inside, or to the folder itself, is."""
    data, secret = linked(tmp_path / "data"), linked(tmp_path / "secret")
    (data / "a" / "2.png").symlink_to(data / "b" / "1.png")
    (tmp_path / "link").symlink_to(data)
    assert read_class_folders(tmp_path / "link", 4, 1).counts.tolist() == [2, 1, 1]
    for place, target in (("a/3.png", secret / "a" / "1.png"), ("d", secret / "a")):
        (data / place).symlink_to(target)
        with pytest.raises(InputError, match=r"is a link that leads out of"):
            read_class_folders(data, 4, 1)
        with pytest.raises(InputError, match=r"is a link that leads out of"):
            read_support(data, (8, 8, 1), 4)
        (data / place).unlink()
    (data / "_unlabelled").symlink_to(secret / "a")
    with pytest.raises(InputError, match=r"_unlabelled is a link that leads out of"):
        read_support(data, (8, 8, 1), 4)
    (tmp_path / "parts" / "test").mkdir(parents=True)
    linked(tmp_path / "parts" / "test" / "x")
    (tmp_path / "parts" / "train").symlink_to(secret)
    with pytest.raises(InputError, match=r"is a link that leads out of"):
        folder(tmp_path / "parts", 4, 1)


def test_links_that_go_round_are_refused(tmp_path):
    data = linked(tmp_path)
    (data / "a" / "round.png").symlink_to(data / "a" / "round.png")
    with pytest.raises(InputError, match=r"round\.png.*not an image"):
        read_class_folders(data, 4, 1)


@pytest.mark.skipif(os.name != "posix", reason="names are text elsewhere")
@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\nb", b"a\x1b[2J"])
def test_names_that_are_no_plain_text_are_refused(tmp_path, name):
    """They could not be printed, or would do something to the terminal."""
    data = linked(tmp_path)
    os.mkdir(os.fsencode(data) + b"/" + name)
    with pytest.raises(InputError, match="no plain UTF-8") as error:
        read_class_folders(data, 4, 1)
    assert str(error.value).isprintable()
    (data / os.fsdecode(name) / "1.png").write_bytes(picture())
    with pytest.raises(InputError, match="no plain UTF-8"):
        read_support(data, (8, 8, 1), 4)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_are_not_waited_for(tmp_path):
    """A pipe in the place of a file is refused at once."""
    for name, reader in (
        ("a.png", lambda file: read_image(file, 4, 1)),
        ("a.safetensors", load),
        ("a.pkl", read_pickle),
        ("a.npz", load_classifier),
        ("a.onnx", load_classifier),
    ):
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match="plain file"):
            check_file(reader, tmp_path / name)


def check_file(reader, file: Path) -> None:
    """As `check` does, so that a reader that waits is stopped."""
    error: list[InputError] = []

    def run(data: bytes) -> None:
        try:
            reader(file)
        except InputError as caught:
            error.append(caught)

    check(run, b"")
    raise error[0]
