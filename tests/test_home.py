"""At home everywhere: other people's folders, pictures, streams and notebooks.

Threads, moved data, small sets: test_runs.py; evaluate.py's streams and names: test_evaluate.py.
"""

import argparse
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_of, files, shrink, without_method
from PIL import Image

import cgan
import evaluate
import infogan
import wgan_gp
from tools.sync_shared import ROOT

QUICK = ["--max-steps", "1", "--batch-size", "4", "--device", "cpu"]


def write_pictures(folder, n=5, classes=("cat", "dog")):
    rng = np.random.default_rng(0)
    for name in classes:
        (Path(folder) / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(folder) / name / f"{i}.png")


def load(folder, size=32):
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--image-size", str(size)]
    return infogan.load_data(infogan.arguments().parse_args(flags), "cpu")


def count(data):
    return len(data.train) + len(data.test)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def run(monkeypatch):
    """A run on a folder of pictures that measures and trains nothing."""
    without_method(infogan, patch=monkeypatch.setattr)
    shrink(infogan, monkeypatch.setattr)
    return lambda folder, *flags: infogan.main(
        [*QUICK, "--dataset", "folder", "--data-dir", folder, *flags]
    )


@pytest.fixture
def refused(capsys):
    """The message of a run on a folder of pictures that must end with exit code 2."""
    return lambda folder: error_of(
        infogan, capsys, *QUICK, "--dataset", "folder", "--data-dir", folder
    )


# ------------------------------------------------------------------ what counts as a picture
@pytest.mark.parametrize(
    "junk",
    [
        "cat/._0.png",  # macOS's, on a disk that is not its own
        "__MACOSX/cat/._0.png",  # and in a zip file
        ".ipynb_checkpoints/0.png",
        "cat/.ipynb_checkpoints/0.png",
        "cat/notes.txt",
        "notes/readme.md",
        "cat/Thumbs.db",
    ],
)
def test_what_is_no_picture_is_not_taken_for_one(junk):
    write_pictures("pictures")
    path = Path("pictures", junk)
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("no picture")
    data = load("pictures")
    assert data.classes == ["cat", "dog"] and count(data) == 10


def test_folder_with_the_name_of_a_picture():
    write_pictures("pictures")
    Path("pictures/cat/p1.png").mkdir()
    Path("pictures/p2.png").mkdir()
    data = load("pictures")
    assert data.classes == ["cat", "dog"] and count(data) == 10


def test_class_folders_may_be_links():
    write_pictures("pictures")
    write_pictures("elsewhere", classes=["bird"])
    Path("pictures/bird").symlink_to(Path("elsewhere/bird").absolute())
    Path("link").symlink_to("pictures")
    data = load("link")
    assert data.classes == ["bird", "cat", "dog"] and count(data) == 15


@pytest.mark.parametrize("links", [["again"], ["cat/up"], ["again", "cat/up", "dog/up"]])
def test_links_that_lead_back_multiply_no_picture(links):
    """Of several ways around one would make paths without end."""
    write_pictures("pictures")
    for link in links:
        Path("pictures", link).symlink_to(".." if "/" in link else ".")
    data = load("pictures")
    assert data.classes == ["cat", "dog"] and count(data) == 10


def test_pictures_of_runs_are_no_data(run):
    """--data-dir . twice, so that runs/ is there; and a run whose folder is among the data."""
    write_pictures(".")
    for _ in range(2):
        run(".")
    run(".", "--out", "cat/run")
    assert len(names("runs")) == 2 and "0000001.png" in names("cat/run/samples")
    data = load(".")
    assert data.classes == ["cat", "dog"] and count(data) == 10


@pytest.mark.parametrize("link", [False, True])
def test_out_is_not_the_folder_of_pictures(link, run, capsys):
    write_pictures("pictures")
    out = "link" if link else "pictures/../pictures"
    Path("link").symlink_to("pictures")
    before = files()
    with pytest.raises(SystemExit) as stop:
        run("pictures", "--out", out)
    assert stop.value.code == 2 and "--out" in capsys.readouterr().err and files() == before


@pytest.mark.parametrize("extension", infogan.IMG_EXTENSIONS)
def test_every_extension_is_found_in_both_cases(extension):
    Path("pictures").mkdir()
    for name in ("a" + extension, "b" + extension.upper()):
        Image.new("RGB", (32, 32)).save(f"pictures/{name}", "png")
    assert count(load("pictures")) == 2


