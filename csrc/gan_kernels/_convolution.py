"""Convolutions whose derivatives of every order are convolutions of the three kinds.

A convolution y = C(x, w) is one of three maps, each bilinear, each the derivative of the others:

    C(x, w)   the output         I(g, w)   the gradient of x         K(g, x)   the gradient of w

Plain autograd computes the derivative of I in w as a convolution with a kernel as large as the
feature map; here it is K.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from gan_kernels._graph import expand, node

aten = torch.ops.aten

LEAST = 1e7  # multiply-adds: below, K saves less than its Python costs


def _backward(g, x, w, conf, mask):
    """Call aten's convolution backward; mask says which of x, w and bias to differentiate."""
    stride, padding, dilation, transposed, output_padding, groups = conf
    if groups > 1 and mask[0] and mask[1]:  # a CPU takes up to three times longer for both at once
        gx, _, _ = _backward(g, x, w, conf, [True, False, False])
        return gx, *_backward(g, x, w, conf, [False, *mask[1:]])[1:]
    bias = [g.shape[1]] if mask[2] else None
    return aten.convolution_backward(
        g, x, w, bias, stride, padding, dilation, transposed, output_padding, groups, mask
    )


class _Bilinear(Function):
    """compute(a, b, like, conf), bilinear in a and b; `like` has the shape of the result."""

    @classmethod
    def forward(cls, ctx, a, b, like, conf):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b)
        ctx.conf = conf
        return cls.compute(a, b, like, conf)

    @classmethod
    def backward(cls, ctx, h):
        if h is None:
            return None, None, None, None
        a, b = ctx.saved_tensors
        need_a, need_b, _, _ = ctx.needs_input_grad
        return *cls.derivatives(a, b, h, ctx.conf, need_a, need_b), None, None


class _Output(_Bilinear):
    """C(x, w)."""

    @staticmethod
    def compute(x, w, like, conf):
        return aten.convolution(x, w, None, *conf)

    @staticmethod
    def derivatives(x, w, g, conf, need_x, need_w):
        return (
            node(_InputGradient, g, w, x.detach(), conf) if need_x else None,
            node(_WeightGradient, g, x, w.detach(), conf) if need_w else None,
        )


class _InputGradient(_Bilinear):
    """I(g, w)."""

    @staticmethod
    def compute(g, w, like, conf):
        return _backward(g, like, w, conf, [True, False, False])[0]

    @staticmethod
    def derivatives(g, w, h, conf, need_g, need_w):
        return (
            node(_Output, h, w, g.detach(), conf) if need_g else None,
            node(_WeightGradient, g, h, w.detach(), conf) if need_w else None,
        )


class _WeightGradient(_Bilinear):
    """K(g, x)."""

    @staticmethod
    def compute(g, x, like, conf):
        return _backward(g, x, like, conf, [False, True, False])[1]

    @staticmethod
    def derivatives(g, x, h, conf, need_g, need_x):
        return (
            node(_Output, x, h, g.detach(), conf) if need_g else None,
            node(_InputGradient, g, h, x.detach(), conf) if need_x else None,
        )


class _Convolution(Function):
    """C(x, w) + b."""

    @staticmethod
    def forward(ctx, x, w, b, conf, asked):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        ctx.b, ctx.conf, ctx.asked = b, conf, asked  # not saved: nothing needs its values
        return aten.convolution(x, w, b, *conf)

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * 5
        x, w = ctx.saved_tensors
        need_x, need_w, need_b = ctx.asked.of(ctx.needs_input_grad[:3], x, w, ctx.b)
        if torch.is_grad_enabled():
            gx = _InputGradient.apply(g, w, x.detach(), ctx.conf) if need_x else None
            gw = _WeightGradient.apply(g, x, w.detach(), ctx.conf) if need_w else None
            gb = g.sum([0, *range(2, g.dim())]) if need_b else None
        else:
            gx, gw, gb = _backward(g, x, w, ctx.conf, [need_x, need_w, need_b])
        return gx, gw, gb, None, None


def _autocast(*tensors):
    """Cast as autocast would before a convolution, differentiably."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _pays(x, w, stride, groups):
    """Whether K saves more than its Python costs; stride is the one that thins out the output."""
    if groups > 1 and max(w.shape[2:]) > 3 and x.device.type == "cpu":
        return LEAST == 0  # there K is slow
    work = x.numel() // x.shape[1] // stride * w.numel()
    # Plain autograd goes through groups one by one.
    return w.requires_grad and work + 5e5 * groups >= LEAST


def _conv(n):
    def conv(asked, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if input.dim() != n + 2 or weight.dim() != n + 2:
            return NotImplemented
        stride, dilation = expand(stride, n), expand(dilation, n)
        if padding == "valid":
            padding = 0
        elif padding == "same":
            if stride != [1] * n:
                return NotImplemented
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            # An odd total pads one more at the end of its dimension.
            extra = [side for t in reversed(total) for side in (0, t % 2)]
            input = F.pad(input, extra) if any(extra) else input
            padding = [t // 2 for t in total]
        elif isinstance(padding, str):
            return NotImplemented
        if not _pays(input, weight, math.prod(stride), groups):
            return NotImplemented
        conf = stride, expand(padding, n), dilation, False, [0] * n, groups
        return _Convolution.apply(*_autocast(input, weight, bias), conf, asked)

    return conv


def _conv_transpose2d(
    asked, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    if input.dim() != 4 or weight.dim() != 4 or not _pays(input, weight, 1, groups):
        return NotImplemented
    stride, padding, output_padding, dilation = (
        expand(value, 2) for value in (stride, padding, output_padding, dilation)
    )
    conf = stride, padding, dilation, True, output_padding, groups
    return _Convolution.apply(*_autocast(input, weight, bias), conf, asked)


CONVOLUTIONS = {  # as far as a critic of benchmarks/critics.py has them
    torch.conv1d: _conv(1),
    torch.conv2d: _conv(2),
    torch.conv3d: _conv(3),
    torch.conv_transpose2d: _conv_transpose2d,
}
