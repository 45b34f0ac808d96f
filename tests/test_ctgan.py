"""ctgan.py: its method, tables in and out, whole runs, and each trouble that users of others had.

Numbers such as #273 are those of issues of sdv-dev/CTGAN, SDV#... of sdv-dev/SDV. The measures have
their own tests in test_ctgan_measures.py.
"""

import copy
import csv
import functools
import json
import math
import shutil
import socket
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NO_GPU
from helpers import (
    checkpoint,
    error_of,
    no_network,
    refused_by,
    rows,
    same,
    weights,
    without_figures,
)
from PIL import Image
from sklearn.mixture import BayesianGaussianMixture
from torch import nn
from torch.distributions import Categorical, Normal, kl_divergence

import ctgan

CPU = torch.device("cpu")
refused = functools.partial(refused_by, ctgan)


# ------------------------------------------------------------------ made tables
def mixed(n=120):
    """A column of every kind, as the texts of a CSV file."""
    rng = np.random.default_rng(0)
    days = np.datetime64("2021-03-01") + rng.integers(0, 500, n)
    return {
        "colour": rng.choice(["red", "green", "blue, dark"], n, p=[0.7, 0.2, 0.1]).tolist(),
        "size": [str(x) for x in rng.integers(-50, 90, n)],
        "price": [f"{x:.2f}" for x in rng.lognormal(3, 1, n)],
        "paid": rng.choice(["True", "False"], n).tolist(),
        "day": days.astype(str).tolist(),
        "weight": [f"{x:.1f}" if x > 0 else "" for x in rng.normal(5, 5, n)],
        "grade": rng.choice(["a", "b", ""], n).tolist(),
        "level": rng.choice(["1", "2", "3"], n).tolist(),
        "unit": ["kg"] * n,
    }


def easy(n=1000, seed=0):
    """Columns of a dictionary, with rare categories and a number that depends on one of them."""
    rng = np.random.default_rng(seed)
    place = rng.choice(4, n, p=[0.6, 0.3, 0.08, 0.02])
    return {
        "city": np.array(["Ada", "Bor", "Cyr", "Dax"])[place],
        "x": (rng.normal(size=n) * 0.3 + 3 * place).round(2),
        "sex": rng.choice(["F", "M"], n, p=[0.97, 0.03]),
        "age": rng.integers(18, 90, n),
        "day": np.datetime64("2020-01-01") + rng.integers(0, 700, n),
    }


def write(path, table, delimiter=","):
    """Texts as a CSV file."""
    with open(path, "w", newline="") as file:
        lines = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        lines.writerows([table, *zip(*table.values())])
    return path


def read(path):
    """The texts of a CSV file, by column."""
    with open(path, newline="") as file:
        names, *lines = csv.reader(file)
    return dict(zip(names, zip(*lines)))


def parsed(*flags):
    return ctgan.arguments().parse_args([str(flag) for flag in flags])


def whole(table, forms, *flags):
    """A table as Data, with none of its rows held out."""
    return ctgan.table_data("made", table, forms, parsed(*flags), CPU, test={})


def data_of(columns, *flags):
    return whole(*ctgan.as_table(columns), *flags)


def model_of(columns, *flags):
    """An untrained model of a dictionary's columns, and the data."""
    args, data = parsed("--noise", 4, "--dim", 8, *flags), data_of(columns, *flags)
    ctgan.suit(args, data)
    torch.manual_seed(args.seed)
    return ctgan.Model(args, data), data


def fit(columns, *args, **settings):
    """A small model, trained by a few updates."""
    small = {"dim": 8, "noise": 4, "epochs": 2, "batch_size": 20}
    return ctgan.fit(columns, *args, **small | settings)


def within_noise(share, p, n, errors=4):
    """Whether shares of n draws are those wanted, within so many standard errors."""
    share, p = np.asarray(share, dtype=float), np.asarray(p, dtype=float)
    return bool((abs(share - p) <= errors * np.sqrt(p * (1 - p) / n)).all())


# ------------------------------------------------------------------ rows (section 4.2)
def kinds(n=300):
    """Columns of one kind each, as the texts of a CSV file."""
    rng = np.random.default_rng(1)
    heavy, two = rng.lognormal(0, 2, n), rng.choice([-1, 1], n) + 0.1 * rng.normal(size=n)
    day = np.datetime64("1890-01-01") + rng.integers(0, 60_000, n)
    gaps = ["" if x < 3 else str(x) for x in rng.integers(0, 40, n)]
    return {
        "integers": [str(x) for x in rng.integers(-5000, 100_000, n)],
        "large integers": [str(2**52 + x) for x in rng.integers(0, 10**6, n)],
        "decimals": [f"{x:.3f}" for x in rng.normal(0, 9, n)],
        "decimals that end in 0": [f"{x:.2f}" for x in rng.integers(0, 90, n)],
        "booleans": rng.choice(["True", "False"], n).tolist(),
        "text": rng.choice(["x", "yy", 'a "quoted", one', "ä\nö"], n, p=[0.9, 0.05, 0.04, 0.01]),
        "numbers with leading zeros": rng.choice(["01234", "00501"], n),
        "dates": day.astype(str),
        "German dates": [x.item().strftime("%d.%m.%Y") for x in day],
        "American dates": [x.item().strftime("%m/%d/%Y") for x in day],
        "dates with gaps": np.where(rng.random(n) < 0.2, "", day.astype(str)),
        "times": (np.datetime64("2020-02-28T12:00:00") + rng.integers(0, 10**5, n)).astype(str),
        "missing numbers": gaps,
        "missing as NA": [text or "NA" for text in gaps],
        "all but one missing": [""] * (n - 1) + ["3.5"],
        "missing categories": rng.choice(["a", "b", ""], n),
        "nothing": [""] * n,
        "constant number": ["4"] * n,
        "constant decimal": ["0.1"] * n,
        "constant text": ["a"] * n,
        "heavy tail": [f"{x:.2f}" for x in heavy],
        "zero or heavy": [f"{x * (x > 1):.2f}" for x in heavy],
        "two modes times 1e-6": [f"{x * 1e-6:.9f}" for x in two],
        "one other": ["5"] * (n - 1) + ["7"],
        "one other times 1e-6": ["0.000005"] * (n - 1) + ["0.000007"],
        "one far away": ["0.5"] * (n // 2) + ["1.5"] * (n - n // 2 - 1) + ["1000000.5"],
        "three values": rng.choice(["-1", "0", "7"], n),
        "twelve values": [str(x) for x in rng.integers(0, 12, n)],
    }


@pytest.mark.parametrize("flag", [None, "--continuous", "--discrete"])
@pytest.mark.parametrize("kind", kinds())
def test_encoded_and_decoded_a_column_is_what_it_was(kind, flag):
    """#48, #26, #24: to the letter, with its dtype and decimals, its least and greatest value."""
    write("in.csv", {"other": ["x", "y"] * 150, kind: kinds()[kind]})
    table, forms = ctgan.read_csv("in.csv")
    numeric = table[kind].dtype.kind in "ifM"
    if flag == "--continuous" and not numeric:
        pytest.skip("text is no number")
    data = whole(table, forms, *([flag, kind] if flag else []))
    column = next(column for column in data.columns if column["name"] == kind)
    if flag:
        assert ("categories" in column) == (flag == "--discrete")
    assert data.train.dtype == torch.float32 and data.train.shape[1] == 2 + ("means" in column)
    back = ctgan.decode(data.train, data.columns)
    assert list(back) == list(table) and back[kind].dtype == table[kind].dtype
    ctgan.write_csv("out.csv", back, data.columns)
    assert read("out.csv") == read("in.csv")
    if "means" in column:
        assert data.train[:, -1].abs().max() <= 1


@pytest.mark.parametrize("outliers", [[999.0], [1e6], [1e6, -5e5, -5e5]])
def test_outliers_do_not_stretch_the_modes_of_the_others(outliers):
    """All that a network has to tell of ordinary values would be a thousandth of its range."""
    x = np.random.default_rng(1).normal(50, 10, 1500)
    plain, _, alphas = ctgan.encode_numbers(x, np.random.default_rng(0))
    column, mode, alpha = ctgan.encode_numbers(
        np.concatenate([x, outliers]), np.random.default_rng(0)
    )
    assert column["means"][: len(plain["means"])] == plain["means"]
    assert np.array_equal(alpha[:1500], alphas) and alphas.std() > 0.1
    means, scales = np.array(column["means"]), np.array(column["scales"])
    assert (means[mode] + alpha * scales[mode])[1500:] == pytest.approx(outliers)


def test_long_whole_numbers_of_a_narrow_range_stay_different():
    x = 2023112500000000 + np.arange(5000)
    table = ctgan.decode((data := data_of({"x": x})).train, data.columns)
    assert np.abs(table["x"] - x).max() <= 1 and table["x"].dtype == x.dtype


@pytest.mark.parametrize("kind", ["datetime64[ns]", "datetime64[s]"])
@pytest.mark.parametrize("unit", ["D", "h", "m"])
def test_times_are_whole_days_or_hours_where_the_datas_are(kind, unit):
    rng = np.random.default_rng(0)
    days = np.datetime64("2020-01-01", unit) + rng.integers(0, 900, 300)
    days = days.astype(kind)
    days[::50] = "NaT"
    data = data_of({"day": days, "other": np.array(["x", "y"] * 150)})
    rows = data.train.clone()
    rows[:, -1] += 0.01 * torch.randn(len(rows))  # as a network would
    found = ctgan.decode(rows, data.columns)["day"]
    assert found.dtype == days.dtype and (np.isnat(found) == np.isnat(days)).all()
    known = found[~np.isnat(found)]
    assert (known.astype(f"datetime64[{unit}]").astype(kind) == known).all()
    assert (known != days[~np.isnat(days)]).any()


def test_numbers_of_all_digits_return_but_for_float32():
    x = np.random.default_rng(0).normal(size=500) * 1e-3
    data = data_of({"x": x})
    (back,) = ctgan.decode(data.train, data.columns).values()
    assert abs(back - x).max() < 1e-6 * np.ptp(x)
    assert x.min() <= back.min() and back.max() <= x.max()


@pytest.mark.parametrize(
    "dtype",
    ["int8", "uint8", "int16", "int32", "int64", "uint64", "float32", "float64", "bool", "<U9"]
    + [f"datetime64[{unit}]" for unit in ("D", "s", "ms", "ns")],
)
def test_dtypes_of_arrays_are_kept(dtype):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 100, 200).astype("int64").astype(dtype)
    data = data_of({"a": values, "b": rng.random(200)})
    back = ctgan.decode(data.train, data.columns)
    assert back["a"].dtype == values.dtype and (back["a"] == values).all()
    made = ctgan.sample(model_of({"a": values, "b": rng.random(200)})[0], 20)["a"]
    ordered = np.sort(np.concatenate([made, values]))
    assert made.dtype == values.dtype and ordered[0] in values and ordered[-1] in values


def test_missing_numbers_do_not_make_decimals_of_integers():
    """#48: of integers with a gap NumPy and pandas make floats."""
    x = np.array([1, 5, np.nan, *range(50)] * 4, dtype=float)
    model, data = model_of({"x": x})
    made = ctgan.sample(model, 500)["x"]
    assert np.isnan(made).any() and (np.mod(made[~np.isnan(made)], 1) == 0).all()
    texts = {"x": ["" if np.isnan(v) else f"{v:.1f}" for v in x], "y": ["a", "b"] * 106}
    data = whole(*ctgan.read_csv(write("in.csv", texts)))
    ctgan.write_csv("out.csv", ctgan.decode(data.train, data.columns), data.columns)
    assert read("out.csv") == read("in.csv")  # 1.0, as pandas writes it
    args = parsed("--noise", 4, "--dim", 8)
    ctgan.suit(args, data)
    made = ctgan.sample(ctgan.Model(args, data), 500)["x"]
    assert (np.mod(made[~np.isnan(made)], 1) == 0).all()


