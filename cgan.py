# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.10", "torchvision", "numpy", "tqdm", "matplotlib", "scikit-learn"]
# ///
"""Conditional generative adversarial nets: images of the class that one asks for.

Mirza, Osindero 2014, https://arxiv.org/abs/1411.1784

    python cgan.py --epochs 10                 # MNIST; scikit-learn's digits if it is out of reach
    python cgan.py --network mlp --epochs 480  # the paper's own network, to its schedule's end
    python cgan.py --dataset folder --data-dir pictures    # its sub-folders are the classes
    python cgan.py --generate runs/.../checkpoint.pt --label 3 7 --out digits.png

Generator G and discriminator D of a GAN are both given the label y, here a class:

    min over G, max over D:  E[log D(x|y)] + E[log(1 - D(G(z|y)|y))]                 (equation 2)

The script measures what the paper measures: the log-likelihood of the test set under a Gaussian
Parzen window on 10,000 samples (table 1), with pixels in [0, 1]; the width sigma is the best of a
range for 1,000 training images. What the paper shows as a picture (figure 2) is measured too: label
fidelity, the share of samples that a classifier, trained on real images, puts in the class asked
for. samples/ holds the picture.

--network mlp is the paper's: its layers, noise, dropout, SGD and schedules. Where the paper is
silent it follows the code that it grew from (goodfeli/adversarial): initial weights, and a momentum
of 0.7 after 250 epochs of 500 updates. Departures:

- The default network is a convolutional pair of InfoGAN's size (https://arxiv.org/abs/1606.03657,
  appendix C) trained by Adam: better images of 28x28 grey and 32x32 colour in fewer updates. The
  label joins D at its last layer, as an inner product with the features (Miyato & Koyama 2018,
  https://arxiv.org/abs/1802.05637).
- G maximises log D instead of minimising log(1 - D), as in Goodfellow et al. 2014, section 3.
- The conv networks have normal noise. The paper's, uniform in the unit hypercube, was too weak
  beside the label: G drew one and the same image for a label (MNIST, seed 0, 936 updates).
- The mlp's G keeps its dropout in sampling, as it comes to use it as noise: of one network after
  5,682 updates the log-likelihood was -66 nats without and -23 with it (3,000 samples, 300 images).
- The paper stops at the best likelihood on a validation set; here a run ends with its last epoch.

Nothing here has a fused kernel: --kernels changes nothing.
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
import zlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torch import nn
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import save_image
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SCRIPT = "cgan"
LOSSES = ("loss_d", "loss_g")  # what train_step returns
MEASURED = ("label_fidelity",)  # what evaluate adds to the rows of metrics.csv
SETS = {}  # data sets of this script's own

NOISE = 100  # values of z
SAMPLES = 10_000  # for the closing measurements
DEFAULTS = {  # of each network, for the flags left out
    "conv": {"batch_size": 128, "lr_d": 2e-4, "lr_g": 1e-3},
    "mlp": {"batch_size": 100, "lr_d": 0.1, "lr_g": 0.1},
}


def arguments():
    """The choice of network, beside the flags that every script has."""
    parser = run_arguments("Conditional GAN (Mirza & Osindero 2014): images of a class by name.")
    parser.set_defaults(batch_size=None)
    add = parser.add_argument_group("conditional GAN").add_argument
    networks = "convolutional, batch 128, or the paper's own, batch 100 (conv)"
    add("--network", choices=tuple(DEFAULTS), default="conv", help=networks)
    rate = at_least(0, float)
    add("--lr-d", type=rate, help="D's learning rate, of mlp the first (conv: 2e-4, mlp: 0.1)")
    add("--lr-g", type=rate, help="G's learning rate, of mlp the first (conv: 1e-3, mlp: 0.1)")
    add("--label", nargs="+", metavar="NAME", help="with --generate: classes by name or number")
    return parser


# ------------------------------------------------------------------ networks
# Each G maps noise (n, NOISE) and labels int64 (n,) to images in (-1, 1); each D maps labels and
# one or more batches of images, all with these labels, to the scores (logits) of all batches.
# bias=False before batch norm, which would take the bias out again
def down(inputs, outputs, bias=True):
    return nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=bias)


def up(inputs, outputs, bias=True):
    return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=bias)


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


class ConvGenerator(nn.Module):
    """G of InfoGAN's tables 1 (28x28 grey) and 2 (32x32 colour), the label beside the noise."""

    def __init__(self, classes, shape):
        super().__init__()
        self.classes, inputs = classes, NOISE + len(classes)
        relu = nn.ReLU(inplace=True)
        if shape[0] == 1:
            layers = [
                nn.Linear(inputs, 1024, bias=False), nn.BatchNorm1d(1024), relu,
                nn.Linear(1024, 6272, bias=False), nn.BatchNorm1d(6272), relu,
                Unflatten(7), up(128, 64, bias=False), nn.BatchNorm2d(64), relu,
                up(64, 1), nn.Tanh(),
            ]  # fmt: skip
        else:
            layers = [
                nn.Linear(inputs, 1792, bias=False), nn.BatchNorm1d(1792), relu,
                Unflatten(2), up(448, 256, bias=False), nn.BatchNorm2d(256), relu,
                up(256, 128), relu,
                up(128, 64), relu,
                up(64, 3), nn.Tanh(),
            ]  # fmt: skip
        self.layers = nn.Sequential(*layers).apply(initialise)

    draw = staticmethod(torch.randn)  # noise: normal

    def forward(self, noise, label):
        return self.layers(torch.cat([noise, F.one_hot(label, len(self.classes))], dim=1))