def test_folder_that_is_none_is_told_apart_from_one_without_pictures(refused):
    Path("file").write_text("text")
    with zipfile.ZipFile("pictures.zip", "w") as file:
        file.writestr("cat/0.png", b"")
    for name, reason in (("nowhere", "No such"), ("file", "Not a"), ("pictures.zip", "Not a")):
        error = refused(name)
        assert name in error and reason in error
    Path("documents").mkdir()
    Path("documents/0.heic").write_text("another format")
    error = refused("documents")
    assert "documents" in error and "no two images" in error and ".jpg .jpeg .png" in error
    assert names(".") == ["documents", "file", "pictures.zip"]


def test_tilde_is_the_home_folder(run, refused, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    error = refused("~/x")
    assert str(tmp_path / "home" / "x") in error and "No such file or directory" in error
    write_pictures("home/x")
    run("~/x", "--out", "run")
    config = json.loads(Path("run/config.json").read_text())
    assert config["data_dir"] == str(tmp_path / "home" / "x")
    assert not Path("~").exists()


# ------------------------------------------------------------------ values
@pytest.mark.parametrize("values", [np.float32, np.int32])
def test_pictures_of_32_bits_are_refused_by_name(values, refused):
    write_pictures("pictures")
    Image.fromarray(np.ones((32, 32), dtype=values)).save("pictures/dog/deep.tif")
    error = refused("pictures")
    assert os.path.join("dog", "deep.tif") in error and "8 or 16 bits" in error


def test_8_bits_in_16_are_refused_by_name_and_black_is_not(refused):
    write_pictures("pictures")
    Image.fromarray(np.full((32, 32), 0, dtype=np.uint16)).save("pictures/dog/black.png")
    load("pictures")
    Image.fromarray(np.full((32, 32), 255, dtype=np.uint16)).save("pictures/dog/deep.png")
    assert os.path.join("dog", "deep.png") in refused("pictures")


def test_damaged_picture_is_refused_by_name(refused):
    write_pictures("pictures")
    Path("pictures/dog/x.jpg").write_text("not an image")
    error = refused("pictures")
    assert os.path.join("dog", "x.jpg") in error


@pytest.mark.parametrize("order, name", [("<", "x.png"), ("<", "x.tif"), (">", "x.tif")])
@pytest.mark.parametrize("size", [28, 32])
def test_pictures_of_16_bits_are_scaled(order, name, size):
    Path("pictures").mkdir()
    for i, grey in enumerate((40, 40, 200)):
        pixels = np.full((size, size), grey * 257, dtype=f"{order}u2")
        Image.fromarray(pixels).save(f"pictures/{i}{name}")
    data = load("pictures", size)
    assert data.train[0].unique().tolist() == [40] and data.train[1].unique().tolist() == [200]


def test_what_is_transparent_is_white():
    Path("pictures").mkdir()
    clear, size = {}, (32, 32)
    clear["rgba"] = Image.new("RGBA", size, (0, 0, 0, 0))
    clear["la"] = Image.new("LA", size, (0, 0))
    clear["p"] = Image.new("P", size, 3)
    clear["p"].putpalette([0, 0, 0] * 8)
    clear["rgb"], clear["l"] = Image.new("RGB", size, (1, 2, 3)), Image.new("L", size, 9)
    info = {"p": {"transparency": 3}, "rgb": {"transparency": (1, 2, 3)}, "l": {"transparency": 9}}
    for name, image in clear.items():
        image.paste(255 if image.mode == "L" else image.getpixel((0, 0)), (0, 0, 1, 1))
        image.save(f"pictures/{name}.png", **info.get(name, {}))
    half = Image.new("RGBA", size, (255, 0, 0, 128))
    half.save("pictures/x_half.png")
    data = load("pictures")
    pictures = torch.cat([data.train, data.test]).float()
    means = sorted(pictures.mean(dim=(2, 3)).round().tolist())
    assert means == [[255, 127, 127], *[[255] * 3] * 5]
    Path("pictures/x_half.png").unlink()
    grey = load("pictures", 28)
    assert torch.cat([grey.train, grey.test]).unique().tolist() == [255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGB"])
def test_other_modes_are_read(mode):
    Path("pictures").mkdir()
    for i in range(2):
        picture = Image.new("RGB", (40, 30), "white").convert(mode)
        picture.save(f"pictures/{i}.{'jpg' if mode in ('CMYK', 'YCbCr') else 'png'}")
    assert load("pictures").train.min() >= 254


# ------------------------------------------------------------------ held-out images
def test_a_fifth_of_each_class_is_held_out_and_never_all_of_it(monkeypatch):
    sizes = [1, 2, 5, 11, 100]
    labels = torch.arange(5).repeat_interleave(torch.tensor(sizes))
    mixed = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    for given in (labels, mixed):
        made = list("abcde"), torch.arange(len(given)), given
        monkeypatch.setitem(infogan.SETS, "made", lambda made=made: made)
        args = argparse.Namespace(dataset="made", data_dir="data")
        _, _, images, kept, test_images, held = infogan.load_data(args, "cpu")
        assert torch.bincount(held, minlength=5).tolist() == [0, 1, 1, 2, 20]
        assert torch.bincount(kept, minlength=5).tolist() == [1, 1, 4, 9, 80]
        assert sorted([*images.tolist(), *test_images.tolist()]) == list(range(len(given)))
        assert torch.equal(given[images], kept) and torch.equal(given[test_images], held)


def test_class_of_one_picture_trains_and_classes_of_one_alone_are_refused(refused):
    write_pictures("pictures", 4)
    write_pictures("pictures", 1, ["rare"])
    data = load("pictures")
    assert data.classes == ["cat", "dog", "rare"]
    assert 2 in data.train_labels and 2 not in data.test_labels
    write_pictures("ones", 1)
    error = refused("ones")
    assert "no two images of a class" in error


# ------------------------------------------------------------------ streams and notebooks
def command(*flags):
    return [sys.executable, ROOT / "gan.py", *QUICK, "--dataset", "1d", *flags]


def test_code_page_without_the_letters_and_a_notebooks_back_end():
    """Standard output of a western code page, and MPLBACKEND as `!python` passes it on."""
    strange = {"PYTHONIOENCODING": "cp1252", "MPLBACKEND": "nowhere"}
    done = subprocess.run(command("--out", "猫"), capture_output=True, env=os.environ | strange)
    assert done.returncode == 0, done.stderr
    assert {"summary.json", "figure1.png"} <= {*names("猫")} and b"\\u732b" in done.stdout


def test_both_streams_are_closed():
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command("--out", "run")]
    assert subprocess.run(closed).returncode == 0 and "summary.json" in names("run")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_one_stream_is_missing(stream, run, monkeypatch):
    write_pictures("pictures")
    monkeypatch.setattr(sys, stream, None)
    run("pictures", "--out", "run")
    assert "summary.json" in names("run")
    with pytest.raises(SystemExit) as stop:  # it holds a run
        run("pictures", "--out", "run")
    assert stop.value.code == 2


# ------------------------------------------------------------------ busy machines, others' folders
def test_networks_that_gain_nothing_from_a_second_thread_take_one():
    def threads(*flags):
        args = wgan_gp.arguments().parse_args(flags)
        torch.set_num_threads(2)
        wgan_gp.suit(args, wgan_gp.load_data(args, "cpu"))
        return torch.get_num_threads()

    before = torch.get_num_threads()
    try:
        assert threads("--dataset", "8gaussians") == threads("--dataset", "swissroll") == 1
        assert threads("--dataset", "digits") == 2
    finally:
        torch.set_num_threads(before)


def test_nothing_is_written_among_the_pictures(monkeypatch):
    """Neither by a run, its classifier trained and used, nor by evaluate.py."""
    write_pictures("pictures", 50)
    before = files("pictures")
    monkeypatch.setattr(cgan, "SAMPLES", 20)
    for script in (cgan, evaluate):
        monkeypatch.setattr(script.train_classifier, "__defaults__", (0, 2, 16))
    flags = ["--dataset", "folder", "--data-dir", "pictures", "--network", "mlp", "--out", "run"]
    cgan.main([*QUICK, *flags])
    evaluate.main(["run/checkpoint.pt", "--device", "cpu"])
    assert files("pictures") == before
    assert names(".") == ["pictures", "run", "scores.csv", "scores.png"]
