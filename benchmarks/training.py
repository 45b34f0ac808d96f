"""Speed of one whole training update, beside the machine's own matrix-product rate in the same run.

    python benchmarks/training.py        # prints the table, writes benchmarks/training-<device>.md

The floating-point operations of an update are counted from the shapes of its matrix products and
convolutions (torch.utils.flop_counter); the machine's rate is that of a float32 product of two
2048 x 2048 matrices. All times are medians of repeats taken in turn, so that a change of the
machine's speed falls on all alike. On a GPU every update is timed as single operations, as a
captured graph, and as a graph of compiled networks; the profiler counts its kernels and the share
of time they run.
"""

import sys
from pathlib import Path

import torch
from timing import machine, medians
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import cgan  # noqa: E402
import infogan  # noqa: E402
import wgan_gp  # noqa: E402

MATRIX, SECONDS = 2048, 40
# script, kernels: its update with default arguments on 28 x 28 grey images
ROWS = [
    (infogan, "fused"),
    (cgan, "reference"),
    (wgan_gp, "fused"),
    (wgan_gp, "reference"),
    (wgan_gp, "floor"),
]
GPU_MODES = ("single operations", "graph", "graph, compiled")


class Operations(TorchDispatchMode):
    """Counts floating-point operations; FlopCounterMode itself fails on a second derivative."""

    total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if count := flop_registry.get(operation._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def whole_update(script, kernels, mode, device):
    """A script's default update on random images: the function, and its images."""
    flags = ["--kernels", kernels.replace("floor", "reference")]
    args = script.arguments().parse_args(flags + ["--no-graph"] * (mode == GPU_MODES[0]))
    torch.manual_seed(0)
    images = torch.randint(256, (1280, 1, 28, 28), dtype=torch.uint8, device=device)
    labels = torch.arange(1280, device=device) % 10
    data = script.Data("random", [*map(str, range(10))], images, labels, images, labels)
    model = script.Model(args, data, device)
    if kernels == "floor":
        model.gradient_penalty = floor
    for part in model.parts.values():
        if mode == GPU_MODES[2] and isinstance(part, torch.nn.Module):
            part.compile()
    index = torch.randperm(1280, device=device)[: model.images_per_step]
    take_step = script.stepper(model, data)
    return lambda: take_step(index), model.images_per_step


def kernels_of(update, seconds):
    """How many kernels an update on a GPU launches, and the share of its time that they run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        update()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(events), sum(event.device_time for event in events) / 1e6 / seconds


def floor(critic, x):
    """As much work as an exact penalty of a piecewise-linear critic can not do without.

    That is a forward pass, and a forward and backward pass.
    """
    with torch.no_grad():
        critic(x)
    return critic(x.detach().requires_grad_()).mean()


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    infogan.keep_memory()
    a, b = torch.randn(2, MATRIX, MATRIX, device=device)
    updates, images, operations = {}, {}, {}
    for script, kernels in ROWS:
        with Operations() as counter:
            whole_update(script, kernels, GPU_MODES[0], device)[0]()
        for mode in GPU_MODES if on_gpu else GPU_MODES[:1]:
            row = script, kernels, mode
            updates[row], images[row] = whole_update(*row, device)
            for _ in range(5):  # a graph is captured in the fourth
                updates[row]()
            operations[row] = counter.total
    times = medians(updates | {"product": lambda: a @ b}, device.type, SECONDS)
    peak = 2 * MATRIX**3 / times["product"]
    gpu_columns = ["as", "kernels launched", "GPU busy"] if on_gpu else []
    columns = ["script", "kernels", "ms an update", "images/s", "GFLOP an update", "GFLOP/s"]
    columns += ["share", "reference / this", *gpu_columns]
    lines = [
        f"{machine(device.type)}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, "
        f"float32; matrix products at {peak / 1e9:.0f} GFLOP/s",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for row in updates:
        (script, kernels, mode), time, rate = row, times[row], operations[row] / times[row]
        reference = times.get((script, "reference", mode)) if script is wgan_gp else None
        cells = [f"{script.SCRIPT}.py", kernels, f"{time * 1e3:.3g}", f"{images[row] / time:.0f}"]
        cells += [f"{operations[row] / 1e9:.1f}", f"{rate / 1e9:.0f}", f"{rate / peak:.2f}"]
        cells.append(f"{reference / time:.2f}" if reference else "")
        if on_gpu:
            launched, busy = kernels_of(updates[row], time)
            cells += [mode, str(launched), f"{busy:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "An update of `wgan_gp.py` is five of the critic and one of the generator. Its row `floor` "
        "has, instead of the penalty, the least work that an exact one needs, a forward pass and a "
        "forward and backward pass: no kernel can be more times faster than the reference.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_name(f"training-{device.type}.md").write_text(text)


if __name__ == "__main__":
    main()
