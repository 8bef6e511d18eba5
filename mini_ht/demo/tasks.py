"""Tasks of the page: drawings to a generated CNN, which is kept for a while; a drawing to probabilities."""

import dataclasses
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_ht.attention import softmax
from mini_ht.cnn import GeneratedCNN
from mini_ht.config import Config
from mini_ht.demo.drawing import strokes_to_ink
from mini_ht.demo.messages import CLASSES, Drawing, Refused
from mini_ht.errors import InputError
from mini_ht.generator import generate

KEPT = 32  # generated CNNs, 8 kB each for the pretrained generator


class Tasks:
    """Generates CNNs with one generator and keeps the newest of them; may be used by several threads."""

    def __init__(self, parameters: Mapping[str, NDArray[np.floating]], config: Config):
        if config.image_channels != 1:
            raise InputError(
                f"this generator reads images of {config.image_channels} channels, a drawing has 1; "
                "take a checkpoint trained on drawings, such as omniglot"
            )
        self.parameters = {name: array.astype(np.float32) for name, array in parameters.items()}
        # With the support set's statistics the CNN classifies one drawing alone.
        self.config = dataclasses.replace(config, norm="support")
        self.most_classes = min(CLASSES, config.way)
        self._kept: OrderedDict[str, tuple[GeneratedCNN, int]] = OrderedDict()
        self._lock = Lock()

    def adapt(self, classes: list[list[Drawing]]) -> dict[str, Any]:
        """Generates the CNN for the drawings of each class and keeps it.

        Returns its "id", the "kernels" of its first layer [Cout, 3, 3], the "weights" of its last [classes, F + 1],
        and the "milliseconds" that it took.
        """
        start = time.perf_counter()
        size = self.config.image_size
        support = np.stack([strokes_to_ink(drawing, size) for drawings in classes for drawing in drawings])
        labels = np.repeat(np.arange(len(classes)), [len(drawings) for drawings in classes])
        cnn = generate(self.parameters, self.config, support, labels)
        took = time.perf_counter() - start
        name = secrets.token_hex(8)  # not a count, so that a page never meets the CNN of an earlier server
        with self._lock:
            self._kept[name] = cnn, len(classes)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        kernels = cnn.convs[0].weight[0, :, :, 0]  # [3, 3, Cout]
        return {
            "id": name,
            "kernels": rounded(np.moveaxis(kernels, -1, 0)),
            "weights": rounded(cnn.logits_weight[0, : len(classes)]),
            "milliseconds": round(1000 * took, 2),
        }

    def predict(self, name: str, strokes: Drawing) -> dict[str, Any]:
        """The "probabilities" of a drawing's classes, in the order in which they came, and the "milliseconds".

        Raises Refused with status 404 for a CNN that is not kept (any more).
        """
        start = time.perf_counter()
        with self._lock:
            if name not in self._kept:
                raise Refused(404, "this classifier is not kept any more; have it generated anew by /adapt")
            self._kept.move_to_end(name)
            cnn, way = self._kept[name]
        logits = cnn(strokes_to_ink(strokes, self.config.image_size)[None])[0, :way].astype(np.float64)  # [way]
        probabilities = softmax(logits).tolist()
        took = time.perf_counter() - start
        return {"probabilities": probabilities, "milliseconds": round(1000 * took, 2)}


def rounded(array: NDArray[np.floating]) -> list[Any]:
    """As lists of numbers short enough to send."""
    return array.astype(np.float64).round(4).tolist()
