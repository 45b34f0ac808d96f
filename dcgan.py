# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.10", "torchvision", "numpy", "tqdm", "matplotlib", "scikit-learn"]
# ///
"""DCGAN (Radford, Metz & Chintala 2015, https://arxiv.org/abs/1511.06434): convolutional networks
that train stably as a GAN, and whose discriminator has learned features worth having.

    python dcgan.py --epochs 25               # MNIST; scikit-learn's digits if it is out of reach
    python dcgan.py --dataset mnist --label   # conditional: digits of the class one asks for
    python dcgan.py --data-dir pictures --image-size 64 --width 32
    python dcgan.py --generate runs/.../checkpoint.pt --out grid.png

MNIST, --label --precision bf16: the nearest of 50,000 samples errs on 3.27 % of the test set, of as
many real images on 3.34 (n = 1, two hours of a core). After 10 epochs of Fashion-MNIST an SVM on
D's features errs on 16.3 % (20 draws of labels, one run), untrained 18.2. Every run: docs/dcgan.md.

The networks follow the guidelines of section 3, for sides of 16 to 256 and any channels:

- no pooling: strided convolutions in D, fractionally strided ones in G, 5x5, which halve and double
  the side; the maps double and halve with it (at 64 pixels G has 1024, 512, 256 and 128);
- no hidden fully connected layers: noise is projected to a small image, D's last maps to a score;
- batch norm in every layer but G's output and D's input;
- G has ReLU, and tanh at its output, D leaky ReLU of slope 0.2.

Noise is uniform in (-1, 1); weights start at N(0, 0.02); Adam has a rate of 0.0002 and beta1 0.5.
With --label, as in the authors' code for MNIST (Newmu/dcgan_code), the class joins every layer of
both as constant maps, both have a hidden fully connected layer (without it the samples are far less
varied), batch norm has no gain and bias, and the rate falls to 0 in the second half of --epochs.

What the script measures of the paper's claims:

- Section 5.2: a linear L2-SVM on D's features (every layer max-pooled to 4x4) that learns from
  1,000 labels: C chosen by validation images, then mean and spread over fresh draws of labels.
  Beside it the controls that the paper lacks: the same D untrained, and raw pixels.
- Section 6.1: how even a walk between two noises is: its largest step over the mean one, in a
  classifier's features (1 is even), beside that of the images faded into each other.
- Section 6.3.2: arithmetic on the means of three noises. Bright A - dark A + dark C should be a
  bright C: how often a classifier says C, and what share of the brightness comes along.
- Appendix, with --label: the test error of the nearest of 50,000 samples, of as many real images.

Departures: G learns from the fakes that D has just been shown, the authors' from another batch; no
weight decay (theirs 1e-5, MNIST 2.5e-5). Images are drawn by batch norm's running averages, theirs
by the batch's (--batch-statistics). On MNIST they train with 50,000 images and a sigmoid, here with
all 60,000 (whose nearest errs on 3.09 %) and tanh. No fused kernel: --kernels changes nothing.
"""

import argparse
import copy
import functools
import io
import itertools
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
from sklearn.svm import LinearSVC
from torch import nn
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

SCRIPT = "dcgan"
SETS = {}  # data sets of this script's own
NOISE = 100  # values of z
HIDDEN = 1024  # units of the fully connected layers that come with classes
PENALTIES = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01)  # C of the SVM, the authors' range


# ------------------------------------------------------------------ arguments
def arguments():
    """The size of the networks and the label, beside the flags that every script has."""
    parser = run_arguments("DCGAN (Radford et al. 2015): convolutional networks that train stably.")
    parser.add_argument("--dataset", choices=DATASETS, default="auto", help="auto: images or MNIST")
    parser.add_argument("--data-dir", default="data", help="of data sets, or your own images")
    size = "of a folder: 28 is grey, others in colour"
    parser.add_argument("--image-size", type=multiple_of_four, default=32, metavar="N", help=size)
    add = parser.add_argument_group("DCGAN").add_argument
    width = "maps of D's first layer, which double from layer to layer; None: 64 at 28x28, else 128"
    add("--width", type=at_least(1, high=1024), help=width)
    add("--lr", type=at_least(0, float), default=2e-4, help="learning rate of both networks")
    add("--draws", type=at_least(2), default=20, help="of labels, for the error of the SVM")
    label = "train with the classes; with --generate: which to draw, by name or number"
    add("--label", nargs="*", metavar="NAME", help=label)
    add("--batch-statistics", action="store_true", help="with --generate: the batch's own, in norm")
    return parser


