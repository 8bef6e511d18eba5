"""Laws of views: what it means that a generator sees support images, and a CNN its queries, at several places."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, seeds
from tolerances import assert_all_close, assert_close, assert_different, contents

from mini_ht import Config, HyperTransformerClassifier, InputError, draw_parameters, generate
from mini_ht.adaptation import adapt, open_generator
from mini_ht.classifier_file import load_classifier
from mini_ht.cli import main
from mini_ht.datasets import glyphs
from mini_ht.episodes import shifted
from mini_ht.evaluation import evaluate, evaluation_episodes, score
from mini_ht.views import MOVES, VIEWS, check_views, generate_from_views, logits_from_views, moved


@given(data=st.data())
def test_the_weights_are_the_mean_of_those_from_the_moved_images(library, data):
    """Weights, biases, scales and statistics with several views: the means of those from each moved support set."""
    views = data.draw(st.sampled_from((5, 9)))
    case = data.draw(cases(images=(2, 5)))
    places = [case.replace(support=moved(case.support, *move)) for move in MOVES[:views]]
    found = [contents(place.generate(library)) for place in places]
    mean = {name: np.mean([one[name] for one in found], axis=0) for name in found[0]}
    parts = library.to((case.parameters, case.config, case.support, case.labels, case.mask))
    cnn = generate_from_views(*parts, views=views)
    assert_all_close(contents(cnn), mean)
    parts = library.to((case.support[0], case.labels[0], None if case.mask is None else case.mask[0]))
    alone = generate_from_views(library.to(case.parameters), case.config, *parts, views=views)
    assert_close(library.back(alone(library.to(case.query[0]))), library.back(cnn(library.to(case.query)))[0])


@given(data=st.data())
def test_logits_from_views_are_the_mean_of_those_of_moved_queries(library, data):
    """In both norm modes and with absent classes: the mean of the CNN's logits over each place, alone or in a batch.

    With one view they are the CNN's own, to the bit.
    """
    views = data.draw(st.sampled_from(VIEWS))
    case = data.draw(cases(queries=(2, 4)))
    cnn = case.generate(library)
    places = [library.back(cnn(library.to(moved(case.query, *move)))) for move in MOVES[:views]]
    found = library.back(logits_from_views(cnn, library.to(case.query), views))
    assert_close(found, np.mean(places, axis=0))
    if views == 1:
        np.testing.assert_array_equal(found, places[0])
    one = case.replace(config=dataclasses.replace(case.config, norm="support")).generate(library)
    alone = [logits_from_views(one, library.to(case.query[:, k : k + 1]), views) for k in range(case.query.shape[1])]
    together = library.back(logits_from_views(one, library.to(case.query), views))
    assert_close(np.concatenate([library.back(part) for part in alone], axis=1), together)


@given(seed=seeds, rows=st.integers(-2, 2), columns=st.integers(-2, 2))
def test_moved_images_are_those_of_training(library, seed, rows, columns):
    """`moved` in both libraries is `shifted`, by which training moves its images."""
    images = np.random.default_rng(seed).random((2, 3, 6, 5, 1))
    offsets = np.broadcast_to([rows, columns], (2, 3, 2))
    assert_close(library.back(moved(library.to(images), rows, columns)), shifted(images, offsets))


def test_the_first_views_are_the_nearest():
    """One view is the image itself, five add its four neighbours, nine all eight; none comes twice."""
    assert MOVES[0] == (0, 0) and len(set(MOVES)) == len(MOVES) == 9
    assert all(abs(rows) + abs(columns) == 1 for rows, columns in MOVES[1:5])
    assert all(abs(rows) == abs(columns) == 1 for rows, columns in MOVES[5:])


@pytest.mark.parametrize("views", [0, -1, 2, 10, 5.0, None, "5"])
def test_other_numbers_of_views_are_refused(views):
    """Numbers of views that are not 1, 5 or 9 are refused, with the choice, before anything is computed."""
    with pytest.raises(InputError, match=r"views is .*; choose one of 1, 5, 9"):
        check_views(views)
    with pytest.raises(InputError, match="views is"):
        adapt(open_generator("omniglot"), [], views=views)
    with pytest.raises(InputError, match="views is"):
        logits_from_views(lambda images: images, np.zeros((1, 4, 4, 1)), views)


def test_support_sets_that_do_not_fit_are_refused():
    """With several views as with one, images of another shape are an error that names it."""
    config = Config(way=3, encoding=8, image_size=16, shared_features=4, local_features=3)
    parameters, labels = draw_parameters(config, 0), np.array([0, 1, 2])
    for shape in ((3, 16, 16), (3, 12, 16, 1), (2, 3, 16, 16, 3)):
        with pytest.raises(InputError) as one:
            generate(parameters, config, np.zeros(shape, np.float32), labels)
        with pytest.raises(InputError) as nine:
            generate_from_views(parameters, config, np.zeros(shape, np.float32), labels, views=9)
        assert str(nine.value) == str(one.value)


def test_a_classifier_from_views():
    """The estimator's classifier is that of the mean weights, and says from how many views it was written."""
    config = Config(way=3, encoding=8, image_size=16, shared_features=4, local_features=3)
    parameters = draw_parameters(config, 0)
    rng = np.random.default_rng(0)
    images, labels = rng.random((6, 16, 16, 1)).astype(np.float32), np.array([0, 1, 2, 0, 1, 2])
    support = dataclasses.replace(config, norm="support")
    for views in VIEWS:
        classifier = HyperTransformerClassifier((parameters, config), "none", views=views).fit(images, labels)
        logits = generate_from_views(parameters, support, images, labels, views=views)(images)
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        assert_close(classifier.predict_proba(images), odds / odds.sum(-1, keepdims=True), "float32")
        assert classifier.task_.provenance["views"] == str(views)
        assert_different(
            logits, generate_from_views(parameters, support, images, labels, views=5 if views == 1 else 1)(images)
        )