@pytest.mark.parametrize(
    "x, decimals",
    [
        (np.arange(10_000) / 100, 2),  # of a thousand of them, evenly, none has a second decimal
        (np.arange(2000) / 2, 1),
        (np.arange(5000.0), 0),
        (np.random.default_rng(0).normal(size=3000), None),
    ],
)
def test_decimals_of_an_array_are_those_of_all_its_values(x, decimals):
    assert ctgan.as_table({"x": x})[1]["x"]["decimals"] == decimals
    data = data_of({"x": x})
    (back,) = ctgan.decode(data.train, data.columns).values()
    assert np.allclose(back, x, atol=1e-4)


def test_times_of_an_array_are_exact_multiples_of_their_step():
    """A float counts nanoseconds since 1970 in steps of 256."""
    x = np.datetime64("2023-11-03T21:37:28.399", "ms") + np.arange(500) * 1234567
    made = ctgan.sample(model_of({"x": x.astype("datetime64[ns]")})[0], 500)["x"]
    assert made.dtype == "datetime64[ns]" and not (made.astype(np.int64) % 10**6).any()


@pytest.mark.parametrize("start", [2**53, 1745000000000000000, 2**63])
def test_integers_that_a_float_would_round_are_names(start):
    """18 digits of an account collapsed into six that nobody has."""
    texts = [str(start + i) for i in range(60)]
    table, _ = ctgan.read_csv(write("in.csv", {"id": texts, "x": map(str, range(60))}))
    for columns in (table, {"id": np.array([int(text) for text in texts])}):
        data = data_of(columns)
        made = ctgan.decode(data.train, data.columns)["id"]
        assert "categories" in data.columns[0] and made.astype(str).tolist() == texts


@pytest.mark.parametrize(
    "texts, form",
    [
        ([f"01/{1 + i % 12:02}/{2010 + i // 12}" for i in range(60)], "%d/%m/%Y"),  # monthly
        ([f"{1 + i % 12:02}/01/{2010 + i // 12}" for i in range(60)], "%m/%d/%Y"),
        ([f"{1 + i % 12:02}/{1 + i % 28:02}/2020" for i in range(60)], "%m/%d/%Y"),
        ([f"{1 + i % 28:02}/{1 + i % 12:02}/2020" for i in range(60)], "%d/%m/%Y"),
    ],
)
def test_days_and_months_are_told_apart_and_said(texts, form, capsys):
    data = whole(*ctgan.read_csv(write("in.csv", {"day": texts, "x": map(str, range(60))})))
    assert f"day {form}" in capsys.readouterr().out
    ctgan.write_csv("out.csv", ctgan.decode(data.train, data.columns), data.columns)
    assert read("out.csv")["day"] == tuple(texts)


