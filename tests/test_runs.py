"""Whole runs through main([...]): what they leave, stages, resume, every bad input."""

import contextlib
import importlib
import json
import math
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import (
    ALL,
    SMALL_NETWORKS,
    checkpoint,
    error_of,
    files,
    no_network,
    refused_by,
    rows,
    same,
    shrink,
    weights,
    without_figures,
    without_method,
    write_images,
    write_mnist,
    write_pairs,
    write_table,
)
from PIL import Image

import infogan
from tools.sync_shared import ROOT, SCRIPTS

MODULES = {name: importlib.import_module(name) for name in ALL}
QUICK = ["--dataset", "digits", "--batch-size", "32", "--device", "cpu", "--kernels", "reference"]
SMALL = ["--dataset", "mnist", "--batch-size", "8", "--epochs", "12", "--log-every", "10"]
SMALL += ["--device", "cpu", "--kernels", "reference"]
FREE = {"epochs", "max_steps", "log_every", "device", "dataset", "data_dir", "data"}
FREE |= {"lr", "lr_d", "lr_g", "lr_fall"}


def shrink_all(patch):
    for script in MODULES.values():
        shrink(script, patch)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    shrink_all(monkeypatch.setattr)


@pytest.fixture(scope="module", params=ALL)
def script(request):
    """Each test that asks for it, or for a finished run, runs on every script."""
    return MODULES[request.param]


INFOGAN = pytest.mark.parametrize("script", ["infogan"], indirect=True)
PICTURES = pytest.mark.parametrize("script", SCRIPTS, indirect=True)
# the run block is the same in all; of each kind of data one
KINDS = pytest.mark.parametrize("script", ["infogan", "pix2pix", "ctgan"], indirect=True)
# oversampling.py draws its batches, of all classes alike
EPOCHS = pytest.mark.parametrize("script", SCRIPTS[:-1], indirect=True)


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    """A run of 12 epochs of 10 updates on made MNIST files or a table, a row every 10 updates."""
    run = tmp_path_factory.mktemp("finished") / "run"
    write_mnist(run.parent / "data", train=80, test=20)
    write_table(run.parent / "table.csv", rows=100)
    write_pairs(run.parent / "data", n=100)
    with pytest.MonkeyPatch.context() as patch:
        shrink_all(patch.setattr)
        script.main(small(script, run, "--out", run))
    return run


def small(script, finished, *flags):
    """The arguments of the same run with other flags."""
    data = ["--data-dir", finished.parent / "data"]
    data += ["--data", finished.parent / "table.csv"] if script.SCRIPT == "ctgan" else []
    return [str(flag) for flag in (*SMALL, *SMALL_NETWORKS[script.SCRIPT], *data, *flags)]


@pytest.fixture
def refused(script, capsys):
    return partial(refused_by, script, capsys)


@pytest.fixture
def no_figures(script, monkeypatch):
    without_figures(script, monkeypatch.setattr)


def run(*flags):
    infogan.main([*QUICK, *map(str, flags)])


def summary(folder):
    return json.loads(Path(folder, "summary.json").read_text())


def rates(script, value):
    """The flags that set every learning rate of the script."""
    options = (option for action in script.arguments()._actions for option in action.option_strings)
    return [x for option in options if option.startswith("--lr") for x in (option, str(value))]


# ------------------------------------------------------------------ what a run leaves
@PICTURES
def test_run_folder(script, finished):
    names = {path.name for path in finished.iterdir()} - {".lock"}
    written = {"checkpoint.pt", "config.json", "metrics.csv", "summary.json", "samples"}
    written |= {"table.csv"} if script.SCRIPT == "oversampling" else set()
    assert names > written and all(name.endswith(".png") for name in names - written)
    assert "curves.png" in names and (script.SCRIPT != "infogan" or "codes.png" in names)
    pictures = sorted(path.name for path in (finished / "samples").iterdir())
    assert pictures == ["0000100.png", "0000120.png"]
    for picture in finished.rglob("*.png"):
        with Image.open(picture) as image:
            assert np.asarray(image).std() > 1  # not blank


def test_metrics(finished):
    table, kept = rows(finished), checkpoint(finished)["rows"]
    assert [int(row["step"]) for row in table] == list(range(10, 121, 10))
    assert [int(row["epoch"]) for row in table] == list(range(1, 13))
    header = list(table[0])
    assert header[:3] == ["step", "epoch", "seconds"] and set(header) == set().union(*kept)
    for shown, row in zip(table, kept, strict=True):
        assert {name: float(value) for name, value in shown.items() if value} == row
    seconds = [row["seconds"] for row in kept]
    assert seconds == sorted(seconds) and seconds[0] > 0


