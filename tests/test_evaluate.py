"""evaluate.py: every measure against a closed form, and whole tables."""

import csv
import functools
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_runs import no_network, refused_by, write_images, write_mnist

import evaluate
import infogan


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(infogan.urllib.request, "urlopen", no_network)
    torch.manual_seed(0)


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
    assert evaluate.neighbour_distance(x, 1).tolist() == [1, 1, 2, 4]
    assert evaluate.neighbour_distance(x, 2).tolist() == [3, 2, 3, 6]


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
def trained(out, *flags):
    common = ["--max-steps", "2", "--batch-size", "8", "--device", "cpu", "--out", out]
    infogan.main([*common, "--kernels", "reference", *flags])
    return f"{out}/checkpoint.pt"


def test_table_of_two_generators(capsys):
    write_mnist("data", train=80, test=60)
    paths = [trained(out, "--dataset", "mnist", "--seed", out[-1]) for out in ("run1", "run2")]
    capsys.readouterr()
    evaluate.main([*paths, "--out", "new/both"])
    text = capsys.readouterr().out
    with open("new/both.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["held-out real", "infogan run1", "infogan run2"]
    for row in rows:
        assert int(row["images"]) == 30 and 1 <= float(row["score"]) <= 10
        assert math.isclose(sum(float(row[f"class {name}"]) for name in data_classes()), 1)
        assert row["name"] in text and float(row["frechet"]) >= 0
    assert float(rows[0]["frechet"]) < float(rows[1]["frechet"])  # noise is nearer to noise
    with Image.open("new/both.png") as image:
        assert image.size[0] > 500
    assert Path("data/classifier-mnist.pt").exists()


def data_classes():
    return infogan.datasets.MNIST.classes


refused = functools.partial(refused_by, evaluate)


def test_bad_checkpoints(capsys):
    write_mnist("data", train=40, test=30)
    write_images("pictures", n=24)
    grey = trained("grey", "--dataset", "mnist")
    colour = trained("colour", "--dataset", "folder", "--data-dir", "pictures")
    assert "score them apart" in refused(capsys, grey, colour)
    assert "no checkpoint" in refused(capsys, "nowhere.pt")
    Path("cut.pt").write_bytes(Path(grey).read_bytes()[:1000])
    assert "not a whole checkpoint" in refused(capsys, "cut.pt")
    torch.save({"script": "os"}, "other.pt")
    assert "not a checkpoint of" in refused(capsys, "other.pt")
    assert "test images" in refused(capsys, colour)
    refused(capsys)


def test_memory_that_does_not_suffice_is_said_in_one_line(capsys, monkeypatch):
    def greedy(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    write_mnist("data", train=40, test=30)
    path = trained("run", "--dataset", "mnist")
    monkeypatch.setattr(evaluate, "load_data", greedy)
    assert "allocate 2 GiB" in refused(capsys, path)


@pytest.mark.parametrize("script", evaluate.SCRIPTS)
def test_checkpoint_that_lacks_parts_is_refused_in_one_line(script, capsys):
    torch.save({"script": script}, "part.pt")
    assert "not a whole checkpoint" in refused(capsys, "part.pt")
