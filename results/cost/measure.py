"""What adapting to one task costs: multiply-adds by shapes, CPU time on one core, and how many numbers are learned.

    OMP_NUM_THREADS=1 python results/cost/measure.py omniglot-20way-1shot-8ch-logits

Beside the generator of a preset are prototypes, MAML and MAML++ on the same CNN. One line of JSON.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mini_ht.baselines.maml import adapt
from mini_ht.baselines.method import NAMES, Method, draw
from mini_ht.baselines.prototypes import class_means, embed
from mini_ht.config import Config
from mini_ht.errors import InputError
from mini_ht.generator import generate
from mini_ht.parameters import draw_parameters, generator_size, to_torch
from mini_ht.plan import cnn_size, plan
from mini_ht.presets import preset

REPEATS, WARM_UP = 30, 3
Work = Callable[[], Any]


def multiply_adds(work: Work) -> int:
    """Multiply-adds of all convolutions and matrix products in `work`, forward and backward, from their shapes."""
    # torch counts what fused attention does on a GPU only, but matrix products everywhere.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops() // 2


def median_milliseconds(work: Work) -> float:
    """Median CPU time of `work`."""
    times = []
    for _ in range(WARM_UP + REPEATS):
        start = time.process_time()
        work()
        times.append(1000 * (time.process_time() - start))
    return round(statistics.median(times[WARM_UP:]), 3)


def prototypes(parameters: Mapping[str, Tensor], config: Config, support: Tensor, labels: Tensor) -> Tensor:
    """Class means [E, way, F], from the support set alone: support [E, n, H, W, C], labels [E, n]."""
    features, _ = embed(parameters, config, support, support[:, :0], "batch")
    return class_means(features, labels, config.way)


def cost(config: Config, steps: int = Method.steps) -> dict[str, Any]:
    """Adapting to the labelled support images of one task, way and shot the config's.

    Returns:
        `classify_one_image`: multiply-adds of the adapted CNN. Then by method `multiply_adds` and `milliseconds` (CPU
        time, torch with one thread, and for the HyperTransformer `numpy_milliseconds`, for which OMP_NUM_THREADS=1 must
        be set) to adapt; `learned`, the numbers that training learns; `per_task`, those that differ between tasks;
        `classifier`, all that are needed to classify.
    """
    torch.set_num_threads(1)
    shape = (config.way * config.shot, config.image_size, config.image_size, config.image_channels)
    images = np.random.default_rng(0).random(shape, dtype=np.float32)  # [n, H, W, C]
    labels = np.arange(config.way).repeat(config.shot)  # [n]
    x, y = torch.from_numpy(images)[None], torch.from_numpy(labels)[None]  # [1, n, H, W, C] and [1, n]
    arrays, cnn = draw_parameters(config, config.seed), cnn_size(config)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    *convs, logits = plan(config)
    norms = sum(2 * layer.outputs for layer in convs)
    means = config.way * logits.inputs
    generated = cnn - norms - sum(9 * layer.inputs * layer.outputs for layer in convs if not layer.generated)
    works: dict[str, Work] = {"hypertransformer": lambda: generate(tensors, config, x, y, check=False)}
    sizes = {"hypertransformer": (generator_size(config), generated, cnn)}
    for name in NAMES:
        method = Method(name, steps)
        parameters = to_torch(draw(config, method))
        learned = sum(part.numel() for part in parameters.values())
        if name == "prototypes":
            works[name] = functools.partial(prototypes, parameters, config, x, y)
            sizes[name] = learned, means, learned + means
        else:
            works[name] = functools.partial(adapt, parameters, config, method, x, y, "batch")
            sizes[name] = learned, cnn - norms, cnn
    figures: dict[str, Any] = {}
    with torch.no_grad():
        classifier = generate(tensors, config, x, y)
        figures["classify_one_image"] = multiply_adds(lambda: classifier(x[:, :1]))
        for which, work in works.items():
            figures[which] = {"multiply_adds": multiply_adds(work), "milliseconds": median_milliseconds(work)}
            figures[which] |= dict(zip(("learned", "per_task", "classifier"), sizes[which], strict=True))
    alone = median_milliseconds(lambda: generate(arrays, config, images, labels, check=False))
    figures["hypertransformer"]["numpy_milliseconds"] = alone
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help="'mini-ht presets' lists them")
    parser.add_argument("--steps", type=int, default=Method.steps, help="gradient steps of MAML's inner loop")
    options = parser.parse_args()
    try:
        print(json.dumps({"preset": options.preset, **cost(preset(options.preset), options.steps)}))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
