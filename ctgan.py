# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.10", "torchvision", "numpy", "scipy", "tqdm", "matplotlib", "scikit-learn",
# ]
# ///
"""CTGAN and TVAE (Xu et al. 2019, https://arxiv.org/abs/1907.00503): tables with numbers and
categories, generated so that rare values stay and any value can be asked for.

    python ctgan.py --data table.csv                 # any CSV with a header; leaves synthetic.csv
    python ctgan.py                                  # Adult, or a simulated table without network
    python ctgan.py --dataset grid --model tvae      # also gridr, ring, asia, a network.bif
    python ctgan.py --generate runs/.../checkpoint.pt --rows 1000 --given income='>50K'

On Adult (300 epochs, three seeds, an EPYC core) classifiers that learn from CTGAN's rows have a
mean F1 of 0.618 on real ones, from TVAE's 0.633, from real rows 0.655; paper: 0.601, 0.626, 0.669.

From Python: sample(fit(table), 1000, given={"sex": "Female"}), with a dictionary of NumPy arrays or
a pandas data frame. Every run, and what the departures below do: docs/ctgan.md.

Mode-specific normalisation (section 4.2) writes a number as one of the modes of its column, drawn
by its probability under a variational mixture of Gaussians, and its place alpha in that mode. A row
r is [d | beta | alpha]: categories and modes one-hot, places in (-1, 1). G(z, cond) gives all of a
row, Gumbel-softmax for d and beta, tanh for alpha; cond is one-hot and names one value of one
column. D scores packs of rows (PacGAN) with their conditions, with WGAN-GP's penalty:

    L_D = E[D(r^, cond)] - E[D(r, cond)] + 10 E[(|grad_r D(r~, cond)|_2 - 1)^2]
    L_G = -E[D(r^, cond)] + E[cross-entropy of the column that cond names]

Training by sampling (section 4.3): a column is drawn evenly, its value by the logarithm of its
frequency, then a real row with that value. To sample, values are drawn by their own frequency.
TVAE (section 4.5) is a variational autoencoder of the same rows, by its evidence lower bound.

What the paper leaves open is as in the authors' code (sdv-dev/SDGym, tag research): dropout 0.5 in
D, weight decay 1e-6 on G, twice the reconstruction in TVAE's loss. Departures:

- A value with 5 % of its column's rows or more is a mode of no width, so that it returns exactly,
  and a missing number is a mode of its own. A mode is wider than 4 standard deviations where values
  would be cut off; outliers have modes of their own.
- A pack has one row, not ten, as table 3 finds better too: with one, the classifiers that learn
  Adult from synthetic rows had a mean F1 of 0.637, with ten 0.557 and 0.598 (seed 0, before
  raking). Tables without a discrete column have packs of five.
- TVAE draws categories and modes as the paper has it; the authors' likeliest lose rare ones.
- Rows drawn are raked: kept with a chance that gives each column its shares of the data again.
- The learning rate falls to 0 in the second half of the updates, after which asia's likelihood
  fitness no longer swings.
- Below 5,000 rows there are more epochs than the paper's 300: 3,000 updates.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import os
import re
import socket
import sys
import time
import warnings
from collections import namedtuple
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from scipy.special import digamma, logsumexp
from sklearn import ensemble
from sklearn.cluster import KMeans
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import f1_score, r2_score, roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.tree import DecisionTreeClassifier
from torch import nn
from torchvision.datasets.utils import download_url
from tqdm import tqdm

try:  # the compiled losses are extras: the references below compute the same
    import gan_kernels
except (ImportError, OSError):
    gan_kernels = None

SCRIPT = "ctgan"


# ------------------------------------------------------------------ arguments
def arguments():
    """The paper's settings as flags, beside those that every script has."""
    parser = run_arguments("CTGAN and TVAE (Xu et al. 2019).")
    names = {"nargs": "+", "default": [], "metavar": "COLUMN"}
    add = parser.add_argument_group("the table").add_argument
    add("--data", metavar="FILE", help="a CSV file with a header, instead of --dataset")
    sets = f"{', '.join(SETS)}, or a network.bif; auto: adult, or else simulated"
    add("--dataset", default="auto", help=sets)
    add("--data-dir", default="data", help="where adult is kept")
    add("--header", **names, help="names of the columns of a --data without a header")
    add("--discrete", **names, help="columns to take as categories, whatever they look like")
    add("--continuous", **names, help="columns to take as numbers")
    add("--drop", **names, help="columns to leave out")
    add("--target", metavar="COLUMN", help="what classifiers are to predict (efficacy)")
    add("--test-rows", type=at_least(1), help="rows held out; None: a fifth, at most 10,000")
    add = parser.add_argument_group("--generate").add_argument
    add("--rows", type=at_least(1), help="rows to generate; None: 1,000")
    add("--given", nargs="+", default=[], metavar="COLUMN=VALUE", help="or COLUMN=LOW..HIGH")
    add = parser.add_argument_group("CTGAN and TVAE").add_argument
    add("--model", choices=("ctgan", "tvae"), default="ctgan", help="which of the paper's two")
    add("--noise", type=at_least(1, high=10**4), default=128, help="values of z")
    add("--dim", type=at_least(1, high=10**4), help="width of the networks; None: the paper's")
    add("--pac", type=at_least(1), help="rows that D sees as one; None: 1, or 5 of numbers alone")
    add("--gp-weight", type=at_least(0, float), default=10.0, help="weight of the penalty")
    add("--lr", type=at_least(0, float), help="learning rate; None: the paper's")
    return parser


