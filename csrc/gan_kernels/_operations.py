"""A critic's operations, rewritten so that differentiating twice does no wasted work.

Plain autograd wastes two things in the second pass of a gradient penalty: piecewise-linear
operations send zeros down through everything below them, and the second-order weight gradient of a
convolution is computed as a convolution with a kernel as large as the feature map. Here

* a linear map (pooling, padding, the derivative of an activation) knows its transpose, and nothing
  flows where nothing depends;
* layer normalisation has its second derivative as one kernel, where plain autograd runs many;
* a convolution y = C(x, w) is one of three maps, each bilinear, each the derivative of the others:
      C(x, w)   the output         I(g, w)   the gradient of x         K(g, x)   the gradient of w
  so that every derivative of every order is again one of the three. Its node in the graph is split
  into one that leads to x and one that leads to the parameters: asked for the gradient of x alone,
  the autograd engine leaves out the other by itself.

All derivatives are exact, to any order.
"""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from gan_kernels._library import ops

aten = torch.ops.aten


def _node(function, *args):
    """Apply function; where no gradient will be asked for, without the cost of a graph node."""
    return function.apply(*args) if torch.is_grad_enabled() else function.compute(*args)


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
            g = _node(_Linear, g, ctx.maps[::-1], *saved)
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
            g = _node(_Linear, g, ctx.maps, *[tensor.detach() for tensor in ctx.saved_tensors])
        return g, None, None, None


def _backward(g, x, w, conf, mask):
    """Call aten's convolution backward; mask says which of x, w and bias to differentiate."""
    stride, padding, dilation, transposed, output_padding, groups = conf
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
            _node(_InputGradient, g, w, x.detach(), conf) if need_x else None,
            _node(_WeightGradient, g, x, w.detach(), conf) if need_w else None,
        )


class _InputGradient(_Bilinear):
    """I(g, w)."""

    @staticmethod
    def compute(g, w, like, conf):
        return _backward(g, like, w, conf, [True, False, False])[0]

    @staticmethod
    def derivatives(g, w, h, conf, need_g, need_w):
        return (
            _node(_Output, h, w, g.detach(), conf) if need_g else None,
            _node(_WeightGradient, g, h, w.detach(), conf) if need_w else None,
        )


class _WeightGradient(_Bilinear):
    """K(g, x)."""

    @staticmethod
    def compute(g, x, like, conf):
        return _backward(g, x, like, conf, [False, True, False])[1]

    @staticmethod
    def derivatives(g, x, h, conf, need_g, need_x):
        return (
            _node(_Output, x, h, g.detach(), conf) if need_g else None,
            _node(_InputGradient, g, h, x.detach(), conf) if need_x else None,
        )


class _ToInput(Function):
    """Stands for the output and leads to x alone; what is in a list has no edge in the graph."""

    @staticmethod
    def forward(ctx, x, hidden_weight, conf, hidden_output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *hidden_weight)
        ctx.conf = conf
        return hidden_output[0]

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return None, None, None, None
        x, w = ctx.saved_tensors
        return _node(_InputGradient, g, w, x.detach(), ctx.conf), None, None, None


class _ToParameters(Function):
    """Stands for the output and leads to weight and bias alone."""

    @staticmethod
    def forward(ctx, w, b, hidden_input, conf, hidden_output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*hidden_input, w)
        ctx.conf = conf
        return hidden_output[0]

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return None, None, None, None, None
        x, w = ctx.saved_tensors
        need_w, need_b = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            gw = _WeightGradient.apply(g, x, w.detach(), ctx.conf) if need_w else None
            gb = g.sum([0, *range(2, g.dim())]) if need_b else None
        else:
            _, gw, gb = _backward(g, x, w, ctx.conf, [False, need_w, need_b])
        return gw, gb, None, None, None


