"""Whole runs through main([...]): what they leave, resume, data sets, every bad input."""

import csv
import functools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cgan
import infogan
import wgan_gp

ROOT = Path(__file__).parent.parent
QUICK = ["--dataset", "digits", "--batch-size", "32", "--device", "cpu", "--kernels", "reference"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test in a folder of its own, with no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(infogan.urllib.request, "urlopen", no_network)


def no_network(*args, **kwargs):
    raise OSError("no network in tests")


def run(*flags):
    infogan.main([*QUICK, *map(str, flags)])


def error_of(script, capsys, *flags):
    """The one line on stderr of a call that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"{script.SCRIPT}: error: ")
    return error


def files(folder="."):
    """All below the folder, and when it was last written to."""
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


def refused_by(script, capsys, *flags):
    """The line of error_of, from a call that must leave every file as it is."""
    before = files()
    error = error_of(script, capsys, *flags)
    assert files() == before
    return error


@pytest.fixture
def refused(script, capsys):
    return functools.partial(refused_by, script, capsys)


def rows(folder):
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Whether two nested structures of tensors are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def weights(folder):
    state = checkpoint(folder)
    parts = ("generator", "discriminator", "optimizer_g", "optimizer_d", "rng", "step", "losses")
    return {name: state[name] for name in parts}


SMALL = ["--dataset", "mnist", "--batch-size", "8", "--epochs", "2", "--log-every", "4"]
SMALL += ["--device", "cpu", "--kernels", "reference"]
SCRIPTS = {  # with flags for networks that are small, and another model's
    infogan: ([], {"categorical": [7]}),
    cgan: (["--network", "mlp"], {"network": "conv"}),
    wgan_gp: (["--dim", "4", "--n-critic", "1"], {"dim": 8}),
}


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda script: script.__name__)
def script(request):
    """Each test that asks for it, or for a finished run, runs on every script."""
    return request.param


INFOGAN = pytest.mark.parametrize("script", [infogan], ids=["infogan"], indirect=True)


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    """A run of two epochs of ten updates on made MNIST files, with a row every four updates."""
    run = tmp_path_factory.mktemp("finished") / "run"
    write_mnist(run.parent / "data", train=80, test=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cgan, "SAMPLES", 200)
        script.main(small(script, run, "--out", run))
    return run


def small(script, finished, *flags):
    """The arguments of the same run with other flags."""
    data = ("--data-dir", finished.parent / "data")
    return [str(flag) for flag in (*SMALL, *SCRIPTS[script][0], *data, *flags)]


# ------------------------------------------------------------------ what a run leaves
@INFOGAN
def test_run_folder(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "samples", "codes.png", "curves.png", "metrics.csv", "config.json", "summary.json",
        "checkpoint.pt",
    }  # fmt: skip
    assert sorted(p.name for p in (finished / "samples").iterdir()) == [
        "0000010.png",
        "0000020.png",
    ]
    for picture in finished.rglob("*.png"):
        with Image.open(picture) as image:
            assert np.asarray(image).std() > 1  # not blank


@INFOGAN
def test_metrics(finished):
    header = (finished / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,epoch,seconds,loss_d,loss_g,mi_categorical,mi_continuous,accuracy"
    table = rows(finished)
    assert [int(row["step"]) for row in table] == [4, 8, 10, 12, 16, 20]
    assert [int(row["epoch"]) for row in table] == [1, 1, 1, 2, 2, 2]
    assert [bool(row["accuracy"]) for row in table] == [False, False, True, False, False, True]
    seconds = [float(row["seconds"]) for row in table]
    assert seconds == sorted(seconds) and seconds[0] > 0


@INFOGAN
def test_summary(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["script"] == "infogan" and summary["dataset"] == "mnist"
    assert summary["seed"] == 0 and summary["device"] == "cpu" and summary["steps"] == 20
    assert summary["kernels"] == "reference"
    assert summary["seconds"] > 0 and summary["images_per_second"] > 0
    assert math.isclose(summary["mi_categorical_max"], math.log(10))
    assert summary["mi_categorical"] <= summary["mi_categorical_max"]
    assert summary["mi_continuous_max"] is None
    assert summary["accuracy"] == pytest.approx(float(rows(finished)[-1]["accuracy"]), abs=1e-5)
    assert len(summary["codes"]) == 2
    for effect in summary["codes"]:
        assert effect.keys() == {"slant", "width", "thickness"}
        assert all(-1 <= rho <= 1 for rho in effect.values())


@INFOGAN
def test_config(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["categorical"] == [10] and config["batch_size"] == 8


def test_default_folder_names_script_and_data_set():
    run("--max-steps", 1)
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("infogan-digits-2")


def test_other_latent_specifications():
    run("--max-steps", 2, "--out", "a", "--categorical", 3, 4, "--continuous", 3, "--noise", 7)
    summary = json.loads(Path("a/summary.json").read_text())
    assert math.isclose(summary["mi_categorical_max"], math.log(12)) and len(summary["codes"]) == 3
    assert summary["accuracy"] is None
    run("--max-steps", 2, "--out", "b", "--categorical", "--noise", 0)
    assert json.loads(Path("b/summary.json").read_text())["mi_categorical"] == 0
    run("--max-steps", 2, "--out", "c", "--continuous", 0, "--unit-variance")
    assert json.loads(Path("c/summary.json").read_text())["codes"] == []


# ------------------------------------------------------------------ the paper's claim, in small
def test_codes_are_learned_and_the_baseline_does_not_learn_them():
    flags = ("--max-steps", 150, "--out")
    run(*flags, "info")
    run(*flags, "base", "--baseline")
    info, base = (json.loads(Path(f, "summary.json").read_text()) for f in ("info", "base"))
    assert info["mi_categorical"] > 1.0
    assert base["mi_categorical"] < 0.5


# ------------------------------------------------------------------ resume
@INFOGAN
@pytest.mark.parametrize("stop", [3, 4, 7, 10, 13])
def test_resume_equals_uninterrupted(finished, stop, capsys):
    """Stopped before a log line, on one, in mid-epoch, on an epoch's end and after it."""
    infogan.main(small(infogan, finished, "--out", "run", "--max-steps", stop))
    assert int(rows("run")[-1]["step"]) == stop
    infogan.main(["--resume", "run/checkpoint.pt", "--max-steps", "1000"])
    assert same(weights("run"), weights(finished))
    untimed = [[v for k, v in row.items() if k != "seconds"] for row in rows("run")]
    assert untimed == [[v for k, v in row.items() if k != "seconds"] for row in rows(finished)]
    summaries = [json.loads((Path(f) / "summary.json").read_text()) for f in ("run", finished)]
    for summary in summaries:
        del summary["seconds"], summary["images_per_second"]
    assert summaries[0] == summaries[1]


def test_finished_run_is_said_to_be_finished(script, finished, capsys):
    before = files(finished)
    script.main(["--resume", str(finished / "checkpoint.pt")])
    assert "is finished; a larger --epochs extends it" in capsys.readouterr().out
    assert before == files(finished)


@INFOGAN
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_says_how_to_go_on(finished, number, code, capsys, monkeypatch):
    step = infogan.train_step

    def interrupted(model, data, index):
        interrupted.calls += 1
        if interrupted.calls == 7:
            os.kill(os.getpid(), number)
        return step(model, data, index)

    interrupted.calls = 0
    monkeypatch.setattr(infogan, "train_step", interrupted)
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        infogan.main(small(infogan, finished, "--out", "run"))
    assert stop.value.code == code and signal.getsignal(number) is handler
    assert "--resume run/checkpoint.pt" in capsys.readouterr().err
    assert checkpoint("run")["step"] == 7 and not Path("run/summary.json").exists()
    monkeypatch.setattr(infogan, "train_step", step)
    infogan.main(["--resume", "run/checkpoint.pt"])
    assert same(weights("run"), weights(finished))


@INFOGAN
def test_resume_refuses_other_flags(finished, refused):
    path = finished / "checkpoint.pt"
    error = refused("--resume", path, "--categorical", 5)
    assert "--categorical [5]" in error and "[10]" in error
    assert "--seed 3" in refused("--resume", path, "--seed", 3)
    assert "--out" in refused("--resume", path, "--out", "elsewhere")


@INFOGAN
def test_resume_of_a_copy_leaves_the_later_checkpoint_alone(finished, refused):
    shutil.copytree(finished, "run")
    Path("run/best.pt").write_bytes(Path("run/checkpoint.pt").read_bytes())
    assert "folder of its own" in refused("--resume", "run/best.pt", "--epochs", 50)


@INFOGAN
def test_limit_that_ends_a_run_is_named(finished, capsys):
    infogan.main(small(infogan, finished, "--out", "run", "--max-steps", "2"))
    infogan.main(["--resume", "run/checkpoint.pt", "--epochs", "9"])
    assert "a larger --max-steps extends it" in capsys.readouterr().out


@INFOGAN
def test_runs_begun_in_the_same_second_have_folders_of_their_own(finished):
    for _ in range(2):
        infogan.main(small(infogan, finished, "--max-steps", "1"))
    assert len(list(Path("runs").iterdir())) == 2


@INFOGAN
def test_folder_that_came_to_hold_a_run_meanwhile(finished):
    args = infogan.arguments().parse_args(small(infogan, finished, "--out", "run"))
    run = infogan.Run(args)
    shutil.copytree(finished, "run", dirs_exist_ok=True)
    before = files("run")
    with pytest.raises(infogan.UsageError, match="holds a run"):
        run.train()
    assert before == files("run")


# ------------------------------------------------------------------ drawing from a trained model
@INFOGAN
def test_generate(finished, refused):
    path = str(finished / "checkpoint.pt")
    infogan.main(["--generate", path, "--out", "a.png", "--category", "3", "--code", "1.5", "-0.5"])
    with Image.open("a.png") as image:
        assert image.size == (10 * 30 + 2, 10 * 30 + 2)
    generator = infogan.load_generator(path)
    assert not generator.training
    assert infogan.sample(generator, 5).shape == (5, 1, 28, 28)
    assert "sizes (10,)" in refused("--generate", path, "--category", 10)
    assert "sizes (10,)" in refused("--generate", path, "--category", 1, 2)
    assert "2 continuous" in refused("--generate", path, "--code", 1)
    for name in ("picture", "picture.psd"):
        assert "grid.png" in refused("--generate", path, "--out", name)


# ------------------------------------------------------------------ kernels
def write_kernels(monkeypatch, text):
    Path("gan_kernels.py").write_text(text)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.setitem(sys.modules, "gan_kernels", None)  # so that it is put back afterwards
    del sys.modules["gan_kernels"]


WORKING = "from infogan import info_loss_reference as info_loss"


def test_installed_kernel_is_used_and_named(monkeypatch, capsys):
    write_kernels(monkeypatch, WORKING)
    flags = ["--dataset", "digits", "--batch-size", "16", "--max-steps", "1", "--device", "cpu"]
    infogan.main([*flags, "--out", "a"])
    assert "fused kernels" in capsys.readouterr().out
    assert json.loads(Path("a/summary.json").read_text())["kernels"] == "fused"
    infogan.main([*flags, "--out", "b", "--kernels", "reference"])
    assert json.loads(Path("b/summary.json").read_text())["kernels"] == "reference"


@INFOGAN
def test_broken_kernel_is_said(monkeypatch, refused, capsys):
    write_kernels(monkeypatch, "raise ImportError('undefined symbol: x')")
    flags = ["--dataset", "digits", "--batch-size", "16", "--max-steps", "1", "--device", "cpu"]
    infogan.main([*flags, "--out", "a"])
    assert "undefined symbol: x" in capsys.readouterr().err
    assert json.loads(Path("a/summary.json").read_text())["kernels"] == "reference"
    assert "undefined symbol" in refused(*flags, "--kernels", "fused")


def test_kernels_without_cuda_are_not_used_there(monkeypatch, capsys):
    write_kernels(monkeypatch, f"{WORKING}\nhas_cuda = False")
    name, reference = "info_loss", infogan.info_loss_reference
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert infogan.choose_kernel("auto", name, reference, cpu)[1] == "fused"
    assert infogan.choose_kernel("auto", name, reference, cuda) == (reference, "reference")
    assert "built without CUDA" in capsys.readouterr().err
    with pytest.raises(infogan.UsageError, match="built without CUDA"):
        infogan.choose_kernel("fused", name, reference, cuda)


# ------------------------------------------------------------------ data
def write_mnist(folder, train=40, test=10, cut=0):
    """Files in MNIST's own format: big-endian header, then bytes."""
    raw = Path(folder) / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, n in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8).tobytes()
        head = b"".join(v.to_bytes(4, "big") for v in (0x803, n, 28, 28))
        content = head + images
        content = content[: len(content) - cut] if name == "train" else content
        (raw / f"{name}-images-idx3-ubyte").write_bytes(content)
        labels = (np.arange(n) % 10).astype(np.uint8).tobytes()
        head = b"".join(v.to_bytes(4, "big") for v in (0x801, n))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(head + labels)
    return folder


