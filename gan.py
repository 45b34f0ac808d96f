# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.10", "torchvision", "numpy", "tqdm", "matplotlib", "scikit-learn"]
# ///
"""Generative adversarial nets (Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661): G turns
noise into samples, D tells them from data, and each learns from the other.

    python gan.py                  # MNIST, or scikit-learn's digits out of its reach
    python gan.py --dataset 1d     # figure 1: data, samples and D on a line, in a minute
    python gan.py --generate runs/.../checkpoint.pt --out grid.png

Parzen log-likelihood of MNIST 222.3 +- 2.1 nats by --precision bf16, 480,000 updates (n = 1, seed
0; 4.4 hours of an EPYC core), 203.5 by --epochs 150; paper 225, real images 242.7: docs/gan.md.

    min over G, max over D:  V(D, G) = E[log D(x)] + E[log(1 - D(G(z)))]            (equation 1)

With D at its best V is -log 4 + 2 JS(p_data, p_g) in nats, least where p_g = p_data and D = 1/2:
-log 4 = -1.386 (theorem 1). As in the authors' code (goodfeli/adversarial) G has relu and uniform
noise of variance 1, D maxout and dropout, which G's loss keeps, and SGD with momentum updates both
at once, from the same samples. G maximises log D (section 3).

Measured: V on held-out data, D without dropout; log p of the test set by a Parzen window on 10,000
samples (table 1), and on real images; how far samples and test images are from the nearest trained
image (figure 2); on the line total variation and JS of p_g and p_data, in bins of 0.04. Departures:

- The authors train on 50,000 images, choose sigma (of 10 values; 30 here add 3 nats) on the rest,
  stop by hand. Here every seventh is held out (MNIST's even and odd images differ in stroke, so no
  even number would do), the one before it coming twice an epoch. Colour has MNIST's networks.
- The rate goes down to 0 at the end of --epochs; theirs does not (--lr-fall 0).
- How figure 1 was made is not said: here small networks, noise of one number, Adam (SGD failed).
- Nothing here has a fused kernel: --kernels changes nothing.
"""

import argparse
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
from sklearn.datasets import load_digits
from torch import nn
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import save_image
from tqdm import tqdm

SCRIPT = "gan"
SETS = {"1d": lambda: line_set(200_000)}  # data sets of this script's own
SAMPLES = 10_000  # for the closing measurements


# ------------------------------------------------------------------ arguments
def arguments():
    """The paper's settings as flags, beside those that every script has."""
    parser = run_arguments("Generative adversarial nets (Goodfellow et al. 2014).")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="auto", help="auto: images or MNIST")
    add("--data-dir", default="data", help="of data sets, or your own images")
    add("--image-size", type=int, choices=(28, 32), default=32, help="of a folder")
    add = parser.add_argument_group("GAN", "None: what suits the data").add_argument
    add("--lr", type=at_least(0, float), help="learning rate at first")
    add("--lr-fall", type=at_least(0, float, 1), help="last share of --epochs, where it falls to 0")
    add("--saturating", action="store_true", help="G minimises log(1 - D), as in equation 1")
    alternate = "algorithm 1: K updates of D, or 1, then one of G; None: both at once"
    add("--alternate", type=at_least(1), nargs="?", const=1, metavar="K", help=alternate)
    return parser


