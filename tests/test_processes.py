"""Several processes, on gloo: averaged gradients, equal weights, resume, and no hang."""

import functools
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    ALL,
    SMALL_NETWORKS,
    checkpoint,
    error_of,
    exit_code,
    rows,
    same,
    weights,
    without_figures,
    without_method,
    write_pairs,
    write_table,
)
from torch import nn

from tools.sync_shared import ROOT

FLAGS = ["--dataset", "digits", "--batch-size", "24", "--log-every", "5", "--device", "cpu"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo on Linux")


@pytest.fixture
def together(start):
    """Starts a number of processes of one run, as torchrun does."""
    write_table()
    write_pairs()

    def begin(world, name, *flags, prepare=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        place["WORLD_SIZE"], flags = str(world), [*FLAGS, *SMALL_NETWORKS[name], *flags]
        return [
            start(name, *flags, prepare=prepare, environment=place | {"RANK": str(rank)})
            for rank in range(world)
        ]

    return begin


# ------------------------------------------------------------------ what they do before they start
class Toy(nn.Module):
    """A regression by SGD in float64, without noise and batch norm."""

    def __init__(self, args, data):
        super().__init__()
        self.args, self.samples_per_step, self.kernels = args, args.batch_size, "reference"
        self.layers = nn.Sequential(nn.Linear(784, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.optimizers = [torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)]

    def batch(self, data, index):
        return data.train[index].flatten(1).double() / 255, data.train_labels[index].double()


def toy_step(model, image, label):
    loss = (model.layers(image).squeeze(1) - label).square().mean()
    model.optimizers[0].zero_grad()
    loss.backward()
    model.optimizers[0].step()
    return {"loss": loss, "images": torch.tensor(float(len(image)))}


def toy(script):
    script.Model = Toy
    without_method(script, toy_step)


def keep(script):
    """Each process leaves its parameters and its buffers in a file."""
    run_updates = script.run_updates

    def kept(args, model, data, state):
        run_updates(args, model, data, state)
        tensors = dict(model.named_parameters()), dict(model.named_buffers())
        torch.save(tensors, f"rank{script.RANK}.pt")

    script.run_updates = kept
    without_figures(script)


def at_update_five(script, act):
    """The second process has its losses changed, or worse."""
    step, calls = script.train_step, iter(range(1, 10**6))

    def acting(model, *batch):
        losses = step(model, *batch)
        return act(losses) if script.RANK == 1 and next(calls) == 5 else losses

    script.train_step = acting


def die(script):
    at_update_five(script, lambda losses: sys.exit("a fault of the second process"))


def spoil(script):
    at_update_five(script, lambda losses: {k: loss * float("nan") for k, loss in losses.items()})


# ------------------------------------------------------------------ the same training
def test_mean_gradient_of_processes_is_that_of_one_on_the_whole_batch(together):
    toys = [
        together(n, "infogan", "--max-steps", 40, "--out", f"run{n}", prepare=f"{__name__}:toy")
        for n in (1, 2, 3)
    ]
    assert all(exit_code(process) == 0 for toy in toys for process in toy)
    one, *others = (checkpoint(f"run{n}") for n in (1, 2, 3))
    assert one["rows"][-1]["loss"] < 0.7 * one["rows"][0]["loss"]  # it trains
    for n, other in enumerate(others, 2):
        for name, weight in one["model"].items():
            assert torch.allclose(other["model"][name], weight, rtol=1e-10, atol=1e-10)
        for row, wanted in zip(other["rows"], one["rows"], strict=True):
            assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-10)
            assert row["images"] == wanted["images"] / n == 24 / n


@pytest.mark.parametrize("name", ALL)
def test_after_20_updates_all_processes_hold_the_same_weights(name, together):
    run = together(2, name, "--max-steps", 20, "--out", "run", prepare=f"{__name__}:keep")
    assert [exit_code(process) for process in run] == [0, 0]
    (first, buffers), (second, others) = (torch.load(f"rank{rank}.pt") for rank in range(2))
    assert first and same(first, second)
    assert not same(buffers, others) or not buffers  # batch norm has seen images of its own


def test_resume_with_as_many_processes_and_with_others(together):
    """Bit for bit the same with as many."""
    together = functools.partial(together, prepare=f"{__name__}:keep")
    whole = together(2, "infogan", "--max-steps", 20, "--out", "whole")
    begun = together(2, "infogan", "--max-steps", 10, "--out", "run")
    assert [exit_code(process) for process in [*whole, *begun]] == [0] * 4
    more = ("--resume", "run/checkpoint.pt", "--max-steps")
    assert [exit_code(process) for process in together(2, "infogan", *more, 20)] == [0, 0]
    assert same(weights("run"), weights("whole"))
    for world, step in ((1, 22), (3, 24)):
        again = together(world, "infogan", *more, step)
        assert [exit_code(process) for process in again] == [0] * world
        assert rows("run")[-1]["step"] == str(step)
    assert same(torch.load("rank1.pt")[0], torch.load("rank2.pt")[0])


def test_torchrun(monkeypatch):
    monkeypatch.setenv("TMPDIR", str(Path.cwd()))  # it leaves a folder there
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    flags = [*FLAGS, "--max-steps", "3", "--continuous", "0", "--categorical", "2", "--out", "run"]
    subprocess.run([*command, ROOT / "infogan.py", *flags], check=True, timeout=300)
    assert json.loads(Path("run/summary.json").read_text())["step"] == 3


# ------------------------------------------------------------------ no hang
def test_process_that_fails_ends_the_others(together):
    run = together(2, "infogan", "--out", "run", prepare=f"{__name__}:die")
    assert all(exit_code(process, 100) not in (0, None) for process in run)
    assert "a fault of the second process" in Path("output.txt").read_text()
    assert not Path("run/summary.json").exists()


def test_nan_of_one_process_stops_all(together):
    run = together(2, "infogan", "--out", "run", prepare=f"{__name__}:spoil")
    assert [exit_code(process, 100) for process in run] == [2, 2]
    said = Path("output.txt").read_text()
    assert said.count("infogan: error: nan by update 5;") == 2 and "Traceback" not in said


def test_first_process_that_is_refused_ends_the_others(together):
    Path("run").mkdir()
    Path("run/checkpoint.pt").write_bytes(b"a run")
    first, second = together(2, "infogan", "--out", "run")
    assert exit_code(first, 100) == 2 and exit_code(second, 100) not in (0, None)
    assert "run holds a run" in Path("output.txt").read_text()


# ------------------------------------------------------------------ in one process
@pytest.fixture
def alone(monkeypatch):
    """infogan.py in one process that takes itself for one of several, and what it asks of them."""
    import infogan

    asked = []
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(infogan.dist, name, lambda *args, name=name: asked.append(name))
    return infogan, asked


@pytest.mark.parametrize("world", [7, 24])
def test_batch_that_can_not_be_shared_is_refused(world, alone, capsys, monkeypatch):
    """24 samples are no multiple of 7, and one for each of 24 is too few."""
    monkeypatch.setattr(alone[0], "WORLD", world)
    error = error_of(alone[0], capsys, *FLAGS, "--out", "run")
    assert "--batch-size 24" in error and f"{world} processes" in error


def test_group_is_left_after_success_alone(alone, capsys, monkeypatch):
    """After an error, leaving it waits for the others."""
    infogan, asked = alone
    monkeypatch.setattr(infogan, "WORLD", 2)
    error_of(infogan, capsys, *FLAGS, "--dataset", "svhn")
    assert asked == ["init_process_group"]
    monkeypatch.setattr(infogan, "train", lambda args, state: None)
    infogan.main(FLAGS)
    assert asked[1:] == ["destroy_process_group"]
