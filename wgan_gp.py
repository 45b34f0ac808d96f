# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.10", "torchvision", "numpy", "tqdm", "matplotlib", "scikit-learn"]
# ///
"""WGAN-GP (Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028): a critic whose slope is held
near 1 by a penalty, so that it measures a distance of two distributions, which G makes small.

    python wgan_gp.py                         # MNIST, or scikit-learn's digits out of its reach
    python wgan_gp.py --dataset 8gaussians    # figure 1: also 25gaussians, swissroll
    python wgan_gp.py --dataset cifar10 --network resnet --epochs 642  # all 100,000 updates
    python wgan_gp.py --generate runs/.../checkpoint.pt --out grid.png

On 8gaussians all 8 modes are found; 0.93 to 0.96 of the samples are within 3 sigma of one, 0.99 of
the data (seeds 0 to 2; two minutes of one EPYC core each). Every run: docs/wgan_gp.md.

The critic D scores real samples x above generated ones G(z). Among all D with a slope of at most 1
the largest difference of the mean scores is the Wasserstein distance. The slope is held by a
penalty on straight lines between the two (equation 3):

    L = E[D(G(z))] - E[D(x)] + lambda E[(|grad D(x^)|_2 - 1)^2]
    x^ = e x + (1 - e) G(z),  e ~ U[0, 1]

Algorithm 1 takes n_critic = 5 steps of Adam(1e-4, 0, 0.9) on L for D, each with its own x, z and
one e a sample, then one on -E[D(G(z))] for G; lambda is 10, and D has no batch norm.

The script measures the paper's claims: the negative critic loss E[D(x)] - E[D(G(z))] on training
and on held-out data over time (figure 5b: where they part, the critic overfits), the gradient norms
at x^ and, on sets of points, the critic's level sets (figure 1) and the share of modes found.
--clip C is the WGAN of Arjovsky et al. 2017 (arXiv 1701.07875): RMSProp, and D's weights clipped to
(-C, C) instead of the penalty. What the paper leaves open is as in the authors' code
(igul222/improved_wgan_training). Departures:

- Networks for points are narrower and learn faster, at a rate that falls to 0, so that minutes on
  one core do: 3,900 updates for 8gaussians. The authors' 100,000 updates are --dim 512 --lr 1e-4
  --decay-steps 0 --epochs 513. Lambda 0.1 and beta1 0.5 are those of their code for points, where
  the paper has 10 and 0. For its figure 1 the paper holds G fixed at data plus noise; here G is
  trained, as in their code, and the share of modes found is our measure.
- beta1 is the paper's 0 for images; the authors' code for MNIST and plain CIFAR networks has 0.5.
- With --clip their critics of images have batch norm, and MNIST's G; here they have none.
- They train for 200,000 updates, residual networks for 100,000; 50 epochs of MNIST are 12,000.
- Their networks for 64x64 are residual, or DCGAN's, with layer norm in D (--critic-norm layer).
"""

import argparse
import functools
import io
import json
import math
import os
import socket
import sys
import time
from collections import namedtuple
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from sklearn.datasets import load_digits, make_swiss_roll
from torch import nn
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import save_image
from tqdm import tqdm

try:  # the compiled penalty is an extra: gradient_penalty_reference below computes the same
    import gan_kernels
except (ImportError, OSError):
    gan_kernels = None

SCRIPT = "wgan_gp"
SETS = {  # data sets of this script's own
    "8gaussians": lambda: gaussians("8gaussians", 250_000),
    "25gaussians": lambda: gaussians("25gaussians", 640_000),
    "swissroll": lambda: swiss_roll(200_000),
}


