"""The CUDA emulation sees faults: each is planted in a copy of the kernels, and must be caught."""

import ctypes
import re

import gan_kernels  # noqa: F401 (registers the CPU's operators)
import pytest
import torch
from emulation import SANITIZED, load, sources, watching

pytestmark = pytest.mark.skipif(SANITIZED, reason="the emulation's own checks are tested without")
BARRIER = "__syncthreads();"

# what is said, and the change: (file, text, what replaces it, which of its places)
INFO, PENALTY = "info_loss_cuda.cu", "penalty_cuda.cu"
CHANGES = {
    "a shuffle in divergent code": (
        "divergence", INFO, "maximum = group_max<width>(maximum);",
        "if (lane < size) maximum = group_max<width>(maximum);", 0),
    "a barrier in divergent code": (
        "divergence", INFO, BARRIER, "if (int(threadIdx.x) < rows) __syncthreads();", 0),
    "a barrier in two branches": (
        "divergence", PENALTY, "sum = block_sum(sum);",
        "if (threadIdx.x < 32) { __syncthreads(); } else { __syncthreads(); }", 0),
    "one category too far": ("values", INFO, "index < size", "index <= size", 0),
    "a negative category": ("bounds", INFO, "index >= 0", "true", 0),
    "one logit too far for the maximum": ("bounds", INFO, "c < size", "c <= size", 0),
    "one logit too far for the sum": ("values", INFO, "c < size", "c <= size", 1),
    "one column too far in a copy": (
        "bounds", INFO, "i < rows * columns", "i <= rows * columns", 0),
    "one element too far in a sum": ("bounds", PENALTY, "i < end", "i <= end", 0),
    "one element too far in a result": ("bounds", PENALTY, "i < end", "i <= end", 1),
    "a piece beyond its row": (
        "bounds", PENALTY, "min(size, begin + piece)", "(begin + piece)", 0),
    "one row too far": ("bounds", INFO, "row < batch", "row <= batch", 0),
    "a column's stride": ("values", "info_loss.h", "column * column_stride", "column", 0),
    "a row's stride": ("values", "info_loss.h", "row * row_stride", "row", 0),
    "a row's stride in shared memory": ("bounds", INFO, "r * pitch + c", "r * columns + c", 1),
    "a row's stride in a result": ("bounds", PENALTY, "row * out_stride", "row * piece", 0),
    "a grid's stride": ("race", PENALTY, "item += gridDim.x", "item += 1", 0),
    "every lane's loss": (
        "values", INFO, "if (lane != 0) categorical = continuous = 0;", "{}", 0),
    "too little shared memory": ("bounds", INFO, "size_t(bytes)", "size_t(bytes) / 2", 0),
    "too much shared memory": ("more than 48 KiB", INFO, "bytes <= shared_bytes", "true", 0),
    "the default stream": ("current stream", INFO, "current_stream(q)", "nullptr", 0),
    "another device's guard": (
        "guarded device", PENALTY, "gradient.get_device_index()", "0", 0),
    "a result that is added to": (
        "values", "norm_cuda.cu", "*group_weight = products", "*group_weight += products", 0),
    "an unchecked launch": ("not checked", PENALTY, "STD_CUDA_KERNEL_LAUNCH_CHECK();", "{}", 0),
    "an unchecked last launch": (
        "not checked", PENALTY, "STD_CUDA_KERNEL_LAUNCH_CHECK();", "{}", 2),
    "an empty grid": ("invalid grid", PENALTY, "grid_size(rows.items, 1)", "0", 0),
}  # fmt: skip
BOUNDS = "outside any tensor|holds nothing"
SAID = {"bounds": BOUNDS, "race": f"race|{BOUNDS}", "values": "not close|^assert"}
# Barriers that are not needed, as a thread reads and then writes the same values (file, which).
NOT_NEEDED = {("info_loss_cuda.cu", 4), ("norm_cuda.cu", 1)}


def faults():
    """Return {name: change}: those above, and every barrier left out."""
    barriers = {
        f"no barrier {n} in {name}": ("race", name, BARRIER, "{}", n)
        for name, text in sources().items()
        for n in range(text.count(BARRIER))
        if (name, n) not in NOT_NEEDED
    }
    return barriers | CHANGES


def planted_sources():
    """Return the sources with all faults in them, the one called `planted` in force.

    The grid is small in them, so that few rows make blocks take several turns.
    """
    texts = sources()
    texts["cuda.h"], count = re.subn(r"\b8192\b", "2", texts["cuda.h"])
    assert count == 1
    changes = {}
    for number, (_, file, old, new, n) in enumerate(faults().values(), start=1):
        places = [place.start() for place in re.finditer(re.escape(old), texts[file])]
        changes.setdefault((file, places[n], old), []).append((number, new))
    # from the end, so that places stay as they are
    for (file, place, old), variants in sorted(
        changes.items(), key=lambda c: c[0][1], reverse=True
    ):
        text = old
        for number, new in variants:
            if old.endswith(";"):
                text = f"if (planted == {number}) {{ {new} }} else {{ {text} }}"
            else:
                text = f"(planted == {number} ? ({new}) : ({text}))"
        texts[file] = texts[file][:place] + text + texts[file][place + len(old) :]
    return texts


@pytest.fixture(scope="module")
def library():
    return load("gan_kernels_planted", planted_sources())


@pytest.fixture
def copy(library):
    """Which fault of the copy is in force: none yet."""
    planted = ctypes.c_int.in_dll(library, "planted")
    with watching(library):
        yield planted
    planted.value = 0


def compute():
    """Compare the copy's operators with the CPU's, with rows for several turns of every loop."""
    torch.manual_seed(0)
    copied, ours = torch.ops.gan_kernels_planted, torch.ops.gan_kernels

    def compare(name, *arguments):
        got, want = (getattr(ops, name)(*arguments) for ops in (copied, ours))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        return got

    one = torch.ones(())
    for batch, sizes, n in ((700, [3, 5], 1), (21, [300, 5], 0)):  # narrow rows and wide ones
        q = torch.randn(sum(sizes) + 2 * n, batch).t()
        category = torch.stack([torch.randint(size, (batch,)) for size in sizes], 1)
        code = torch.rand(batch, n)
        compare("info_loss", q, category, code, sizes)
        compare("info_loss_backward", one, one, q, category, code, sizes)
        for wrong in (sizes[0], -1):
            category[2, 0] = wrong
            assert copied.info_loss(q, category, code, sizes)[0].isnan()
    for size in (50, 8200):  # a piece a row, and two
        g = torch.randn(5, size)
        _, norms = compare("penalty", g, 1.0)
        compare("penalty_backward", one, g, norms, 1.0)
    # layer norm, with a weight for each element; group norm, for each segment; batch norm
    for shape, groups, *layout in (
        ((5, 700), 5, 1, 1, False), ((5, 6, 50), 10, 2, 3, False), ((4, 5, 50), 5, 5, 4, True)
    ):  # fmt: skip
        h, g, x = torch.randn(3, *shape)
        weight = torch.rand(700 if len(shape) == 2 else shape[1])
        mean, rstd = torch.randn(groups), torch.rand(groups) + 0.5
        compare("norm_double_backward", h, g, x, mean, rstd, weight, *layout)


def test_no_fault(copy):
    compute()


@pytest.mark.parametrize("name", faults())
def test_a_planted_fault_is_caught(name, copy):
    copy.value = 1 + list(faults()).index(name)
    said = faults()[name][0]
    with pytest.raises((AssertionError, RuntimeError), match=SAID.get(said, said)):
        compute()
