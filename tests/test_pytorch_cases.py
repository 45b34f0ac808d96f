"""gradient_penalty on PyTorch's own cases: its tables of modules and of operators as critics.

Each entry of module_db and op_db in torch.testing._internal has the inputs that PyTorch tests it
on. CASES=1 (make cases) takes all of them, otherwise a few of each entry.
"""

import copy
import itertools
import os
import re
import sys
import unittest
import warnings
from types import SimpleNamespace

import pytest
import torch
from gan_kernels import _convolution, _norm, _rewriting, gradient_penalty
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

ALL = os.environ.get("CASES") == "1"
REWRITTEN = re.compile("conv|relu|hardtanh|pool|pad|linear$|(layer|batch|group|instance)_?norm")


@pytest.fixture(autouse=True)
def rewrite_all(monkeypatch):
    """The cases are small, and operations of any size are to be rewritten."""
    for module in (_convolution, _norm, _rewriting):
        monkeypatch.setattr(module, "LEAST", 0)


@pytest.fixture(scope="module")
def tables():
    """Import the tables without what importing them changes for other tests."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        try:
            import expecttest  # noqa: F401
        except ImportError:  # of it the tables need one name, and use nothing
            patch.setitem(sys.modules, "expecttest", SimpleNamespace(TestCase=unittest.TestCase))
        try:
            from torch.testing._internal.common_methods_invocations import op_db
            from torch.testing._internal.common_modules import module_db
        except ImportError as error:
            pytest.skip(f"torch.testing._internal does not import: {error}")
    return {"modules": module_db, "operators": op_db}


def module_cases(entry):
    for training in (True, False):
        for case in entry.module_inputs_func(
            entry, device="cpu", dtype=torch.float64, requires_grad=True, training=training
        ):
            made, given = case.constructor_input, case.forward_input
            module = entry.module_cls(*made.args, **made.kwargs).double().train(training)
            yield module, given.args, given.kwargs


def operator_cases(entry):
    if entry.supports_autograd and entry.supports_dtype(torch.float64, "cpu"):
        for sample in entry.sample_inputs("cpu", torch.float64, requires_grad=True):
            yield entry.op, (sample.input, *sample.args), sample.kwargs


def cases_of(entry):
    """Yield (function, args, kwargs), all of the entry's or a few, more where we do the work."""
    torch.manual_seed(0)
    cases = (module_cases if hasattr(entry, "module_cls") else operator_cases)(entry)
    if ALL:
        return cases
    if REWRITTEN.search(entry.formatted_name.lower()):
        cases = list(cases)
        return cases[:: len(cases) // 12 + 1]
    return itertools.islice(cases, 2)


def total(outputs):
    """Return a sum over all that can be differentiated, curved in each number and never flat."""
    result = 0
    for y in tree_flatten(outputs)[0]:
        if isinstance(y, torch.Tensor) and y.requires_grad:
            y = (torch.view_as_real(y.resolve_conj()) if y.is_complex() else y).reshape(-1)
            result = result + (torch.linspace(1, 2, len(y)).to(y) * (1 + y * y).sqrt()).sum()
    return result


def penalty_and_gradients(penalty, function, args, kwargs):
    """Return [penalty, its gradients] with function as the critic; None where nothing can be x.

    The first tensor that requires grad is x, the others are parameters, as is a factor of x. Each
    row of x has the same share of the sum over all of the output as its score.
    """
    leaves, form = tree_flatten((args, kwargs))
    places = [i for i, t in enumerate(leaves) if isinstance(t, torch.Tensor) and t.requires_grad]
    if not places or leaves[places[0]].numel() == 0:
        return None
    # the function may change its tensors
    function = copy.deepcopy(function) if isinstance(function, nn.Module) else function
    leaves = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in leaves]
    x = leaves[places[0]]
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    parameters = [factor, *(leaves[i].requires_grad_() for i in places[1:])]
    parameters += function.parameters() if isinstance(function, nn.Module) else []

    def critic(rows):
        leaves[places[0]] = rows.reshape(x.shape) * factor
        args, kwargs = tree_unflatten(leaves, form)
        return (total(function(*args, **kwargs)) / len(rows)).expand(len(rows))

    torch.manual_seed(0)
    value = penalty(critic, x if x.dim() else x.reshape(1))
    return [value, *torch.autograd.grad(value, parameters, allow_unused=True)]


def plain_penalty(critic, x):
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    squares = g.reshape(len(g), -1).square().sum(1)
    norms = torch.where(squares == 0, 0, torch.where(squares == 0, 1, squares).sqrt())
    return ((norms - 1) ** 2).mean()


def disagreement(got, want):
    """Say where two [penalty, gradients] differ by more than 1e-8 of their length, or None."""
    lengths = [0 if b is None else float(b.detach().nan_to_num(0, 0, 0).norm()) for b in want]
    # a gradient that cancels but for its rounding is held to a millionth of the penalty
    gradients = max(sum(lengths[1:]), 1e-6 * max(1, lengths[0]))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if (a is None) != (b is None):
            return f"number {i}: {a} for {b}"
        if b is not None:
            finite = b.isfinite()
            off = float((a - b).detach()[finite].norm()) / (gradients if i else max(1, lengths[0]))
            if not (torch.equal(a.isfinite(), finite) and off <= 1e-8):
                return f"number {i}: off by {off:.1e}"
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, entries, cases", [("modules", 100, 1500), ("operators", 500, 10_000)]
)
def test_agrees_with_plain_double_backward(name, entries, cases, tables, monkeypatch):
    """Wherever plain autograd has a second derivative."""
    # the usual one also writes down a stack trace for each kind of device that is not in use
    monkeypatch.setattr(torch, "manual_seed", torch.default_generator.manual_seed)
    # and the tables look through the whole stack, at each case, for the test that runs them
    for part in ("common_utils", "opinfo.core"):
        module = sys.modules[f"torch.testing._internal.{part}"]
        monkeypatch.setattr(module, "extract_test_fn", lambda: None, raising=False)
    counts, failures = {}, []
    for entry in tables[name]:
        for i, case in enumerate(cases_of(entry)):
            with sdpa_kernel(SDPBackend.MATH):
                try:
                    want = penalty_and_gradients(plain_penalty, *case)
                except (RuntimeError, NotImplementedError):
                    continue
                if want is None:
                    continue
                label = f"{entry.formatted_name} {i}"
                try:
                    wrong = disagreement(penalty_and_gradients(gradient_penalty, *case), want)
                except Exception as error:
                    wrong = repr(error)
            failures += [f"{label}, {wrong}"] if wrong else []
            counts[entry.formatted_name] = counts.get(entry.formatted_name, 0) + 1
    print(f"{sum(counts.values())} cases of {len(counts)} {name}")
    assert not failures, "\n".join([f"{len(failures)} failures", *failures[:20]])
    assert len(counts) >= entries and sum(counts.values()) >= (cases if ALL else entries)