@INFOGAN
def test_losses_stand_in_every_row_and_accuracy_in_those_that_end_a_stage(finished):
    header = (finished / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,epoch,seconds,loss_d,loss_g,mi_categorical,mi_continuous,accuracy"
    assert all(row["loss_d"] and row["mi_continuous"] for row in rows(finished))
    assert [row["step"] for row in rows(finished) if row["accuracy"]] == ["100", "120"]


def test_config_and_summary(script, finished):
    config, found = json.loads((finished / "config.json").read_text()), summary(finished)
    assert config.keys() == vars(script.arguments().parse_args([])).keys()
    assert config == checkpoint(finished)["config"] and config["batch_size"] == 8
    facts = config | {"script": script.SCRIPT, "device": "cpu", "kernels": "reference"}
    assert {name: found[name] for name in facts} == facts
    last = checkpoint(finished)["rows"][-1]
    assert found.keys() > last.keys() and found["seconds"] == last["seconds"]


@INFOGAN
def test_summary_of_infogan(finished):
    found = summary(finished)
    assert math.isclose(found["mi_categorical_max"], math.log(10))
    assert found["mi_categorical"] <= found["mi_categorical_max"]
    assert len(found["codes"]) == 2
    for effect in found["codes"]:
        assert effect.keys() == {"slant", "width", "thickness"}
        assert all(-1 <= rho <= 1 for rho in effect.values())


def test_default_folder_names_script_and_data_set_and_is_new_each_time(monkeypatch):
    without_figures(infogan, monkeypatch.setattr)
    run("--max-steps", 1)
    run("--max-steps", 1)
    folders = list(Path("runs").iterdir())
    assert len(folders) == 2 and all(path.name.startswith("infogan-digits-2") for path in folders)


def test_other_latent_specifications():
    run("--max-steps", 2, "--out", "a", "--categorical", 3, 4, "--continuous", 3, "--noise", 7)
    found = summary("a")
    assert math.isclose(found["mi_categorical_max"], math.log(12)) and len(found["codes"]) == 3
    assert "accuracy" not in found
    run("--max-steps", 2, "--out", "b", "--categorical", "--noise", 0)
    assert summary("b")["mi_categorical"] == 0
    run("--max-steps", 2, "--out", "c", "--continuous", 0, "--unit-variance")
    assert summary("c")["codes"] == []


@PICTURES
def test_run_in_colour(script, monkeypatch):
    write_images("pictures", n=24)
    flags = [
        "--dataset",
        "folder",
        "--data-dir",
        "pictures",
        "--batch-size",
        "8",
        "--device",
        "cpu",
    ]
    flags += ["--categorical", "2"] if script.SCRIPT == "infogan" else []
    script.main([*flags, *SMALL_NETWORKS[script.SCRIPT], "--max-steps", "2", "--out", "run"])
    assert checkpoint("run")["data"] == {"about": ["cat", "dog"], "shape": [18, 3, 32, 32]}
    assert script.SCRIPT != "infogan" or summary("run")["accuracy"] >= 0.5


# ------------------------------------------------------------------ the paper's claim, in small
def test_codes_are_learned_and_the_baseline_does_not_learn_them():
    flags = ["--max-steps", 100, "--noise", 10, "--lambda-categorical", 1]
    flags += ["--lr-d", 1e-3, "--lr-g", 5e-3, "--log-every", 50]
    run(*flags, "--out", "info")
    run(*flags, "--out", "base", "--baseline")
    assert summary("info")["mi_categorical"] > 1.0
    assert summary("base")["mi_categorical"] < 0.5


# ------------------------------------------------------------------ stages
@pytest.mark.parametrize(
    "images, flags, ends",
    [
        (80, ["--epochs", 25], [100, 200, 250]),  # epochs of 10 updates
        (1120, ["--epochs", 3], [140, 280, 420]),
        (10_400, ["--epochs", 2], [1000, 1300, 2300, 2600]),
        (10_400, ["--max-steps", 1150], [1000, 1150]),
        (80, ["--max-steps", 7], [7]),
    ],
)
def test_a_stage_ends_with_an_epoch_after_100_updates_or_1000(images, flags, ends, monkeypatch):
    without_method(infogan, patch=monkeypatch.setattr)
    monkeypatch.setattr(infogan.Model, "batch", lambda model, data, index: (index,))
    monkeypatch.setattr(infogan, "evaluate", lambda model, data: {"measured": 1.0})
    written, write_file = [], infogan.write_file

    def listed(path, content):
        written.append(path.name)
        write_file(path, content)

    monkeypatch.setattr(infogan, "write_file", listed)
    write_mnist("data", train=images)
    infogan.main([*SMALL, "--log-every", "1000", "--out", "run", *map(str, flags)])
    assert [int(path.stem) for path in sorted(Path("run/samples").iterdir())] == ends
    assert [int(row["step"]) for row in rows("run") if row["measured"]] == ends
    assert written.count("checkpoint.pt") == len(ends)
    assert checkpoint("run")["rows"][-1]["step"] == ends[-1]


# ------------------------------------------------------------------ random numbers
def numbers(script, monkeypatch, *flags):
    """Of each update, a random number and the pixels' sum; the rows of both."""
    drawn = []

    def step(model, real, *label):
        drawn.append((torch.rand(()).item(), real.double().sum().item()))
        return {"loss": torch.zeros(())}

    with monkeypatch.context() as patch:
        without_method(script, step, patch.setattr)
        script.main([str(flag) for flag in flags])
    return drawn


def test_noise_follows_from_seed_update_and_process(script, finished, monkeypatch):
    draw = partial(numbers, script, monkeypatch)
    flags = partial(small, script, finished, "--max-steps", 25)
    first = draw(*flags("--out", "a"))
    assert len(set(first)) == 25
    assert draw(*flags("--out", "b", "--log-every", 3)) == first
    assert draw(*flags("--out", "c"), "--max-steps", 13) == first[:13]
    assert draw("--resume", "c/checkpoint.pt", "--max-steps", 25) == first[13:]
    other = draw(*flags("--out", "d", "--seed", 1))
    monkeypatch.setattr(script, "RANK", 1)
    monkeypatch.setattr(script.dist, "barrier", lambda: None)
    for apart in (other, draw(*flags("--out", "e"))):
        assert not {noise for noise, _ in apart} & {noise for noise, _ in first}


@EPOCHS
def test_an_epoch_takes_every_image_once_in_an_order_of_its_own(script, finished, monkeypatch):
    flags = small(script, finished, "--out", "run", "--epochs", 2)
    sums = np.array([pixels for _, pixels in numbers(script, monkeypatch, *flags)]).reshape(2, 10)
    assert np.allclose(sums.sum(axis=1), sums.sum() / 2, rtol=0, atol=0.1)
    assert not np.isin(sums[0], sums[1]).any()


def test_what_a_measurement_draws_does_not_change_the_training(
    script, finished, monkeypatch, no_figures
):
    evaluate = script.evaluate
    monkeypatch.setattr(
        script, "evaluate", lambda *args: evaluate(*args) | {"drawn": torch.rand(3).sum().item()}
    )
    script.main(small(script, finished, "--out", "run", "--log-every", "7"))
    assert same(weights("run"), weights(finished))


# ------------------------------------------------------------------ resume
def untimed(folder, after=0):
    """The rows from an update on but for the seconds."""
    table = (row for row in rows(folder) if int(row["step"]) > after)
    return [{k: v for k, v in row.items() if k != "seconds"} for row in table]


@pytest.mark.parametrize("stop", [("--max-steps", 3), ("--max-steps", 105), ("--epochs", 10)])
def test_resume_equals_uninterrupted(stop, script, finished, monkeypatch):
    """Stopped before a row, after a stage in mid-epoch, and finished and then extended."""
    if script.SCRIPT in ("ctgan", "gan") and stop[0] == "--epochs":
        pytest.skip("its learning rate falls over the epochs that were asked for")
    if stop[0] == "--max-steps":
        without_figures(script, monkeypatch.setattr)
    script.main(small(script, finished, "--out", "run", *stop))
    step = int(rows("run")[-1]["step"])
    assert step == 100 if stop[0] == "--epochs" else stop[1]
    more = ("--epochs", "12") if stop[0] == "--epochs" else ("--max-steps", "1000")
    script.main(["--resume", "run/checkpoint.pt", *more])
    assert same(weights("run"), weights(finished))
    after = math.ceil(step / 10) * 10  # the end of the first run cut that row in two
    assert untimed("run", after) == untimed(finished, after) != []
    first, second = summary("run"), summary(finished)
    own = {"seconds", "epochs", "max_steps", "out", "resume"}
    if step % 10 == 0:
        assert untimed("run") == untimed(finished)
        assert {k: first[k] for k in first.keys() - own} == {
            k: second[k] for k in second.keys() - own
        }


def test_rates_limits_and_device_may_change(script, finished, no_figures, monkeypatch):
    shutil.copytree(finished, "run")
    models, kind = [], script.Model
    monkeypatch.setattr(script, "Model", lambda *args: models.append(kind(*args)) or models[-1])
    flags = [*rates(script, 3e-4), "--log-every", "3", "--device", "auto", "--max-steps", "125"]
    script.main(["--resume", "run/checkpoint.pt", *flags, "--epochs", "30"])
    config = json.loads(Path("run/config.json").read_text())
    assert config["epochs"] == 30 and config["log_every"] == 3 and config["max_steps"] == 125
    assert [int(row["step"]) for row in rows("run")][-3:] == [120, 123, 125]
    for optimizer in models[0].optimizers:
        assert [float(group["lr"]) for group in optimizer.param_groups] == [pytest.approx(3e-4)]


def other_value(action, value):
    """Of the flag, as words on the command line."""
    if action.nargs == 0:
        return []
    if action.choices:
        return [next(str(choice) for choice in action.choices if choice != value)]
    values = value if value and isinstance(value, list) else [value]
    numbers = {float: lambda x: x / 2 + 0.1, int: lambda x: x + 4}
    return [str(numbers.get(type(x), lambda x: 3)(x)) for x in values]


def test_other_flags_are_refused_by_their_name(script, finished, refused):
    kept = checkpoint(finished)["config"]
    for action in script.arguments()._actions[1:]:  # the first is --help
        if action.dest not in {*FREE, "resume", "generate"}:
            flag, value = action.option_strings[0], kept[action.dest]
            error = refused(
                "--resume", finished / "checkpoint.pt", flag, *other_value(action, value)
            )
            assert f"{flag}: the run has {value}" in error


def test_the_same_flags_again_are_no_others(script, finished, no_figures):
    shutil.copytree(finished, "run")
    state = checkpoint("run")
    state["config"]["out"] = "run"
    torch.save(state, "run/checkpoint.pt")
    again = small(script, finished, "--out", "run", "--resume", "./run/checkpoint.pt")
    script.main([*again, "--epochs", "13"])
    assert int(rows("run")[-1]["step"]) == 130


def test_run_goes_on_in_its_own_folder_from_anywhere(script, finished, monkeypatch, no_figures):
    shutil.copytree(finished.parent / "data", "data")
    write_table()
    relative = [*SMALL, *SMALL_NETWORKS[script.SCRIPT], "--data-dir", "data", "--out", "a/run"]
    script.main([*relative, "--max-steps", "3"])
    Path("b").mkdir()
    monkeypatch.chdir("b")
    script.main(["--resume", "../a/run/checkpoint.pt", "--max-steps", "5"])
    assert [row["step"] for row in rows("../a/run")] == ["3", "5"] and files() == {}
    monkeypatch.chdir("../a/run")
    script.main(["--resume", "checkpoint.pt", "--max-steps", "7"])
    assert [row["step"] for row in rows(".")] == ["3", "5", "7"]


@PICTURES
def test_data_that_have_moved(script, refused, capsys, no_figures):
    write_mnist("data", train=80, test=20)
    flags = [*SMALL, *SMALL_NETWORKS[script.SCRIPT], "--out", "run", "--max-steps", "3"]
    script.main(flags)
    Path("data").rename("elsewhere")
    more = ("--resume", "run/checkpoint.pt", "--max-steps", 5)
    assert "mnist can not be read" in error_of(script, capsys, *more)
    write_mnist("other", train=88, test=20)
    assert "not the run's data" in refused(*more, "--data-dir", "other")
    script.main([str(flag) for flag in (*more, "--data-dir", "elsewhere")])
    assert [row["step"] for row in rows("run")] == ["3", "5"]


@PICTURES
def test_data_of_other_classes_and_another_set(script, finished, refused):
    shutil.copytree(finished, "run")
    more = ("--resume", "run/checkpoint.pt", "--epochs", 13)
    assert "not the run's data" in refused(*more, "--dataset", "digits")
    state = checkpoint("run")
    state["data"]["about"][0] = "cat"
    torch.save(state, "run/checkpoint.pt")
    assert "not the run's data" in refused(*more)


@PICTURES
def test_run_begun_with_auto_is_not_resumed_on_another_set(script, capsys):
    write_mnist("data")
    flags = ["--batch-size", "8", "--max-steps", "1", "--out", "run", "--device", "cpu"]
    script.main([*flags, *SMALL_NETWORKS[script.SCRIPT]])
    before = weights("run")
    shutil.rmtree("data")
    more = ("--resume", "run/checkpoint.pt", "--max-steps", 2)
    assert "mnist can not be read" in error_of(script, capsys, *more)
    assert same(weights("run"), before)


def test_copy_of_a_checkpoint_does_not_overwrite_a_later_one(script, finished, refused):
    shutil.copytree(finished, "run")
    shutil.copy("run/checkpoint.pt", "run/best.pt")
    assert "--resume: the run has run/checkpoint.pt" in refused("--resume", "run/best.pt")


# ------------------------------------------------------------------ Ctrl-C and threads
def at_update(script, monkeypatch, number, act):
    """Has train_step call act with its model and losses after so many updates."""
    step, calls = script.train_step, iter(range(1, 10**6))

    def acting(model, *batch):
        losses = step(model, *batch)
        return act(model, losses) if next(calls) == number else losses

    monkeypatch.setattr(script, "train_step", acting)


def interrupt(*args):
    raise KeyboardInterrupt


@KINDS
def test_interrupted_run_says_how_to_go_on(script, finished, capsys, monkeypatch, no_figures):
    with monkeypatch.context() as patch:
        at_update(script, patch, 105, interrupt)
        with pytest.raises(SystemExit) as stop:
            script.main(small(script, finished, "--out", "run"))
    error = capsys.readouterr().err
    assert stop.value.code == 130 and "Traceback" not in error
    assert error.endswith("error: stopped; go on by --resume run/checkpoint.pt\n")
    assert checkpoint("run")["rows"][-1]["step"] == 100 and not Path("run/summary.json").exists()
    script.main(["--resume", "run/checkpoint.pt"])
    assert same(weights("run"), weights(finished)) and untimed("run") == untimed(finished)


@pytest.mark.parametrize("moment", ["load_data", "train_step"])
def test_interrupted_before_the_first_checkpoint_it_names_none(
    moment, script, finished, capsys, monkeypatch
):
    monkeypatch.setattr(script, moment, interrupt)
    with pytest.raises(SystemExit) as stop:
        script.main(small(script, finished))
    error = capsys.readouterr().err
    assert stop.value.code == 130 and error.endswith("stopped; no checkpoint was written\n")


@KINDS
def test_main_works_in_a_thread(script, finished):
    flags = small(script, finished, "--out", "run", "--max-steps", "2")
    thread = threading.Thread(target=script.main, args=[flags])
    thread.start()
    thread.join()
    assert summary("run")["step"] == 2


@INFOGAN
def test_run_that_ends_between_two_writes_loses_no_row(script, finished, monkeypatch):
    """Before each of its files in turn, as a kill ends it; rows, summary and pictures are whole."""
    without_method(script, patch=monkeypatch.setattr)
    write_file, flags = script.write_file, small(script, finished, "--out")
    script.main([*flags, "whole"])
    for number in range(1, 17):  # settings, 12 rows, 2 checkpoints, summary
        with monkeypatch.context() as patch:
            writes = iter(range(1, 17))
            patch.setattr(
                script,
                "write_file",
                lambda *args, w=writes, n=number: write_file(*args) if next(w) < n else interrupt(),
            )
            with pytest.raises(SystemExit):
                script.main([*flags, f"run{number}"])
        run = Path(f"run{number}")
        begun = (run / "checkpoint.pt").exists()
        script.main(["--resume", str(run / "checkpoint.pt")] if begun else [*flags, str(run)])
        assert untimed(run) == untimed("whole") and summary(run)["step"] == 120
        assert len(list((run / "samples").iterdir())) == 2


# ------------------------------------------------------------------ nan
def spoil_loss(model, losses):
    return {name: loss * math.nan for name, loss in losses.items()}


def spoil_weight(model, losses):
    next(model.parameters()).data[0] = math.inf
    return losses


@KINDS
@pytest.mark.parametrize("spoil, number", [(spoil_loss, 104), (spoil_weight, 110)])
def test_nan_stops_within_a_row_and_leaves_the_last_good_state(
    spoil, number, script, finished, capsys, monkeypatch, no_figures
):
    with monkeypatch.context() as patch:
        at_update(script, patch, number, spoil)
        error = error_of(script, capsys, *small(script, finished, "--out", "run"))
    assert "nan by update 110;" in error and "by --resume run/checkpoint.pt" in error
    assert checkpoint("run")["rows"][-1]["step"] == 100
    assert all(p.isfinite().all() for p in checkpoint("run")["model"].values())
    script.main(["--resume", "run/checkpoint.pt", *rates(script, 1e-5)])
    assert int(rows("run")[-1]["step"]) == 120


@KINDS
def test_nan_at_the_end_of_a_stage_is_not_saved(script, finished, capsys, monkeypatch):
    at_update(script, monkeypatch, 100, spoil_loss)
    error = error_of(script, capsys, *small(script, finished, "--out", "run"))
    assert "nan by update 100;" in error and error.endswith("; no checkpoint was written\n")
    assert not Path("run/checkpoint.pt").exists()


# ------------------------------------------------------------------ one run to a folder
def test_folder_that_holds_a_run(script, finished, refused):
    """The run, and what is left of it with a checkpoint alone."""
    for ignored in ((), ("*.json", "*.csv", "*.png")):
        shutil.copytree(finished, "kept", ignore=shutil.ignore_patterns(*ignored))
        assert "kept holds a run" in refused(*small(script, finished, "--out", "kept"))
        shutil.rmtree("kept")


def test_folder_that_another_process_writes(script, finished, refused):
    shutil.copytree(finished, "run")
    with FileLock("run/.lock"):
        for flags in (("--resume", "run/checkpoint.pt"), small(script, finished, "--out", "run")):
            assert "another process" in refused(*flags)


# ------------------------------------------------------------------ drawing from a trained model
@PICTURES
@pytest.mark.parametrize(
    "out, left, kind",
    [
        ("new/dir/a.png", "new/dir/a.png", "PNG"),
        ("a.JPG", "a.JPG", "JPEG"),
        ("b.bmp", "b.bmp", "BMP"),
        ("new/threes", "new/threes.png", "PNG"),
        (None, "grid.png", "PNG"),
    ],
)
def test_generate(out, left, kind, script, finished):
    script.main(["--generate", str(finished / "checkpoint.pt"), *(["--out", out] if out else [])])
    assert [path for path, written in files().items() if written] == [Path(left)]
    with Image.open(left) as image:
        assert image.format == kind and np.asarray(image).std() > 1
    generator = script.load_generator(str(finished / "checkpoint.pt"))
    assert not generator.training


@PICTURES
@pytest.mark.parametrize("out", ["new/a.foo", "new/a.csv", "new/a.psd", "new/a.blp"])
def test_what_is_no_picture_is_not_generated(out, script, finished, refused):
    assert ".png or .jpg is" in refused("--generate", finished / "checkpoint.pt", "--out", out)


@INFOGAN
def test_generate_with_codes(finished, refused):
    path = str(finished / "checkpoint.pt")
    infogan.main(["--generate", path, "--out", "a.png", "--category", "3", "--code", "1.5", "-0.5"])
    with Image.open("a.png") as image:
        assert image.size == (10 * 30 + 2, 10 * 30 + 2)
    assert infogan.sample(infogan.load_generator(path), 5).shape == (5, 1, 28, 28)
    assert "sizes (10,)" in refused("--generate", path, "--category", 10)
    assert "sizes (10,)" in refused("--generate", path, "--category", 1, 2)
    assert "2 continuous" in refused("--generate", path, "--code", 1)


# ------------------------------------------------------------------ kernels
def test_kernels_are_named_in_the_summary(script, finished, no_figures, monkeypatch):
    flags = small(script, finished, "--max-steps", "1")
    used = "fused" if hasattr(script, "gan_kernels") else "reference"
    script.main([*flags, "--out", "a", "--kernels", "auto"])
    assert summary("a")["kernels"] == used
    monkeypatch.setattr(script, "gan_kernels", None, raising=False)
    script.main([*flags, "--out", "b", "--kernels", "auto"])
    assert summary("b")["kernels"] == "reference"


@pytest.mark.parametrize("script", ["infogan", "wgan_gp", "oversampling", "ctgan"], indirect=True)
def test_kernels_that_are_not_installed(script, finished, refused, monkeypatch):
    monkeypatch.setattr(script, "gan_kernels", None)
    assert "gan_kernels" in refused(*small(script, finished, "--kernels", "fused"))


# ------------------------------------------------------------------ data
def load(*flags):
    return infogan.load_data(infogan.arguments().parse_args(list(map(str, flags))), "cpu")


def test_auto_takes_mnist_where_it_is():
    write_mnist("data")
    data = load()
    assert data.name == "mnist" and data.train.shape == (40, 1, 28, 28)
    assert data.train.dtype == torch.uint8 and data.test_labels.tolist() == list(range(10))


def test_auto_falls_back_to_digits_and_says_so(capsys):
    assert load().name == "digits"
    out = capsys.readouterr().out
    assert out.startswith(f"infogan: mnist can not be read from --data-dir {Path.cwd() / 'data'}: ")
    assert out.count("\n") == 1  # whatever torchvision says
    assert out.endswith("raining on scikit-learn's digits instead.\n")


def write_flat(folder):
    """Ten pictures, without classes."""
    write_images(folder)
    for path in [*Path(folder).rglob("*.png")]:
        path.rename(Path(folder, path.name))


def test_auto_takes_images_at_the_top_or_in_sub_folders():
    write_images("pictures", n=24)
    args = infogan.arguments().parse_args(["--data-dir", "pictures"])
    assert infogan.load_data(args, "cpu").classes == ["cat", "dog"] and args.dataset == "folder"
    Path("pictures/MNIST/raw").mkdir(parents=True)  # as a download that failed leaves it
    assert load("--data-dir", "pictures").name == "folder"
    write_flat("flat")
    assert load("--data-dir", "flat").classes == [""]
    Path("flat/broken.jpg").write_bytes(b"")
    with pytest.raises(infogan.UsageError, match=r"broken.jpg: .*; mend it or take it out"):
        load("--data-dir", "flat")


def test_auto_takes_no_images_beside_mnist_of_runs_hidden_deeper_or_single():
    write_mnist("both")
    write_images("both")
    assert load("--data-dir", "both").name == "mnist"
    write_flat("data/run")
    Path("data/run/metrics.csv").touch()
    Path("data/run/0.png").rename("data/grid.png")
    write_flat("data/.cache")
    write_images("data/facades/train")
    assert load().name == "digits"


def test_digits_are_the_real_ones():
    data = load("--dataset", "digits")
    assert data.train.shape == (1435, 1, 28, 28) and data.test.shape == (362, 1, 28, 28)
    assert data.train.float().std() > 50 and len(data.classes) == 10
    assert torch.bincount(data.test_labels).min() > 20


@PICTURES
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "svhn", "cifar10"])
def test_missing_data_set_is_an_error(name, script, capsys):
    error = error_of(script, capsys, "--dataset", name, "--data-dir", "nowhere", "--out", "run")
    assert f"{name} can not be read from --data-dir" in error and "nowhere" in error
    assert not Path("run").exists()


