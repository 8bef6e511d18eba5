"""One target for each reader of bytes from outside: the right result or an InputError, never anything else."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import io
import json
import pickle
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from mini_ht import Config, draw_parameters, save
from mini_ht.adaptation import Generator, Task, adapt
from mini_ht.classifier_file import load_classifier, load_network
from mini_ht.datasets import imagenet, mapped, omniglot, read_class_folders
from mini_ht.datasets.images import read_image, read_upright
from mini_ht.datasets.pickles import read_pickle
from mini_ht.demo.drawing import strokes_to_ink
from mini_ht.demo.messages import read_adapt, read_predict
from mini_ht.demo.server import Handler, fixed_headers
from mini_ht.demo.tasks import Tasks
from mini_ht.errors import InputError
from mini_ht.export import PRECISIONS, file_bytes
from mini_ht.figures import complete, read_metrics
from mini_ht.generator import generate
from mini_ht.ink import prepare
from mini_ht.parameters import STATISTICS, generator_size, load
from mini_ht.presets import preset
from mini_ht.training.checkpoint import STATE, load_run, save_run
from mini_ht.training.loop import fresh_state

CONFIG = Config(way=2, queries=1, image_size=8, channels=2, blocks=2, encoding=4, layers=1, shared_features=4)
HOME = Path(tempfile.mkdtemp(prefix="mini-ht-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
CPU = torch.device("cpu")


def scratch(name: str, data: bytes) -> Path:
    """A file with these bytes."""
    file = HOME / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def picture(mode: str = "L", form: str = "PNG", size: tuple[int, int] = (9, 7), **options: Any) -> bytes:
    """A small image file."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode) if mode != "I;16" else Image.new(mode, size, 999)
    image.save(stream := io.BytesIO(), form, **options)
    return stream.getvalue()


def with_checksums(data: bytes) -> bytes:
    """A PNG whose checksums fit, so that damage reaches what is behind them; other data as they are."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        data = data[:end] + struct.pack(">I", zlib.crc32(data[at + 4 : end])) + data[end + 4 :]
        at = end + 4
    return data


def images() -> list[bytes]:
    """Image files of every kind that is read, and of some that are not."""
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    frames = [Image.new("L", (9, 7), value) for value in (0, 200)]
    frames[0].save(moving := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:])
    frames[0].save(pages := io.BytesIO(), "TIFF", save_all=True, append_images=frames[1:])
    return [
        *(picture(mode) for mode in ("L", "RGB", "RGBA", "P", "1", "LA", "I;16")),
        picture("RGB", "JPEG", exif=exif), picture("L", "JPEG", progressive=True), picture("CMYK", "JPEG"),
        picture("P", "GIF"), moving.getvalue(), picture("RGB", "BMP"), picture("RGB", "WEBP"), picture("RGB", "PPM"),
        picture("L", "TIFF", compression="tiff_lzw"), picture("RGB", "TIFF", exif=exif), pages.getvalue(),
        picture("RGB", "TIFF", compression="tiff_adobe_deflate"),
    ]  # fmt: skip


def image(data: bytes) -> None:
    """An image as data sets and as classifiers read it."""
    data = with_checksums(data)
    with contextlib.suppress(InputError):
        found = read_image(io.BytesIO(data), 8, 3)
        assert found.shape == (8, 8, 3) and found.dtype == np.uint8
    read_upright(io.BytesIO(data), 1, still=True)


def ink(data: bytes) -> None:
    """An image file as a generator wants it."""
    found = prepare([scratch("photo.png", with_checksums(data))], "ink", (8, 8, 1))
    assert found.shape == (1, 8, 8, 1) and np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1


def archives() -> list[bytes]:
    """An Omniglot archive of one character, packed and not."""
    found = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(stream := io.BytesIO(), "w", method) as archive:
            for number in range(20):
                archive.writestr(f"images_background/Alphabet/character01/{number:02}.png", picture(size=(8, 8)))
        found.append(stream.getvalue())
    return found


def archive(data: bytes) -> None:
    """An Omniglot archive."""
    pixels, names = OMNIGLOT._read_archive(io.BytesIO(data), Path("images_background.zip"), 1, 8)
    assert pixels.shape == (20, 8, 8, 1) and len(names) == 1


def cache(data: bytes) -> None:
    """The cache of scaled drawings, damaged: it is made anew."""
    place = HOME / "omniglot"
    if not place.exists():
        for name in OMNIGLOT.ARCHIVES:
            scratch(f"omniglot/{name}", archives()[0])
    few = dict.fromkeys(OMNIGLOT.ARCHIVES, (1, ""))
    with mock.patch.object(OMNIGLOT, "ARCHIVES", few), environment("omniglot-cache") as kept:
        for file in kept.glob("*.npz"):
            file.write_bytes(data)
        found = omniglot(place, 8)["train"]
        assert found.pixels.shape == (40, 8, 8, 1)
        assert len(list(kept.iterdir())) == 1


@contextlib.contextmanager
def environment(name: str) -> Any:
    """A folder for the cache."""
    with mock.patch.dict("os.environ", {"MINI_HT_CACHE": str(HOME / name)}):
        yield HOME / name


def caches() -> list[bytes]:
    """The cache of two little archives."""
    np.savez(stream := io.BytesIO(), pixels=np.zeros((40, 8, 8, 1), np.uint8), names=np.array(["a", "b"]))
    return [stream.getvalue()]


def mini(seed: int = 0) -> dict[str, Any]:
    """What a part of mini-ImageNet holds, of 6 x 5 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 5, 3), np.uint8)
    return {"image_data": pixels, "class_dict": {f"n{seed}1": [0, 2], f"n{seed}2": [1, 3]}}


