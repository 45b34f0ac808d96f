"""Runs under fire: killed, out of space, doubled, misused; TORTURE=1 (make torture): for longer."""

import functools
import importlib
import json
import os
import random
import shutil
import signal
import string
import sys
import time
from pathlib import Path

import pytest
from helpers import (
    ALL,
    SMALL_NETWORKS,
    checkpoint,
    error_of,
    exit_code,
    no_step,
    rows,
    same,
    shrink,
    without_method,
    write_mnist,
    write_pairs,
    write_table,
)

LONG = os.environ.get("TORTURE") == "1"
TINY = ["--dataset", "mnist", "--batch-size", "4", "--log-every", "30", "--device", "cpu"]
TINY += ["--kernels", "reference", "--epochs", "25"]  # stages end at updates 100, 200 and 250

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and limits of Linux")


@pytest.fixture(autouse=True)
def data():
    write_mnist("data", train=40, test=10)
    write_table(rows=60)
    write_pairs(n=50)


def outcome(folder):
    """All that a run leaves in numbers, by name, but for its times and its paths."""
    state, table = checkpoint(folder), rows(folder)
    found = json.loads(Path(folder, "summary.json").read_text())
    for row in [*state["rows"], *table, found]:
        del row["seconds"]
    for kept in (state["config"], found):
        del kept["out"], kept["resume"]
    return {**state.pop("model"), **state, "metrics.csv": table, "summary.json": found}


@pytest.mark.parametrize("name", ALL if LONG else ["infogan"])
def test_killed_at_random_moments_it_ends_with_the_same_weights(start, name):
    flags = [*TINY, *SMALL_NETWORKS[name]]
    start = functools.partial(start, name, prepare=None if LONG else "helpers:without_figures")
    assert exit_code(start("--resume", "nowhere.pt")) == 2  # once, to have the server started
    began = time.monotonic()
    assert exit_code(start(*flags, "--out", "whole")) == 0
    took = time.monotonic() - began
    draw, kills, resumed, wanted = random.Random(0), 0, 0, 100 if LONG else 5
    while kills < wanted:
        shutil.rmtree("run", ignore_errors=True)
        while not Path("run/summary.json").exists():
            if Path("run/checkpoint.pt").exists():
                checkpoint("run")  # whole, whatever the moment of the kill
                process = start("--resume", "run/checkpoint.pt")
                resumed += 1
            else:
                process = start(*flags, "--out", "run")
            if kills < wanted:
                process.join(timeout=draw.uniform(0.05, 1) * took)
            if kills < wanted:
                process.kill()  # unless it has ended
            assert exit_code(process) in (0, -signal.SIGKILL)
            kills += process.exitcode != 0
        run, whole = outcome("run"), outcome("whole")
        assert [name for name in run | whole if not same(run.get(name), whole.get(name))] == []
        names = {str(path.relative_to("run")) for path in Path("run").rglob("*")}
        assert names == {str(path.relative_to("whole")) for path in Path("whole").rglob("*")}
    assert resumed > wanted / 8


def test_file_that_can_not_grow_leaves_the_previous_checkpoint(start):
    flags = [*TINY, *SMALL_NETWORKS["wgan_gp"]]
    assert exit_code(start("wgan_gp", *flags, "--out", "run", "--max-steps", 3)) == 0
    before = Path("run/checkpoint.pt").read_bytes()
    resume = ("--resume", "run/checkpoint.pt", "--max-steps", 20)
    assert exit_code(start("wgan_gp", *resume, limit=len(before) // 2)) == 2
    assert Path("run/checkpoint.pt").read_bytes() == before
    said = Path("output.txt").read_text()
    assert "Traceback" not in said and "File too large" in said.splitlines()[-1]
    assert exit_code(start("wgan_gp", *resume)) == 0


def test_two_runs_in_one_folder(start):
    """Begun together, one finishes; and none resumes what another is at."""
    flags = [*TINY, *SMALL_NETWORKS["wgan_gp"], "--out", "run", "--max-steps", 100]
    both = [start("wgan_gp", *flags) for _ in range(2)]
    assert sorted(map(exit_code, both)) == [0, 2]
    said = Path("output.txt").read_text()
    assert "another process is at the run run" in said or "run holds a run" in said
    extend = ("--resume", "run/checkpoint.pt", "--max-steps", 10**6, "--epochs", 10**6)
    first = start("wgan_gp", *extend)
    until = time.monotonic() + 100
    while rows("run")[-1]["step"] == "100" and time.monotonic() < until:
        time.sleep(0.05)
    assert exit_code(start("wgan_gp", *extend)) == 2
    assert "another process is at the run run" in Path("output.txt").read_text()
    os.kill(first.pid, signal.SIGINT)
    assert exit_code(first) == 130


def test_checkpoint_cut_anywhere(start, capsys):
    flags = [*TINY, *SMALL_NETWORKS["wgan_gp"], "--out", "run", "--max-steps", 1]
    assert exit_code(start("wgan_gp", *flags)) == 0
    whole, draw = Path("run/checkpoint.pt").read_bytes(), random.Random(0)
    for _ in range(200 if LONG else 20):
        Path("cut.pt").write_bytes(whole[: draw.randrange(len(whole))])
        error = error_of(importlib.import_module("wgan_gp"), capsys, "--resume", "cut.pt")
        assert "cut.pt is no whole checkpoint of wgan_gp" in error


# A path of noise must lead to no other folder than the test's.
LETTERS = "".join(letter for letter in string.printable if letter not in "/.~")
VALUES = ["", "0", "-1", "1e999", "nan", "2", "10", "3.5", "1" * 400, "1000000000000", "~no/x"]
VALUES += [
    "auto",
    "mnist",
    "folder",
    "data",
    "/dev/null/x",
    ".",
    "ä",
    "\udcff",
    "--",
    "cpu",
    "fp32",
]


def garbage(script, draw):
    """A command line of flags with values that may fit, do not fit, or are noise."""
    noise = "".join(draw.choices(LETTERS, k=draw.randrange(1, 12)))
    line = draw.choice([[], ["--dataset", "digits"]])
    for _ in range(draw.randrange(1, 4)):
        action = draw.choice(script.arguments()._actions[1:])  # the first is --help
        line = [*line, draw.choice(action.option_strings)]
        if draw.random() < 0.4:
            line += draw.choices([*VALUES, noise], k=draw.randrange(3))
        elif action.nargs != 0:
            line += [draw.choice([*map(str, action.choices or ["1", "8", "20"])])]
    return line


@pytest.mark.parametrize("name", ALL)
def test_garbage_on_the_command_line_never_ends_in_a_traceback(name, capsys, monkeypatch):
    """It ends in a message and exit code 2, or begins to train."""
    script, begun = importlib.import_module(name), []
    shrink(script, monkeypatch.setattr)

    def step(*batch):
        begun.append(batch)
        return no_step(*batch)

    without_method(script, step, monkeypatch.setattr)
    for stream in (sys.stdout, sys.stderr):  # as a script's last lines do
        stream.reconfigure(errors="backslashreplace")
    draw, refused = random.Random(0), 0
    for _ in range(1000 if LONG else 60):
        line = [*SMALL_NETWORKS[name], *garbage(script, draw), "--max-steps", "1"]
        print("garbage:", json.dumps(line))
        before = len(begun)
        try:
            script.main(line)
        except SystemExit as stop:
            captured = capsys.readouterr()
            assert stop.code == 2 and f"{name}: error: " in captured.err, (line, captured)
            refused += 1
        else:
            assert len(begun) == before + 1, line
    assert refused > 20 and begun
