"""mini_ht: a transformer reads a few labelled images and writes the weights of a small CNN for exactly that task."""

import importlib
from typing import Any

from mini_ht.cnn import GeneratedCNN
from mini_ht.config import Config
from mini_ht.errors import InputError
from mini_ht.generator import generate
from mini_ht.parameters import draw_parameters, load, load_pretrained, save, to_numpy, to_torch
from mini_ht.presets import preset, presets
from mini_ht.views import generate_from_views

__all__ = ["Config", "GeneratedCNN", "InputError", "draw_parameters", "generate", "generate_from_views", "load"]
__all__ += ["load_pretrained", "preset", "presets", "save", "to_numpy", "to_torch"]
__all__ += ["HyperTransformerClassifier", "load_classifier"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The classifier as a tool is imported when it is asked for: it brings Pillow, which the model does without."""
    homes = {"HyperTransformerClassifier": "mini_ht.classifier", "load_classifier": "mini_ht.classifier_file"}
    if name not in homes:
        raise AttributeError(f"module 'mini_ht' has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)