def pickles() -> list[bytes]:
    """Pickles of every protocol, of arrays, text and numbers; and some that are refused."""
    odd = [np.float32(3.5), "é" * 300, b"x" * 300, (1, 2.5, None, True), np.array(["a", "b"]), 1 << 70, {"a": {}}]
    good = [pickle.dumps(content, number) for number in (2, 3, 4, 5) for content in (mini(), odd)]
    old = b"\x80\x02}q\x00(U\x05labelq\x01]q\x02(K\x01U\x01aq\x03h\x03eU\x01bq\x04T\x03\x00\x00\x00abcu."  # of Python 2
    return [*good, old, pickle.dumps(mini(), 0), pickle.dumps(print), pickle.dumps({1, 2})]


def unpickle(data: bytes) -> None:
    """A pickle: whatever it holds is plain."""
    plain = (type(None), bool, int, float, str, bytes, memoryview, list, tuple, dict, np.ndarray)
    assert isinstance(read_pickle(scratch("a.pkl", data)), plain)


def mini_imagenet(data: bytes) -> None:
    """The training part of mini-ImageNet."""
    for part, seed in (("val", 1), ("test", 2)):
        if not (file := HOME / f"mini/mini-imagenet-cache-{part}.pkl").exists():
            scratch(str(file.relative_to(HOME)), pickle.dumps(mini(seed)))
    scratch("mini/mini-imagenet-cache-train.pkl", data)
    with fresh_cache() as kept:
        found = imagenet.mini_imagenet(HOME / "mini", 4, 3)["train"]
        assert found.pixels.shape == (found.counts.sum(), 4, 4, 3) and len(list(kept.iterdir())) == 1


@contextlib.contextmanager
def fresh_cache() -> Any:
    """An empty folder for the cache, in which nothing may be left over when something was refused."""
    with environment("fresh") as kept, mock.patch("os.fsync"):
        shutil.rmtree(kept, ignore_errors=True)
        try:
            yield kept
        except InputError:
            assert not list(kept.glob("*")), "something half made was left"
            raise


def tiered() -> list[bytes]:
    """A pair of tieredImageNet's pickles for its training part, the images behind the labels."""
    pictures = [np.frombuffer(picture("RGB"), np.uint8)] * 3
    labels = {"label_specific": np.array([1, 0, 1]), "label_specific_str": ["n1", "n2"]}
    return [pickle.dumps(labels, number) + MARK + pickle.dumps(pictures, number) for number in (2, 4)]


MARK = b"--and--"


def tiered_imagenet(data: bytes) -> None:
    """The training part of tieredImageNet."""
    for part in ("val", "test"):
        if not (HOME / f"tiered/{part}_labels.pkl").exists():
            labels = {"label_specific": np.array([0]), "label_specific_str": [part]}
            scratch(f"tiered/{part}_labels.pkl", pickle.dumps(labels))
            scratch(f"tiered/{part}_images_png.pkl", pickle.dumps([picture("RGB")]))
    labels, _, pictures = data.partition(MARK)
    scratch("tiered/train_labels.pkl", labels)
    scratch("tiered/train_images_png.pkl", pictures)
    with fresh_cache():
        found = imagenet.tiered_imagenet(HOME / "tiered", 4, 3)["train"]
        assert found.pixels.shape == (found.counts.sum(), 4, 4, 3)


