# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.10", "torchvision", "numpy", "tqdm", "matplotlib", "scikit-learn"]
# ///
"""Conditional GAN (Mirza & Osindero 2014, https://arxiv.org/abs/1411.1784): a GAN that is told the
class, and draws images of the class that one asks for.

    python cgan.py --epochs 50                 # MNIST; scikit-learn's digits if it is out of reach
    python cgan.py --network mlp --epochs 480  # the paper's own network, to its schedule's end
    python cgan.py --data-dir pictures         # its sub-folders are the classes
    python cgan.py --generate runs/.../checkpoint.pt --label 3 7 --out digits.png

Label fidelity 0.999 on digits (n = 1 run of 50 epochs, 5 minutes of one CPU core). Every run, and
what the departures below do: docs/cgan.md.

The generator G and the discriminator D of a GAN are both given the label y, here a class:

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
- G follows D, from the same samples; the code that it grew from moves both at once, D by half its
  loss, and starts black pixels at 1e-7 instead of 0.001.
- The conv networks have normal noise. The paper's, uniform in the unit hypercube, was too weak
  beside the label: G drew one and the same image for a label.
- The mlp's G keeps its dropout in sampling, as it comes to use it as noise: without it the
  log-likelihood is far lower.
- The paper chooses sigma and epoch by a validation set; here trained images and the last epoch do.

Nothing here has a fused kernel: --kernels changes nothing.
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
from sklearn.datasets import load_digits
from torch import nn
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import save_image
from tqdm import tqdm

SCRIPT = "cgan"
SETS = {}  # data sets of this script's own
NOISE = 100  # values of z
SAMPLES = 10_000  # for the closing measurements


# ------------------------------------------------------------------ arguments
def arguments():
    """The choice of network, beside the flags that every script has."""
    parser = run_arguments("Conditional GAN (Mirza & Osindero 2014): images of a class by name.")
    parser.add_argument("--dataset", choices=DATASETS, default="auto", help="auto: images or MNIST")
    parser.add_argument("--data-dir", default="data", help="of data sets, or your own images")
    parser.add_argument("--image-size", type=int, choices=(28, 32), default=32, help="of a folder")
    add = parser.add_argument_group("conditional GAN").add_argument
    rate = at_least(0, float)
    add("--network", choices=("conv", "mlp"), default="conv", help="mlp: the paper's own")
    add("--lr-d", type=rate, help="learning rate of D; None: 2e-4, of mlp 0.1 at first")
    add("--lr-g", type=rate, help="learning rate of G; None: 1e-3, of mlp 0.1 at first")
    add("--label", nargs="+", metavar="NAME", help="with --generate: classes by name or number")
    return parser


def suit(args, data):
    """Gives the flags that were left out what suits the network and the data."""
    if args.label:
        raise UsageError("--label goes with --generate CHECKPOINT")
    if len(data.classes) < 2:
        raise UsageError(
            f"--data-dir {args.data_dir} has one class; a conditional GAN needs two or more: "
            "put the images of each class in a sub-folder of its name"
        )
    if data.name == "folder" and (odd := {"", "train", "test", "val"} & set(data.classes)):
        raise UsageError(f"pictures in {sorted(odd)}: sub-folders of --data-dir are to be classes")
    if args.network == "conv":
        batch_size, lr_d, lr_g = 128 if len(data.train) >= 1000 else 32, 2e-4, 1e-3
    else:
        batch_size, lr_d, lr_g = 100, 0.1, 0.1
    args.epochs = args.epochs or 50
    args.batch_size = args.batch_size or min(batch_size, len(data.train))
    args.lr_d = lr_d if args.lr_d is None else args.lr_d
    args.lr_g = lr_g if args.lr_g is None else args.lr_g


# ------------------------------------------------------------------ networks
# G(noise, label) -> images in (-1, 1), for labels int64 (n,); D(x, label) -> score (n,), a logit
class ConvGenerator(nn.Module):
    """G of InfoGAN's tables 1 (28x28 grey) and 2 (32x32 colour), the label beside the noise."""

    def __init__(self, classes="0123456789", shape=(1, 28, 28)):
        super().__init__()
        self.classes, inputs, relu = classes, NOISE + len(classes), nn.ReLU(inplace=True)
        if shape[0] == 1:  # layers before batch norm have no biases: it would take them out again
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

    def draw(self, n):
        """Noise (n, NOISE): normal."""
        return torch.randn(n, NOISE, device=self.layers[0].weight.device)

    def forward(self, noise, label):
        return self.layers(torch.cat([noise, F.one_hot(label, len(self.classes))], dim=1))


