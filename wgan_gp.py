# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.10", "torchvision", "numpy", "tqdm", "matplotlib", "scikit-learn"]
# ///
"""WGAN-GP: improved training of Wasserstein GANs.

Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville 2017, https://arxiv.org/abs/1704.00028

    python wgan_gp.py                         # MNIST, or scikit-learn's digits if out of reach
    python wgan_gp.py --dataset 8gaussians    # figure 1's sets: also 25gaussians, swissroll
    python wgan_gp.py --dataset 8gaussians --clip 0.01    # the original WGAN, beside it
    python wgan_gp.py --dataset folder --data-dir faces --image-size 64
    python wgan_gp.py --dataset cifar10 --network resnet
    python wgan_gp.py --generate runs/.../checkpoint.pt --out grid.png

A critic D scores real samples x above generated ones G(z), with a slope of at most 1; the largest
difference of the mean scores is then the Wasserstein distance of the two distributions, which G
makes small. The slope is held by a penalty on straight lines between the two (equation 3):

    L = E[D(G(z))] - E[D(x)] + lambda E[(|grad D(x^)|_2 - 1)^2]
    x^ = e x + (1 - e) G(z), e ~ U[0, 1]

Algorithm 1: n_critic = 5 times draw x, z and e, one e a sample, and step D's Adam on L; then draw z
and step G's Adam on -E[D(G(z))]; lambda = 10, Adam(1e-4, 0, 0.9), no batch norm in D.

The script measures the claims: the negative critic loss E[D(x)] - E[D(G(z))] on training and on
held-out data over time (figure 5b: where they part, the critic overfits), the gradient norms at x^,
and on the sets of points the critic's level sets (figure 1) and the share of modes found. --clip is
the WGAN of Arjovsky et al. 2017 (arXiv 1701.07875): RMSProp, and weights clipped instead of the
penalty. What the paper leaves open is as in the authors' code (igul222/improved_wgan_training);
networks and settings follow from the data, and every one has its flag. Departures:

- The fake samples of five critic updates come from one pass of G, which does not change in between.
  Where G has batch norm, its statistics are those of the five batches together.
- Networks for points are narrower and learn faster, at a rate that falls to 0, so that minutes on
  two cores do: 3,900 updates for 8gaussians. The authors' 100,000 updates are --dim 512 --lr 1e-4
  --decay-steps 0 --epochs 513. Lambda 0.1 and beta1 0.5 are those of their code for points, where
  the paper has 10 and 0. For its figure 1 the paper holds G fixed at data plus noise; here G is
  trained, as in their code, and the share of modes found is our measure.
- beta1 is the paper's 0 for images; the authors' code for MNIST has 0.5.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import functools
import importlib
import importlib.util
import io
import json
import math
import os
import signal
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from sklearn.datasets import load_digits, make_swiss_roll
from torch import nn
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import save_image
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SCRIPT = "wgan_gp"
LOSSES = ("loss_critic", "loss_generator", "penalty")  # what train_step returns
# what evaluate adds to the rows of metrics.csv
MEASURED = ("wasserstein_train", "wasserstein_heldout", "gradient_norm")
SETS = {  # data sets of this script's own
    "8gaussians": lambda: gaussians("8gaussians", 250_000),
    "25gaussians": lambda: gaussians("25gaussians", 640_000),
    "swissroll": lambda: swiss_roll(200_000),
}

# What a flag that is left out means, by the kind of data; "all" where the kind says nothing.
SETTINGS = {
    "all": {"lr": 1e-4, "betas": [0.0, 0.9], "gp_weight": 10.0, "noise": 128, "dim": 64,
            "batch_size": 64, "epochs": 50, "decay_steps": 0},
    "points": {"lr": 2e-3, "betas": [0.5, 0.9], "gp_weight": 0.1, "noise": 2, "dim": 128,
               "batch_size": 256, "epochs": 20, "decay_steps": None},
    "28": {"batch_size": 50},
    "32": {"dim": 128},
    "64": {},
    "resnet": {"lr": 2e-4, "decay_steps": 100_000},
    "clip": {"lr": 5e-5, "decay_steps": 0},
}  # fmt: skip


def arguments():
    """The paper's settings as flags, beside those that every script has."""
    parser = run_arguments("WGAN-GP (Gulrajani et al. 2017).", image_sizes=(28, 32, 64))
    parser.set_defaults(epochs=None, batch_size=None)
    add = parser.add_argument_group("WGAN-GP; (*): set by the data").add_argument
    add("--network", choices=("auto", "resnet"), default="auto", help="resnet: 32x32 alone")
    add("--noise", type=at_least(1, high=10**4), help="number of noise values (*)")
    add("--dim", type=at_least(1, high=1024), help="width of the networks (*)")
    add("--critic-norm", choices=("none", "layer"), default="none", help="(none)")
    add("--n-critic", type=at_least(1), default=5, help="critic updates to one of G (5)")
    add("--gp-weight", type=at_least(0, float), help="lambda (10; points 0.1)")
    add("--clip", type=at_least(1e-9, float), metavar="C", help="the original WGAN: weights to +-C")
    add("--lr", type=at_least(0, float), help="learning rate of both networks (*)")
    add("--betas", type=at_least(0, float, 0.9999), nargs=2, help="of Adam (0 0.9; points 0.5 0.9)")
    decay = "updates of G over which the learning rate falls to 0; 0: constant (*)"
    add("--decay-steps", type=at_least(0), help=decay)
    return parser


# ------------------------------------------------------------------ networks
class Flatten(nn.Module):
    """Flattens by row, column, channel: the order of channels-last memory, so nothing moves."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1)


class Unflatten(nn.Module):
    """The inverse of Flatten, to maps of size x size."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x.view(len(x), self.size, self.size, -1).permute(0, 3, 1, 2)


