"""evaluate.py: every measure against a closed form, and whole tables."""

import csv
import functools
import importlib
import io
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import SMALL_NETWORKS, refused_by, without_method, write_images
from PIL import Image

import evaluate
from tools.sync_shared import ROOT


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    torch.manual_seed(0)
    brief = functools.partial(evaluate.train_classifier, epochs=0, least=10)
    monkeypatch.setattr(evaluate, "train_classifier", brief)
    for script in evaluate.SCRIPTS:
        without_method(importlib.import_module(script), patch=monkeypatch.setattr)


# ------------------------------------------------------------------ measures
def with_moments(n, mean, cov):
    """n rows whose mean and covariance are exactly these."""
    x = torch.randn(n, len(mean), dtype=torch.float64)
    x -= x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return x @ torch.linalg.cholesky(cov).T + mean


def test_frechet_distance_of_known_gaussians():
    eye = torch.eye(3, dtype=torch.float64)
    a = with_moments(50, torch.zeros(3), eye * 4)
    b = with_moments(70, torch.tensor([3.0, 0, 4]), eye * 9)
    assert math.isclose(evaluate.frechet_distance(a, b), 25 + 3 * (2 - 3) ** 2, rel_tol=1e-9)
    assert evaluate.frechet_distance(a, a) < 1e-9
    # S_a, S_b need not commute: in the plane tr (S_a S_b)^(1/2) = (tr S_a S_b + 2 det^(1/2))^(1/2)
    s_a = torch.tensor([[2.0, 1], [1, 3]], dtype=torch.float64)
    s_b = torch.tensor([[4.0, -1], [-1, 1]], dtype=torch.float64)
    cross = ((s_a @ s_b).trace() + 2 * (s_a.det() * s_b.det()).sqrt()).sqrt()
    want = (s_a.trace() + s_b.trace() - 2 * cross).item()
    zero = torch.zeros(2)
    got = evaluate.frechet_distance(with_moments(40, zero, s_a), with_moments(40, zero, s_b))
    assert math.isclose(got, want, rel_tol=1e-9)


def test_inception_score_of_sure_and_of_unsure_predictions():
    sure = torch.eye(10).repeat(3, 1) * 1000
    assert math.isclose(evaluate.inception_score(sure), 10, rel_tol=1e-9)
    assert math.isclose(evaluate.inception_score(torch.zeros(8, 10)), 1, rel_tol=1e-9)
    assert math.isclose(evaluate.inception_score(sure[:1].expand(9, -1)), 1, rel_tol=1e-9)


def test_neighbour_distance_on_a_line():
    x = torch.tensor([[0.0], [1], [3], [7]])
    first, second, sixth = evaluate.neighbour_distances(x, 1, 2, 6)
    assert first.tolist() == [1, 1, 2, 4] and second.tolist() == [3, 2, 3, 6]
    assert sixth.tolist() == [7, 6, 4, 7]  # of three others the farthest


def test_a_set_beside_itself_and_beside_one_far_away():
    x = torch.randn(300, 8)
    itself = evaluate.neighbourhoods(x, x)
    assert itself["precision"] == itself["recall"] == itself["coverage"] == 1
    assert math.isclose(itself["density"], 6 / 5)  # each ball holds five neighbours and its centre
    far = evaluate.neighbourhoods(x, x + 1000)
    assert set(far.values()) == {0}


def test_half_the_modes_are_half_the_coverage():
    """Two clusters, samples in one: precise, but recall and coverage are a half."""
    real = torch.randn(400, 4)
    real[200:] += 100
    measured = evaluate.neighbourhoods(real, real[:200].clone())
    assert measured["precision"] == 1
    assert measured["recall"] == measured["coverage"] == 0.5


# ------------------------------------------------------------------ whole tables
def trained(out, *flags, script="infogan"):
    """The checkpoint of a run of one update; the last of several --data-dir counts."""
    common = ["--dataset", "folder", "--data-dir", "pictures", "--max-steps", 1, "--batch-size", 8]
    common += ["--device", "cpu", "--out", out, *SMALL_NETWORKS[script]]
    importlib.import_module(script).main([str(flag) for flag in (*common, *flags)])
    return f"{out}/checkpoint.pt"


@pytest.fixture
def run():
    write_images("pictures", n=150)
    return trained("run")


refused = functools.partial(refused_by, evaluate)


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_table_of_two_generators(run, capsys):
    other = trained("a $x_{ and b$", "--seed", 1)  # no formula for matplotlib
    capsys.readouterr()
    evaluate.main([run, other, "--out", "new/both"])
    text = capsys.readouterr().out
    rows = read_table("new/both.csv")
    assert [row["name"] for row in rows] == [
        "held-out real",
        "infogan run",
        f"infogan {other[:13]}",
    ]
    for row in rows:
        assert int(row["images"]) == 15 and 1 <= float(row["score"]) <= 2
        assert math.isclose(float(row["class cat"]) + float(row["class dog"]), 1)
        assert row["name"] in text and float(row["frechet"]) >= 0
    assert float(rows[0]["frechet"]) < float(rows[1]["frechet"])  # noise is nearer to noise
    with Image.open("new/both.png") as image:
        assert image.size[0] > 500