# ------------------------------------------------------------------ arguments
def arguments():
    """The paper's settings as flags, beside those that every script has."""
    parser = run_arguments("WGAN-GP (Gulrajani et al. 2017).")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="auto", help="auto: images or MNIST")
    add("--data-dir", default="data", help="of data sets, or your own images")
    add("--image-size", type=int, choices=(28, 32, 64), default=32, help="of a folder")
    group = parser.add_argument_group("WGAN-GP", "None, but for --clip: what suits the data")
    add, rate, network = group.add_argument, at_least(0, float), ("auto", "resnet")
    add("--network", choices=network, default="auto", help="resnet: the paper's CIFAR networks")
    add("--noise", type=at_least(1, high=10**4), help="number of noise values")
    add("--dim", type=at_least(1, high=1024), help="width of the networks")
    add("--critic-norm", choices=("none", "layer"), default="none", help="layer norm in the critic")
    add("--n-critic", type=at_least(1), default=5, help="critic updates to one of G")
    add("--gp-weight", type=rate, help="lambda, the weight of the penalty")
    add("--clip", type=at_least(1e-9, float), metavar="C", help="the original WGAN: weights to +-C")
    add("--lr", type=rate, help="learning rate of both networks")
    add("--betas", type=at_least(0, float, 0.9999), nargs=2, help="of Adam")
    fall = "updates of G over which --lr falls to 0; 0: it stays; None, on points: all of --epochs"
    add("--decay-steps", type=at_least(0), help=fall)
    return parser


