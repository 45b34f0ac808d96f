"""Piecewise-linear activations, pooling and padding, which send no zeros below them.

Plain autograd's second pass sends a gradient of zeros from each of them down through everything
below. Here a linear map (pooling, padding, the derivative of an activation) knows its transpose,
and nothing flows where nothing depends.
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
    def run(x):
        y = aten.relu_(x) if inplace else aten.relu(x)
        return y, (y,)

    return _Piecewise.apply(input, run, (_relu_derivative,) * 2, inplace)


def _leaky_relu(input, negative_slope=0.01, inplace=False):
    if inplace and negative_slope < 0:
        return NotImplemented  # the sign of the output no longer tells that of the input

    def run(x):
        if inplace:
            y = aten.leaky_relu_(x, negative_slope)
            return y, (y,)
        return aten.leaky_relu(x, negative_slope), (x,)

    def derivative(t, saved):
        return aten.leaky_relu_backward(t, saved, negative_slope, inplace)

    return _Piecewise.apply(input, run, (derivative,) * 2, inplace)


def _hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False):
    def run(x):
        if inplace:
            y = aten.hardtanh_(x, min_val, max_val)
            return y, (y,)
        return aten.hardtanh(x, min_val, max_val), (x,)

    def derivative(t, saved):
        return aten.hardtanh_backward(t, saved, min_val, max_val)

    return _Piecewise.apply(input, run, (derivative,) * 2, inplace)


def _relu6(input, inplace=False):
    return _hardtanh(input, 0.0, 6.0, inplace)


def _prelu(input, weight):
    if input.dim() < 2 or weight.dim() > 1:
        return NotImplemented
    if weight.numel() > 1:
        weight = weight.view(-1, *[1] * (input.dim() - 2))
    # The slope depends on the weight; on the input only by a comparison, which has no gradient.
    return input * torch.where(input.detach() > 0, weight.new_ones(()), weight)


def _linear(x, forward, backward):
    """Apply forward(x), linear; backward(g, x) is its transpose, which needs x's shape alone."""
    return _Linear.apply(x, (lambda t, _: forward(t), backward), x.detach())


def _avg_pool(n):
    forward, backward = getattr(aten, f"avg_pool{n}d"), getattr(aten, f"avg_pool{n}d_backward")

    def avg_pool(
        input,
        kernel_size,
        stride=None,
        padding=0,
        ceil_mode=False,
        count_include_pad=True,
        divisor_override=None,
    ):
        kernel = expand(kernel_size, n)
        stride = kernel if stride is None or stride == () else expand(stride, n)
        conf = kernel, stride, expand(padding, n), ceil_mode, count_include_pad, divisor_override
        return _linear(input, lambda t: forward(t, *conf), lambda g, x: backward(g, x, *conf))

    return avg_pool


def _avg_pool1d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True
):
    kernel = expand(kernel_size, 1)
    stride = kernel if stride is None or stride == () else expand(stride, 1)
    sizes = [1, *kernel], [1, *stride], [0, *expand(padding, 1)]
    return _avg_pool(2)(input.unsqueeze(-2), *sizes, ceil_mode, count_include_pad).squeeze(-2)


def _adaptive_avg_pool(n):
    forward = getattr(F, f"adaptive_avg_pool{n}d")
    backward = getattr(aten, f"_adaptive_avg_pool{n}d_backward")

    def adaptive_avg_pool(input, output_size):
        if output_size == 1 or output_size in [(1,) * n, [1] * n]:
            return NotImplemented  # a mean, which sends no zeros
        return _linear(input, lambda t: forward(t, output_size), backward)

    return adaptive_avg_pool


def _adaptive_avg_pool1d(input, output_size):
    size = (1, *expand(output_size, 1))
    pooled = _adaptive_avg_pool(2)(input.unsqueeze(-2), size)
    return pooled if pooled is NotImplemented else pooled.squeeze(-2)


def _gather(n):
    def gather(t, x, indices):
        values = t.flatten(-n).gather(-1, indices.flatten(-n))
        return values.view(indices.shape)

    return gather