def load(*flags):
    return infogan.load_data(infogan.arguments().parse_args(list(map(str, flags))), "cpu")


def test_auto_takes_mnist_where_it_is():
    write_mnist("data")
    data = load("--batch-size", 8)
    assert data.name == "mnist" and data.train.shape == (40, 1, 28, 28)
    assert data.train.dtype == torch.uint8 and data.test_labels.tolist() == list(range(10))


def test_auto_falls_back_to_digits_and_says_so(capsys):
    data = load()
    assert data.name == "digits"
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "mnist" in out and "digits" in out and "MNIST/raw" in out
    assert not Path("data").exists()


@INFOGAN
def test_run_begun_with_auto_is_not_resumed_on_another_set(refused):
    write_mnist("data")
    infogan.main(["--batch-size", "8", "--max-steps", "1", "--out", "run", "--device", "cpu"])
    shutil.rmtree("data")
    assert "mnist is not in data" in refused("--resume", "run/checkpoint.pt")


def test_digits_are_the_real_ones():
    data = load("--dataset", "digits")
    assert data.train.shape == (1437, 1, 28, 28) and data.test.shape == (360, 1, 28, 28)
    assert data.train.float().std() > 50 and len(data.classes) == 10
    assert torch.bincount(data.test_labels).min() > 20