@pytest.mark.parametrize(
    "texts", [["8,00", "7,50", ""], ["1,234", "1,500", "900"], ["-", "3", "4"]]
)
def test_numbers_that_are_taken_for_text_are_told(texts, capsys):
    odd = ["8,00", "7,50", "1,234", "1,500", "-"]
    texts = [*texts, *map(str, range(5, 60))]
    data_of(
        {
            "x": np.array(texts),
            "y": np.array(["1.1", "1.10", "2.0"] * (len(texts) // 3 + 1))[: len(texts)],
        }
    )
    said = capsys.readouterr().out
    assert (
        any(f"x: text, since {text!r} is no number" in said for text in odd) and "y: " not in said
    )
    data_of({"x": np.array(texts)}, "--discrete", "x")
    assert "since" not in capsys.readouterr().out


def test_columns_of_objects_are_read_as_a_file_s():
    """#150: None and nan became the words None and nan."""
    table, forms = ctgan.as_table({
        "text": np.array(["a", None, math.nan, "none"], dtype=object),
        "number": np.array([1, None, 2.5, math.nan], dtype=object),
    })  # fmt: skip
    assert table["text"].tolist() == ["a", "", "", "none"]
    assert np.array_equal(table["number"], [1, np.nan, 2.5, np.nan], equal_nan=True)
    assert forms["number"]["decimals"] == 1


def test_generated_numbers_stay_in_their_range_and_keep_their_decimals():
    """#94, #40, #162: a generator whose places are at the ends of the modes."""
    columns = {"x": np.random.default_rng(0).lognormal(0, 2, 500).round(2)}
    columns["n"] = np.random.default_rng(1).integers(3, 900, 500)
    model, _ = model_of(columns)
    for end in (-9, 9):
        nn.init.constant_(model.generator.layers[-1].bias, end)
        made = ctgan.sample(model, 500)
        for name, values in columns.items():
            assert made[name].min() >= values.min() and made[name].max() <= values.max()
        assert (made["x"].round(2) == made["x"]).all()
    assert made["x"].max() == columns["x"].max()


# ------------------------------------------------------------------ mixtures
def clusters(n=3000):
    rng = np.random.default_rng(0)
    means, sds = np.array([-3.0, 0, 5]), np.array([0.3, 0.5, 1])
    k = rng.choice(3, n, p=[0.5, 0.3, 0.2])
    return np.round(means[k] + sds[k] * rng.normal(size=n), 2)


def sklearn_mixture(x, components):
    mixture = BayesianGaussianMixture(
        n_components=components,
        weight_concentration_prior_type="dirichlet_process",
        weight_concentration_prior=1e-3,
        tol=0,
        max_iter=100,
        random_state=0,
    )
    with pytest.warns(match="converge"):
        mixture.fit(((x - x.mean()) / x.std())[:, None])
    kept = mixture.weights_ > 0.005
    means = x.mean() + x.std() * mixture.means_[kept, 0]
    sds = x.std() * np.sqrt(mixture.covariances_[kept, 0, 0])
    return mixture.weights_[kept], means, sds


def density(x, weights, means, sds):
    z = (x[:, None] - means) / sds
    return (weights / sds * np.exp(-(z**2) / 2)).sum(axis=1) / math.sqrt(2 * math.pi)


def test_mixture_is_that_of_scikit_learn():
    x = clusters()
    ours = ctgan.fit_mixture(*np.unique(x, return_counts=True), components=3)
    theirs = sklearn_mixture(x, 3)
    order, other = np.argsort(ours[1]), np.argsort(theirs[1])
    for a, b in zip(ours, theirs):
        assert a[order] == pytest.approx(b[other], rel=2e-3, abs=2e-3)
    grid = np.linspace(-5, 9, 200)
    ours = ctgan.fit_mixture(*np.unique(x, return_counts=True))
    assert abs(density(grid, *ours) - density(grid, *sklearn_mixture(x, 10))).max() < 0.02


def test_mixture_of_many_different_values(monkeypatch):
    """SDV#988: half a million rows took hours; here a mixture is of 2,000 points at most."""
    sizes, k_means = [], ctgan.KMeans.fit
    monkeypatch.setattr(
        ctgan.KMeans,
        "fit",
        lambda self, x, **kw: sizes.append(len(x)) or k_means(self, x, **kw),
    )
    x = np.random.default_rng(0).permutation(np.repeat([-4.0, 0, 6], [4000, 10_000, 6000]))
    x += np.random.default_rng(1).normal(size=20_000) * 0.5
    ours = ctgan.fit_mixture(*np.unique(x, return_counts=True))
    exact = ctgan.fit_mixture(*np.unique(x, return_counts=True), points=10**6)
    assert sizes == [2000, 20_000]
    grid = np.linspace(-6, 8, 200)
    assert abs(density(grid, *ours) - density(grid, *exact)).max() < 0.02


@pytest.mark.parametrize("scale, shift", [(1e-6, 0), (1e9, 0), (1, 1e6), (1e-6, 1)])
def test_modes_do_not_depend_on_the_unit(scale, shift):
    """#94: with a bound on the variance of raw values small units lost their modes."""
    x = clusters()
    weights, means, sds = ctgan.find_modes(*np.unique(x, return_counts=True))
    moved = ctgan.find_modes(*np.unique(x * scale + shift, return_counts=True))
    assert np.allclose(moved[0], weights, rtol=0.05, atol=0.005)
    assert np.allclose((moved[1] - shift) / scale, means, rtol=0.02, atol=0.02)
    assert np.allclose(moved[2] / scale, sds, rtol=0.05, atol=0.005)


def test_frequent_number_is_a_mode_of_its_own():
    """#138: whatever alpha is, so that the values of which there are few return exactly."""
    x = np.repeat([0.0, 7.5, math.pi, 100], [600, 200, 100, 100])
    others = np.random.default_rng(0).lognormal(size=500)  # with all the digits that a float has
    for more in (others[:0], others):
        data = data_of({"x": np.concatenate([x, more])}, "--continuous", "x")
        moved = data.train.clone()
        moved[:, 1] = torch.linspace(-1, 1, len(moved))
        (back,) = ctgan.decode(moved, data.columns).values()
        assert (back[: len(x)] == x).all() and len(np.unique(back)) == 4 + len(more)


def test_mode_is_drawn_from_its_posterior():
    """Of a value between two modes, met often, so that shares can be counted."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 1, 5000), rng.normal(3, 1, 5000), np.full(400, 1.4)])
    weights, means, sds = ctgan.find_modes(*np.unique(x, return_counts=True))
    p = weights / sds * np.exp(-(((1.4 - means) / sds) ** 2) / 2)
    p[abs(1.4 - means) > 4 * sds] = 0
    data = data_of({"x": x})
    modes = data.train[x == 1.4, 0].long().bincount(minlength=len(means)).numpy()
    assert (p / p.sum() > 0.05).sum() > 1  # it is no matter of course
    assert within_noise(modes / 400, p / p.sum(), 400)
    other = ctgan.table_data("made", *ctgan.as_table({"x": x}), parsed("--seed", 1), CPU, test={})
    assert not torch.equal(other.train[:, 0], data.train[:, 0])


# ------------------------------------------------------------------ losses and training step
SIZES = [3, 1, 4]


def outputs_of(n=6, alphas=2, **kwargs):
    torch.manual_seed(0)
    return torch.randn(n, sum(SIZES) + alphas, **kwargs)


def test_activate_gives_rows():
    outputs = outputs_of()
    rows = ctgan.activate(outputs, SIZES)
    spans, alpha = rows.split([sum(SIZES), 2], dim=1)
    for span in spans.split(SIZES, dim=1):
        assert torch.allclose(span.sum(dim=1), torch.ones(6)) and (span >= 0).all()
    assert torch.equal(alpha, outputs[:, sum(SIZES) :].tanh())


def test_gumbel_softmax_draws_from_the_softmax():
    """Of each span by itself, and near enough to one-hot at temperature 0.2."""
    p = torch.tensor([0.7, 0.25, 0.05, 1, 0.1, 0.2, 0.3, 0.4])
    torch.manual_seed(0)
    rows = ctgan.activate(p.log().expand(20_000, -1), SIZES)
    for span, wanted in zip(rows.split(SIZES, dim=1), p.split(SIZES)):
        drawn = span.argmax(dim=1).bincount(minlength=len(wanted)) / 20_000
        assert within_noise(drawn, wanted, 20_000)
        assert span.max(dim=1).values.mean() > 0.85


def test_gumbel_noise_is_standard_and_finite(monkeypatch):
    torch.manual_seed(0)
    noise = ctgan.gumbel(torch.zeros(100_000))
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - math.pi**2 / 6) < 0.04
    few = torch.zeros(100_000, dtype=torch.bfloat16)  # whose own uniform numbers are 256
    assert len(ctgan.gumbel(few).unique()) > 10_000
    for u in (0.0, 1 - 2**-24):  # the least and the greatest that are drawn
        monkeypatch.setattr(torch, "rand", lambda shape, u=u, **_: torch.full(shape, u))
        assert ctgan.gumbel(torch.zeros(3)).isfinite().all()


def test_condition_loss_is_the_cross_entropy_of_the_chosen_column():
    outputs = outputs_of(requires_grad=True)
    column_of = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    condition = torch.tensor([0, 2, 3, 4, 7, 5])
    loss = ctgan.condition_loss(outputs, condition, column_of)
    spans, starts = outputs[:, :8].split(SIZES, dim=1), [0, 3, 4]
    alone = [
        F.cross_entropy(spans[column_of[c]][i], c - starts[column_of[c]])
        for i, c in enumerate(condition)
    ]
    wanted = torch.stack(alone).mean()
    assert torch.allclose(loss, wanted)
    gradients = [torch.autograd.grad(x, outputs, retain_graph=True)[0] for x in (loss, wanted)]
    assert torch.allclose(*gradients, atol=1e-7)


def test_condition_vector_is_one_hot():
    vector = ctgan.one_hot(torch.tensor([2, 0]), torch.tensor([0, 0, 1]))
    assert vector.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert ctgan.one_hot(torch.zeros(2, dtype=int), torch.zeros(0, dtype=int)).shape == (2, 0)


def test_training_by_sampling():
    """Columns evenly, values by the logarithm, rows with the value, each of them as often."""
    columns = {
        "a": np.repeat(["x", "y", "z"], [900, 90, 10]),
        "n": np.arange(1000) % 97,
        "b": np.tile(["p", "q"], 500),
    }
    model, data = model_of(columns)
    torch.manual_seed(0)
    n, (real, condition, condition_g) = 50_000, model.batch(data, torch.zeros(50_000, dtype=int))
    log = np.log([901, 91, 11])
    wanted = [*log / log.sum() / 2, 0.25, 0.25]
    for drawn in (condition, condition_g):
        assert drawn.dtype == torch.int64
        assert within_noise(drawn.bincount(minlength=5) / n, wanted, n)
    assert not torch.equal(condition, condition_g)
    asked = ctgan.one_hot(condition, model.column_of)
    assert ((real[:, :5] * asked).sum(dim=1) == 1).all()  # each row has its value
    assert (real[:, :3].sum(dim=1) == 1).all() and real.shape == (n, len(model.generator(
        torch.zeros(2, 4), torch.zeros(2, 5))[0]))  # fmt: skip
    wide = torch.arange(1000).remainder(97)
    known = ctgan.decode(data.train, data.columns)
    assert (known["n"] == wide.numpy()).all()
    rare = real[condition == 2]
    others, counts = rare.unique(dim=0, return_counts=True)
    assert len(others) == 10 and within_noise(counts / len(rare), 0.1, len(rare))


def test_rows_are_drawn_by_the_data_s_frequencies_and_not_by_their_logarithms():
    """#16: in 0.12.1 a value of 1 % comes out at 10 %."""
    columns = {"a": np.repeat(["x", "y", "z"], [900, 90, 10]), "b": np.repeat([0, 1], [980, 20])}
    model, _ = model_of(columns)
    torch.manual_seed(0)
    drawn = model.conditions(model.chance["data"], 100_000).bincount(minlength=5) / 100_000
    assert within_noise(drawn, np.array([0.9, 0.09, 0.01, 0.98, 0.02]) / 2, 100_000)
    obey(model)
    rows = ctgan.draw_rows(model, 20_000)
    # half of the conditions name the column, and the others leave it to the generator: even odds
    assert within_noise((rows[:, 0] == 2).double().mean(), 0.01 / 2 + 1 / 6, 20_000)


@pytest.mark.parametrize("name", ["ctgan", "tvae"])
def test_rows_are_raked_to_the_shares_of_every_column(name):
    """Of categories and of the modes of numbers, where G draws others."""
    columns = {
        "a": np.repeat(["x", "y", "z"], [700, 270, 30]),
        "b": np.repeat([0, 1], [950, 50]),
        "n": np.repeat([1.0, 5.0], [800, 200]),
    }
    model, data = model_of(columns, "--model", name)
    last = (model.generator if name == "ctgan" else model.decoder).layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias[:7] = torch.tensor([0.5, 0.3, 0.2, 0.8, 0.2, 0.6, 0.4]).log()
    model.eval()
    rows, made = ctgan.draw_rows(model, 20_000), ctgan.sample(model, 20_000)
    drawn = ctgan.decode(rows, data.columns)
    for column, value in (("a", "x"), ("a", "y"), ("a", "z"), ("b", 1), ("n", 5.0)):
        p, share, before = ((t[column] == value).mean() for t in (columns, made, drawn))
        error = 3 * math.sqrt(p * (1 - p) / 20_000)
        assert abs(share - p) < 2 * error < abs(before - p)  # the pool of rake has errors, too
    weight = model.raked[rows[:, :3].long() + model.offsets].sum(dim=1)
    assert (weight >= weight.quantile(0.9)).double().mean() >= 0.1
    again = ctgan.rake(model)
    assert torch.equal(again, model.raked)
    assert not ctgan.rake(model, passes=0).any()


def test_what_differs_by_chance_alone_is_not_raked():
    """Of a value that is met four times among the rows of rake, the weight would be noise."""
    model, _ = model_of({"a": np.repeat(["x", "y", "z"], [9990, 8, 2])}, "--model", "tvae")
    last = model.decoder.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias[:] = torch.tensor([0.999, 8e-4, 2e-4]).log()
    assert ctgan.rake(model).abs().max() < 0.3


def obey(model):
    """Makes the untrained generator copy its condition to the logits, and give even odds else."""
    layer = model.generator.layers[-1]
    values = len(model.column_of)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[:values, -values:] = 50 * torch.eye(values)


def test_linear_layer_of_parts_is_that_of_all_together():
    torch.manual_seed(0)
    layer, parts = ctgan.Joint(9, 5), [torch.randn(2, 6, 4), torch.randn(6, 3), torch.randn(6, 2)]
    parts[0].requires_grad_()
    joined = torch.cat([part.expand(2, -1, -1) for part in parts], dim=2)
    found, wanted = layer(*parts), F.linear(joined, layer.weight, layer.bias)
    assert torch.allclose(found, wanted, atol=1e-6)
    needed = [parts[0], layer.weight, layer.bias]
    for pair in zip(*(torch.autograd.grad(y.square().sum(), needed) for y in (found, wanted))):
        assert torch.allclose(*pair, atol=1e-5)


def test_dropout_is_of_a_half():
    """As nn.Dropout(0.5): each by itself, afresh, doubled; in evaluation none."""
    torch.manual_seed(0)
    layer, x = ctgan.HalfDropout(), torch.ones(301, 333, requires_grad=True)
    first, second = layer(x), layer(x)
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(gradient, first) and {*first.unique().tolist()} == {0, 2}
    # in a grid of so many columns neighbours of each kind agree as often as not
    agree = [first == second, first[1:] == first[:-1], first[:, 8:] == first[:, :-8]]
    agree += [first[:, 1:] == first[:, :-1], first > 0]
    for share in agree:
        assert within_noise(share.double().mean(), 0.5, share.numel())
    assert layer.eval()(x) is x


class LinearCritic(nn.Module):
    """(rows, cond) -> their sums weighted by w (pac, outputs) and v."""

    def __init__(self, w, v):
        super().__init__()
        self.w, self.v = nn.Parameter(w), nn.Parameter(v)

    def forward(self, rows, condition):
        return (rows * self.w).sum(dim=(-2, -1)) + (condition * self.v).sum(dim=(-2, -1))


def test_penalty_is_of_the_rows_of_a_pack_together():
    """|grad| is |w|, over all rows of the pack; what belongs to cond has no part in it."""
    model, data = model_of(easy(200), "--pac", 5, "--batch-size", 50)
    real, *conditions = model.batch(data, torch.arange(50))
    critic = LinearCritic(torch.randn(5, real.shape[1]), 100 * torch.randn(5, len(model.column_of)))
    model.critic, model.optimizer_d = critic, torch.optim.SGD(critic.parameters(), 0)
    losses = ctgan.ctgan_step(model, real, *conditions)
    assert losses["penalty"].item() == pytest.approx((critic.w.norm().item() - 1) ** 2, rel=1e-4)


@pytest.mark.parametrize("flags", [[], ["--gp-weight", 3, "--pac", 2]])
def test_ctgan_step_is_algorithm_1(flags):
    """Against a plain version with the same random numbers, without dropout, losses and weights."""
    model, data = model_of(easy(200), "--batch-size", 40, *flags)
    model.critic.eval()  # no dropout
    other = copy.deepcopy(model)
    for one in (model, other):  # Adam would make much of the last digits of small gradients
        one.optimizer_d = torch.optim.SGD(one.critic.parameters(), 0.01)
        one.optimizer_g = torch.optim.SGD(one.generator.parameters(), 0.1)
    batch = model.batch(data, torch.arange(40))
    torch.manual_seed(1)
    losses = ctgan.ctgan_step(model, *batch)
    torch.manual_seed(1)
    plain = plain_ctgan_step(other, *batch)
    assert losses.keys() == plain.keys()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(plain[name].item(), rel=1e-4, abs=1e-6), name
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name


def plain_ctgan_step(model, real, condition, condition_g):
    G, D, pac, column_of = model.generator, model.critic, model.args.pac, model.column_of

    def score(rows, cond):
        packs = [(rows[i : i + pac], cond[i : i + pac]) for i in range(0, len(rows), pac)]
        return torch.stack([D(r[None], c[None])[0] for r, c in packs])

    cond = F.one_hot(condition, len(column_of)).float()
    fake = ctgan.activate(G(model.noise(len(real)), cond), model.sizes).detach()
    rho = torch.rand(len(real) // pac, 1, 1).expand(-1, pac, 1).reshape(-1, 1)
    between = (rho * fake + (1 - rho) * real).requires_grad_()
    (gradient,) = torch.autograd.grad(score(between, cond).sum(), between, create_graph=True)
    norms = gradient.reshape(len(real) // pac, -1).norm(dim=1)
    penalty = ((norms - 1) ** 2).mean()
    loss_d = score(fake, cond).mean() - score(real, cond).mean() + model.args.gp_weight * penalty
    model.optimizer_d.zero_grad()
    loss_d.backward()
    model.optimizer_d.step()
    cond = F.one_hot(condition_g, len(column_of)).float()
    outputs = G(model.noise(len(real)), cond)
    loss_g = -score(ctgan.activate(outputs, model.sizes), cond).mean()
    loss_condition = ctgan.condition_loss(outputs, condition_g, column_of)
    model.optimizer_g.zero_grad()
    (loss_g + loss_condition).backward()
    model.optimizer_g.step()
    return {
        "loss_critic": loss_d,
        "loss_generator": loss_g,
        "loss_condition": loss_condition,
        "penalty": penalty,
    }


def test_fused_penalty_is_the_reference_s():
    """With the same dropout: its value, and what it gives the critic's weights."""
    kernels = pytest.importorskip("gan_kernels")
    critic, found = ctgan.Critic(outputs=13, conditions=4, pac=5, dim=16), []
    rows, cond = torch.randn(8, 5, 13), F.one_hot(torch.randint(4, (8, 5)), 4).float()
    for penalty in (kernels.gradient_penalty, ctgan.gradient_penalty_reference):
        torch.manual_seed(3)
        loss = penalty(lambda rows: critic(rows, cond), rows)
        found.append(
            [loss, *torch.autograd.grad(loss, [p for p in critic.parameters() if p.ndim > 1])]
        )
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*found))
    assert found[0][0] > 0


def test_reference_penalty_where_there_is_no_gradient():
    layer = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(layer.weight)
    loss = ctgan.gradient_penalty_reference(layer, torch.randn(4, 3))
    loss.backward()
    assert loss == 1 and not layer.weight.grad.any()


@pytest.mark.parametrize("sizes, alphas", [(SIZES, 2), (SIZES, 0), ([2], 1)])
def test_reconstruction_is_the_likelihood_of_the_row(sizes, alphas):
    """Both forms, and their gradients; without numbers too."""
    torch.manual_seed(0)
    outputs = torch.randn(6, sum(sizes) + alphas, requires_grad=True)
    sd = torch.empty(alphas).uniform_(0.05, 1).requires_grad_()
    category = torch.stack([torch.randint(size, (6,)) for size in sizes], dim=1)
    alpha = torch.rand(6, alphas) * 2 - 1
    likelihood = Normal(outputs[:, sum(sizes) :].tanh(), sd).log_prob(alpha).sum(dim=1)
    for span, drawn in zip(outputs[:, : sum(sizes)].split(sizes, dim=1), category.T):
        likelihood = likelihood + Categorical(logits=span).log_prob(drawn)
    wanted = [-likelihood.mean(), *torch.autograd.grad(-likelihood.mean(), [outputs, sd])]
    forms = [ctgan.reconstruction_loss_reference]
    forms += [ctgan.reconstruction_loss_fused] if ctgan.gan_kernels else []
    for form in forms:
        loss = form(outputs, category, alpha, sizes, sd)
        found = [loss, *torch.autograd.grad(loss, [outputs, sd], allow_unused=not alphas)]
        for a, b in zip(found, wanted):
            assert torch.allclose(a if a is not None else b, b, rtol=1e-4, atol=1e-6)


def test_tvae_step_is_the_evidence_lower_bound():
    """Against torch.distributions, with the same random numbers: losses and weights."""
    model, data = model_of(easy(200), "--model", "tvae", "--batch-size", 40)
    other = copy.deepcopy(model)
    for one in (model, other):
        one.optimizer = torch.optim.SGD(one.parameters(), 1e-3)
    batch = real, category, alpha = model.batch(data, torch.arange(40))
    assert torch.equal(real, model.expand(data.train[:40]))
    torch.manual_seed(1)
    losses = ctgan.tvae_step(model, *batch)
    torch.manual_seed(1)
    mean, log_var = other.encoder(real)
    q = Normal(mean, (log_var / 2).exp())
    outputs = other.decoder(q.rsample())
    sd = other.decoder.sd
    nll = ctgan.reconstruction_loss_reference(outputs, category, alpha, other.sizes, sd)
    kl = kl_divergence(q, Normal(0, 1)).sum(dim=1).mean()
    assert losses["reconstruction"].item() == pytest.approx(nll.item(), rel=1e-4)
    assert losses["divergence"].item() == pytest.approx(kl.item(), rel=1e-4)
    other.optimizer.zero_grad()
    (2 * nll + kl).backward()
    other.optimizer.step()
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name
    with torch.no_grad():
        model.decoder.sd.copy_(torch.tensor([5.0, 1e-9, 0.5]))
    ctgan.tvae_step(model, *batch)
    assert model.decoder.sd.min() >= 0.01 and model.decoder.sd.max() <= 1


def test_networks_and_optimizers_are_the_paper_s():
    data = data_of(easy(600))
    sizes, alphas, values = {}, 3, 6
    for name in ("ctgan", "tvae"):
        args = parsed("--model", name)
        ctgan.suit(args, data)
        model = ctgan.Model(args, data)
        sizes[name] = [tuple(p.shape) for n, p in model.named_parameters() if "weight" in n]
        assert args.batch_size == 500 and args.lr == (2e-4 if name == "ctgan" else 1e-3)
        settings = [optimizer.param_groups[0] for optimizer in model.optimizers]
        if name == "ctgan":
            assert args.pac == 1 and [s["betas"] for s in settings] == [(0.5, 0.9)] * 2
            assert [s["weight_decay"] for s in settings] == [1e-6, 0]
        else:
            assert [s["weight_decay"] for s in settings] == [1e-5]
            assert model.decoder.sd.tolist() == [pytest.approx(0.1)] * alphas
    outputs = sum(model.sizes) + alphas
    h = 128 + values
    assert sizes["ctgan"] == [
        (256, h), (256,), (256, h + 256), (256,), (outputs, h + 512),
        (256, outputs + values), (256, 256), (1, 256),
    ]  # fmt: skip
    assert sizes["tvae"] == [
        (128, outputs), (128, 128), (256, 128), (128, 128), (128, 128), (outputs, 128)
    ]  # fmt: skip


@NO_GPU
@pytest.mark.parametrize("name", ["ctgan", "tvae"])
def test_step_does_not_synchronise(name):
    args, table = parsed("--model", name), ctgan.as_table(easy(600))
    data = ctgan.table_data("made", *table, args, torch.device("cuda"), test={})
    ctgan.suit(args, data)
    model, index = ctgan.Model(args, data), torch.arange(args.batch_size, device="cuda")
    ctgan.train_step(model, *model.batch(data, index))
    torch.cuda.set_sync_debug_mode("error")
    try:
        ctgan.train_step(model, *model.batch(data, index))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------ sampling
@functools.cache
def trained_model(name):
    """A training of seconds on the easy table."""
    settings = {"epochs": 80, "batch_size": 100, "lr": 2e-3, "pac": 5}
    return ctgan.fit(easy(), name, dim=64, noise=16, **settings)


@pytest.fixture(params=["ctgan", "tvae"])
def either(request):
    return trained_model(request.param)


@pytest.fixture
def trained():
    return trained_model("ctgan")


def test_sampling_leaves_the_model_as_it_was(either):
    """#309: batch norm in training mode took up what was sampled."""
    before, drawn = copy.deepcopy(either.state_dict()), ctgan.sample(either, 700)
    either.train()
    try:
        again = ctgan.sample(either, 700)
        assert either.training and all(module.training for module in either.modules())
    finally:
        either.eval()
    assert same(either.state_dict(), before)
    assert all((drawn[name] == again[name]).all() for name in drawn)


@pytest.mark.parametrize("given", [None, {"city": "Cyr"}, {"age": (30, 50), "sex": "F"}])
def test_first_row_is_the_same_whatever_the_number(either, given):
    """#309: no row depends on those drawn with it."""
    one, some, many = (ctgan.sample(either, n, given, seed=3) for n in (1, 500, 1200))
    for name, column in many.items():
        assert len(column) == 1200 and column[0] == one[name][0]
        assert (column[:500] == some[name]).all()
    other = ctgan.sample(either, 500, given, seed=4)
    assert any((other[name] != some[name]).any() for name in other)


def test_sampling_leaves_the_random_numbers_of_others_alone(either):
    torch.manual_seed(0), np.random.seed(0)
    wanted = torch.rand(1), np.random.rand()
    torch.manual_seed(0), np.random.seed(0)
    ctgan.sample(either, 10)
    assert (torch.rand(1), np.random.rand()) == wanted


def test_number_of_rows_may_be_none(trained):
    empty = ctgan.sample(trained, 0)
    assert list(empty) == list(easy()) and all(len(column) == 0 for column in empty.values())


def test_every_condition_is_obeyed(trained):
    """#273, #235, #397, #322: of every column, not of the first alone; and the rare value too."""
    shares = ctgan.obeyed(trained)
    assert shares["condition_obeyed_worst"] >= 0.95
    for name, values in (("city", "Ada Bor Cyr Dax"), ("sex", "F M")):
        for value in values.split():
            made, kept = ctgan.sample_given(trained, 1000, {name: value})
            assert kept >= 0.95 and (made[name] == value).all()


@pytest.mark.parametrize(
    "dtype, given",
    [
        ("int64", np.array([30, 40])),
        ("int64", range(30, 41)),
        ("float32", 0.1),
        ("float64", 0.1),
    ],
)
def test_given_from_arrays_ranges_and_floats_of_any_precision(dtype, given):
    x = np.arange(20, 60).repeat(5) if dtype == "int64" else np.tile([0.1, 0.2, 0.3], 50)
    model, _ = model_of({"x": x.astype(dtype)}, "--continuous", "x")
    made = ctgan.sample(model, 5, {"x": given})["x"]
    ends = (30, 40) if dtype == "int64" else np.array([0.1, 0.1]).astype(dtype)
    assert ((made >= ends[0]) & (made <= ends[1])).all()


def test_given_by_a_number_of_another_kind_and_columns_named_by_numbers():
    table = {0: np.tile([1.0, 2.0], 50), 1: np.tile(["a", "b"], 50)}
    model = fit(table, discrete=[1])
    made = ctgan.sample(model, 5, {0: 2, 1: "b"})
    assert (made["0"] == 2).all() and (made["1"] == "b").all()


def test_fewer_rows_than_none(trained):
    with pytest.raises(ctgan.UsageError, match="-5 rows"):
        ctgan.sample(trained, -5)


def test_each_category_keeps_its_share(trained):
    """#16: by the logarithm the rarest of four would be 15 %, and the rarer of two 37 %."""
    made, data = ctgan.sample(trained, 10_000), easy()
    for name in ("city", "sex"):
        for value in np.unique(data[name]):
            p, share = ((table[name] == value).mean() for table in (data, made))
            assert abs(share - p) < 0.03, (value, p, share)


def test_what_is_given_goes_with_what_it_goes_with_in_the_data(trained):
    """SDGym#22: a condition for the whole batch was subtracted out by batch norm."""
    for value, wanted in (("Ada", 0), ("Bor", 3), ("Cyr", 6)):
        x = ctgan.sample(trained, 500, {"city": value})["x"]
        assert abs(np.median(x) - wanted) < 1


@pytest.mark.parametrize(
    "given, test",
    [
        ({"city": "Dax"}, lambda t: t["city"] == "Dax"),
        ({"city": "Bor", "sex": "M"}, lambda t: (t["city"] == "Bor") & (t["sex"] == "M")),
        ({"age": (30, 40)}, lambda t: (t["age"] >= 30) & (t["age"] <= 40)),
        ({"age": (30.5, 31.5)}, lambda t: t["age"] == 31),
        ({"age": "30..40"}, lambda t: (t["age"] >= 30) & (t["age"] <= 40)),
        ({"age": 40}, lambda t: t["age"] == 40),
        ({"age": "40"}, lambda t: t["age"] == 40),
        ({"x": [-1, 0.5], "sex": "F"}, lambda t: (t["x"] <= 0.5) & (t["sex"] == "F")),
        (
            {"day": "2020-05-01..2020-08-01"},
            lambda t: (
                (t["day"] >= np.datetime64("2020-05-01")) & (t["day"] < np.datetime64("2020-08-02"))
            ),
        ),
        (
            {"day": (np.datetime64("2020-05-01"), np.datetime64("2020-08-01")), "city": "Ada"},
            lambda t: (t["day"] <= np.datetime64("2020-08-01")) & (t["city"] == "Ada"),
        ),
    ],
)
def test_given(given, test, either):
    made, kept = ctgan.sample_given(either, 30, given)
    assert all(len(column) == 30 for column in made.values())
    assert test(made).all() and 0 < kept <= 1
    assert {name: column.dtype for name, column in made.items()} == {
        name: column.dtype for name, column in easy().items()
    }


def test_given_names_and_values_with_spaces():
    """#397: `Male` is not ` Male`, but what else could be meant."""
    model = fit({"sex": np.array([" Male", " Female"] * 40), "x": np.arange(80)})
    for value in (" Male", "Male"):
        assert (ctgan.sample(model, 20, {"sex": value})["sex"] == " Male").all()


@pytest.mark.parametrize(
    "given, said",
    [
        ({"town": "Ada"}, "city, x, sex, age, day"),
        ({"city": "Eve"}, "Ada, Bor, Cyr, Dax"),
        ({"city": None}, "Ada, Bor, Cyr, Dax"),
        ({"sex": ""}, "F, M"),
        ({"age": "old"}, "age"),
        ({"age": None}, "age"),
        ({"age": ()}, "age"),
        ({"age": math.nan}, "age"),
        ({"age": (95, 99)}, "18 to 89"),
        ({"age": (40, 30)}, "18 to 89"),
        ({"day": "yesterday"}, "day"),
        ({"day": "2031-01-01"}, "2020-01-01 to 2021-11-30"),
    ],
)
def test_given_that_the_data_have_not(given, said, trained):
    """#124: a wrong condition was silently ignored; here the error names what is known."""
    with pytest.raises(ctgan.UsageError) as error:
        ctgan.sample(trained, 5, given)
    assert said in str(error.value)


def test_given_that_is_never_met_together_ends_in_an_error(trained, monkeypatch):
    """After a number of rows that does not depend on how many are wanted."""
    drawn, draw = [], ctgan.draw_rows
    monkeypatch.setattr(ctgan, "draw_rows", lambda *args: drawn.append(1) or draw(*args))
    ctgan.sample(trained, 1)  # raked
    counts = []
    for n in (10, 10**6):
        drawn.clear()
        with pytest.raises(ctgan.UsageError, match=r"of 100,\d{3} rows"):
            ctgan.sample(trained, n, {"x": (4.4, 4.41), "city": "Ada", "age": 33, "sex": "M"})
        counts.append(len(drawn))
    assert counts[0] == counts[1] <= 400


@pytest.mark.parametrize("name", ["ctgan", "tvae"])
def test_categories_are_drawn_and_not_the_likeliest_taken(name):
    """TVAE of 0.12.1 takes the likeliest, so that what has less than 10 % vanishes."""
    columns = {"a": np.repeat(["x", "y"], [950, 50]), "n": np.arange(1000) % 50}
    model, data = model_of(columns, "--model", name)
    last = (model.generator if name == "ctgan" else model.decoder).layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        last.bias[:2] = torch.tensor([0.95, 0.05]).log()
    made = ctgan.sample(model, 20_000)
    assert within_noise((made["a"] == "y").mean(), 0.05, 20_000)
    modes = len(data.columns[1]["means"])
    assert len(np.unique(made["n"])) >= modes > 1  # and so are modes


def test_tvae_draws_numbers_about_their_mean():
    x = np.random.default_rng(0).normal(size=1000)
    model, data = model_of({"x": x}, "--model", "tvae")
    with torch.no_grad():
        model.decoder.layers[-1].weight.zero_()
        model.decoder.layers[-1].bias.zero_()
        model.decoder.layers[-1].bias[0] = 50  # of one mode alone
        model.decoder.sd.fill_(0.05)
    (column,) = data.columns
    made = ctgan.sample(model, 10_000)["x"]
    assert made.std() == pytest.approx(0.05 * column["scales"][0], rel=0.05)
    assert made.mean() == pytest.approx(column["means"][0], abs=0.01)


# ------------------------------------------------------------------ fit
@pytest.mark.parametrize("name", ["ctgan", "tvae"])
def test_seeds_repeat_bit_for_bit(name):
    """#63, #201, #213, #380, SDV#2022; #131: fitted again, a model starts anew."""
    torch.manual_seed(0), np.random.seed(0)
    first = fit(easy(100), name)
    torch.manual_seed(1), np.random.seed(1)
    again, other = fit(easy(100), name), fit(easy(100), name, seed=1)
    assert same(first.state_dict(), again.state_dict())
    assert not same(first.state_dict(), other.state_dict())
    a, b = (ctgan.sample(model, 100, seed=5) for model in (first, again))
    assert all((a[column] == b[column]).all() for column in a)


def test_fit_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(0), np.random.seed(0)
    wanted = torch.rand(1), np.random.rand()
    torch.manual_seed(0), np.random.seed(0)
    fit(easy(100))
    assert (torch.rand(1), np.random.rand()) == wanted


@pytest.mark.parametrize("name", ["ctgan", "tvae"])
@pytest.mark.parametrize("n", [5, 12, 30, 100])
def test_small_tables_train(n, name):
    """#135: fewer rows than a batch left the networks as they were, without a word."""
    columns = {key: column[:n] for key, column in easy(100).items()}
    one, two = (ctgan.fit(columns, name, dim=8, noise=4, epochs=e) for e in (1, 2))
    before, after = one.state_dict(), two.state_dict()
    moved = [key for key in before if "weight" in key and not torch.equal(before[key], after[key])]
    assert len(moved) == sum("weight" in key for key in before)
    assert len(ctgan.sample(two, 7)["city"]) == 7


@pytest.mark.parametrize("name", ["ctgan", "tvae"])
@pytest.mark.parametrize("columns", [1, 3])
def test_numbers_alone_and_categories_alone(name, columns):
    """#115, SDV#284: without a discrete column; and without a continuous one."""
    rng = np.random.default_rng(0)
    numbers = {f"x{i}": rng.normal(size=200) for i in range(columns)}
    categories = {f"c{i}": rng.choice(["a", "b"], 200) for i in range(columns)}
    for table in (numbers, categories):
        made = ctgan.sample(fit(table, name), 50)
        assert list(made) == list(table) and all(map(len, made.values()))
    assert ctgan.obeyed(fit(numbers)) == {}


def test_many_columns_of_numbers(monkeypatch):
    """#1: 1,846 columns gave NaN alone, of more than 50."""
    modes = np.array([0.5, 0.5]), np.array([-1.0, 1]), np.array([1.0, 1])
    monkeypatch.setattr(ctgan, "fit_mixture", lambda x, counts: modes)  # which takes a while each
    table = dict(zip(map(str, range(1846)), np.random.default_rng(0).normal(size=(1846, 60))))
    model = fit(table, epochs=1)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    made = ctgan.sample(model, 20)
    assert len(made) == 1846 and np.isfinite(np.stack([*made.values()])).all()


def test_tvae_keeps_a_number_of_three_values():
    """#138: it lost two of them."""
    x = np.random.default_rng(0).choice([0.0, 0.5, 1.0], 500, p=[0.2, 0.7, 0.1])
    table = {"x": x, "y": x + np.random.default_rng(1).normal(size=500)}
    for continuous in ([], ["x"]):
        model = ctgan.fit(
            table, "tvae", continuous=continuous, dim=32, noise=8, epochs=30, batch_size=50
        )
        values, counts = np.unique(ctgan.sample(model, 5000)["x"], return_counts=True)
        assert values.tolist() == [0, 0.5, 1]
        assert np.allclose(counts / 5000, [0.2, 0.7, 0.1], atol=0.25) and counts.min() > 150


@pytest.mark.parametrize("name", ["ctgan", "tvae"])
def test_missing_numbers_come_back_as_often(name):
    """#413, #414, #264, #329: with a gap the error came after the training, in sampling."""
    rng, n = np.random.default_rng(0), 600
    group = rng.choice(["a", "b"], n)
    x = np.where(rng.random(n) < np.where(group == "a", 0.6, 0.1), np.nan, rng.normal(size=n))
    settings = {"dim": 64, "noise": 8, "epochs": 60, "batch_size": 60, "lr": 2e-3, "pac": 5}
    made = ctgan.sample(ctgan.fit({"x": x, "group": group}, name, **settings), 5000)
    assert abs(np.isnan(made["x"]).mean() - np.isnan(x).mean()) < 0.1
    assert np.isnan(made["x"][made["group"] == "a"]).mean() > 0.2  # it depends on the group


@pytest.mark.parametrize("settings", [{"batch_size": 16, "pac": 10}, {"batch_size": 2048}])
def test_batches_of_any_size(settings, capsys):
    """#60, SDV#211, SDV#1231: bare assertions; here a message with what fits, or it runs."""
    with pytest.raises(ctgan.UsageError) as error:
        fit(easy(100), **settings)
    said = str(error.value)
    assert f"--batch-size {settings['batch_size']}" in said and "AssertionError" not in said
    assert fit(easy(100), batch_size=16) and fit(easy(100), "tvae", batch_size=16)
    assert fit(easy(2600), batch_size=2048) and fit(easy(2600), batch_size=2040, pac=8, epochs=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"batch_size": 1},
        {"batch_size": 110},  # there are 100 rows
        {"batch_size": "many"},
        {"epochs": 0},
        {"epochs": -1},
        {"epochs": 1.5},
        {"pac": 0},
        {"lr": math.nan},
        {"seed": -1},
        {"dim": 0},
        {"model": "gan"},
        {"precision": "fp8"},
        {"epoch": 3},
        {"max_steps": 3},  # of a run, as are the next
        {"test_rows": 20},
        {"out": "run"},
        {"drop": ["nothing"]},
        {"discrete": ["nothing"]},
        {"continuous": ["nothing"]},
        {"continuous": ["city"]},
    ],
)
def test_settings_that_do_not_fit(settings):
    """#74, SDV: epochs of -1 and batches of 0 were taken, or ended in ZeroDivisionError."""
    with pytest.raises(ctgan.UsageError) as error:
        fit(easy(100), **settings)
    assert next(iter(settings)).replace("_", "-") in str(error.value).replace("_", "-")