class LayerNorm(nn.Module):
    """Over all of a sample, with one gain and bias a channel; unlike batch norm it leaves each
    sample's score, and so the penalty, its own (section 4, "No critic batch normalization")."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        x = x.movedim(1, -1)
        return (F.layer_norm(x, x.shape[1:]) * self.weight + self.bias).movedim(-1, 1)


def down(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 5, stride=2, padding=2)


def up(inputs, outputs, extra=1):
    return nn.ConvTranspose2d(inputs, outputs, 5, stride=2, padding=2, output_padding=extra)


class Residual(nn.Module):
    """A block of the paper's CIFAR networks: resample is "up", "down", "first" or None.

    "first" is the critic's first block: down, without the leading relu and without norms.
    """

    def __init__(self, inputs, outputs, resample, norm):
        super().__init__()
        conv = functools.partial(nn.Conv2d, padding=1, kernel_size=3)
        double = [nn.Upsample(scale_factor=2)] if resample == "up" else []
        halve = [nn.AvgPool2d(2)] if resample in ("down", "first") else []
        if resample == "first":
            start = middle = []
        else:
            start, middle = [norm(inputs), nn.ReLU(), *double], [norm(outputs)]
        body = [*start, conv(inputs, outputs), *middle, nn.ReLU(), conv(outputs, outputs), *halve]
        # 1x1: on the smaller maps it is the same as on the larger, and cheaper
        shortcut = [*halve, nn.Conv2d(inputs, outputs, 1), *double] if resample else []
        self.body, self.shortcut = nn.Sequential(*body), nn.Sequential(*shortcut)

    def forward(self, x):
        return self.shortcut(x) + self.body(x)


class Generator(nn.Module):
    """G(z): points, or images between `low` and 1, for samples of the given shape."""

    def __init__(self, args, shape):
        super().__init__()
        self.noise, d, size = args.noise, args.dim, shape[-1]
        self.low = {2: None, 28: 0.0}.get(size, -1.0)
        if len(shape) == 1:
            layers = mlp(self.noise, d, size)
        elif args.network == "resnet":
            layers = [
                nn.Linear(self.noise, 16 * d), Unflatten(4),
                *[Residual(d, d, "up", nn.BatchNorm2d) for _ in range(3)],
                nn.BatchNorm2d(d), nn.ReLU(inplace=True),
                nn.Conv2d(d, shape[0], 3, padding=1), nn.Tanh(),
            ]  # fmt: skip
        elif size == 28:
            layers = [
                nn.Linear(self.noise, 64 * d), nn.ReLU(inplace=True), Unflatten(4),
                up(4 * d, 2 * d, extra=0), nn.ReLU(inplace=True),  # 4 to 7, a quarter of 28
                up(2 * d, d), nn.ReLU(inplace=True),
                up(d, shape[0]), nn.Sigmoid(),
            ]  # fmt: skip
        else:
            c = d * size // 8
            layers = [nn.Linear(self.noise, 16 * c), nn.BatchNorm1d(16 * c)]
            layers += [nn.ReLU(inplace=True), Unflatten(4)]
            while c > d:
                layers += [up(c, c // 2), nn.BatchNorm2d(c // 2), nn.ReLU(inplace=True)]
                c //= 2
            layers += [up(d, shape[0]), nn.Tanh()]
        self.layers = initialise(layers, points=len(shape) == 1)

    def forward(self, noise):
        return self.layers(noise)


class Critic(nn.Module):
    """D(x): one score (batch,) for each sample, without bounds and without batch norm."""

    def __init__(self, args, shape):
        super().__init__()
        d, size = args.dim, shape[-1]
        norm = LayerNorm if args.critic_norm == "layer" else nn.Identity
        if len(shape) == 1:
            layers = mlp(size, d, 1, norm)
        elif args.network == "resnet":
            blocks = [Residual(d, d, resample, norm) for resample in ("down", None, None)]
            layers = [Residual(shape[0], d, "first", norm), *blocks, nn.ReLU()]
            layers += [nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(d, 1)]
        else:
            layers, c = [down(shape[0], d), nn.LeakyReLU(0.2, inplace=True)], d
            for _ in range(3 if size == 64 else 2):
                layers += [down(c, 2 * c), norm(2 * c), nn.LeakyReLU(0.2, inplace=True)]
                c *= 2
            layers += [Flatten(), nn.Linear(16 * c, 1)]
        self.layers = initialise(layers, points=len(shape) == 1)

    def forward(self, x):
        return self.layers(x).squeeze(1)


def mlp(inputs, dim, outputs, norm=nn.Identity):
    """The authors' networks for points: three layers of relu units, and a linear one."""
    layers = []
    for size in (inputs, dim, dim):
        layers += [nn.Linear(size, dim), norm(dim), nn.ReLU(inplace=True)]
    return [*layers, nn.Linear(dim, outputs)]


def initialise(layers, points=False):
    """One network of the layers, with the authors' initial weights: uniform, biases zero.

    Their variance is 4 / (fan in + fan out) for convolutions, He's 2 / fan in for points, Glorot's
    2 / (fan in + fan out) for the other linear layers. The authors have smaller weights in the
    shortcuts and last layers of their residual networks and networks for points.
    """
    network = nn.Sequential(*layers)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            a, b, *kernel = module.weight.shape
            variance = 4 / ((a / math.prod(module.stride) + b) * math.prod(kernel))
        elif isinstance(module, nn.Linear):
            fans = 0 if points else module.out_features
            variance = 2 / (module.in_features + fans)
        else:
            continue
        bound = math.sqrt(3 * variance)
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.zeros_(module.bias)
    return network


