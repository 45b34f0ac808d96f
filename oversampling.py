# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.10", "torchvision", "numpy", "tqdm", "matplotlib", "scikit-learn"]
# ///
"""Class-preserving oversampling (Mondal, Singhal, Tiwary, Singla & Prathosh, AISTATS 2023, PMLR
206:3440-3465): new images of rare classes, decoded from convex combinations of latents.

    python oversampling.py --dataset digits      # scikit-learn's digits, made imbalanced
    python oversampling.py --data-dir pictures --balance balanced   # your own
    python oversampling.py --generate runs/.../checkpoint.pt --label 9 --out nines.png

ACSA on digits, one core, n = 5 seeds: batches of all classes alike 91.8 ± 1.4 %, mixed by M 91.6 ±
1.3, the full method 91.5 ± 1.6, images moved by a pixel (--shift 1) 94.5 ± 1.0. Every run, and
which to choose: docs/oversampling.md. From Python: fit_resample(X, y).

The networks: encoder E, linear layer L on its latents, decoder D, mixer M and critic C. Of t images
of a class y the mixer weighs the latents, alpha = softmax(M(z_1 .. z_t)), and z' = sum alpha_k z_k
is a new latent of the class. An update is

    L   cross-entropy of L(z_k) and of L(z') with y
    E   the same, and the mean absolute error of D(E(x))
    M   cross-entropy of L(z') with another class j: of all combinations it looks for a hard one
    C   E[C(D(z'), y)] - E[C(x, y)] + lambda E[(|grad C(x^, y)|_2 - 1)^2], WGAN-GP's; n_critic times
    D   -E[C(D(z'), y)]: it has nothing to match pixel by pixel, as z' is no image's latent

on batches that have all classes alike. What classifies is argmax L(E(x)), without another training;
D fills up the set for other classifiers. Averages of the weights over the updates are used.

The paper's claims, in words: the classifier needs no retraining and beats SMOTE and its like; the
images are of their class. Its tables could not be had, so none of their numbers stands here. The
script measures them in table.csv, all rows with one encoder and as many updates: no oversampling,
class weights, copies, SMOTE on pixels, uniform alpha, the mixer, the full method, and a fresh
classifier on the set that D filled up. ACSA is the mean recall of the classes, GM their geometric
mean, which falls with the worst. Then: how many generated images a classifier of the whole set
finds in their class, their density and coverage (Naeem et al. 2020) beside held-out images, alpha.

Where the published code (arnabkmondal/OversamplingRAE: without a licence, so nothing of it is here)
departs from the text, the text is followed, but for the cross-entropy of L(E(D(z'))) in D's loss
(--class-weight): without it D confuses the classes. --decoder conditional shows D the label, as in
the code. From the code are also the mixer's inputs (latents, noise, label), the kinds of layers,
and the average's 0.99. Departures of ours:

- C and D learn from latents of the averaged E, which is what sampling uses; in the code each update
  of the critic moves E's batch norm, too.
- The networks are a quarter as wide, and D ends in its second transposed convolution.
- To an update of the others are n_critic of C; the code has 1 of E, 4 of D and 20. There are far
  fewer updates, at higher rates, and no augmentation but --shift.
"""

import argparse
import copy
import functools
import io
import json
import math
import numbers
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
from sklearn.neighbors import NearestNeighbors
from sklearn.utils import check_random_state
from torch import nn
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import save_image
from tqdm import tqdm

try:  # the compiled penalty is an extra: gradient_penalty_reference below computes the same
    import gan_kernels
except (ImportError, OSError):
    gan_kernels = None

SCRIPT = "oversampling"
SETS = {}  # data sets of this script's own
# images kept of each class: those of the literature (GAMO, DeepSMOTE); digits have fewer
LITERATURE = [4000, 2000, 1000, 750, 500, 350, 200, 100, 60, 40]
COUNTS = {"mnist": LITERATURE, "fashion-mnist": LITERATURE}
COUNTS |= {"digits": [140, 95, 65, 45, 30, 20, 14, 10, 7, 5]}
COUNTS |= {s: [4500, 2000, 1000, 800, 600, 500, 400, 250, 150, 80] for s in ("svhn", "cifar10")}
# of the table: how a classifier is trained, E and L alike
ROWS = {
    "nothing": "images as they come",
    "weights": "images as they come, the loss weighted by class",
    "copies": "batches with all classes alike",
    "shifted": "copies, moved by up to a pixel",
    "smote": "copies of a set filled up by SMOTE on pixels",
    "uniform": "copies and their latents mixed, alpha uniform",
    "mixer": "copies and their latents mixed by M",
    "full": "the whole method",
    "filled": "copies of a set filled up by D",
    "part-filled": "copies of a set where D made a class five times as large",
}


# ------------------------------------------------------------------ arguments
def arguments():
    """The paper's settings as flags, beside those that every script has."""
    parser = run_arguments("Class-preserving oversampling (Mondal et al. 2023).")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="auto", help="auto: images or MNIST")
    add("--data-dir", default="data", help="of data sets, or your own images")
    add("--image-size", type=int, choices=(28, 32, 64), default=32, help="of a folder")
    few = "training images kept of each class, drawn by --seed; None: the literature's, a folder's"
    add("--counts", type=at_least(1), nargs="+", metavar="N", help=few)
    add("--shift", type=at_least(0, high=8), default=0, help="move training images by up to so far")
    add = parser.add_argument_group("method").add_argument
    rate = at_least(0, float)
    add("--width", type=at_least(1, high=512), default=16, help="maps of E's first layer")
    add("--latent", type=at_least(2, high=10**4), default=64, help="size of a latent")
    add("--dropout", type=at_least(0, float, 0.9), default=0.4, help="in E and M")
    add("--t", type=at_least(2, high=100), default=2, help="latents that are mixed")
    add("--mixer", choices=("network", "uniform"), default="network", help="what alpha is drawn by")
    add("--reconstruction", type=rate, default=1.0, help="weight of the absolute error in E's loss")
    add("--decoder", choices=("plain", "conditional"), default="plain", help="of latent and label")
    own = "of L(E(D(z')))'s cross-entropy in D's loss; the text has none"
    add("--class-weight", type=rate, default=1.0, help=own)
    add("--n-critic", type=at_least(1), default=2, help="critic updates to one of the others")
    add("--gp-weight", type=rate, default=10.0, help="lambda, the weight of the penalty")
    add("--lr", type=rate, default=1e-3, help="learning rate of E, L and M")
    add("--lr-d", type=rate, default=1e-3, help="learning rate of D and the critic")
    add = parser.add_argument_group("results").add_argument
    add("--seeds", type=at_least(1, high=100), default=1, help="draws that the table is made of")
    rows = "of the table, beside the run's own"
    add("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW", help=rows)
    balance = "folder for the training set, filled up with generated pictures; it must be new"
    add("--balance", type=os.path.abspath, metavar="FOLDER", help=balance)
    add("--target", type=at_least(1), help="images a class in it; None: as many as the largest has")
    add("--label", nargs="+", metavar="NAME", help="with --generate: classes by name or number")
    return parser


