"""Speed of one training update, beside the machine's own matrix-product rate in the same run.

    python benchmarks/training.py        # prints the table and writes it to benchmarks/training.md

The floating-point operations of an update are counted from the shapes of its matrix products and
convolutions (torch.utils.flop_counter); the machine's rate is that of a float32 product of two
2048 x 2048 matrices. Both are medians of repeats taken in turn, so that a change of the machine's
speed falls on both alike.
"""

import platform
import sys
from pathlib import Path

import torch
from timing import medians
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import infogan  # noqa: E402

MATRIX, SECONDS = 2048, 10


def infogan_update(device):
    """InfoGAN's default update on random images: the function, and its images."""
    args = infogan.arguments().parse_args([])
    torch.manual_seed(0)
    images = torch.randint(256, (1280, 1, 28, 28), dtype=torch.uint8, device=device)
    labels = torch.zeros(1280, dtype=torch.int64, device=device)
    data = infogan.Data("random", [], images, labels, images, labels)
    model = infogan.Model(args, data, device)
    index = torch.randperm(1280, device=device)[: args.batch_size]
    return lambda: infogan.train_step(model, data, index), args.batch_size, model.kernels


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    infogan.keep_memory()
    a, b = torch.randn(2, MATRIX, MATRIX, device=device)
    update, images, kernels = infogan_update(device)
    counter = FlopCounterMode(display=False)
    with counter:
        update()
    for _ in range(3):
        update()
    times = medians({"update": update, "product": lambda: a @ b}, device.type, SECONDS)
    update_time, product_time = times["update"], times["product"]
    rate = counter.get_total_flops() / update_time
    peak = 2 * MATRIX**3 / product_time
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    lines = [
        f"{name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, float32",
        "",
        "| script | kernels | ms an update | images/s | GFLOP an update | GFLOP/s | machine's GFLOP/s | share |",
        "|---|---|---|---|---|---|---|---|",
        f"| infogan.py, batch {images} | {kernels} | {update_time * 1e3:.0f} "
        f"| {images / update_time:.0f} | {rate * update_time / 1e9:.1f} | {rate / 1e9:.0f} "
        f"| {peak / 1e9:.0f} | {rate / peak:.2f} |",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