def suit(args, data):
    """Gives the flags that were left out what suits the data."""
    points, size = data.train.ndim == 2, data.train.shape[-1]
    if args.network == "resnet" and size != 32:
        raise UsageError("--network resnet is for images of 32x32")
    if args.clip is not None and not args.resume and (args.betas or args.gp_weight is not None):
        raise UsageError("--clip has no penalty and no Adam: leave --gp-weight and --betas out")
    suiting = {"lr": 1e-4, "betas": [0.0, 0.9], "gp_weight": 10.0, "noise": 128, "dim": 64}
    suiting |= {"batch_size": 64, "epochs": 50, "decay_steps": 0}
    if points:
        suiting |= {"lr": 2e-3, "betas": [0.5, 0.9], "gp_weight": 0.1, "noise": 2, "dim": 128}
        suiting |= {"batch_size": 256, "epochs": 20, "decay_steps": None}
    elif size == 28:
        suiting |= {"batch_size": 50}
    elif size == 32:
        suiting |= {"dim": 128}
    if args.network == "resnet":
        suiting |= {"lr": 2e-4, "decay_steps": 100_000}
    if args.clip is not None:
        suiting |= {"lr": 5e-5, "decay_steps": 0}
    few = max(2, len(data.train) // args.n_critic)
    suiting["batch_size"] = min(suiting["batch_size"], few)
    for name, value in suiting.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if points:
        torch.set_num_threads(1)  # so little work is no faster on two, which wait for each other


# ------------------------------------------------------------------ networks
class Generator(nn.Module):
    """G(z): points, or images from `low` to 1, for samples of the given shape."""

    def __init__(self, shape=(1, 28, 28), noise=128, dim=64, network="auto"):
        super().__init__()
        channels, size, d, relu = shape[0], shape[-1], dim, nn.ReLU(inplace=True)
        self.noise, self.low = noise, 0.0 if size == 28 else -1.0
        if len(shape) == 1:
            self.low, layers = None, mlp(noise, d, size)
        elif network == "resnet":
            layers = [
                nn.Linear(noise, 16 * d), nn.Unflatten(1, (d, 4, 4)),
                *[Residual(d, d, "up", nn.BatchNorm2d) for _ in range(3)],
                nn.BatchNorm2d(d), relu,
                nn.Conv2d(d, channels, 3, padding=1), nn.Tanh(),
            ]  # fmt: skip
        elif size == 28:
            layers = [
                nn.Linear(noise, 64 * d), relu, nn.Unflatten(1, (4 * d, 4, 4)),
                up(4 * d, 2 * d, extra=0), relu,  # 4 to 7, a quarter of 28
                up(2 * d, d), relu,
                up(d, channels), nn.Sigmoid(),
            ]  # fmt: skip
        else:
            c = d * size // 8
            layers = [nn.Linear(noise, 16 * c), nn.BatchNorm1d(16 * c), relu]
            layers += [nn.Unflatten(1, (c, 4, 4))]
            while c > d:
                layers += [up(c, c // 2), nn.BatchNorm2d(c // 2), relu]
                c //= 2
            layers += [up(d, channels), nn.Tanh()]
        self.layers = initialise(layers, points=len(shape) == 1)

    def draw(self, n, rng=None):
        """z of n samples, (n, noise)."""
        device = next(self.parameters()).device
        return torch.randn(n, self.noise, device=device, generator=rng)

    def forward(self, z):
        return self.layers(z)


class Critic(nn.Module):
    """D(x): one score (batch,) for each sample, without bounds and without batch norm."""

    def __init__(self, shape=(1, 28, 28), dim=64, network="auto", norm="none"):
        super().__init__()
        channels, size, d, leaky = shape[0], shape[-1], dim, nn.LeakyReLU(0.2, inplace=True)
        norm = LayerNorm if norm == "layer" else nn.Identity
        if len(shape) == 1:
            layers = mlp(size, d, 1, norm)
        elif network == "resnet":
            blocks = [Residual(d, d, resample, norm) for resample in ("down", None, None)]
            layers = [Residual(channels, d, "first", norm), *blocks, nn.ReLU()]
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(d, 1)]
        else:
            layers, c = [down(channels, d), leaky], d
            for _ in range(3 if size == 64 else 2):
                layers += [down(c, 2 * c), norm(2 * c), leaky]
                c *= 2
            layers += [nn.Flatten(), nn.Linear(16 * c, 1)]
        self.layers = initialise(layers, points=len(shape) == 1)

    def forward(self, x):
        return self.layers(x).squeeze(1).float()  # under autocast, too


def mlp(inputs, dim, outputs, norm=nn.Identity):
    """The authors' networks for points: three layers of relu units, and a linear one."""
    layers = []
    for size in (inputs, dim, dim):
        layers += [nn.Linear(size, dim), norm(dim), nn.ReLU(inplace=True)]
    return [*layers, nn.Linear(dim, outputs)]


def down(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 5, stride=2, padding=2)


def up(inputs, outputs, extra=1):
    return nn.ConvTranspose2d(inputs, outputs, 5, stride=2, padding=2, output_padding=extra)


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
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1)  # of 0 its derivative is 0


def gradient_penalty_reference(critic, x, target=1.0):
    """Mean over the batch of (|d critic(x) / dx|_2 - target)^2, differentiable in the critic.

    A sample without gradient adds target^2 and gives none. gan_kernels has it without wasted work.
    """
    return (gradient_norms(critic, x, create_graph=True) - target).square().mean()


def train_step(model, real):
    """Algorithm 1: n_critic updates of D, each on its share of the real samples, then one of G.

    Returns L and the penalty, as means over the updates of D, and G's loss.
    """
    G, D, args = model.generator, model.critic, model.args
    losses, penalties = [], []
    for x in real.chunk(args.n_critic):
        with torch.no_grad():
            fake = G(G.draw(len(x)))
        loss = D(fake).mean() - D(x).mean()
        penalty = torch.zeros_like(loss)
        if args.clip is None:
            e = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device)
            x_hat = e * x + (1 - e) * fake
            penalty = model.gradient_penalty(D, x_hat)
        loss = loss + args.gp_weight * penalty
        model.optimizer_d.zero_grad()
        loss.backward()
        model.optimizer_d.step()
        if args.clip is not None:
            with torch.no_grad():
                for weight in D.parameters():
                    weight.clamp_(-args.clip, args.clip)
        losses.append(loss.detach())
        penalties.append(penalty.detach())

    # the authors' residual networks draw twice the batch for G
    z = G.draw(len(x) * 2 if args.network == "resnet" else len(x))
    loss_g = -D(G(z)).mean()
    model.optimizer_g.zero_grad()
    loss_g.backward(inputs=list(G.parameters()))  # no gradient for D's weights
    model.optimizer_g.step()
    loss_d, penalty = torch.stack(losses).mean(), torch.stack(penalties).mean()
    return {"loss_critic": loss_d, "loss_generator": loss_g, "penalty": penalty}