def test_the_ceiling_is_half_of_the_test_set_beside_the_other_half(run, monkeypatch):
    seen, scores, train = [], evaluate.scores, evaluate.train_classifier

    def recorded(classifier, real, radii, images, classes):
        seen.append((classifier, real, images))
        return scores(classifier, real, radii, images, classes)

    def trained(data):
        seen.append(data.test / 255)
        return train(data)

    monkeypatch.setattr(evaluate, "scores", recorded)
    monkeypatch.setattr(evaluate, "train_classifier", trained)
    evaluate.main([run])
    test, (classifier, real, held) = seen[:2]
    own = {image.numpy().tobytes() for image in held}
    assert own <= {image.numpy().tobytes() for image in test}
    assert len(own) == len(held) == len(test) // 2
    others = torch.stack([image for image in test if image.numpy().tobytes() not in own])
    with torch.no_grad():
        features = classifier(others)[0]
    assert torch.allclose(real.sort(dim=0).values, features.sort(dim=0).values, atol=1e-5)


@pytest.mark.parametrize("script", evaluate.SCRIPTS[1:])
def test_other_scripts_are_scored(script, run):
    evaluate.main([run, trained(script, script=script)])
    assert [row["name"] for row in read_table("scores.csv")][2] == f"{script} {script}"


@pytest.mark.parametrize("script", ["cgan", "dcgan", "oversampling"])
def test_conditional_generators_draw_the_classes_that_they_are_given(script, monkeypatch):
    """Whose shares are those of the held-out half: 1,001 of one class and 3 of another."""
    module = importlib.import_module(script)
    drawn = []

    def sample(generator, *what, seed):
        drawn.extend(what[-1].tolist())
        return torch.zeros(len(what[-1]), 1, 28, 28)

    monkeypatch.setattr(module, "sample", sample)
    labels = torch.tensor([4] * 1001 + [7] * 3)
    assert len(evaluate.draw(module, None, labels)) == 1004
    assert drawn == labels.tolist()


def test_a_table_that_can_not_be_written_is_printed(run, capsys):
    os.mkdir("scores.csv")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.main([run])
    told = capsys.readouterr()
    assert stop.value.code == 2 and "Traceback" not in told.err
    assert "held-out real" in told.out and "infogan run" in told.out
    assert not [*Path().glob("*.tmp")]


def test_stopped_by_hand_and_no_name(run, capsys, monkeypatch):
    assert "--out ''" in refused(capsys, run, "--out", "")

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "train_classifier", stop)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([run])
    assert stopped.value.code == 130 and capsys.readouterr().err == "evaluate: error: stopped\n"


def test_data_that_have_moved(run, capsys):
    evaluate.main([run])
    before = read_table("scores.csv")
    shutil.move("pictures", "elsewhere")
    assert "give --data-dir" in refused(capsys, run)
    evaluate.main([run, "--data-dir", "elsewhere"])
    assert read_table("scores.csv") == before
    write_images("others", n=100)
    assert "not the run's data" in refused(capsys, run, "--data-dir", "others")


def test_no_streams_at_all(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    evaluate.main([run])
    assert len(read_table("scores.csv")) == 2


def test_main_leaves_the_callers_streams_alone(run, monkeypatch):
    latin = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", latin)
    evaluate.main([run])
    assert latin.errors == "strict" and not latin.line_buffering


def test_as_a_command_in_a_notebooks_environment_and_a_code_page_of_few_letters():
    write_images("pictures", n=150)
    run = trained("\u732b", script="cgan")
    strange = {"PYTHONIOENCODING": "cp1252", "MPLBACKEND": "module://no_such_backend"}
    command = [sys.executable, ROOT / "evaluate.py", run, "--device", "cpu"]
    done = subprocess.run(command, env=os.environ | strange, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"classifier: test accuracy" in done.stdout and rb"cgan \u732b" in done.stdout
    assert read_table("scores.csv")[1]["name"] == "cgan \u732b" and Path("scores.png").exists()


def test_bad_checkpoints(run, capsys):
    write_images("few", n=24)
    few = trained("small", "--data-dir", "few")
    assert "score them apart" in refused(capsys, run, few)
    assert "test images" in refused(capsys, few)
    assert "nowhere.pt is no whole checkpoint" in refused(capsys, "nowhere.pt")
    Path("cut.pt").write_bytes(Path(run).read_bytes()[:1000])
    assert "cut.pt is no whole checkpoint" in refused(capsys, "cut.pt")
    torch.save({"script": "os"}, "other.pt")
    assert "it is not of" in refused(capsys, "other.pt")
    state = torch.load(run, weights_only=True)
    state["data"]["shape"] = [120, 2]
    torch.save(state, "points.pt")
    assert "points.pt" in refused(capsys, "points.pt")
    refused(capsys)


def test_memory_that_does_not_suffice_is_said(run, capsys, monkeypatch):
    def greedy(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(evaluate, "load_data", greedy)
    assert "allocate 2 GiB" in refused(capsys, run)


@pytest.mark.parametrize("script", evaluate.SCRIPTS)
def test_checkpoint_that_lacks_its_weights_is_refused(script, capsys):
    torch.save({"script": script}, "part.pt")
    assert "no whole checkpoint" in refused(capsys, "part.pt")
