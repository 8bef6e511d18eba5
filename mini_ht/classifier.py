"""The generator as a scikit-learn estimator, which needs no scikit-learn: fit writes a CNN, predict runs it."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_ht.adaptation import Task, adapt, duplicates, open_generator
from mini_ht.errors import InputError
from mini_ht.export import Report, export
from mini_ht.ink import prepare


class HyperTransformerClassifier:
    """A classifier from a handful of labelled images, written in one forward pass.

    Args:
        checkpoint: the name of a pretrained generator, a run folder or checkpoint file, or (parameters, config).
        preprocess: "ink" takes photos and drawings of any size; "none" takes images as the generator reads them.
        polarity: of ink: "dark" on light, "light" on dark, or "auto"; see `mini_ht.ink.to_ink`.
        views: 1, 5 or 9 places at which the generator sees each image: more are better, and take as often longer.

    Images are a list of paths or arrays, or one array [n, H, W] or [n, H, W, C]; see `mini_ht.ink.Source`. After `fit`,
    `classes_` [way] holds the classes, and `task_` is the classifier that `export` writes.
    """

    _estimator_type = "classifier"

    def __init__(
        self, checkpoint: Any = "omniglot", preprocess: str = "ink", polarity: str = "auto", views: int = 1
    ) -> None:
        self.checkpoint = checkpoint
        self.preprocess = preprocess
        self.polarity = polarity
        self.views = views

    def fit(self, X: Sequence[Any] | NDArray[Any], y: Sequence[Any] | NDArray[Any]) -> HyperTransformerClassifier:
        """Write the CNN for these labelled images.

        Args:
            X: images.
            y: a label for each, of any kind that can be hashed; -1 or None for an unlabelled image.

        Raises:
            InputError: images that cannot be read, labels that do not fit, or a number of classes that the generator
                does not serve. Equal images of different classes are warned of.
        """
        generator = open_generator(self.checkpoint)
        labels, classes = encode(y)
        images = prepare(X, self.preprocess, generator.image_shape, self.polarity)
        if len(images) != len(labels):
            raise InputError(f"there are {len(images)} images and {len(labels)} labels; give one label for each image")
        if pairs := duplicates(images, labels):
            one, other = pairs[0]
            what = f"images {one} and {other} are equal, and their classes are not ({len(pairs)} such pairs)"
            warnings.warn(what, stacklevel=2)
        (self.task_,) = adapt(generator, [Task(images, labels, classes)], self.preprocess, self.polarity, self.views)
        self.support_ = images
        self.classes_ = self.task_.classes_
        return self

    def predict(self, X: Sequence[Any] | NDArray[Any], views: int = 1) -> NDArray[Any]:
        """The class of each image, [m], seen at 1, 5 or 9 places; an answer does not depend on the other images."""
        self._check_fitted()
        return self.task_.predict(X, views)

    def predict_proba(self, X: Sequence[Any] | NDArray[Any], views: int = 1) -> NDArray[np.floating]:
        """Probabilities [m, way], in the order of `classes_`."""
        self._check_fitted()
        return self.task_.predict_proba(X, views)

    def score(self, X: Sequence[Any] | NDArray[Any], y: Sequence[Any] | NDArray[Any]) -> float:
        """The share of images whose class is predicted rightly."""
        guesses = self.predict(X)
        if len(guesses) != len(y):
            raise InputError(f"there are {len(guesses)} images and {len(y)} labels; give one label for each image")
        return float(np.mean([guess == label for guess, label in zip(guesses, y, strict=True)]))

    def export(self, path: str | os.PathLike[str], *, force: bool = False, precision: str = "float32") -> Report:
        """Write the classifier as .onnx or .npz, see `mini_ht.export.export`; it is checked on the support images."""
        self._check_fitted()
        return export(self.task_, path, self.support_, force=force, precision=precision)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of `__init__` as they are now."""
        return {name: getattr(self, name) for name in _names()}

    def set_params(self, **params: Any) -> HyperTransformerClassifier:
        """Change arguments of `__init__`; InputError for a name that is none."""
        for name, value in params.items():
            if name not in _names():
                raise InputError(f"there is no parameter {name!r}; choose one of {', '.join(_names())}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        return f"HyperTransformerClassifier({', '.join(f'{k}={v!r:.60}' for k, v in self.get_params().items())})"

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "task_")

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(two_d_array=False, three_d_array=True, string=True),
        )

    def _check_fitted(self) -> None:
        if not hasattr(self, "task_"):
            raise InputError("this classifier has no CNN yet; call fit first")


def encode(y: Sequence[Any] | NDArray[Any]) -> tuple[NDArray[np.integer], list[Any]]:
    """Labels of any kind -> (numbers [n], -1 for unlabelled, and the classes, sorted if they can be).

    Raises InputError for labels that cannot be hashed, or are not a number.
    """
    if isinstance(y, str) or not hasattr(y, "__len__") or getattr(y, "ndim", 1) != 1:
        raise InputError(f"labels came as {type(y).__name__}; wanted a list or vector with one label for each image")
    labels = [label.item() if hasattr(label, "item") else label for label in y]
    try:
        classes = list(dict.fromkeys(label for label in labels if not _unlabelled(label)))
    except TypeError as error:
        raise InputError(f"a label cannot be hashed ({error}); use text, numbers or tuples") from error
    if any(label != label for label in classes):
        raise InputError("a label is not a number (NaN); use -1 or None for an unlabelled image")
    with suppress(TypeError):  # of several kinds they stay in the order in which they came
        classes.sort()
    numbers = {label: number for number, label in enumerate(classes)}
    return np.array([-1 if _unlabelled(label) else numbers[label] for label in labels], np.int64), classes


def _unlabelled(label: Any) -> bool:
    """-1 and None stand for no label; -1.0 and "-1" do not."""
    return label is None or (type(label) is int and label == -1)


def _names() -> list[str]:
    return list(inspect.signature(HyperTransformerClassifier).parameters)
