"""How far the training is, and the learning rate that follows from it."""

import math

from mini_ht.config import Config


def progress(config: Config, episodes: int, seconds: float) -> float:
    """The share of the training that is done, in [0, 1]: by episodes if the config sets them, else by time."""
    done = episodes / config.episodes if config.episodes else seconds / max(60 * config.minutes, 1e-9)
    return min(1.0, done)


def learning_rate(config: Config, done: float) -> float:
    """Linear warm-up, the peak, half a cosine to zero (Loshchilov & Hutter 2017), at share `done` of the training."""
    if done < config.warmup:
        return config.learning_rate * max(done, 1e-3) / config.warmup
    begin = max(config.warmup, 1 - config.decay)
    falling = max(0.0, done - begin) / max(1 - begin, 1e-9)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * falling))


def is_upright(config: Config, done: float) -> bool:
    """Whether classes are shown as they are, neither turned nor mirrored, at share `done` of the training."""
    return config.upright > 0 and done >= 1 - config.upright


def average_decay(config: Config, step: int) -> float:
    """Decay of the running average of the parameters: short at first, so that the random start is forgotten."""
    return min(config.ema, (1 + step) / (10 + step))
