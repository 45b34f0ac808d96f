"""Loads the compiled libraries."""

import functools
import warnings
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes


def _find(name):
    """Return the path of the compiled library called name beside this file, or None."""
    return next(iter(sorted(Path(__file__).parent.glob(f"{name}.*so"))), None)


_cpu, _cuda = _find("_cpu"), _find("_cuda")
if _cpu is None:
    raise ImportError(f"gan_kernels is not built: no compiled library in {Path(__file__).parent}")
torch.ops.load_library(_cpu)
# The CUDA library needs libtorch_cuda, which a CPU build of PyTorch does not have.
has_cuda = _cuda is not None and torch.version.cuda is not None
if has_cuda:
    torch.ops.load_library(_cuda)

ops = torch.ops.gan_kernels


def sum_dtype(tensor):
    """Return the dtype in which a tensor's values are summed, and of the losses."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def build_info():
    """Return in one line what was built: compilers, instruction set in use, CUDA architectures."""
    without = "no CUDA" if _cuda is None else "CUDA built, but this PyTorch has none"
    return f"gan_kernels: {ops.cpu_build()}; {ops.cuda_build() if has_cuda else without}"


def usable(tensor):
    """Whether the kernels can compute where the tensor is; a warning says, once, where not."""
    device = getattr(tensor, "device", None)  # the operators say what is no tensor
    return device is None or device.type == "cpu" or _usable_on(device)


@torch.compiler.assume_constant_result  # torch.compile asks while it traces, and keeps the answer
def _usable_on(device):
    return _tried_on(device)


@functools.cache
def _tried_on(device):
    if device.type == "meta":
        return False
    problem = "it was built without CUDA, or this PyTorch has none"
    if device.type != "cuda":
        problem = f"it has no kernels for {device.type}"
    elif has_cuda:
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("gan_kernels: call it once before a CUDA graph is captured")
        try:  # a GPU that the library was not built for shows at the first kernel
            with _disable_current_modes():  # fake tensors and tracers know nothing of that
                ops.penalty(torch.ones(1, 1, device=device), 1.0)
                torch.cuda.synchronize(device)
            return True
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise  # which says nothing of the kernels
            problem = str(error).partition("\n")[0]
    warnings.warn(f"gan_kernels computes in plain PyTorch on this GPU: {problem}", stacklevel=5)
    return False