def test_silent_network_is_noticed_in_ten_seconds(monkeypatch, capsys):
    monkeypatch.setattr(
        infogan.urllib.request, "urlopen", lambda *a, **k: threading.Event().wait(60)
    )
    started = infogan.time.monotonic()
    assert load().name == "digits"
    assert infogan.time.monotonic() - started < 10


def write_images(folder, n=10, size=(40, 30)):
    rng = np.random.default_rng(0)
    for i in range(n):
        path = Path(folder) / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def test_folder_of_images():
    write_images("pictures")
    Path("pictures/cat/notes.txt").write_text("not an image")
    data = load("--dataset", "folder", "--data-dir", "pictures", "--batch-size", 2)
    assert data.classes == ["cat", "dog"]
    assert data.train.shape == (8, 3, 32, 32) and data.test.shape == (2, 3, 32, 32)
    assert sorted([*data.train_labels.tolist(), *data.test_labels.tolist()]) == [0] * 5 + [1] * 5
    grey = load(
        "--dataset", "folder", "--data-dir", "pictures", "--image-size", 28, "--batch-size", 2
    )
    assert grey.train.shape == (8, 1, 28, 28)


def test_pictures_on_their_side_and_of_16_bits():
    Path("pictures").mkdir()
    half = np.repeat([[0, 255]], 30, axis=0).repeat(15, axis=1).astype(np.uint8)  # right half white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown a quarter clockwise
    for i in range(3):
        Image.fromarray(half).save(f"pictures/{i}.png", exif=exif)
    Image.fromarray(np.full((30, 30), 40 * 256, dtype=np.uint16)).save("pictures/x.png")
    data = load("--dataset", "folder", "--data-dir", "pictures", "--batch-size", 2)
    turned, grey = data.train[0, 0].float(), data.train[-1, 0]
    assert turned[:10].mean() < 5 and turned[-10:].mean() > 250
    assert (grey == 40).all()