def test_fit_learns_from_every_row():
    """A run holds rows out; here a value of five rows was lost with them."""
    columns = {"c": np.where(np.isin(np.arange(100), [9, 12, 21, 25, 36]), "b", "a")}
    model = fit(columns, epochs=1)
    assert model.count.tolist() == [95, 5]
    assert (ctgan.sample(model, 3, {"c": "b"})["c"] == "b").all()


def test_fit_that_diverges_ends_in_an_error():
    with pytest.raises(ctgan.UsageError, match="not finite after training: take an lr below"):
        fit(easy(100), "tvae", lr=1e9, epochs=20)


@pytest.mark.parametrize("n, updates", [(3, 3000), (750, 3000), (1499, 3000), (4999, 3000)])
def test_small_tables_have_as_many_updates_as_promised(n, updates):
    args, data = parsed(), data_of({"a": np.arange(n) % 2 == 0}, "--test-rows", 1)
    data = data._replace(train=data.train[:1].expand(n, -1))
    ctgan.suit(args, data)
    steps = n // args.batch_size
    assert updates <= args.epochs * steps < updates + steps


@pytest.mark.parametrize("name", ["ctgan", "tvae"])
def test_rate_falls_to_0_in_the_second_half(name):
    flags = ["--model", name, "--batch-size", 40, "--epochs", 2, "--lr", 0.1]
    model, data = model_of(easy(200), *flags)
    rates = {optimizer: [] for optimizer in model.optimizers}
    for optimizer in model.optimizers:
        optimizer.register_step_post_hook(
            lambda of, *_: rates[of].append(float(of.param_groups[0]["lr"]))
        )
    for _ in range(10):
        ctgan.train_step(model, *model.batch(data, torch.arange(40)))
    for found in rates.values():
        assert np.allclose(found, [0.1] * 6 + [0.08, 0.06, 0.04, 0.02])