def test_network_that_never_answers_is_none(monkeypatch):
    limits = []

    def silent(*args, **kwargs):
        limits.append(socket.getdefaulttimeout())
        no_network()

    monkeypatch.setattr("urllib.request.urlopen", silent)
    assert load().name == "digits" and set(limits) == {5}


@pytest.mark.skipif("DATA_DIR" not in os.environ, reason="DATA_DIR names no folder with MNIST")
def test_real_mnist():
    data = load("--dataset", "mnist", "--data-dir", os.environ["DATA_DIR"])
    assert data.train.shape == (60000, 1, 28, 28) and data.test.shape == (10000, 1, 28, 28)
    assert torch.bincount(data.test_labels).tolist()[:3] == [980, 1135, 1032]


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize("script", ["infogan", "cgan", "dcgan", "oversampling"], indirect=True)
def test_batch_norm_needs_two_images_of_a_process(script, refused):
    assert "--batch-size 1: " in refused("--dataset", "digits", "--batch-size", 1)


@PICTURES
@pytest.mark.parametrize(
    "flags",
    [
        ["--dataset", "nothing"],
        ["--batch-size", 0],
        ["--batch-size", 5000],
        ["--batch-size", "many"],
        ["--epochs", -1],
        ["--epochs", 0],
        ["--seed", -1],
        ["--max-steps", 0],
        ["--log-every", 0],
        ["--image-size", 50],
        ["--precision", "fp8"],
        ["--unknown"],
    ],
)
def test_bad_flags(flags, script, refused):
    assert flags[0] in refused("--dataset", "digits", *flags)