@pytest.mark.parametrize("norm", ["batch", "support"])
def test_accuracy_from_query_views(norm):
    """`evaluate` with views of support and query images is the accuracy of the mean logits of the mean CNN."""
    config = Config(way=3, encoding=8, image_size=16, shared_features=4, local_features=3, norm=norm)
    parameters, images = draw_parameters(config, 0), glyphs(5, 6, drawings=6, size=16)

    def batches():
        return evaluation_episodes(images, 24, way=3, shot=1, queries=4)

    def classify(batch):
        cnn = generate_from_views(parameters, config, batch.support, batch.labels, views=5)
        return sum(cnn(moved(batch.query, *move)) for move in MOVES).argmax(-1)

    found = evaluate(parameters, config, batches(), views=5, query_views=9)
    assert found == score(classify, batches())
    assert len({evaluate(parameters, config, batches(), query_views=views).accuracy for views in VIEWS}) > 1


def test_a_classifier_sees_images_at_several_places(tmp_path):
    """The estimator and the file that it exports answer by the mean logits of as many places as are asked for."""
    config = Config(way=3, encoding=8, image_size=16, shared_features=4, local_features=3)
    rng = np.random.default_rng(0)
    images, labels = rng.random((6, 16, 16, 1)).astype(np.float32), list("abcabc")
    classifier = HyperTransformerClassifier((draw_parameters(config, 0), config), "none").fit(images, labels)
    classifier.export(tmp_path / "a.npz")
    network = classifier.task_.network
    for views in VIEWS:
        logits = np.mean([network(moved(images, *move)) for move in MOVES[:views]], axis=0)
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        for one in (classifier, load_classifier(tmp_path / "a.npz")):
            assert_close(one.predict_proba(images, views), odds / odds.sum(-1, keepdims=True), "float32")
            assert list(one.predict(images, views)) == ["abc"[k] for k in logits.argmax(-1)]
    assert_different(classifier.predict_proba(images, 9), classifier.predict_proba(images))
    with pytest.raises(InputError, match=r"views is 2; choose one of 1, 5, 9"):
        classifier.predict(images, views=2)


def test_the_commands_take_views(capsys):
    """adapt, adapt-many, predict and evaluate know --views, and refuse other numbers with the choice."""
    for command, option in (
        (["adapt", "omniglot", "a", "-o", "a.npz"], "--views"),
        (["adapt-many", "omniglot", "a", "-o", "b"], "--views"),
        (["predict", "a.npz", "b.png"], "--views"),
        (["evaluate", "a"], "--views"),
        (["evaluate", "a"], "--query-views"),
    ):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        assert f"{option} {{1,5,9}}" in " ".join(capsys.readouterr().out.split())
        with pytest.raises(SystemExit) as refused:
            main([*command, option, "3"])
        text = " ".join("".join(capsys.readouterr()).replace("│", " ").split())
        assert refused.value.code == 2 and "'3'" in text and "'1', '5', '9'" in text
