"""Runs under fire: killed, out of space, doubled, misused. TORTURE=1 (make torture) is the long form."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import string
import sys
import time
from pathlib import Path

import pytest
import torch
from test_runs import checkpoint, no_network, same, weights, write_mnist

import infogan

LONG = os.environ.get("TORTURE") == "1"
TINY = ["--dataset", "mnist", "--batch-size", "8", "--epochs", "4", "--log-every", "2"]
TINY += ["--device", "cpu", "--kernels", "reference", "--noise", "4"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and limits of Linux")


@pytest.fixture(scope="module")
def start():
    """Starts infogan.main(arguments) in a process of its own, forked from one that has imported it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["infogan"])

    def run(*flags, limit=None):
        process = context.Process(target=child, args=([str(flag) for flag in flags], limit))
        process.start()
        return process

    return run


def child(flags, limit):
    torch.set_num_threads(1)
    os.dup2(os.open("output.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    infogan.main(flags)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(infogan.urllib.request, "urlopen", no_network)
    write_mnist("data", train=40, test=10)


def finished(process):
    process.join(timeout=300)
    return process.exitcode


def test_killed_at_random_moments_it_ends_with_the_same_weights(start):
    assert finished(start(*TINY, "--out", "whole")) == 0
    draw, kills, wanted = random.Random(0), 0, 100 if LONG else 5
    while kills < wanted:
        shutil.rmtree("run", ignore_errors=True)
        while True:
            if Path("run/checkpoint.pt").exists():
                checkpoint("run")  # whole, whatever the moment of the kill
                process = start("--resume", "run/checkpoint.pt")
            else:
                shutil.rmtree("run", ignore_errors=True)
                process = start(*TINY, "--out", "run")
            process.join(timeout=draw.uniform(0.1, 4))
            if process.exitcode is None and kills < wanted:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            elif finished(process) == 0:
                break
            process.join()
        assert same(weights("run"), weights("whole"))
        names = {path.name for path in Path("run").iterdir()}
        assert {"summary.json", "codes.png", "curves.png", "metrics.csv"} <= names


def test_file_that_can_not_grow_leaves_the_previous_checkpoint(start):
    assert finished(start(*TINY, "--out", "run", "--max-steps", 3)) == 0
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
    both = [start(*TINY, "--out", "run") for _ in range(2)]
    assert sorted(map(finished, both)) == [0, 2]
    assert "holds a run" in Path("output.txt").read_text()
    extend = ("--resume", "run/checkpoint.pt", "--epochs", 40)
    first = start(*extend)
    while Path("run/summary.json").exists():  # it goes when the first begins to train
        time.sleep(0.05)
    assert finished(start(*extend)) == 2
    assert "another process is at this run" in Path("output.txt").read_text()
    os.kill(first.pid, signal.SIGTERM)
    assert finished(first) == 143


def test_checkpoint_cut_anywhere(start, capsys):
    assert finished(start(*TINY, "--out", "run", "--max-steps", 1)) == 0
    whole = Path("run/checkpoint.pt").read_bytes()
    draw = random.Random(0)
    for _ in range(100 if LONG else 10):
        Path("cut.pt").write_bytes(whole[: draw.randrange(len(whole))])
        with pytest.raises(SystemExit) as stop:
            infogan.main(["--resume", "cut.pt"])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        assert "not a whole checkpoint" in error


def garbage(draw):
    """A command line of flags with values that may fit, do not fit, or are noise."""
    noise = "".join(draw.choices(string.printable, k=draw.randrange(1, 12)))
    values = ["", "0", "-1", "1e999", "nan", "2", "10", "3.5", "1" * 400, "1000000000000"]
    values += ["auto", "mnist", "folder", "data", "/", ".", "\0", "ä", "--", "cpu", "fp32", noise]
    line = draw.choice([[], ["--dataset", "digits"]])
    for _ in range(draw.randrange(1, 4)):
        action = draw.choice(infogan.arguments()._actions[1:])  # the first is --help
        line = [*line, draw.choice(action.option_strings)]
        line += draw.choices([*values, *map(str, action.choices or [])], k=draw.randrange(3))
    return line


def test_garbage_on_the_command_line_never_ends_in_a_traceback(capsys, monkeypatch):
    """It ends in one line of error and exit code 2, or begins to train."""
    begun = []
    step = torch.zeros(len(infogan.LOSSES))
    monkeypatch.setattr(infogan, "train_step", lambda *args: begun.append(args) or step)
    for name in ("measure", "finish", "save"):
        monkeypatch.setattr(infogan.Run, name, lambda run: None)
    draw, refused = random.Random(0), 0
    for _ in range(1000 if LONG else 150):
        try:
            infogan.main([*garbage(draw), "--max-steps", "1"])
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert stop.code == 2 and error.count("\n") == 1
            refused += 1
    assert refused > 50 and len(begun) > 5