class _Join(Function):
    """The output itself, whose gradient goes to both that stand for it."""

    @staticmethod
    def forward(ctx, to_input, to_parameters, hidden_output):
        ctx.set_materialize_grads(False)
        return hidden_output[0]

    @staticmethod
    def backward(ctx, g):
        return g, g, None


@torch.library.register_fake("gan_kernels::layer_norm_double_backward")
def _(h, g, x, mean, rstd, weight):
    return torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)


def _normalised(x, dims, eps):
    """Return (x - mean) / sqrt(variance + eps) over the last dims and the square root's inverse."""
    centred = x - x.mean(dims, keepdim=True)
    rstd = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


class _NormInputGradient(Function):
    """The gradient of layer normalisation's input, which depends on g, x and the weight."""

    @staticmethod
    def compute(g, x, w, mean, rstd, conf):
        shape, _ = conf
        mask = [True, False, False]
        return aten.native_layer_norm_backward(g, x, shape, mean, rstd, w, None, mask)[0]

    @staticmethod
    def forward(ctx, g, x, w, mean, rstd, conf):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, w, mean, rstd)
        ctx.conf = conf
        return _NormInputGradient.compute(g, x, w, mean, rstd, conf)

    @staticmethod
    def backward(ctx, h):
        if h is None:
            return (None,) * 6
        g, x, w, mean, rstd = ctx.saved_tensors
        shape, eps = ctx.conf
        dims = list(range(-len(shape), 0))
        if torch.is_grad_enabled():
            # Partial derivatives: g itself depends on x and w, views of them do not.
            g, x, w = (t if t is None else t.view_as(t) for t in (g, x, w))
            n, inverse = _normalised(x, dims, eps)
            u = g if w is None else g * w
            projected = u - u.mean(dims, keepdim=True) - n * (u * n).mean(dims, keepdim=True)
            wanted = [t for t, need in zip((g, x, w), ctx.needs_input_grad, strict=False) if need]
            found = iter(torch.autograd.grad(inverse * projected, wanted, h, create_graph=True))
            return *(next(found) if need else None for need in ctx.needs_input_grad[:3]), *[
                None
            ] * 3
        tensors = [t if t is None else t.contiguous() for t in (h, g, x, mean, rstd, w)]
        gg, gx, rows = ops.layer_norm_double_backward(*tensors)
        gw = None
        if ctx.needs_input_grad[2]:
            gw = rows.flatten(0, -1 - len(shape)).sum(0)
        return gg, gx, gw, None, None, None


class _NormToInput(Function):
    """Stands for the output and leads to x alone."""

    @staticmethod
    def forward(ctx, x, hidden, mean, rstd, conf, hidden_output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *hidden, mean, rstd)
        ctx.conf = conf
        return hidden_output[0]

    @staticmethod
    def backward(ctx, g):
        if g is not None:
            g = _node(_NormInputGradient, g, *ctx.saved_tensors, ctx.conf)
        return g, None, None, None, None, None


class _NormToParameters(Function):
    """Stands for the output and leads to weight and bias alone."""

    @staticmethod
    def forward(ctx, w, b, hidden_input, mean, rstd, conf, hidden_output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*hidden_input, w, b, mean, rstd)
        ctx.conf = conf
        return hidden_output[0]

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * 7
        x, w, b, mean, rstd = ctx.saved_tensors
        shape, eps = ctx.conf
        need_w, need_b = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            rows = list(range(g.dim() - len(shape)))
            n, _ = _normalised(x, list(range(-len(shape), 0)), eps)
            gw = (g * n).sum(rows) if need_w else None
            gb = g.sum(rows) if need_b else None
        else:
            mask = [False, need_w, need_b]
            found = aten.native_layer_norm_backward(g, x, shape, mean, rstd, w, b, mask)
            _, gw, gb = found
        return gw, gb, *[None] * 5


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    shape = [*normalized_shape]
    tensors = [t for t in (input, weight, bias) if t is not None]
    same = {t.dtype for t in tensors} in ({torch.float32}, {torch.float64})
    batched = input.dim() > len(shape)
    if not (same and batched) or torch.is_autocast_enabled(input.device.type):
        return NotImplemented
    with torch.no_grad():
        y, mean, rstd = aten.native_layer_norm(input, shape, weight, bias, eps)
    conf = shape, eps
    if not any(t is not None and t.requires_grad for t in (weight, bias)):
        return _NormToInput.apply(input, [weight], mean, rstd, conf, [y])
    zero = y.new_zeros(()).expand(y.shape)
    to_input = _NormToInput.apply(input, [weight], mean, rstd, conf, [zero.detach()])
    hidden = [input], mean, rstd, conf, [zero.detach()]
    return _Join.apply(to_input, _NormToParameters.apply(weight, bias, *hidden), [y])


