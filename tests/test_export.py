"""Classifier files: what runs in onnxruntime and in NumPy is the same, small, and whole or not there."""

from __future__ import annotations

import dataclasses
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
from mini_ht.export import check_bytes, export
from mini_ht.folded import PRECISIONS, fold
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


@given(cases(), st.sampled_from(PRECISIONS), st.booleans())
def test_onnx_computes_what_numpy_does(case, precision, optimise):
    """For every kind of network onnxruntime gives the logits that NumPy gives with the rounded numbers."""
    cnn = generate(case.parameters, case.config, case.support, case.labels, case.mask)
    network = fold(cnn, case.config.way)
    query = case.query[0].astype(np.float32)
    found = OnnxNetwork(onnx_model(network, {"a": "b"}, precision), optimise)
    assert_close(found(query), network.rounded(precision)(query), "float32")
    assert found.metadata == {"a": "b"}


@given(st.lists(cases(), min_size=2, max_size=2), st.sampled_from(PRECISIONS))
def test_files_are_independent(two, precision):
    """A model's bytes do not depend on which models were made before: nothing of them stays in the template."""
    networks = [fold(generate(c.parameters, c.config, c.support, c.labels, c.mask), c.config.way) for c in two]
    networks.append(dataclasses.replace(networks[0], arrays={k: x + 1 for k, x in networks[0].arrays.items()}))
    first = [onnx_model(network, {"number": str(k)}, precision) for k, network in enumerate(networks)]
    again = [onnx_model(network, {"number": str(k)}, precision) for k, network in reversed(list(enumerate(networks)))]
    assert first == again[::-1] and first[0] != first[2]


@given(cases(), st.sampled_from(PRECISIONS))
def test_rounding(case, precision):
    """Stored numbers come back within half a step of their precision, and rounding them again changes nothing."""
    network = fold(generate(case.parameters, case.config, case.support, case.labels, case.mask), case.config.way)
    stored, rounded = network.stored(precision), network.rounded(precision)
    for name, array in network.arrays.items():
        wanted, found = array.astype(np.float32), rounded.arrays[name]
        assert found.dtype == np.float32 and found.shape == array.shape
        if stored[name].dtype == np.int8:
            # Half a step, give or take float32's own rounding.
            assert (abs(found - wanted) <= stored[f"{name}.step"] * 0.5001).all(), name
            assert abs(stored[name]).max() <= 127
        else:
            assert np.array_equal(found, array.astype(stored[name].dtype).astype(np.float32)), name
        if precision == "int8":
            assert (stored[name].dtype == np.int8) == name.endswith(".weight")
            assert relative_error(rounded.rounded(precision).arrays[name], found) < 1e-6
        else:
            assert np.array_equal(rounded.rounded(precision).arrays[name], found)


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


LARGEST = {"float32": 12_000, "float16": 8_000, "int8": 7_500}  # bytes


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_size_report_and_bytes(fitted, tmp_path, suffix, precision):
    """A 20-way 8-channel classifier is within 12 KB, the report is true, and written again it is the same bytes."""
    one, two = (tmp_path / f"{name}.{suffix}" for name in "ab")
    report = fitted.export(one, precision=precision)
    assert fitted.export(two, precision=precision).difference == report.difference <= 1e-4
    assert one.read_bytes() == two.read_bytes() and report.path == one
    assert report.size == one.stat().st_size <= LARGEST[precision]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_fewer_bits_answer_nearly_the_same(fitted, tmp_path, drawings, suffix, precision):
    """Stored in fewer bits, a classifier changes no clear answer, and `show` sees its numbers."""
    path = tmp_path / f"c.{suffix}"
    fitted.export(path, precision=precision)
    images = drawings[:, 1:].reshape(-1, 28, 28, 1)
    loaded = load_classifier(path)
    lead = np.diff(np.sort(fitted.predict_proba(images))[:, -2:])[:, 0]  # of the first class over the second
    clear = lead > 0.2
    assert clear.mean() > 0.5 and (loaded.predict(images) == fitted.predict(images))[clear].all()
    assert 0 < np.abs(loaded.predict_proba(images) - fitted.predict_proba(images)).max() < 0.15
    for name, array in fitted.task_.network.rounded(precision).arrays.items():
        assert np.array_equal(load_network(path).network.arrays[name], array), name