@INFOGAN
@pytest.mark.parametrize(
    "flags",
    [
        ["--lr-g", "nan"],
        ["--lr-d", "-1e-3"],
        ["--lambda-categorical", "inf"],
        ["--categorical", 1],
        ["--categorical", "--continuous", 0],
        ["--noise", -1],
    ],
)
def test_bad_flags_of_infogan(flags, refused):
    assert flags[0] in refused("--dataset", "digits", *flags)


@INFOGAN
def test_what_belongs_to_generate_does_not_begin_a_training(refused):
    assert "--generate" in refused("--dataset", "digits", "--category", 3)


@PICTURES
@pytest.mark.parametrize("cut", [1, 40 * 784, 40 * 784 + 1, 40 * 784 + 10, 40 * 784 + 15])
def test_mnist_that_is_cut(cut, script, refused, capsys):
    """Within the images, before them, and anywhere in the header."""
    write_mnist("data", cut=cut)
    assert "mnist can not be read" in refused("--dataset", "mnist", "--batch-size", 4)
    assert load().name == "digits"


@PICTURES
@pytest.mark.parametrize(
    "name, header, n",
    [
        ("labels-idx1", (0x801, 10), 10),  # fewer than images
        ("labels-idx1", (0x801, 40), 40),  # of more classes than MNIST has
        ("labels-idx1", (0x803, 40, 28, 28), 40 * 784),  # they are images
        ("images-idx3", (0x803, 40, 14, 14), 40 * 196),
        ("images-idx3", (0x803, 40, 56, 56), 40 * 56**2),
        ("images-idx3", (0x703, 40, 28, 28), 40 * 784),
        ("images-idx3", (0xA03, 40, 28, 28), 40 * 784),
        ("images-idx3", (0x900, 40, 28, 28), 40 * 784),
    ],
)
def test_mnist_of_another_form(name, header, n, script, refused):
    write_mnist("data")
    head = b"".join(v.to_bytes(4, "big") for v in header)
    content = bytes(i % 40 for i in range(n))
    Path(f"data/MNIST/raw/train-{name}-ubyte").write_bytes(head + content)
    flags = ("--dataset", "mnist", "--batch-size", 4, "--max-steps", 1)
    assert "mnist can not be read" in refused(*flags)


