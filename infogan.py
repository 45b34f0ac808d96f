# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.10", "torchvision", "numpy", "tqdm", "matplotlib", "scikit-learn"]
# ///
"""InfoGAN (Chen et al. 2016, https://arxiv.org/abs/1606.03657): a GAN whose codes come to mean
something (which digit, its slant, its width) although it is never shown a label.

    python infogan.py --epochs 50      # MNIST, or scikit-learn's digits where it is out of reach
    python infogan.py --baseline       # figure 1's lower curve: Q only watches
    python infogan.py --generate runs/.../checkpoint.pt --category 3 --code 1.5 0 --out threes.png

Claim (50 epochs, one CPU core, medians of 5 seeds): the first category is the digit for 0.936 of
the test images of scikit-learn's digits, 0.981 of MNIST's (0.887 to 0.982): docs/infogan.md.

The generator G draws an image from noise z and codes c: categories, and values uniform in (-1, 1).
A network Q reads the codes back, and G is trained to make that possible. By section 5, in nats,

    L_I(G, Q) = E[log Q(c | G(z, c))] + H(c)  <=  I(c; G(z, c))
    min over G and Q, max over D:  V(D, G) - lambda L_I(G, Q)                        (equation 6)

Q is the discriminator D with other last layers (appendix C). The script measures L_I beside its
ceiling H(c) (figure 1), the test accuracy of Q's first category as a classifier (section 7.2: 5 %
error), and what each continuous code does to the digit (figure 2). Labels serve that alone.

As in the authors' code, L_I is in D's loss too, so that the trunk that D and Q share learns from
it, and Q is on D's optimiser. As in the paper and not in that code: the variances of Q are learned,
the continuous codes have the smaller lambda, the leaky slope is 0.1. Departures:

- D and Q see images shifted (--shift 2) and rotated (--rotate 9), or a category may be two digits.
- lambda is 0.3, and 0.03 for continuous codes, where the paper has 1 and "smaller".
- One draw of noise, normal, serves D and G; images end in a tanh. The code: two, uniform; sigmoid.
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
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

try:  # the compiled loss is an extra: info_loss_reference below computes the same
    import gan_kernels
except (ImportError, OSError):
    gan_kernels = None

SCRIPT = "infogan"
SETS = {}  # data sets of this script's own


# ------------------------------------------------------------------ arguments
def arguments():
    """The paper's settings as flags, beside those that every script has."""
    parser = run_arguments("InfoGAN (Chen et al. 2016): a GAN whose codes come to mean something.")
    parser.add_argument("--dataset", choices=DATASETS, default="auto", help="auto: images or MNIST")
    parser.add_argument("--data-dir", default="data", help="of data sets, or your own images")
    parser.add_argument("--image-size", type=int, choices=(28, 32), default=32, help="of a folder")
    add = parser.add_argument_group("InfoGAN").add_argument
    sizes, count, real = at_least(2, high=1000), at_least(0, high=100), at_least(0, float)
    add("--categorical", type=sizes, nargs="*", default=[10], metavar="K", help="sizes")
    add("--continuous", type=count, default=2, help="number of continuous codes")
    add("--noise", type=at_least(0, high=10**4), default=62, help="number of noise values")
    add("--lambda-categorical", type=real, default=0.3, help="weight of L_I")
    add("--lambda-continuous", type=real, default=0.03, help="weight of L_I")
    add("--unit-variance", action="store_true", help="Q's Gaussians have variance 1, not learned")
    add("--baseline", action="store_true", help="train an ordinary GAN, whose Q only watches")
    add("--shift", type=real, default=2.0, help="augmentation, in pixels")
    add("--rotate", type=real, default=9.0, help="augmentation, in degrees")
    add("--lr-d", type=real, default=2e-4, help="learning rate of D and Q")
    add("--lr-g", type=real, default=1e-3, help="learning rate of G")
    add("--category", type=at_least(0), nargs="+", help="with --generate: the categorical codes")
    add("--code", type=at_least(-1e9, float), nargs="+", help="and the continuous, -2 to 2")
    return parser


def suit(args, data):
    """Gives the flags that were left out what suits the data."""
    if args.category or args.code:
        raise UsageError("--category and --code go with --generate CHECKPOINT")
    args.epochs = args.epochs or 50
    args.batch_size = args.batch_size or min(len(data.train), 128 if len(data.train) > 9999 else 32)