def converted(data: bytes) -> None:
    """A converted set whose lists or array were damaged: it is made anew, and the same."""
    file = scratch("source", b"")
    pixels = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    source = mapped.Source(["a", "b"], [[0], [1]], lambda row: pixels[row])
    with environment("converted"), mock.patch("os.fsync"):
        for kept in (HOME / "converted").glob(f"*/{'classes.json' if data[:1] in (b'{', b'[') else 'part.npy'}"):
            kept.write_bytes(data)
        found = mapped.mapped("set", {"source": file}, 4, 3, lambda: {"part": source})["part"]
        assert found.pixels.shape == (found.counts.sum(), 4, 4, 3) and found.select([0]).pixels.dtype == np.uint8


def conversions() -> list[bytes]:
    """Its two files."""
    np.save(stream := io.BytesIO(), np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3))
    return [stream.getvalue(), json.dumps({"part": [["a", "b"], [1, 1]]}).encode()]


def checkpoints() -> list[bytes]:
    """A checkpoint without and with learned norm statistics."""
    config, parameters = dataclasses.replace(CONFIG, norm="support"), draw_parameters(CONFIG)
    learned = {f"conv{k}.{kind}": np.ones(CONFIG.channels, np.float32) for k in (1, 2) for kind in STATISTICS}
    both = (parameters, CONFIG), (parameters | learned, config)
    return [save(HOME / "seed.safetensors", *parts).read_bytes() for parts in both]


def checkpoint(data: bytes) -> None:
    """A checkpoint, and what a generator makes of it."""
    parameters, config = load(scratch("a.safetensors", data))
    if generator_size(config) < 100_000 and config.image_size < 40:
        shape = (2, config.image_size, config.image_size, config.image_channels)
        single = {name: array.astype(np.float32) for name, array in parameters.items()}
        with np.errstate(all="ignore"):  # finite parameters may be too large to compute with
            generate(single, config, np.zeros(shape, np.float32), np.arange(2))


def states() -> list[bytes]:
    """The state of a training."""
    save_run(HOME / "seed", CONFIG, fresh_state(CONFIG, CPU))
    return [(HOME / "seed" / STATE).read_bytes()]


def state(data: bytes) -> None:
    """The state of a training, resumed."""
    scratch(f"run/{STATE}", data)
    found = load_run(HOME / "run", CONFIG, CPU)
    assert found.step >= 0 and found.vector.dtype == torch.float32


def config(data: bytes) -> None:
    """A config's JSON, and what follows from it."""
    generator_size(Config.from_json(data.decode("utf-8", "surrogateescape")))


def classifiers(suffix: str) -> list[bytes]:
    """A classifier file in each precision."""
    images = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
    generator = Generator(draw_parameters(CONFIG), CONFIG, "fuzz")
    (made,) = adapt(generator, [Task(images, np.arange(2), ["a", "b"])])
    return [file_bytes(made, HOME / f"seed{suffix}", precision) for precision in PRECISIONS]


def classifier(suffix: str) -> Callable[[bytes], None]:
    """A classifier file that is read, shown, and asked."""

    def target(data: bytes) -> None:
        file = scratch(f"a{suffix}", data)
        with contextlib.suppress(InputError):
            load_network(file)
        found = load_classifier(file)
        with np.errstate(all="ignore"):
            assert found.predict_proba([HOLE]).shape == (1, len(found.classes_))

    return target


HOLE = np.pad(np.zeros((4, 4), np.float32), 9, constant_values=1)  # ink: a black square on white paper


def metadata(data: bytes) -> None:
    """The metadata of a classifier file."""
    if "npz" not in BASES:
        BASES["npz"] = classifiers(".npz")[0]
    with np.load(io.BytesIO(BASES["npz"])) as stored:
        arrays = {name: stored[name] for name in stored.files} | {"metadata": np.frombuffer(data, np.uint8)}
    np.savez(stream := io.BytesIO(), **arrays)
    classifier(".npz")(stream.getvalue())


BASES: dict[str, bytes] = {}


def metadata_seeds() -> list[bytes]:
    """The metadata of a good one."""
    with np.load(io.BytesIO(classifiers(".npz")[0])) as stored:
        return [stored["metadata"].tobytes()]