@PICTURES
def test_folders_that_can_not_be_made(script, refused, capsys):
    Path("file").write_text("")
    assert "file/data" in refused("--dataset", "mnist", "--data-dir", "file/data")
    assert "file/run" in refused("--dataset", "digits", "--out", "file/run")
    refused("--dataset", "digits", "--data-dir", "~no-such-user/x", "--out", "file/run")


def lacking(kept):
    """Copies of a dictionary, each without one of its keys."""
    return [{key: kept[key] for key in kept if key != missing} for missing in kept]


@KINDS
@pytest.mark.parametrize("flag", ["--resume", "--generate"])
def test_bad_checkpoints(flag, script, finished, refused, capsys):
    whole = (finished / "checkpoint.pt").read_bytes()
    assert "nowhere.pt" in refused(flag, "nowhere.pt")
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        Path("cut.pt").write_bytes(whole[:length])
        assert "cut.pt is no whole checkpoint" in refused(flag, "cut.pt")
    state = checkpoint(finished)
    parts = [*lacking(state), *(state | {"config": part} for part in lacking(state["config"]))]
    other = state | {"script": "stylegan"}
    for content in ([1], {"step": 3}, *parts, other):
        torch.save(content, "other.pt")
        assert f"no whole checkpoint of {script.SCRIPT}" in refused(flag, "other.pt")
    assert "stylegan" in refused(flag, "other.pt")
    Path("lack").mkdir()
    own = [name for name in state["model"] if name.startswith("generator.")]
    name = own[0] if own else next(iter(state["model"]))
    torch.save(
        state | {"model": {k: w for k, w in state["model"].items() if k != name}},
        "lack/checkpoint.pt",
    )
    assert name.removeprefix("generator.") in error_of(script, capsys, flag, "lack/checkpoint.pt")