# ------------------------------------------------------------------ networks (appendix C)
class Generator(nn.Module):
    """G(z, c) of table 1 (C.1, 28x28 grey) or table 2 (C.2, 32x32 colour); images in (-1, 1)."""

    def __init__(self, categorical=(10,), continuous=2, noise=62, channels=1):
        super().__init__()
        self.categorical, self.continuous, self.noise = tuple(categorical), continuous, noise
        inputs, relu = noise + sum(categorical) + continuous, nn.ReLU(inplace=True)
        if channels == 1:
            layers = [
                nn.Linear(inputs, 1024, bias=False), nn.BatchNorm1d(1024), relu,
                nn.Linear(1024, 6272, bias=False), nn.BatchNorm1d(6272), relu,
                nn.Unflatten(1, (128, 7, 7)),
                nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), relu,
                nn.ConvTranspose2d(64, 1, 4, 2, 1), nn.Tanh(),
            ]  # fmt: skip
        else:
            layers = [
                nn.Linear(inputs, 1792, bias=False), nn.BatchNorm1d(1792), relu,
                nn.Unflatten(1, (448, 2, 2)),
                nn.ConvTranspose2d(448, 256, 4, 2, 1, bias=False), nn.BatchNorm2d(256), relu,
                nn.ConvTranspose2d(256, 128, 4, 2, 1), relu,
                nn.ConvTranspose2d(128, 64, 4, 2, 1), relu,
                nn.ConvTranspose2d(64, 3, 4, 2, 1), nn.Tanh(),
            ]  # fmt: skip
        self.layers = nn.Sequential(*layers).apply(initialise)

    def forward(self, noise, category, code):
        one_hot = [F.one_hot(c, k) for c, k in zip(category.unbind(1), self.categorical)]
        return self.layers(torch.cat([noise, *one_hot, code], dim=1))

    def draw(self, n, rng=None):
        """noise (n, noise), category int64 (n, len(categorical)), code (n, continuous)."""
        device = self.layers[0].weight.device
        noise = torch.randn(n, self.noise, device=device, generator=rng)
        category = torch.empty(n, len(self.categorical), dtype=torch.int64, device=device)
        for i, k in enumerate(self.categorical):
            category[:, i].random_(k, generator=rng)
        code = torch.rand(n, self.continuous, device=device, generator=rng) * 2 - 1
        return noise, category, code

    def entropy(self):
        """H(c) in nats of the categorical codes and, differential, of the continuous ones."""
        return sum(math.log(k) for k in self.categorical), self.continuous * math.log(2)


class Discriminator(nn.Module):
    """D and Q of the same tables, on one trunk: D(x) -> (score, q).

    score (batch,) is D's logit; q is Q's output [logits of each categorical code | means | log
    variances of the continuous codes]. With watch, Q's gradient ends at the trunk.
    """

    def __init__(
        self, categorical=(10,), continuous=2, channels=1, unit_variance=False, watch=False
    ):
        super().__init__()
        self.watch, leaky = watch, nn.LeakyReLU(0.1, inplace=True)
        # without running averages: real and generated images would mix in them
        norm1d = functools.partial(nn.BatchNorm1d, track_running_stats=False)
        norm2d = functools.partial(nn.BatchNorm2d, track_running_stats=False)
        layers = [
            nn.Conv2d(channels, 64, 4, 2, 1), leaky,
            nn.Conv2d(64, 128, 4, 2, 1, bias=False), norm2d(128), leaky,
        ]  # fmt: skip
        if channels == 1:
            layers += [nn.Flatten(), nn.Linear(6272, 1024, bias=False), norm1d(1024), leaky]
        else:
            layers += [nn.Conv2d(128, 256, 4, 2, 1, bias=False), norm2d(256), leaky, nn.Flatten()]
        features = 1024 if channels == 1 else 4096
        outputs = sum(categorical) + continuous * (1 if unit_variance else 2)
        self.trunk = nn.Sequential(*layers)
        self.score = nn.Linear(features, 1)
        q = [nn.Linear(features, 128, bias=False), norm1d(128), leaky, nn.Linear(128, outputs)]
        self.q = nn.Sequential(*q)
        self.apply(initialise)

    def forward(self, x):
        features = self.trunk(x)
        q = self.q(features.detach() if self.watch else features)
        return self.score(features).squeeze(1).float(), q  # under autocast, too