class ConvDiscriminator(nn.Module):
    """D of the same tables; the score has the label's inner product with the features in it."""

    def __init__(self, classes="0123456789", shape=(1, 28, 28)):
        super().__init__()
        # without running averages: real and generated images would mix in them
        norm1d = functools.partial(nn.BatchNorm1d, track_running_stats=False)
        norm2d = functools.partial(nn.BatchNorm2d, track_running_stats=False)
        channels, leaky = shape[0], nn.LeakyReLU(0.1, inplace=True)
        layers = [
            nn.Conv2d(channels, 64, 4, 2, 1), leaky,
            nn.Conv2d(64, 128, 4, 2, 1, bias=False), norm2d(128), leaky,
        ]  # fmt: skip
        if channels == 1:
            layers += [nn.Flatten(), nn.Linear(6272, 1024, bias=False), norm1d(1024), leaky]
        else:
            layers += [nn.Conv2d(128, 256, 4, 2, 1, bias=False), norm2d(256), leaky, nn.Flatten()]
        features = 1024 if channels == 1 else 4096
        self.trunk = nn.Sequential(*layers)
        self.score = nn.Linear(features, 1)
        self.label = nn.Embedding(len(classes), features)
        self.apply(initialise)

    def forward(self, x, label):
        features = self.trunk(x)
        return self.score(features).squeeze(1) + (features * self.label(label)).sum(dim=1)


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
    """The paper's G: noise and label in layers of their own, then in a joint one (section 4.1)."""

    def __init__(self, classes="0123456789", shape=(1, 28, 28)):
        super().__init__()
        self.classes, self.shape = classes, tuple(shape)
        self.noise = linear(NOISE, 200, 0.05)
        self.label = linear(len(classes), 1000, 0.05)
        self.joint = linear(1200, 1200, 0.05)
        self.pixels = linear(1200, math.prod(shape), 0.05)

    def start_at(self, image):
        """Sets the output biases so that untrained images are about this one, in [0, 1]."""
        self.pixels.bias.data.copy_(image.flatten().clamp(0.001, 0.999).logit())

    def draw(self, n):
        """Noise (n, NOISE): uniform in the unit hypercube."""
        return torch.rand(n, NOISE, device=self.noise.weight.device)

    def forward(self, noise, label):
        label = F.one_hot(label, len(self.classes)).float()
        x = dropout(torch.cat([self.noise(noise), self.label(label)], dim=1).relu())
        x = dropout(self.joint(x).relu())
        return torch.sigmoid(self.pixels(x)).view(-1, *self.shape) * 2 - 1


class MLPDiscriminator(nn.Module):
    """The paper's D: maxout layers for image and label, then a joint one."""

    def __init__(self, classes="0123456789", shape=(1, 28, 28)):
        super().__init__()
        self.classes = len(classes)
        self.image = Maxout(math.prod(shape), 240, 5)
        self.label = Maxout(len(classes), 50, 5)
        self.joint = Maxout(290, 240, 4)
        self.score = linear(240, 1, 0.005)

    def forward(self, x, label):
        pixels, label = x.flatten(1) / 2 + 0.5, F.one_hot(label, self.classes).float()
        both = torch.cat([dropout(self.image(pixels)), dropout(self.label(label))], dim=1)
        return self.score(dropout(self.joint(both))).squeeze(1).float()  # under autocast, too