def messages() -> list[bytes]:
    """Messages of the page."""
    drawing = [[[0.1, 0.2], [0.5, 0.6]], [[1, 0]]]
    both = {"classes": [[drawing], [drawing, drawing]]}, {"id": "0" * 16, "strokes": drawing}
    return [json.dumps(message).encode() for message in both]


def message(data: bytes) -> None:
    """A message of the page, and what is drawn from it."""
    with contextlib.suppress(InputError):
        _, strokes = read_predict(data)
        assert np.isfinite(strokes_to_ink(strokes, 8)).all()
    for drawings in read_adapt(data, 5):
        assert all(np.isfinite(strokes_to_ink(drawing, 8)).all() for drawing in drawings)


def requests() -> list[bytes]:
    """What a browser sends, in one connection each."""
    head = b"Host: 127.0.0.1:80\r\nOrigin: http://127.0.0.1:80\r\nContent-Type: application/json\r\nContent-Length: "
    posts = [
        b"POST /%s HTTP/1.1\r\n%s%d\r\n\r\n%s" % (path, head, len(body), body)
        for path, body in zip((b"adapt", b"predict"), messages(), strict=True)
    ]
    return [b"GET / HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n", *posts, posts[1] + posts[0]]


class Connection:
    """A socket that has received some bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.sent = data, b""

    def makefile(self, mode: str, size: int) -> io.BytesIO:
        """What came."""
        return io.BytesIO(self.data)

    def sendall(self, data: bytes) -> None:
        """What goes."""
        self.sent += bytes(data)

    def settimeout(self, seconds: float) -> None:
        """Never."""

    setsockopt = settimeout


def request(data: bytes) -> None:
    """A connection to the page's server: every answer is a whole one, 200 or 4xx."""
    if "server" not in SERVER:
        page = b"<style>a</style><script>b</script>"
        tasks = Tasks(draw_parameters(CONFIG), CONFIG)
        hosts, address = {"127.0.0.1:80", "localhost:80"}, "http://127.0.0.1:80/"
        parts = {"tasks": tasks, "page": page, "hosts": hosts, "url": address, "fixed_headers": fixed_headers(page)}
        SERVER["server"] = SimpleNamespace(**parts)
    connection = Connection(data)
    with mock.patch.object(Handler, "disable_nagle_algorithm", False):
        Handler(connection, ("127.0.0.1", 1), SERVER["server"])  # type: ignore[arg-type]
    assert not connection.sent or connection.sent.startswith((b"HTTP/1.1 200", b"HTTP/1.1 4"))
    assert b"Traceback" not in connection.sent


SERVER: dict[str, Any] = {}


def metrics(data: bytes) -> None:
    """The rows of a training's log."""
    for row in complete(read_metrics(scratch("metrics.jsonl", data))):
        assert row["episodes"] + row["train_accuracy"] is not None


def rows() -> list[bytes]:
    """A log of two rows."""
    row = {"step": 50, "episodes": 800, "train_accuracy": 0.5, "validation_accuracy": None}
    return [f"{json.dumps(row)}\n{json.dumps(row | {'validation_accuracy': 0.25})}\n".encode()]


def folders(data: bytes) -> None:
    """A class folder of two images."""
    scratch("classes/a/1.png", picture())
    scratch("classes/a/2.jpg", data)
    assert read_class_folders(HOME / "classes", 4, 1).pixels.shape == (2, 4, 4, 1)


OMNIGLOT: Any = __import__("sys").modules[omniglot.__module__]  # as an attribute, the function hides the module
TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "image": (image, images),
    "ink": (ink, images),
    "folder": (folders, images),
    "archive": (archive, archives),
    "cache": (cache, caches),
    "pickle": (unpickle, pickles),
    "mini-imagenet": (mini_imagenet, lambda: [pickle.dumps(mini(), number) for number in (2, 3, 4, 5)]),
    "tiered-imagenet": (tiered_imagenet, tiered),
    "converted": (converted, conversions),
    "checkpoint": (checkpoint, checkpoints),
    "state": (state, states),
    "config": (config, lambda: [preset("quickstart").to_json().encode()]),
    "classifier-npz": (classifier(".npz"), lambda: classifiers(".npz")),
    "classifier-onnx": (classifier(".onnx"), lambda: classifiers(".onnx")),
    "metadata": (metadata, metadata_seeds),
    "message": (message, messages),
    "request": (request, requests),
    "metrics": (metrics, rows),
}