def initialise(module):
    """The authors' initial weights: N(0, 0.02), in D's convolutions cut at two deviations."""
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    elif isinstance(module, (nn.Linear, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


# ------------------------------------------------------------------ losses and the training step
def info_loss_reference(q, category, code, sizes):
    """-log Q(c | x) of the true codes; H(c) minus this is the bound L_I (section 5).

    q is Q's flat output [logits of each categorical code | mean | log_var], float of shape
    (batch, sum(sizes) + 2 n), or (batch, sum(sizes) + n) for unit variance; category is int64
    (batch, len(sizes)); code is float (batch, n). Returns two means over the batch in nats,
    (categorical_nll, continuous_nll), each summed over its codes.
    """
    n = code.shape[1]
    logits, mean, log_var = q.split([sum(sizes), n, q.shape[1] - sum(sizes) - n], dim=1)
    codes = zip(logits.split(list(sizes), dim=1), category.unbind(1))
    categorical_nll = sum((F.cross_entropy(part, c) for part, c in codes), q.new_zeros(()))
    if log_var.shape[1] == 0:
        log_var = torch.zeros_like(mean)
    nll = 0.5 * (math.log(2 * math.pi) + log_var + (code - mean) ** 2 * torch.exp(-log_var))
    return categorical_nll, nll.sum(dim=1).mean()


def augment(x, shift=2.0, rotate=9.0):
    """Each image moved by up to `shift` pixels and turned by up to `rotate` degrees."""
    if not (shift or rotate):
        return x
    n, _, _, size = x.shape
    draws = torch.rand(3, n, device=x.device) * 2 - 1
    angle, (dx, dy) = draws[0] * math.radians(rotate), draws[1:] * shift * 2 / size
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(n, 2, 3)
    with torch.autocast(x.device.type, enabled=False):  # coordinates need all their digits
        grid = F.affine_grid(affine, x.shape, align_corners=False)
        return F.grid_sample(x.to(grid.dtype), grid, padding_mode="border", align_corners=False)


def train_step(model, real):
    """One update of D and Q, then one of G, on real images (batch, channels, height, width).

    Returns losses in nats: those of the GAN without L_I, and L_I itself.
    """
    G, D, args = model.generator, model.discriminator, model.args
    entropy_categorical, entropy_continuous = G.entropy()
    noise, category, code = G.draw(len(real))
    fake = G(noise, category, code)  # one pass of G serves both updates

    score_real, _ = D(augment(real, args.shift, args.rotate))
    score_fake, q = D(augment(fake.detach(), args.shift, args.rotate))
    loss_d = F.softplus(-score_real).mean() + F.softplus(score_fake).mean()
    categorical_nll, continuous_nll = model.info_loss(q, category, code, G.categorical)
    mi_categorical = entropy_categorical - categorical_nll
    mi_continuous = entropy_continuous - continuous_nll
    weighted_mi = args.lambda_categorical * mi_categorical + args.lambda_continuous * mi_continuous
    model.optimizer_d.zero_grad()
    (loss_d - weighted_mi).backward()
    model.optimizer_d.step()

    score, q = D(augment(fake, args.shift, args.rotate))
    loss_g = F.softplus(-score).mean()
    nll = model.info_loss(q, category, code, G.categorical)
    weighted_nll = args.lambda_categorical * nll[0] + args.lambda_continuous * nll[1]
    model.optimizer_g.zero_grad()
    objective = loss_g if args.baseline else loss_g + weighted_nll
    objective.backward(inputs=list(G.parameters()))  # no gradient for D's weights
    model.optimizer_g.step()
    mi = {"mi_categorical": mi_categorical, "mi_continuous": mi_continuous}
    return {"loss_d": loss_d, "loss_g": loss_g, **mi}


def normalise(images):
    """uint8 images as float32 in (-1, 1), in the memory order that convolutions like best."""
    return images.contiguous(memory_format=torch.channels_last).float() / 127.5 - 1


class Model(nn.Module):
    """Both networks, their optimisers and the information loss, as train_step takes them."""

    def __init__(self, args, data):
        super().__init__()
        if not args.categorical and not args.continuous:
            raise UsageError("--categorical and --continuous: InfoGAN needs at least one code")
        self.args, self.samples_per_step = args, args.batch_size
        codes, channels = (args.categorical, args.continuous), data.train.shape[1]
        self.generator = Generator(*codes, args.noise, channels)
        self.discriminator = Discriminator(*codes, channels, args.unit_variance, args.baseline)
        self.to(data.train.device, memory_format=torch.channels_last)
        adam = {"betas": (0.5, 0.999), "fused": True, "capturable": True}
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), args.lr_g, **adam)
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), args.lr_d, **adam)
        self.optimizers = [self.optimizer_g, self.optimizer_d]
        if args.kernels == "fused" and gan_kernels is None:
            raise UsageError("--kernels fused: gan_kernels can not be imported; pip install .")
        self.kernels = "fused" if gan_kernels and args.kernels != "reference" else "reference"
        self.info_loss = gan_kernels.info_loss if self.kernels == "fused" else info_loss_reference

    def batch(self, data, index):
        """What train_step takes of the samples of these numbers."""
        return (normalise(data.train[index]),)


