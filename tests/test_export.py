"""Classifier files: what runs in onnxruntime and in NumPy is the same, small, and whole or not there."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import cases
from tolerances import assert_close, relative_error

from mini_ht import InputError, generate
from mini_ht import export as export_module
from mini_ht.classifier import HyperTransformerClassifier
from mini_ht.classifier_file import FORMAT, OnnxNetwork, load_classifier, load_network
from mini_ht.datasets import glyphs
from mini_ht.export import export
from mini_ht.folded import fold
from mini_ht.kernel_picture import block_picture, draw_network
from mini_ht.onnx_graph import onnx_model
from mini_ht.task_classifier import TaskClassifier, class_array

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SUFFIXES = ("onnx", "npz")
WAY = 20


@pytest.fixture(scope="module")
def drawings():
    """[WAY, 4, 28, 28, 1] uint8."""
    return glyphs(seed=77, classes=WAY, drawings=4).pixels.reshape(WAY, 4, 28, 28, 1)


@pytest.fixture(scope="module")
def fitted(drawings):
    return HyperTransformerClassifier().fit(drawings[:, 0], [f"symbol {k}" for k in range(WAY)])


@pytest.fixture(scope="module", params=SUFFIXES)
def file(request, fitted, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / f"classifier.{request.param}"
    fitted.export(path)
    return path


@given(cases(), st.booleans())
def test_onnx_computes_what_numpy_does(case, half):
    """For every kind of network onnxruntime gives NumPy's logits, of the rounded network with half precision."""
    cnn = generate(case.parameters, case.config, case.support, case.labels, case.mask)
    network = fold(cnn, case.config.way)
    network = network.half() if half else network
    single = type(network)(
        {k: x.astype(np.float32) for k, x in network.arrays.items()}, network.slope, network.image_shape
    )
    query = case.query[0].astype(np.float32)
    found = OnnxNetwork(onnx_model(single, {"a": "b"}, half))
    assert_close(found(query), single(query), "float32")
    assert found.metadata == {"a": "b"}


def test_a_file_is_the_classifier(file, fitted, drawings):
    """Read back, either form gives the same answers for the same images, and knows where it comes from."""
    images = drawings[:, 1:].reshape(-1, 28, 28, 1)
    loaded = load_classifier(file)
    assert relative_error(loaded.predict_proba(images), fitted.predict_proba(images)) < 1e-4
    assert np.array_equal(loaded.predict(images), fitted.predict(images))
    assert np.array_equal(loaded.classes_, fitted.classes_) and loaded.provenance == fitted.task_.provenance
    assert loaded.provenance["generator"] == "omniglot" and loaded.provenance["norm"] == "support"
    network = load_network(file).network
    for name, array in fitted.task_.network.arrays.items():
        assert np.array_equal(network.arrays[name], array), name


def test_probabilities_are_an_output(fitted, tmp_path, drawings):
    """The ONNX file alone gives logits and probabilities of [N, 28, 28, 1] images, and says what it wants."""
    import onnx
    import onnxruntime

    fitted.export(tmp_path / "c.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "c.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "c.onnx")
    images = fitted.support_[:3]
    logits, probabilities = session.run(["logits", "probabilities"], {"images": images})
    assert logits.shape == (3, WAY) and np.abs(probabilities - fitted.predict_proba(drawings[:3, 0])).max() < 1e-5
    found = session.get_modelmeta().custom_metadata_map
    assert found["format"] == FORMAT and json.loads(found["classes"]) == list(fitted.classes_)
    assert "prepared before" in found["images"] and "date" not in found


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("half", [False, True])
def test_size_report_and_bytes(fitted, tmp_path, suffix, half):
    """A 20-way 8-channel classifier is within 12 KB, the report is true, and written again it is the same bytes."""
    one, two = (tmp_path / f"{name}.{suffix}" for name in "ab")
    report = fitted.export(one, half=half)
    assert fitted.export(two, half=half).difference == report.difference <= 1e-4
    assert one.read_bytes() == two.read_bytes() and report.path == one
    assert report.size == one.stat().st_size <= (8_000 if half else 12_000)


def test_half_precision_answers_nearly_the_same(fitted, tmp_path, drawings):
    """Rounded to half precision, a classifier gives the same class to nearly all images."""
    fitted.export(tmp_path / "c.npz", half=True)
    images = drawings[:, 1:].reshape(-1, 28, 28, 1)
    loaded = load_classifier(tmp_path / "c.npz")
    assert np.mean(loaded.predict(images) == fitted.predict(images)) > 0.95
    assert 0 < np.abs(loaded.predict_proba(images) - fitted.predict_proba(images)).max() < 0.05


@pytest.mark.parametrize("classes", [list("abc"), [1, 2, 3], [0.5, 1.5, 2.5], [True, "x", 3], ["é", "\n", '"']])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_class_names_survive(drawings, tmp_path, classes, suffix):
    """Text, numbers and mixtures of both come back as they were."""
    clf = HyperTransformerClassifier().fit(drawings[:3, 0], classes)
    clf.export(tmp_path / f"c.{suffix}")
    found = load_classifier(tmp_path / f"c.{suffix}").classes_.tolist()
    assert found == clf.classes_.tolist() and list(map(type, found)) == list(map(type, clf.classes_.tolist()))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_difference_stops_it(fitted, tmp_path, monkeypatch, suffix):
    """If the file computed something else, or NaN, it would not be put in place, and the old one stays."""
    path = tmp_path / f"c.{suffix}"
    fitted.export(path)
    before = contents(tmp_path)
    reader = "OnnxNetwork" if suffix == "onnx" else "unpack"
    for wrong in (1e-3, np.nan):
        run = lambda images, wrong=wrong: fitted.task_.network(images) + wrong  # noqa: E731
        monkeypatch.setattr(export_module, reader, lambda data, run=run: run if suffix == "onnx" else (run, {}))
        with pytest.raises(InputError, match="would differ"):
            fitted.export(path, force=True)
        assert contents(tmp_path) == before


