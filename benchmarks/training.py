"""Speed of one whole training update, beside the machine's own matrix-product rate in the same run.

    python benchmarks/training.py        # prints the table, writes benchmarks/training-<device>.md
    python benchmarks/training.py --against ../other   # and another checkout's scripts, in turn
    python benchmarks/training.py --smoke              # three repeats, nothing written

The floating-point operations of an update are counted from the shapes of its matrix products and
convolutions (torch.utils.flop_counter); the machine's rate is that of a float32 product of two
2048 x 2048 matrices. All times are medians of repeats taken in turn, so that a change of the
machine's speed falls on all alike. Another checkout's scripts run with the gan_kernels installed
here; those that it lacks are left out. On a GPU every update is timed as single operations, as a
captured graph, and as a graph of compiled networks; the profiler counts its kernels and the share
of time they run.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from timing import machine, medians
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parent.parent
MATRIX, SECONDS = 2048, 40
# script, kernels: its update with default arguments on 28 x 28 grey images, pix2pix.py's on a pair
# of 256 x 256 in colour
ROWS = [
    ("infogan", "fused"),
    ("gan", "reference"),
    ("cgan", "reference"),
    ("dcgan", "reference"),
    ("pix2pix", "reference"),
    ("wgan_gp", "fused"),
    ("wgan_gp", "reference"),
    ("wgan_gp", "floor"),
    ("oversampling", "fused"),
    ("oversampling", "reference"),
]
PENALISED = ("wgan_gp", "oversampling")
GPU_MODES = ("single operations", "graph", "graph, compiled")


class Operations(TorchDispatchMode):
    """Counts floating-point operations; FlopCounterMode itself fails on a second derivative."""

    total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if count := flop_registry.get(operation._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def load_script(folder, name):
    """A script of a checkout, under a name that leaves room for the same script of another."""
    spec = importlib.util.spec_from_file_location(f"{folder.name}.{name}", folder / f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def whole_update(script, kernels, mode, images):
    """A script's default update on these images: the function, and how many of them it takes."""
    flags = ["--kernels", kernels.replace("floor", "reference")]
    args = script.arguments().parse_args(flags + ["--no-graph"] * (mode == GPU_MODES[0]))
    torch.manual_seed(0)
    labels = torch.arange(len(images), device=images.device) % 10
    if script.SCRIPT == "pix2pix":
        pairs = torch.randint(256, (2, 6, 256, 256), dtype=torch.uint8, device=images.device)
        about = {"input": 3, "output": 3, "swapped": False, "colour": False, "labels": ""}
        images = torch.full((2, 2), 256, device=images.device)  # their sides
        data = script.Data("random", about, images, pairs, pairs)
    else:
        data = script.Data("random", [*map(str, range(10))], images, labels, images, labels)
    if hasattr(script, "suit"):
        script.suit(args, data)
        model = script.Model(args, data)
        update = script.stepper(args, model, images.device)

        def step(index):
            return update(*model.batch(data, index))

    else:  # the versions up to 23 November 2026
        model = script.Model(args, data, images.device)
        step = script.stepper(model, data)
    if kernels == "floor":
        model.gradient_penalty = floor
    for name in ("generator", "discriminator", "critic"):
        if mode == GPU_MODES[2] and hasattr(model, name):
            getattr(model, name).compile()
    older = not hasattr(model, "samples_per_step")  # the versions up to 25 November 2026
    taken = model.images_per_step if older else model.samples_per_step
    index = torch.randperm(len(images), device=images.device)[:taken]
    return lambda: step(index), taken


def update_on_files(name, flags, device):
    """A script's update with these flags, as a function of nothing; its data are read before."""
    script = load_script(ROOT, name)
    args = script.arguments().parse_args(flags)
    data = script.load_data(args, device)
    script.suit(args, data)
    model = script.Model(args, data)
    step, size = script.stepper(args, model, device), (model.samples_per_step,)
    return lambda: step(*model.batch(data, torch.randint(len(data.train), size, device=device)))


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
    parser = argparse.ArgumentParser()
    parser.add_argument("--against", type=Path, metavar="DIR", help="a checkout to time beside it")
    parser.add_argument("--smoke", action="store_true", help="three repeats, nothing written")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    a, b = torch.randn(2, MATRIX, MATRIX, device=device)
    # as many as MNIST has, since some defaults follow from their number
    images = torch.randint(256, (60_000, 1, 28, 28), dtype=torch.uint8, device=device)
    versions = {"this": ROOT} | ({"against": args.against.resolve()} if args.against else {})
    updates, taken, operations = {}, {}, {}
    for name, kernels in ROWS:
        for version, folder in versions.items():
            if not (folder / f"{name}.py").exists():
                continue
            script = load_script(folder, name)
            with Operations() as counter:
                whole_update(script, kernels, GPU_MODES[0], images)[0]()
            for mode in GPU_MODES if on_gpu else GPU_MODES[:1]:
                row = version, name, kernels, mode
                updates[row], taken[row] = whole_update(script, kernels, mode, images)
                for _ in range(5):  # a graph is captured in the fourth
                    updates[row]()
                operations[row] = counter.total
    seconds = 0 if args.smoke else SECONDS * len(versions)
    times = medians(updates | {"product": lambda: a @ b}, device.type, seconds)
    peak = 2 * MATRIX**3 / times["product"]
    gpu_columns = ["as", "kernels launched", "GPU busy"] if on_gpu else []
    columns = ["script", "kernels", "ms an update", "images/s", "GFLOP an update", "GFLOP/s"]
    columns += ["share", "reference / this", *gpu_columns]
    columns += ["version", "against / this"] if args.against else []
    lines = [
        f"{machine(device.type)}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, "
        f"float32; matrix products at {peak / 1e9:.0f} GFLOP/s",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for row in updates:
        (version, name, kernels, mode), time = row, times[row]
        rate, reference = operations[row] / time, times.get((version, name, "reference", mode))
        cells = [f"{name}.py", kernels, f"{time * 1e3:.3g}", f"{taken[row] / time:.0f}"]
        cells += [f"{operations[row] / 1e9:.1f}", f"{rate / 1e9:.0f}", f"{rate / peak:.2f}"]
        cells.append(f"{reference / time:.2f}" if reference and name in PENALISED else "")
        if on_gpu:
            launched, busy = kernels_of(updates[row], time)
            cells += [mode, str(launched), f"{busy:.2f}"]
        if args.against:
            other = times.get(("against", name, kernels, mode))
            cells += [version, f"{other / time:.2f}" if other and version == "this" else ""]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "An update of `wgan_gp.py` is five of the critic and one of the generator. Its row `floor` "
        "has, instead of the penalty, the least work that an exact one needs, a forward pass and a "
        "forward and backward pass: no kernel can be more times faster than the reference.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if not args.smoke:
        Path(__file__).with_name(f"training-{device.type}.md").write_text(text)


if __name__ == "__main__":
    main()