# ------------------------------------------------------------------ penalty and training step
def gradient_norms(critic, x, create_graph=False):
    """|d critic(x) / dx|_2 of each sample, (batch,)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=create_graph)
    squares = gradient.square().flatten(1).sum(dim=1)
    # the root's own derivative is infinite at zero, so it never sees a zero
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1).sqrt(), 0)


def gradient_penalty_reference(critic, x, target=1.0):
    """Mean over the batch of (|d critic(x) / dx|_2 - target)^2, differentiable in the critic.

    A sample without gradient adds target^2 and gives none. gan_kernels has it without wasted work.
    """
    return (gradient_norms(critic, x, create_graph=True) - target).square().mean()


class Model:
    """Both networks, their optimisers and schedules; `parts` is what a checkpoint keeps."""

    def __init__(self, args, data, device):
        shape = list(data.train.shape[1:])
        fill_in(args, shape)
        self.args, self.name, self.real = args, data.name, data.train[:1000]
        self.images_per_step = args.n_critic * args.batch_size
        self.decay_steps = args.decay_steps
        if self.decay_steps is None:  # points: over the whole run, also where it is extended
            self.decay_steps = args.epochs * (len(data.train) // self.images_per_step)
        self.generator, self.critic = Generator(args, shape), Critic(args, shape)
        for network in (self.generator, self.critic):
            network.to(device, memory_format=torch.channels_last)
        self.optimizer_g = make_optimizer(self.generator, args)
        self.optimizer_c = make_optimizer(self.critic, args)
        names = ("generator", "critic", "optimizer_g", "optimizer_c")
        self.parts = {name: getattr(self, name) for name in names}
        self.gradient_penalty, self.kernels = choose_kernel(
            args.kernels, "gradient_penalty", gradient_penalty_reference, device
        )


def make_optimizer(network, args):
    """Algorithm 1's Adam, or the RMSProp of the original WGAN.

    Its learning rate is a tensor, so that a captured CUDA graph sees it fall.
    """
    first = next(network.parameters())
    lr, on_cuda = torch.tensor(args.lr, device=first.device), first.is_cuda
    if args.clip is None:
        adam = {"betas": tuple(args.betas), "fused": True, "capturable": on_cuda}
        return torch.optim.Adam(network.parameters(), lr, **adam)
    tensorflow = {"alpha": 0.9, "eps": 1e-10}  # the constants that the authors used
    return torch.optim.RMSprop(network.parameters(), lr, capturable=on_cuda, **tensorflow)


def decay_rates(model):
    """Lets both learning rates fall linearly, to 0 after decay_steps updates of G."""
    args, optimizer = model.args, model.optimizer_g
    if model.decay_steps:
        step = optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]
        lr = args.lr * (1 - step / model.decay_steps).clamp_min(0)
        for optimizer in (model.optimizer_g, model.optimizer_c):
            optimizer.param_groups[0]["lr"].copy_(lr)


def fill_in(args, shape):
    """Gives the flags that were left out their SETTINGS."""
    if args.network == "resnet" and shape[-1] != 32:
        raise UsageError("--network resnet is for images of 32x32; leave the flag out")
    settings = SETTINGS["all"] | SETTINGS["points" if len(shape) == 1 else str(shape[-1])]
    for kind, chosen in (("resnet", args.network == "resnet"), ("clip", args.clip is not None)):
        settings |= SETTINGS[kind] if chosen else {}
    for name, value in settings.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def train_step(model, data, index):
    """n_critic updates of D on the samples data.train[index], then one of G; never synchronises.

    Returns the LOSSES as one tensor: L and the penalty averaged over the updates of D.
    """
    g, critic, args, size = model.generator, model.critic, model.args, model.args.batch_size
    # (n_critic, batch): each process has its share of every update's batch
    index = mine(index.view(args.n_critic, -1), dim=1)
    real = scale(data.train[index.flatten()], g.low)
    if args.network == "resnet":
        noise = torch.rand(args.n_critic, size, *real.shape[1:], device=real.device)
        real = dequantise(real, mine(noise, dim=1).flatten(0, 1))
    with torch.no_grad():
        noise = torch.randn(args.n_critic, size, g.noise, device=real.device)
        fake = g(mine(noise, dim=1).flatten(0, 1)).to(real.dtype)
    losses = []
    for x, y in zip(real.chunk(args.n_critic), fake.chunk(args.n_critic)):
        score_real, score_fake = critic(torch.cat([x, y])).chunk(2)
        loss = score_fake.mean() - score_real.mean()
        penalty = torch.zeros_like(loss)
        if args.clip is None:
            epsilon = mine(torch.rand(size, *[1] * (x.ndim - 1), device=x.device))
            penalty = model.gradient_penalty(critic, torch.lerp(y, x, epsilon))
            loss = loss + args.gp_weight * penalty
        model.optimizer_c.zero_grad()
        loss.backward()
        update(model.optimizer_c)
        if args.clip is not None:
            with torch.no_grad():
                for p in critic.parameters():
                    p.clamp_(-args.clip, args.clip)
        losses.append(torch.stack([loss, penalty]).detach())

    # the authors' residual networks draw twice the batch for G
    n = size * 2 if args.network == "resnet" else size
    loss_g = -critic(g(mine(torch.randn(n, g.noise, device=real.device)))).mean()
    model.optimizer_g.zero_grad()
    loss_g.backward(inputs=list(g.parameters()))  # no gradient for D's weights
    update(model.optimizer_g)
    decay_rates(model)
    loss_c, penalty = torch.stack(losses).mean(dim=0)
    return torch.stack([loss_c, loss_g.detach(), penalty])


def scale(data, low):
    """uint8 images as float32 in (low, 1), in channels-last memory; points as they are."""
    if data.dtype != torch.uint8:
        return data
    return data.contiguous(memory_format=torch.channels_last).float() * ((1 - low) / 255) + low


def dequantise(images, noise):
    """Spreads each of 256 grey values over its own part of (-1, 1); noise is uniform in (0, 1)."""
    return (images + 1) * (255 / 256) - 1 + noise / 128


# ------------------------------------------------------------------ sets of points (figure 1)
def modes(name):
    """Centres (modes, 2) and standard deviation of a mixture of Gaussians, None of another set."""
    if name == "8gaussians":
        angle = torch.arange(8) * math.pi / 4
        return 2 * torch.stack([angle.cos(), angle.sin()], dim=1) / 1.414, 0.02 / 1.414
    if name == "25gaussians":
        at = torch.arange(-4.0, 5, 2)
        return torch.cartesian_prod(at, at) / 2.828, 0.05 / 2.828
    return None


def gaussians(name, n):
    """n points of a mixture to train on and 10,000 held out; a point's label is its mode."""
    (centres, sigma), rng = modes(name), torch.Generator().manual_seed(0)
    labels = torch.randint(len(centres), (n + 10_000,), generator=rng)
    points = centres[labels] + sigma * torch.randn(len(labels), 2, generator=rng)
    return [str(i) for i in range(len(centres))], points[:n], labels[:n], points[n:], labels[n:]