def suit(args, data):
    """Gives the flags that were left out what suits the data."""
    few = max(2, len(data.train) // (args.alternate or 1))
    epochs = 800 if len(data.train) > 9999 else 250
    suits = {"batch_size": min(100, few), "epochs": epochs, "lr": 0.1, "lr_fall": 0.2}
    if data.name == "1d":
        suits = {"batch_size": min(2000, few), "epochs": 30, "lr": 2e-3, "lr_fall": 0}
        torch.set_num_threads(1)  # so little work is no faster on two, which wait for each other
    vars(args).update({k: v for k, v in suits.items() if getattr(args, k) is None})
    if len(data.train) < 7:
        raise UsageError(f"{data.name} has {len(data.train)} training images; 7 are the least")


# ------------------------------------------------------------------ networks
class Generator(nn.Module):
    """G(z): images in [0, 1] of the given shape, or points of one number."""

    def __init__(self, shape=(1, 28, 28), width=1200):
        super().__init__()
        if len(shape) == 1:
            self.noise, layers = 1, perceptron()
        else:
            self.noise = 100
            layers = [
                linear(100, width, 0.05), nn.ReLU(), linear(width, width, 0.05), nn.ReLU(),
                linear(width, math.prod(shape), 0.05), nn.Sigmoid(), nn.Unflatten(1, shape),
            ]  # fmt: skip
        self.layers = nn.Sequential(*layers)

    def draw(self, n, seed=None):
        """z of n samples, (n, noise): uniform, of variance 1; with a seed no other draws change."""
        device = self.layers[0].weight.device
        rng = None if seed is None else torch.Generator(device).manual_seed(seed)
        return (2 * torch.rand(n, self.noise, device=device, generator=rng) - 1) * math.sqrt(3)

    def forward(self, z):
        return self.layers(z)


class Discriminator(nn.Module):
    """The logit (batch,) of D(x), the probability that x is of the data."""

    def __init__(self, shape=(1, 28, 28), units=240):
        super().__init__()
        if len(shape) == 1:
            layers = perceptron()
        else:
            layers = [
                nn.Flatten(), nn.Dropout(0.2), Maxout(math.prod(shape), units, 5),
                nn.Dropout(0.5), Maxout(units, units, 5), nn.Dropout(0.5), linear(units, 1, 0.005),
            ]  # fmt: skip
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x).squeeze(1).float()  # under autocast, too


class Maxout(nn.Module):
    """Units that are each the largest of some linear maps (Goodfellow et al. 2013)."""

    def __init__(self, inputs, units, pieces):
        super().__init__()
        self.pieces, self.linear = pieces, linear(inputs, units * pieces, 0.005)

    def forward(self, x):
        return self.linear(x).unflatten(1, (self.pieces, -1)).amax(dim=1)


def linear(inputs, outputs, reach):
    """A linear layer with initial weights uniform in (-reach, reach), biases 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.uniform_(layer.weight, -reach, reach)
    nn.init.zeros_(layer.bias)
    return layer


def perceptron(width=64):
    """Layers from one number to one number, for the line."""
    return [nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)]


# ------------------------------------------------------------------ the training step
def learning_rate(updates, lr, fall_from=1e9, end=1e9, decay=4e-6):
    """The rate after so many updates (a tensor: the device counts, as a graph can): each divides it
    by 1 + decay, the authors', and those from fall_from on bring it to 0 at the end."""
    fall = (end - updates) / max(1, end - fall_from)
    return lr * torch.exp(updates * -math.log1p(decay)) * fall.clamp(0, 1)


class PaperSGD(torch.optim.Optimizer):
    """The authors' SGD: the momentum rises from 0.5 to 0.7 in 250 epochs of 500 updates."""

    def __init__(self, parameters, lr, *schedule):
        super().__init__(parameters, {"lr": lr, "schedule": schedule})
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"updates": p.new_zeros(()), "velocity": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for p in group["params"]:
            updates, velocity = self.state[p]["updates"], self.state[p]["velocity"]
            rate = learning_rate(updates, group["lr"], *group["schedule"])
            momentum = 0.5 + 0.2 * (updates / 125_000).clamp_max(1)
            p.add_(velocity.mul_(momentum).addcmul_(p.grad, -rate))
            updates += 1


def falling_adam(parameters, *schedule):
    """Adam for the line, whose rate decays faster."""
    first, *others = parameters
    lr = torch.tensor(schedule[0], device=first.device)
    optimizer = torch.optim.Adam([first, *others], lr, (0.5, 0.9), fused=True, capturable=True)

    def fall(adam, *_):  # on the device and from Adam's own count, which a checkpoint has
        if state := adam.state.get(first):  # there is none before the first step
            adam.param_groups[0]["lr"].copy_(learning_rate(state["step"], *schedule, decay=1e-3))

    optimizer.register_step_pre_hook(fall)
    return optimizer


def value(score_real, score_fake):
    """V(D, G) in nats, of logits: -softplus(-score) is log D, -softplus(score) log(1 - D)."""
    return -F.softplus(-score_real).mean() - F.softplus(score_fake).mean()