def test_each_measure_has_its_tables(monkeypatch, tmp_path):
    """60 rows are trained on, 17 held out, 50 synthetic."""
    table = {name: column[:77] for name, column in easy(100).items()}
    args = parsed("--noise", 4, "--dim", 8, "--target", "sex", "--test-rows", 17)
    data = ctgan.table_data("made", *ctgan.as_table(table), args, CPU)
    ctgan.suit(args, data)
    model, seen = ctgan.Model(args, data).eval(), []
    for name in ("quality", "rare_values", "privacy", "detection_auc", "efficacy"):

        def sizes(*given, name=name):
            seen.append((name, *(len(t["x"]) for t in given if isinstance(t, dict))))
            return {}

        monkeypatch.setattr(ctgan, name, sizes)
    for name in ("save_columns", "save_pairs", "save_curves"):
        monkeypatch.setattr(ctgan, name, lambda *_: None)
    fifty = {name: column[:50] for name, column in data.table.items()}
    monkeypatch.setattr(ctgan, "sample", lambda *_: fifty)
    ctgan.evaluate(model, data)
    ctgan.finish(model, data, tmp_path, [])
    assert seen[1:] == [
        ("quality", 17, 50),
        ("rare_values", 60, 50),
        ("privacy", 60, 17, 50),
        ("detection_auc", 17, 50),
        ("efficacy", 60, 50, 17),
    ]
    assert seen[0][:2] == ("quality", 17)