def more_nodes(model):
    """A node that would fill gigabytes, and whose output is not used."""
    from onnx import helper

    size = helper.make_node("Constant", [], ["size"], value_ints=[1 << 15, 1 << 15])
    model.graph.node.extend([size, helper.make_node("ConstantOfShape", ["size"], ["zeros"])])


def another_operation(model):
    """Logits by another rule."""
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Abs"


def numbers_elsewhere(model):
    """Weights that would be read from a file."""
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    tensor.external_data.add(key="location", value="secret")


def one_number_less(model):
    """A tensor that claims more numbers than it holds."""
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]


@pytest.mark.parametrize("change", [more_nodes, another_operation, numbers_elsewhere, one_number_less])
def test_other_graphs_are_not_run(fitted, tmp_path, change):
    """An .onnx file whose graph is not one that `export` writes is refused before onnxruntime sees it."""
    import onnx

    path = tmp_path / "c.onnx"
    fitted.export(path)
    model = onnx.load_from_string(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    for read in (load_classifier, load_network):
        with pytest.raises(InputError, match=r"no classifier of mini_ht .*its graph is not one that mini_ht writes"):
            read(path)


def test_unknown_precision(fitted, tmp_path):
    """A precision that no file has is refused."""
    with pytest.raises(InputError, match="precision is 'int4'; choose one of float32, float16, int8"):
        fitted.export(tmp_path / "c.npz", precision="int4")


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
        read = lambda data, run=run, **options: run if suffix == "onnx" else (run, {})  # noqa: E731
        monkeypatch.setattr(export_module, reader, read)
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
    "kind, suffix",
    [("npz", "npz"), ("pickle", "npz"), ("image", "npz"), ("onnx", "npz"), ("image", "onnx"), ("onnx", "onnx")],
)
def test_files_of_other_programs(tmp_path, kind, suffix):
    """Another program's file is refused, and nothing in it is run."""
    path = tmp_path / f"c.{suffix}"
    path.write_bytes(of_others(kind))
    for read in (load_classifier, load_network):
        with pytest.raises(InputError, match="no classifier of mini_ht") as refused:
            read(path)
        assert "unsafe" not in str(refused.value) and "pickle.load" not in str(refused.value)


def test_files_that_are_not_there(tmp_path):
    """A missing file, a folder, a huge file and another suffix are refused."""
    (tmp_path / "d.npz").mkdir()
    with (tmp_path / "huge.onnx").open("wb") as stream:
        stream.truncate(3 << 30)
    cases = (("c.onnx", "cannot read"), ("d.npz", "cannot read"), ("huge.onnx", "are read"), ("c.txt", "suffix"))
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


def test_large_logits_may_differ_in_their_last_digits(fitted, tmp_path, drawings):
    """What float32 rounds in logits of hundreds is no difference between a file and NumPy; a thousand times that is."""
    task, arrays = fitted.task_, dict(fitted.task_.network.arrays)
    arrays["logits.weight"] = arrays["logits.weight"] * 40
    large = dataclasses.replace(task, network=dataclasses.replace(task.network, arrays=arrays))
    images = task.prepare(list(drawings[:, 0]))
    found = export(large, tmp_path / "c.onnx", images)
    most = 1e-6 * np.abs(large.network(images)).max()
    assert found.difference <= most and most > 1e-4
    arrays["logits.bias"] = arrays["logits.bias"] + np.float32(2e3 * most)
    other = dataclasses.replace(task, network=dataclasses.replace(task.network, arrays=arrays))
    with pytest.raises(InputError, match="would differ from NumPy by"):
        check_bytes((tmp_path / "c.onnx").read_bytes(), other, tmp_path / "c.onnx", images, "float32")