# ------------------------------------------------------------------ sampling
@torch.no_grad()
def sample(generator, n, category=None, code=None, seed=0):
    """n images (n, channels, size, size) in [0, 1]; the generator in evaluation mode.

    category and code hold a value for each code of their kind, or are drawn. Raises UsageError, a
    ValueError, where they do not fit the generator.
    """
    (noise, c, k), sizes = generator.draw(n, own_rng(generator, seed)), generator.categorical
    if category is not None:
        if len(category) != len(sizes) or not all(0 <= v < s for v, s in zip(category, sizes)):
            raise UsageError(f"category {category}: the categorical codes have sizes {sizes}")
        c = torch.tensor(category, device=c.device).expand_as(c)
    if code is not None:
        if len(code) != generator.continuous:
            raise UsageError(f"code {code}: there are {generator.continuous} continuous codes")
        k = torch.tensor(code, device=k.device, dtype=k.dtype).expand_as(k)
    return generator(noise, c, k) / 2 + 0.5


@torch.no_grad()
def sweep(generator, kind, i, values, rows=10, seed=1):
    """Images (rows, len(values), channels, size, size): rows of fixed noise, code i swept.

    kind is "categorical" or "continuous"; row r has category r (modulo its size) of the first code.
    """
    noise, category, code = generator.draw(rows, own_rng(generator, seed))
    for first in category.unbind(1)[:1]:
        first.copy_(torch.arange(rows) % generator.categorical[0])
    columns = []
    for value in values:
        (category if kind == "categorical" else code)[:, i] = value
        columns.append(generator(noise, category, code) / 2 + 0.5)
    return torch.stack(columns, dim=1)


def own_rng(network, seed):
    """A random stream on the network's device that leaves the training's own alone."""
    return torch.Generator(next(network.parameters()).device).manual_seed(seed)


def load_generator(path, device="cpu"):
    """The trained generator of a checkpoint, for `sample(load_generator(path), 64)`."""
    state = load_checkpoint(path)
    codes = [state["config"][name] for name in ("categorical", "continuous", "noise")]
    generator = Generator(*codes, state["data"]["shape"][1])
    weights = state["model"].items()
    generator.load_state_dict({k[10:]: w for k, w in weights if k.startswith("generator.")})
    return generator.eval().requires_grad_(False).to(device)


