"""The classifier of one task: a network, the names of its classes, and how images are prepared for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_ht.attention import softmax
from mini_ht.ink import prepare
from mini_ht.views import logits_from_views


@dataclass(frozen=True)
class TaskClassifier:
    """What `adapt` writes and `load_classifier` reads."""

    network: Callable[[NDArray[np.float32]], NDArray[np.floating]]  # [m, H, W, C] in [0, 1] -> logits [m, way]
    classes_: NDArray[Any]  # [way], the name of each class
    image_shape: tuple[int, ...]  # (H, W, C)
    preprocess: str  # "ink" or "none", see `mini_ht.ink.prepare`
    polarity: str
    provenance: Mapping[str, str]  # who wrote it: generator, config, version, norm

    def prepare(self, images: Sequence[Any] | NDArray[Any]) -> NDArray[np.float32]:
        """Paths or arrays, see `mini_ht.ink.prepare`, as the network reads them: [m, H, W, C] in [0, 1]."""
        return prepare(images, self.preprocess, self.image_shape, self.polarity)

    def predict(self, images: Sequence[Any] | NDArray[Any], views: int = 1) -> NDArray[Any]:
        """The class of each image, [m], seen at 1, 5 or 9 places. Raises InputError for images that cannot be read."""
        return self.classes_[self.predict_proba(images, views).argmax(-1)]

    def predict_proba(self, images: Sequence[Any] | NDArray[Any], views: int = 1) -> NDArray[np.floating]:
        """Probabilities [m, way], in the order of `classes_`; views, and errors, as above."""
        return softmax(logits_from_views(self.network, self.prepare(images), views))


def class_array(names: Sequence[Any]) -> NDArray[Any]:
    """Names of classes as a vector that keeps each as it is: text, whole numbers and booleans typed, others objects."""
    if len({type(name) for name in names}) == 1 and isinstance(names[0], str | int | float):
        return np.array(names)
    classes = np.empty(len(names), object)
    classes[:] = names
    return classes
