"""Runs a critic with its operations rewritten so that differentiating twice does no wasted work.

Plain autograd wastes three things in the second pass of a gradient penalty: piecewise-linear
operations send zeros down through everything below them (_piecewise.py), the second-order weight
gradient of a convolution is computed as a convolution with a kernel as large as the feature map
(_convolution.py), and a normalisation's second derivative is dozens of operations (_norm.py).

All derivatives are exact, to any order. An operation too small to pay for its rewriting is left.
"""

import torch
import torch.nn.functional as F
from torch._C import _are_functorch_transforms_active
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from gan_kernels._convolution import CONVOLUTIONS
from gan_kernels._norm import NORMS
from gan_kernels._piecewise import PIECEWISE_LINEAR

# In multiply-adds: what a CPU does while Python rewrites a few operations, or as an element passes.
LEAST, ELEMENT = 2e7, 10

_REWRITTEN = {
    **CONVOLUTIONS,
    **NORMS,
    **{f: lambda asked, *a, g=g, **k: g(*a, **k) for f, g in PIECEWISE_LINEAR.items()},
}
_WEIGHTED = {F.linear, *CONVOLUTIONS}
_PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm}
# The usual operations with curvature: through what is below them gradients flow in any case.
_CURVED = {
    *NORMS,
    *(F.scaled_dot_product_attention, F.multi_head_attention_forward),
    *(F.elu, F.gelu, F.silu, F.softplus, F.softmax),
    *(torch.tanh, torch.sigmoid, torch.softmax, torch.sin),
    *(torch.Tensor.tanh, torch.Tensor.sigmoid, torch.Tensor.softmax),
}
_PLAIN = {torch.Tensor, torch.nn.Parameter}


def _first(args, kwargs):
    return kwargs["input"] if "input" in kwargs else args[0]


def _applies(x, args, kwargs):
    """Whether x, the input of an operation, requires grad and all its tensors are plain ones."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
    plain = all(type(t) in _PLAIN and t.is_floating_point() for t in tensors)
    return plain and torch.is_grad_enabled() and isinstance(x, torch.Tensor) and x.requires_grad


class Rewriting(TorchFunctionMode):
    """While active, operations on tensors that require grad run in their rewritten form.

    `changed` tells whether any did. `silenced` holds the graph nodes of the operations that would
    have sent zeros down, `weighted` pairs of the node of a weighted operation and its weight,
    `biased` the same for biases that plain autograd gives zeros.
    """

    def __init__(self, asked):
        super().__init__()
        self.asked, self.work, self.left = asked, 0, 0
        self.changed, self.silenced, self.weighted, self.biased = False, [], [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        y = self._rewritten(func, args, kwargs) if func in _REWRITTEN else NotImplemented
        if y is NotImplemented:
            y = func(*args, **kwargs)
        else:
            self.changed = True
            if func in PIECEWISE_LINEAR:
                # in place on a view, it is the view's base whose node stands in the graph
                self.silenced.append((y._base if y._is_view() else y).grad_fn)
            elif func is F.group_norm:
                bias = kwargs.get("bias", args[3] if args[3:] else None)
                if bias is not None and bias.is_leaf and bias.requires_grad:
                    self.biased.append((y.grad_fn, bias))
        if type(y) is torch.Tensor and y.requires_grad:
            if func in _CURVED:
                self.work = self.left = 0
            self.work += ELEMENT * y.numel()
            if func in _PRODUCTS:
                self.work += y.numel() * _first(args, kwargs).shape[-1]
            elif func in _WEIGHTED:
                weight = kwargs.get("weight", args[1] if args[1:] else None)
                if isinstance(weight, torch.Tensor):
                    self.weighted.append((y.grad_fn, weight))
                    self.work += y.numel() * weight.shape[1:].numel()
        return y

    def _silences(self, x):
        """Whether the zeros of an operation on x would cost more than its rewriting.

        They would go through all that is below, and so make any rewriting there worthless. Below
        the last operation that was left alone, whose own zeros go there, nothing is won.
        """
        least = LEAST if x.device.type == "cpu" else 100 * LEAST
        return bool(self.silenced) or (self.work >= least and self.work - self.left >= least / 4)

    def _rewritten(self, func, args, kwargs):
        """Return the result of func in its rewritten form, or NotImplemented."""
        if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return NotImplemented
        if _top_saved_tensors_default_hooks(False) is not None:
            return NotImplemented  # a checkpoint would run it again, and not rewritten
        x = _first(args, kwargs)
        if not _applies(x, args, kwargs):
            return NotImplemented
        if func in PIECEWISE_LINEAR and not self._silences(x):
            self.left = self.work
            return NotImplemented
        return _REWRITTEN[func](self.asked, *args, **kwargs)
