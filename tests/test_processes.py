"""Several processes under torchrun, on gloo: the same run as one process, and no hang."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import cgan
import wgan_gp

ROOT = Path(__file__).parent.parent
TOY = ["--dataset", "8gaussians", "--batch-size", "240", "--log-every", "5", "--device", "cpu"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo on Linux")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def torchrun(processes, script, *flags, **options):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    return subprocess.Popen([*command, str(script), *map(str, flags)], **options)


def losses(folder, script=wgan_gp):
    with open(Path(folder) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return torch.tensor([[float(row[name]) for name in script.LOSSES] for row in rows])


def test_processes_give_the_losses_of_one():
    """With 2 processes, and with 3 and then 2; in float64, where noise is no excuse."""
    Path("double.py").write_text(
        "import torch, wgan_gp\ntorch.set_default_dtype(torch.float64)\nwgan_gp.main()\n"
    )
    flags = [*TOY, "--epochs", 1]
    begun = [
        torchrun(n, "double.py", *flags, "--out", f"run{n}", "--max-steps", steps)
        for n, steps in ((1, 20), (2, 20), (3, 10))
    ]
    assert [process.wait(timeout=300) for process in begun] == [0, 0, 0]
    again = torchrun(2, "double.py", "--resume", "run3/checkpoint.pt", "--max-steps", 20)
    assert again.wait(timeout=300) == 0
    one = losses("run1")
    assert len(one) == 4 and one.abs().max() > 0.1
    for n in (2, 3):
        assert torch.allclose(losses(f"run{n}"), one, rtol=1e-4, atol=1e-4)


MLP = ["--network", "mlp", "--dataset", "digits", "--log-every", "5", "--device", "cpu"]


@pytest.mark.parametrize(
    "script, flags",
    [
        (wgan_gp, [*TOY, "--max-steps", 20, "--lr", 1e-5]),
        (cgan, [*MLP, "--max-steps", 10, "--lr-d", 3, "--lr-g", 3]),  # with dropout
    ],
)
def test_processes_give_the_losses_of_one_within_float32_noise(script, flags):
    begun = [torchrun(n, script.__file__, *flags, "--out", f"run{n}") for n in (1, 2)]
    assert [process.wait(timeout=300) for process in begun] == [0, 0]
    one, two = (losses(f"run{n}", script) for n in (1, 2))
    assert len(one) > 1 and torch.allclose(one, two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("world", [7, 240])
def test_batch_that_can_not_be_shared_is_refused(world, monkeypatch, capsys):
    """240 images are no multiple of 7, and one for each of 240 is too few."""
    monkeypatch.setattr(wgan_gp, "processes", lambda: (0, world))
    monkeypatch.setattr(wgan_gp, "gather", lambda value: [value])
    with pytest.raises(SystemExit) as stop:
        wgan_gp.main([*TOY, "--out", "run"])
    assert stop.value.code == 2 and f"a multiple of {world}, the" in capsys.readouterr().err


def long_run():
    """A run of two processes that has trained for a while, and their numbers."""
    run = torchrun(2, ROOT / "wgan_gp.py", *TOY, "--out", "run", stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (Path("run/metrics.csv").exists() and len(losses("run")) > 2):
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return run, [int(child) for child in children]


def test_process_that_dies_ends_the_run():
    run, children = long_run()
    os.kill(children[1], signal.SIGKILL)
    _, errors = run.communicate(timeout=100)
    assert run.returncode != 0 and re.search(r"exitcode *: -9|Signal 9|SIGKILL", errors)


def test_signal_saves_what_all_processes_have_done():
    run, _ = long_run()
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=100)
    assert "to go on: python wgan_gp.py --resume run/checkpoint.pt" in errors
    state = torch.load("run/checkpoint.pt", weights_only=True)
    assert state["step"] > 0


# ------------------------------------------------------------------ the pieces, in one process
def test_gradients_are_averaged(monkeypatch):
    """With another process whose gradients are 3 where ours are 1, a step of SGD goes by 2."""
    monkeypatch.setattr(wgan_gp, "processes", lambda: (0, 2))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(4))
    weights = [torch.zeros(3, requires_grad=True), torch.zeros(2, 2, requires_grad=True)]
    unused = torch.zeros(1, requires_grad=True)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    wgan_gp.update(torch.optim.SGD([*weights, unused], lr=1.0))
    assert all((weight == -2).all() for weight in weights) and unused == 0


def test_shares_make_up_the_batch(monkeypatch):
    batch = torch.arange(24).view(2, 12)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(wgan_gp, "processes", lambda rank=rank: (rank, 3))
        shares.append(wgan_gp.mine(batch, dim=1))
    assert torch.equal(torch.cat(shares, dim=1), batch)
