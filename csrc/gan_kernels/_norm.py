"""Layer, group, instance and batch normalisation with their second derivative as one kernel."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import Function

from gan_kernels._library import ops, usable

aten = torch.ops.aten

LEAST = 2**17  # elements: below, the kernel saves less than its Python costs


class _Layer(NamedTuple):
    """Layer norm over the last dimensions, of sizes `shape`."""

    shape: list
    eps: float

    def forward(self, x, w, b):
        return aten.native_layer_norm(x, self.shape, w, b, self.eps)

    def backward(self, g, x, w, b, mean, rstd, mask):
        return aten.native_layer_norm_backward(g, x, self.shape, mean, rstd, w, b, mask)

    def groups(self, x):
        """Return x with a group in dimensions of its own, those, and the weight's shape."""
        return x, list(range(-len(self.shape), 0)), self.shape

    def layout(self, x):
        """Return how many groups differ in weights, their segments, and whether they alternate."""
        return 1, 1, False


class _Group(NamedTuple):
    """Group norm of `count` groups of channels; instance norm has as many as channels."""

    count: int
    eps: float

    def sizes(self, x):
        return *x.shape[:2], x[0, 0].numel(), self.count

    def forward(self, x, w, b):
        return aten.native_group_norm(x, w, b, *self.sizes(x), self.eps)

    def backward(self, g, x, w, b, mean, rstd, mask):
        sizes = self.sizes(x)
        return aten.native_group_norm_backward(g.contiguous(), x, mean, rstd, w, *sizes, mask)

    def groups(self, x):
        n, channels, size, count = self.sizes(x)
        return x.view(n, count, channels // count, size), [2, 3], (count, channels // count, 1)

    def layout(self, x):
        return self.count, x.shape[1] // self.count, False


class _Batch(NamedTuple):
    """Batch norm by the statistics of the batch, which go into the running ones."""

    running_mean: torch.Tensor
    running_var: torch.Tensor
    momentum: float
    eps: float

    def forward(self, x, w, b):
        running = self.running_mean, self.running_var
        return aten.native_batch_norm(x, w, b, *running, True, self.momentum, self.eps)

    def backward(self, g, x, w, b, mean, rstd, mask):
        running = self.running_mean, self.running_var
        return aten.native_batch_norm_backward(g, x, w, *running, mean, rstd, True, self.eps, mask)

    def groups(self, x):
        return x.view(*x.shape[:2], -1), [0, 2], (x.shape[1], 1)

    def layout(self, x):
        return x.shape[1], x.shape[0], True


def _normalised(x, norm):
    """Return x in groups, normalised, the factor that did it, and the dimensions of a group."""
    x, dims, shape = norm.groups(x)
    centred = x - x.mean(dims, keepdim=True)
    rstd = (centred.square().mean(dims, keepdim=True) + norm.eps).rsqrt()
    return centred * rstd, rstd, dims, shape


@torch.library.register_fake("gan_kernels::norm_double_backward")
def _(h, g, x, mean, rstd, weight, weight_groups, segments, strided):
    weights = 1 if weight is None else weight.numel() // weight_groups
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(mean.numel(), weights)


class _InputGradient(Function):
    """The gradient of the input, which depends on g, x and the weight."""

    @staticmethod
    def compute(g, x, w, mean, rstd, norm):
        return norm.backward(g, x, w, None, mean, rstd, [True, False, False])[0]

    @staticmethod
    def forward(ctx, g, x, w, mean, rstd, norm):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, w, mean, rstd)
        ctx.norm = norm
        return _InputGradient.compute(g, x, w, mean, rstd, norm)

    @staticmethod
    def backward(ctx, h):
        if h is None:
            return (None,) * 6
        g, x, w, mean, rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            # Partial derivatives: g itself depends on x and w, views of them do not.
            g, x, w = (t if t is None else t.view_as(t) for t in (g, x, w))
            n, inverse, dims, shape = _normalised(x, ctx.norm)
            u = g.reshape(n.shape) if w is None else g.reshape(n.shape) * w.view(shape)
            projected = u - u.mean(dims, keepdim=True) - n * (u * n).mean(dims, keepdim=True)
            wanted = [t for t, need in zip((g, x, w), needed, strict=True) if need]
            result = (inverse * projected).view(x.shape)
            found = iter(torch.autograd.grad(result, wanted, h, create_graph=True))
            return *(next(found) if need else None for need in needed), None, None, None
        tensors = [t if t is None else t.contiguous() for t in (h, g, x, mean, rstd, w)]
        gg, gx, gw = ops.norm_double_backward(*tensors, *ctx.norm.layout(x))
        gw = gw.view(-1, w.numel()).sum(0).view(w.shape) if needed[2] else None
        return gg, gx, gw, None, None, None


class _Normalise(Function):
    """The output, whose first derivative is the native one."""

    @staticmethod
    def forward(ctx, x, w, b, norm, asked):
        y, mean, rstd = norm.forward(x, w, b)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w, mean, rstd)
        ctx.b, ctx.norm, ctx.asked = b, norm, asked  # not saved: nothing needs its values
        return y

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * 5
        (x, w, mean, rstd), b = ctx.saved_tensors, ctx.b
        need_x, need_w, need_b = ctx.asked.of(ctx.needs_input_grad[:3], x, w, b)
        if torch.is_grad_enabled():
            gx = _InputGradient.apply(g, x, w, mean, rstd, ctx.norm) if need_x else None
            gw = gb = None
            if need_w or need_b:
                n, _, _, shape = _normalised(x, ctx.norm)
                u = g.reshape(n.shape)
                gw = (u * n).sum_to_size(shape).view(w.shape) if need_w else None
                gb = u.sum_to_size(shape).view(b.shape) if need_b else None
            return gx, gw, gb, None, None
        gx, gw, gb = ctx.norm.backward(g, x, w, b, mean, rstd, [need_x, need_w, need_b])
        return gx, gw, gb, None, None


def _apply(asked, norm, x, w, b):
    """Apply norm where its kernel computes."""
    tensors = [t for t in (x, w, b) if t is not None]
    if x.numel() <= LEAST or not x.is_contiguous() or not usable(x):
        return NotImplemented
    same = {t.dtype for t in tensors} in ({torch.float32}, {torch.float64})
    if not same or torch.is_autocast_enabled(x.device.type):
        return NotImplemented
    return _Normalise.apply(x, w, b, norm, asked)


def _layer_norm(asked, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    if input.dim() == len(normalized_shape):
        return NotImplemented
    return _apply(asked, _Layer([*normalized_shape], eps), input, weight, bias)


def _group_norm(asked, input, num_groups, weight=None, bias=None, eps=1e-5):
    if input.dim() < 3 or input.shape[1] % num_groups:
        return NotImplemented
    return _apply(asked, _Group(num_groups, eps), input, weight, bias)


def _instance_norm(
    asked,
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    if running_mean is not None or not use_input_stats or input.dim() < 3:
        return NotImplemented
    if input.shape[2:].numel() < 2:
        return NotImplemented
    return _apply(asked, _Group(input.shape[1], eps), input, weight, bias)


def _batch_norm(
    asked,
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    if not training or input.dim() < 3 or input.shape[2:].numel() < 16:
        return NotImplemented  # channels of few neighbours would be read one by one
    return _apply(asked, _Batch(running_mean, running_var, momentum, eps), input, weight, bias)


NORMS = {  # each with a row of its name in benchmarks/critics.py
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
}