def make_optimizer(network, args, decay_steps):
    """Algorithm 1's Adam, or the original WGAN's RMSProp; if decay_steps is not 0, the learning
    rate falls linearly to 0 over so many steps of the optimizer."""
    weights = list(network.parameters())
    lr, on_cuda = torch.tensor(args.lr, device=weights[0].device), weights[0].is_cuda
    if args.clip is None:
        adam = {"betas": tuple(args.betas), "fused": True, "capturable": True}
        optimizer = torch.optim.Adam(weights, lr, **adam)
    else:
        tensorflow = {"alpha": 0.9, "eps": 1e-10}  # the constants that the authors used
        optimizer = torch.optim.RMSprop(weights, lr, capturable=on_cuda, **tensorflow)

    def decay(*_):  # on the device and from the optimizer's own count, which a checkpoint has
        if state := optimizer.state.get(weights[0]):  # there is none before the first step
            rate = args.lr * (1 - state["step"] / decay_steps).clamp_min(0)
            optimizer.param_groups[0]["lr"].copy_(rate)

    if decay_steps:
        optimizer.register_step_pre_hook(decay)
    return optimizer


def normalise(data, low):
    """uint8 images as float32 in (low, 1), in channels-last memory; points as they are."""
    if data.dtype != torch.uint8:
        return data
    return data.contiguous(memory_format=torch.channels_last).float() * ((1 - low) / 255) + low


def dequantise(images, rng=None):
    """Spreads each of 256 grey values over its own part of (-1, 1)."""
    noise = torch.rand(images.shape, device=images.device, generator=rng)
    return (images + 1) * (255 / 256) - 1 + noise / 128