def test_colour_run():
    write_images("pictures", n=24)
    flags = ["--dataset", "folder", "--data-dir", "pictures", "--batch-size", "8"]
    infogan.main(
        [*flags, "--max-steps", "2", "--categorical", "2", "--out", "run", "--device", "cpu"]
    )
    assert json.loads(Path("run/summary.json").read_text())["accuracy"] is not None


@pytest.mark.skipif("DATA_DIR" not in os.environ, reason="DATA_DIR names no folder with MNIST")
def test_real_mnist():
    data = load("--dataset", "mnist", "--data-dir", os.environ["DATA_DIR"])
    assert data.train.shape == (60000, 1, 28, 28) and data.test.shape == (10000, 1, 28, 28)
    assert torch.bincount(data.test_labels).tolist()[:3] == [980, 1135, 1032]


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    "flags",
    [
        ["--dataset", "nothing"],
        ["--batch-size", 0],
        ["--batch-size", 1],
        ["--batch-size", 5000],
        ["--batch-size", "many"],
        ["--epochs", -1],
        ["--epochs", 0],
        ["--seed", -1],
        ["--max-steps", 0],
        ["--log-every", 0],
        ["--image-size", 48],
        ["--image-size", 32],
        ["--unknown"],
    ],
)
def test_bad_flags(flags, refused):
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