def suit(args, data):
    """Gives the flags that were left out what suits the data, and refuses classes too small."""
    if args.label:
        raise UsageError("--label goes with --generate CHECKPOINT")
    if args.target and not args.balance:
        raise UsageError("--target goes with --balance FOLDER")
    if args.balance and not args.resume and Path(args.balance).exists():
        raise UsageError(f"--balance {args.balance} is there already; choose another")
    if args.dataset == "folder" and Path(args.data_dir) in Path(args.balance or "/").parents:
        raise UsageError(f"--balance {args.balance} is among the pictures of --data-dir")
    if len(data.classes) < 2:
        raise UsageError("there is one class; put the images of each in a sub-folder of its name")
    if data.name == "folder" and (odd := {"", "train", "test", "val"} & set(data.classes)):
        raise UsageError(f"pictures in {sorted(odd)}: sub-folders of --data-dir are to be classes")
    there = torch.bincount(data.train_labels, minlength=len(data.classes)).tolist()
    if args.counts is None:
        args.counts = [*map(min, there, COUNTS.get(data.name, there))]
    if len(args.counts) != len(there) or any(map(int.__gt__, args.counts, there)):
        raise UsageError(f"--counts {args.counts}: the classes have {there} images to train on")
    for name, count in zip(data.classes, args.counts):
        if count < args.t:
            has = f"class {name} has {count} image{'s' * (count > 1)} to train on"
            raise UsageError(f"{has}, fewer than --t {args.t}: add more images, or leave it out")
    args.batch_size = args.batch_size or min(32, len(data.train))
    if not 2 <= args.batch_size <= len(data.train):
        of = f"of {len(data.train)} images, and batch norm needs 2"
        raise UsageError(f"--batch-size {args.batch_size}: {of}")
    if args.epochs is None:  # no limit beside that of updates, so that --resume may raise this
        args.max_steps = args.max_steps or (600 if len(data.train) > 9999 else 300)
        args.epochs = 10**9


# ------------------------------------------------------------------ networks
def sizes(shape, width):
    """The maps of the convolutions, each of which halves the sides, and the sides after the last:
    ([32, 64], 7, 7) for 28x28 at width 32; sides that can not be halved so often are rounded up."""
    halvings = max(2, math.ceil(math.log2(min(shape[1:]) / 8)))
    maps = [width * min(2**i, 8) for i in range(halvings)]
    return maps, *(math.ceil(side / 2**halvings) for side in shape[1:])


def convolutions(shape, width, norm, dropout=0.0):
    """Layers that make vectors of images of any sides, and the length of those."""
    (maps, height, width), channels, layers = sizes(shape, width), shape[0], []
    grown = [height * 2 ** len(maps), width * 2 ** len(maps)]
    if grown != [*shape[1:]]:  # sides that can not be halved so often are padded
        layers.append(nn.ZeroPad2d((0, grown[1] - shape[2], 0, grown[0] - shape[1])))
    for outputs in maps:
        layers.append(nn.Conv2d(channels, outputs, 4, 2, 1, bias=norm is nn.Identity))
        layers += [norm(outputs), nn.LeakyReLU(0.2), *([nn.Dropout(dropout)] if dropout else [])]
        channels = outputs
    return [*layers, nn.Flatten()], channels * height * width


class Encoder(nn.Sequential):
    """E(x): latents (n, latent) of images (n, channels, height, width) in [0, 1]."""

    def __init__(self, shape=(1, 28, 28), width=32, latent=64, dropout=0.4):
        layers, inputs = convolutions(shape, width, nn.BatchNorm2d, dropout)
        layers += [nn.Linear(inputs, 16 * width, bias=False), nn.BatchNorm1d(16 * width)]
        layers += [nn.LeakyReLU(0.2), nn.Dropout(dropout), nn.Linear(16 * width, latent)]
        super().__init__(*layers)


class Decoder(nn.Module):
    """D(z, label): images in (0, 1); without classes it leaves the label alone."""

    def __init__(self, shape=(1, 28, 28), width=32, latent=64, classes=0):
        super().__init__()
        (maps, *side), self.shape, self.classes = sizes(shape, width), shape, classes
        inner, relu = maps[-1] * math.prod(side), nn.ReLU()
        layers = [nn.Linear(latent + classes, 16 * width, bias=False)]
        layers += [nn.BatchNorm1d(16 * width), relu, nn.Linear(16 * width, inner, bias=False)]
        layers += [nn.BatchNorm1d(inner), relu, nn.Unflatten(1, (maps[-1], *side))]
        for inputs, outputs in zip(maps[:0:-1], maps[-2::-1]):
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(outputs), relu]
        layers += [nn.ConvTranspose2d(width, shape[0], 4, 2, 1), nn.Sigmoid()]
        self.layers = nn.Sequential(*layers)

    def forward(self, z, label):
        if self.classes:
            z = torch.cat([z, F.one_hot(label, self.classes)], dim=1)
        return self.layers(z)[..., : self.shape[1], : self.shape[2]]


class Critic(nn.Module):
    """C(x, label): a score (n,) without bounds; no norm, and the label joins after the maps."""

    def __init__(self, shape=(1, 28, 28), width=32, classes=10):
        super().__init__()
        layers, inputs = convolutions(shape, width, nn.Identity)
        self.classes, self.maps = classes, nn.Sequential(*layers)
        hidden = nn.Linear(inputs + classes, 16 * width)
        self.score = nn.Sequential(hidden, nn.LeakyReLU(0.2), nn.Linear(16 * width, 1))

    def forward(self, x, label):
        features = self.maps(x)
        label = F.one_hot(label, self.classes).to(features.dtype)
        return self.score(torch.cat([features, label], dim=1)).squeeze(1).float()


class Mixer(nn.Module):
    """M(z, noise, label): positive weights alpha (n, t) of sum 1 for latents (n, t, latent)."""

    def __init__(self, latent=64, classes=10, t=2, hidden=512, dropout=0.4):
        super().__init__()
        layers, inputs, self.classes = [], (t + 1) * latent + classes, classes
        for _ in range(4):
            layers += [nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden)]
            layers += [nn.ReLU(), nn.Dropout(dropout)]
            inputs = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, t))

    def forward(self, z, noise, label):
        given = [z.flatten(1), noise, F.one_hot(label, self.classes)]
        return self.layers(torch.cat(given, dim=1)).softmax(dim=1)


