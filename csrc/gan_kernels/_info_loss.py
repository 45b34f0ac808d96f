"""InfoGAN's information loss (Chen et al. 2016, arXiv 1606.03657, section 5), fused."""

import math

import torch
from torch._C import _are_functorch_transforms_active

from gan_kernels._library import ops, sum_dtype, usable

CUDA_CODES = 256  # categorical codes that the CUDA kernels take

_forward = ops.info_loss.default
_backward = ops.info_loss_backward.default


def _one_or_nan(index, size, like):
    """Return 1 for each category within its range, NaN for others, as the CUDA kernels do."""
    return torch.where((index >= 0) & (index < size), like.new_ones(()), math.nan)


def _plain_backward(categorical_gradient, continuous_gradient, q, category, code, sizes):
    """Return what _backward returns, as operations that autograd can differentiate again."""
    n = code.shape[1]
    x = q.to(sum_dtype(q))
    *logits, mean, rest = x.split([*sizes, n, x.shape[1] - sum(sizes) - n], dim=1)
    precision = torch.exp(-rest) if rest.shape[1] else 1.0
    a, b = categorical_gradient / len(q), continuous_gradient / len(q)
    error = code - mean
    parts = []
    for logit, index in zip(logits, category.unbind(1), strict=True):
        hit = index[:, None] == torch.arange(logit.shape[1], device=q.device)
        known = _one_or_nan(index, logit.shape[1], x)
        parts.append(a * (logit.softmax(1) - hit.to(x.dtype)) * known[:, None])
    parts.append(-b * error * precision)
    if rest.shape[1]:
        parts.append(b * (0.5 - 0.5 * error**2 * precision))
    return torch.cat(parts, dim=1).to(q.dtype)


def _check(q, category, code, sizes):
    """Refuse what _forward refuses, but for categories out of range."""
    if category.dtype != torch.int64 or not q.is_floating_point():
        raise RuntimeError("info_loss: q must be floating-point and category int64")
    if code.dtype not in (q.dtype, torch.float32):
        raise RuntimeError("info_loss: code must be float32 or of q's dtype")
    shapes = [tuple(t.shape) for t in (q, category, code)]
    if [len(shape) for shape in shapes] == [2, 2, 2]:
        (batch, columns), n = shapes[0], shapes[2][1]
        fits = shapes[1:] == [(batch, len(sizes)), (batch, n)] and min(batch, columns, *sizes) > 0
        if fits and columns - sum(sizes) in (n, 2 * n):
            return
    raise RuntimeError(
        "info_loss: q {}, category {} and code {} do not fit sizes {}".format(*shapes, [*sizes])
    )


def _plain_loss(q, category, code, sizes):
    """Return what _forward returns, for a GPU on which the kernels can not compute."""
    _check(q, category, code, sizes)
    n = code.shape[1]
    x = q.to(sum_dtype(q))
    *logits, mean, rest = x.split([*sizes, n, x.shape[1] - sum(sizes) - n], dim=1)
    rest = rest if rest.shape[1] else torch.zeros_like(mean)
    categorical = x.new_zeros(())
    for logit, index in zip(logits, category.unbind(1), strict=True):
        # not cross_entropy, which ends the process on CUDA where a category is out of range
        hit = index.clamp(0, logit.shape[1] - 1)[:, None]
        log_probability = logit.log_softmax(1).gather(1, hit)[:, 0]
        known = _one_or_nan(index, logit.shape[1], x)
        categorical = categorical - (log_probability * known).mean()
    squares = (code - mean) ** 2 * torch.exp(-rest)
    return categorical, 0.5 * (math.log(2 * math.pi) + rest + squares).sum(1).mean()


torch.library.register_fake("gan_kernels::info_loss", _plain_loss)
torch.library.register_fake("gan_kernels::info_loss_backward", _plain_backward)


def _save(ctx, inputs, output):
    *tensors, ctx.sizes = inputs
    ctx.save_for_backward(*tensors)


class _InfoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, category, code, sizes):
        _save(ctx, (q, category, code, sizes), None)
        return _forward(q, category, code, sizes)

    @staticmethod
    def backward(ctx, categorical_gradient, continuous_gradient):
        q, category, code = ctx.saved_tensors
        # Gradients that will be differentiated again come from operations autograd knows.
        backward = _plain_backward if torch.is_grad_enabled() else _backward
        rest, first = (category, code, ctx.sizes), sum(ctx.sizes)
        if not ctx.needs_input_grad[2]:
            return backward(categorical_gradient, continuous_gradient, q, *rest), None, None, None
        # the code's gradient is minus the mean's, and may be of a longer dtype than q
        x = q.to(torch.promote_types(q.dtype, code.dtype))
        gradient = backward(categorical_gradient, continuous_gradient, x, *rest)
        of_mean = gradient[:, first : first + code.shape[1]]
        return gradient.to(q.dtype), None, -of_mean.to(code.dtype), None


class _TransformedInfoLoss(_InfoLoss):
    """The same in the form that torch.func and torch.compile need, which is slower to call."""

    @staticmethod
    def forward(q, category, code, sizes):
        return _forward(q, category, code, sizes)

    setup_context = staticmethod(_save)


def info_loss(q, category, code, sizes):
    """Return InfoGAN's information loss, -E[log Q(c|x)], as (categorical_nll, continuous_nll).

    Both are means over the batch in nats, summed over the codes of their kind: cross-entropies of
    the categorical codes, and negative log densities of a factored Gaussian (with its constant
    log(2 pi) / 2) for the continuous ones. Source: Chen et al. 2016, eq. 5 and section 6.

    Differentiable in q and code, to any order (from the second on in plain PyTorch). On a GPU that
    the kernels were not built for it is computed in plain PyTorch, and a warning says so once; on
    CUDA also where there are more than 256 categorical codes.

    Args:
        q: Q's output [logits of each categorical code | mean | log variance], of shape (batch,
            sum(sizes) + 2 n), or (batch, sum(sizes) + n) for unit variance, with n the number of
            continuous codes; float32, float64, bfloat16 or float16, any strides.
        category: the categories drawn, int64, (batch, len(sizes)).
        code: the continuous codes drawn, (batch, n), float32 or of q's dtype.
        sizes: the number of categories of each categorical code, a sequence of int.

    Returns:
        Two scalars: float64 if q is, otherwise float32.

    Raises:
        RuntimeError: an argument, which is named, has a shape, dtype or device that does not fit,
            or holds a category outside its range. On CUDA such a category gives NaN instead, as
            finding it would wait for the device.
    """
    many = getattr(q, "is_cuda", False) and len(sizes or ()) > CUDA_CODES
    if many or not usable(q):
        return _plain_loss(q, category, code, sizes)
    if torch.compiler.is_compiling() or _are_functorch_transforms_active():
        return _TransformedInfoLoss.apply(q, category, code, sizes)
    return _InfoLoss.apply(q, category, code, sizes)
