"""The gradient penalty of WGAN-GP (Gulrajani et al. 2017) and R1/R2 (Mescheder et al. 2018)."""

import contextlib
import threading
import weakref

import torch
from torch import _C
from torch._dynamo import eval_frame

from gan_kernels._graph import Asked, leaves
from gan_kernels._library import ops, sum_dtype, usable
from gan_kernels._rewriting import Rewriting

_forward = ops.penalty.default
_backward = ops.penalty_backward.default


def _plain_backward(penalty_gradient, gradient, target):
    """Return what _backward returns, as operations that autograd can differentiate again."""
    rows = gradient.to(sum_dtype(gradient)).reshape(len(gradient), -1)
    squares = (rows * rows).sum(1)
    # The root's own derivative is infinite at zero, so it never sees a zero.
    norms = torch.where(squares == 0, 1, squares).sqrt()
    scale = torch.where(squares == 0, 0, 2 * (norms - target) / (len(rows) * norms))
    scaled = rows * (penalty_gradient * scale)[:, None]
    return scaled.view(gradient.shape).to(gradient.dtype)


class _Penalty(torch.autograd.Function):
    """The penalty of a gradient, and a zero gradient for each of the `silent` parameters."""

    @staticmethod
    def forward(ctx, gradient, target, *silent):
        penalty, norms = _forward(gradient, target)
        ctx.mark_non_differentiable(norms)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, norms)
        ctx.target, ctx.silent = target, silent
        return penalty, norms

    @staticmethod
    def backward(ctx, penalty_gradient, _):
        gradient, norms = ctx.saved_tensors
        result = None
        if penalty_gradient is None:
            return None, None, *[None] * len(ctx.silent)
        if ctx.needs_input_grad[0]:
            # A gradient that will be differentiated again comes from operations autograd knows.
            if torch.is_grad_enabled():
                result = _plain_backward(penalty_gradient, gradient, ctx.target)
            else:
                result = _backward(penalty_gradient, gradient, norms, ctx.target)
        return result, None, *map(torch.zeros_like, ctx.silent)


def _walk(root):
    """Return {node: its children} of the autograd graph below root, children before parents."""
    below, stack = {}, [(root, None)]
    while stack:
        node, children = stack.pop()
        if children is not None:
            below[node] = children
        elif node not in below:
            children = [child for child, _ in node.next_functions if child is not None]
            if children:
                stack.append((node, children))
                stack += [(child, None) for child in children if child not in below]
            else:
                below[node] = children
    return below


def _silent_parameters(scores, x, rewritten):
    """Return the parameters that plain autograd gives a gradient of zeros, and we perhaps none.

    Plain autograd sends zeros from every piecewise-linear operation between x and the scores to all
    that lies below it: a bias, say, gets zeros rather than no gradient at all. Left out are the
    weights that are sure to have a gradient, as adding zeros to large ones takes time.
    """
    graph = _walk(scores.grad_fn)
    leads_to_x = set()
    for node, children in graph.items():
        if children:
            if not leads_to_x.isdisjoint(children):
                leads_to_x.add(node)
        elif getattr(node, "variable", None) is x:
            leads_to_x.add(node)
    left_out = {id(x)}
    for node, weight in rewritten.weighted:
        if node in leads_to_x:
            left_out.update(map(id, leaves(weight)))  # a weight may be computed from parameters
    below = leads_to_x.intersection(rewritten.silenced)
    silent = [bias for node, bias in rewritten.biased if node in leads_to_x]
    for node in reversed(graph):  # parents before children
        if node in below:
            if not getattr(node, "_saved_sparse", False):  # a zero of such a table is no dense one
                below.update(graph[node])
            variable = getattr(node, "variable", None)
            if isinstance(variable, torch.Tensor) and id(variable) not in left_out:
                silent.append(variable)
    return silent


def _norm_penalty(gradient, target):
    """Return (penalty, norms) of a gradient as operations that autograd knows."""
    rows = gradient.to(sum_dtype(gradient)).reshape(len(gradient), -1)
    squares = (rows * rows).sum(1)
    # The root's own derivative is infinite at zero, so it never sees a zero; a NaN it does.
    norms = torch.where(squares == 0, 0, torch.where(squares == 0, 1, squares).sqrt())
    return ((norms - target) ** 2).mean(), norms.detach()


torch.library.register_fake("gan_kernels::penalty", _norm_penalty)
torch.library.register_fake("gan_kernels::penalty_backward", lambda _, g, *rest: g.clone())


def _check_scores(scores, x):
    """Raise where the critic's answer is not one score a row, saying what to do."""
    if isinstance(scores, torch.Tensor) and scores.shape in [(len(x),), (len(x), 1)]:
        return
    message = "gradient_penalty: critic must return one score a row"
    if not isinstance(scores, torch.Tensor):
        raise ValueError(
            f"{message}, not {type(scores).__name__}: choose it, as in lambda x: critic(x)[0]"
        )
    message += f", not {tuple(scores.shape)} for {len(x)} rows"
    if scores.dim() > 0 and len(scores) == len(x):
        message += ": of several scores take the mean, as in lambda x: critic(x).flatten(1).mean(1)"
    elif scores.dim() > 0 and 0 < len(scores) < len(x) and len(x) % len(scores) == 0:
        message += ": a critic of packed rows needs x packed already, a pack a row"
    raise ValueError(message)


# Critics that had nothing worth rewriting: the shape of x and how often they ran plainly since;
# None once something was rewritten.
_unchanged = weakref.WeakKeyDictionary()


def _known(critic):
    """Return what critics that are the same from call to call share, and can be remembered by."""
    # A lambda is made anew, its code is not. A module that is asked for one takes its time.
    module = isinstance(critic, torch.nn.Module)
    known = critic if module else getattr(critic, "__code__", critic)
    try:
        hash(known), weakref.ref(known)
    except TypeError:
        return type(known)
    return known