def test_packs_by_default_are_of_numbers_alone_where_ctgan_s_batch_has_fives():
    numbers = {"x": np.random.default_rng(0).normal(size=200)}
    for flags, pac in (
        ([], 5),
        (["--batch-size", 64], 1),
        (["--batch-size", 65], 5),
        (["--model", "tvae", "--batch-size", 64], 1),
    ):
        assert model_of(numbers, *flags)[0].args.pac == pac
    assert model_of(numbers | {"c": np.arange(200) % 3})[0].args.pac == 1


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"a": np.arange(5), "b": np.arange(6)},
        {"a": np.zeros((5, 2))},
        {"a": 3},
        {"a": []},
        {"a": [1]},
        {"a": np.append(np.arange(26.0), np.inf)},
        {"a": np.full(9, np.nan)},
    ],
)
def test_tables_that_are_none(table):
    with pytest.raises(ctgan.UsageError):
        fit(table)


def test_lists_and_numbers_with_none_among_them():
    table = {"a": [1, 2, None, 4] * 10, "b": ["x", "y"] * 20, "c": [1.5, 2.5] * 20}
    made = ctgan.sample(fit(table), 50)
    assert np.isnan(made["a"]).any() and set(made["b"]) <= {"x", "y"}
    assert set(made["c"]) <= {1.5, 2.5}


def test_data_frame():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(easy(100)).astype({"city": "category", "age": "Int64"})
    frame["gap"] = frame["age"].where(frame["age"] > 30)
    made = ctgan.sample(fit(frame), 50, given={"city": "Ada"})
    assert list(made) == list(frame) and (made["city"] == "Ada").all()
    assert pandas.DataFrame(made)["day"].dtype == frame["day"].dtype


# ------------------------------------------------------------------ CSV files
def load(path="in.csv", *flags):
    return ctgan.load_data(parsed("--data", path, *flags), CPU)


def text_table(text, *flags, encoding="utf-8"):
    """The table of a CSV file of this text, rows held out and all."""
    Path("in.csv").write_bytes(text.encode(encoding))
    data = load("in.csv", *flags)
    return {name: [*data.table[name].tolist(), *data.test[name].tolist()] for name in data.table}


LINES = [
    ["name", "x", "note"],
    *([f"n{i % 3}", str(i), "a, b" if i % 2 else ""] for i in range(20)),
]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "dialect", ["plain", "BOM", "quoted", "spaces", "blank lines", "CRLF", "no end"]
)
def test_dialects_of_csv(delimiter, dialect):
    quote = '"' if dialect == "quoted" else ""
    lines = [[f'"{x}"' if delimiter in x or quote else x for x in line] for line in LINES]
    text = "\n".join((delimiter + " " * (dialect == "spaces")).join(line) for line in lines) + "\n"
    text = {
        "blank lines": "\n" + text.replace("\n", "\n\n") + "\n",
        "CRLF": text.replace("\n", "\r\n"),
        "no end": text[:-1],
    }.get(dialect, text)
    table = text_table(text, encoding="utf-8-sig" if dialect == "BOM" else "utf-8")
    assert list(table) == ["name", "x", "note"] and sorted(table["x"]) == list(range(20))
    assert {*table["name"]} == {"n0", "n1", "n2"} and {*table["note"]} == {"a, b", ""}
    assert all(("a, b" if x % 2 else "") == note for x, note in zip(table["x"], table["note"]))


@pytest.mark.parametrize(
    "text, kind, values",
    [
        ("1 2 3", "i", [1, 2, 3]),
        ("+1 -2 0", "i", [1, -2, 0]),
        ("1.5 .5 -3.", "f", [1.5, 0.5, -3]),
        ("1e3 2E-2 5", "f", [1000, 0.02, 5]),
        ("1 NA nan ? 3", "f", [1, None, None, None, 3]),
        ("1 two 3", "U", ["1", "two", "3"]),
        ("1 inf 3", "U", ["1", "inf", "3"]),
        ("01 02 10", "U", ["01", "02", "10"]),
        ("1_0 2_0", "U", ["1_0", "2_0"]),
        ("\u0661 \u0662", "U", ["\u0661", "\u0662"]),
        ("9007199254740993 1", "f", [9007199254740992, 1]),
        ("2020-02-29 2021-01-01 NaT", "M", ["2020-02-29", "2021-01-01", "NaT"]),
        ("29.02.2020 01.03.2021", "M", ["2020-02-29", "2021-03-01"]),
        ("12/31/2020 01/02/2021", "M", ["2020-12-31", "2021-01-02"]),
        ("31/12/2020 01/02/2021", "M", ["2020-12-31", "2021-02-01"]),
        ("2020-01-01T10:00:30", "M", ["2020-01-01T10:00:30"]),
        ("2020-02-30 2021-01-01", "U", ["2020-02-30", "2021-01-01"]),
        ("? NA", "U", ["?", "NA"]),
    ],
)
def test_types_of_texts(text, kind, values):
    found, _ = ctgan.parse(text.split())
    assert found.dtype.kind == kind
    if kind == "f":
        assert [None if math.isnan(x) else x for x in found.tolist()] == values
    else:
        wanted = np.array(values, found.dtype)
        assert ((found == wanted) | ((found != found) & (wanted != wanted))).all()


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "0 rows"),
        ("\n\n", "0 rows"),
        ("a,b\n", "0 rows"),
        ("a,b\n1,2\n", "1 rows"),
        ("a,b\n1,2\n3,4\n", "2 rows"),
        ("a,b\n1,2\n3\n5,6\n", "row 3: 1 values for 2 columns"),
        ("a,b\n1,2\n3,4,5\n5,6\n", "row 3: 3 values for 2 columns"),
        ("1,2\n3,4\n5,6\n7,8\n", "--header"),
        ("a,a\n1,2\n3,4\n5,6\n", "'a'"),
        ('a,b\n1,"2\n' + "3,4\n" * 60_000, "no CSV file"),
    ],
)
def test_files_that_are_no_table(text, said, capsys):
    Path("in.csv").write_text(text)
    assert said in refused(capsys, "--data", "in.csv")


def test_other_encodings_folders_and_files_that_are_not_there(capsys):
    for encoding in ("latin-1", "utf-16"):
        Path("in.csv").write_text("a,b\nä,1\nö,2\n" * 9, encoding=encoding)
        assert "UTF-8" in refused(capsys, "--data", "in.csv")
    Path("folder").mkdir()
    for name in ("folder", "nowhere.csv", "folder/in.csv", "in.csv/in.csv"):
        assert name in refused(capsys, "--data", name)
    Path("in.csv").write_bytes(bytes(range(128)) * 9)
    refused(capsys, "--data", "in.csv")
    assert "a CSV is --data" in refused(capsys, "--dataset", "in.csv")
    assert "--dataset nothing" in refused(capsys, "--dataset", "nothing")
    Path("net.bif").write_text("a,b\n1,2")
    assert "net.bif" in refused(capsys, "--dataset", "net.bif")
    refused(capsys, "--dataset", "nowhere.bif")


def test_header_of_numbers_is_not_taken_for_values(capsys):
    write("in.csv", {"country": ["A", "B", "C"], "2019": ["1", "2", "3"]})
    assert "'2019'); rename that" in refused(capsys, "--data", "in.csv")


def test_long_texts_of_a_column_to_drop_take_no_memory():
    texts = {"size": ["1", "2", "3", "4"], "note": ["x" * 10**5, "", "", ""]}
    table, _ = ctgan.read_csv(write("in.csv", texts), drop=["note"])
    assert table["note"] is None and table["size"].tolist() == [1, 2, 3, 4]
    assert [*load("in.csv", "--drop", "note").table] == ["size"]


def test_early_dates_come_back_as_they_were():
    days = ["0001-01-01", "0987-03-04", "2020-12-31", "1999-01-02"]
    data = whole(*ctgan.read_csv(write("in.csv", {"day": days})))
    ctgan.write_csv("out.csv", ctgan.decode(data.train, data.columns), data.columns)
    assert read("out.csv")["day"] == read("in.csv")["day"]


def test_few_rows_to_train_on_end_without_what_needs_more(capsys):
    """A detector needs three of either kind, and a model of the target rows that have it."""
    write("in.csv", {"a": ["1.5", "2.5", "", ""] * 5, "b": [*"pqrst"] * 4})
    run = ["--data", "in.csv", "--dim", 8, "--noise", 4, "--epochs", 1, "--max-steps", 1]
    for n, flags in enumerate((["--test-rows", 18], ["--target", "a", "--test-rows", 1])):
        ctgan.main([str(flag) for flag in (*run, *flags, "--out", n)])
        found = json.loads(Path(str(n), "summary.json").read_text())
        assert "detection_auc" not in found and found["step"] == 1
    table = {"y": np.array([1.0, 2.0, 3.0]), "x": np.arange(3.0)}
    assert ctgan.efficacy(table, table, table | {"y": np.full(3, np.nan)}, "y", set()) == {}


def test_names_for_a_file_without_a_header(capsys):
    text = "1,a\n2,b\n3,a\n4,b\n5,a\n"
    table = text_table(text, "--header", "x", "y")
    assert sorted(table["x"]) == [1, 2, 3, 4, 5] and sorted(table["y"]) == list("aaabb")
    for names in (["x"], ["x", "y", "z"], ["x", "x"]):
        assert "x" in refused(capsys, "--data", "in.csv", "--header", *names) or len(names) != 2