def suit(args, data):
    """Gives the flags that were left out what suits the data."""
    n, ctgan = len(data.train), args.model == "ctgan"
    if args.pac is None:  # where no conditions hold the modes apart, packs keep their spread
        numbers = ctgan and not any("categories" in column for column in data.columns)
        args.pac = 5 if numbers and n >= 20 and (args.batch_size or 0) % (5 * WORLD) == 0 else 1
    packs = args.pac * WORLD
    suiting = {"batch_size": max(packs, min(500, n) // packs * packs)}
    suiting |= {"dim": 256 if ctgan else 128, "lr": 2e-4 if ctgan else 1e-3}
    for name, value in suiting.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not 2 * WORLD <= args.batch_size <= n:
        raise UsageError(f"--batch-size {args.batch_size}: {n} rows, packs of {packs} (--pac)")
    if args.batch_size % packs:
        fitting = max(1, args.batch_size // packs) * packs
        raise UsageError(f"--batch-size {args.batch_size}: not in packs of {packs}; take {fitting}")
    if args.epochs is None:
        args.epochs = max(300, math.ceil(3000 / (n // args.batch_size)))


# ------------------------------------------------------------------ rows (section 4.2)
def encode(table, discrete, rng):
    """Returns the columns, as dictionaries for JSON, and the rows, float32 (n, spans + alphas).

    A span is a one-hot part of a row, kept as its index: those of the discrete columns, which come
    first, then the modes of the continuous ones. Last come the places alpha in these modes.
    """
    columns, spans, alphas = [], [], []
    ordered = sorted(table, key=lambda name: name not in discrete)  # else in the table's order
    hidden = None if sys.stderr and RANK == 0 else True  # None: where it is no terminal
    for name in tqdm(ordered, "columns", leave=False, disable=hidden):
        values, column = table[name], {"name": name, "dtype": table[name].dtype.str}
        if name in discrete:
            categories, span, counts = np.unique(values, return_inverse=True, return_counts=True)
            if values.dtype.kind == "M":
                categories = categories.astype(str)
            known = [None if value != value else value for value in categories.tolist()]
            column |= {"categories": known, "counts": counts.tolist()}
        else:
            modes, span, alpha = encode_numbers(as_float(values), rng)
            column |= modes | {"step": step_of(values) if values.dtype.kind == "M" else 1}
            alphas.append(alpha)
        columns.append(column | {"place": list(table).index(name)})
        spans.append(span)
    return columns, torch.tensor(np.stack(spans + alphas, axis=1), dtype=torch.float32)


def encode_numbers(x, rng):
    """Returns the modes of the numbers x (n,), nan where missing, and each one's mode and alpha."""
    known = ~np.isnan(x)
    values, inverse, counts = np.unique(x[known], return_inverse=True, return_counts=True)
    weights, means, sds = find_modes(values, counts)
    single, sds = sds == 0, np.where(sds == 0, 1e-12 * np.abs(values).max() or 1.0, sds)
    distance = np.abs(values[:, None] - means)
    nearest, scales = (distance / sds).argmin(axis=1), 4 * sds
    np.maximum.at(scales, nearest, distance[np.arange(len(values)), nearest])  # none is cut off
    log_p = np.log(weights / sds) - (distance / sds) ** 2 / 2
    log_p[distance > scales] = -np.inf
    cdf = np.exp(log_p - log_p.max(axis=1, keepdims=True)).cumsum(axis=1)[inverse]
    mode = np.full(len(x), len(means))  # one mode more, for what is missing
    mode[known] = (cdf <= rng.random((len(cdf), 1)) * cdf[:, -1:]).sum(axis=1)
    alpha = np.zeros(len(x))
    alpha[known] = (x[known] - means[mode[known]]) / scales[mode[known]]
    scales[single] = 0  # a mode of one number, which returns exactly
    counts = np.bincount(mode, minlength=len(means)).tolist()
    modes = {"means": means.tolist(), "scales": scales.tolist(), "counts": counts}
    return modes | {"low": float(values[0]), "high": float(values[-1])}, mode, alpha


def find_modes(values, counts):
    """Weights, means and standard deviations of the modes of different numbers and their counts.

    A number with 5 % of all or more is a mode by itself, of deviation 0; others are a mixture's.
    Those further from the median than 20 times the distance of the quartiles have a mixture of
    their own: they would stretch a mode of the others.
    """
    often = counts >= 0.05 * counts.sum()
    modes = [(counts[often], values[often], np.zeros(often.sum()))]
    places = np.where(often, 0, counts).cumsum()
    first, middle, third = values[np.searchsorted(places, places[-1] * np.array([0.25, 0.5, 0.75]))]
    far = ~often & (np.abs(values - middle) > 20 * (third - first)) & (third > first)
    for part in (~often & ~far, far):
        if part.any():
            weights, means, sds = fit_mixture(values[part], counts[part])
            modes.append((weights * counts[part].sum(), means, sds))
    weights, means, sds = map(np.concatenate, zip(*modes))
    return weights / weights.sum(), means, sds


def fit_mixture(x, counts, components=10, points=2000):
    """Weights, means and standard deviations of a variational mixture of Gaussians in 1-D.

    With a Dirichlet process of concentration 0.001, as BayesianGaussianMixture of scikit-learn, but
    of different numbers in ascending order with their counts, which is many times faster; and of at
    most `points` of them: means of neighbours stand for more. Weights up to 0.005 are left out.
    """
    if len(x) == 1:
        return np.ones(1), x, np.zeros(1)
    starts = np.linspace(0, len(x), min(points, len(x)), endpoint=False).astype(int)
    x, counts = np.add.reduceat(x * counts, starts), np.add.reduceat(counts, starts)
    x = x / counts
    shift = np.average(x, weights=counts)
    spread = float(f"{np.sqrt(np.average((x - shift) ** 2, weights=counts)):.9g}") or 1.0
    shift = spread * round(shift / spread, 9)  # the last digits of sums depend on the machine
    z, k = ((x - shift) / spread)[:, None], min(components, len(x))
    start = KMeans(k, n_init=1, random_state=0).fit(z, sample_weight=counts)
    r = np.eye(k)[start.labels_]  # responsibilities (points, k)
    for _ in range(100):
        n = counts @ r + 1e-15
        mean = counts @ (r * z) / n
        variance = counts @ (r * (z - mean) ** 2) / n + 1e-6
        later = n[::-1].cumsum()[::-1] - n
        a, b, m = 1 + n, 1e-3 + later, n * mean / (1 + n)  # posterior of the sticks, of the means
        variance = (1 + n * variance + n / (1 + n) * mean**2) / (1 + n)  # and of the variances
        rest = digamma(b) - digamma(a + b)
        log_weight = digamma(a) - digamma(a + b) + rest.cumsum() - rest
        log_precision = digamma(a / 2) - np.log(a / 2) - np.log(variance)
        log_r = log_weight + (log_precision - 1 / a - (z - m) ** 2 / variance) / 2
        r = np.exp(log_r - log_r.max(axis=1, keepdims=True))
        r /= r.sum(axis=1, keepdims=True)
    weight = a / (a + b) * np.append(1, (b / (a + b))[:-1]).cumprod()
    kept = weight > 0.005
    means, sds = m[kept].round(9), np.sqrt(variance[kept]).round(9)
    return weight[kept], shift + spread * means, spread * sds


def as_float(values):
    """Numbers or times as float64, nan where missing."""
    if values.dtype.kind != "M":
        return values.astype(np.float64)
    return np.where(np.isnat(values), np.nan, values.astype(np.int64))


def step_of(times):
    """A day, hour, minute, ... in the times' own unit: the longest of which all are whole ones."""
    unit, known = np.datetime_data(times.dtype)[0], times[~np.isnat(times)].astype(np.int64)
    for longer in ("D", "h", "m", "s", "ms", "us") if unit not in ("Y", "M", "W") else ():
        step = int(np.timedelta64(1, longer) // np.timedelta64(1, unit))
        if step and not (known % step).any():
            return step
    return 1


def as_dtype(x, dtype, step=1):
    """The reverse of as_float; times are of whole steps, to the last digit of an integer."""
    if dtype[1] != "M":
        return x.astype(dtype)
    whole = np.where(np.isnan(x), 0, x / step).round().astype(np.int64) * step
    return np.where(np.isnan(x), np.iinfo(np.int64).min, whole).view(dtype)


def decode(rows, columns):
    """The table, with the dtypes, ranges and decimals of the data, of rows as encode gives them."""
    rows, numbers, table = rows.cpu().double().numpy(), itertools.count(len(columns)), {}
    for column, span in zip(columns, rows.T.astype(int)):
        if "categories" in column:
            values = np.array(column["categories"], column["dtype"])[span]
        else:
            means, scales = np.array(column["means"] + [np.nan]), np.array(column["scales"] + [0])
            x = means[span] + rows[:, next(numbers)].clip(-1, 1) * scales[span]
            values = x if column["decimals"] is None else x.round(column["decimals"]) + 0.0  # no -0
            values = values.clip(column["low"], column["high"])
            values = as_dtype(values, column["dtype"], column.get("step", 1))
        table[column["place"]] = column["name"], values
    return dict(table[place] for place in sorted(table))


# ------------------------------------------------------------------ networks (sections 4.4, 4.5)
class Joint(nn.Linear):
    """nn.Linear of inputs side by side; no gradient is computed of those that need none."""

    def forward(self, *parts):
        weights = self.weight.split([part.shape[-1] for part in parts], dim=1)
        first, *others = zip(parts, weights)
        return sum(itertools.starmap(F.linear, others), F.linear(*first, self.bias))


class Generator(nn.Module):
    """G(z, cond): the logits of all spans, then alpha before its tanh, (batch, outputs)."""

    def __init__(self, outputs, conditions, noise=128, dim=256):
        super().__init__()
        inputs = noise + conditions
        self.layers = nn.ModuleList([
            Joint(inputs, dim), nn.BatchNorm1d(dim),
            Joint(dim + inputs, dim), nn.BatchNorm1d(dim),
            Joint(2 * dim + inputs, outputs),
        ])  # fmt: skip

    def forward(self, z, condition):
        first, norm1, second, norm2, last = self.layers
        h0 = torch.cat([z, condition], dim=1)
        h1 = norm1(first(h0)).relu_()
        h2 = norm2(second(h1, h0)).relu_()
        return last(h2, h1, h0)


class HalfDropout(nn.Module):
    """nn.Dropout(0.5) in a tenth of the time on a CPU: one bit of each random byte decides."""

    def forward(self, x):
        if not self.training:
            return x
        integers = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_()
        mask = integers.view(torch.uint8)[: x.numel()].view(x.shape) & 2  # 0 or 2
        return x * mask.to(x.dtype)


class Critic(nn.Module):
    """D(rows, cond): a score (..., packs) for packs of rows, (..., packs, pac, outputs)."""

    def __init__(self, outputs, conditions, pac=1, dim=256):
        super().__init__()
        self.first = Joint(pac * (outputs + conditions), dim)
        self.layers = nn.Sequential(
            nn.LeakyReLU(0.2), HalfDropout(),
            nn.Linear(dim, dim), nn.LeakyReLU(0.2), HalfDropout(),
            nn.Linear(dim, 1),
        )  # fmt: skip

    def forward(self, rows, condition):
        return self.layers(self.first(rows.flatten(-2), condition.flatten(-2))).squeeze(-1)


class Encoder(nn.Module):
    """TVAE's q(z | r): mean and log variance of z, (batch, noise) each."""

    def __init__(self, outputs, noise=128, dim=128):
        super().__init__()
        self.layers = nn.Sequential(*mlp(outputs, dim), nn.Linear(dim, 2 * noise))

    def forward(self, rows):
        return self.layers(rows).chunk(2, dim=1)


class Decoder(nn.Module):
    """TVAE's p(r | z): logits and alpha before its tanh, as G's, and a deviation of each alpha."""

    def __init__(self, outputs, alphas, noise=128, dim=128):
        super().__init__()
        self.layers = nn.Sequential(*mlp(noise, dim), nn.Linear(dim, outputs))
        self.sd = nn.Parameter(torch.full((alphas,), 0.1))

    def forward(self, z):
        return self.layers(z)


def mlp(inputs, dim):
    return nn.Linear(inputs, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU()


# ------------------------------------------------------------------ losses and training step
def gumbel(like, rng=None):
    """Standard Gumbel noise; the argmax of logits with it is a draw from their softmax."""
    uniform = torch.rand(like.shape, device=like.device, generator=rng)
    return -(-uniform.clamp_min_(1e-30).log()).log()  # zero is drawn now and then


def activate(outputs, sizes, tau=0.2):
    """Rows of G's outputs: Gumbel-softmax of each span, tanh of each alpha."""
    columns = outputs.T.contiguous()  # a span in one piece is a faster softmax
    logits, alpha = columns.split([sum(sizes), len(columns) - sum(sizes)])
    spans = ((logits + gumbel(logits)) / tau).split(sizes)
    return torch.cat([*(span.softmax(dim=0) for span in spans), alpha.tanh()]).T


def one_hot(condition, column_of):
    """The vector cond (batch, values) of the values' numbers (batch,); empty if there are none."""
    values = torch.arange(len(column_of), device=condition.device)
    return (condition[:, None] == values).float()


def condition_loss(outputs, condition, column_of):
    """Cross-entropy, in nats, of the columns that the conditions name, with their values.

    outputs are G's, whose first logits are those of the discrete columns; condition is int64
    (batch,), the number of the value among those of all discrete columns; column_of (values,) has
    each value's column.
    """
    other = column_of[condition][:, None] != column_of
    return F.cross_entropy(outputs[:, : len(column_of)].masked_fill(other, -math.inf), condition)


def gradient_penalty_reference(critic, x, target=1.0):
    """Mean over the batch of (|d critic(x) / dx|_2 - target)^2, differentiable in the critic.

    A sample without gradient adds target^2 and gives none. gan_kernels has it without wasted work.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    squares = gradient.square().flatten(1).sum(dim=1)
    zero = squares == 0  # where the root's own derivative is infinite
    norms = torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())
    return (norms - target).square().mean()


def ctgan_step(model, real, condition, condition_g):
    """Algorithm 1: an update of D, then one of G, each with conditions of its own.

    real (batch, outputs) has rows with the values that condition asks for; both conditions are
    int64 (batch,), as condition_loss takes them. Returns the losses.
    """
    G, D, sizes, column_of = model.generator, model.critic, model.sizes, model.column_of
    packs = (-1, model.args.pac)
    z, cond = model.noise(len(real)), one_hot(condition, column_of)
    with torch.no_grad():
        fake = activate(G(z, cond), sizes)
    real, fake, cond = (x.unflatten(0, packs) for x in (real, fake, cond))
    rho = torch.rand(len(real), 1, 1, device=real.device)
    between = rho * fake + (1 - rho) * real
    penalty = model.gradient_penalty(lambda rows: D(rows, cond), between)
    score_fake, score_real = D(torch.stack([fake, real]), cond)
    loss_d = score_fake.mean() - score_real.mean() + model.args.gp_weight * penalty
    model.optimizer_d.zero_grad()
    loss_d.backward()
    model.optimizer_d.step()

    z, cond = model.noise(len(condition_g)), one_hot(condition_g, column_of)
    outputs = G(z, cond)
    fake = activate(outputs, sizes)
    loss_g = -D(fake.unflatten(0, packs), cond.unflatten(0, packs)).mean()
    loss_condition = torch.zeros_like(loss_g)
    if len(column_of) > 0:
        loss_condition = condition_loss(outputs, condition_g, column_of)
    model.optimizer_g.zero_grad()
    (loss_g + loss_condition).backward(inputs=list(G.parameters()))  # none for D's weights
    model.optimizer_g.step()
    losses = {"loss_critic": loss_d, "loss_generator": loss_g, "loss_condition": loss_condition}
    return losses | {"penalty": penalty}


def reconstruction_loss_reference(outputs, category, alpha, sizes, sd):
    """-log p(r | z) in nats, mean over the batch: cross-entropies of the spans, and the negative
    log density of alpha (batch, alphas) about tanh of its output with deviations sd (alphas,)."""
    logits, mean = outputs.split([sum(sizes), alpha.shape[1]], dim=1)
    spans = zip(logits.split(sizes, dim=1), category.unbind(1))
    nll = sum((F.cross_entropy(span, c) for span, c in spans), outputs.new_zeros(()))
    square = ((alpha - mean.tanh()) / sd) ** 2
    return nll + (square / 2 + sd.log() + math.log(2 * math.pi) / 2).sum(dim=1).mean()


def reconstruction_loss_fused(outputs, category, alpha, sizes, sd):
    """The same by gan_kernels: it is the loss of InfoGAN's Q."""
    logits, mean = outputs.split([sum(sizes), alpha.shape[1]], dim=1)
    log_var = (2 * sd.log()).expand_as(mean)
    q = torch.cat([logits, mean.tanh(), log_var], dim=1)
    return sum(gan_kernels.info_loss(q, category, alpha, sizes))


def tvae_step(model, real, category, alpha):
    """An update by the evidence lower bound; the reconstruction counts twice, as in their code.

    real (batch, outputs) are rows, category int64 (batch, spans) and alpha (batch, alphas) the
    same rows by index. Returns reconstruction and divergence, in nats a row.
    """
    encoder, decoder = model.encoder, model.decoder
    mean, log_var = encoder(real)
    z = mean + (log_var / 2).exp() * torch.randn_like(mean)
    reconstruction = model.reconstruction_loss(decoder(z), category, alpha, model.sizes, decoder.sd)
    divergence = 0.5 * (mean**2 + log_var.exp() - log_var - 1).sum(dim=1).mean()
    model.optimizer.zero_grad()
    (2 * reconstruction + divergence).backward()
    model.optimizer.step()
    with torch.no_grad():
        decoder.sd.clamp_(0.01, 1)
    return {"reconstruction": reconstruction, "divergence": divergence}


def train_step(model, *batch):
    """One update of either model on a batch as Model.batch gives it."""
    return ctgan_step(model, *batch) if model.args.model == "ctgan" else tvae_step(model, *batch)


class Model(nn.Module):
    """Networks, optimisers and losses of either model, and the conditions that a table allows."""

    def __init__(self, args, data):
        super().__init__()
        self.args, self.columns, self.samples_per_step = args, data.columns, args.batch_size
        device, discrete = data.train.device, [c for c in self.columns if "categories" in c]
        self.sizes = [len(c["counts"]) for c in self.columns]
        values, numbers = sum(self.sizes[: len(discrete)]), len(self.columns) - len(discrete)
        outputs = sum(self.sizes) + numbers
        self.offsets = torch.tensor([0, *self.sizes[:-1]], device=device).cumsum(0)
        counts = [torch.tensor(c["counts"], dtype=torch.float64) for c in self.columns]
        self.share = torch.cat([n / n.sum() for n in counts]).to(device)  # of the rows, by span
        self.raked = None  # what rake found
        # each value of a discrete column: its column, its rows, and its chance to be a condition
        columns = torch.repeat_interleave(torch.tensor(self.sizes[: len(discrete)], dtype=int))
        self.column_of, counts = columns.to(device), counts[: len(discrete)]
        self.count = torch.cat([torch.zeros(0), *counts]).to(device)
        self.first = self.count.cumsum(0) - self.count
        ordered = [data.train[:, i].argsort(stable=True) for i in range(len(discrete))]
        self.order = torch.cat([torch.zeros(0, dtype=int, device=device), *ordered])
        self.chance = {}  # cumulated, of training and of the data
        for name, weights in (("log", [(n + 1).log() for n in counts]), ("data", counts)):
            shares = [torch.zeros(0), *(w / w.sum() for w in weights)]
            self.chance[name] = torch.cat(shares).cumsum(0).to(device)
        steps = max(1, args.epochs * (len(data.train) // args.batch_size))
        if args.model == "ctgan":
            self.generator = Generator(outputs, values, args.noise, args.dim).to(device)
            self.critic = Critic(outputs, values, args.pac, args.dim).to(device)
            self.optimizer_g = adam(self.generator, args, steps, (0.5, 0.9), 1e-6)
            self.optimizer_d = adam(self.critic, args, steps, (0.5, 0.9), 0)
            self.optimizers = [self.optimizer_g, self.optimizer_d]
        else:
            self.encoder = Encoder(outputs, args.noise, args.dim).to(device)
            self.decoder = Decoder(outputs, numbers, args.noise, args.dim).to(device)
            self.optimizer = adam(self, args, steps, (0.9, 0.999), 1e-5)
            self.optimizers = [self.optimizer]
        if args.kernels == "fused" and gan_kernels is None:
            raise UsageError("--kernels fused: gan_kernels can not be imported; pip install .")
        self.kernels = "fused" if gan_kernels and args.kernels != "reference" else "reference"
        self.gradient_penalty = gradient_penalty_reference
        self.reconstruction_loss = reconstruction_loss_reference
        if self.kernels == "fused":
            self.gradient_penalty = gan_kernels.gradient_penalty
            self.reconstruction_loss = reconstruction_loss_fused

    def noise(self, n, rng=None):
        """z of n rows, (n, noise)."""
        return torch.randn(n, self.args.noise, device=self.offsets.device, generator=rng)

    def conditions(self, chance, n, rng=None):
        """The numbers (n,) of values drawn by their cumulated chances; zeros if there are none."""
        u = torch.rand(n, dtype=torch.float64, device=chance.device, generator=rng)
        return torch.searchsorted(chance, u * chance[-1:].sum()).clamp_max(max(0, len(chance) - 1))

    def batch(self, data, index):
        """What train_step takes: CTGAN draws its rows by conditions (section 4.3), as many."""
        if self.args.model == "tvae":
            rows = data.train[index]
            category, alpha = rows.tensor_split([len(self.sizes)], dim=1)
            return self.expand(rows), category.long(), alpha
        condition, condition_g = (self.conditions(self.chance["log"], len(index)) for _ in "DG")
        if len(self.column_of) > 0:
            u = torch.rand(len(index), dtype=torch.float64, device=index.device)
            at = self.first[condition] + (u * self.count[condition]).floor()
            index = self.order[at.long()]
        return self.expand(data.train[index]), condition, condition_g

    def expand(self, rows):
        """Rows as encode gives them, with their spans one-hot, (n, outputs)."""
        category, alpha = rows.tensor_split([len(self.sizes)], dim=1)
        spans = torch.zeros(len(rows), sum(self.sizes), device=rows.device)
        return torch.cat([spans.scatter_(1, category.long() + self.offsets, 1), alpha], dim=1)


def adam(network, args, steps, betas, weight_decay):
    """Adam whose learning rate stays for half of the steps and then falls to 0, in a line."""
    weights = list(network.parameters())
    settings = {"betas": betas, "weight_decay": weight_decay, "fused": True, "capturable": True}
    lr = torch.tensor(args.lr, device=weights[0].device)
    optimizer = torch.optim.Adam(weights, lr, **settings)

    def decay(*_):  # on the device and from the optimizer's own count, which a checkpoint has
        if state := optimizer.state.get(weights[0]):  # there is none before the first step
            rate = args.lr * (2 - 2 * state["step"] / steps).clamp(0, 1)
            optimizer.param_groups[0]["lr"].copy_(rate)

    optimizer.register_step_pre_hook(decay)
    return optimizer


# ------------------------------------------------------------------ sampling
CHUNK = 1000  # rows drawn at a time, whole, so that the first row is the same for any number


def sample(model, n, given=None, seed=0):
    """n generated rows, a table: a dictionary of NumPy arrays with the data's names and dtypes.

    model is fit's or load_model's. given={"sex": "Female", "age": (30, 40)} has the values that
    each row is to have, of discrete columns, or from low to high of continuous ones. Raises
    UsageError for columns or values that the data have not, or that are hardly ever met together.
    """
    if n < 0:
        raise UsageError(f"sample: {n} rows")
    return sample_given(model, n, given or {}, seed)[0]


def sample_given(model, n, given, seed=0):
    """A table as sample gives it, and the share of the raked rows that had what was given.

    CTGAN asks for the rarest of the given values by its condition, and what has not all of them is
    drawn again; TVAE only draws again.
    """
    wanted, tests = given_values(model, given)
    value = min(wanted, key=lambda value: model.count[value].item(), default=None)
    if model.raked is None or model.training:
        model.raked = rake(model)
    rng, level, parts, drawn, kept = own_rng(model.offsets, seed), None, [], 0, 0
    while kept < n or not parts:
        rows = draw_rows(model, CHUNK, value, rng)
        values = rows[:, : len(model.sizes)].long() + model.offsets
        weight = model.raked[values].sum(dim=1)
        level = weight.quantile(0.9) if level is None else level  # of the first rows, for all
        u = torch.rand(CHUNK, dtype=torch.float64, device=rows.device, generator=rng)
        rows = rows[u < (weight - level).exp()]
        table, good = decode(rows, model.columns), np.ones(len(rows), dtype=bool)
        for name, test in tests.items():
            good &= test(table[name])
        parts.append({name: values[good] for name, values in table.items()})
        drawn, kept = drawn + len(rows), kept + int(good.sum())
        if drawn >= 100_000 and kept < 1e-4 * drawn:
            raise UsageError(f"{given}: {kept} of {drawn:,} rows drawn had these values; ask less")
    table = {name: np.concatenate([part[name] for part in parts])[:n] for name in parts[0]}
    return table, kept / drawn


def rake(model, n=20_000, passes=10):
    """By how much each value of a row's spans raises the row's log-weight, (values,), float64.

    Of rows drawn, those that stay with the chance min(1, weight / 90th percentile of the weights)
    have the data's shares in each column, to one standard error of n rows: raking (Deming & Stephan
    1940). At least a tenth of them stay.
    """
    rng, sizes = own_rng(model.offsets, 0), model.sizes
    drawn = [draw_rows(model, CHUNK, rng=rng)[:, : len(sizes)].long() for _ in range(n // CHUNK)]
    shares, raked = model.share.split(sizes), [*torch.zeros_like(model.share).split(sizes)]
    weight, columns = model.share.new_zeros(n), torch.cat(drawn).T.contiguous()
    for _ in range(passes):
        level = weight.quantile(0.9)
        for i, (values, share) in enumerate(zip(columns, shares)):
            stays, chance = (weight - level).clamp(max=0).exp(), (share * (1 - share) / n).sqrt()
            found = torch.bincount(values, stays, len(share)) / stays.sum()
            wanted = found.clamp(share - chance, share + chance)
            change = torch.where(found > 0, wanted / found, 1).log().clamp(-2, 2)
            weight, raked[i] = weight + change[values], raked[i] + change
    return torch.cat(raked)


@torch.no_grad()
def draw_rows(model, n, value=None, rng=None):
    """n rows as encode gives them, all with the condition of this value or with the data's own."""
    if model.training:
        model.eval()  # the averages of training are part of G
        rows = draw_rows(model, n, value, rng)
        model.train()
        return rows
    z = model.noise(n, rng)
    if model.args.model == "ctgan":
        condition = model.conditions(model.chance["data"], n, rng)
        condition = condition if value is None else torch.full_like(condition, value)
        outputs = model.generator(z, one_hot(condition, model.column_of))
        logits, alpha = outputs.tensor_split([sum(model.sizes)], dim=1)
        alpha = alpha.tanh()
    else:
        logits, alpha = model.decoder(z).tensor_split([sum(model.sizes)], dim=1)
        noise = torch.randn(alpha.shape, device=alpha.device, generator=rng)
        alpha = alpha.tanh() + model.decoder.sd * noise
    spans = (logits + gumbel(logits, rng)).split(model.sizes, dim=1)
    return torch.cat([torch.stack([span.argmax(dim=1) for span in spans], dim=1), alpha], dim=1)


def given_values(model, given):
    """Of what is asked for: the numbers of discrete values, and a test of each column's values."""
    columns, wanted, tests = {c["name"]: c for c in model.columns}, [], {}
    for name, value in ((str(name), value) for name, value in given.items()):
        if name not in columns:
            known = ", ".join(sorted(columns, key=lambda name: columns[name]["place"]))
            raise UsageError(f"{name!r}: the table has the columns {known}")
        column = columns[name]
        if "categories" in column:
            values, text = np.array(column["categories"], column["dtype"]), str(value).strip()
            found = [i for i, known in enumerate(column["categories"]) if known == value]
            for texts in (format_column(values, column), column["categories"]):
                texts = [str(known).strip() for known in texts]  # in the file; in Python
                found = found or [i for i, known in enumerate(texts) if known == text]
            if not found:
                known = ", ".join(texts[:20])
                raise UsageError(f"{name}: no row trained on has {value!r}, but {known}")
            at = found[0]
            wanted.append(model.offsets[model.columns.index(column)].item() + at)
            tests[name] = functools.partial(is_value, values[at])
        else:
            tests[name] = functools.partial(in_range, *number_range(value, column))
    return wanted, tests


def own_rng(tensor, seed):
    """A random stream on the tensor's device that leaves the training's own alone."""
    return torch.Generator(tensor.device).manual_seed(seed)


def number_range(value, column):
    """Lowest and highest number or time that (low, high), "low..high" or one value stands for."""
    ends = value.split("..", 1) if isinstance(value, str) else value
    ends = [*ends] if isinstance(ends, (list, tuple, range, np.ndarray)) else [ends]
    form = f"{column['name']}={value}: take one value or LOW..HIGH"
    try:
        low, high = (as_number(ends[i], column) for i in (0, -1))
    except (IndexError, TypeError, ValueError) as error:
        raise UsageError(f"{form} ({error})") from error
    if not (low <= high and as_float(low) <= column["high"] and as_float(high) >= column["low"]):
        known = as_dtype(np.array([column["low"], column["high"]]), column["dtype"])
        known = " to ".join(format_column(known, column))
        raise UsageError(f"{form}; the data have {known}")
    return low, high


def as_number(value, column):
    """A number or a time that was given, which may stand as in the file."""
    if column["dtype"][1] == "f":  # as precise as the column
        return np.array(value, np.float64).astype(column["dtype"])
    if column["dtype"][1] != "M":
        return np.float64(value)
    if "time" in column and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = datetime.strptime(value.strip(), column["time"])
    return np.array(value).astype(column["dtype"])


def is_value(value, values):
    return (values == value) | ((values != values) & (value != value))  # or both are missing


def in_range(low, high, values):
    return (values >= low) & (values <= high)


OF_RUNS = {"data", "dataset", "data_dir", "header", "target", "test_rows", "rows", "given"}
OF_RUNS |= {"max_steps", "log_every", "out", "resume", "generate"}  # flags that mean nothing to fit


def fit(table, model="ctgan", discrete=(), continuous=(), **settings):
    """A model trained on a table, for sample().

    table is a dictionary of NumPy arrays or a pandas data frame. Columns of text, bools and up to
    ten different numbers, none missing, are discrete, but for those named in `discrete` and
    `continuous`; columns of objects are read as those of a CSV file. Other settings are flags of
    the script: epochs=100, seed=1, batch_size=200. Raises UsageError for a table or a setting that
    does not fit, and where training diverges.
    """
    names = {"discrete": discrete, "continuous": continuous, "drop": settings.pop("drop", ())}
    names = {k: [v] if isinstance(v, str) else [*map(str, v)] for k, v in names.items()}
    args = settings_of({"model": model} | names | settings)
    device = choose_device(args.device)
    data = table_data("table", *as_table(table), args, device, test={})
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        suit(args, data)
        torch.manual_seed(args.seed)
        trained = Model(args, data)
        update, n = stepper(args, trained, device), len(data.train)
        for _ in tqdm(range(args.epochs), desc=model, unit="epoch"):
            order = torch.randperm(n, device=device)[: n - n % args.batch_size]
            for index in order.split(args.batch_size):
                update(*trained.batch(data, index))
    if not all(weights.isfinite().all() for weights in trained.parameters()):
        raise UsageError(f"the weights are not finite after training: take an lr below {args.lr}")
    return trained.eval()


def settings_of(settings):
    """The flags of these names, checked as on a command line. Raises UsageError."""
    parser, kept = arguments(), {k: v for k, v in settings.items() if v is not None}
    if unknown := kept.keys() - vars(parser.parse_args([])).keys() | kept.keys() & OF_RUNS:
        raise UsageError(f"no such setting: {', '.join(sorted(unknown))}")

    def refuse(message):
        raise UsageError(message)

    parser.error = refuse
    lists = {name: value for name, value in kept.items() if isinstance(value, (list, tuple, bool))}
    words = (f"--{k.replace('_', '-')}={v}" for k, v in kept.items() if k not in lists)
    return argparse.Namespace(**vars(parser.parse_args(words)) | lists)


def load_model(path, device="cpu"):
    """The trained model of a checkpoint, for sample(). Raises UsageError for another file."""
    state = load_checkpoint(path)
    args = argparse.Namespace(**state["config"] | {"kernels": "reference"})  # none are needed
    rows = torch.empty(0, state["data"]["shape"][1], device=device)
    try:
        model = Model(args, Data("", state["data"]["about"], rows, None, None, None))
    except KeyError as error:
        raise UsageError(f"{path} is of another version: its columns lack {error}") from error
    model.load_state_dict(state["model"])
    return model.eval().requires_grad_(False)


def generate(args):
    """--generate: a CSV file of --rows rows, each as --given says."""
    given = dict(pair.partition("=")[::2] for pair in args.given)
    if len(given) < len(args.given):
        raise UsageError("--given: a column is named twice")
    model, rows = load_model(args.generate, choose_device(args.device)), args.rows or 1000
    path = Path(args.out or "synthetic.csv")
    if not path.name or path.resolve() == Path(model.args.data or "/").resolve():
        raise UsageError(f"--out {path}: name a file, and not the data's")
    table, share = sample_given(model, rows, given, args.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, table, model.columns)
    print(f"{SCRIPT}: {path}, {rows:,} rows")
    if given:
        print(f"{SCRIPT}: {share:.1%} of the rows drawn were as given and were kept")


def save_samples(model, path):
    """A hundred rows, as they come, as a CSV file."""
    rows = draw_rows(model, 100, rng=own_rng(model.offsets, 0))
    write_csv(path.with_suffix(".csv"), decode(rows, model.columns), model.columns)


# ------------------------------------------------------------------ tables
MISSING = {"", "na", "n/a", "nan", "null", "none", "?", "<na>", "nat"}  # in a column of numbers
NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
TIMES = dict.fromkeys(("%Y-%m-%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y"), "D")  # and their units
TIMES |= {"%Y-%m-%d %H:%M": "m", "%Y-%m-%d %H:%M:%S": "s", "%Y-%m-%dT%H:%M:%S": "s"}


def read_csv(path, header=(), drop=(), discrete=()):
    """The table of a CSV file, None in place of columns to drop, and formats. Raises UsageError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            delimiter = max(",;\t|", key=re.sub('"[^"]*"', "", first).count)
            lines = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
            lines = [line for line in lines if line]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not in UTF-8: save it so ({error})") from error
    except csv.Error as error:
        raise UsageError(f"{path} is no CSV file: {error}") from error
    names = [*header] if header else [name.strip() for name in lines[0]] if lines else []
    lines = lines if header else lines[1:]
    if len(lines) < 3:
        raise UsageError(f"{path} holds {len(lines)} rows: three at least are needed, and a header")
    odd = [name for name in names if names.count(name) > 1]
    if odd or (not header and any(NUMBER.fullmatch(name) for name in names)):
        name = (odd or [name for name in names if NUMBER.fullmatch(name)])[0]
        advice = "rename that, or, if it holds values, give --header NAME ..."
        raise UsageError(f"{path}: the first line is no header ({name!r}); {advice}")
    for number, line in enumerate(lines, start=1 if header else 2):
        if len(line) != len(names):
            raise UsageError(f"{path}, row {number}: {len(line)} values for {len(names)} columns")
    pairs = zip(names, zip(*lines))
    parsed = {
        name: (None, None) if name in drop else parse(texts, name in discrete or len({*texts}) < 11)
        for name, texts in pairs
    }
    return tuple({name: pair[i] for name, pair in parsed.items()} for i in range(2))


def parse(texts, exact=False):
    """Texts as an array of integers, decimals, times (datetime64) or else text; their format.

    exact, for categories: no two texts become one number, as 1.1 and 1.10 would, and no digit goes.
    Different integers that would be one float are text: they are names.
    """
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # each is parsed once
    index = np.fromiter(map(place.__getitem__, texts), int, len(texts))
    values = [text.strip() for text in place]
    gaps = [value for value in values if value.lower() in MISSING]
    known = [value for value in values if value.lower() not in MISSING]
    form = {"decimals": None, "missing_text": min(gaps, default="", key=len)}
    numeric = known and all(map(NUMBER.fullmatch, known))
    if numeric and (exact or all(map(str.isdecimal, known))):
        numbers = {*map(float, known)}
        numeric = len(numbers) == len({*known}) and not (exact and max(map(abs, numbers)) >= 2**53)
    if numeric:
        numbers = np.array([np.nan if v.lower() in MISSING else float(v) for v in values])
        shown = max(99 if "e" in v.lower() else len(v.partition(".")[2]) for v in known)
        if shown < 10:  # where there are more, all digits of a float are shown
            decimals = max(len(v.partition(".")[2].rstrip("0")) for v in known)  # of 1.0 none
            form |= {"decimals": decimals, "shown": shown}
        whole = shown == 0 and not gaps and np.abs(numbers).max() < 2**53
        return (numbers.astype(np.int64) if whole else numbers)[index], form
    fitting = []  # where 03/04/2020 may be in March or April, that of which fewer days differ
    for form_of_time in TIMES if known else ():
        with contextlib.suppress(ValueError):
            fitting.append(([datetime.strptime(v, form_of_time) for v in known], form_of_time))
    if fitting:
        times, form_of_time = min(fitting, key=lambda pair: len({time.day for time in pair[0]}))
        times = dict(zip(known, times))
        times = np.array([times.get(v, "NaT") for v in values], f"M8[{TIMES[form_of_time]}]")
        return times[index], form | {"decimals": 0, "time": form_of_time}
    return np.array(values)[index], form


def as_table(table):
    """The columns of a dictionary or a data frame, and their formats. Raises UsageError."""
    arrays, forms = {str(name): np.asarray(table[name]) for name in table}, {}
    shapes = {values.shape for values in arrays.values()}
    if len(shapes) != 1 or len(min(shapes)) != 1 or min(shapes)[0] < 3:
        raise UsageError("a table's columns need one dimension, one length, and three rows or more")
    for name, values in arrays.items():
        forms[name] = {"decimals": 0}
        if values.dtype == object:  # text, or numbers with None among them
            gaps = [not isinstance(v, str) and str(v).lower() in MISSING for v in values]
            texts = ["" if gap else str(value) for gap, value in zip(gaps, values)]
            arrays[name], forms[name] = parse(texts)
        elif values.dtype.kind == "f":
            different = np.unique(values[~np.isnan(values)])
            for some in (different[:: max(1, len(different) // 1000)], different):
                forms[name] = parse([str(x) for x in some])[1]
                decimals = forms[name]["decimals"]
                if decimals is None or (different.round(decimals) == different).all():
                    break  # a thousand have told
    return arrays, forms


def write_csv(path, table, columns):
    """Writes a table with the header, order and decimals of the data it was trained on."""
    formats = {column["name"]: column for column in columns}
    texts = [format_column(values, formats[name]) for name, values in table.items()]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*texts))
    write_file(Path(path), buffer.getvalue().encode())


def format_column(values, column):
    """The texts of a column's values, with its decimals or its form of time."""
    if values.dtype.kind not in "fM":
        return map(str, values.tolist())
    missing = column.get("missing_text", "")
    if values.dtype.kind == "M":
        if "time" not in column:  # of an array
            return (missing if text == "NaT" else text for text in values.astype(str).tolist())
        times = values.astype("datetime64[s]").tolist()
        form = column["time"].replace  # years before 1000 would have fewer than four digits
        return (missing if t is None else t.strftime(form("%Y", f"{t.year:04}")) for t in times)
    form = f".{column['shown']}f" if "shown" in column else ""
    return (missing if math.isnan(x) else format(x, form) for x in values.tolist())


# ------------------------------------------------------------------ data
SETS = ("auto", "adult", "labelled", "grid", "gridr", "ring", "asia")
ADULT = "https://archive.ics.uci.edu/ml/machine-learning-databases/adult/adult.data"
ADULT_COLUMNS = (
    "age workclass fnlwgt education education-num marital-status occupation relationship race sex "
    "capital-gain capital-loss hours-per-week native-country income"
)
SCHOOLS = (
    "Preschool 1st-4th 5th-6th 7th-8th 9th 10th 11th 12th HS-grad Prof-school Assoc-voc Assoc-acdm "
    "Some-college Bachelors Masters Doctorate"
)  # in the order that the authors' classifiers are given, as a number
LIMIT = 20_000  # categories of all columns, which are the width of the networks, as are the modes:
NUMBER_SIZE = 6  # a column of numbers has some ten outputs, but is no condition
# columns: as encode gives them; train: the rows (n, spans + alphas), float32, on the
# device; table and test: the same rows and the held-out ones as they were; truth: what is known of
# a simulated set: centres of its modes or a Bayesian network, or None
Data = namedtuple("Data", "name columns train table test truth")


def load_data(args, device):
    """The table asked for; auto is Adult or, where that can not be had, a simulated one."""
    if (args.given or args.rows) and not args.resume:
        raise UsageError("--given and --rows go with --generate CHECKPOINT")
    args.data_dir = os.path.abspath(os.path.expanduser(args.data_dir))  # to go on elsewhere
    if args.data or args.dataset.endswith(".bif"):
        args.data = os.path.abspath(os.path.expanduser(args.data or args.dataset))
        name = Path(args.data).stem
        if not args.data.endswith(".bif"):
            table = read_csv(args.data, args.header, args.drop, args.discrete)
            return table_data(name, *table, args, device)
        try:
            network = read_network(Path(args.data).read_text())
        except ValueError as error:
            raise UsageError(f"{args.data}: {error}") from error
        return simulated_data(name, network, args, device)
    name = "adult" if args.dataset == "auto" else args.dataset
    if name not in SETS:
        raise UsageError(f"--dataset {name}: {', '.join(SETS)}, or a file .bif; a CSV is --data")
    if name == "adult":
        try:
            path = Path(args.data_dir, "adult", "adult.data")
            if not path.exists():
                socket.setdefaulttimeout(5)  # a network that never answers is no network
                download_url(ADULT, path.parent, path.name, "5d7c39d7b8804f071cdd1f2a7c460872")
            table = read_csv(path, ADULT_COLUMNS.split())
        except (OSError, RuntimeError) as error:
            reason = f"adult can not be read from --data-dir {args.data_dir}: {error}"
            if args.dataset != "auto" or Path(args.data_dir).is_file():
                raise UsageError(f"{reason}; a table of your own is --data FILE") from error
            print(f"{SCRIPT}: {reason}; training on a simulated table instead.")
            name = "labelled"
    args.dataset = name  # a run begun with auto goes on with the same set
    if name == "adult":
        args.target = args.target or "income"
        return table_data(name, *table, args, device)
    return simulated_data(name, asia() if name == "asia" else None, args, device)


def simulated_data(name, network, args, device):
    """20,000 rows of one of the paper's simulated sets, half of them held out, and their truth."""
    rng = np.random.default_rng(0)
    if network is None:
        train, test, truth = simulated_points(name, rng)
    else:
        train, test = (sample_network(network, 10_000, rng) for _ in range(2))
        truth = network
    return table_data(name, *as_table(train), args, device, test, truth)


def table_data(name, table, forms, args, device, test=None, truth=None):
    """A table as Data, its types found and printed, and a part held out. Raises UsageError."""
    flags = {"--drop": args.drop, "--discrete": args.discrete, "--continuous": args.continuous}
    for flag, named in (flags | {"--target": [args.target] if args.target else []}).items():
        if unknown := [column for column in named if column not in table]:
            known = ", ".join(table) or "none left"
            raise UsageError(f"{flag} {unknown[0]}: the table has the columns {known}")
        if flag == "--drop":
            table = {column: values for column, values in table.items() if column not in named}
    if not table:
        raise UsageError("--drop leaves no column")
    discrete = {c for c, v in table.items() if c not in args.continuous and is_discrete(c, v, args)}
    for column in table.keys() - discrete:
        if table[column].dtype.kind not in "iufM":
            texts = [str(value) for value in table[column]]
            odd = (v for v in texts if not NUMBER.fullmatch(v) and v.lower() not in MISSING)
            raise UsageError(f"--continuous {column}: {next(odd, texts[0])!r} is text, no number")
        if (np.abs(as_float(table[column])) > 1e150).any():
            raise UsageError(f"{column} holds infinity, or more than 1e150: --drop it")
    sizes = {c: len(np.unique(values)) for c, values in table.items() if c in discrete}
    if sum(sizes.values()) + NUMBER_SIZE * len(table.keys() - discrete) > LIMIT:
        widest = sorted(sizes, key=sizes.get, reverse=True)[:3]
        found = ", ".join(f"{column} {sizes[column]:,}" for column in widest)
        raise UsageError(
            f"{len(table):,} columns with {sum(sizes.values()):,} categories are too many"
            f"{found and f' ({found})'}: at most {LIMIT:,} categories, and a column of numbers is "
            f"as {NUMBER_SIZE}; --drop some, or join rare values"
        )
    if RANK == 0:
        print(f"{SCRIPT}: discrete: {', '.join(f'{c} ({n})' for c, n in sizes.items())}")
        shown = [f"{c} {forms[c].get('time', '')}".strip() for c in table if c not in discrete]
        print(f"{SCRIPT}: continuous: {', '.join(shown)}")
        for column, size in sizes.items():
            texts = [str(value).strip() for value in np.unique(table[column])]
            odd = [t for t in texts if not NUMBER.fullmatch(t) and t.lower() not in MISSING]
            near = sum(bool(NUMBER.fullmatch(text.replace(",", "."))) for text in texts)
            if odd and near > 0.9 * size and column not in args.discrete:
                print(f"{SCRIPT}: {column}: text, since {odd[0]!r} is no number (1234.5 is one)")
            elif size > 0.5 * len(table[column]) > 5:
                print(f"{SCRIPT}: {column}: most values are met once, and are copied; --drop it?")
    if test is None:
        order = np.arange(len(next(iter(table.values()))))
        np.random.RandomState(0).shuffle(order)  # the authors' split of Adult
        fifth = max(1, min(len(order) // 5, 10_000))
        held = min(args.test_rows or fifth, len(order) - 2)
        test = {column: values[order[len(order) - held :]] for column, values in table.items()}
        table = {column: values[order[: len(order) - held]] for column, values in table.items()}
    for column in table.keys() - discrete:
        if np.isnan(as_float(table[column])).all():
            raise UsageError(f"{column} holds nothing in the rows for training: --drop it")
    columns, rows = encode(table, discrete, np.random.default_rng(args.seed))
    for column in columns:
        column |= forms[column["name"]]
    return Data(name, columns, rows.to(device), table, test, truth)


def is_discrete(name, values, args):
    """Text, bools, and numbers of which there are at most ten different, none of them missing."""
    kind = values.dtype.kind
    if name in args.discrete or kind not in "iufM":
        return True
    if kind in "iu":
        x = as_float(values)
        if abs(x).max() >= 2**62 or len(np.unique(x)) < len(np.unique(values)):
            return True  # different integers that would be one float are names
    few = kind in "iuf" and len(np.unique(values[:1000])) <= 10
    return few and len(np.unique(values)) <= 10 and not np.isnan(values).any()


# ------------------------------------------------------------------ simulated data
VARIANCE = 0.05  # of every Gaussian of the simulated points, along each axis
COMPONENTS = {"grid": 30, "gridr": 30, "ring": 10, "labelled": 30}  # of the fitted mixtures
MODES = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXY"))  # of labelled, the commonest first
SHARES = 1 / np.arange(1, 26) / (1 / np.arange(1, 26)).sum()  # of these: from 26 to 1 %

ASIA = {  # Lauritzen and Spiegelhalter 1988: parents, P(yes) for each of their values, yes first
    "asia": ((), [0.01]),
    "tub": (("asia",), [0.05, 0.01]),
    "smoke": ((), [0.5]),
    "lung": (("smoke",), [0.1, 0.01]),
    "bronc": (("smoke",), [0.6, 0.3]),
    "either": (("lung", "tub"), [1, 1, 1, 0]),
    "xray": (("either",), [0.98, 0.05]),
    "dysp": (("bronc", "either"), [0.9, 0.8, 0.7, 0.1]),
}


def simulated_points(name, rng, n=20_000):
    """grid, gridr or ring of the paper: train and test tables of x, y, and the centres (modes, 2).

    labelled is the grid with a column that names each row's Gaussian, by MODES, in their SHARES.
    """
    angle, at = np.arange(8) * math.pi / 4, np.arange(-4.0, 5, 2)
    centres = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if name != "ring":
        centres = np.stack(np.meshgrid(at, at), axis=-1).reshape(25, 2)
    if name == "gridr":
        centres += rng.uniform(-0.5, 0.5, centres.shape)
    mode = rng.permutation(np.arange(n) % len(centres))
    if name == "labelled":
        centres, mode = rng.permutation(centres), rng.choice(25, n, p=SHARES)
    x, y = (centres[mode] + rng.normal(0, math.sqrt(VARIANCE), (n, 2))).T
    table = {"x": x, "y": y} | ({"mode": MODES[mode]} if name == "labelled" else {})
    train, test = ({name: column[i::2] for name, column in table.items()} for i in (0, 1))
    return train, test, centres


def points(table):
    return np.stack([table["x"], table["y"]], axis=1)


def mixture_fitness(test, synthetic, components, seed=0):
    """Likelihood fitness on simulated points as the authors' code measures it, in nats a row.

    L_syn is that of the synthetic rows under a mixture of so many Gaussians fitted to the test
    rows, L_test that of the test rows under a mixture fitted to the synthetic rows.
    """

    def fitness(rows, others):
        mixture = GaussianMixture(components, covariance_type="diag", random_state=seed)
        return float(mixture.fit(points(others)).score(points(rows)))

    return {"L_syn": fitness(synthetic, test), "L_test": fitness(test, synthetic)}


def mode_figures(synthetic, centres):
    """Synthetic points beside the Gaussians that the data were drawn from.

    A row's mode is the nearest or, in labelled, the one that it names. A mode is covered if it has,
    within three standard deviations, a tenth of its share of all rows. true_log_likelihood is the
    mean log density of the rows, in nats.
    """
    square = ((points(synthetic)[:, None] - centres) ** 2).sum(axis=-1) / VARIANCE  # (rows, modes)
    own = square == square.min(axis=1, keepdims=True)
    share = np.full(len(centres), 1 / len(centres))
    log_density = -square / 2 - math.log(2 * math.pi * VARIANCE)
    if "mode" in synthetic:
        own, share = synthetic["mode"][:, None] == MODES, SHARES
        log_density[~own] = -np.inf
    good = own & (square <= 9)
    return {
        "true_log_likelihood": float(logsumexp(log_density + np.log(share), axis=1).mean()),
        "modes_covered": int((good.mean(axis=0) >= 0.1 * share).sum()),
        "modes_total": len(centres),
        "share_within_3_sigma": float(good.any(axis=1).mean()),
    }


# A Bayesian network is a dictionary, parents before children: variable -> (values, parents, P),
# where P (values of each parent ..., values) is p(value | values of the parents), float64.
def asia():
    """The network asia: 8 variables, each yes or no."""
    network = {}
    for name, (parents, yes) in ASIA.items():
        p = np.stack([yes, 1 - np.array(yes)], axis=-1)
        network[name] = ["yes", "no"], parents, p.reshape([2] * (len(parents) + 1))
    return network


def read_network(text):
    """The Bayesian network of the text of a BIF file; ValueError says what is wrong with it."""
    values, found, network = {}, {}, {}
    variable = r"variable\s+(\S+)\s*\{\s*type\s+discrete\s*\[[^]]*\]\s*\{([^}]*)\}"
    for name, inside in re.findall(variable, text):
        values[name] = [value.strip() for value in inside.split(",")]
    if not values:
        raise ValueError("no BIF: no `variable NAME { type discrete [ N ] { VALUE, ... }; }`")
    for head, body in re.findall(r"probability\s*\(([^)]*)\)\s*\{([^}]*)\}", text):
        try:
            name, *parents = re.split(r"[\s,|]+", head.strip())
            if unknown := {name, *parents} - values.keys():
                raise ValueError(f"no variable {', '.join(sorted(unknown))} is declared")
            p = np.full([len(values[variable]) for variable in (*parents, name)], np.nan)
            for given, row in re.findall(r"(?:table|\(([^)]*)\))([^;]*);", body):
                given = [value.strip() for value in given.split(",") if value.strip()]
                place = [values[v].index(value) for v, value in zip(parents, given, strict=True)]
                p[*place] = np.reshape([float(number) for number in row.split(",")], p.shape[-1])
            if np.isnan(p).any():
                raise ValueError(f"{np.isnan(p).sum()} of {p.size} numbers are missing")
            if (p < 0).any() or abs(p.sum(axis=-1) - 1).max() > 0.01:  # files are rounded
                raise ValueError("they do not sum to 1")
        except ValueError as error:
            raise ValueError(f"probability ({head.strip()}) can not be read: {error}") from error
        found[name] = values[name], tuple(parents), p / p.sum(axis=-1, keepdims=True)
    if absent := values.keys() - found.keys():
        raise ValueError(f"no probabilities of {', '.join(sorted(absent))}")
    while rest := [name for name in values if name not in network]:
        ready = {name: found[name] for name in rest if network.keys() >= set(found[name][1])}
        if not ready:
            raise ValueError(f"{', '.join(rest)} depend on each other in a circle")
        network |= ready
    return network


def sample_network(network, n, rng):
    """A table of n rows of strings."""
    table, code = {}, {}
    for name, (values, parents, p) in network.items():
        below = p[tuple(code[parent] for parent in parents)].cumsum(axis=-1)[..., :-1]
        code[name] = (below <= rng.random((n, 1))).sum(axis=-1)
        table[name] = np.array(values)[code[name]]
    return table


def cells(network, table):
    """{variable: where the rows of a table lie in its P}; KeyError for a value that it lacks."""
    code = {}
    for name, (values, _, _) in network.items():
        number = {value: i for i, value in enumerate(values)}
        code[name] = np.array([number[value] for value in table[name].tolist()])
    return {name: tuple(code[v] for v in (*network[name][1], name)) for name in network}


def network_log_likelihood(network, table):
    """log p (rows,) of the rows of a table; -inf of those that are impossible."""
    with np.errstate(divide="ignore"):
        return sum(np.log(network[name][2][cell]) for name, cell in cells(network, table).items())


def refit_network(network, table):
    """The network with the probabilities counted in a table; uniform where no row tells."""
    refitted = {}
    for name, cell in cells(network, table).items():
        values, parents, p = network[name]
        count = np.zeros(p.shape)
        np.add.at(count, cell, 1)
        total, uniform = count.sum(axis=-1, keepdims=True), np.full(p.shape, 1 / len(values))
        refitted[name] = values, parents, np.divide(count, total, out=uniform, where=total > 0)
    return refitted


def network_fitness(network, test, synthetic):
    """Likelihood fitness on a Bayesian network as the authors' code measures it, in nats a row.

    L_syn is the mean log(p + 1e-8) of the synthetic rows, L_test that of the test rows under the
    network refitted to the synthetic rows.
    """

    def fitness(network, rows):
        return float(np.log(np.exp(network_log_likelihood(network, rows)) + 1e-8).mean())

    refitted = refit_network(network, synthetic)
    return {"L_syn": fitness(network, synthetic), "L_test": fitness(refitted, test)}


# ------------------------------------------------------------------ evaluation and figures
def discrete_names(data):
    return {column["name"] for column in data.columns if "categories" in column}


def measurable(table, discrete):
    """The table with continuous times as numbers, as the measures take them."""
    return {name: v if name in discrete else as_float(v) for name, v in table.items()}


def evaluate(model, data):
    """How like held-out rows 2,000 generated ones are, before any is drawn again: see quality."""
    discrete = discrete_names(data)
    rows = draw_rows(model, 2000, rng=own_rng(model.offsets, 1))
    test = {name: values[:2000] for name, values in data.test.items()}
    tables = (measurable(table, discrete) for table in (test, decode(rows, model.columns)))
    return quality(*tables, discrete)


def finish(model, data, folder, rows):
    """Leaves synthetic.csv and the figures, and returns what else is measured at the end."""
    discrete, synthetic = discrete_names(data), sample(model, len(data.train))
    write_csv(folder / "synthetic.csv", synthetic, data.columns)
    tables = (data.table, data.test, synthetic)
    table, test, synthetic = (measurable(part, discrete) for part in tables)
    save_columns(folder / "columns.png", table, synthetic, discrete)
    save_pairs(folder / "pairs.png", table, synthetic, discrete)
    save_curves(folder / "curves.png", rows)
    found = quality(test, synthetic, discrete) | rare_values(table, synthetic, discrete)
    found |= privacy(table, test, synthetic, discrete)
    if min(len(data.train), len(next(iter(test.values())))) >= 3:  # its folds
        found["detection_auc"] = detection_auc(test, synthetic, discrete, model.args.seed)
    found |= obeyed(model)
    if isinstance(data.truth, dict):
        found |= network_fitness(data.truth, test, synthetic)
    elif data.truth is not None:
        save_points(folder / "points.png", table, synthetic)
        found |= mixture_fitness(test, synthetic, COMPONENTS.get(data.name, 30))
        found |= mode_figures(synthetic, data.truth)
    if model.args.target:
        ordinal = {"education": SCHOOLS.split()} if data.name == "adult" else None
        target = model.args.target
        found["efficacy"] = efficacy(table, synthetic, test, target, discrete, ordinal)
    return found


@torch.no_grad()
def obeyed(model, values=200):
    """The share of rows that have the value their condition names: mean, and the worst value's.

    500 rows each of all values, or of so many evenly chosen ones; TVAE has no conditions.
    """
    n, shares = len(model.column_of), []
    if n == 0 or model.args.model == "tvae":
        return {}
    for value in range(0, n, math.ceil(n / values)):
        rows = draw_rows(model, 500, value, own_rng(model.offsets, value))
        column = model.column_of[value]
        shares.append((rows[:, column] == value - model.offsets[column]).double().mean().item())
    return {"condition_obeyed": sum(shares) / len(shares), "condition_obeyed_worst": min(shares)}


def save_curves(path, rows):
    """Quality over the updates, since the losses of a WGAN tell a reader little, and the losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    measured = [row for row in rows if "quality" in row]
    for name in ("column_shapes", "pair_trends", "quality"):
        left.plot([r["step"] for r in measured], [r[name] for r in measured], ".-", label=name)
    for name in [name for name in rows[0] if name.startswith(("loss", "rec", "div", "pen"))]:
        right.plot([r["step"] for r in rows], [r[name] for r in rows], label=name)
    for axis in (left, right):
        axis.set_xlabel("update")
        axis.legend()
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------ measures
# A table is a dictionary of columns, name -> array (rows,). Those named in the set `discrete` hold
# categories (str, bool or int), the others numbers, of which NaN are missing.
WIDEST = 40  # columns that a figure shows, and whose pairs count in the quality


def present(column):
    """The numbers of a column that are not missing."""
    return column[~np.isnan(column)]


def scaled(column, like):
    """A column of numbers, float64, with the range of another column as [0, 1]."""
    known = present(like)
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    return (column - low) / ((high - low) or 1.0)


def binned(column, like, bins=10):
    """Which part of another column's range each number lies in, from 0; `bins` if it is missing."""
    place = scaled(column, like) * bins
    return np.where(np.isnan(place), bins, place.clip(0, bins - 1)).astype(np.int64)


def codes(*columns):
    """The values of some columns, numbered together from 0: an array of int64 for each column."""
    _, code = np.unique(np.concatenate(columns), return_inverse=True)
    return np.split(code, np.cumsum([len(column) for column in columns])[:-1])


def shares(*codes):
    """How often each of the codes occurs: (columns, codes)."""
    size = max(code.max() for code in codes) + 1
    return np.stack([np.bincount(code, minlength=size) / len(code) for code in codes])


def rows_of(table, n, rng):
    """A table of n rows, or of all if there are fewer, in random order."""
    index = rng.permutation(len(next(iter(table.values()))))[:n]
    return {name: column[index] for name, column in table.items()}


def some_columns(table):
    """A table of at most WIDEST columns, evenly spaced."""
    names, most = list(table), min(len(table), WIDEST)
    return {names[i]: table[names[i]] for i in np.linspace(0, len(names) - 1, most).astype(int)}


def total_variation(a, b):
    """Half the sum of |p - q|, p and q the shares of each code in a and b."""
    if max(a.max(), b.max()) > 10**6:  # of so many most do not occur
        a, b = codes(a, b)
    p, q = shares(a, b)
    return min(float(abs(p - q).sum() / 2), 1.0)


def column_shapes(real, synthetic, discrete):
    """{column: score in [0, 1]}, 1 where real and synthetic are distributed alike.

    1 - the total variation of categories; 1 - the Kolmogorov-Smirnov statistic of the numbers that
    are present or, if that is less, 1 - the difference of the shares that are missing.
    """
    scores = {}
    for name in real:
        a, b = real[name], synthetic[name]
        if name in discrete:
            scores[name] = 1 - total_variation(*codes(a, b))
        else:
            missing = float(abs(np.isnan(a).mean() - np.isnan(b).mean()))
            a, b = present(a), present(b)
            x = np.concatenate([a, b])
            p, q = (np.searchsorted(np.sort(c), x, side="right") / (len(c) or 1) for c in (a, b))
            distance = abs(p - q).max(initial=0)  # 1 where only one is empty
            scores[name] = 1 - float(max(distance, missing))
    return scores


def correlations(table, names):
    """Pearson's r (n, n) of n columns of numbers, over the rows where both are present.

    It is 0 where it is undefined, as for a constant.
    """
    x = np.stack([scaled(table[name], table[name]) for name in names], axis=1)
    here, x = (~np.isnan(x)).astype(float), np.nan_to_num(x)
    n, total, square = here.T @ here, x.T @ here, (x * x).T @ here
    variance = (n * square - total**2).clip(0)  # times n^2, as the covariance
    scale = np.sqrt(variance * variance.T)
    covariance = n * (x.T @ x) - total * total.T
    return np.divide(covariance, scale, out=0 * n, where=scale > 1e-12 * n**2).clip(-1, 1)


def cramers_v(a, b):
    """The association of two columns of codes, in [0, 1]; 0 if one is constant."""
    (p,), (q,) = shares(a), shares(b)
    cell, count = np.unique(a * len(q) + b, return_counts=True)
    squares = (count / len(a)) ** 2 / (p[cell // len(q)] * q[cell % len(q)])
    return math.sqrt(min(max(squares.sum() - 1, 0) / max(min(len(p), len(q)) - 1, 1), 1))


def correlation_ratio(code, numbers):
    """The deviation of the categories' means beside that of the numbers, in [0, 1]."""
    code, x = code[~np.isnan(numbers)], present(scaled(numbers, numbers))
    if not len(x) or x.min() == x.max():
        return 0.0
    mean = (np.bincount(code, x) / np.bincount(code).clip(1))[code]
    return min(float(mean.std() / x.std()), 1.0)


def pair_trends(real, synthetic, discrete):
    """{(column, column): score in [0, 1]} of each pair, 1 where it is associated alike.

    1 - half the difference of Pearson's r of two columns of numbers; else 1 - the total variation
    of both columns together, where numbers fall into tenths of their real range.
    """
    names, scores, code = list(real), {}, {}
    for name in names:
        a, b = real[name], synthetic[name]
        code[name] = codes(a, b) if name in discrete else (binned(a, a), binned(b, a))
    numbers = [name for name in names if name not in discrete]
    r = abs(correlations(real, numbers) - correlations(synthetic, numbers)) if numbers else None
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if a in discrete or b in discrete:
                size = max(part.max() for part in code[b]) + 1
                both = (part * size + other for part, other in zip(code[a], code[b]))
                scores[a, b] = 1 - total_variation(*both)
            else:
                scores[a, b] = 1 - float(r[numbers.index(a), numbers.index(b)]) / 2
    return scores


def associations(table, discrete):
    """How much each two of n columns depend on each other: (n, n), float64, in [0, 1].

    |Pearson's r| of numbers, Cramér's V of categories, the correlation ratio of one with the other.
    """
    names, numbers = list(table), [name for name in table if name not in discrete]
    code = {name: codes(table[name])[0] for name in names if name in discrete}
    r, matrix = abs(correlations(table, numbers)) if numbers else None, np.eye(len(names))
    for i, a in enumerate(names):
        for j, b in enumerate(names[:i]):
            if a in code and b in code:
                value = cramers_v(code[a], code[b])
            elif a in code or b in code:
                category, number = (a, b) if a in code else (b, a)
                value = correlation_ratio(code[category], table[number])
            else:
                value = r[numbers.index(a), numbers.index(b)]
            matrix[i, j] = matrix[j, i] = value
    return matrix


def quality(real, synthetic, discrete):
    """The means of column_shapes and of pair_trends (of WIDEST columns at most), and their mean."""
    shapes = float(np.mean(list(column_shapes(real, synthetic, discrete).values())))
    pairs = list(pair_trends(some_columns(real), synthetic, discrete).values())
    trends = float(np.mean(pairs)) if pairs else shapes  # one column has no pairs
    return {"column_shapes": shapes, "pair_trends": trends, "quality": (shapes + trends) / 2}


def rare_values(real, synthetic, discrete, below=0.05):
    """What became of the categories, and of the rare ones, whose real share is less than `below`.

    categories_kept and rare_categories_kept are the shares of them that occur at all.
    rare_frequency_error is the sum over the rare ones of |synthetic - real share| beside the sum of
    the real shares: 1 if all are lost, 9 if each comes ten times too often. So a value's relative
    error counts by its frequency, or chance with values of three rows would be most of it.
    share_error_worst is the largest |synthetic - real share| less 3 standard errors.
    """
    pairs = [shares(*codes(real[name], synthetic[name])) for name in real if name in discrete]
    p, q = np.concatenate([np.zeros((2, 0)), *pairs], axis=1)
    if not p.any():
        return {}
    rare, n = (p > 0) & (p < below), len(next(iter(synthetic.values())))
    chance = 3 * np.sqrt(p * (1 - p) / n)
    error = abs(p - q)[rare].sum() / p[rare].sum() if rare.any() else 0.0
    return {
        "categories_kept": float((q > 0)[p > 0].mean()),
        "rare_categories_kept": float((q > 0)[rare].mean()) if rare.any() else 1.0,
        "rare_frequency_error": float(error),
        "share_error_worst": float((abs(p - q) - chance).max().clip(0)),
    }


def detection_auc(real, synthetic, discrete, seed=0):
    """How well gradient boosting tells synthetic from real rows: 0.5 is not at all, 1 always.

    The area under the ROC curve, the mean of 3 folds, on equal numbers of both, at most 10,000.
    """
    rng = np.random.default_rng(seed)
    n = min(10_000, *(len(column) for table in (real, synthetic) for column in table.values()))
    real, synthetic, x = rows_of(real, n, rng), rows_of(synthetic, n, rng), []
    for name in real:
        column = np.concatenate([real[name], synthetic[name]])
        if name in discrete:  # the model tells 255 categories apart: the rarest become one
            (code,) = codes(column)
            x.append((-np.bincount(code)).argsort(kind="stable").argsort()[code].clip(max=254))
        else:
            x.append(np.nan_to_num(scaled(column, column), nan=-1))
    kinds = [name in discrete for name in real]
    model = ensemble.HistGradientBoostingClassifier(categorical_features=kinds, random_state=seed)
    folds = StratifiedKFold(3, shuffle=True, random_state=seed)
    x, y = np.stack(x, axis=1), np.repeat([0, 1], n)
    return float(cross_val_score(model, x, y, cv=folds, scoring="roc_auc").mean())


def nearest(rows, others):
    """The distance (n,), a mean of min(|a - b|, 1), of rows (n, d) to the nearest others (m, d)."""
    distance = np.empty(len(rows))
    for i in range(0, len(rows), 200):  # a few MB at a time
        total = np.zeros((len(rows[i : i + 200]), len(others)), np.float32)
        for a, b in zip(rows[i : i + 200].T, others.T):
            total += np.minimum(abs(a[:, None] - b), 1)
        distance[i : i + 200] = total.min(axis=1) / rows.shape[1]
    return distance


def privacy(train, held_out, synthetic, discrete, seed=0):
    """Whether synthetic rows are nearer to the training rows than other real rows are.

    copied_rows is the share of rows that equal a training row, and distance_to_training the median
    distance to the nearest one: the mean over columns of whether categories differ, and of the
    numbers' difference in units of the training range, at most 1. Both are stated of held-out rows
    too. nearer_to_training is the share of synthetic rows nearer to a training than to a held-out
    row, ties counted half: 0.5 where nothing was learnt by heart. repeated_rows is the share that
    equal an earlier synthetic row. Distances are from 2,000 random rows (fewer of more than 20
    columns) to 10,000 training and 10,000 held-out ones, or as many of both as there are.
    """
    exact, near = [], []
    for name in train:
        columns = [table[name] for table in (train, held_out, synthetic)]
        exact.append(codes(*columns))
        if name not in discrete:  # a missing number is far from all others
            columns = [np.nan_to_num(scaled(column, train[name]), nan=1e6) for column in columns]
        near.append(exact[-1] if name in discrete else columns)
    known, held, made = ([bytes(row) for row in np.stack(part, axis=1)] for part in zip(*exact))
    known, rng = set(known), np.random.default_rng(seed)
    a, b, c = (rng.permutation(np.stack(part, axis=1).astype(np.float32)) for part in zip(*near))
    most, few = min(len(a), len(b), 10_000), min(2_000, 40_000 // len(train) + 1)
    a, b, c = a[:most], b[:most], c[:few]
    to_train, to_held = nearest(c, a), nearest(c, b)
    return {
        "copied_rows": float(np.mean([row in known for row in made])),
        "copied_rows_held_out": float(np.mean([row in known for row in held])),
        "repeated_rows": 1 - len(set(made)) / len(made),
        "nearer_to_training": float(((to_train < to_held) + (to_train == to_held) / 2).mean()),
        "distance_to_training": float(np.median(to_train)),
        "distance_to_training_held_out": float(np.median(nearest(b[:few], a))),
    }


def number_feature(column, like):
    """The authors' scaling of numbers: the logarithm of large ones, else the range as [0, 5]."""
    known = present(like)
    if len(known) and known.min() >= 0 and known.max() >= 1000:
        return np.log(np.maximum(column, 0.01))
    return scaled(column, like) * 5


def efficacy_features(tables, target, discrete, ordinal):
    """The authors' features of each table, (rows, features) float64, as the first one suggests.

    Numbers by number_feature, with an indicator where some are missing; the place of ordinal
    categories and of two; 0 and 1 for each of more, the 200 commonest.
    """
    features = []
    for name, like in tables[0].items():
        columns = [table[name] for table in tables]
        if name == target:
            continue
        if name not in discrete:
            part = [number_feature(column, like)[:, None] for column in columns]
            if np.isnan(like).any():
                part = [np.concatenate([x, np.isnan(x)], axis=1) for x in part]
            part = [np.nan_to_num(x) for x in part]
        else:
            values, count = np.unique(like, return_counts=True)
            values = ordinal.get(name, values[np.argsort(-count, kind="stable")][:200])
            part = [column[:, None] == np.array(values) for column in columns]
            if name in ordinal or len(values) <= 2:
                part = [x.argmax(axis=1)[:, None] for x in part]
        features.append(part)
    return [np.concatenate(part, axis=1).astype(float) for part in zip(*features)]


def efficacy(train, synthetic, test, target, discrete, ordinal=None, seed=0):
    """Machine-learning efficacy: how well models that learn from synthetic rows do on real ones.

    Returns {"real", "synthetic": {measure: float}}, by the rows learnt from (50,000 at most), with
    the authors' features and, as for Adult, their models, the mean of these, and gradient boosting.
    Of a target of two categories F1 and AUC of the rarer one, of more the macro F1, of numbers R^2
    in the scale of number_feature, without rows that lack it. `ordinal` has the columns whose
    categories have an order: {column: values}.
    """
    rng = np.random.default_rng(seed)
    tables = [rows_of(train, 50_000, rng), rows_of(synthetic, 50_000, rng), test]
    if target in discrete:
        y = codes(*(table[target] for table in tables))
        found, count = np.unique(y[0], return_counts=True)
        if len(found) == 2:
            y = [code == found[count.argmin()] for code in y]
        average, kind = ("binary", "f1") if len(found) == 2 else ("macro", "macro_f1")
        models = {
            "tree": DecisionTreeClassifier(
                max_depth=15, class_weight="balanced", random_state=seed
            ),
            "adaboost": ensemble.AdaBoostClassifier(n_estimators=50, random_state=seed),
            "logistic": LogisticRegression(class_weight="balanced", max_iter=50),
            "mlp": MLPClassifier((50,), max_iter=50, random_state=seed),
            # to stop early it would need two rows of each class
            "boosting": ensemble.HistGradientBoostingClassifier(
                early_stopping=False, random_state=seed
            ),
        }
    else:
        tables = [{n: c[~np.isnan(t[target])] for n, c in t.items()} for t in tables]
        if not all(len(table[target]) for table in tables):
            return {}
        y = [number_feature(table[target], tables[0][target]) for table in tables]
        kind = "r2"
        models = {
            "linear": LinearRegression(),
            "mlp": MLPRegressor(hidden_layer_sizes=(100,), max_iter=50, random_state=seed),
            "boosting": ensemble.HistGradientBoostingRegressor(random_state=seed),
        }
    x, scores = efficacy_features(tables, target, discrete, ordinal or {}), {}
    for source, rows, answers in zip(("real", "synthetic"), x, y):
        part = scores[source] = {}
        for name, model in models.items():
            if target in discrete and len(np.unique(answers)) == 1:
                model = DummyClassifier()
            with warnings.catch_warnings():  # the authors stop after 50 rounds
                warnings.simplefilter("ignore", ConvergenceWarning)
                predicted = model.fit(rows, answers).predict(x[2])
            if kind == "r2":
                part[f"r2_{name}"] = float(r2_score(y[2], predicted))
            else:
                score = f1_score(y[2], predicted, average=average, zero_division=0)
                part[f"{kind}_{name}"] = float(score)
        authors = [value for name, value in part.items() if name != f"{kind}_boosting"]
        part[f"{kind}_mean"] = float(np.mean(authors))
        if kind == "f1" and 0 < y[2].mean() < 1:
            part["auc_boosting"] = float(roc_auc_score(y[2], model.predict_proba(x[2])[:, -1]))
    return scores


# ------------------------------------------------------------------ figures
def label(value):
    """A short text for a figure."""
    text = " ".join(str(value).split()) or "missing"
    return text if len(text) <= 14 else text[:13] + "…"


def bars(real, synthetic, discrete):
    """Shares of a column's values (2, bars), real and synthetic, and a label for each bar.

    Of more than 20 categories the 10 commonest and the 10 rarest; of numbers 20 parts of the range.
    """
    both = np.concatenate([real, synthetic])
    if discrete:
        share, values = shares(*codes(real, synthetic)), np.unique(both)
        order = np.argsort(-share[0], kind="stable")
        order = order if len(order) <= 20 else np.concatenate([order[:10], order[-10:]])
        return share[:, order], [label(values[i]) for i in order]
    share, known = shares(binned(real, both, 20), binned(synthetic, both, 20)), present(both)
    share = np.pad(share, [(0, 0), (0, max(0, 20 - len(share[0])))])
    labels = [""] * 20 + ["\nmissing"] * (len(share[0]) - 20)
    if len(known):
        labels[0], labels[19] = f"{known.min():.4g}", f"{known.max():.4g}"
    return share, labels


def save_columns(path, real, synthetic, discrete):
    """Each column's distribution, real beside synthetic; of a wide table those least alike."""
    from matplotlib.figure import Figure

    scores = column_shapes(real, synthetic, discrete)
    worst = set(sorted(scores, key=scores.get)[:WIDEST])
    names = [name for name in real if name in worst]
    across = min(5, len(names))
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(max(2.8 * across, 5), 2.4 * down + 0.7), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis in axes[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes, names):
        share, labels = bars(real[name], synthetic[name], name in discrete)
        shown = share[share > 0]
        axis.stairs(share[0], fill=True, color="lightsteelblue", label="real")
        axis.stairs(share[1], color="firebrick", label="synthetic")
        if shown.max() > 50 * (shown.min() if name in discrete else np.median(shown)):
            axis.set_yscale("log")  # or the rare ones would not be seen
            axis.set_ylim(bottom=shown.min() / 2)
        ticks = {i + 0.5: text for i, text in enumerate(labels) if text}
        turn = 90 if name in discrete else 0
        axis.set_xticks([*ticks], [*ticks.values()], rotation=turn, fontsize=6, parse_math=False)
        axis.tick_params(axis="y", labelsize=6)
        axis.set_title(f"{label(name)}: {scores[name]:.3f}", fontsize=9, parse_math=False)
    title = "share of rows; in each title the score of the column's shape"
    if len(names) < len(real):
        title = f"the {len(names)} columns of {len(real)} that are least alike: {title}"
    figure.suptitle(title, fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def save_pairs(path, real, synthetic, discrete):
    """Associations of columns (WIDEST at most): real, synthetic, and the difference."""
    from matplotlib.figure import Figure

    columns, real = len(real), some_columns(real)
    a, b = (associations({n: table[n] for n in real}, discrete) for table in (real, synthetic))
    figure = Figure(figsize=(14, 5), layout="constrained")
    axes, names = figure.subplots(1, 3), [label(name) for name in real]
    note = f" ({len(names)} of {columns} columns)" if len(names) < columns else ""
    titles = f"real{note}", "synthetic", f"difference, mean {abs(a - b).mean():.3f}"
    for axis, matrix, title in zip(axes, (a, b, abs(a - b)), titles):
        picture = axis.imshow(matrix, vmin=0, vmax=1, cmap="magma")
        axis.set_title(title)
        for set_ticks, turn in ((axis.set_xticks, 90), (axis.set_yticks, 0)):
            set_ticks(range(len(names)), names, rotation=turn, fontsize=6, parse_math=False)
    figure.colorbar(picture, ax=axes, label="|Pearson's r|, Cramér's V or correlation ratio")
    figure.savefig(path, dpi=120)


def save_points(path, real, synthetic):
    """A table's first two columns of numbers (float64), real beside synthetic."""
    from matplotlib.figure import Figure

    x, y = [name for name, column in real.items() if column.dtype.kind == "f"][:2]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, table, title in zip(axes, (real, synthetic), ("real", "synthetic")):
        axis.scatter(table[x], table[y], s=1, alpha=0.3, color="black", linewidths=0)
        axis.set(title=title, box_aspect=1)
        axis.set_xlabel(label(x), parse_math=False)
        axis.set_ylabel(label(y), parse_math=False)
    figure.savefig(path, dpi=120)


# ================================================================== plumbing
# --- shared: arguments ---
class UsageError(ValueError):
    """A mistake of the user's: main ends with its message and exit code 2, without a traceback."""


def at_least(low, kind=int, high=1e9):
    """An argparse type: a number from low to high."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:  # nan is not
            raise argparse.ArgumentTypeError(f"{text[:40]} is not in [{low:g}, {high:g}]")
        return value

    return number


def run_arguments(description):
    """A parser with the flags that every script has."""
    parser = argparse.ArgumentParser(SCRIPT, description=description)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add("--epochs", type=at_least(1), help="passes over the data; None: what suits them")
    add("--batch-size", type=at_least(1), help="over all processes; None: what suits the data")
    add("--max-steps", type=at_least(1), help="end the run after so many updates")
    add("--log-every", type=at_least(1), default=100, help="updates a row of metrics.csv")
    add("--seed", type=at_least(0), default=0, help="of weights, noise and the order of the data")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="bf16: autocast")
    add("--no-graph", action="store_true", help="on CUDA, launch each operation by itself")
    add("--kernels", choices=("auto", "fused", "reference"), default="auto", help="gan_kernels")
    add("--out", help="the run's folder; or --generate's file")
    add("--resume", type=os.path.normpath, metavar="CHECKPOINT", help="go on with its run")
    add("--generate", metavar="CHECKPOINT", help="draw from its generator, train nothing")
    return parser


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
# --- end shared ---


# --- shared: run ---
def train(args, state=None):
    """Trains to the end, from the start or from a checkpoint's state, and leaves a run's folder."""
    device = choose_device(args.device)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", None, timedelta(1))
    if RANK > 0:
        dist.barrier()  # the first process downloads, in a day at most
    data = load_data(args, device)
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    args.out = args.out or f"runs/{SCRIPT}-{data.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    suit(args, data)
    torch.manual_seed(args.seed)  # the same weights in every process
    model, folder, n = Model(args, data), Path(args.out), len(data.train)
    least = WORLD * (1 + any("BatchNorm" in type(m).__name__ for m in model.modules()))
    if (use := model.samples_per_step) > n or args.batch_size % WORLD or args.batch_size < least:
        raise UsageError(f"--batch-size {args.batch_size}: {use} of {n} samples, {WORLD} processes")
    facts = {"about": data[1], "shape": [*data.train.shape]}  # of images data[1] are the classes
    run = (state or {"rows": []}) | {"script": SCRIPT, "config": vars(args), "data": facts}
    if state is not None:
        if state["data"] != facts:
            raise UsageError(f"{data.name} {facts['shape']}: these are not the run's data")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(model.optimizers, state["optimizers"]):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": saved})
    if RANK > 0:
        return run_updates(args, model, data, run)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock", blocking=False):
        if state is None and (folder / "checkpoint.pt").exists():
            raise UsageError(f"--out {folder} holds a run; choose another, or --resume that one")
        write_file(folder / "config.json", json.dumps(vars(args), indent=2).encode())
        print(f"{SCRIPT}: {data.name}, {n:,} samples, {device}, {folder}")
        run_updates(args, model, data, run)
        summary = vars(args) | {"script": SCRIPT, "device": device.type, "kernels": model.kernels}
        summary |= run["rows"][-1] | finish(model.eval(), data, folder, run["rows"])
        write_file(folder / "summary.json", json.dumps(summary, indent=2).encode())


def run_updates(args, model, data, state):
    """Adds rows of losses to the state; a stage ends with figures, samples and a checkpoint."""
    device, folder, rows = data.train.device, Path(args.out), state["rows"]
    size, epoch_steps = model.samples_per_step, len(data.train) // model.samples_per_step
    stage = epoch_steps * math.ceil(100 / epoch_steps)  # whole epochs, of 100 updates or more
    total = min(args.epochs * epoch_steps, args.max_steps or math.inf)
    done, seconds = (rows[-1]["step"], rows[-1]["seconds"]) if rows else (0, 0)
    hidden = None if sys.stderr and RANK == 0 else True  # None: where it is no terminal
    bar = tqdm(range(done + 1, total + 1), None, total, initial=done, disable=hidden)
    noise = torch.cuda if device.type == "cuda" else torch.default_generator
    update, losses, started = stepper(args, model, device), [], time.perf_counter() - seconds
    for step in bar:
        epoch, at = divmod(step - 1, epoch_steps)
        if at == 0 or step == done + 1:  # order and noise follow from the place in the run
            shuffle = torch.Generator().manual_seed(hash((args.seed, epoch)))
            order = torch.randperm(len(data.train), generator=shuffle).to(device).split(size)
        noise.manual_seed(hash((args.seed, step, RANK)))
        named = update(*model.batch(data, order[at][RANK::WORLD]))
        losses.append(torch.stack([*named.values()]))
        measuring = step == total or step % stage % 1000 == 0
        if not measuring and step % args.log_every:
            continue
        average([means := torch.stack(losses).mean(dim=0)])
        losses.clear()
        if not (means.sum() + nn.utils.get_total_norm(model.parameters())).isfinite():
            raise FloatingPointError(f"nan by update {step}; lower the learning rates")
        row = {"step": step, "epoch": epoch + 1, "seconds": time.perf_counter() - started}
        rows.append(row | dict(zip(named, means.tolist())))
        if RANK > 0:
            continue
        rows[-1] |= evaluate(model.eval(), data) if measuring else {}
        names = dict.fromkeys(name for row in rows for name in row)
        table = [names, *([row.get(name, "") for name in names] for row in rows), []]
        write_file(folder / "metrics.csv", "\n".join(",".join(map(str, x)) for x in table).encode())
        if measuring:  # the checkpoint last: what is missing after a kill is made again
            save_samples(model, folder / "samples" / f"{step:07d}")
            state["model"] = model.train().state_dict()
            state["optimizers"] = [x.state_dict()["state"] for x in model.optimizers]
            torch.save(state, buffer := io.BytesIO())
            write_file(folder / "checkpoint.pt", buffer.getbuffer())
        if sys.stdout and (measuring or bar.disable):
            bar.write("  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()))


def stepper(args, model, device):
    """train_step of a batch alone, without autocast's cache; on CUDA a graph, which is replayed."""
    tf32, bf16 = args.precision == "tf32", args.precision == "bf16"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    cast, warm, kept = torch.autocast(device.type, torch.bfloat16, bf16, False), iter(range(3)), []
    step = cast(lambda *batch: {k: v.detach() for k, v in train_step(model, *batch).items()})
    for x in model.optimizers:
        x.register_step_pre_hook(lambda x, *_: average(p.grad for p in x.param_groups[0]["params"]))

    def replay(*batch):
        if next(warm, None) is not None:  # what is set up once must be there before the capture
            return step(*batch)
        if not kept:
            kept.extend([[x.clone() for x in batch], torch.cuda.CUDAGraph()])
            with torch.cuda.graph(kept[1]):
                kept.append(step(*kept[0]))
        for static, new in zip(kept[0], batch):
            static.copy_(new)
        kept[1].replay()
        return kept[2]

    return step if device.type == "cpu" or args.no_graph else replay


def average(tensors):
    """Replaces each tensor by its mean over the processes."""
    for tensor in tensors if WORLD > 1 else ():
        dist.all_reduce(tensor)
        tensor /= WORLD


def load_checkpoint(path):
    """A checkpoint of this script, on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["script"] != SCRIPT or vars(arguments().parse_args([])).keys() - state["config"]:
            raise ValueError(f"it is of {state['script']}, or of another version")
        return {name: state[name] for name in ("config", "data", "rows", "model", "optimizers")}
    except Exception as error:  # a damaged file raises many kinds
        raise UsageError(f"{path} is no whole checkpoint of {SCRIPT}: {error!s:.99}") from error


def write_file(path, content):
    """Writes bytes under a temporary name and renames it: the file is the old or the new, whole."""
    part = path.with_name(f"{path.name}.tmp")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # there was no room for all of it


def choose_device(name):
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: PyTorch finds no GPU for process {local} here")
    torch.cuda.set_device(local)
    torch.cuda.set_stream(torch.cuda.Stream())  # the default stream can not be captured
    return torch.device("cuda", local)


def main(argv=None):
    """Runs the script; a mistake of the user's ends in a message on stderr and exit code 2."""
    parser, threads, timeout = arguments(), torch.get_num_threads(), socket.getdefaulttimeout()
    args, state = parser.parse_args(argv), None
    try:
        if args.generate:
            return generate(args)
        if args.resume:
            state, folder = load_checkpoint(args.resume), Path(args.resume).parent
            kept = state["config"] | {"out": str(folder), "resume": str(folder / "checkpoint.pt")}
            args = parser.parse_args(argv, argparse.Namespace(**kept))
            free = ("epochs", "max_steps", "log_every", "device", "data", "lr")  # data_dir, too
            for name in sorted(kept):
                if not name.startswith(free) and getattr(args, name) != kept[name]:
                    raise UsageError(f"--{name.replace('_', '-')}: the run has {kept[name]}")
        train(args, state)
        if WORLD > 1:  # after an error it would wait for the others
            dist.destroy_process_group()
    except (FloatingPointError, KeyboardInterrupt) as stop:
        last = Path(f"{args.out}/checkpoint.pt")
        way = f"go on by --resume {last}" if last.exists() else "no checkpoint was written"
        parser.exit(2 if stop.args else 130, f"{SCRIPT}: error: {str(stop) or 'stopped'}; {way}\n")
    except Timeout:
        parser.exit(2, f"{SCRIPT}: error: another process is at the run {args.out}; stop it\n")
    except (UsageError, OSError, RuntimeError, MemoryError) as error:
        advice = "; smaller --batch-size or networks need less" * ("allocate" in str(error))
        if isinstance(error, RuntimeError) and not advice and "state_dict" not in str(error):
            raise
        parser.exit(2, f"{SCRIPT}: error: {error}{advice}\n")
    finally:  # a notebook goes on
        torch.set_num_threads(threads)
        socket.setdefaulttimeout(timeout)


# --- end shared ---


if __name__ == "__main__":  # what is the process's, and not to be changed under a notebook
    os.environ["MPLBACKEND"] = "agg"  # a notebook asks for its own, which may be missing here
    for stream in (sys.stdout, sys.stderr):  # there may be none, or one of few letters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    main()