def dropout(x):
    """Half of the values, drawn anew, become 0; in samples too, as G comes to use it as noise."""
    return F.dropout(x, 0.5, training=True)


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
    the momentum rises from 0.5 to 0.7. Updates are counted on the device, where a graph can count.
    """

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        for p in self.param_groups[0]["params"]:
            count, velocity = torch.zeros((), device=p.device), torch.zeros_like(p)
            self.state[p] = {"updates": count, "velocity": velocity}

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            updates, velocity = self.state[p]["updates"], self.state[p]["velocity"]
            decay = torch.exp(updates * -math.log(1.00004))
            rate = (self.param_groups[0]["lr"] * decay).clamp_min(1e-6)
            momentum = 0.5 + 0.2 * (updates / 125_000).clamp_max(1)
            p.add_(velocity.mul_(momentum).addcmul_(p.grad, -rate))
            updates += 1


def train_step(model, real, label):
    """One update of D, then one of G, on real images (batch, channels, height, width) and labels.

    Returns the losses in nats.
    """
    G, D = model.generator, model.discriminator
    fake = G(G.draw(len(real)), label)  # of the same labels; one pass of G serves both updates

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
        self.yardstick = None  # the classifier and its accuracy, trained when they are needed
        generator, discriminator = NETWORKS[args.network]
        self.generator = generator(data.classes, data.train.shape[1:])
        self.discriminator = discriminator(data.classes, data.train.shape[1:])
        self.to(data.train.device, memory_format=torch.channels_last)
        if args.network == "mlp":
            self.generator.start_at(data.train.mean(dim=0, dtype=torch.float32) / 255)
            optimizer = PaperSGD
        else:
            adam = {"betas": (0.5, 0.999), "fused": True, "capturable": True}
            optimizer = functools.partial(torch.optim.Adam, **adam)
        self.optimizer_g = optimizer(self.generator.parameters(), lr=args.lr_g)
        self.optimizer_d = optimizer(self.discriminator.parameters(), lr=args.lr_d)
        self.optimizers = [self.optimizer_g, self.optimizer_d]

    def batch(self, data, index):
        """What train_step takes of the samples of these numbers."""
        return normalise(data.train[index]), data.train_labels[index]


# ------------------------------------------------------------------ sampling
@torch.no_grad()
def sample(generator, labels, seed=0):
    """An image in [0, 1] for each class number in labels, from a generator in evaluation mode."""
    device, images = next(generator.parameters()).device, []
    # noise and dropout follow from the seed, and leave the caller's random numbers as they are
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for label in torch.as_tensor(labels, device=device).split(500):  # so that memory stays flat
            images.append(generator(generator.draw(len(label)), label) / 2 + 0.5)
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
    classes, (_, *shape) = state["data"].values()
    generator = NETWORKS[state["config"]["network"]][0](classes, shape)
    weights = state["model"].items()
    generator.load_state_dict({k[10:]: w for k, w in weights if k.startswith("generator.")})
    return generator.eval().requires_grad_(False).to(device)


def generate(args):
    """--generate: a row of ten images for each label asked for, or for each there is."""
    path = Path(args.out or "grid.png")
    if path.suffix and path.suffix.lower() not in IMG_EXTENSIONS:
        raise UsageError(f"--out {path}: no picture is written as {path.suffix}; .png or .jpg is")
    generator = load_generator(args.generate, choose_device(args.device))
    labels = [class_number(generator.classes, name) for name in args.label or generator.classes]
    images = sample_rows(generator, labels, seed=args.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(images, path if path.suffix else f"{path}.png", nrow=10)


def save_samples(model, path):
    """Figure 2: a row for each label; its columns are different noise."""
    labels = range(len(model.generator.classes))
    save_image(sample_rows(model.generator, labels), f"{path}.png", nrow=10)


# ------------------------------------------------------------------ evaluation
def evaluate(model, data):
    """Label fidelity of about 1,000 samples, as many of each class."""
    labels = every_class(data.classes, 1000, data.train.device)
    share, _ = right_labels(model, data, sample(model.generator, labels), labels)
    return {"label_fidelity_estimate": share}


def every_class(classes, n, device):
    """About n labels, as many of each class."""
    return torch.arange(len(classes), device=device).repeat_interleave(max(1, n // len(classes)))


def right_labels(model, data, images, labels):
    """Share of images that the classifier puts in the class asked for: over all, and per class."""
    model.yardstick = model.yardstick or train_classifier(data)
    right = (classify(model.yardstick[0], images) == labels).double()
    share = right.view(len(data.classes), -1).mean(dim=1).tolist()
    return right.mean().item(), dict(zip(data.classes, share))


# ------------------------------------------------------------------ figures
def finish(model, data, folder, rows):
    """The picture of a finished run, and what its summary.json has beside the last row."""
    save_curves(folder / "curves.png", rows)
    labels = every_class(data.classes, SAMPLES, data.train.device)
    images = sample(model.generator, labels)
    share, per_class = right_labels(model, data, images, labels)
    return parzen_figures(images, data) | {
        "label_fidelity": share,
        "label_fidelity_per_class": per_class,
        "classifier_accuracy": model.yardstick[1],
    }


def save_curves(path, rows):
    """Label fidelity where it was measured, and the losses, against updates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    measured = [row for row in rows if "label_fidelity_estimate" in row]
    fidelity = [row["label_fidelity_estimate"] for row in measured]
    left.plot([row["step"] for row in measured], fidelity, marker=".")
    for name in ("loss_d", "loss_g"):
        right.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
    left.set(xlabel="update", ylabel="label fidelity", ylim=(0, 1.02))
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
