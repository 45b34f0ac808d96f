"""Speed of one whole training update, beside the machine's own matrix-product rate in the same run.

    python benchmarks/training.py        # prints the table and writes it to benchmarks/training.md

The floating-point operations of an update are counted from the shapes of its matrix products and
convolutions (torch.utils.flop_counter); the machine's rate is that of a float32 product of two
2048 x 2048 matrices. All times are medians of repeats taken in turn, so that a change of the machine's
speed falls on all alike.
"""

import platform
import sys
from pathlib import Path

import torch
from timing import medians
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import infogan  # noqa: E402
import wgan_gp  # noqa: E402

MATRIX, SECONDS = 2048, 40
# script, kernels: its update with default arguments on 28 x 28 grey images
ROWS = [
    (infogan, "fused"),
    (wgan_gp, "fused"),
    (wgan_gp, "reference"),
    (wgan_gp, "floor"),
]


class Operations(TorchDispatchMode):
    """Counts floating-point operations; FlopCounterMode itself fails on a second derivative."""

    total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if count := flop_registry.get(operation._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def whole_update(script, kernels, device):
    """A script's default update on random images: the function, and its images."""
    args = script.arguments().parse_args(["--kernels", kernels.replace("floor", "reference")])
    torch.manual_seed(0)
    images = torch.randint(256, (1280, 1, 28, 28), dtype=torch.uint8, device=device)
    labels = torch.zeros(1280, dtype=torch.int64, device=device)
    data = script.Data("random", [], images, labels, images, labels)
    model = script.Model(args, data, device)
    if kernels == "floor":
        model.gradient_penalty = floor
    index = torch.randperm(1280, device=device)[: model.images_per_step]
    return lambda: script.train_step(model, data, index), model.images_per_step


def floor(critic, x):
    """As much work as an exact penalty of a piecewise-linear critic can not do without.

    That is a forward pass, and a forward and backward pass.
    """
    with torch.no_grad():
        critic(x)
    return critic(x.detach().requires_grad_()).mean()


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    infogan.keep_memory()
    a, b = torch.randn(2, MATRIX, MATRIX, device=device)
    updates, images, operations = {}, {}, {}
    for row in ROWS:
        updates[row], images[row] = whole_update(*row, device)
        with Operations() as counter:
            updates[row]()
        operations[row] = counter.total
    times = medians(updates | {"product": lambda: a @ b}, device.type, SECONDS)
    peak = 2 * MATRIX**3 / times["product"]
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    lines = [
        f"{name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, float32; "
        f"matrix products at {peak / 1e9:.0f} GFLOP/s",
        "",
        "| script | kernels | ms an update | images/s | GFLOP an update | GFLOP/s | share | reference / this |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        (script, kernels), time, rate = row, times[row], operations[row] / times[row]
        reference = times.get((script, "reference"))
        lines.append(
            f"| {script.SCRIPT}.py | {kernels} | {time * 1e3:.0f} | {images[row] / time:.0f} "
            f"| {operations[row] / 1e9:.1f} | {rate / 1e9:.0f} | {rate / peak:.2f} "
            f"| {f'{reference / time:.2f}' if reference else ''} |"
        )
    lines += [
        "",
        "An update of `wgan_gp.py` is five of the critic and one of the generator. Its row `floor` has, "
        "instead of the penalty, the least work that an exact one needs, a forward pass and a forward "
        "and backward pass: no kernel can be more times faster than the reference.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
