"""Time of a training update against the number of processes that share its batch.

    python benchmarks/processes.py 1 2   # prints the table, writes benchmarks/processes-<device>.md
    python benchmarks/processes.py 1 2 --smoke   # one short round, nothing written

torchrun starts this file again for each measurement: random MNIST-like images, the scripts' own
batch sizes, one thread a process on a CPU or a GPU a process. Different numbers of processes take
turns.
"""

import argparse
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
SCRIPTS = {"infogan": 128, "gan": 100, "cgan": 128, "dcgan": 128, "wgan_gp": 48}
SCRIPTS |= {"oversampling": 32}
WARM, ROUNDS = 5, 2


def measure(name, updates):
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
    for i in range(WARM + updates):
        if i == WARM:
            dist.barrier()
            started = time.perf_counter()
        losses = step(*model.batch(data, index))
    [loss.item() for loss in losses.values()]  # waits for a GPU
    if dist.get_rank() == 0:
        print((time.perf_counter() - started) / updates)
    dist.destroy_process_group()


def seconds_an_update(name, processes, updates):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, f"--nproc-per-node={processes}", __file__, name, str(updates)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("numbers", nargs="*", type=int, default=[1, 2], metavar="N", help="of processes")
    add("--smoke", action="store_true", help="one short round, nothing written")
    args = parser.parse_args()
    numbers = args.numbers
    rounds, updates = (1, 1) if args.smoke else (ROUNDS, 10)
    if wrong := [n for n in numbers if n < 1 or any(b % n for b in SCRIPTS.values())]:
        parser.error(f"{wrong[0]} processes do not share each of {SCRIPTS} evenly")
    os.environ["OMP_NUM_THREADS"] = "1"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [
        f"{machine(device)}, PyTorch {torch.__version__}; one thread or GPU a process",
        "",
        "| script | batch | " + " | ".join(f"{n} process{'es' * (n > 1)}" for n in numbers) + " |",
        "|---|---|" + "---|" * len(numbers),
    ]
    print(*lines, sep="\n")
    for name, batch in SCRIPTS.items():
        times = {n: [] for n in numbers}
        for _ in range(rounds):
            for n in numbers:
                times[n].append(seconds_an_update(name, n, updates))
        cells = [f"{statistics.median(times[n]) * 1e3:.0f} ms" for n in numbers]
        lines.append(f"| {name}.py | {batch} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    if not args.smoke:
        text = "\n".join(lines) + "\n"
        Path(__file__).with_name(f"processes-{device}.md").write_text(text)


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        measure(sys.argv[1], int(sys.argv[2]))
    else:
        main()