@pytest.mark.parametrize("flag", ["--resume", "--generate"])
def test_checkpoint_can_not_run_code(flag, script, refused):
    class Payload:
        def __reduce__(self):
            return (os.system, ("touch owned",))

    with open("evil.pt", "wb") as file:
        pickle.dump(Payload(), file, protocol=2)
    refused(flag, "evil.pt")
    torch.save({"script": script.SCRIPT, "config": Payload()}, "evil.pt")
    refused(flag, "evil.pt")


def test_cuda_without_one(script, finished, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "--device cuda" in refused(*small(script, finished, "--device", "cuda"))


def full_disk(monkeypatch, name):
    """A file of this name can not be written."""
    write = Path.write_bytes

    def full(path, content):
        if path.name == name:
            write(path, content[:10])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)


def test_files_of_other_names_are_left(script):
    Path("rows.tmp").write_text("mine")
    script.write_file(Path("rows.csv"), b"1")
    assert Path("rows.tmp").read_text() == "mine"
    script.write_file(Path("rows.tmp"), b"2")
    assert Path("rows.tmp").read_text() == "2" and len([*Path().glob("rows*")]) == 2


def test_full_disk_leaves_the_previous_checkpoint(script, finished, capsys, monkeypatch):
    shutil.copytree(finished, "run")
    full_disk(monkeypatch, "checkpoint.pt.tmp")
    error = error_of(script, capsys, "--resume", "run/checkpoint.pt", "--epochs", 13)
    assert "No space left" in error and not list(Path("run").glob("*.tmp"))
    assert Path("run/checkpoint.pt").read_bytes() == (finished / "checkpoint.pt").read_bytes()


