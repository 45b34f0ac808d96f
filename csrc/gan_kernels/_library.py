"""Loads the compiled libraries."""

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
