"""Loads the compiled libraries."""

import functools
import warnings
from pathlib import Path

import torch


def _find(name):
    """Return the path of the compiled library called name beside this file, or None."""
    found = sorted(Path(__file__).parent.glob(f"{name}.*so")) or sorted(
        Path(__file__).parent.glob(f"{name}.pyd")
    )
    return found[0] if found else None


_cpu, _cuda = _find("_cpu"), _find("_cuda")
if _cpu is None:
    raise ImportError(f"gan_kernels is not built: no compiled library in {Path(__file__).parent}")
torch.ops.load_library(_cpu)
# The CUDA library needs libtorch_cuda, which a CPU build of PyTorch does not have.
has_cuda = _cuda is not None and torch.version.cuda is not None
if has_cuda:
    torch.ops.load_library(_cuda)

ops = torch.ops.gan_kernels


def build_info():
    """Return in one line what was built: compilers, instruction set in use, CUDA architectures."""
    cpu = ops.cpu_build()
    if has_cuda:
        return f"gan_kernels: {cpu}; {ops.cuda_build()}"
    if _cuda is not None:
        return f"gan_kernels: {cpu}; CUDA built, but this PyTorch has none"
    return f"gan_kernels: {cpu}; no CUDA"


def usable(tensor):
    """Whether the kernels can compute where the tensor is; a warning says, once, where not."""
    return not getattr(tensor, "is_cuda", False) or _usable_on_gpu(tensor.device.index)


@torch.compiler.assume_constant_result  # torch.compile asks while it traces, and keeps the answer
def _usable_on_gpu(index):
    return _tried_on_gpu(index)


@functools.cache
def _tried_on_gpu(index):
    problem = "it was built without CUDA, or this PyTorch has none"
    if has_cuda:
        try:  # a GPU that the library was not built for shows at the first kernel
            ops.penalty(torch.ones(1, 1, device=torch.device("cuda", index)), 1.0)
            torch.cuda.synchronize(index)
            return True
        except RuntimeError as error:
            problem = str(error).partition("\n")[0]
    warnings.warn(f"gan_kernels computes in plain PyTorch on this GPU: {problem}", stacklevel=5)
    return False