def test_full_disk_at_the_start_leaves_no_run(script, finished, capsys, monkeypatch, no_figures):
    flags = small(script, finished, "--out", "run", "--max-steps", 1)
    with monkeypatch.context() as patch:
        full_disk(patch, "config.json.tmp")
        assert "No space left" in error_of(script, capsys, *flags)
    assert not list(Path("run").glob("*.tmp"))
    script.main(flags)  # finds room in the same folder


def hungry(*args):
    return torch.empty(2**50)


def faulty(*args):
    return torch.zeros(2) + torch.zeros(3)


def test_memory_that_does_not_suffice_is_said_with_advice(script, finished, capsys, monkeypatch):
    flags = small(script, finished, "--out", "run")
    monkeypatch.setattr(script, "train_step", hungry)
    error = error_of(script, capsys, *flags)
    assert "allocate memory" in error and "smaller --batch-size or networks" in error
    monkeypatch.setattr(script, "train_step", faulty)
    with pytest.raises(RuntimeError):  # what is a fault of ours keeps its traceback
        script.main(flags)


# ------------------------------------------------------------------ what a notebook goes on with
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_settings_of_the_process_are_as_before(error, script, finished, monkeypatch, no_figures):
    """The threads, which suit changes for points, and the limit of time to download."""
    suit, found = script.suit, []

    def changing(args, data):
        found.append(socket.getdefaulttimeout())
        torch.set_num_threads(3)
        if error:
            raise script.UsageError if error is ValueError else error
        suit(args, data)

    monkeypatch.setattr(script, "suit", changing)
    before = torch.get_num_threads(), socket.getdefaulttimeout()
    with pytest.raises(SystemExit) if error else contextlib.nullcontext():
        script.main(small(script, finished, "--out", "run", "--max-steps", 1))
    limit = None if script.SCRIPT in ("ctgan", "pix2pix") else 5  # there is nothing to download
    assert found == [limit] and (torch.get_num_threads(), socket.getdefaulttimeout()) == before