def test_bad_targets(fitted, tmp_path):
    """A file that is there, a folder, and another suffix are refused; force replaces files alone."""
    path = tmp_path / "c.onnx"
    path.write_text("mine")
    (tmp_path / "d.npz").mkdir()
    for target, words, force in (("c.onnx", "--force", False), ("d.npz", "is there", True), ("c.pt", "suffix", False)):
        with pytest.raises(InputError, match=words):
            fitted.export(tmp_path / target, force=force)
    assert path.read_text() == "mine"
    fitted.export(path, force=True)
    assert load_classifier(path).classes_.shape == (WAY,)


def test_names_that_no_file_can_hold(drawings, tmp_path, fitted):
    """Classes that are tuples, and a classifier that came from an ONNX file, cannot be exported."""
    clf = HyperTransformerClassifier().fit(drawings[:2, 0], [(1, 2), (3, 4)])
    assert clf.predict(drawings[:2, 0]).tolist() == [(1, 2), (3, 4)]
    with pytest.raises(InputError, match="neither text nor number"):
        clf.export(tmp_path / "c.npz")
    fitted.export(tmp_path / "a.onnx")
    with pytest.raises(InputError, match="read from an ONNX file"):
        export(load_classifier(tmp_path / "a.onnx"), tmp_path / "b.onnx", fitted.support_)
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_onnx(fitted, tmp_path, monkeypatch, package):
    """Without a package .onnx is refused with what to install, and .npz works."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package} is not installed.*mini_ht\[export\]"):
        fitted.export(tmp_path / "c.onnx")
    assert not list(tmp_path.iterdir())
    fitted.export(tmp_path / "c.npz")
    assert load_network(tmp_path / "c.npz").predict(fitted.support_).shape == (WAY,)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
def test_cut_short(file, tmp_path, share):
    """A file that is cut short is named, by both readers."""
    path = tmp_path / file.name
    path.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    for read in (load_classifier, load_network):
        with pytest.raises(InputError, match=f"{path.name} is cut short or is no classifier"):
            read(path)


def of_others(kind):
    """Files of other programs."""
    from onnx import TensorProto, helper

    if kind == "npz":
        np.savez(packed := io.BytesIO(), a=np.zeros(3))
        return packed.getvalue()
    if kind == "pickle":
        np.savez(packed := io.BytesIO(), metadata=np.array([{}], object))
        return packed.getvalue()
    if kind == "image":
        Image.new("L", (9, 9)).save(packed := io.BytesIO(), "PNG")
        return packed.getvalue()
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("images", "logits")]
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["logits"])], "g", *([x] for x in info))
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()


@pytest.mark.parametrize(
    "kind, suffix", [("npz", "npz"), ("pickle", "npz"), ("image", "npz"), ("image", "onnx"), ("onnx", "onnx")]
)
def test_files_of_other_programs(tmp_path, kind, suffix):
    """Another program's file is refused, and nothing in it is run."""
    path = tmp_path / f"c.{suffix}"
    path.write_bytes(of_others(kind))
    for read in (load_classifier, load_network):
        with pytest.raises(InputError, match="no classifier of mini_ht"):
            read(path)


def test_files_that_are_not_there(tmp_path):
    """A missing file, a folder, a huge file and another suffix are refused."""
    (tmp_path / "d.npz").mkdir()
    with (tmp_path / "huge.onnx").open("wb") as stream:
        stream.truncate(3 << 30)
    cases = (("c.onnx", "cannot read"), ("d.npz", "cannot read"), ("huge.onnx", "kilobytes"), ("c.txt", "suffix"))
    for name, words in cases:
        for read in (load_classifier, load_network):
            with pytest.raises(InputError, match=words):
                read(tmp_path / name)


def test_names_that_do_not_fit_the_network(fitted, tmp_path):
    """A file with more names than logits is refused."""
    task = fitted.task_
    wrong = TaskClassifier(task.network, class_array(["a", "b"]), *list(vars(task).values())[2:])
    export(wrong, tmp_path / "c.npz", fitted.support_)
    with pytest.raises(InputError, match="2 classes and 20 logits"):
        load_classifier(tmp_path / "c.npz")


def test_kernel_picture(fitted, tmp_path):
    """The picture has each weight where it belongs: orange above 0, blue below, white at 0."""
    weight = np.zeros((3, 3, 2, 4), np.float32)
    weight[0, 1, 1, 2], weight[2, 2, 0, 3] = 1, -0.5
    picture = block_picture(weight)
    side = 3 * 6 + 3
    assert picture.shape == (2 * side, 4 * side, 3)
    assert picture[side + 3, 2 * side + 9].tolist() == [213, 94, 0]
    assert picture[15, 3 * side + 15].tolist() == [128, 184, 216]  # half way to blue
    assert (picture != 255).any(-1).sum() == 2 * 36
    draw_network(fitted.task_.network, tmp_path / "k.png")
    with Image.open(tmp_path / "k.png") as image:
        assert image.size == (8 * side, 25 * side + 3 * 12)