def multiple_of_four(text):
    """An argparse type: sides that the networks can halve twice."""
    side = at_least(16, high=256)(text)
    if side % 4:
        raise argparse.ArgumentTypeError(f"{side} is no multiple of 4")
    return side


def suit(args, data):
    """Gives the flags that were left out what suits the data."""
    if args.label or args.batch_statistics:
        raise UsageError("names for --label and --batch-statistics go with --generate CHECKPOINT")
    odd = len(data.classes) < 2 or {"", "train", "test", "val"} & {*data.classes}
    if args.label is not None and odd:
        raise UsageError(f"--label needs two or more classes, in sub-folders, not {data.classes}")
    many = len(data.train) > 9999
    args.epochs = args.epochs or ((25 if args.label is None else 36) if many else 50)
    args.batch_size = args.batch_size or min(128 if many else 32, len(data.train))
    args.width = args.width or (64 if data.train.shape[-1] == 28 else 128)


# ------------------------------------------------------------------ networks (section 3)
def maps_and_side(size, width):
    """The maps of D's layers, each of which halves the side, and the side after the last:
    width * (1, 2, 4, 8) and 4 for 64 pixels, width * (1, 2) and 7 for 28."""
    maps, side = [width], size // 2
    while side % 2 == 0 and side > 4:
        maps, side = [*maps, 2 * maps[-1]], side // 2
    return maps, side


class Generator(nn.Module):
    """G(noise, label) -> images in (-1, 1), of noise (n, 100) and, with classes, int64 (n,)."""

    def __init__(self, shape=(1, 28, 28), width=64, classes=()):
        super().__init__()
        maps, side = maps_and_side(shape[-1], width)
        self.classes, k, last, relu = classes, len(classes), maps[-1], nn.ReLU(inplace=True)
        layers = [dense(NOISE + k, HIDDEN, relu)] if k else []
        project = dense(HIDDEN + k if k else NOISE, last * side**2, relu, affine=not k)
        layers.append(project.append(nn.Unflatten(1, (last, side, side))))
        for inputs, outputs in itertools.pairwise(reversed(maps)):
            norm = nn.BatchNorm2d(outputs, affine=not k)
            layers.append(nn.Sequential(doubling(inputs + k, outputs), norm, relu))
        layers.append(nn.Sequential(doubling(width + k, shape[0]), nn.Tanh()))
        self.layers = nn.ModuleList(layers).apply(initialise)

    def draw(self, n, rng=None):
        """Noise (n, 100): uniform in (-1, 1)."""
        device = self.layers[0][0].weight.device
        return torch.rand(n, NOISE, device=device, generator=rng) * 2 - 1

    def forward(self, noise, label=None):
        x = noise
        for layer in self.layers:
            x = layer(with_label(x, label, len(self.classes)))
        return x


class Discriminator(nn.Module):
    """D(x, label) -> score (n,), a logit, of images (n, channels, size, size) in [-1, 1]."""

    def __init__(self, shape=(1, 28, 28), width=64, classes=()):
        super().__init__()
        maps, side = maps_and_side(shape[-1], width)
        self.k, leaky = len(classes), nn.LeakyReLU(0.2, inplace=True)
        layers = [nn.Sequential(halving(shape[0] + self.k, width), leaky)]
        for inputs, outputs in itertools.pairwise(maps):
            norm = nn.BatchNorm2d(outputs, affine=not self.k)
            layers.append(nn.Sequential(halving(inputs + self.k, outputs), norm, leaky))
        self.layers = nn.ModuleList(layers)
        inputs = maps[-1] * side**2 + self.k
        self.hidden = dense(inputs, HIDDEN, leaky) if self.k else nn.Identity()
        self.score = nn.Linear(HIDDEN + self.k if self.k else inputs, 1)
        self.apply(initialise)

    def activations(self, x, label=None):
        """What every convolutional layer answers, the first one first."""
        found = []
        for layer in self.layers:
            x = layer(with_label(x, label, self.k))
            found.append(x)
        return found

    def forward(self, x, label=None):
        x = self.activations(x, label)[-1].flatten(1)
        for layer in (self.hidden, self.score):
            x = layer(with_label(x, label, self.k))
        return x.squeeze(1).float()  # of bf16, too


