"""The CUDA emulation sees faults: each is planted in a copy of the kernels, and must be caught."""

import functools
import re

import gan_kernels  # noqa: F401 (registers the CPU's operators)
import pytest
import torch
from emulation import SANITIZED, load, sources, watching

pytestmark = pytest.mark.skipif(SANITIZED, reason="the emulation's own checks are tested without")
BARRIER = "__syncthreads();"

# (file, text, what replaces it, which of its places); a statement ends in ";" or "}"
CHANGES = {
    "a shuffle in divergent code": (
        "info_loss_cuda.cu", "maximum = group_max<width>(maximum);",
        "if (lane < size) maximum = group_max<width>(maximum);", 0),
    "a barrier in divergent code": (
        "info_loss_cuda.cu", BARRIER, "if (int(threadIdx.x) < rows) __syncthreads();", 0),
    "a barrier in two branches": (
        "penalty_cuda.cu", "sum = block_sum(sum);",
        "if (threadIdx.x < 32) { __syncthreads(); } else { __syncthreads(); }", 0),
    "one category too far": ("info_loss_cuda.cu", "index < size", "index <= size", 0),
    "a negative category": ("info_loss_cuda.cu", "index >= 0", "true", 0),
    "one logit too far": ("info_loss_cuda.cu", "c < size", "c <= size", 0),
    "one column too far in a copy": (
        "info_loss_cuda.cu", "i < rows * columns", "i <= rows * columns", 0),
    "one element too far in a sum": ("penalty_cuda.cu", "i < end", "i <= end", 0),
    "one element too far in a result": ("penalty_cuda.cu", "i < end", "i <= end", 1),
    "a piece beyond its row": (
        "penalty_cuda.cu", "min(size, begin + piece)", "(begin + piece)", 0),
    "one row too far": ("info_loss_cuda.cu", "row < batch", "row <= batch", 0),
    "a column's stride": ("info_loss_cuda.cu", "column * column_stride", "column", 0),
    "a row's stride": ("info_loss_cuda.cu", "row * row_stride", "row", 0),
    "a row's stride in shared memory": ("info_loss_cuda.cu", "r * pitch + c", "r * columns + c", 1),
    "a row's stride in a result": ("penalty_cuda.cu", "row * out_stride", "row * piece", 0),
    "a grid's stride": ("penalty_cuda.cu", "item += gridDim.x", "item += 1", 0),
    "every lane's loss": (
        "info_loss_cuda.cu", "if (lane != 0) categorical = continuous = 0;", "{}", 0),
    "too little shared memory": (
        "info_loss_cuda.cu", "size_t(bytes) :", "size_t(bytes) / 2 :", 0),
    "too much shared memory": ("info_loss_cuda.cu", "bytes <= shared_bytes", "true", 0),
    "the default stream": ("info_loss_cuda.cu", "launch.shared, stream", "launch.shared, nullptr", 0),
    "an unchecked launch": ("penalty_cuda.cu", "STD_CUDA_KERNEL_LAUNCH_CHECK();", "{}", 0),
    "an empty grid": ("penalty_cuda.cu", "grid_size(rows.items, 1)", "0", 0),
}  # fmt: skip
# Barriers that are not needed, as a thread reads and then writes the same values (file, which).
NOT_NEEDED = {("info_loss_cuda.cu", 4), ("layer_norm_cuda.cu", 1)}


def faults():
    """Return {name: change}: those above, and every barrier left out."""
    barriers = {
        f"no barrier {n} in {name}": (name, BARRIER, "{}", n)
        for name, text in sources().items()
        for n in range(text.count(BARRIER))
        if (name, n) not in NOT_NEEDED
    }
    return barriers | CHANGES


@functools.cache
def planted_sources():
    """Return the sources with all faults in them, the one called `planted` in force.

    The grid is small in them, so that few rows make blocks take several turns.
    """
    texts = sources()
    texts["cuda.h"], count = re.subn(r"\b8192\b", "2", texts["cuda.h"])
    assert count == 1
    changes = {}
    for number, (file, old, new, n) in enumerate(faults().values(), start=1):
        places = [place.start() for place in re.finditer(re.escape(old), texts[file])]
        changes.setdefault((file, places[n], old), []).append((number, new))
    # from the end, so that places stay as they are
    for (file, place, old), variants in sorted(changes.items(), key=lambda c: c[0][1], reverse=True):
        text = old
        for number, new in variants:
            if old.endswith(";"):
                text = f"if (planted == {number}) {{ {new} }} else {{ {text} }}"
            else:
                text = f"(planted == {number} ? ({new}) : ({text}))"
        texts[file] = texts[file][:place] + text + texts[file][place + len(old) :]
    return texts