class Oversampler(nn.Module):
    """E, L, D and M as averages over the updates, with the training images: what is used.

    images are uint8, class by class; count (classes,) is how many each class has.
    """

    def __init__(self, classes, images, count, args):
        super().__init__()
        shape, k, width, z = images.shape[1:], len(classes), args.width, args.latent
        self.classes, self.t, self.form = classes, args.t, None
        self.register_buffer("images", images)
        self.register_buffer("count", torch.tensor(count))
        self.register_buffer("updates", torch.zeros(()))
        self.encoder = Encoder(shape, width, z, args.dropout)
        self.linear = nn.Linear(z, k)
        self.decoder = Decoder(shape, width, z, k if args.decoder == "conditional" else 0)
        self.mixer = None
        if args.mixer == "network":
            self.mixer = Mixer(z, k, args.t, 16 * width, args.dropout)
        self.eval()

    def train(self, mode=True):
        """Averages are not trained: batch norm has its statistics, dropout is off."""
        return super().train(False)

    def labels(self):
        """Those of the images."""
        numbers = torch.arange(len(self.count), device=self.count.device)
        return numbers.repeat_interleave(self.count, output_size=len(self.images))

    def draw(self, label, t, rng=None):
        """The numbers (n, t) of t different images of each label, all as likely."""
        places = label.new_zeros(len(label), 0)
        for j in range(t):  # one of those that are left, counted over those that are taken
            chance = torch.rand(len(label), device=label.device, generator=rng)
            place = (chance * (self.count[label] - j)).long()
            for taken in places.sort(dim=1).values.unbind(1):
                place += place >= taken
            places = torch.cat([places, place[:, None]], dim=1)
        return places + (self.count.cumsum(0) - self.count)[label, None]

    def tuples(self, label, t, rng=None, most=0):
        """Training images (n, t, channels, height, width) of the labels, moved by up to most."""
        images = self.images[self.draw(label, t, rng).flatten()]
        images = moved(images, most) if most else images
        return normalise(images).unflatten(0, (len(label), t))

    def latents(self, x):
        """z (n, t, latent) of tuples of images; in parts, so that memory stays flat."""
        parts = [self.encoder(part) for part in x.flatten(0, 1).split(500)]
        return torch.cat(parts).unflatten(0, x.shape[:2])

    def mix(self, x, label, rng=None):
        """z' (n, latent) of tuples of images of the labels."""
        z = self.latents(x)
        return convex(z, weights(self.mixer, z, label, rng))

    def forward(self, x):
        """Logits (n, classes) of images."""
        return self.linear(self.encoder(x))


# ------------------------------------------------------------------ losses and the training step
def weights(mixer, z, label, rng=None):
    """alpha (n, t), positive and of sum 1, by the mixer; by chance, all as likely, without one."""
    if mixer is None:
        parts = torch.empty(z.shape[:2], device=z.device).exponential_(generator=rng)
        return parts / parts.sum(dim=1, keepdim=True)
    noise = torch.randn(z[:, 0].shape, device=z.device, generator=rng)
    return mixer(z, noise, label)


def convex(z, alpha):
    """z' (n, latent): the sum of alpha_k z_k, of latents (n, t, latent) and weights (n, t)."""
    return (alpha[..., None] * z).sum(dim=1)


def another(label, classes):
    """A class other than each label, all others as likely."""
    return (label + torch.randint(1, classes, label.shape, device=label.device)) % classes


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


def latent_step(model, x, label, decoder=None, weight=None):
    """An update of E, L and M on tuples x (n, t, channels, height, width) with labels (n,).

    Tuples of one are not mixed. With a decoder E also learns to have x reconstructed; weight
    (classes,) is that of each class in the loss. Returns the losses.
    """
    E, L, (n, t) = model.encoder, model.linear, x.shape[:2]
    x = x.flatten(0, 1)
    z = E(x)
    loss = F.cross_entropy(L(z), label.repeat_interleave(t), weight)
    losses = {"loss_points": loss.detach()}
    if decoder is not None:
        error = (decoder(z, label.repeat_interleave(t)) - x).abs().mean()
        loss = loss + model.args.reconstruction * error
        losses["absolute_error"] = error
    if t > 1:
        z = z.unflatten(0, (n, t))
        alpha = weights(model.mixer, z.detach(), label)  # M's own loss has no part in E's
        loss_mixed = F.cross_entropy(L(convex(z, alpha.detach())), label)
        loss = loss + loss_mixed
        losses["loss_mixed"] = loss_mixed
    own = [*E.parameters(), *L.parameters()]
    model.optimizer_e.zero_grad()
    loss.backward(inputs=own)
    if t > 1 and model.mixer is not None:
        scores = L(convex(z.detach(), alpha))
        loss_m = F.cross_entropy(scores, another(label, scores.shape[1]))
        model.optimizer_m.zero_grad()
        loss_m.backward(inputs=list(model.mixer.parameters()))
        model.optimizer_m.step()
        losses["loss_mixer"] = loss_m
    model.optimizer_e.step()
    follow(model.generator, model)
    return losses


def train_step(model, x, label):
    """An update of E, L and M, n_critic updates of C, then one of D.

    x (1 + n_critic, n, t + 1, channels, height, width) in [0, 1] has tuples of each label (n,): t
    images to mix, and one that is real to the critic. Returns the losses, those of C as means.
    """
    G, D, C, args = model.generator, model.decoder, model.critic, model.args
    losses = latent_step(model, x[0, :, :-1], label, D)
    with torch.no_grad():
        mixed = G.mix(x[:, :, :-1].flatten(0, 1), label.repeat(len(x))).unflatten(0, x.shape[:2])
    for real, z in zip(x[1:, :, -1], mixed[1:]):
        with torch.no_grad():
            fake = D(z, label)
        distance = C(real, label).mean() - C(fake, label).mean()
        e = torch.rand(len(real), 1, 1, 1, device=real.device)
        penalty = model.gradient_penalty(lambda v: C(v, label), e * real + (1 - e) * fake)
        model.optimizer_c.zero_grad()
        (args.gp_weight * penalty - distance).backward()
        model.optimizer_c.step()
        for name, value in (("distance", distance), ("penalty", penalty)):
            losses[name] = losses.get(name, 0) + value.detach() / args.n_critic

    fake = D(mixed[0], label)
    loss = losses["loss_decoder"] = -C(fake, label).mean()
    if args.class_weight:
        loss = loss + args.class_weight * F.cross_entropy(G(fake), label)
    model.optimizer_d.zero_grad()
    loss.backward(inputs=list(D.parameters()))  # no gradient for the critic's weights
    model.optimizer_d.step()
    return losses