@pytest.mark.parametrize("flag", ["--discrete", "--continuous", "--drop", "--target"])
def test_mistyped_column_is_named(flag, capsys):
    """#24, #74: the text column in its place was taken for a number."""
    write("in.csv", mixed())
    error = refused(capsys, "--data", "in.csv", flag, "colourr")
    assert f"{flag} colourr" in error and "colour, size, price" in error


def test_text_can_not_be_taken_for_numbers(capsys):
    write("in.csv", mixed() | {"code": ["1"] * 100 + ["none of them"] * 20})
    error = refused(capsys, "--data", "in.csv", "--continuous", "size", "code")
    assert "--continuous code" in error and "none of them" in error and "size" not in error


def test_long_numbers_that_are_categories_stay_what_they_are():
    ids = [str(1234567890123456701 + i) for i in range(7)] * 10
    data = load(write("in.csv", {"id": ids, "x": [str(i) for i in range(70)]}), "--discrete", "id")
    assert data.columns[0]["categories"] == sorted(set(ids))


def test_versions_are_not_joined_and_mixed_numbers_of_objects_are():
    versions = ["3.1", "3.10", "3.9"] * 20
    data = load(write("in.csv", {"version": versions, "x": [str(i) for i in range(60)]}))
    assert data.columns[0]["categories"] == ["3.1", "3.10", "3.9"]
    table, _ = ctgan.as_table({"x": np.array([1, 1.0, 2.5, None] * 9, dtype=object)})
    assert table["x"].dtype.kind == "f"


def test_commas_within_quotes_are_no_delimiters():
    Path("in.csv").write_text('"net, in EUR, rounded";n\n' + "1;2\n" * 9)
    assert [*ctgan.read_csv("in.csv")[0]] == ["net, in EUR, rounded", "n"]


def test_columns_named_by_numbers_can_be_dropped():
    model = fit({0: np.arange(60.0), 1: np.array(["x", "y"] * 30)}, drop=[1])
    assert [column["name"] for column in model.columns] == ["0"]


def test_columns_can_be_dropped_and_their_types_chosen(capsys):
    write("in.csv", mixed())
    data = load("in.csv", "--drop", "grade", "unit", "--discrete", "size", "--continuous", "level")
    kinds = {c["name"]: "categories" in c for c in data.columns}
    assert kinds == {
        "colour": True, "size": True, "paid": True, "price": False, "day": False, "weight": False,
        "level": False,
    }  # fmt: skip
    said = capsys.readouterr().out
    assert (
        "discrete: colour (3), size (" in said
        and "continuous: price, day %Y-%m-%d, weight, level" in said
    )
    everything = mixed().keys()
    assert "--drop" in refused(capsys, "--data", "in.csv", "--drop", *everything)
    assert "price" in refused(capsys, "--data", "in.csv", "--drop", "price", "--target", "price")


def test_discrete_numbers_with_gaps_and_dates(monkeypatch):
    """Categories that are no numbers of JSON: they must be saved, loaded and asked for."""
    without_figures(ctgan, monkeypatch.setattr)
    table = mixed()
    day = ["2021-01-01", "2021-02-01", "2021-03-01"]
    write("in.csv", {"weight": table["weight"], "day": [day[i % 3] for i in range(120)]})
    flags = ["--data", "in.csv", "--discrete", "weight", "day", *SMALL]
    ctgan.main([*flags, "--max-steps", "2", "--out", "run"])
    ctgan.main(["--resume", "run/checkpoint.pt", "--max-steps", "3"])
    made = read("run/samples/0000003.csv")
    assert {*made["day"]} <= {*day} and {*made["weight"]} <= {*table["weight"]}
    model = ctgan.load_model("run/checkpoint.pt")
    assert (ctgan.sample(model, 9, {"day": day[1]})["day"] == np.datetime64(day[1])).all()


def test_progress_from_the_first_second(monkeypatch, capsys):
    """#354, #299: no sign of life while columns are fitted."""
    write("in.csv", mixed())

    def slow(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ctgan, "find_modes", slow)
    with pytest.raises(SystemExit):
        ctgan.main(["--data", "in.csv"])
    said = capsys.readouterr().out
    assert "colour (3)" in said and "size, price, day %Y-%m-%d, weight" in said