@pytest.mark.parametrize("script", [infogan, wgan_gp], ids=lambda s: s.__name__, indirect=True)
def test_kernels_that_are_not_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "gan_kernels", None)
    monkeypatch.setattr(infogan.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in refused("--dataset", "digits", "--kernels", "fused")


def test_missing_data_set_is_an_error(refused):
    for name in ("mnist", "fashion-mnist", "svhn", "cifar10"):
        assert f"{name} is not in data" in refused("--dataset", name)


@pytest.mark.parametrize("cut", [1, 40 * 28 * 28, 40 * 28 * 28 + 10])
def test_truncated_mnist(cut, refused):
    write_mnist("data", cut=cut)
    assert "mnist in data" in refused("--dataset", "mnist", "--batch-size", 4)
    assert "mnist in data" in refused("--batch-size", 4)


@pytest.mark.parametrize("n", [10, 40])
def test_labels_that_are_of_other_images(n, refused):
    """Fewer than there are images, and of more classes than MNIST has."""
    write_mnist("data")
    head = b"".join(v.to_bytes(4, "big") for v in (0x801, n))
    Path("data/MNIST/raw/train-labels-idx1-ubyte").write_bytes(head + bytes(range(n)))
    assert "mnist in data" in refused("--batch-size", 4)


@pytest.mark.parametrize("size", [14, 56])
def test_mnist_of_another_size(size, refused):
    write_mnist("data")
    head = b"".join(v.to_bytes(4, "big") for v in (0x803, 40, size, size))
    images = Path("data/MNIST/raw/train-images-idx3-ubyte")
    images.write_bytes(head + bytes(40 * size * size))
    assert "mnist in data" in refused("--batch-size", 4)


def test_files_that_are_no_images(refused):
    write_images("pictures")
    Path("pictures/dog/x.jpg").write_text("not an image")
    assert "x.jpg" in refused("--dataset", "folder", "--data-dir", "pictures", "--batch-size", 2)
    Path("empty").mkdir()
    for name in ("empty", "nowhere"):
        assert name in refused("--dataset", "folder", "--data-dir", name)


def test_data_dir_that_can_not_be_written(refused):
    Path("file").write_text("")
    assert "can not be written" in refused("--dataset", "mnist", "--data-dir", "file/data")


def test_folder_that_holds_a_run(finished, refused):
    """The run, and what is left of it with a checkpoint alone."""
    for ignored in ((), ("*.json", "*.csv", "*.png")):
        shutil.copytree(finished, "kept", ignore=shutil.ignore_patterns(*ignored))
        assert "holds a run" in refused("--dataset", "digits", "--out", "kept")
        shutil.rmtree("kept")


def test_run_is_not_resumed_on_other_data(finished, refused):
    write_mnist("other", train=88, test=20)
    state = checkpoint(finished)
    state["config"]["data_dir"] = "other"
    torch.save(state, "checkpoint.pt")
    assert "the data have changed" in refused("--resume", "checkpoint.pt")


@INFOGAN
def test_not_enough_memory_is_said(refused):
    assert "memory" in refused("--dataset", "digits", "--categorical", *["10000"] * 3000)


@pytest.mark.parametrize("flag", ["--resume", "--generate"])
def test_bad_checkpoints(flag, script, finished, refused):
    whole = (finished / "checkpoint.pt").read_bytes()
    assert "no checkpoint" in refused(flag, "nowhere.pt")
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        Path("cut.pt").write_bytes(whole[:length])
        assert "not a whole checkpoint" in refused(flag, "cut.pt")
    torch.save([1], "list.pt")
    assert "not a whole checkpoint" in refused(flag, "list.pt")
    torch.save({"script": script.SCRIPT, "step": 3}, "part.pt")
    assert "it lacks classes, config" in refused(flag, "part.pt")
    state = checkpoint(finished)
    del state["config"]["precision"]
    torch.save(state, "older.pt")
    assert "it lacks precision" in refused(flag, "older.pt")
    torch.save({"script": "dcgan"}, "other.pt")
    assert f"a checkpoint of dcgan, not of {script.SCRIPT}" in refused(flag, "other.pt")
    state = checkpoint(finished)
    state["config"] |= SCRIPTS[script][1]
    torch.save(state, "checkpoint.pt")
    assert "is of another model" in refused(flag, "checkpoint.pt")


def test_checkpoint_can_not_run_code(refused):
    class Payload:
        def __reduce__(self):
            return (os.system, ("touch owned",))

    with open("evil.pt", "wb") as file:
        pickle.dump(Payload(), file)
    refused("--resume", "evil.pt")


def test_cuda_without_one(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cpu" in refused("--dataset", "digits", "--device", "cuda")


def test_nan_before_there_is_a_checkpoint(script, finished, capsys, monkeypatch):
    step = script.train_step
    monkeypatch.setattr(script, "train_step", lambda *args: step(*args) * math.inf)
    error = error_of(script, capsys, *small(script, finished, "--out", "run"))
    assert "nan or infinite at update 1;" in error and "start again" in error
    assert not Path("run/checkpoint.pt").exists() and rows("run") == []


@pytest.mark.parametrize(
    "last, first_bad, what", [(24, 21, "loss"), (23, 22, "loss"), (21, 21, "weight")]
)
def test_nan_stops_the_run_and_names_the_first_bad_step(
    script, finished, last, first_bad, what, capsys, monkeypatch
):
    """At a log line, at a save, and before a loss shows it; the last good checkpoint stays."""
    shutil.copytree(finished, "run")
    step, updates = script.train_step, iter(range(21, 25))

    def spoiled(model, *args):
        losses, bad = step(model, *args), next(updates) == first_bad
        if bad and what == "weight":
            next(model.generator.parameters()).data.fill_(math.nan)
        return losses * math.nan if bad and what == "loss" else losses

    monkeypatch.setattr(script, "train_step", spoiled)
    flags = ("--resume", "run/checkpoint.pt", "--epochs", 3, "--max-steps", last)
    error = error_of(script, capsys, *flags)
    assert f"nan or infinite at update {first_bad};" in error
    assert "run/checkpoint.pt is the last good state" in error
    assert same(checkpoint("run"), checkpoint(finished))


def test_full_disk_leaves_the_previous_checkpoint(script, finished, capsys, monkeypatch):
    shutil.copytree(finished, "run")
    before = files("run")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.os, "fsync", full)
    flags = ("--resume", "run/checkpoint.pt", "--epochs", 3, "--max-steps", 22)
    assert "No space left" in error_of(script, capsys, *flags)
    assert files("run").items() <= before.items() and Path("run/checkpoint.pt").exists()


@INFOGAN
def test_full_disk_at_the_start_leaves_no_run(script, finished, capsys, monkeypatch):
    flags = small(script, finished, "--out", "run", "--max-steps", 1)
    with monkeypatch.context() as patch:
        patch.setattr(script, "write_rows", lambda *_: Path("nowhere/metrics.csv").write_bytes(b""))
        assert "No such file" in error_of(script, capsys, *flags)
    script.main(flags)  # finds room in the same folder


# ------------------------------------------------------------------ copied alone
def test_script_alone_in_an_empty_folder():
    """The file by itself, as someone who copies it has it: no extension, no repository."""
    shutil.copy(ROOT / "infogan.py", "infogan.py")
    hide = "import sys, runpy; sys.modules['gan_kernels'] = None; sys.argv[0] = 'infogan.py'; "
    command = [
        sys.executable,
        "-I",
        "-c",
        hide + "runpy.run_path('infogan.py', run_name='__main__')",
    ]
    flags = ["--dataset", "digits", "--max-steps", "1", "--batch-size", "8", "--out", "run"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("run/summary.json").read_text())["kernels"] == "reference"