@torch.no_grad()
def follow(average, model, keep=0.99):
    """Moves the averaged networks, statistics of batch norm with them, towards the trained ones;
    in the first updates by more, so that the initial weights are soon forgotten."""
    average.updates += 1
    share = ((average.updates + 1) / (average.updates + 10)).clamp_max(keep)
    for name in ("encoder", "linear", "decoder", "mixer"):
        if getattr(model, name) is None:
            continue
        now = getattr(model, name).state_dict()
        for key, value in getattr(average, name).state_dict().items():
            if value.is_floating_point():
                value.lerp_(now[key], 1 - share)


def normalise(images):
    """uint8 images as float32 in [0, 1], in the memory order that convolutions like best."""
    return images.contiguous(memory_format=torch.channels_last).float() / 255


def moved(images, most):
    """Images, each moved by up to so many pixels in both directions, over black."""
    n, _, height, width = images.shape
    padded = F.pad(images, (most, most, most, most))
    y, x = torch.randint(2 * most + 1, (2, n, 1), device=images.device)
    rows = (y + torch.arange(height, device=images.device))[:, :, None]
    columns = (x + torch.arange(width, device=images.device))[:, None, :]
    at = torch.arange(n, device=images.device)[:, None, None]
    return padded.movedim(1, 3)[at, rows, columns].movedim(3, 1)


class Model(nn.Module):
    """All networks and their optimisers, as train_step takes them, with the images kept."""

    def __init__(self, args, data):
        super().__init__()
        self.args, self.samples_per_step = args, args.batch_size
        k, rng, kept = len(data.classes), torch.Generator().manual_seed(args.seed), []
        for c, count in enumerate(args.counts):
            members = (data.train_labels == c).nonzero()[:, 0]
            kept.append(members[torch.randperm(len(members), generator=rng)[:count]])
        images = data.train[torch.cat(kept)]
        self.generator = G = Oversampler(data.classes, images, args.counts, args)
        networks = [copy.deepcopy(x) for x in (G.encoder, G.linear, G.decoder, G.mixer)]
        self.encoder, self.linear, self.decoder, self.mixer = networks
        self.train()
        G.requires_grad_(False)
        self.critic = Critic(images.shape[1:], args.width, k)
        self.to(data.train.device, memory_format=torch.channels_last)
        fast = {"fused": True, "capturable": True}
        own = [*self.encoder.parameters(), *self.linear.parameters()]
        self.optimizer_e = torch.optim.AdamW(own, args.lr, weight_decay=1e-3, **fast)
        gan = {"lr": args.lr_d, "betas": (0.5, 0.9), **fast}
        self.optimizer_d = torch.optim.Adam(self.decoder.parameters(), **gan)
        self.optimizer_c = torch.optim.Adam(self.critic.parameters(), **gan)
        self.optimizers = [self.optimizer_e, self.optimizer_d, self.optimizer_c]
        if self.mixer is not None:
            self.optimizer_m = torch.optim.Adam(self.mixer.parameters(), args.lr, **fast)
            self.optimizers.append(self.optimizer_m)
        if args.kernels == "fused" and gan_kernels is None:
            raise UsageError("--kernels fused: gan_kernels can not be imported; pip install .")
        self.kernels, self.gradient_penalty = "reference", gradient_penalty_reference
        if gan_kernels and args.kernels != "reference":
            self.kernels, self.gradient_penalty = "fused", gan_kernels.gradient_penalty

    def batch(self, data, index):
        """What train_step takes in place of the samples of these numbers: as many tuples, drawn."""
        label, parts = self.balanced(len(index)), 1 + self.args.n_critic
        draw = functools.partial(self.generator.tuples, label.repeat(parts), most=self.args.shift)
        x = torch.cat([draw(self.args.t), draw(1)], dim=1)
        return x.unflatten(0, (parts, len(label))), label

    def balanced(self, n):
        """n labels, of all classes alike, beginning with any."""
        k, device = len(self.generator.classes), self.generator.count.device
        return (torch.arange(n, device=device) + torch.randint(k, (1,), device=device)) % k


# ------------------------------------------------------------------ sampling
@torch.no_grad()
def sample(model, n, label=None, seed=0):
    """n images (n, channels, height, width) in [0, 1]: decoded mixtures of training images.

    model is what load_generator or fit gives. label is a class, by name or number, or an int64
    tensor with a number for each image; left out, the classes take turns.
    """
    label, rng = as_labels(model, n, label), own_rng(model, seed)
    return torch.cat([model.decoder(*pair) for pair in mixtures(model, label, rng)])


def mixtures(model, label, rng):
    """z' (m, latent) of tuples of training images, and their labels (m,), in parts."""
    for part in label.split(500):
        yield model.mix(model.tuples(part, model.t, rng), part, rng), part


def as_labels(model, n, label):
    """n class numbers, int64 on the model's device."""
    if label is None:
        label = torch.arange(n) % len(model.classes)
    elif not torch.is_tensor(label):
        there = label in model.classes  # as 1 is of 1.0 and 2.0
        number = model.classes.index(label) if there else class_number(model.classes, label)
        label = torch.full((n,), number)
    return label.to(model.count.device)


def class_number(classes, name):
    """The class of that name, or else of that number."""
    for names in ([str(known) for known in classes], [str(i) for i in range(len(classes))]):
        if str(name) in names:
            return names.index(str(name))
    known = ", ".join(map(str, classes))
    raise UsageError(f"--label {name}: the classes are {known}; name them or count from 0")


def own_rng(network, seed):
    """A random stream on the network's device that leaves the training's own alone."""
    return torch.Generator(next(network.parameters()).device).manual_seed(seed)


def load_generator(path, device="cpu"):
    """The averaged networks and training images of a checkpoint, for sample and predict."""
    state = load_checkpoint(path)
    own = {k[10:]: w for k, w in state["model"].items() if k.startswith("generator.")}
    if "images" not in own:
        raise UsageError(f"{path} is no whole checkpoint of {SCRIPT}: its images are missing")
    args = argparse.Namespace(**state["config"])
    model = Oversampler(state["data"]["about"], own["images"], args.counts, args)
    model.load_state_dict(own)
    return model.requires_grad_(False).eval().to(device)


