"""Runs under fire: killed, out of space, doubled, misused; TORTURE=1 (make torture): for longer."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import string
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from test_runs import checkpoint, no_network, same, write_mnist

import cgan
import infogan
import wgan_gp

LONG = os.environ.get("TORTURE") == "1"
COMMON = "--epochs 4 --log-every 2 --device cpu --kernels reference"
FLAGS = {  # four epochs of five updates
    wgan_gp: "--dataset 8gaussians --n-critic 1 --batch-size 50000 --dim 4",
    infogan: "--dataset mnist --batch-size 8",
    cgan: "--dataset mnist --batch-size 8 --network mlp",
}
TINY = {script: f"{flags} {COMMON}".split() for script, flags in FLAGS.items()}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and limits of Linux")


@pytest.fixture(scope="module")
def start():
    """Starts script.main(flags) in a process of its own, forked from one that has imported it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:  # the server finds modules by the environment alone
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()

    def run(*flags, script=wgan_gp, limit=None):
        command = (script.__name__, [str(flag) for flag in flags], limit)
        process = context.Process(target=child, args=command)
        process.start()
        return process

    return run


def child(script, flags, limit):
    torch.set_num_threads(1)
    os.dup2(os.open("output.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.modules[script].main(flags)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(infogan.urllib.request, "urlopen", no_network)
    write_mnist("data", train=40, test=10)


def finished(process):
    process.join(timeout=300)
    return process.exitcode


def outcome(folder):
    """All that a run's checkpoint holds, but for its times and its folder."""
    state = checkpoint(folder)
    del state["seconds"], state["config"]
    for row in state["rows"]:
        del row["seconds"]
    return state


@pytest.mark.parametrize("script", TINY if LONG else [wgan_gp], ids=lambda script: script.__name__)
def test_killed_at_random_moments_it_ends_with_the_same_weights(start, script):
    tiny = TINY[script]
    assert finished(start("--resume", "nowhere.pt")) == 2  # once, to have the server started
    began = time.monotonic()
    assert finished(start(*tiny, "--out", "whole", script=script)) == 0
    took = time.monotonic() - began
    draw, kills, wanted = random.Random(0), 0, 100 if LONG else 8
    while kills < wanted:
        shutil.rmtree("run", ignore_errors=True)
        while True:
            if Path("run/checkpoint.pt").exists():
                checkpoint("run")  # whole, whatever the moment of the kill
                process = start("--resume", "run/checkpoint.pt", script=script)
            else:
                shutil.rmtree("run", ignore_errors=True)
                process = start(*tiny, "--out", "run", script=script)
            process.join(timeout=draw.uniform(0.05, 1) * took)
            if process.exitcode is None and kills < wanted:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            elif finished(process) == 0:
                break
            process.join()
        assert same(outcome("run"), outcome("whole"))
        names = {path.name for path in Path("run").iterdir()}
        assert {"summary.json", "curves.png", "metrics.csv"} <= names


def test_file_that_can_not_grow_leaves_the_previous_checkpoint(start):
    assert finished(start(*TINY[wgan_gp], "--out", "run", "--max-steps", 3)) == 0
    before = Path("run/checkpoint.pt").read_bytes()
    resume = ("--resume", "run/checkpoint.pt", "--max-steps", 20)
    assert finished(start(*resume, limit=len(before) // 2)) == 2
    assert Path("run/checkpoint.pt").read_bytes() == before
    assert not list(Path("run").glob("*.tmp"))
    said = Path("output.txt").read_text()
    assert "Traceback" not in said and "File too large" in said.splitlines()[-1]
    assert finished(start(*resume)) == 0


def test_two_runs_in_one_folder(start):
    """Begun together, one finishes; and none resumes what another is at."""
    both = [start(*TINY[wgan_gp], "--out", "run") for _ in range(2)]
    assert sorted(map(finished, both)) == [0, 2]
    said = Path("output.txt").read_text()
    assert "another process is at this run" in said or "holds a run" in said
    extend = ("--resume", "run/checkpoint.pt", "--epochs", 40)
    first = start(*extend)
    while Path("run/summary.json").exists():  # it goes when the first begins to train
        time.sleep(0.05)
    assert finished(start(*extend)) == 2
    assert "another process is at this run" in Path("output.txt").read_text()
    os.kill(first.pid, signal.SIGTERM)
    assert finished(first) == 143


def test_checkpoint_cut_anywhere(start, capsys):
    assert finished(start(*TINY[wgan_gp], "--out", "run", "--max-steps", 1)) == 0
    whole = Path("run/checkpoint.pt").read_bytes()
    draw = random.Random(0)
    for _ in range(100 if LONG else 10):
        Path("cut.pt").write_bytes(whole[: draw.randrange(len(whole))])
        with pytest.raises(SystemExit) as stop:
            wgan_gp.main(["--resume", "cut.pt"])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        assert "not a whole checkpoint" in error


def garbage(script, draw):
    """A command line of flags with values that may fit, do not fit, or are noise."""
    noise = "".join(draw.choices(string.printable, k=draw.randrange(1, 12)))
    values = ["", "0", "-1", "1e999", "nan", "2", "10", "3.5", "1" * 400, "1000000000000"]
    values += ["auto", "mnist", "folder", "data", "/", ".", "\0", "ä", "--", "cpu", "fp32", noise]
    line = draw.choice([[], ["--dataset", "digits"]])
    for _ in range(draw.randrange(1, 4)):
        action = draw.choice(script.arguments()._actions[1:])  # the first is --help
        line = [*line, draw.choice(action.option_strings)]
        if draw.random() < 0.4:
            line += draw.choices(values, k=draw.randrange(3))
        elif action.nargs != 0:
            line += [draw.choice([*map(str, action.choices or ["1", "8", "20"])])]
    return line


@pytest.mark.parametrize("script", TINY, ids=lambda script: script.__name__)
def test_garbage_on_the_command_line_never_ends_in_a_traceback(script, capsys, monkeypatch):
    """It ends in one line of error and exit code 2, or begins to train."""
    begun = []
    step = torch.zeros(len(script.LOSSES))
    monkeypatch.setattr(script, "train_step", lambda *args: begun.append(args) or step)
    for name in ("measure", "finish", "save"):
        monkeypatch.setattr(script.Run, name, lambda run: None)
    draw, refused = random.Random(0), 0
    for _ in range(1000 if LONG else 60):
        try:
            script.main([*garbage(script, draw), "--max-steps", "1"])
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert stop.code == 2 and error.count("\n") == 1
            refused += 1
    assert refused > 20 and begun
