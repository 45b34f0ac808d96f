"""Piecewise-linear activations and pooling, which send no zeros below them.

Plain autograd's second pass sends a gradient of zeros from each of them down through everything
below. Here a linear map (pooling, the derivative of an activation) knows its transpose, and nothing
flows where nothing depends.
"""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from gan_kernels._graph import expand, node

aten = torch.ops.aten


class _Linear(Function):
    """maps[0](x, *saved), linear in x, whose transpose is maps[1](g, *saved)."""

    @staticmethod
    def compute(x, maps, *saved):
        return maps[0](x, *saved)

    @staticmethod
    def forward(ctx, x, maps, *saved):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.maps = maps
        return maps[0](x, *saved)

    @staticmethod
    def backward(ctx, g):
        saved = ctx.saved_tensors
        if g is not None:
            g = node(_Linear, g, ctx.maps[::-1], *saved)
        return g, None, *[None] * len(saved)


class _Piecewise(Function):
    """y, saved = run(x), piecewise linear in x, with _Linear's maps and saved for a derivative."""

    @staticmethod
    def forward(ctx, x, run, maps, inplace):
        y, saved = run(x)
        if inplace:
            ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.maps = maps
        return y

    @staticmethod
    def backward(ctx, g):
        if g is not None:
            # Detached: where the derivative jumps it has no derivative, elsewhere it is constant.
            g = node(_Linear, g, ctx.maps, *[tensor.detach() for tensor in ctx.saved_tensors])
        return g, None, None, None


def _relu_derivative(t, y):
    return aten.threshold_backward(t, y, 0)


def _relu(input, inplace=False):
    if inplace and (input._base if input._is_view() else input).is_leaf:
        return NotImplemented  # an error, and to be raised before anything is written

    def run(x):
        y = aten.relu_(x) if inplace else aten.relu(x)
        return y, (y,)

    return _Piecewise.apply(input, run, (_relu_derivative,) * 2, inplace)


def _leaky_relu(input, negative_slope=0.01, inplace=False):
    if inplace and ((input._base if input._is_view() else input).is_leaf or negative_slope < 0):
        return NotImplemented  # as for relu; or the output's sign no longer tells the input's

    def run(x):
        if inplace:
            y = aten.leaky_relu_(x, negative_slope)
            return y, (y,)
        return aten.leaky_relu(x, negative_slope), (x,)

    def derivative(t, saved):
        return aten.leaky_relu_backward(t, saved, negative_slope, inplace)

    return _Piecewise.apply(input, run, (derivative,) * 2, inplace)


def _prelu(input, weight):
    odd = input.dim() < 2 or weight.dim() > 1 or weight.numel() not in (1, input.shape[1])
    if odd or input.dtype != weight.dtype or torch.is_autocast_enabled(input.device.type):
        return NotImplemented
    if weight.numel() > 1:
        weight = weight.view(-1, *[1] * (input.dim() - 2))
    # The slope depends on the weight; on the input only by a comparison, which has no gradient.
    return input * torch.where(input.detach() > 0, weight.new_ones(()), weight)


def _avg_pool2d(
    input,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    kernel = expand(kernel_size, 2)
    stride = kernel if stride is None else expand(stride, 2) or kernel
    conf = kernel, stride, expand(padding, 2), ceil_mode, count_include_pad, divisor_override

    def pool(t, _):
        return aten.avg_pool2d(t, *conf)

    def spread(g, x):  # the transpose, which needs x's shape alone
        return aten.avg_pool2d_backward(g, x, *conf)

    return _Linear.apply(input, (pool, spread), input.detach())


def _max_pool2d(
    input,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode=False,
    return_indices=False,
):
    if return_indices:
        return NotImplemented
    kernel = expand(kernel_size, 2)
    stride = kernel if stride is None else expand(stride, 2) or kernel
    conf = kernel, stride, expand(padding, 2), expand(dilation, 2), ceil_mode

    def run(x):
        y, indices = aten.max_pool2d_with_indices(x, *conf)
        return y, (x, indices)

    def spread(g, x, indices):
        return aten.max_pool2d_with_indices_backward(g, x, *conf, indices)

    def gather(t, x, indices):
        return t.flatten(-2).gather(-1, indices.flatten(-2)).view(indices.shape)

    return _Piecewise.apply(input, run, (spread, gather), False)


def _inplace(function):
    return lambda input, *args: function(input, *args, inplace=True)


# Operations whose double backward in plain autograd sends zeros to everything below them, and what
# each stands for: a row of benchmarks/critics.py.
PIECEWISE_LINEAR = {
    **dict.fromkeys([F.relu, torch.relu, torch.Tensor.relu], _relu),  # convolutions, ReLU
    **dict.fromkeys([torch.relu_, torch.Tensor.relu_], _inplace(_relu)),
    **dict.fromkeys([F.leaky_relu, torch._C._nn.leaky_relu], _leaky_relu),  # DCGAN
    F.leaky_relu_: _inplace(_leaky_relu),
    **dict.fromkeys([torch.prelu, torch.Tensor.prelu], _prelu),  # convolutions, PReLU
    F.avg_pool2d: _avg_pool2d,  # residual
    **dict.fromkeys([F.max_pool2d, torch.max_pool2d], _max_pool2d),  # convolutions, max pooling
}