def dense(inputs, outputs, activation, affine=False):
    """A fully connected layer with batch norm."""
    norm = nn.BatchNorm1d(outputs, affine=affine)
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), norm, activation)


def doubling(inputs, outputs):
    """A fractionally strided 5x5 convolution, which doubles the side."""
    return nn.ConvTranspose2d(inputs, outputs, 5, 2, padding=2, output_padding=1, bias=False)


def halving(inputs, outputs):
    """A strided 5x5 convolution, which halves the side."""
    return nn.Conv2d(inputs, outputs, 5, 2, padding=2, bias=False)


def with_label(x, label, classes):
    """Vectors or maps x with the label beside them, one-hot, in maps at each place; or x alone."""
    if not classes:
        return x
    one_hot = F.one_hot(label, classes).to(x.dtype)
    if x.ndim == 4:
        maps = one_hot[:, :, None, None].expand(-1, -1, *x.shape[2:])
        one_hot = maps.contiguous(memory_format=torch.channels_last)  # as x is, or all is copied
    return torch.cat([x, one_hot], dim=1)


def initialise(module):
    """The paper's initial weights: N(0, 0.02); batch norm's gain N(1, 0.02), as in the code."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.affine:
        nn.init.normal_(module.weight, 1, 0.02)


# ------------------------------------------------------------------ the training step
def train_step(model, real, label):
    """One update of D, then one of G, on real images (batch, channels, size, size) and labels.

    Networks without classes leave the labels alone. Returns the losses in nats.
    """
    G, D = model.generator, model.discriminator
    fake = G(G.draw(len(real)), label)  # one pass of G serves both updates

    # real and generated images have batch statistics of their own
    score_real, score_fake = D(real, label), D(fake.detach(), label)
    loss_d = F.softplus(-score_real).mean() + F.softplus(score_fake).mean()
    model.optimizer_d.zero_grad()
    loss_d.backward()
    model.optimizer_d.step()

    loss_g = F.softplus(-D(fake, label)).mean()
    model.optimizer_g.zero_grad()
    loss_g.backward(inputs=list(G.parameters()))  # no gradient for D's weights
    model.optimizer_g.step()
    return {"loss_d": loss_d, "loss_g": loss_g}


def normalise(images):
    """uint8 images as float32 in (-1, 1), in the memory order that convolutions like best."""
    return images.contiguous(memory_format=torch.channels_last).float() / 127.5 - 1


class Model(nn.Module):
    """Both networks and their optimisers, as train_step takes them."""

    def __init__(self, args, data):
        super().__init__()
        self.args, self.samples_per_step, self.kernels = args, args.batch_size, "reference"
        sizes = data.train.shape[1:], args.width, data.classes if args.label is not None else ()
        self.generator, self.discriminator = Generator(*sizes), Discriminator(*sizes)
        self.to(data.train.device, memory_format=torch.channels_last)
        adam = {"lr": args.lr, "betas": (0.5, 0.999), "fused": True, "capturable": True}
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), **adam)
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), **adam)
        self.optimizers = [self.optimizer_g, self.optimizer_d]
        if args.label is not None:
            for optimizer in self.optimizers:
                let_fall(optimizer, args.lr, args.epochs * (len(data.train) // args.batch_size))

    def batch(self, data, index):
        """What train_step takes of the samples of these numbers."""
        return normalise(data.train[index]), data.train_labels[index]


def let_fall(optimizer, lr, end):
    """The rate stays for half of the updates, and then falls to 0 in a straight line."""
    first = optimizer.param_groups[0]["params"][0]
    optimizer.param_groups[0]["lr"] = torch.tensor(lr, device=first.device)

    def fall(adam, *_):  # on the device and from Adam's own count, which a checkpoint has
        if state := adam.state.get(first):  # there is none before the first step
            adam.param_groups[0]["lr"].copy_(lr * (2 - 2 * state["step"] / end).clamp(0, 1))

    optimizer.register_step_pre_hook(fall)


# ------------------------------------------------------------------ sampling
@torch.no_grad()
def sample(generator, n, label=None, seed=0, batch_statistics=False):
    """n images (n, channels, size, size) in [0, 1], from a generator in evaluation mode.

    label holds a class number for each; left out, the classes take turns. batch_statistics: batch
    norm by the statistics of up to 500 images drawn together, instead of its running averages.
    """
    if batch_statistics:
        generator = copy.deepcopy(generator).train()
    noise = generator.draw(n, own_rng(generator, seed))
    label = torch.arange(n) % max(1, len(generator.classes)) if label is None else label
    label = torch.as_tensor(label, device=noise.device)
    k = max(1, math.ceil(n / 500))  # so that memory stays flat
    parts = zip(noise.chunk(k), label.chunk(k))
    return torch.cat([generator(*part) / 2 + 0.5 for part in parts])


def own_rng(network, seed):
    """A random stream on the network's device that leaves the training's own alone."""
    return torch.Generator(next(network.parameters()).device).manual_seed(seed)


def class_number(classes, name):
    """The class of that name, or else of that number."""
    for names in (classes, [str(i) for i in range(len(classes))]):
        if name in names:
            return names.index(name)
    known = f"the classes are {', '.join(classes)}; name them or count from 0"
    raise UsageError(f"--label {name}: {known if classes else 'it was trained without --label'}")


def load_generator(path, device="cpu"):
    """The trained generator of a checkpoint, for `sample(load_generator(path), 64)`."""
    state = load_checkpoint(path)
    (classes, (_, *shape)), config = state["data"].values(), state["config"]
    generator = Generator(shape, config["width"], () if config["label"] is None else classes)
    weights = state["model"].items()
    generator.load_state_dict({k[10:]: w for k, w in weights if k.startswith("generator.")})
    return generator.eval().requires_grad_(False).to(device)


def generate(args):
    """--generate: a hundred images, or a row of ten for each label asked for."""
    path = Path(args.out or "grid.png")
    if path.suffix and path.suffix.lower() not in IMG_EXTENSIONS:
        raise UsageError(f"--out {path}: no picture is written as {path.suffix}; .png or .jpg is")
    generator = load_generator(args.generate, choose_device(args.device))
    labels = [class_number(generator.classes, name) for name in args.label or ()]
    labels = torch.tensor(labels).repeat_interleave(10) if labels else None
    n = 100 if labels is None else len(labels)
    images = sample(generator, n, labels, args.seed, args.batch_statistics)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(images, path if path.suffix else f"{path}.png", nrow=10)


def save_samples(model, path):
    """A hundred images; with classes, each column is one of the first ten."""
    columns = min(10, len(model.generator.classes)) or 10
    images = sample(model.generator, 10 * columns, torch.arange(10 * columns) % columns)
    save_image(images, f"{path}.png", nrow=columns)


@torch.no_grad()
def walks(generator, rows=10, steps=10, seed=1):
    """Images (rows, steps, channels, size, size) on straight lines between two noises (figure 4).

    With classes, row r is of class r, modulo their number.
    """
    start, end = generator.draw(2 * rows, own_rng(generator, seed)).chunk(2)
    label = torch.arange(rows, device=start.device) % max(1, len(generator.classes))
    line = torch.linspace(0, 1, steps).tolist()
    images = [generator(torch.lerp(start, end, t), label) / 2 + 0.5 for t in line]
    return torch.stack(images, dim=1)


# ------------------------------------------------------------------ D's features (section 5)
def with_fixed_statistics(discriminator, images):
    """A copy whose batch norm has the mean statistics of batches of 128 of these uint8 images."""
    fixed = copy.deepcopy(discriminator).train()
    for module in fixed.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # plain means
    with torch.no_grad():
        k = math.ceil(len(images) / 128)
        for i in range(k):  # each batch from all over the set, which may be in the order of classes
            fixed.activations(normalise(images[i::k]))
    return fixed.eval()


@torch.no_grad()
def features(discriminator, images):
    """Every layer's maps max-pooled to 4x4, as rows of a NumPy array, of uint8 images."""
    rows = []
    for x in images.split(500):
        layers = discriminator.activations(normalise(x))
        rows.append(torch.cat([F.adaptive_max_pool2d(a, 4).flatten(1) for a in layers], dim=1))
    return torch.cat(rows).cpu().numpy()