def generate(args):
    """--generate: a grid of a hundred images, a row of ten for each label, or --balance."""
    path = Path(args.out or "grid.png")
    if (args.target and not args.balance) or (args.label and args.balance):
        raise UsageError("--target goes with --balance FOLDER, and --label without it")
    if path.suffix and path.suffix.lower() not in IMG_EXTENSIONS:
        raise UsageError(f"--out {path}: no picture is written as {path.suffix}; .png or .jpg is")
    if args.balance and Path(args.balance).exists():
        raise UsageError(f"--balance {args.balance} is there already; choose another")
    model = load_generator(args.generate, choose_device(args.device))
    if args.balance:
        return balance(model, Path(args.balance), args.target, args.seed)
    labels = [class_number(model.classes, name) for name in args.label or ()]
    labels = torch.tensor(labels).repeat_interleave(10) if labels else None
    images = sample(model, 100 if labels is None else len(labels), labels, args.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(images, path if path.suffix else f"{path}.png", nrow=10)


def save_samples(model, path):
    """A picture with a column for each of the first ten classes."""
    columns = min(10, len(model.generator.classes))
    images = sample(model.generator, 10 * columns, torch.arange(10 * columns) % columns)
    save_image(images, f"{path}.png", nrow=columns)


def balance(model, folder, target=None, seed=0):
    """Writes the training images and, for classes of fewer than target, generated ones as PNG."""
    target = target or int(model.count.max())
    images, labels = filled(model, generated, [target] * len(model.classes), seed)
    for i, (image, c) in enumerate(zip(images, labels.tolist())):
        inside = folder / str(model.classes[c]).replace("/", "-")
        inside.mkdir(parents=True, exist_ok=True)
        kind = "original" if i < len(model.images) else "generated"
        levels = image.movedim(0, -1).squeeze(-1).cpu().numpy()
        Image.fromarray(levels).save(inside / f"{kind}-{i:06d}.png")


def filled(model, make, targets, seed=0):
    """The training images and labels, then make(model, class, number, seed) up to each target."""
    images, labels = [model.images], [model.labels()]
    for c, (target, count) in enumerate(zip(targets, model.count.tolist())):
        if target > count:
            images.append(make(model, c, target - count, seed))
            labels.append(torch.full((target - count,), c, device=labels[0].device))
    return torch.cat(images), torch.cat(labels)


def generated(model, c, n, seed=0):
    """n uint8 images that D makes of class c."""
    return (sample(model, n, torch.full((n,), c), seed) * 255).round().byte()


def pixel_smote(model, c, n, seed=0):
    """n uint8 images of class c between neighbours, by SMOTE on pixels."""
    members = model.images[model.labels() == c]
    rows = smote(members.flatten(1).cpu().numpy().astype(np.float32), n, seed)
    return torch.tensor(rows).round().byte().view(n, *members.shape[1:]).to(members.device)


def smote(rows, n, seed=0, neighbours=5):
    """SMOTE (Chawla et al. 2002): n points, each on the segment from a row of rows (m, d) to one of
    its nearest; drawn in the order in which imbalanced-learn draws."""
    rng, k = np.random.RandomState(seed), min(neighbours, len(rows) - 1)
    near = NearestNeighbors(n_neighbors=k + 1).fit(rows).kneighbors(return_distance=False, X=rows)
    base, which = divmod(rng.randint(0, k * len(rows), n), k)
    step = rng.uniform(size=n)[:, None]
    return (rows[base] + step * (rows[near[base, which + 1]] - rows[base])).astype(rows.dtype)


# ------------------------------------------------------------------ arrays of images
Form = namedtuple("Form", "shape last low high floats")  # of a row; last: channels, low: the range


def as_arrays(X, y, shape):
    """X and y as arrays, and how the rows of X are images."""
    X, y = np.asarray(X), np.asarray(y)
    form = form_of(X, shape)
    if y.shape != X.shape[:1]:
        raise UsageError(f"X has {len(X)} rows, y the shape {y.shape}: a label for each is needed")
    return X, y, form


def form_of(X, shape=None):
    """How the rows of an array are images; UsageError where they are none."""
    if X.ndim not in (2, 3, 4) or X.dtype.kind not in "uif" or X.size == 0:
        kinds = "(n, values), (n, height, width) or (n, channels, height, width), of numbers"
        raise UsageError(f"X of {X.dtype} and shape {X.shape}: it has to be {kinds}")
    row = tuple(shape or X.shape[1:])
    if len(row) == 1:  # square images, grey or in colour
        for channels in (1, 3):
            side = math.isqrt(row[0] // channels)
            if len(row) == 1 and channels * side**2 == row[0]:
                row = (channels, side, side)
    if len(row) not in (2, 3) or math.prod(row) != math.prod(X.shape[1:]):
        raise UsageError(f"X has rows of {X.shape[1:]}: give shape=(channels, height, width)")
    low, high = (0, 255) if X.dtype == np.uint8 else (float(X.min()), float(X.max()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UsageError("X has values that are nan or infinite")
    last = len(row) == 3 and row[2] in (1, 3, 4) and row[0] not in (1, 3, 4)
    return Form(row, last, low, high if high > low else low + 1, X.dtype.kind == "f")


def to_images(X, form):
    """The rows as uint8 images (n, channels, height, width)."""
    pixels = (X.astype(np.float64) - form.low) / (form.high - form.low) * 255
    pixels = pixels.round().clip(0, 255).astype(np.uint8).reshape(len(X), *form.shape)
    pixels = pixels[:, None] if len(form.shape) == 2 else pixels
    pixels = np.moveaxis(pixels, -1, 1) if form.last else pixels
    return torch.from_numpy(np.ascontiguousarray(pixels))


def from_images(images, form, like):
    """Images in [0, 1] as rows of the array's shape, dtype and range."""
    values = images.cpu().double().numpy()
    values = np.moveaxis(values, 1, -1) if form.last else values
    values = form.low + values.reshape(-1, *like.shape[1:]) * (form.high - form.low)
    values = np.rint(values) if like.dtype.kind in "ui" else values
    return values.clip(form.low, form.high).astype(like.dtype)


OF_RUNS = {"dataset", "data_dir", "image_size", "counts", "out", "resume", "generate", "log_every"}
OF_RUNS |= {"seeds", "rows", "balance", "target", "label", "no_graph", "seed"}  # are not fit's


def refuse(message):
    raise UsageError(message)


def fit(X, y, random_state=0, shape=None, **settings):
    """The averaged networks after training on images X with labels y, for sample and predict.

    X: (n, values), (n, height, width), (n, channels, height, width) or with the channels last, of
    uint8 or of other numbers, whose range is taken to be that of all; shape is that of a row, which
    rows of values need unless they are square, in colour channel by channel. The channels are 1, 3
    or 4 where they are last. y: n labels of any kind that can be sorted. settings are flags by
    name, as max_steps=1000. Raises UsageError, a ValueError, also where training diverges.
    """
    X, y, form = as_arrays(X, y, shape)
    classes, labels = np.unique(y, return_inverse=True)
    parser = arguments()
    known = sorted(vars(parser.parse_args([])).keys() - OF_RUNS)
    if unknown := sorted(settings.keys() - known):
        raise UsageError(f"{', '.join(unknown)}: the settings are {', '.join(known)}")
    parser.error = refuse
    given = [(name.replace("_", "-"), value) for name, value in settings.items()]
    args = parser.parse_args([f"--{name}={value}" for name, value in given if value is not None])
    args.seed = int(check_random_state(random_state).randint(2**31))
    device, tf32 = choose_device(args.device), args.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    images, labels = to_images(X, form).to(device), torch.from_numpy(labels).to(device)
    data = Data("arrays", classes.tolist(), images, labels, images[:0], labels[:0])
    suit(args, data)
    updates = min(args.max_steps or math.inf, args.epochs * (len(images) // args.batch_size))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(args.seed)
        model = Model(args, data)
        train_whole(model, updates)
    model.generator.form = form
    return model.generator.eval()


def fit_resample(X, y, sampling_strategy="auto", random_state=0, shape=None, **settings):
    """X and y, followed by generated images and their labels, as imbalanced-learn's samplers do.

    sampling_strategy: "auto" or "not majority", "minority", "not minority", "all": the classes to
    fill up to the largest; a dictionary {label: images it shall have}; a float, of two classes: the
    ratio of smaller to larger; or a function of y that returns a dictionary. The rest is as of fit.
    Shape, dtype and range are those of X. Raises UsageError, a ValueError.
    """
    X, y, form = as_arrays(X, y, shape)
    more = to_add(y, sampling_strategy)
    if not any(more.values()):
        return X.copy(), y.copy()
    model = fit(X, y, random_state, shape, **settings)
    seed = int(check_random_state(random_state).randint(2**31))
    rows, labels = [X], [y]
    for c, (label, n) in enumerate(more.items()):
        images = generated(model, c, n, seed) if n else model.images[:0]
        rows.append(from_images(images / 255, form, X))
        labels.append(np.full(n, label, dtype=y.dtype))
    return np.concatenate(rows), np.concatenate(labels)


def to_add(y, strategy):
    """{label: number of images to add}, of the labels in order."""
    names, counts = np.unique(y, return_counts=True)
    has = dict(zip(names.tolist(), counts.tolist()))
    if len(has) < 2:
        raise UsageError(f"y has one class, {names[0]!r}: two at least are needed")
    largest, smallest = max(has, key=has.get), min(has, key=has.get)
    strategy = strategy(y) if callable(strategy) else strategy
    chosen = {"minority": {smallest}, "not minority": has.keys() - {smallest}, "all": has.keys()}
    chosen |= dict.fromkeys(("auto", "not majority"), has.keys() - {largest})
    if isinstance(strategy, dict):
        wanted = has | strategy
    elif isinstance(strategy, numbers.Real) and len(has) == 2 and 0 < strategy <= 1:
        wanted = has | {smallest: int(strategy * has[largest])}
    elif isinstance(strategy, str) and strategy in chosen:
        wanted = has | dict.fromkeys(chosen[strategy], has[largest])
    else:
        raise UsageError(f"sampling_strategy {strategy!r}: it can be {', '.join(chosen)}, "
                         "a dictionary or, of two classes, a ratio up to 1")  # fmt: skip
    for label, n in wanted.items():
        if n < has.get(label, math.inf):
            raise UsageError(f"sampling_strategy: {n} of {label!r}, there are {has.get(label, 0)}")
    return {label: wanted[label] - n for label, n in has.items()}


@torch.no_grad()
def predict(model, X):
    """The labels (n,) that argmax L(E(x)) gives to images X, of the same form as in fit.

    Of a model from a checkpoint floats are taken to be in [0, 1], integers in [0, 255].
    """
    X = np.asarray(X)
    shape, floats = model.images.shape[1:] if X.ndim == 2 else None, X.dtype.kind == "f"
    form = model.form or form_of(X, shape)._replace(low=0, high=1 if floats else 255)
    if floats != form.floats or X.shape[1:] not in (form.shape, (math.prod(form.shape),)):
        kind = "floats" if form.floats else "integers"
        raise UsageError(f"X of {X.dtype}, rows of {X.shape[1:]}: fit had {kind}, {form.shape}")
    images = to_images(X, form).to(model.count.device)
    return np.array(model.classes)[found_classes(model, images).cpu().numpy()]


# ------------------------------------------------------------------ evaluation
@torch.no_grad()
def found_classes(model, images):
    """argmax L(E(x)) of uint8 images."""
    return torch.cat([model(normalise(part)).argmax(dim=1) for part in images.split(500)])


def measures(truth, found, count):
    """ACSA, macro F1, both geometric means, the mean recall of the three classes rarest by count,
    and the recall of each class; of those that have test images.

    gm is the geometric mean of the recalls; gm_macro, sqrt(mean recall * mean specificity), is what
    DeepSMOTE's tables have.
    """
    k = len(count)
    confusion = torch.bincount(truth * k + found, minlength=k * k).view(k, k).double().cpu()
    has, said, right = confusion.sum(dim=1), confusion.sum(dim=0), confusion.diag()
    recall, f1 = right / has.clamp_min(1), 2 * right / (has + said).clamp_min(1)
    specificity = 1 - (said - right) / (has.sum() - has).clamp_min(1)
    tested = has > 0
    rare = torch.tensor([c for c in torch.tensor(count).argsort().tolist() if tested[c]][:3])
    figures = {
        "acsa": recall[tested].mean(),
        "f1": f1[tested].mean(),
        "gm": recall[tested].log().mean().exp(),
        "gm_macro": (recall[tested].mean() * specificity[tested].mean()).sqrt(),
        "rarest": recall[rare].mean(),
    }
    return {name: value.item() for name, value in figures.items()}, recall.tolist()


@torch.no_grad()
def evaluate(model, data):
    """How the classifier does on the test images, and the absolute error of D(E(x)) on 500."""
    G = model.generator
    figures, _ = measures(data.test_labels, found_classes(G, data.test), G.count.tolist())
    x, label = normalise(data.test[:500]), data.test_labels[:500]
    error = (G.decoder(G.encoder(x), label) - x).abs().mean().item()
    return figures | {"absolute_error_heldout": error}


def train_alone(model, updates, update):
    """Calls update so many times, each with random numbers that follow from its number."""
    hidden = None if sys.stderr else True  # None: where it is no terminal
    device, bf16 = model.generator.count.device.type, model.args.precision == "bf16"
    for step in tqdm(range(1, updates + 1), leave=False, disable=hidden):
        torch.manual_seed(hash((model.args.seed, step, RANK)))
        with torch.autocast(device, torch.bfloat16, bf16, False):
            update()
    if not nn.utils.get_total_norm(model.parameters()).isfinite():
        raise UsageError("nan after training; lower the learning rates, lr and lr_d")


def train_whole(model, updates):
    """The updates that a run takes, but for its graph and its processes."""
    index = range(model.args.batch_size)
    train_alone(model, updates, lambda: train_step(model, *model.batch(None, index)))


def train_row(name, full, data, updates):
    """The averaged E and L of a row of the table, on the images that the full method was given."""
    G, args = full.generator, full.args
    images, labels, most = G.images, G.labels(), G.count.max().item()
    if name in ("smote", "filled", "part-filled"):
        targets = [min(most, (5 if name == "part-filled" else most) * n) for n in args.counts]
        make = pixel_smote if name == "smote" else generated
        images, labels = filled(G, make, targets, args.seed)
    own = {"counts": torch.bincount(labels).tolist()}
    own |= {"mixer": "uniform" if name == "uniform" else "network"}
    own |= {"shift": 1} if name == "shifted" else {}
    torch.manual_seed(args.seed)
    kept = data._replace(train=images, train_labels=labels)
    row = Model(argparse.Namespace(**vars(args) | own), kept)
    t = args.t if name in ("uniform", "mixer") else 1
    tuples = args.batch_size * args.t // t  # every row sees as many images an update
    weight = len(labels) / len(G.classes) / G.count.float() if name == "weights" else None

    def update():
        label = row.balanced(tuples)
        if name in ("nothing", "weights"):
            label = labels[torch.randint(len(labels), (tuples,), device=labels.device)]
        x = row.generator.tuples(label, t, most=row.args.shift)
        latent_step(row, x, label, weight=weight)

    train_alone(row, updates, update)
    return row.generator


def table(model, data, updates):
    """Every row for every seed: dictionaries of row, seed, the measures and each class's recall."""
    results, args = [], model.args
    for seed in range(args.seed, args.seed + args.seeds):
        full, own, rows = model, argparse.Namespace(**vars(args) | {"seed": seed}), set(args.rows)
        if seed != args.seed:
            torch.manual_seed(seed)
            full = Model(own, data)
            if rows & {"full", "filled", "part-filled"}:
                train_whole(full, updates)
        for name in ROWS:
            if name not in (rows | {"full"} if seed == args.seed else rows):
                continue
            if name == "shifted" and args.shift:  # all rows are
                continue
            try:
                G = full.generator if name == "full" else train_row(name, full, data, updates)
            except UsageError as error:  # the others stand
                print(f"{name}, seed {seed}, is left out: {error}", flush=True)
                continue
            found = found_classes(G, data.test)
            figures, recall = measures(data.test_labels, found, args.counts)
            recall = {f"recall {c}": value for c, value in zip(data.classes, recall)}
            results.append({"row": name, "seed": seed, **figures, **recall})
            if sys.stdout:
                print(f"{name}, seed {seed}: ACSA {100 * figures['acsa']:.1f} %", flush=True)
    return results


def summarise(results):
    """{row: {measure: [mean, standard deviation]}} over the seeds, n with them."""
    rows = {}
    for name in dict.fromkeys(result["row"] for result in results):
        own = [result for result in results if result["row"] == name]
        rows[name] = {"n": len(own)}
        for key in ("acsa", "f1", "gm", "gm_macro", "rarest"):
            values = np.array([result[key] for result in own])
            spread = values.std(ddof=1) if len(own) > 1 else 0.0
            rows[name][key] = [float(values.mean()), float(spread)]
    return rows


def as_text(rows):
    """The summary as lines, in per cent."""
    lines = [f"{'row':12} n  {'ACSA':>12} {'F1':>12} {'GM':>12} {'three rarest':>12}"]
    for name, row in rows.items():
        cells = [row[key] for key in ("acsa", "f1", "gm", "rarest")]
        cells = [f"{100 * mean:.1f}" + f" ± {100 * sd:.1f}" * (row["n"] > 1) for mean, sd in cells]
        lines.append(f"{name:12} {row['n']}  " + " ".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


@torch.no_grad()
def kinds_of_images(G, label, seed=1):
    """{kind: images (n, channels, height, width) in [0, 1]} of these labels: mixtures by M, by
    uniform alpha and by equal weights, reconstructions, SMOTE on pixels, and copies."""
    rng, kinds = own_rng(G, seed), {}
    x = G.tuples(label, G.t, rng)
    z = G.latents(x)
    alphas = {"generated": weights(G.mixer, z, label, rng), "uniform": weights(None, z, label, rng)}
    alphas["equal"] = torch.full_like(alphas["uniform"], 1 / G.t)
    latents = {name: convex(z, alpha) for name, alpha in alphas.items()}
    latents["reconstructed"] = z[:, 0]
    for name, z in latents.items():
        pairs = zip(z.split(500), label.split(500))
        kinds[name] = torch.cat([G.decoder(*pair) for pair in pairs])
    kinds["smote"] = torch.zeros_like(kinds["generated"])
    for c in label.unique().tolist():
        own = label == c
        kinds["smote"][own] = pixel_smote(G, c, int(own.sum()), seed).float() / 255
    kinds["copies"] = x[:, 0]
    return kinds


@torch.no_grad()
def image_figures(G, data, judge, each=100):
    """Of so many images a class: the share that the judge finds in their class, mean and worst; and
    density and coverage, means over all classes but the largest, beside held-out images."""
    label = torch.arange(len(G.classes), device=G.count.device).repeat_interleave(each)
    figures = {}
    for name, images in kinds_of_images(G, label).items():
        features, logits = (torch.cat(x) for x in zip(*(judge(part) for part in images.split(500))))
        share = (logits.argmax(dim=1) == label).double().view(-1, each).mean(dim=1)
        figures[f"preserved_{name}"] = share.mean().item()
        figures[f"preserved_{name}_worst"] = share.min().item()
        found = []
        for c, fake in enumerate(features.split(each)):
            real = data.test[data.test_labels == c][:1000]
            if c != G.count.argmax() and len(real) > 1:
                found.append(density_and_coverage(judge(unit(real))[0], fake))
        if found:
            figures |= dict(zip((f"density_{name}", f"coverage_{name}"), np.mean(found, axis=0)))
        if name == "generated":
            shares = dict(zip(map(str, G.classes), share.tolist()))
    return {name: float(value) for name, value in figures.items()} | {"preserved": shares}


def density_and_coverage(real, fake, k=5):
    """How many k-th-neighbour balls of real rows (n, d) hold a row of fake (m, d), over k; and the
    share of balls that hold one."""
    exact, k = {"compute_mode": "donot_use_mm_for_euclid_dist"}, min(k, len(real) - 1)
    radius = torch.cdist(real, real, **exact).kthvalue(k + 1, dim=1).values
    within = torch.cdist(fake, real, **exact) <= radius
    return within.sum(dim=1).double().mean().item() / k, within.any(dim=0).double().mean().item()


@torch.no_grad()
def latent_figures(G, data):
    """What mixing does: L on held-out latents, on both ends of pairs of a class and between them;
    how far alpha is from equal weights, and how often it is largest where L is least certain."""
    rng = own_rng(G, 2)
    z = torch.cat([G.encoder(normalise(part)) for part in data.test.split(500)])
    ends, between = [], []
    for c in data.test_labels.unique().tolist():
        own = z[data.test_labels == c]
        other = own[torch.randperm(len(own), device=z.device, generator=rng)]
        pairs = torch.stack([own, other], dim=1)
        mixed = convex(pairs, weights(None, pairs, None, rng))
        ends.append((G.linear(pairs).argmax(dim=2) == c).all(dim=1))
        between.append(G.linear(mixed).argmax(dim=1) == c)
    label = torch.arange(1000, device=z.device) % len(G.classes)
    z = G.latents(G.tuples(label, G.t, rng))
    alpha = weights(G.mixer, z, label, rng)
    sure = G.linear(z).log_softmax(dim=2).gather(2, label[:, None, None].expand(-1, G.t, 1))
    uncertain = sure[..., 0].argmin(dim=1)
    figures = {
        "pairs_both_right": torch.cat(ends).double().mean(),
        "pairs_right_between": torch.cat(between).double().mean(),
        "training_latents_right": (G.linear(z).argmax(dim=2) == label[:, None]).double().mean(),
        "alpha_above_0.9": (alpha.amax(dim=1) > 0.9).double().mean(),
        "alpha_above_0.99": (alpha.amax(dim=1) > 0.99).double().mean(),
        "alpha_on_less_certain": (alpha.argmax(dim=1) == uncertain).double().mean(),
    }
    return {name: value.item() for name, value in figures.items()}


# ------------------------------------------------------------------ figures
def finish(model, data, folder, rows):
    """The table and pictures of a finished run, and what its summary has beside the last row."""
    G, args = model.generator, model.args
    save_curves(folder / "curves.png", rows)
    save_classes(G, folder / "classes.png")
    save_nearest(G, folder / "nearest.png")
    save_latents(G, folder / "latents.png")
    judge, accuracy = train_classifier(data, epochs=1)
    each = max(2, min(100, 5000 // len(G.classes)))  # all are in memory
    figures = image_figures(G, data, judge, each) | latent_figures(G, data)
    results = table(model, data, rows[-1]["step"])
    lines = [results[0], *(result.values() for result in results), []]
    text = "\n".join(",".join(str(cell).replace(",", ";") for cell in line) for line in lines)
    write_file(folder / "table.csv", text.encode())
    summary = summarise(results)
    if sys.stdout:
        print(as_text(summary))
    if args.balance:
        try:
            balance(G, Path(args.balance), args.target, args.seed)
        except OSError as error:
            way = f"--generate {folder / 'checkpoint.pt'} --balance ANOTHER writes it"
            print(f"{SCRIPT}: --balance {args.balance}: {error}; {way}")
    return {"judge_accuracy": accuracy} | figures | {"table": summary}


def save_classes(G, path, each=6):
    """A row for each of the ten rarest classes: training images, SMOTE's on pixels, and D's."""
    rarest = G.count.argsort()[:10].flip(0)
    kinds = kinds_of_images(G, rarest.repeat_interleave(each))
    real = G.tuples(rarest.repeat_interleave(each), 1, own_rng(G, 3))[:, 0]
    gap = torch.ones_like(kinds["smote"]).unflatten(0, (-1, each))[:, :1]
    blocks = (real, kinds["smote"], kinds["generated"])
    blocks = [block.unflatten(0, (-1, each)) for block in blocks]
    grid = torch.cat([blocks[0], gap, blocks[1], gap, blocks[2]], dim=1)
    save_image(grid.flatten(0, 1), path, nrow=grid.shape[1])


def save_nearest(G, path, n=12):
    """Images that D makes of the rarest class, and below each the training image nearest to it."""
    c = int(G.count.argmin())
    images, members = sample(G, n, torch.full((n,), c)), normalise(G.images[G.labels() == c])
    nearest = members[torch.cdist(images.flatten(1), members.flatten(1)).argmin(dim=1)]
    save_image(torch.cat([images, nearest]), path, nrow=n)


@torch.no_grad()
def save_latents(G, path, most=4000):
    """Latents on their two principal axes: the training images', and as many mixtures a class as
    fill the classes up."""
    from matplotlib.figure import Figure

    target = min(G.count.max().item(), most // len(G.classes))
    label = G.labels()
    z = torch.cat([G.encoder(normalise(part)) for part in G.images.split(500)])
    missing = (target - G.count).clamp_min(0)
    more = torch.arange(len(G.classes), device=label.device).repeat_interleave(missing)
    added = torch.cat([mixed for mixed, _ in mixtures(G, more, own_rng(G, 4))])
    axes = torch.linalg.svd(z - z.mean(dim=0), full_matrices=False).Vh[:2].T
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    sets = (z, label), (torch.cat([z, added]), torch.cat([label, more]))
    for axis, title, (points, own) in zip(figure.subplots(1, 2), ("before", "after"), sets):
        x, y = ((points - z.mean(dim=0)) @ axes).T.cpu().numpy()
        axis.scatter(x, y, 4, own.cpu().numpy(), cmap="tab10", alpha=0.6)
        axis.set_title(title)
    figure.savefig(path, dpi=120)


def save_curves(path, rows):
    """ACSA, GM and the recall of the rarest classes; the critic's distance and the losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = {name: left for name in ("acsa", "gm", "rarest")}
    curves |= {name: right for name in ("distance", "loss_points", "loss_mixed", "absolute_error")}
    for name, axis in curves.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points), marker=".", label=name)
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