def swiss_roll(n):
    """n points of scikit-learn's roll, seen from its end, to train on and 10,000 held out."""
    roll = make_swiss_roll(n + 10_000, noise=0.25, random_state=0)[0][:, [0, 2]] / 7.5
    points, labels = torch.tensor(roll).float(), torch.zeros(len(roll), dtype=torch.int64)
    return ["roll"], points[:n], labels[:n], points[n:], labels[n:]


# ------------------------------------------------------------------ sampling
@torch.no_grad()
def sample(generator, n, seed=0):
    """n images (n, channels, size, size) in [0, 1] or points (n, 2); the generator in eval mode."""
    samples = draw(generator, n, seed)
    return samples if samples.ndim == 2 else (samples - generator.low) / (1 - generator.low)


def draw(generator, n, seed):
    """n samples in the generator's own range."""
    device, rng = device_and_rng(generator, seed)
    noise = torch.randn(n, generator.noise, device=device, generator=rng)
    return torch.cat([generator(part) for part in noise.split(500)])


def device_and_rng(network, seed):
    """The network's device and a random stream there that leaves the training's own alone."""
    device = next(network.parameters()).device
    return device, torch.Generator(device).manual_seed(seed)


def load_generator(path, device="cpu"):
    """The trained generator of a checkpoint, for `sample(load_generator(path), 64)`."""
    state = load_checkpoint(path)
    generator = Generator(argparse.Namespace(**state["config"]), state["shape"])
    load_parts({"generator": generator}, state, path)
    return generator.eval().requires_grad_(False).to(device)


def generate(args, path):
    """--generate: a grid of a hundred images, or a thousand points."""
    save_picture(load_generator(args.generate, choose_device(args.device)), path, args.seed)


def save_picture(generator, path, seed=0, critic=None, real=None):
    """A hundred images; or a thousand points with the critic's level sets and data (figure 1)."""
    samples = sample(generator, 1000 if generator.low is None else 100, seed)
    if samples.ndim > 2:
        save_image(samples, path, nrow=10)
        return
    figure = Figure(figsize=(6, 6), layout="constrained")
    axis = figure.add_subplot(aspect="equal")
    if critic is not None:
        at = torch.linspace(-2.2, 2.2, 128)
        grid = torch.cartesian_prod(at, at).to(real.device)
        with torch.no_grad():
            level = critic(grid).view(128, 128).T.cpu().numpy()
        axis.contour(at, at, level, 20, linewidths=0.8)
    axis.plot(*samples.T.cpu().numpy(), "+", color="green", markersize=4, label="generated")
    if real is not None:
        axis.plot(*real.T.cpu().numpy(), ".", color="orange", markersize=2, label="data")
    axis.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2))
    axis.legend(loc="upper right")
    figure.savefig(path, dpi=100)


def save_samples(model, path):
    """A picture of fixed noise; of points with the critic's level sets."""
    save_picture(model.generator, path, critic=model.critic, real=model.real)


