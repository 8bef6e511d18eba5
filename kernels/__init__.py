"""The hot loop: a small CNN whose conv weights differ for every episode, with one implementation per array library."""

from mini_ht.kernels.block import NORM_EPS, conv2d, conv_block, conv_max_pool, conv_stack, implementation

__all__ = ["NORM_EPS", "conv2d", "conv_block", "conv_max_pool", "conv_stack", "implementation"]