def _runs_plainly(critic, x):
    """Whether the critic had nothing worth rewriting; now and then it is looked at again."""
    seen = _unchanged.get(critic)
    if seen is None or seen[0] != x.shape or seen[1] >= 100:
        return False
    seen[1] += 1
    return True


_EAGER, _NOTHING = eval_frame.DynamoStance("force_eager"), contextlib.nullcontext()


class _TwiceDifferentiable:
    """While a thread is inside, compiled code runs as it was written, and attention unfused.

    Neither could be differentiated twice. Both are settings of the whole process: the last thread
    to leave restores what the first one found. Set by hand, without contexts, which take time.
    """

    def __init__(self):
        self.lock, self.inside = threading.Lock(), 0

    def __enter__(self):
        with self.lock:
            if self.inside == 0:
                self.stance, eval_frame._stance = eval_frame._stance, _EAGER
                self.found = (
                    _C._get_flash_sdp_enabled(),
                    _C._get_mem_efficient_sdp_enabled(),
                    _C._get_cudnn_sdp_enabled(),
                    _C._get_math_sdp_enabled(),
                )
                self.allow(False, False, False, True)
            self.inside += 1

    def __exit__(self, *_):
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.allow(*self.found)
                eval_frame._stance = self.stance

    @staticmethod
    def allow(flash, memory_efficient, cudnn, math):
        # What torch.backends.cuda wraps; they count on a CPU, too.
        _C._set_sdp_use_flash(flash)
        _C._set_sdp_use_mem_efficient(memory_efficient)
        _C._set_sdp_use_cudnn(cudnn)
        _C._set_sdp_use_math(math)


_twice_differentiable = _TwiceDifferentiable()


def _eager_penalty(critic, x, target):
    """Return (penalty, norms), where the kernels can not compute by plain double backward."""
    twice, fused = torch.is_grad_enabled(), usable(x)
    known, rewriting, gradient, silent = _known(critic), None, None, []
    grad = _NOTHING if twice else torch.enable_grad()
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else grad:
        x = (x.clone() if x.is_inference() else x).detach().requires_grad_()
        if fused and not _runs_plainly(known, x):
            rewriting = Rewriting(Asked(x))
        with _twice_differentiable, rewriting or _NOTHING:
            scores = critic(x)
        _check_scores(scores, x)
        if rewriting is not None:
            if _unchanged.get(known, ()) is not None:
                _unchanged[known] = None if rewriting.changed else [x.shape, 0]
            rewriting.asked.first_pass = True
        if scores.requires_grad:
            (gradient,) = torch.autograd.grad(
                scores, x, torch.ones_like(scores), create_graph=twice, allow_unused=True
            )
    if gradient is None:
        raise ValueError("gradient_penalty: the critic's scores do not depend on x")
    if not fused:
        return _norm_penalty(gradient, target)
    if rewriting is not None:
        rewriting.asked.first_pass = False
        if twice and (rewriting.silenced or rewriting.biased):
            silent = _silent_parameters(scores, x, rewriting)
    return _Penalty.apply(gradient, target, *silent)


_uncompiled_penalty = torch.compiler.disable(_eager_penalty)


def gradient_penalty(critic, x, *, target=1.0, return_norms=False):
    """Return the mean over the batch of (|d critic(x) / dx|_2 - target)^2.

    On points between real and fake samples with target 1 it is WGAN-GP's penalty (Gulrajani et al.
    2017, eq. 3); on real or fake samples with target 0 it is R1 or R2 (Mescheder et al. 2018, eq. 9
    and 10, without the factor gamma / 2). Differentiable in the critic's parameters, to any order,
    with the gradients of plain double backward: the critic is run once, with its convolutions,
    normalisations, piecewise-linear activations and pooling rewritten while it runs so that the
    second pass does no wasted work. Anything else goes through plain autograd: operations too small
    to pay, transforms of torch.func, checkpointed regions, and whole critics in which nothing pays.

    A row whose gradient is exactly zero adds target^2 and a zero gradient. On a GPU that the
    kernels were not built for, plain double backward computes it, and a warning says so once.

    Inside torch.compile the penalty itself runs uncompiled, as it does for a compiled critic. While
    the critic runs, other threads' compiled code runs uncompiled, too, and their attention unfused;
    they must not enter or leave sdpa_kernel or set_stance meanwhile, which would keep it so.
    The tensor that the critic is given is of use while it runs: its gradient is not whole later.

    Args:
        critic: a callable from (batch, ...) to one score a row, (batch,) or (batch, 1); each score
            may depend on its own row alone, or the penalty is that of the sum of the scores.
        x: where to take the gradient, (batch, ...), floating point; detached.
        target: the norm that costs nothing.
        return_norms: also return the norms.

    Returns:
        The penalty, a scalar; with return_norms a pair of it and the norms, (batch,), detached.
        Both are float64 if x is, otherwise float32. Inside torch.no_grad the penalty is a number
        without a graph.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: x has an empty batch, or the scores have another shape or do not depend on x.
        RuntimeError: inside a transform of torch.func, or where plain double backward raises it.
    """
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(
            "gradient_penalty: x must be a floating-point tensor; for a critic of several inputs, "
            "close over the others, as in lambda x: critic(x, label)"
        )
    if x.dim() == 0 or len(x) == 0:
        raise ValueError("gradient_penalty: x has an empty batch")
    compute = _uncompiled_penalty if torch.compiler.is_compiling() else _eager_penalty
    penalty, norms = compute(critic, x, float(target))
    return (penalty, norms) if return_norms else penalty