def train_step(model, real):
    """One update of both networks, from the same samples and under the same dropout of D.

    With --alternate K: algorithm 1, K updates of D on as many parts of the batch, then one of G,
    each with samples of its own. Returns the losses in nats; D's is -V / 2, as the authors' is.
    """
    G, D, args = model.generator, model.discriminator, model.args
    for x in real.chunk(args.alternate or 1):
        score_fake = D(G(G.draw(len(x))))
        loss_d = -value(D(x), score_fake) / 2
        model.optimizer_d.zero_grad()
        loss_d.backward(inputs=list(D.parameters()), retain_graph=True)
        if args.alternate:
            model.optimizer_d.step()
    if args.alternate:
        score_fake = D(G(G.draw(len(x))))

    # V's own log(1 - D) is flat where D is sure of a sample: there G would not learn (section 3)
    loss_g = (-F.softplus(score_fake) if args.saturating else F.softplus(-score_fake)).mean()
    model.optimizer_g.zero_grad()
    loss_g.backward(inputs=list(G.parameters()))
    if not args.alternate:
        model.optimizer_d.step()
    model.optimizer_g.step()
    return {"loss_d": loss_d, "loss_g": loss_g}


def normalise(data):
    """uint8 images as float32 in [0, 1]; points as they are."""
    return data / 255 if data.dtype == torch.uint8 else data