def generate(args):
    """--generate: a grid of a hundred images with the codes asked for."""
    path = Path(args.out or "grid.png")
    if path.suffix and path.suffix.lower() not in IMG_EXTENSIONS:
        raise UsageError(f"--out {path}: no picture is written as {path.suffix}; .png or .jpg is")
    generator = load_generator(args.generate, choose_device(args.device))
    images = sample(generator, 100, args.category, args.code, args.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(images, path if path.suffix else f"{path}.png", nrow=10)


def save_samples(model, path):
    """Ten rows of fixed noise; columns are the categories of the first code, if there is one."""
    G = model.generator
    columns = G.categorical[0] if G.categorical else 10
    images = sweep(G, "categorical", 0, range(columns)) if G.categorical else sample(G, 100)
    save_image(images.flatten(0, -4), f"{path}.png", nrow=columns)


# ------------------------------------------------------------------ evaluation (section 7)
@torch.no_grad()
def evaluate(model, data):
    """The test accuracy of Q's first category; batch norm by the statistics of about 500 images."""
    sizes, k = model.generator.categorical, max(1, len(data.test) // 500)
    if not sizes or sizes[0] != len(data.classes) or len(data.test) < 2:
        return {}
    parts = [slice(i, None, k) for i in range(k)]  # a folder is in the order of its classes
    q = torch.cat([model.discriminator(normalise(data.test[part]))[1] for part in parts])
    category, label = q[:, : sizes[0]].argmax(dim=1), [data.test_labels[part] for part in parts]
    return {"accuracy": matched_accuracy(category, torch.cat(label), sizes[0])}


def matched_accuracy(category, label, k):
    """Share of images whose category is their label, under the best one-to-one matching."""
    counts = torch.bincount(category * k + label, minlength=k * k).view(k, k).cpu().numpy()
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / counts.sum())


@torch.no_grad()
def information(model):
    """L_I in nats on 2,000 new images, and what that of the categorical codes can at most be."""
    G, D = model.generator, model.discriminator
    drawn = G.draw(2000, own_rng(G, 2))
    q = torch.cat([D(G(*batch))[1] for batch in zip(*(part.split(500) for part in drawn))])
    categorical_nll, continuous_nll = info_loss_reference(q, *drawn[1:], G.categorical)
    categorical, continuous = G.entropy()
    mi = {"mi_categorical": categorical - categorical_nll.item(), "mi_categorical_max": categorical}
    return mi | {"mi_continuous": continuous - continuous_nll.item()}


def code_effects(generator, rows=100, points=21):
    """Spearman's rho of each continuous code, swept from -2 to 2, with what `digit_shape` measures:
    within each row of `sweep`, then averaged over the rows."""
    effects = []
    for i in range(generator.continuous):
        values = torch.linspace(-2, 2, points).tolist()
        images = sweep(generator, "continuous", i, values, rows).flatten(0, 1)
        shapes = digit_shape(images).items()
        effects.append({name: mean_rho(value.view(rows, points)) for name, value in shapes})
    return effects


def digit_shape(images):
    """From moments of the ink of images (n, channels, size, size), three tensors (n,): the slant
    m_xy / m_yy, positive when the foot lies to the right; the width, without the slant; the
    thickness, ink over the linear size of the digit, in pixels."""
    ink = images.double().mean(dim=1)
    mass = ink.sum(dim=(1, 2)).clamp_min(1e-9)
    at = torch.arange(ink.shape[-1], device=ink.device, dtype=ink.dtype)
    x = at - (ink.sum(dim=1) @ at / mass)[:, None]
    y = at - (ink.sum(dim=2) @ at / mass)[:, None]
    m_xx = (ink.sum(dim=1) * x**2).sum(dim=1) / mass
    m_yy = (ink.sum(dim=2) * y**2).sum(dim=1) / mass
    m_xy = torch.einsum("nyx,ny,nx->n", ink, y, x) / mass
    m_yy = m_yy.clamp_min(1e-9)
    upright = (m_xx - m_xy**2 / m_yy).clamp_min(1e-9)
    thickness = mass / (upright * m_yy) ** 0.25
    return {"slant": m_xy / m_yy, "width": upright.sqrt(), "thickness": thickness}


def mean_rho(values):
    """Spearman's rho between each row of values (rows, points) and its index, averaged."""
    rows = values.cpu().numpy()
    index = range(rows.shape[1])
    return float(np.mean([spearmanr(row, index).statistic if np.ptp(row) else 0 for row in rows]))


# ------------------------------------------------------------------ figures
def finish(model, data, folder, rows):
    """The pictures of a finished run, and what its summary.json has beside the last row."""
    effects = code_effects(model.generator)
    save_codes(model.generator, folder / "codes.png", effects)
    save_curves(model.generator, folder / "curves.png", rows)
    return information(model) | {"codes": effects}


def save_codes(generator, path, effects):
    """Figure 2: a panel for each code, rows of fixed noise, columns the code swept."""
    from matplotlib.figure import Figure

    sizes, values, panels = generator.categorical, torch.linspace(-2, 2, 10).tolist(), {}
    for i, k in enumerate(sizes):
        panels[f"c{i + 1}: category 0 to {k - 1}"] = sweep(generator, "categorical", i, range(k))
    for i, effect in enumerate(effects):
        rho = ", ".join(f"{name} {value:+.2f}" for name, value in effect.items())
        title = f"c{len(sizes) + i + 1}: code -2 to 2 (rho: {rho})"
        panels[title] = sweep(generator, "continuous", i, values)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 5.2 * rows), layout="constrained")
    for place, (title, images) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(rows, columns, place)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
        grid = make_grid(images.flatten(0, 1), nrow=images.shape[1], padding=1)
        axis.imshow(grid.permute(1, 2, 0).cpu().numpy())
    figure.savefig(path, dpi=150)


def save_curves(generator, path, rows):
    """Figure 1: L_I of the categorical codes against updates, with its ceiling; and the losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, ceiling = [row["step"] for row in rows], generator.entropy()[0]
    left.plot(steps, [row["mi_categorical"] for row in rows], label="$L_I$, categorical")
    left.axhline(ceiling, color="grey", linestyle="--", label=f"$H(c)$ = {ceiling:.3f}")
    for name in ("loss_d", "loss_g"):
        right.plot(steps, [row[name] for row in rows], label=name)
    for axis in (left, right):
        axis.set(xlabel="update", ylabel="nats")
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