def _tuple(value, n):
    return [value] * n if isinstance(value, int) else [*value] * (n if len(value) == 1 else 1)


def _autocast(*tensors):
    """Cast as autocast would before a convolution, differentiably."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _convolution(x, w, b, conf):
    x, w, b = _autocast(x, w, b)
    with torch.no_grad():
        y = aten.convolution(x, w, b, *conf)
    if not (w.requires_grad or (b is not None and b.requires_grad)):
        return _ToInput.apply(x, [w], conf, [y])
    # Both stand-ins share one number of memory.
    zero = y.new_zeros(()).expand(y.shape)
    to_input = _ToInput.apply(x, [w], conf, [zero.detach()])
    to_parameters = _ToParameters.apply(w, b, [x], conf, [zero.detach()])
    return _Join.apply(to_input, to_parameters, [y])


def _conv(n):
    def conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if input.dim() != n + 2 or weight.dim() != n + 2:
            return NotImplemented
        stride, dilation = _tuple(stride, n), _tuple(dilation, n)
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
        conf = stride, _tuple(padding, n), dilation, False, [0] * n, groups
        return _convolution(input, weight, bias, conf)

    return conv


def _conv_transpose(n):
    def conv_transpose(
        input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
    ):
        if input.dim() != n + 2 or weight.dim() != n + 2:
            return NotImplemented
        stride, padding, output_padding, dilation = (
            _tuple(value, n) for value in (stride, padding, output_padding, dilation)
        )
        conf = stride, padding, dilation, True, output_padding, groups
        return _convolution(input, weight, bias, conf)

    return conv_transpose


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
        kernel = _tuple(kernel_size, n)
        stride = kernel if stride is None or stride == () else _tuple(stride, n)
        conf = kernel, stride, _tuple(padding, n), ceil_mode, count_include_pad, divisor_override
        return _linear(input, lambda t: forward(t, *conf), lambda g, x: backward(g, x, *conf))

    return avg_pool


def _avg_pool1d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True
):
    kernel = _tuple(kernel_size, 1)
    stride = kernel if stride is None or stride == () else _tuple(stride, 1)
    sizes = [1, *kernel], [1, *stride], [0, *_tuple(padding, 1)]
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
    size = (1, *_tuple(output_size, 1))
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
        kernel = _tuple(kernel_size, n)
        stride = kernel if stride is None or stride == () else _tuple(stride, n)
        conf = kernel, stride, _tuple(padding, n), _tuple(dilation, n), ceil_mode

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
    kernel = _tuple(kernel_size, 1)
    stride = kernel if stride is None or stride == () else _tuple(stride, 1)
    sizes = [1, *kernel], [1, *stride], [0, *_tuple(padding, 1)], [1, *_tuple(dilation, 1)]
    return _max_pool(2)(input.unsqueeze(-2), *sizes, ceil_mode).squeeze(-2)


def _adaptive_max_pool(n):
    forward = getattr(aten, f"adaptive_max_pool{n}d")
    backward = getattr(aten, f"adaptive_max_pool{n}d_backward")

    def adaptive_max_pool(input, output_size, return_indices=False):
        if return_indices or None in _tuple(output_size, n):
            return NotImplemented
        size = _tuple(output_size, n)

        def run(x):
            y, indices = forward(x, size)
            return y, (x, indices)

        return _Piecewise.apply(input, run, (backward, _gather(n)), False)

    return adaptive_max_pool


def _adaptive_max_pool1d(input, output_size, return_indices=False):
    if return_indices:
        return NotImplemented
    size = (1, *_tuple(output_size, 1))
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


_WEIGHTED = {
    **dict.fromkeys([F.layer_norm, torch.layer_norm], _layer_norm),
    F.linear: F.linear,  # wastes nothing as it is
    torch.conv1d: _conv(1),
    torch.conv2d: _conv(2),
    torch.conv3d: _conv(3),
    torch.conv_transpose1d: _conv_transpose(1),
    torch.conv_transpose2d: _conv_transpose(2),
    torch.conv_transpose3d: _conv_transpose(3),
}

# Operations whose double backward in plain autograd sends zeros to everything below them.
_PIECEWISE_LINEAR = {
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
_REWRITTEN = _WEIGHTED | _PIECEWISE_LINEAR


def _traced(function, rewritten):
    """Return rewritten as one call that torch.compile keeps in its graph without looking inside.

    Looking inside it would lose the tensors that are hidden in lists, and with them gradients.
    """

    def call(*args, **kwargs):
        y = rewritten(*args, **kwargs)
        return function(*args, **kwargs) if y is NotImplemented else y

    return torch.compiler.allow_in_graph(call)


_TRACED = {function: _traced(function, rewritten) for function, rewritten in _REWRITTEN.items()}


_PLAIN = {torch.Tensor, torch.nn.Parameter}


class _WithZeros(Function):
    """value, and a gradient of zeros for each of parameters."""

    @staticmethod
    def forward(ctx, value, *parameters):
        ctx.parameters = parameters
        return value.clone()

    @staticmethod
    def backward(ctx, g):
        return g, *map(torch.zeros_like, ctx.parameters)


@torch.compiler.allow_in_graph
def with_zeros(value, *parameters):
    """Return value, giving each of parameters a gradient of zeros beside any other it gets."""
    return _WithZeros.apply(value, *parameters)


class Rewritten(TorchFunctionMode):
    """While active, operations on tensors that require grad run in their rewritten form.

    `silenced` holds the graph nodes of the operations that would have sent zeros down, `weighted`
    pairs of the node of a weighted operation and its weight. A graph that torch.compile traces has
    no nodes to remember: there `below` holds the parameters used before the last such operation.
    """

    def __init__(self):
        super().__init__()
        self.silenced, self.weighted = [], []
        self.used, self.below = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tracing = torch.compiler.is_compiling()
        if tracing:
            values = (*args, *kwargs.values())
            self.used += [v for v in values if isinstance(v, torch.nn.Parameter)]
        if func not in _REWRITTEN or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        x = kwargs["input"] if "input" in kwargs else args[0]
        if not (isinstance(x, torch.Tensor) and x.requires_grad):
            return func(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and (
                type(value) not in _PLAIN or not value.is_floating_point()
            ):
                return func(*args, **kwargs)
        if tracing:
            if func in _PIECEWISE_LINEAR:
                self.below, self.used = self.below + self.used, []
            return _TRACED[func](*args, **kwargs)
        y = _REWRITTEN[func](*args, **kwargs)
        if y is NotImplemented:
            return func(*args, **kwargs)
        if func in _PIECEWISE_LINEAR:
            # in place on a view, it is the view's base whose node stands in the graph
            self.silenced.append((y._base if y._is_view() else y).grad_fn)
        else:
            weight = kwargs.get("weight", args[1] if args[1:] else None)
            if isinstance(weight, torch.Tensor):
                self.weighted.append((y.grad_fn, weight))
        return y