class Model(nn.Module):
    """Both networks and their optimisers, as train_step takes them."""

    def __init__(self, args, data):
        super().__init__()
        self.args, self.kernels = args, "reference"
        self.samples_per_step = args.batch_size * (args.alternate or 1)
        shape, optimizer = data.train.shape[1:], falling_adam
        self.generator, self.discriminator = Generator(shape), Discriminator(shape)
        self.to(data.train.device)
        if len(shape) == 3:
            optimizer = PaperSGD
            mean = data.train.mean(dim=0, dtype=torch.float32).flatten() / 255
            self.generator.layers[4].bias.data.copy_(mean.clamp(1e-7, 1 - 1e-7).logit())
        end = args.epochs * (len(data.train) // self.samples_per_step)
        self.optimizers = [
            optimizer(x.parameters(), args.lr, k * end * (1 - args.lr_fall), k * end)
            for x, k in zip(self.children(), (1, args.alternate or 1))  # k: its updates of a step
        ]
        self.optimizer_g, self.optimizer_d = self.optimizers

    def batch(self, data, index):
        """What train_step takes of the samples of these numbers; 6, 13, ... are held out."""
        return (normalise(data.train[index - index % 7 // 6]),)


# ------------------------------------------------------------------ the line (figure 1)
MIXTURE = torch.tensor([[0.3, 0.5, 0.2], [-2, 0, 2], [0.6, 0.4, 0.5]])  # weights, means, deviations
EDGES = torch.linspace(-4, 4, 201)  # of the bins in which densities are compared


def line_set(n):
    """n points (n, 1) of a mixture of Gaussians to train on and 10,000 held out."""
    rng = torch.Generator().manual_seed(0)
    label = torch.multinomial(MIXTURE[0], n + 10_000, replacement=True, generator=rng)
    mean, deviation = MIXTURE[1:, label, None]
    points = mean + deviation * torch.randn(mean.shape, generator=rng)
    return ["left", "middle", "right"], points[:n], label[:n], points[n:], label[n:]


def data_share():
    """p_data exactly: its share below the first of EDGES, between each two, and above the last."""
    weight, mean, deviation = MIXTURE.double()[..., None]
    below = (weight * torch.special.ndtr((EDGES - mean) / deviation)).sum(dim=0)
    return torch.cat([below.new_zeros(1), below, below.new_ones(1)]).diff()


def share(points):
    """The share of points (n, 1) in the same places."""
    counts = torch.bincount(torch.bucketize(points[:, 0].cpu(), EDGES), minlength=len(EDGES) + 1)
    return counts.double() / len(points)


def distances(p, q):
    """Total variation, from 0 to 1, and Jensen-Shannon divergence, to log 2, of shares in bins."""
    divergence = sum(torch.special.xlogy(x, 2 * x / (p + q)).nansum() for x in (p, q)) / 2
    return {"total_variation": (p - q).abs().sum() / 2, "jensen_shannon": divergence}


@torch.no_grad()
def even_points(generator, n=100_000):
    """n evenly spaced z, and G there: its shares are those of p_g without the chance of drawing."""
    z = ((torch.arange(n) + 0.5) / n * 2 - 1) * math.sqrt(3)
    return z, generator(z[:, None].to(generator.layers[0].weight.device))


# ------------------------------------------------------------------ sampling
@torch.no_grad()
def sample(generator, n, seed=0):
    """n images (n, channels, size, size) in [0, 1], or points (n, 1); no other draws change."""
    return torch.cat([generator(z) for z in generator.draw(n, seed).split(500)])


@torch.no_grad()
def interpolate(generator, rows=10, columns=10, seed=0):
    """Figure 3: images (rows x columns); along a row z goes straight from one to another."""
    start, end = generator.draw(2 * rows, seed).view(2, rows, 1, -1)
    way = torch.linspace(0, 1, columns, device=start.device)[:, None]
    return generator(torch.lerp(start, end, way).flatten(0, 1))


def load_generator(path, device="cpu"):
    """The trained generator of a checkpoint, for `sample(load_generator(path), 64)`."""
    state = load_checkpoint(path)
    generator = Generator(state["data"]["shape"][1:])
    weights = state["model"].items()
    generator.load_state_dict({k[10:]: w for k, w in weights if k.startswith("generator.")})
    return generator.eval().requires_grad_(False).to(device)


def generate(args):
    """--generate: a hundred images, or the density on the line."""
    path = Path(args.out or "grid.png")
    if path.suffix and path.suffix.lower() not in IMG_EXTENSIONS:
        raise UsageError(f"--out {path}: no picture is written as {path.suffix}; .png or .jpg is")
    generator = load_generator(args.generate, choose_device(args.device))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(generator, path if path.suffix else f"{path}.png", args.seed)


def save_samples(model, path):
    """A picture of fixed noise; on the line a panel of figure 1."""
    save_picture(model.generator, f"{path}.png", discriminator=model.discriminator)


def save_picture(generator, path, seed=0, discriminator=None):
    """A hundred images; or figure 1: p_data dotted, p_g solid, D dashed, and G from z to x."""
    if generator.noise > 1:
        return save_image(sample(generator, 100, seed), path, nrow=10)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6, 3.2), layout="constrained")
    axis, below = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    centres, width = (EDGES[1:] + EDGES[:-1]) / 2, float(EDGES[1] - EDGES[0])
    axis.plot(centres, data_share()[1:-1] / width, ":", color="black", label="p_data")
    axis.plot(centres, share(even_points(generator)[1])[1:-1] / width, "g", lw=1, label="p_g")
    if discriminator is not None:
        with torch.no_grad():
            d = discriminator(centres[:, None].to(next(discriminator.parameters()).device))
        axis.plot(centres, d.sigmoid().cpu(), "b--", lw=1, label="D")
        axis.set_title(f"update {Path(path).stem.lstrip('0')}")
    z, x = even_points(generator, 24)
    below.plot(torch.stack([z, x[:, 0].cpu()]), torch.tensor([0, 1]), color="grey", lw=0.6)
    below.set_yticks([0, 1], ["z", "x"])
    axis.set(xlim=(-4, 4), ylim=(0, 1.05))
    axis.legend(loc="upper right", fontsize=7)
    figure.savefig(picture := io.BytesIO(), dpi=100)
    Image.open(picture).convert("RGB").save(path)  # in formats that matplotlib has not, too


# ------------------------------------------------------------------ evaluation and figures
@torch.no_grad()
def evaluate(model, data):
    """V, the mean of D on up to 1,000 test images and 1,000 samples, and how near p_g is to p_data:
    of images, log p of 500 held out by a Parzen window on those, far below that on 10,000."""
    G, D = model.generator, model.discriminator
    fake = sample(G, 1000, seed=1)
    real, generated = D(some(data.test, 1000)), D(fake)
    row = {"value": value(real, generated), "d_real": real.sigmoid().mean()}
    row["d_fake"] = generated.sigmoid().mean()
    if G.noise == 1:
        row |= distances(data_share(), share(even_points(G)[1]))
    else:
        held_out, sigmas = some(data.train[6::7], 500), np.geomspace(0.1, 0.5, 15).tolist()
        nats = parzen(held_out.flatten(1), fake.flatten(1), sigmas).mean(dim=1)
        row["parzen_estimate"] = nats.max()
    return {name: float(figure) for name, figure in row.items()}


def some(samples, n):
    """n of the samples, or all if there are fewer, at equal intervals, normalised."""
    n = min(n, len(samples))
    return normalise(samples[torch.arange(n, device=samples.device) * len(samples) // n])


def nearest(images, among):
    """The nearest to each image (n, ...) in [0, 1] of other, uint8, ones, and its distance (n,)."""
    flat = among.flatten(1) / 255
    found = [torch.cdist(x, flat).argmin(dim=1) for x in images.flatten(1).split(100)]
    neighbours = among[torch.cat(found)] / 255
    return neighbours, (images - neighbours).flatten(1).norm(dim=1)


def finish(model, data, folder, rows):
    """The pictures of a finished run, and what its summary.json has beside the last row."""
    save_curves(folder / "curves.png", rows)
    if data.name == "1d":
        save_strip(folder / "figure1.png", folder / "samples")
        return {}
    save_image(interpolate(model.generator), folder / "interpolation.png", nrow=10)
    seen, held_out = data.train[torch.arange(len(data.train)) % 7 < 6], data.train[6::7]
    images, real = sample(model.generator, SAMPLES), some(seen, SAMPLES)
    neighbours, distance = nearest(images[:1000], seen)
    pairs = torch.stack([images[:50], neighbours[:50]], dim=1).flatten(0, 1)
    save_image(pairs, folder / "nearest.png", nrow=10)  # figure 2: beside each sample its nearest
    of_images, of_real = (parzen_figures(x, data._replace(train=held_out)) for x in (images, real))
    return of_images | {
        "parzen_nats_of_real_images": of_real["parzen_nats"],
        "parzen_real_images": len(real),
        "nearest_training_image": distance.mean().item(),
        "nearest_training_image_of_real": nearest(some(data.test, 1000), seen)[1].mean().item(),
    }


def save_strip(path, folder):
    """Figure 1 over time: up to six of the panels in the folder, the first and the last too."""
    panels = sorted(folder.glob("*.png"))
    at = np.unique(np.geomspace(1, len(panels), 6).round().astype(int)) - 1  # most happens early
    strip = np.concatenate([np.asarray(Image.open(panels[i])) for i in at], axis=1)
    Image.fromarray(strip).save(path)


def save_curves(path, rows):
    """V and its optimum, and how near p_g is to p_data, against updates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(-math.log(4), color="grey", linestyle="--", label="-log 4")
    for name in ("value", "parzen_estimate", "total_variation", "jensen_shannon"):
        if points := [(row["step"], row[name]) for row in rows if name in row]:
            (left if name == "value" else right).plot(*zip(*points), ".-", label=name)
    for axis in (left, right):
        axis.set_xlabel("update")
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


# --- shared: parzen ---
@torch.no_grad()
def parzen(points, samples, sigmas, chunk=100):
    """log p (len(sigmas), n) in nats, float64, of points (n, d); p is the mean of Gaussians on the
    samples (m, d). Points may be uint8, for values in [0, 1]. Memory does not grow with n."""
    samples, (m, d) = samples.double(), samples.shape
    norms = samples.square().sum(dim=1)
    columns, hidden = [], None if sys.stderr else True  # None: where it is no terminal
    for x in tqdm(points.split(chunk), "Parzen window", leave=False, disable=hidden):
        x = (x if x.is_floating_point() else x / 255).double()
        square = (x.square().sum(dim=1, keepdim=True) + norms - 2 * x @ samples.T).clamp_min(0)
        windows = [
            (square / (-2 * s**2)).logsumexp(dim=1) - d * math.log(s * math.sqrt(2 * math.pi))
            for s in sigmas
        ]
        columns.append(torch.stack(windows))
    return torch.cat(columns, dim=1) - math.log(m)


def parzen_figures(samples, data):
    """The mean log-likelihood of data.test, its standard error, and sigma, chosen on data.train."""
    samples = samples.flatten(1)
    sigmas = np.geomspace(0.05, 1, 30).tolist()
    n = min(1000, len(data.train))
    held = data.train[torch.arange(n) * len(data.train) // n]  # of every class
    sigma = sigmas[parzen(held.flatten(1), samples, sigmas).mean(dim=1).argmax().item()]
    nats = parzen(data.test.flatten(1), samples, [sigma])[0]
    error = nats.std(correction=0).item() / math.sqrt(len(nats))
    figures = {"parzen_nats": nats.mean().item(), "parzen_standard_error": error}
    return figures | {"parzen_sigma": sigma}


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