# ------------------------------------------------------------------ too large a table
def test_too_many_categories_are_refused_at_once(capsys):
    """SDV#1381, SDV#1433, SDV#52: 300,000 categories became a matrix of 300,000^2."""
    n = 300_000
    table = {"who": np.arange(n).astype(str), "sex": np.array(["F", "M"] * (n // 2))}
    table["x"] = np.arange(n) * 0.5
    tracemalloc.start()
    try:
        with pytest.raises(ctgan.UsageError) as error:
            fit(table)
        assert tracemalloc.get_traced_memory()[1] < 4e8
    finally:
        tracemalloc.stop()
    assert "who" in str(error.value) and "300,000" in str(error.value)
    assert "--drop" in str(error.value)


@pytest.mark.parametrize("kind", ["numbers", "categories"])
def test_too_many_columns_are_refused_at_once(kind, monkeypatch):
    """#95: 16,000 columns tried to allocate 20 TB."""
    monkeypatch.setattr(ctgan, "find_modes", None)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 10**6 if kind == "numbers" else 9, (16_000, 20))
    table = dict(zip(map("c{}".format, range(16_000)), values))
    with pytest.raises(ctgan.UsageError) as error:
        fit(table)
    assert "16,000" in str(error.value) and "--drop" in str(error.value)
    assert len(str(error.value)) < 500


def test_identifiers_are_pointed_at(capsys):
    write("in.csv", mixed() | {"who": [f"person {i}" for i in range(120)]})
    load("in.csv")
    assert "who: most values are met once" in capsys.readouterr().out


# ------------------------------------------------------------------ whole runs
SMALL = ["--dim", "8", "--noise", "4", "--batch-size", "20", "--log-every", "5", "--device", "cpu"]


@pytest.fixture(scope="module", params=["ctgan", "tvae"])
def finished(request, tmp_path_factory):
    """A run of 25 epochs of 4 updates on every kind of column, with 24 of 120 rows held out."""
    run = tmp_path_factory.mktemp("finished") / "run"
    data = write(run.parent / "in.csv", mixed())
    flags = ["--data", data, "--model", request.param, "--epochs", 25, "--out", run]
    flags += ["--target", "colour"] if request.param == "ctgan" else []
    ctgan.main([*SMALL, *map(str, flags)])
    return run


def small(finished, *flags):
    """The arguments of the same run with other flags."""
    kept = checkpoint(finished)["config"]
    same = ("--data", kept["data"], "--model", kept["model"], "--epochs", 25)
    return [str(flag) for flag in (*SMALL, *same, *flags)]


def summary(folder):
    return json.loads(Path(folder, "summary.json").read_text())


def test_run_folder(finished):
    assert {path.name for path in finished.iterdir()} - {".lock"} == {
        "samples", "columns.png", "pairs.png", "curves.png", "synthetic.csv", "metrics.csv",
        "config.json", "summary.json", "checkpoint.pt",
    }  # fmt: skip
    assert [path.name for path in (finished / "samples").iterdir()] == ["0000100.csv"]
    assert len(read(finished / "samples" / "0000100.csv")["size"]) == 100
    for picture in finished.rglob("*.png"):
        with Image.open(picture) as image:
            assert np.asarray(image).std() > 1  # not blank


def test_synthetic_table_has_the_form_of_the_data(finished):
    """#48: header, order, types, decimals, gaps; #94: ranges."""
    made, data = read(finished / "synthetic.csv"), mixed()
    assert list(made) == list(data) and len(made["size"]) == 96
    for name in ("colour", "paid", "grade", "level", "unit"):
        assert {*made[name]} <= {*data[name]}
    for name, decimals in (("size", 0), ("price", 2), ("weight", 1)):
        known = [float(text) for text in data[name] if text]
        for text in made[name]:
            if text or name != "weight":
                assert min(known) <= float(text) <= max(known)
                assert len(text.partition(".")[2]) == decimals
    assert min(data["day"]) <= min(made["day"]) and max(made["day"]) <= max(data["day"])
    again, forms = ctgan.read_csv(finished / "synthetic.csv")
    first, wanted = ctgan.read_csv(finished.parent / "in.csv")
    for name in first:
        kind = "if" if name == "weight" else first[name].dtype.kind  # a gap may be missed
        assert again[name].dtype.kind in kind
        assert name == "weight" or forms[name] == wanted[name]


def test_metrics_and_summary(finished, capsys):
    """#28, #99, #212, #391: losses that look good beside bad data; #250: copies are counted."""
    table, found = rows(finished), summary(finished)
    assert [int(row["step"]) for row in table] == list(range(5, 101, 5))
    assert [bool(row["quality"]) for row in table] == [False] * 19 + [True]
    assert 0 < float(table[-1]["quality"]) <= 1
    losses = {"reconstruction", "divergence"}
    if found["model"] == "ctgan":
        losses = {"loss_critic", "loss_generator", "loss_condition", "penalty"}
        assert 0 <= found["condition_obeyed_worst"] <= found["condition_obeyed"] <= 1
    assert losses <= table[0].keys() and all(row[name] for row in table for name in losses)
    assert found.keys() > {
        "quality", "copied_rows", "repeated_rows", "detection_auc", "rare_categories_kept", "step",
    }  # fmt: skip
    assert found["script"] == "ctgan" and Path(found["data"]).name == "in.csv"
    if found["target"]:
        assert found["efficacy"].keys() == {"real", "synthetic"}


def test_quality_is_printed(capsys, monkeypatch):
    write("in.csv", mixed())
    without_figures(ctgan, monkeypatch.setattr)
    ctgan.main([*SMALL, "--data", "in.csv", "--max-steps", "5", "--out", "run"])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step 5")]
    assert "quality 0." in line


@pytest.mark.parametrize("stop", [3, 70])
def test_resume_equals_uninterrupted(stop, finished, monkeypatch):
    """Bit for bit, #131, #4: stopped in mid-epoch, and while the learning rate falls."""
    without_figures(ctgan, monkeypatch.setattr)
    ctgan.main(small(finished, "--out", "run", "--max-steps", stop))
    ctgan.main(["--resume", "run/checkpoint.pt", "--max-steps", "1000"])
    assert same(weights("run"), weights(finished)) and rows("run")[-1]["step"] == "100"


def test_resume_with_other_flags_or_data(finished, capsys):
    shutil.copytree(finished, "run")
    kept = checkpoint("run")["config"]
    for flags in (["--dim", 9], ["--model", {"ctgan": "tvae", "tvae": "ctgan"}[kept["model"]]],
                  ["--drop", "unit"], ["--discrete", "size"], ["--pac", 4], ["--seed", 1],
                  ["--test-rows", 3], ["--target", "paid"]):  # fmt: skip
        error = refused(capsys, "--resume", "run/checkpoint.pt", *flags)
        assert f"{flags[0]}: the run has" in error
    columns = mixed()
    columns["size"] = columns["size"][::-1]
    shutil.copy(finished.parent / "in.csv", "kept.csv")
    try:
        write(finished.parent / "in.csv", mixed() | {"size": ["7"] * 120})
        error = refused(capsys, "--resume", "run/checkpoint.pt", "--max-steps", 101)
        assert "not the run's data" in error
    finally:
        shutil.copy("kept.csv", finished.parent / "in.csv")


def test_resume_where_sums_have_other_last_digits(finished, monkeypatch):
    """On another CPU, or with other threads, the same data must not be taken for others."""
    without_figures(ctgan, monkeypatch.setattr)
    ctgan.main(small(finished, "--out", "run", "--max-steps", 3))
    digamma = ctgan.digamma
    monkeypatch.setattr(ctgan, "digamma", lambda x: digamma(x) * (1 + 1e-13))
    ctgan.main(["--resume", "run/checkpoint.pt", "--max-steps", "5"])
    assert [row["step"] for row in rows("run")] == ["3", "5"]


def test_generate(finished, capsys):
    path = finished / "checkpoint.pt"
    ctgan.main(["--generate", str(path), "--rows", "7", "--out", "new/dir/more.csv"])
    made = read("new/dir/more.csv")
    assert list(made) == list(mixed()) and len(made["size"]) == 7
    said = capsys.readouterr().out
    assert "more.csv" in said and "7 rows" in said and "%" not in said
    flags = ["--given", "colour=green", "size=-50..40", "day=2021-03-01..2022-07-01", "--rows", "5"]
    ctgan.main(["--generate", str(path), *flags, "--out", "given.csv", "--seed", "3"])
    made = read("given.csv")
    assert {*made["colour"]} == {"green"} and all(int(x) <= 40 for x in made["size"])
    assert "% of the rows drawn" in capsys.readouterr().out
    model = ctgan.load_model(path)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    asked = {"colour": "green", "size": (-50, 40), "day": ("2021-03-01", "2022-07-01")}
    table = ctgan.sample(model, 5, asked, seed=3)
    ctgan.write_csv("again.csv", table, model.columns)
    assert Path("again.csv").read_text() == Path("given.csv").read_text()


@pytest.mark.parametrize(
    "given, said",
    [
        ("town=x", "colour, size"),
        ("colour=pink", "blue, dark, green, red"),
        ("colour", "blue, dark, green, red"),
        ("size=many", "size"),
        ("size=900..1000", "-50 to"),
        ("size=40..30", "LOW..HIGH"),
        ("size=3..", "LOW..HIGH"),
        ("size=3..4..5", "LOW..HIGH"),
        ("day=31.12.2021", "day"),
    ],
)
def test_generate_with_what_is_not_there(given, said, finished, capsys):
    """#124, #24: the error names the columns or the values that there are."""
    path = finished / "checkpoint.pt"
    assert said in refused(capsys, "--generate", path, "--given", given, "--out", "made.csv")


def test_a_column_given_twice_and_the_data_s_own_file_are_refused(capsys):
    flags = "--data", write("in.csv", mixed()), *SMALL, "--max-steps", 1, "--out", "run"
    ctgan.main([*map(str, flags)])
    path, before = "run/checkpoint.pt", Path("in.csv").read_bytes()
    given = "--given", "colour=green", "colour=red"
    assert "twice" in refused(capsys, "--generate", path, *given, "--out", "made.csv")
    assert "the data's" in refused(capsys, "--generate", path, "--out", "in.csv")
    assert Path("in.csv").read_bytes() == before


def test_what_goes_with_generate_is_not_ignored(capsys):
    for flags in (["--rows", 50], ["--given", "colour=green"]):
        said = refused(capsys, "--data", write("in.csv", mixed()), "--out", "run", *flags)
        assert "--generate" in said and not Path("run").exists()


def test_dates_are_given_as_they_stand_in_the_file():
    day = [f"{1 + i % 28:02}.{1 + i % 12:02}.2020" for i in range(100)]
    data = whole(*ctgan.read_csv(write("in.csv", {"day": day, "x": map(str, range(100))})))
    args = parsed(*SMALL)
    ctgan.suit(args, data)
    model = ctgan.Model(args, data)
    made = ctgan.sample(model, 20, {"day": "01.06.2020..30.09.2020"})["day"]
    assert made.min() >= np.datetime64("2020-06-01") and made.max() <= np.datetime64("2020-09-30")
    with pytest.raises(ctgan.UsageError, match=r"01\.01\.2020 to 28\.12\.2020"):
        ctgan.sample(model, 20, {"day": "01.06.2021"})


def test_generate_from_what_is_no_checkpoint_of_this_script(finished, capsys):
    whole = (finished / "checkpoint.pt").read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        Path("cut.pt").write_bytes(content)
        for flag in ("--generate", "--resume"):
            assert "cut.pt is no whole checkpoint of ctgan" in refused(capsys, flag, "cut.pt")
    torch.save({"script": "cgan", "shape": []}, "other.pt")
    assert "cgan" in refused(capsys, "--generate", "other.pt")
    state = torch.load(finished / "checkpoint.pt", weights_only=True)
    for column in state["data"]["about"]:
        column.pop("counts")  # those of numbers have had none
    torch.save(state, "old.pt")
    assert "old.pt is of another version" in refused(capsys, "--generate", "old.pt")


def test_checkpoint_is_loaded_onto_the_cpu(finished, monkeypatch):
    """#164, SDV#333: trained on a GPU, it did not load where there is none."""
    places, load = [], torch.load

    def noted(*args, **kwargs):
        places.append(kwargs.get("map_location"))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", noted)
    model = ctgan.load_model(finished / "checkpoint.pt")
    assert places == ["cpu"]
    tensors = [*model.state_dict().values(), model.count, model.order, model.column_of]
    tensors += [model.offsets, *model.chance.values()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


def test_checkpoint_of_fused_kernels_where_there_are_none(finished, monkeypatch):
    """To sample needs no kernels, whatever the run was trained with."""
    shutil.copytree(finished, "run")
    state = checkpoint("run")
    state["config"]["kernels"] = "fused"
    torch.save(state, "run/checkpoint.pt")
    monkeypatch.setattr(ctgan, "gan_kernels", None)
    assert len(ctgan.sample(ctgan.load_model("run/checkpoint.pt"), 3)["size"]) == 3


@NO_GPU
def test_run_on_a_gpu_is_sampled_on_the_cpu(finished):
    flags = small(finished, "--max-steps", 5, "--out", "run")
    ctgan.main([*flags, "--device", "cuda"])
    for place in ("cpu", "cuda"):
        model = ctgan.load_model("run/checkpoint.pt", place)
        assert len(ctgan.sample(model, 9, {"colour": "red"})["size"]) == 9


def test_kernels_are_named_in_the_summary(finished, monkeypatch, capsys):
    assert summary(finished)["kernels"] == ("fused" if ctgan.gan_kernels else "reference")
    monkeypatch.setattr(ctgan, "gan_kernels", None)
    assert "gan_kernels" in refused(capsys, *small(finished, "--kernels", "fused", "--out", "run"))


def test_tiny_tables_and_one_column():
    """Three rows are the least, of which one is held out."""
    for i, table in enumerate([
        {"x": ["1", "2.5", "3", "4", "5"]},
        {"a": ["x", "y", "x"], "b": ["1", "2", "3"]},
        {"a": ["x", "x", "x"]},
        {"a": ["x"] * 30, "b": ["1"] * 30},
        {"x": ["", "", "", "1.5", ""] * 2, "a": ["p", "q"] * 5},
    ]):  # fmt: skip
        write("in.csv", table)
        model = ("ctgan", "tvae")[i % 2]
        flags = ["--data", "in.csv", "--model", model, "--dim", "4", "--max-steps", "3"]
        ctgan.main([*flags, "--out", f"run{i}"])
        made = read(f"run{i}/synthetic.csv")
        assert list(made) == list(table) and 0 <= summary(f"run{i}")["quality"] <= 1
        assert Path(f"run{i}/pairs.png").exists()


def test_rows_that_are_held_out():
    write("in.csv", mixed())
    for flags, held in (([], 24), (["--test-rows", 7], 7), (["--test-rows", 10**6], 118)):
        data = load("in.csv", *flags)
        assert len(data.test["size"]) == held and len(data.train) == 120 - held
        texts = [f"{x}" for x in [*data.table["price"], *data.test["price"]]]
        assert sorted(texts) == sorted(str(float(x)) for x in mixed()["price"])


def test_default_is_a_table_whose_truth_is_known(capsys):
    """Where Adult is not to be had; in one line."""
    data = ctgan.load_data(parsed(), CPU)
    assert data.name == "labelled" and data.truth is not None and len(data.train) == 10_000
    said = capsys.readouterr().out.splitlines()
    assert "adult can not be read" in said[0] and said[0].endswith("simulated table instead.")
    assert not Path("data/adult/adult.data").exists()
    error = error_of(ctgan, capsys, "--dataset", "adult")
    assert "adult can not be read from --data-dir" in error
    Path("table.csv").write_text("a,b\n1,2\n")
    error = error_of(ctgan, capsys, "--data-dir", "table.csv")
    assert "a table of your own is --data FILE" in error


def test_network_that_never_answers_is_none(monkeypatch):
    limits = []

    def silent(*args, **kwargs):
        limits.append(socket.getdefaulttimeout())
        no_network()

    monkeypatch.setattr("urllib.request.urlopen", silent)
    monkeypatch.setattr(ctgan.simulated_points, "__defaults__", (200,))
    assert ctgan.load_data(parsed(), CPU).name == "labelled" and set(limits) == {5}


ADULT = "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, "
ADULT += "Male, 2174, 0, 40, United-States, <=50K\n"


def test_adult_is_taken_where_it_is_and_a_run_goes_on_with_its_own_set(capsys, monkeypatch):
    monkeypatch.setattr(ctgan.simulated_points, "__defaults__", (200,))
    without_figures(ctgan, monkeypatch.setattr)
    ctgan.main([*SMALL, "--max-steps", "1", "--out", "a"])
    path = Path("data/adult/adult.data")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(ADULT.replace("39", str(20 + i)) for i in range(60)) + "\n")
    ctgan.main(["--resume", "a/checkpoint.pt", "--max-steps", "2"])
    ctgan.main([*SMALL, "--max-steps", "1", "--out", "b"])
    ctgan.main(["--resume", "b/checkpoint.pt", "--max-steps", "2"])
    sets = [(run["dataset"], run["target"]) for run in map(summary, "ab")]
    assert sets == [("labelled", None), ("adult", "income")]
    assert list(read("b/samples/0000002.csv"))[-1] == "income"


@pytest.mark.parametrize("name", ["grid", "ring", "asia"])
def test_simulated_sets_run(name, monkeypatch):
    """A few updates, and the measures that need the truth."""
    sample_network = ctgan.sample_network
    monkeypatch.setattr(ctgan.simulated_points, "__defaults__", (400,))
    monkeypatch.setattr(ctgan, "sample_network", lambda net, n, rng: sample_network(net, 200, rng))
    ctgan.main(["--dataset", name, "--dim", "8", "--max-steps", "2", "--out", "run"])
    assert summary("run").keys() >= {"L_syn", "L_test", "quality"}
    assert Path("run/points.png").exists() == (name != "asia")


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch-size", 0],
        ["--batch-size", 1],
        ["--batch-size", 5000],
        ["--batch-size", 16, "--pac", 10],
        ["--batch-size", "many"],
        ["--pac", 0],
        ["--pac", 10**9],
        ["--pac", 97],
        ["--epochs", 0],
        ["--dim", 0],
        ["--noise", 0],
        ["--lr", "nan"],
        ["--gp-weight", -1],
        ["--rows", 0],
        ["--test-rows", 0],
        ["--model", "gan"],
        ["--given"],
        ["--unknown"],
    ],
)
def test_bad_flags(flags, finished, capsys):
    assert flags[0] in refused(capsys, "--data", finished.parent / "in.csv", *flags)