class ConvDiscriminator(nn.Module):
    """D of the same tables; the score has the label's inner product with the features in it."""

    def __init__(self, classes, shape):
        super().__init__()
        # without running averages: real and generated images would mix in them
        norm1d = functools.partial(nn.BatchNorm1d, track_running_stats=False)
        norm2d = functools.partial(nn.BatchNorm2d, track_running_stats=False)
        leaky = nn.LeakyReLU(0.1, inplace=True)
        if shape[0] == 1:
            features, layers = 1024, [
                down(1, 64), leaky,
                down(64, 128, bias=False), norm2d(128), leaky,
                Flatten(),
                nn.Linear(6272, 1024, bias=False), norm1d(1024), leaky,
            ]  # fmt: skip
        else:
            features, layers = 4096, [
                down(3, 64), leaky,
                down(64, 128, bias=False), norm2d(128), leaky,
                down(128, 256, bias=False), norm2d(256), leaky,
                Flatten(),
            ]  # fmt: skip
        self.trunk = nn.ModuleList(layers)
        self.score = nn.Linear(features, 1)
        self.label = nn.Embedding(len(classes), features)
        self.apply(initialise)

    def forward(self, label, *batches):
        """One pass over all batches, each normalised by itself."""
        x, sizes = torch.cat(batches), [len(batch) for batch in batches]
        for layer in self.trunk:
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                x = torch.cat([layer(part) for part in x.split(sizes)])
            else:
                x = layer(x)
        label = self.label(label).repeat(len(batches), 1)
        return self.score(x).squeeze(1) + (x * label).sum(dim=1)