def save_curves(path, rows):
    """Figure 5b: the negative critic loss on training and on held-out data; the gradient norms."""
    rows = [row for row in rows if row["wasserstein_train"] is not None]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in rows]
    for name, label in (("wasserstein_train", "training"), ("wasserstein_heldout", "held out")):
        left.plot(steps, [row[name] for row in rows], label=label)
    right.plot(steps, [row["gradient_norm"] for row in rows], label="mean gradient norm")
    right.axhline(1, color="grey", linestyle="--")
    left.set_ylabel("negative critic loss")
    for axis in (left, right):
        axis.set_xlabel("update of G")
        axis.legend()
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------ evaluation
@torch.no_grad()
def evaluate(model, data):
    """The negative critic loss on training and on held-out data, and the gradient norm between.

    Of 2,000 images or 10,000 points each, at equal intervals in the set, against as many generated.
    """
    critic, low = model.critic, model.generator.low
    device, rng = device_and_rng(critic, 3)
    n = min(10_000 if low is None else 2000, len(data.test), len(data.train))
    at = torch.arange(n, device=device)
    real = [scale(images[at * len(images) // n], low) for images in (data.train, data.test)]
    if model.args.network == "resnet":
        real = [dequantise(x, torch.rand(x.shape, device=device, generator=rng)) for x in real]
    fake = draw(model.generator, n, seed=2)
    train, test, generated = (
        torch.cat([critic(part) for part in x.split(500)]).mean() for x in (*real, fake)
    )
    epsilon = torch.rand(n, *[1] * (fake.ndim - 1), device=device, generator=rng)
    between = torch.lerp(fake, real[0], epsilon).split(500)
    norm = torch.cat([gradient_norms(critic, part) for part in between]).mean()
    values = torch.stack([train - generated, test - generated, norm]).tolist()
    return dict(zip(MEASURED, values))


def mode_figures(samples, centres, sigma):
    """How many modes are covered, and the share of samples within three deviations of a mode.

    A mode is covered if it has, within three deviations, a tenth of its equal share of all samples.
    """
    exact = "donot_use_mm_for_euclid_dist"  # matrix products in TF32 err by as much as sigma
    distance, nearest = torch.cdist(samples, centres.to(samples), compute_mode=exact).min(dim=1)
    good = nearest[distance <= 3 * sigma]
    counts = torch.bincount(good, minlength=len(centres))
    return {
        "modes_covered": int((counts >= 0.1 * len(samples) / len(centres)).sum()),
        "modes_total": len(centres),
        "share_within_3_sigma": len(good) / len(samples),
    }


def finish(model, folder, rows):
    """The pictures of a finished run, and what its summary.json has beside the measurements."""
    save_curves(folder / "curves.png", rows)
    last = rows[-1]
    figures = {"gradient_norm_mean": last["gradient_norm"], "generator_updates": last["step"]}
    if model.real.ndim == 2:
        save_samples(model, folder / "levels.png")
    if mixture := modes(model.name):
        figures |= mode_figures(sample(model.generator, 10_000), *mixture)
    return figures


# ================================================================== plumbing
# --- shared: arguments ---
class UsageError(ValueError):
    """A mistake of the user's: main ends with it in one line, and with exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def at_least(low, kind=int, high=1e9):
    """An argparse type: a number from low to high."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:  # nan is not
            raise argparse.ArgumentTypeError(f"{text[:40]} is not in [{low:g}, {high:g}]")
        return value

    convert.__name__ = kind.__name__
    return convert


def run_arguments(description, image_sizes=(28, 32)):
    """A parser with the flags that every script has."""
    parser = Parser(prog=SCRIPT, description=description)
    add = parser.add_argument
    names = ("auto", *TORCHVISION_SETS, "digits", "folder", *SETS)
    add("--dataset", choices=names, default="auto", help="auto: MNIST, or else digits")
    add("--data-dir", default="data", help="where data sets are kept; for folder: the images")
    add("--image-size", type=int, choices=image_sizes, help="for --dataset folder (32)")
    add("--epochs", type=at_least(1), default=50, help="passes over the data (50, or what suits)")
    add("--batch-size", type=at_least(2), default=128, help="(128, or what suits)")
    add("--max-steps", type=at_least(1), metavar="N", help="end the run after N updates")
    add("--log-every", type=at_least(1), default=100, metavar="N", help="updates a log line (100)")
    add("--seed", type=at_least(0, high=2**32 - 1), default=0, help="(0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="(fp32)")
    add("--no-graph", action="store_true", help="on CUDA: no graph, each operation by itself")
    kernels = "gan_kernels or plain PyTorch (auto: gan_kernels if installed)"
    add("--kernels", choices=("auto", "fused", "reference"), default="auto", help=kernels)
    add("--out", help="the run's folder (runs/<script>-<dataset>-<time>), or --generate's picture")
    add("--resume", metavar="CHECKPOINT", help="go on with a run, in its own folder")
    add("--generate", metavar="CHECKPOINT", help="draw images from a trained generator")
    return parser


def read_arguments(parser, argv):
    """The arguments and, under --resume, the checkpoint, whose own arguments then hold."""
    if any("\0" in text for text in argv or ()):  # no file has such a name
        raise UsageError("an argument holds a null character; leave it out")
    args = parser.parse_args(argv)
    for name in ("category", "code", "label"):  # without it a training would begin
        if getattr(args, name, None) is not None and not args.generate:
            raise UsageError(f"--{name} is for --generate CHECKPOINT; give both or none")
    if args.resume is None:
        return args, None
    state, folder = load_checkpoint(args.resume), str(Path(args.resume).parent)
    if Path(args.resume).name != "checkpoint.pt":  # it would replace the folder's own
        problem = "a run goes on from a file called checkpoint.pt"
        raise UsageError(f"--resume {args.resume}: {problem}; copy it to a folder of its own")
    kept = state["config"] | {"out": folder, "resume": args.resume}
    args = parser.parse_args(argv, argparse.Namespace(**kept))
    for name in kept.keys() - {"epochs", "max_steps", "device"}:
        if (given := getattr(args, name)) != kept[name]:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {given}: the run has {kept[name]}; leave the flag out")
    return args, state


def picture_path(out):
    if Path(out or "grid.png").suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UsageError(f"--out {out}: a picture's name ends in .png or .jpg, like grid.png")
    return out or "grid.png"


def choose_device(name):
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and there == 0):
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= there:
        problem = f"a process needs a GPU of its own, and PyTorch finds {there} here"
        raise UsageError(f"--device {name}: {problem}; use --device cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def choose_kernel(choice, name, reference, device):
    """The operation `name` of gan_kernels, or its reference; and which: "fused" or "reference"."""
    try:
        if choice != "reference":
            kernels = importlib.import_module("gan_kernels")
            if device.type == "cuda" and not kernels.has_cuda:
                raise ImportError("it was built without CUDA")
            return getattr(kernels, name), "fused"
    except Exception as error:  # a broken extension raises anything, and must be said
        installed = importlib.util.find_spec("gan_kernels") is not None
        problem = f"can not be used ({one_line(error)})" if installed else "is not installed"
        if choice == "fused":
            raise UsageError(f"--kernels fused: gan_kernels {problem}") from error
        if installed:
            print(f"{SCRIPT}: gan_kernels {problem}; using plain PyTorch", file=sys.stderr)
    return reference, "reference"


# --- end shared ---


# --- shared: data ---
TORCHVISION_SETS = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "svhn": datasets.SVHN,
    "cifar10": datasets.CIFAR10,
}


@dataclass
class Data:
    """A set on the training device: uint8 images (n, channels, size, size) and int64 labels."""

    name: str
    classes: list[str]
    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor


class Unavailable(UsageError):
    """A data set that is not on disk and can not be downloaded."""


def load_data(args, device):
    """The data set that the arguments ask for, on the device."""
    name, folder = "mnist" if args.dataset == "auto" else args.dataset, Path(args.data_dir)
    loaders = {key: functools.partial(torchvision_set, key, folder) for key in TORCHVISION_SETS}
    loaders["folder"] = functools.partial(folder_set, folder, args.image_size or 32)
    loaders |= {"digits": digits_set, **SETS}
    try:
        classes, *tensors = loaders[name]()
    except Unavailable as problem:
        if args.dataset != "auto":
            raise
        print(f"{SCRIPT}: {problem}. Training on scikit-learn's digits instead; for MNIST, put its "
              f"files in {folder / 'MNIST/raw'} or run where it can be downloaded.")  # fmt: skip
        name, (classes, *tensors) = "digits", digits_set()
    if args.image_size not in (None, tensors[0].shape[-1]):
        raise UsageError(f"--image-size {args.image_size}: {name} has a size of its own")
    return Data(name, classes, *(tensor.to(device) for tensor in tensors))


def torchvision_set(name, folder):
    """One of torchvision's sets, downloaded where it is not there."""
    try:
        return read_torchvision(name, folder, download=False)
    except Exception as error:  # torchvision has no error of its own for a damaged file
        if "not found" not in str(error):
            problem = f"({one_line(error)}); delete the damaged files"
            raise UsageError(f"can not read {name} in {folder} {problem}") from error
    home = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (home.is_dir() and os.access(home, os.W_OK | os.X_OK)):
        raise UsageError(f"--data-dir {folder}: {name} is not there and {home} can not be written")
    try:
        reach_network(name)
        return read_torchvision(name, folder, download=True)
    except (OSError, RuntimeError) as error:
        problem = f"{name} is not in {folder} and can not be downloaded ({one_line(error)})"
        raise Unavailable(problem) from error


def read_torchvision(name, folder, download):
    """Classes, and images and labels of both parts."""
    key, *parts = ("split", "train", "test") if name == "svhn" else ("train", True, False)
    sets = [TORCHVISION_SETS[name](folder, download=download, **{key: part}) for part in parts]
    classes = getattr(sets[0], "classes", [str(digit) for digit in range(10)])  # SVHN has none
    tensors = []
    for part in sets:
        images = torch.as_tensor(part.data)
        images = images[:, None] if images.ndim == 3 else images
        images = images.permute(0, 3, 1, 2) if images.shape[-1] == 3 else images
        labels = torch.as_tensor(part.labels if name == "svhn" else part.targets).long()
        whole = 0 < len(images) == len(labels) and labels.max() < len(classes)
        if not whole or images.shape[1:] not in ((1, 28, 28), (3, 32, 32)):
            raise RuntimeError("images and labels do not fit")
        tensors += images.contiguous(), labels
    return classes, *tensors


def reach_network(name):
    """Raises OSError where the set can not be downloaded, within ten seconds."""
    kind = TORCHVISION_SETS[name]
    first = getattr(kind, "resources", [("",)])[0][0]
    urls = [mirror + first for mirror in getattr(kind, "mirrors", ())]
    urls = urls or [kind.split_list["train"][0] if name == "svhn" else kind.url]
    problems = ["no answer"]

    def ask():
        for url in urls:
            try:
                request = urllib.request.Request(url, method="HEAD")
                urllib.request.urlopen(request, timeout=4).close()
                problems.clear()
                return
            except Exception as error:  # every failure means the same here
                problems[0] = one_line(error)

    asking = threading.Thread(target=ask, daemon=True)  # a name server can hang without limit
    asking.start()
    asking.join(timeout=9)
    if problems:
        raise OSError(problems[0])


def digits_set():
    """scikit-learn's 1,797 real handwritten digits, enlarged from 8x8 to 28x28."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] * 255 / 16
    images = F.interpolate(images, size=28, mode="bicubic").round().clamp(0, 255).byte()
    return [str(digit) for digit in range(10)], *hold_out(images, torch.tensor(digits.target))


def folder_set(folder, size):
    """All images below a folder, cropped square and resized; its sub-folders are the classes."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if len(paths) < 3:
        raise UsageError(f"--data-dir {folder} must be a folder of images; it holds {len(paths)}")
    names = [p.relative_to(folder).parts[0] if p.parent != folder else "" for p in paths]
    images = []
    for path in tqdm(paths, desc="reading images", disable=None):
        try:
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16 bits, which convert would cut to white
                    image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
                image = ImageOps.fit(image.convert("L" if size == 28 else "RGB"), (size, size))
        except Exception as error:  # Pillow raises many kinds for a damaged file
            raise UsageError(f"can not read {path} ({one_line(error)}); delete it") from error
        images.append(torch.tensor(np.asarray(image)).view(size, size, -1).permute(2, 0, 1))
    classes, labels = np.unique(names, return_inverse=True)
    return classes.tolist(), *hold_out(torch.stack(images), torch.tensor(labels))


def hold_out(images, labels):
    """Training images and labels, test images and labels: every fifth image is held out."""
    test = torch.arange(len(images)) % 5 == 0
    return images[~test], labels[~test], images[test], labels[test]


# --- end shared ---


# --- shared: run ---
PROGRESS = ("step", "seconds", "rows", "losses")


class Run:
    """A run in progress: its model, its data, its folder and how far it has come."""

    def __init__(self, args, state=None):
        self.args, self.device = args, choose_device(args.device)
        self.rank, self.world = processes()
        keep_memory()
        turn = 0 if self.rank == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
        for now in range(3):  # rank 0 chooses the set, and of each machine one process downloads it
            if now == turn:
                self.data = load_data(args, self.device)
                args.dataset = self.data.name  # a run begun with "auto" is resumed on the same set
                moment = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
                args.out = args.out or f"runs/{SCRIPT}-{args.dataset}-{moment}"
            args.dataset, args.out = gather((args.dataset, args.out))[0]
        torch.manual_seed(args.seed)
        self.model = Model(args, self.data, self.device)
        parts = self.model.parts.values()
        self.networks = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        size, n = self.model.images_per_step, len(self.data.train)
        if size > n:
            raise UsageError(f"--batch-size {args.batch_size}: {size} an update, but {n} images")
        if args.batch_size % self.world or args.batch_size < 2 * self.world:
            problem = f"needs a multiple of {self.world}, the number of processes, two or more each"
            raise UsageError(f"--batch-size {args.batch_size}: {problem}")
        shape = list(self.data.train.shape[1:])
        self.data_facts = {"classes": self.data.classes, "shape": shape, "images": n}
        self.epoch_steps = n // size
        self.total = min(args.epochs * self.epoch_steps, args.max_steps or math.inf)
        self.step, self.seconds, self.measured = 0, 0.0, None
        self.rows = []  # of metrics.csv
        self.losses = torch.zeros(0, len(LOSSES), device=self.device)  # since the last row
        self.folder = Path(args.out)
        if state is not None:
            self.restore(state)
        self.folder.mkdir(parents=True, exist_ok=True)

    def train(self):
        """Trains to the end, with a checkpoint at each epoch; Ctrl-C and SIGTERM save and exit."""
        new, folder = self.args.resume is None, self.folder
        if new and (folder / "checkpoint.pt").exists():  # nothing else makes it a run's folder
            raise UsageError(f"--out {folder} holds a run; choose another, or --resume that one")
        if self.step >= self.total and (folder / "summary.json").exists():
            flag = "--max-steps" if self.total == self.args.max_steps else "--epochs"
            self.say(f"{folder} is finished; a larger {flag} extends it")
            return
        if self.rank == 0:
            (self.folder / "samples").mkdir(exist_ok=True)
            (self.folder / "summary.json").unlink(missing_ok=True)
            write_file(self.folder / "config.json", json.dumps(vars(self.args), indent=2).encode())
            write_rows(self.folder / "metrics.csv", self.rows)
            self.say(f"{self.data.name}, {len(self.data.train):,} samples, {self.device}, "
                     f"{self.model.kernels} kernels, {self.folder}")  # fmt: skip
        caught, stop = [], None
        signals = (signal.SIGINT, signal.SIGTERM)
        handlers = [signal.signal(s, lambda number, _: caught.append(number)) for s in signals]
        hidden = True if self.rank else None  # None: shown on a terminal
        self.bar = tqdm(total=self.total, initial=self.step, unit="update", disable=hidden)
        self.started = time.perf_counter() - self.seconds
        take_step, batches = stepper(self.model, self.data), self.batches()
        try:
            while self.step < self.total and not (stop := self.stopped(caught)):
                losses = take_step(next(batches))
                self.losses = torch.cat([self.losses, losses[None]])
                self.step += 1
                self.bar.update()
                if self.step % self.epoch_steps == 0:
                    self.check()
                    self.measure()
                    self.save()
                elif self.step % self.args.log_every == 0:
                    self.check()
                    self.log()
            if stop or self.step % self.epoch_steps:
                self.check()
                self.save()
        finally:
            take_step = None  # NCCL would wait for its graph for ever, were there an error
            self.bar.close()
            for number, handler in zip(signals, handlers):
                signal.signal(number, handler)
        if stop:
            self.say(f"stopped at update {self.step}; to go on: python {SCRIPT}.py "
                     f"--resume {self.folder / 'checkpoint.pt'}", file=sys.stderr)  # fmt: skip
            raise SystemExit(128 + stop)
        self.finish()

    def say(self, text, file=None):
        """One line for the user, from the first process alone."""
        if self.rank == 0:
            print(f"{SCRIPT}: {text}", file=file, flush=True)

    def stopped(self, caught):
        """The signal that came to one of the processes; on GPUs they ask each other at times."""
        if self.world > 1 and self.device.type == "cuda" and self.step % 10:
            return None
        return next((number for numbers in gather(caught) for number in numbers), None)

    def batches(self):
        """The next updates' images by number; their order depends on seed and epoch alone."""
        while True:
            epoch, at = divmod(self.step, self.epoch_steps)
            rng = torch.Generator().manual_seed(self.args.seed * 2**20 + epoch)
            order = torch.randperm(len(self.data.train), generator=rng).to(self.device)
            yield from order.split(self.model.images_per_step)[at : self.epoch_steps]

    def check(self):
        """Ends a run that has gone bad; reads the device, so only at rows and saves."""
        average(self.losses)
        good = self.losses.isfinite().all(dim=1).tolist()
        # bad weights would show in the next loss, but after the save
        values = self.networks.state_dict().values()
        good.append(torch.stack([value.isfinite().all() for value in values]).all().item())
        if not all(good):
            step = min(self.step - len(self.losses) + 1 + good.index(False), self.step)
            last = self.folder / "checkpoint.pt"
            kept = f" ({last} is the last good state)" if last.exists() else ""
            problem = f"a loss or weight is nan or infinite at update {step}"
            raise UsageError(f"{problem}; start again with lower rates{kept}")

    def log(self, measured=None):
        """One row of metrics.csv: the mean losses since the last, and what was measured now."""
        self.seconds = time.perf_counter() - self.started
        measured = measured or {}
        if len(self.losses):  # or else this update has its row
            row = {"step": self.step, "epoch": -(-self.step // self.epoch_steps)}
            row |= {"seconds": self.seconds} | dict(zip(LOSSES, self.losses.mean(dim=0).tolist()))
            self.rows.append(row)
            self.losses = self.losses[:0]
        row = self.rows[-1]
        row |= {name: measured.get(name) for name in MEASURED}
        if self.rank:
            return
        write_rows(self.folder / "metrics.csv", self.rows)
        shown = {k: f"{v:.3f}" for k, v in (row | measured).items() if isinstance(v, float)}
        del shown["seconds"]
        self.bar.set_postfix(shown)
        if measured or self.bar.disable:
            text = ", ".join(f"{name} {value}" for name, value in shown.items())
            rate = self.step * self.model.images_per_step / self.seconds
            self.bar.write(f"update {self.step}/{self.total}: {text}, {rate:.0f} images/s")
            sys.stdout.flush()

    def measure(self):
        """Logs the script's own measurements and leaves a picture."""
        self.measured = {}
        if self.rank == 0:
            self.networks.train(False)
            self.measured = evaluate(self.model, self.data)
            save_samples(self.model, self.folder / "samples" / f"{self.step:07d}.png")
            self.networks.train(True)
        self.log(self.measured)

    def save(self):
        """Writes all that the run needs to go on as if it had never stopped."""
        if self.rank:
            return
        self.seconds = time.perf_counter() - self.started
        state = {name: part.state_dict() for name, part in self.model.parts.items()}
        state |= {name: getattr(self, name) for name in PROGRESS}
        state |= {"script": SCRIPT, "config": vars(self.args), **self.data_facts}
        state["rng"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_file(self.folder / "checkpoint.pt", buffer.getbuffer())

    def restore(self, state):
        if any(state[name] != value for name, value in self.data_facts.items()):
            raise UsageError(f"--data-dir {self.args.data_dir}: the data have changed meanwhile")
        load_parts(self.model.parts, state, self.args.resume)
        for name in PROGRESS:
            setattr(self, name, state[name])
        self.losses = self.losses.to(self.device)
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"])

    def finish(self):
        """The closing row, the pictures and summary.json."""
        if self.step % self.epoch_steps or self.measured is None:
            self.measure()
        if self.rank:
            return
        self.networks.train(False)
        summary = {
            "script": SCRIPT,
            "dataset": self.data.name,
            "seed": self.args.seed,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "kernels": self.model.kernels,
            "steps": self.step,
            "seconds": self.seconds,
            "images_per_second": self.step * self.model.images_per_step / self.seconds,
        }
        summary |= self.measured | finish(self.model, self.folder, self.rows)
        write_file(self.folder / "summary.json", json.dumps(summary, indent=2).encode())
        self.say(f"finished; {self.folder / 'summary.json'} has the figures")


def keep_memory():
    """Has glibc keep large freed blocks: taking them from the system anew cost 9 % of an update."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, or Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def lock(folder):
    """Keeps other runs from the folder until what this returns is left."""
    with contextlib.ExitStack() as held:
        if fcntl is not None and processes()[0] == 0:
            descriptor = os.open(folder, os.O_RDONLY)
            held.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = "another process is at this run; stop it"
                raise UsageError(f"--out {folder}: {problem}") from None
            except OSError:  # a file system without locks
                pass
        return held.pop_all()


def write_file(path, content):
    """Writes bytes under a temporary name and renames it: the file is the old or the new, whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_rows(path, rows):
    """metrics.csv from rows, dictionaries with the same keys."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, ["step", "epoch", "seconds", *LOSSES, *MEASURED])
    table.writeheader()
    for row in rows:
        table.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_file(path, text.getvalue().encode())


def load_checkpoint(path):
    """A checkpoint of this script, on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        script = state["script"]
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint {path}") from None
    except Exception as error:  # a damaged file raises many kinds
        raise UsageError(f"{path} is not a whole checkpoint ({one_line(error)[:200]})") from error
    if script != SCRIPT:
        raise UsageError(f"{path} is a checkpoint of {script}, not of {SCRIPT}")
    missing = {*PROGRESS, "config", "classes", "shape", "images", "rng"} - state.keys()
    missing = missing or vars(arguments().parse_args([])).keys() - state["config"].keys()
    if missing:
        names = ", ".join(sorted(missing))
        raise UsageError(f"{path} is not a whole checkpoint (it lacks {names})")
    return state


def load_parts(parts, state, path):
    """Loads networks and optimisers from a checkpoint's state."""
    try:
        for name, part in parts.items():
            groups = zip(state[name].get("param_groups", ()), getattr(part, "param_groups", ()))
            for saved, own in groups:  # the device may be another
                saved |= {k: v for k, v in own.items() if k == "capturable"}
                saved |= {k: saved[k].to(v.device) for k, v in own.items() if torch.is_tensor(v)}
            part.load_state_dict(state[name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise UsageError(f"{path} is of another model ({one_line(error)[:200]})") from error


def stepper(model, data):
    """train_step as a function of the index; on CUDA captured once in a graph and replayed."""
    args, device = model.args, data.train.device
    torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    bf16 = args.precision == "bf16"

    def eager(index):
        # without autocast's cache of weights, as they change within a step
        with torch.autocast(device.type, torch.bfloat16, bf16, cache_enabled=False):
            return train_step(model, data, index)

    if device.type == "cpu" or args.no_graph:
        return eager
    stream, graph, done = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []
    index = torch.zeros(model.images_per_step, dtype=torch.int64, device=device)

    def replay(new):
        index.copy_(new)
        if len(done) < 3:  # what is set up once must be there before the capture
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                done.append(eager(index))
            torch.cuda.current_stream().wait_stream(stream)
            return done[-1]
        if len(done) == 3:
            with torch.cuda.graph(graph):
                done.append(eager(index))
        graph.replay()
        return done[3]

    return replay


def processes():
    """This process's rank and the number of processes: (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value):
    """The value of each process, in the order of their ranks; they wait for each other."""
    values = [value] * processes()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def mine(tensor, dim=0):
    """This process's share, along dim, of a batch that every process has drawn alike."""
    rank, world = processes()
    return tensor.chunk(world, dim)[rank]


def average(tensor):
    """Replaces the tensor by its mean over the processes."""
    if processes()[1] > 1:
        dist.all_reduce(tensor)
        tensor /= processes()[1]


def update(optimizer):
    """A step of the optimizer, with gradients averaged over the processes."""
    if processes()[1] > 1:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        grads = [grad for grad in grads if grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        average(flat)
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(mean.view(grad.shape))
    optimizer.step()


@contextlib.contextmanager
def mistakes_in_one_line(script):
    """Ends a mistake of the user's, or too little memory, in one line on stderr and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (UsageError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        print(f"{script}: error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def main(argv=None):
    """Runs the script; a mistake of the user's ends in one line on stderr and exit code 2."""
    with mistakes_in_one_line(SCRIPT):
        args, state = read_arguments(arguments(), argv)
        if args.generate:
            return generate(args, picture_path(args.out))
        try:
            if dist.is_torchelastic_launched():
                dist.init_process_group()
            run = Run(args, state)
            with lock(run.folder):
                run.train()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


# --- end shared ---


if __name__ == "__main__":
    main()
