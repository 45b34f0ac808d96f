"""Compiled kernels for GAN training in PyTorch, exact and differentiable.

    info_loss(q, category, code, sizes)    InfoGAN's information loss, forward and backward fused.
    gradient_penalty(critic, x)            WGAN-GP's, R1's and R2's penalty without wasted work.
    build_info()                           What this installation was built for, in one line.
    has_cuda                               Whether it can compute on CUDA devices.

Needs PyTorch 2.10 or newer and nothing else.
"""

from gan_kernels._info_loss import info_loss
from gan_kernels._library import build_info, has_cuda
from gan_kernels._penalty import gradient_penalty

__all__ = ["build_info", "gradient_penalty", "has_cuda", "info_loss"]