def _max_pool(n):
    forward = getattr(aten, f"max_pool{n}d_with_indices")
    backward = getattr(aten, f"max_pool{n}d_with_indices_backward")

    def max_pool(
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
        kernel = expand(kernel_size, n)
        stride = kernel if stride is None or stride == () else expand(stride, n)
        conf = kernel, stride, expand(padding, n), expand(dilation, n), ceil_mode

        def run(x):
            y, indices = forward(x, *conf)
            return y, (x, indices)

        def spread(g, x, indices):
            return backward(g, x, *conf, indices)

        return _Piecewise.apply(input, run, (spread, _gather(n)), False)

    return max_pool


def _max_pool1d(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    if return_indices:
        return NotImplemented
    kernel = expand(kernel_size, 1)
    stride = kernel if stride is None or stride == () else expand(stride, 1)
    sizes = [1, *kernel], [1, *stride], [0, *expand(padding, 1)], [1, *expand(dilation, 1)]
    return _max_pool(2)(input.unsqueeze(-2), *sizes, ceil_mode).squeeze(-2)


def _adaptive_max_pool(n):
    forward = getattr(aten, f"adaptive_max_pool{n}d")
    backward = getattr(aten, f"adaptive_max_pool{n}d_backward")

    def adaptive_max_pool(input, output_size, return_indices=False):
        if return_indices or None in expand(output_size, n):
            return NotImplemented
        size = expand(output_size, n)

        def run(x):
            y, indices = forward(x, size)
            return y, (x, indices)

        return _Piecewise.apply(input, run, (backward, _gather(n)), False)

    return adaptive_max_pool


def _adaptive_max_pool1d(input, output_size, return_indices=False):
    if return_indices:
        return NotImplemented
    size = (1, *expand(output_size, 1))
    return _adaptive_max_pool(2)(input.unsqueeze(-2), size).squeeze(-2)


def _pad(input, pad, mode="constant", value=None):
    kind = {"reflect": "reflection", "replicate": "replication"}.get(mode)
    if kind is None or len(pad) not in (2, 4, 6):
        return NotImplemented
    name = f"{kind}_pad{len(pad) // 2}d"
    forward, backward = getattr(aten, name), getattr(aten, f"{name}_backward")
    return _linear(input, lambda t: forward(t, pad), lambda g, x: backward(g, x, pad))


def _inplace(function):
    return lambda input, *args: function(input, *args, inplace=True)


# Operations whose double backward in plain autograd sends zeros to everything below them.
PIECEWISE_LINEAR = {
    **dict.fromkeys([F.relu, torch.relu, torch.Tensor.relu], _relu),
    **dict.fromkeys([torch.relu_, torch.Tensor.relu_], _inplace(_relu)),
    **dict.fromkeys([F.leaky_relu, torch._C._nn.leaky_relu], _leaky_relu),
    F.leaky_relu_: _inplace(_leaky_relu),
    **dict.fromkeys([F.hardtanh, torch._C._nn.hardtanh], _hardtanh),
    F.hardtanh_: _inplace(_hardtanh),
    F.relu6: _relu6,
    **dict.fromkeys([torch.prelu, torch.Tensor.prelu], _prelu),
    F.avg_pool1d: _avg_pool1d,
    F.avg_pool2d: _avg_pool(2),
    F.avg_pool3d: _avg_pool(3),
    F.adaptive_avg_pool1d: _adaptive_avg_pool1d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool(2),
    F.adaptive_avg_pool3d: _adaptive_avg_pool(3),
    **dict.fromkeys([F.max_pool1d, torch.max_pool1d], _max_pool1d),
    **dict.fromkeys([F.max_pool2d, torch.max_pool2d], _max_pool(2)),
    **dict.fromkeys([F.max_pool3d, torch.max_pool3d], _max_pool(3)),
    F.adaptive_max_pool1d: _adaptive_max_pool1d,
    F.adaptive_max_pool2d: _adaptive_max_pool(2),
    F.adaptive_max_pool3d: _adaptive_max_pool(3),
    F.pad: _pad,
}