# ------------------------------------------------------------------ copied alone
ALONE = """
import json, os, runpy, sys
sys.modules["gan_kernels"] = None
for name, flags in json.loads(sys.argv[1]).items():
    os.chdir(name)
    sys.argv = [f"{name}.py", *flags]
    runpy.run_path(f"{name}.py", run_name="__main__")
    os.chdir("..")
"""


def test_scripts_alone_in_an_empty_folder():
    """Each file by itself, as someone who copies it has it: no extension, no repository."""
    common = ["--dataset", "mnist", "--max-steps", "1", "--batch-size", "8", "--out", "run"]
    own = {"infogan": ["--continuous", "0", "--categorical", "2"]}
    own |= {"dcgan": [*SMALL_NETWORKS["dcgan"], "--label"]}  # which has no SVM to measure
    for name in ALL:
        write_mnist(f"{name}/data", train=80, test=20)
        write_table(f"{name}/table.csv")
        write_pairs(f"{name}/data")
        shutil.copy(ROOT / f"{name}.py", name)
    flags = {name: [*common, *own.get(name, SMALL_NETWORKS[name])] for name in ALL}
    command = [sys.executable, "-I", "-c", ALONE, json.dumps(flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ALL:
        assert summary(f"{name}/run")["kernels"] == "reference"