def pixels(images):
    """The control: the images themselves."""
    return normalise(images).flatten(1).cpu().numpy()


def labelled_draws(labels, n, rng, per_class=100):
    """n draws of numbers of labels (1,000 at most), as many of each class."""
    members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    per_class = max(1, min(per_class, 1000 // len(members), min(map(len, members)) // 2))
    for _ in range(n):
        yield np.concatenate([rng.choice(m, per_class, replace=False) for m in members])


def svm_error(extract, images, labels, tests, penalties):
    """Errors (len(penalties),) on tests (rows, labels) of SVMs that learn from these images."""
    rows, truth = tests
    base, x = np.linalg.qr(extract(images).T)  # in the space that they span an SVM is the same
    machines = [LinearSVC(C=c, random_state=0).fit(x.T, labels) for c in penalties]
    return np.array([np.mean(machine.predict(rows @ base) != truth) for machine in machines])


def svm_protocol(extract, data, draws):
    """Section 5.2: the mean test error over fresh draws of 1,000 labels, its spread (1.96 standard
    deviations), and C, the best on a sixth of the training images over ten draws of the others."""
    rng, labels = np.random.default_rng(0), data.train_labels.cpu().numpy()
    shuffled = rng.permutation(len(labels))
    held, pool = shuffled[: len(labels) // 6][:10_000], shuffled[len(labels) // 6 :]

    def errors(n, tests, penalties):
        hidden = None if sys.stderr else True  # None: where it is no terminal
        draws_of_labels = labelled_draws(labels[pool], n, rng)
        for index in tqdm(draws_of_labels, "SVM", n, leave=False, disable=hidden):
            chosen = pool[index]
            yield svm_error(extract, data.train[chosen], labels[chosen], tests, penalties)

    validation = extract(data.train[held]), labels[held]
    mean = np.mean([*errors(10, validation, PENALTIES)], axis=0)
    best = PENALTIES[mean.argmin()]
    tests = extract(data.test), data.test_labels.cpu().numpy()
    found = np.concatenate([*errors(draws, tests, [best])])
    return {"error": found.mean(), "spread": 1.96 * found.std(), "c": best}


# ------------------------------------------------------------------ the other measures
def evaluate(model, data):
    """How far D's features, or the labelled samples, carry a simple classifier by now.

    Without --label the SVM's error, of one draw of labels and C = 0.001, with it the nearest
    neighbour's among 1,000 samples; on up to 1,000 test images.
    """
    if not labelled(data):
        return {}
    at = evenly(data.test, 1000)
    test, truth = data.test[at], data.test_labels[at]
    if model.generator.classes:
        return {"neighbour_estimate": neighbour_error(model.generator, test, truth, 1000)}
    labels = data.train_labels.cpu().numpy()
    (index,) = labelled_draws(labels, 1, np.random.default_rng(0))
    images = data.train[index]
    extract = functools.partial(features, with_fixed_statistics(model.discriminator, images))
    tests = extract(test), truth.cpu().numpy()
    return {"svm_estimate": svm_error(extract, images, labels[index], tests, [0.001]).item()}


def evenly(images, most):
    """Numbers of so many of the images at most, of all classes where they are in their order."""
    n = min(most, len(images))
    return torch.arange(n, device=images.device) * len(images) // n


def labelled(data):
    """Whether there are classes to tell apart, of enough images to learn and to choose from."""
    return len(data.classes) > 1 and data.train_labels.bincount().min() >= 12


def neighbour_error(generator, test, truth, n):
    """The error on the test images of the nearest of n samples, as many of each class."""
    samples = sample(generator, n)
    labels = torch.arange(n, device=samples.device) % len(generator.classes)
    return nearest_error(test, truth, samples, labels)


def nearest_error(points, truth, images, labels):
    """The share of points whose nearest image has another label; uint8, or floats in [0, 1]."""
    rows = unit(images).flatten(1)
    half, wrong = torch.linalg.vector_norm(rows, dim=1).square() / 2, 0  # makes no copy of rows
    for x, label in zip(points.split(500), truth.split(500)):
        nearest = (unit(x).flatten(1) @ rows.T - half).argmax(dim=1)
        wrong += (labels[nearest] != label).sum().item()
    return wrong / len(points)


def evenness(images, classifier):
    """The largest step of walks (n, images, ...) over their mean one, in a classifier's features.

    A mean over the walks: equal steps have 1, and a single leap has as many as there are steps.
    """
    with torch.no_grad():
        walked = torch.stack([classifier(walk)[0] for walk in images])
    steps = walked.diff(dim=1).norm(dim=2)
    return (steps.amax(dim=1) / steps.mean(dim=1).clamp_min(1e-9)).mean().item()


@torch.no_grad()
def concepts(generator, classifier, n=2000, few=3, seed=2):
    """{class: (bright, dark)} of the classes that the classifier finds among n images: the mean
    noise (100,) of the few brightest and of the few darkest images of it (section 6.3.2)."""
    noise, images = generator.draw(n, own_rng(generator, seed)), sample(generator, n, seed=seed)
    found, brightness, means = classify(classifier, images), images.flatten(1).mean(dim=1), {}
    for c in found.unique().tolist()[:10]:
        (index,) = (found == c).nonzero(as_tuple=True)
        index = index[brightness[index].argsort()]
        if len(index) >= 2 * few:
            means[c] = noise[index[-few:]].mean(dim=0), noise[index[:few]].mean(dim=0)
    return means


@torch.no_grad()
def arithmetic(generator, means):
    """Bright A - dark A + dark C for every two classes: C (n,) and images (n, 5, ...) in [0, 1] of
    bright A, dark A, dark C, the result, and the result of the same sum of pixels."""
    pairs = [(a, c) for a in means for c in means if a != c]
    bright, dark = torch.stack([torch.stack(means[a]) for a, _ in pairs]).unbind(dim=1)
    start = torch.stack([means[c][1] for _, c in pairs])
    noises = (bright, dark, start, bright - dark + start)
    images = [generator(noise) / 2 + 0.5 for noise in noises]
    images.append((images[0] - images[1] + images[2]).clamp(0, 1))
    return torch.tensor([c for _, c in pairs], device=start.device), torch.stack(images, dim=1)


def arithmetic_figures(classes, images, classifier):
    """What became of class and brightness in `arithmetic`: of the noise, of dark C, of pixels."""
    found = torch.stack([classify(classifier, column) for column in images.unbind(1)])
    *_, start_is_c, result_is_c, pixels_are_c = (found == classes).double().mean(dim=1).tolist()
    bright, dark, start, result, _ = images.flatten(2).mean(dim=(0, 2)).tolist()
    return {
        "arithmetic_class": result_is_c,
        "arithmetic_class_of_dark_c": start_is_c,
        "arithmetic_class_in_pixels": pixels_are_c,
        "arithmetic_brightness": (result - start) / (bright - dark),
    }


# ------------------------------------------------------------------ figures
def finish(model, data, folder, rows):
    """The pictures of a finished run, and what its summary.json has beside the last row."""
    G, D = model.generator, model.discriminator
    save_curves(folder / "curves.png", rows)
    save_image(walks(G).flatten(0, 1), folder / "walks.png", nrow=10)
    save_filters(D, folder / "filters.png")
    if not labelled(data):
        return {}
    classifier, accuracy = train_classifier(data)
    figures = {"classifier_accuracy": accuracy} | walk_figures(G, classifier)
    if G.classes:
        n = min(50_000, len(data.train))  # of MNIST the first; a folder is in the order of classes
        at = evenly(data.train, n) if data.name == "folder" else slice(n)
        opponent = data.train[at], data.train_labels[at]
        return figures | {
            "neighbours": n,
            "neighbour_error": neighbour_error(G, data.test, data.test_labels, n),
            "neighbour_error_real": nearest_error(data.test, data.test_labels, *opponent),
        }
    if len(means := concepts(G, classifier)) > 1:
        classes, images = arithmetic(G, means)
        save_image(images[:: len(means)].flatten(0, 1), folder / "arithmetic.png", nrow=5)
        figures |= arithmetic_figures(classes, images, classifier)
    torch.manual_seed(model.args.seed)
    untrained = Model(model.args, data).discriminator  # as it was when the run began
    contestants = {"svm_pixels": pixels}
    for name, network in {"svm": D, "svm_untrained": untrained}.items():
        contestants[name] = functools.partial(features, with_fixed_statistics(network, data.train))
    for name, extract in contestants.items():
        found = svm_protocol(extract, data, model.args.draws)
        figures |= {f"{name}_{key}": value for key, value in found.items()}
    return figures


def walk_figures(generator, classifier):
    """How even walks between noises are, and the same two ends faded into each other."""
    images = walks(generator, rows=50, steps=17)
    t = torch.linspace(0, 1, 17, device=images.device).view(-1, 1, 1, 1)
    faded = torch.lerp(images[:, :1], images[:, -1:], t)
    walked = {"walk": evenness(images, classifier), "walk_faded": evenness(faded, classifier)}
    return {f"{name}_largest_step": value for name, value in walked.items()}


def save_filters(discriminator, path):
    """D's first layer (not in the paper), each filter from black to white; without labels'."""
    weights = discriminator.layers[0][0].weight.detach()
    images = weights[:, : weights.shape[1] - discriminator.k]
    images = images if images.shape[1] in (1, 3) else images.mean(dim=1, keepdim=True)
    images = F.interpolate(images, scale_factor=5)
    save_image(make_grid(images, nrow=16, normalize=True, scale_each=True), path)


def save_curves(path, rows):
    """The losses, and the error of the measure where it was taken, against updates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("svm_estimate", "neighbour_estimate"):
        if measured := [(row["step"], row[name]) for row in rows if name in row]:
            left.plot(*zip(*measured), marker=".", label=name)
            left.legend()
    for name in ("loss_d", "loss_g"):
        right.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
    left.set(xlabel="update", ylabel="error on test images", ylim=(0, None))
    right.set(xlabel="update", ylabel="nats")
    right.legend()
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


def train_classifier(data, epochs=3, least=150, batch=128):
    """A classifier trained on the training images, and its accuracy on the test images."""
    device, n, size = data.train.device, len(data.train), data.train.shape[-1]
    steps = max(epochs * n // batch, least)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # leaves the run's alone
        torch.manual_seed(0)
        classifier = Classifier(data.classes, data.train.shape[1:])
        classifier.to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(classifier.parameters(), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        padded = F.pad(data.train, (2, 2, 2, 2))  # each batch is moved by up to 2 pixels
        hidden = None if sys.stderr else True  # None: where it is no terminal
        for _ in tqdm(range(steps), "classifier", leave=False, disable=hidden):
            index, (y, x) = torch.randint(n, (batch,), device=device), torch.randint(5, (2,))
            _, logits = classifier(unit(padded[index, :, y : y + size, x : x + size]))
            loss = F.cross_entropy(logits, data.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    right = classify(classifier.eval(), data.test) == data.test_labels
    return classifier, right.double().mean().item()


@torch.no_grad()
def classify(classifier, images):
    """The most likely class of each image."""
    return torch.cat([classifier(unit(x))[1].argmax(dim=1) for x in images.split(500)])


def unit(images):
    """Images, uint8 or already floats in [0, 1], as floats in [0, 1]."""
    return images if images.is_floating_point() else images / 255


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