class Model(nn.Module):
    """Both networks, their optimisers and the penalty, as train_step takes them."""

    def __init__(self, args, data):
        super().__init__()
        self.args, self.samples_per_step = args, args.n_critic * args.batch_size
        self.real = data.train[:1000]  # for pictures of points
        shape, network = data.train.shape[1:], args.network
        self.generator = Generator(shape, args.noise, args.dim, network)
        self.critic = Critic(shape, args.dim, network, args.critic_norm)
        self.to(data.train.device, memory_format=torch.channels_last)
        steps = args.decay_steps
        if steps is None:
            steps = args.epochs * (len(data.train) // self.samples_per_step)
        self.optimizer_g = make_optimizer(self.generator, args, steps)
        self.optimizer_d = make_optimizer(self.critic, args, steps * args.n_critic)
        self.optimizers = [self.optimizer_g, self.optimizer_d]
        if args.kernels == "fused" and gan_kernels is None:
            raise UsageError("--kernels fused: gan_kernels can not be imported; pip install .")
        self.kernels, self.gradient_penalty = "reference", gradient_penalty_reference
        if gan_kernels and args.kernels != "reference" and args.clip is None:
            self.kernels, self.gradient_penalty = "fused", gan_kernels.gradient_penalty

    def batch(self, data, index):
        """What train_step takes of the samples of these numbers."""
        real = normalise(data.train[index], self.generator.low)
        return (dequantise(real) if self.args.network == "resnet" else real,)


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
    """n images (n, channels, size, size) in [0, 1] or points (n, 2); generator in eval mode."""
    samples = draw_samples(generator, n, seed)
    return samples if samples.ndim == 2 else (samples - generator.low) / (1 - generator.low)


def draw_samples(generator, n, seed):
    """n samples in the generator's own range."""
    return torch.cat([generator(z) for z in generator.draw(n, own_rng(generator, seed)).split(500)])


def own_rng(network, seed):
    """A random stream on the network's device that leaves the training's own alone."""
    return torch.Generator(next(network.parameters()).device).manual_seed(seed)


def load_generator(path, device="cpu"):
    """The trained generator of a checkpoint, for `sample(load_generator(path), 64)`."""
    state = load_checkpoint(path)
    settings = [state["config"][name] for name in ("noise", "dim", "network")]
    generator = Generator(state["data"]["shape"][1:], *settings)
    weights = state["model"].items()
    generator.load_state_dict({k[10:]: w for k, w in weights if k.startswith("generator.")})
    return generator.eval().requires_grad_(False).to(device)


def generate(args):
    """--generate: a grid of a hundred images, or a thousand points."""
    path = Path(args.out or "grid.png")
    if path.suffix and path.suffix.lower() not in IMG_EXTENSIONS:
        raise UsageError(f"--out {path}: no picture is written as {path.suffix}; .png or .jpg is")
    generator = load_generator(args.generate, choose_device(args.device))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(generator, path if path.suffix else f"{path}.png", args.seed)


def save_samples(model, path):
    """A picture of fixed noise; of points with the critic's level sets."""
    save_picture(model.generator, f"{path}.png", critic=model.critic, real=model.real)


def save_picture(generator, path, seed=0, critic=None, real=None):
    """A hundred images; or a thousand points with the critic's level sets and data (figure 1)."""
    samples = sample(generator, 1000 if generator.low is None else 100, seed)
    if samples.ndim > 2:
        return save_image(samples, path, nrow=10)
    from matplotlib.figure import Figure

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
    figure.savefig(picture := io.BytesIO(), dpi=100)
    Image.open(picture).convert("RGB").save(path)  # in formats that matplotlib has not, too


# ------------------------------------------------------------------ evaluation and figures
@torch.no_grad()
def evaluate(model, data):
    """The negative critic loss on training and on held-out data, and the gradient norm between.

    Of 2,000 images or 10,000 points each, at equal intervals in the set, against as many generated.
    """
    G, D, rng = model.generator, model.critic, own_rng(model.critic, 3)
    n = min(10_000 if G.low is None else 2000, len(data.test), len(data.train))
    at = torch.arange(n, device=data.train.device)
    real = [normalise(x[at * len(x) // n], G.low) for x in (data.train, data.test)]
    if model.args.network == "resnet":
        real = [dequantise(x, rng) for x in real]
    fake = draw_samples(G, n, seed=2)
    train, test, generated = (
        torch.cat([D(part) for part in x.split(500)]).mean() for x in (*real, fake)
    )
    e = torch.rand(n, *[1] * (fake.ndim - 1), device=fake.device, generator=rng)
    x_hat = e * real[0] + (1 - e) * fake
    norm = torch.cat([gradient_norms(D, part) for part in x_hat.split(500)]).mean()
    distance = {"wasserstein_train": train - generated, "wasserstein_heldout": test - generated}
    return {name: float(value) for name, value in (distance | {"gradient_norm": norm}).items()}


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


def finish(model, data, folder, rows):
    """The pictures of a finished run, and what its summary.json has beside the last row."""
    save_curves(folder / "curves.png", rows)
    if data.train.ndim == 2:
        save_samples(model, folder / "levels")
    mixture = modes(data.name)
    return mode_figures(sample(model.generator, 10_000), *mixture) if mixture else {}


def save_curves(path, rows):
    """Figure 5b: the negative critic loss on training and on held-out data; the gradient norms."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "gradient_norm" in row]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in rows]
    for name, label in (("wasserstein_train", "training"), ("wasserstein_heldout", "held out")):
        left.plot(steps, [row[name] for row in rows], ".-", label=label)
    right.plot(steps, [row["gradient_norm"] for row in rows], ".-", label="mean gradient norm")
    right.axhline(1, color="grey", linestyle="--")
    left.set_ylabel("negative critic loss")
    for axis in (left, right):
        axis.set_xlabel("update of G")
        axis.legend()
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


# --- shared: data ---
def load_data(args, device):
    """The set asked for; auto: MNIST, images that lie in its place, or scikit-learn's digits."""
    args.data_dir = os.path.abspath(os.path.expanduser(args.data_dir))  # to go on elsewhere
    name, folder = args.dataset, Path(args.data_dir)
    if name == "auto":  # data sets keep their images deeper
        near = [x for x in (folder, *folder.glob("[!.]*/")) if not (x / "metrics.csv").exists()]
        images = [p for x in near for p in x.glob("[!.]*") if p.suffix.lower() in IMG_EXTENSIONS]
        name = "folder" if len(images) > 1 and not [*folder.glob("MNIST/*/*-ubyte")] else "mnist"
    own = {"digits": digits_set, "folder": lambda: folder_set(args), **SETS}
    try:
        classes, *tensors = own[name]() if name in own else torchvision_set(name, folder)
    except Exception as error:  # torchvision and Pillow raise many kinds
        reason = f"{name} can not be read from --data-dir {folder}: {' '.join(str(error).split())}"
        if args.dataset != "auto" or name == "folder":
            raise UsageError(reason) from error
        print(f"{SCRIPT}: {reason}; training on scikit-learn's digits instead.")
        name, (classes, *tensors) = "digits", digits_set()
    args.dataset = name  # a run begun with "auto" goes on with the same set
    if len(tensors) == 2:  # of each class every fifth is held out, and never the only one
        held_out = [(tensors[1] == label).nonzero()[1::5, 0] for label in tensors[1].unique()]
        test = torch.isin(torch.arange(len(tensors[1])), torch.cat(held_out))
        tensors = [tensor[part] for part in (~test, test) for tensor in tensors]
    return Data(name, classes, *(tensor.to(device) for tensor in tensors))


def torchvision_set(name, folder):
    """Classes, and images and labels of both parts, downloaded where they are not there."""
    socket.setdefaulttimeout(5)  # a network that never answers is no network
    kind, tensors = getattr(datasets, PUBLIC[name]), []
    for part in ("train", "test"):
        found = kind(folder, part if name == "svhn" else part == "train", download=True)
        images = torch.as_tensor(found.data).movedim(3 if name == "cifar10" else 1, 1)
        labels = torch.as_tensor(found.labels if name == "svhn" else found.targets).long()
        if len(images) != len(labels) or labels.max() > 9 or images[0].numel() not in (784, 3072):
            raise ValueError("its images and labels do not fit; delete the files")
        tensors += images.view(len(images), -1, *images.shape[-2:]), labels
    return getattr(found, "classes", list("0123456789")), *tensors


def digits_set():
    """scikit-learn's 1,797 real handwritten digits, enlarged from 8x8 to 28x28."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] * 255 / 16
    images = F.interpolate(images, size=28, mode="bicubic").round().clamp(0, 255).byte()
    return list("0123456789"), images, torch.tensor(digits.target)


def folder_set(args):
    """All images below a folder, cropped square and resized; its sub-folders are the classes."""
    folder, size, images, paths = Path(args.data_dir), args.image_size, [], []
    folders, seen = [folder], {Path(args.out).resolve()} if args.out else set()
    for parent in folders:  # which grows
        skip = parent.resolve() in seen or (parent / "metrics.csv").exists()  # linked twice; a run
        inside = [] if skip else sorted(p for p in parent.iterdir() if not p.name.startswith("."))
        seen.add(parent.resolve())
        folders += [path for path in inside if path.is_dir()]
        paths += [p for p in inside if p.suffix.lower() in IMG_EXTENSIONS and p.is_file()]
    parents = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in paths]
    classes, labels = np.unique(parents, return_inverse=True)
    if len(paths) == len(classes):
        raise UsageError(f"no two images of a class, outside --out ({' '.join(IMG_EXTENSIONS)})")
    for path in tqdm(paths, desc="reading images", disable=None if sys.stderr else True):
        try:
            image = ImageOps.exif_transpose(Image.open(path))
            bits16, levels = image.mode.startswith("I;16"), np.asarray(image)
            if image.mode in ("I", "F") or (bits16 and 0 < levels.max() < 256):
                raise ValueError("floating-point, 32 bits or 8 in 16: save it with 8 or 16 bits")
            if bits16:
                image = Image.fromarray((levels >> 8).astype(np.uint8))
            image = image.convert("RGBA")  # what is transparent becomes white
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = ImageOps.fit(image.convert("L" if size == 28 else "RGB"), (size, size))
        except Exception as error:  # Pillow raises many kinds for a damaged file
            raise UsageError(f"{path}: {error}; mend it or take it out") from error
        images.append(torch.tensor(np.asarray(image)).view(size, size, -1).permute(2, 0, 1))
    return classes.tolist(), torch.stack(images), torch.tensor(labels)


PUBLIC = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "svhn": "SVHN", "cifar10": "CIFAR10"}
DATASETS = ("auto", *PUBLIC, "digits", "folder", *SETS)
# uint8 images (n, channels, size, size) or points (n, d), and int64 labels, on the device
Data = namedtuple("Data", "name classes train train_labels test test_labels")
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
