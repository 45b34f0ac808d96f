"""Time of a training update against the number of processes that share its batch.

    python benchmarks/processes.py 1 2   # prints the table, writes benchmarks/processes-<device>.md

torchrun starts this file again for each measurement: random MNIST-like images, the scripts' own
batch sizes, one thread a process on a CPU or a GPU a process. Different numbers of processes take
turns.
"""

import importlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from timing import machine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# the batch, which the numbers must divide
SCRIPTS = {"infogan": 128, "gan": 100, "cgan": 128, "dcgan": 128, "wgan_gp": 48}
SCRIPTS |= {"oversampling": 32}
WARM, UPDATES, ROUNDS = 5, 10, 2


def measure(name):
    """In each of the processes: the first prints the seconds that an update takes."""
    dist.init_process_group()
    script = importlib.import_module(name)
    device = script.choose_device("auto")
    torch.manual_seed(0)
    images = torch.randint(256, (1280, 1, 28, 28), dtype=torch.uint8, device=device)
    labels = torch.arange(1280, device=device) % 10
    data = script.Data("random", [*map(str, range(10))], images, labels, images, labels)
    args = script.arguments().parse_args(["--batch-size", str(SCRIPTS[name])])
    script.suit(args, data)
    model = script.Model(args, data)
    step = script.stepper(args, model, device)
    index = torch.arange(model.samples_per_step, device=device)[script.RANK :: script.WORLD]
    for i in range(WARM + UPDATES):
        if i == WARM:
            dist.barrier()
            started = time.perf_counter()
        losses = step(*model.batch(data, index))
    [loss.item() for loss in losses.values()]  # waits for a GPU
    if dist.get_rank() == 0:
        print((time.perf_counter() - started) / UPDATES)
    dist.destroy_process_group()


def seconds_an_update(name, processes):
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command = [*launch, __file__, name]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(numbers):
    os.environ["OMP_NUM_THREADS"] = "1"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [
        f"{machine(device)}, PyTorch {torch.__version__}; one thread or GPU a process",
        "",
        "| script | batch | " + " | ".join(f"{n} process{'es' * (n > 1)}" for n in numbers) + " |",
        "|---|---|" + "---|" * len(numbers),
    ]
    for name, batch in SCRIPTS.items():
        times = {n: [] for n in numbers}
        for _ in range(ROUNDS):
            for n in numbers:
                times[n].append(seconds_an_update(name, n))
        cells = [f"{statistics.median(times[n]) * 1e3:.0f} ms" for n in numbers]
        lines.append(f"| {name}.py | {batch} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_name(f"processes-{device}.md").write_text(text)


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        measure(sys.argv[1])
    else:
        main([int(text) for text in sys.argv[1:]] or [1, 2])