def initialise(module):
    """InfoGAN's initial weights: N(0, 0.02), in D's convolutions cut at two deviations."""
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    elif isinstance(module, (nn.Linear, nn.ConvTranspose2d, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


class MLPGenerator(nn.Module):
    """The paper's G: noise and label in layers of their own, then in a joint one (section 4.1).

    Its dropout stays on when it draws samples: in training G comes to use it as noise.
    """

    def __init__(self, classes, shape):
        super().__init__()
        self.classes, self.shape = classes, tuple(shape)
        self.noise = linear(NOISE, 200, 0.05)
        self.label = linear(len(classes), 1000, 0.05)
        self.joint = linear(1200, 1200, 0.05)
        self.pixels = linear(1200, math.prod(shape), 0.05)

    def start_at(self, image):
        """Sets the output biases so that untrained images are about this one, in [0, 1]."""
        self.pixels.bias.data.copy_(image.flatten().clamp(0.001, 0.999).logit())

    draw = staticmethod(torch.rand)  # noise: uniform in the unit hypercube

    def forward(self, noise, label):
        label = F.one_hot(label, len(self.classes)).float()
        x = dropout(torch.cat([self.noise(noise), self.label(label)], dim=1).relu())
        x = dropout(self.joint(x).relu())
        return torch.sigmoid(self.pixels(x)).view(-1, *self.shape) * 2 - 1


class MLPDiscriminator(nn.Module):
    """The paper's D: maxout layers for image and label, then a joint one; always with dropout."""

    def __init__(self, classes, shape):
        super().__init__()
        self.classes = len(classes)
        self.image = Maxout(math.prod(shape), 240, 5)
        self.label = Maxout(len(classes), 50, 5)
        self.joint = Maxout(290, 240, 4)
        self.score = linear(240, 1, 0.005)

    def forward(self, label, *batches):
        n, x = len(batches), torch.cat(batches).flatten(1) / 2 + 0.5  # pixels in [0, 1]
        label = F.one_hot(label, self.classes).float().repeat(n, 1)
        x = [dropout(self.image(x), n), dropout(self.label(label), n)]
        return self.score(dropout(self.joint(torch.cat(x, dim=1)), n)).squeeze(1)


def dropout(x, batches=1):
    """x, of one or more batches, with half of its values 0 and the others doubled.

    In training every process draws the masks of whole batches and takes its share.
    """
    rank, world = processes() if torch.is_grad_enabled() else (0, 1)
    keep = torch.rand(batches, len(x) // batches * world, x.shape[1], device=x.device) < 0.5
    return x * keep.chunk(world, dim=1)[rank].flatten(0, 1) * 2


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


NETWORKS = {"conv": (ConvGenerator, ConvDiscriminator), "mlp": (MLPGenerator, MLPDiscriminator)}


# ------------------------------------------------------------------ the training step
class PaperSGD(torch.optim.Optimizer):
    """SGD on the paper's schedule: each update divides the learning rate by 1.00004, down to 1e-6;
    the momentum rises from 0.5 to 0.7. The count of updates is on the device and in the checkpoint.
    """

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "capturable": True})  # keeps `step` on the device
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"step": torch.zeros((), device=p.device)}
            self.state[p]["velocity"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            step, velocity = self.state[p]["step"], self.state[p]["velocity"]
            decay = torch.exp(step * -math.log(1.00004))
            rate = (self.param_groups[0]["lr"] * decay).clamp_min(1e-6)
            momentum = 0.5 + 0.2 * (step / 125_000).clamp_max(1)
            p.add_(velocity.mul_(momentum).addcmul_(p.grad, -rate))
            step += 1


class Model:
    """Both networks and their optimisers; `parts` is what a checkpoint keeps."""

    def __init__(self, args, data, device):
        if len(data.classes) < 2:
            raise UsageError(
                f"--data-dir {args.data_dir} has one class; a conditional GAN needs two or more: "
                "put the images of each class in a sub-folder of its name"
            )
        for name, value in DEFAULTS[args.network].items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        self.args, self.images_per_step, self.kernels = args, args.batch_size, "reference"
        self.data, self.classifier = data, None  # the classifier is trained or read when needed
        generator, discriminator = NETWORKS[args.network]
        self.generator = generator(data.classes, data.train.shape[1:])
        self.discriminator = discriminator(data.classes, data.train.shape[1:])
        for network in (self.generator, self.discriminator):
            network.to(device, memory_format=torch.channels_last)
        weights_g, weights_d = self.generator.parameters(), self.discriminator.parameters()
        if args.network == "mlp":
            self.generator.start_at(data.train.mean(dim=0, dtype=torch.float32) / 255)
            self.optimizer_g = PaperSGD(weights_g, args.lr_g)
            self.optimizer_d = PaperSGD(weights_d, args.lr_d)
        else:
            adam = {"betas": (0.5, 0.999), "fused": True, "capturable": device.type == "cuda"}
            self.optimizer_g = torch.optim.Adam(weights_g, args.lr_g, **adam)
            self.optimizer_d = torch.optim.Adam(weights_d, args.lr_d, **adam)
        names = ("generator", "discriminator", "optimizer_g", "optimizer_d")
        self.parts = {name: getattr(self, name) for name in names}


def train_step(model, data, index):
    """One update of D, then one of G, on the images data.train[index]; never synchronises.

    Returns the LOSSES as one tensor, in nats.
    """
    g, d = model.generator, model.discriminator
    noise = mine(g.draw(len(index), NOISE, device=index.device))
    index = mine(index)
    real, label = normalise(data.train[index]), data.train_labels[index]
    fake = g(noise, label)  # the labels of the real images; one pass serves both updates

    score_real, score_fake = d(label, real, fake.detach()).chunk(2)
    loss_d = F.softplus(-score_real).mean() + F.softplus(score_fake).mean()
    model.optimizer_d.zero_grad()
    loss_d.backward()
    update(model.optimizer_d)

    loss_g = F.softplus(-d(label, fake)).mean()
    model.optimizer_g.zero_grad()
    loss_g.backward(inputs=list(g.parameters()))  # no gradient for D's weights
    update(model.optimizer_g)
    return torch.stack([loss_d, loss_g]).detach()


def normalise(images):
    """uint8 images as float32 in (-1, 1), in the memory order that convolutions like best."""
    return images.contiguous(memory_format=torch.channels_last).float() / 127.5 - 1


# ------------------------------------------------------------------ sampling
@torch.no_grad()
def sample(generator, labels, seed=0):
    """An image in [0, 1] for each class number in labels, from a generator in evaluation mode."""
    device = next(generator.parameters()).device
    images = []
    with own_random_numbers(device, seed):
        for part in torch.as_tensor(labels, device=device).split(500):  # so that memory stays flat
            noise = generator.draw(len(part), NOISE, device=device)
            images.append(generator(noise, part) / 2 + 0.5)
    return torch.cat(images)


def sample_rows(generator, labels, columns=10, seed=0):
    """The images of `sample`, in rows of one label each."""
    return sample(generator, torch.tensor(labels).repeat_interleave(columns), seed)


def class_number(classes, name):
    """The class of that name, or else of that number."""
    for names in (classes, [str(i) for i in range(len(classes))]):
        if name in names:
            return names.index(name)
    raise UsageError(
        f"--label {name}: the classes are {', '.join(classes)}; name them or count from 0"
    )


def load_generator(path, device="cpu"):
    """The trained generator of a checkpoint, for `sample(load_generator(path), [3, 3, 7])`."""
    state = load_checkpoint(path)
    generator = NETWORKS[state["config"]["network"]][0](state["classes"], state["shape"])
    load_parts({"generator": generator}, state, path)
    return generator.eval().requires_grad_(False).to(device)


def generate(args, path):
    """--generate: a row of ten images for each label asked for, or for each there is."""
    generator = load_generator(args.generate, choose_device(args.device))
    labels = [class_number(generator.classes, name) for name in args.label or generator.classes]
    save_image(sample_rows(generator, labels, seed=args.seed), path, nrow=10)


def save_samples(model, path):
    """Figure 2: a row for each label; its columns are different noise."""
    labels = range(len(model.generator.classes))
    save_image(sample_rows(model.generator, labels), path, nrow=10)


def save_curves(path, rows):
    """Label fidelity at the ends of epochs and the losses, against updates."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    measured = [row for row in rows if row["label_fidelity"] is not None]
    left.plot(
        [row["step"] for row in measured], [row["label_fidelity"] for row in measured], marker="."
    )
    for name in LOSSES:
        right.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
    left.set(xlabel="update", ylabel="label fidelity", ylim=(0, 1.02))
    right.set(xlabel="update", ylabel="nats")
    right.legend()
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------ evaluation
def evaluate(model, data):
    """Label fidelity of about 1,000 samples, as many of each class."""
    labels = every_class(data.classes, 1000, data.train.device)
    return {"label_fidelity": right_labels(model, data, sample(model.generator, labels), labels)[0]}


def every_class(classes, n, device):
    """About n labels, as many of each class."""
    return torch.arange(len(classes), device=device).repeat_interleave(max(1, n // len(classes)))


def right_labels(model, data, images, labels):
    """Share of images that the classifier puts in the class asked for: over all, and per class."""
    if model.classifier is None:
        model.classifier = load_classifier(data, Path(model.args.data_dir))
    right = (classify(model.classifier[0], images) == labels).double()
    share = right.view(len(data.classes), -1).mean(dim=1).tolist()
    return right.mean().item(), dict(zip(data.classes, share))


@torch.no_grad()
def parzen(points, samples, sigmas, chunk=100):
    """log p(x) in nats of each point (n, d), p being the mean of Gaussians on the samples (m, d).

    Points may be uint8, for values in [0, 1]. Returns float64 (len(sigmas), n); the memory beside
    does not grow with n.
    """
    samples, (m, d) = samples.double(), samples.shape
    norms = samples.square().sum(dim=1)
    columns = []
    for x in tqdm(points.split(chunk), desc="Parzen window", disable=None, leave=False):
        x = unit(x).double()
        square = (x.square().sum(dim=1, keepdim=True) + norms - 2 * x @ samples.T).clamp_min(0)
        windows = [
            (square / (-2 * s**2)).logsumexp(dim=1) - d * math.log(s * math.sqrt(2 * math.pi))
            for s in sigmas
        ]
        columns.append(torch.stack(windows))
    return torch.cat(columns, dim=1) - math.log(m)


def parzen_figures(samples, data):
    """Table 1: mean log-likelihood of the test set, its standard error, and sigma."""
    samples = samples.flatten(1)
    sigmas = np.geomspace(0.05, 1, 30).tolist()
    n = min(1000, len(data.train))
    held = data.train[torch.arange(n) * len(data.train) // n]  # of every class
    sigma = sigmas[parzen(held.flatten(1), samples, sigmas).mean(dim=1).argmax().item()]
    nats = parzen(data.test.flatten(1), samples, [sigma])[0]
    error = nats.std(correction=0).item() / math.sqrt(len(nats))
    return {
        "parzen_nats": nats.mean().item(),
        "parzen_standard_error": error,
        "parzen_sigma": sigma,
    }


def finish(model, folder, rows):
    """The closing picture and measurements, on 1,000 samples for each label of ten."""
    save_curves(folder / "curves.png", rows)
    data = model.data
    labels = every_class(data.classes, SAMPLES, data.train.device)
    images = sample(model.generator, labels)
    share, per_class = right_labels(model, data, images, labels)
    return parzen_figures(images, data) | {
        "label_fidelity": share,
        "label_fidelity_per_class": per_class,
        "classifier_accuracy": model.classifier[1],
    }


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


# --- shared: classifier ---
class Classifier(nn.Module):
    """A small convolutional network: features (n, 128) and logits of images in [0, 1]."""

    def __init__(self, classes, shape):
        super().__init__()
        channels, size, _ = shape
        layers = []
        for inputs, outputs in ((channels, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(64 * (size // 8) ** 2, 128), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.logits = nn.Linear(128, len(classes))

    def forward(self, images):
        features = self.features(images * 2 - 1)
        return features, self.logits(features)


@torch.no_grad()
def classify(classifier, images):
    """The most likely class of each image."""
    return torch.cat([classifier(unit(x))[1].argmax(dim=1) for x in images.split(500)])


def unit(images):
    """Images, uint8 or already floats in [0, 1], as floats in [0, 1]."""
    return images if images.is_floating_point() else images / 255


def load_classifier(data, folder):
    """A classifier trained on the training images, and its accuracy on the test images.

    It is kept in the folder for the next time. One that is there, but damaged or trained on other
    images, is replaced; a folder that can not be written is no obstacle.
    """
    path, images = Path(folder) / f"classifier-{data.name}.pt", 0
    for tensor in (data.train, data.train_labels, data.test, data.test_labels):
        images = zlib.crc32(tensor.cpu().numpy(), images)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # where initial weights draw no random numbers
            classifier = Classifier(data.classes, data.train.shape[1:])
        classifier.load_state_dict(state["classifier"], assign=True)
        if state["images"] == images:
            return classifier.eval().to(data.train.device), float(state["accuracy"])
    except Exception:  # there is none, or it is damaged, which raises many kinds
        pass
    classifier, accuracy = train_classifier(data)
    state = {"classifier": classifier.state_dict(), "accuracy": accuracy, "images": images}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, buffer.getbuffer())
    except OSError as error:
        print(f"{SCRIPT}: the classifier is not kept ({one_line(error)})", file=sys.stderr)
    return classifier, accuracy


@contextlib.contextmanager
def own_random_numbers(device, seed=0):
    """Random numbers from a seed of their own; those of the run stay as they are."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def train_classifier(data, epochs=3, least=150, batch=128):
    """Adam on images moved by up to 2 pixels; the run's own random numbers stay as they are."""
    device, n, size = data.train.device, len(data.train), data.train.shape[-1]
    batch = min(batch, n)
    steps = max(epochs * (n // batch), least)
    with own_random_numbers(device):
        classifier = Classifier(data.classes, data.train.shape[1:])
        classifier.to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(classifier.parameters(), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        padded, at = F.pad(data.train, (2, 2, 2, 2)), torch.arange(size, device=device)
        for step in tqdm(range(steps), desc="classifier", disable=None, leave=False):
            at_batch = step % (n // batch)
            if at_batch == 0:
                order = torch.randperm(n, device=device)
            index = order[at_batch * batch :][:batch, None]
            y, x = torch.randint(5, (2, batch, 1), device=device) + at
            images = padded[index[..., None], :, y[:, :, None], x[:, None]].permute(0, 3, 1, 2)
            loss = F.cross_entropy(classifier(unit(images))[1], data.train_labels[index[:, 0]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    right = classify(classifier.eval(), data.test) == data.test_labels
    return classifier, right.double().mean().item()


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
