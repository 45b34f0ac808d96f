# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.10", "torchvision", "numpy", "tqdm", "matplotlib", "scikit-learn"]
# ///
"""pix2pix (Isola, Zhu, Zhou & Efros 2017, https://arxiv.org/abs/1611.07004): learns from pairs of
pictures to translate one kind into the other: labels into photographs, grey into colour.

    python pix2pix.py                                # grey -> colour, of two photographs
    python pix2pix.py --data-dir pairs               # A|B in one picture each, or A/ and B/
    python pix2pix.py --task colour --data-dir photographs
    python pix2pix.py --dataset facades --direction BtoA
    python pix2pix.py --translate runs/.../checkpoint.pt --input pictures --out translated

On facades, 2,000 updates on 128x128 squares, a quarter of the width (n = 100 pairs, 1 seed), the
outputs' a and b overlap the truths' by 0.76, 0.74, without D by 0.75, 0.40. More: docs/pix2pix.md.

With x the input, y its truth, z the noise and G(x, z) what the generator makes of x:

    L_cGAN(G, D) = E log D(x, y) + E log(1 - D(x, G(x, z)))        (1)
    L_L1(G)      = E |y - G(x, z)|                                 (3)
    G*           = arg min_G max_D L_cGAN(G, D) + lambda L_L1(G)   (4)

G is a U-Net, which hands what each layer of its encoder has seen to the layer of its decoder of the
same size; D judges every patch of 70x70 pixels by itself; noise is dropout, also when G draws. The
ablations are flags: --loss takes away D, the L1 term, or x from D; --network the U-Net's skips;
--patch sets what D sees at once.

What the script measures of the paper's claims, on held-out pairs:

- `l1`, of values in [0, 1], and `diversity`, the mean distance between two outputs over that
  between two truths (section 4.2: GAN whose D does not see x collapses to one output);
- `histogram_l`, `_a`, `_b`: how far the colours of outputs and truths overlap (figure 7), in Lab,
  in bins of 2 units; `sharpness`, the outputs' gradient energy over the truths' (L1 blurs);
- where the truth is a map of labels: accuracy per pixel, per class, and intersection over union, by
  nearest palette colour (table 6: L1 alone is best there);
- where the input is: the same of what a segmenter, trained on real pairs, sees in the outputs, and
  in the truths (the FCN score of section 4.1, by a smaller network);
- `noise`, the root mean square difference of two outputs of one input (section 3.1: it is small).

Departures: norm is by each map of each picture alone, which at the paper's batch of 1 is its batch
norm, so that a picture is translated alike alone, in a batch, in training and after; G learns from
D after D's update (the authors reuse D's answer from before). Pictures keep their size, and squares
of them are trained on, where the authors make all 256x256; reflection continues them for G.

Nothing here has a fused kernel: --kernels changes nothing.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import socket
import sys
import tarfile
import time
import zlib
from collections import namedtuple
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import download_and_extract_archive
from tqdm import tqdm

SCRIPT = "pix2pix"
SETS = ("photographs", "facades", "drawn", "folder")
HALVINGS = {1: 0, 16: 1, 70: 3, 286: 5}  # of a side in D, by the side of the patch it sees
JITTER = 286 / 256  # a training picture is enlarged by this, and cut at random (section 6.2)
LOSSES = ("l1+cgan", "l1", "gan", "cgan", "l1+gan")


# ------------------------------------------------------------------ arguments
def arguments():
    """The paper's settings and ablations, beside the flags that every script has."""
    parser = run_arguments("pix2pix (Isola et al. 2017): translates pictures, learnt from pairs.")
    add = parser.add_argument_group("data").add_argument
    sets = f"of {', '.join(SETS)}; None: folder with --data-dir, otherwise photographs"
    add("--dataset", metavar="NAME", help=sets)
    add("--data-dir", help="pairs: A|B in one picture each, or A/ and B/; parts train/ and test/")
    add("--task", choices=("pairs", "colour"), default="pairs", help="colour: grey -> colour")
    add("--direction", choices=("AtoB", "BtoA"), default="AtoB", help="what is input, what truth")
    size = "of training crops; None: 256, or what suits smaller pictures"
    add("--image-size", type=at_least(16, high=1024), metavar="N", help=size)
    add("--no-jitter", action="store_true", help="crop without enlarging first")
    add("--no-mirror", action="store_true", help="left stays left: for maps and writing")
    add = parser.add_argument_group("pix2pix").add_argument
    add("--loss", choices=LOSSES, default=LOSSES[0], help="gan: D does not see the input")
    add("--l1-weight", type=at_least(0, float), default=100, help="lambda")
    add("--network", choices=("unet", "encoder-decoder"), default="unet", help="with skips or not")
    add("--patch", type=int, choices=HALVINGS, help="side of what D sees; None: 70 where it fits")
    width = "maps of the first layers; None: the paper's 64, for photographs and drawn 32 and 16"
    add("--width", type=at_least(1, high=1024), help=width)
    add("--lr", type=at_least(0, float), default=2e-4, help="learning rate of both networks")
    add = parser.add_argument_group("use after training").add_argument
    add("--translate", dest="generate", metavar="CHECKPOINT", help="of --input, by its generator")
    add("--input", metavar="PATH", help="a picture or a folder of them, of any sizes")
    add("--no-noise", action="store_true", help="translate without dropout")
    return parser


def suit(args, data):
    """Gives the flags that were left out what suits the data."""
    if args.input or args.no_noise:
        raise UsageError("--input and --no-noise go with --translate CHECKPOINT")
    if args.data_dir and args.out and os.path.realpath(args.out) == os.path.realpath(args.data_dir):
        raise UsageError(f"--out {args.out} is --data-dir; choose another folder for the run")
    shorter = data.train.amin(dim=1).double().median().item()
    args.image_size = args.image_size or min(256, max(16, 2 ** round(math.log2(shorter))))
    args.patch = args.patch or (70 if args.image_size >= 24 else 16)
    least = 3 * 2 ** HALVINGS[args.patch]
    if "gan" in args.loss and args.image_size < least:
        raise UsageError(f"--patch {args.patch} needs an --image-size of {least} or more")
    own = {"photographs": (32, 1, 600), "drawn": (16, 4, 1)}  # what two cores do in minutes
    width, batch_size, epochs = own.get(data.name, (64, 1, 200))
    args.width, args.epochs = args.width or width, args.epochs or epochs
    args.batch_size = args.batch_size or min(batch_size, len(data.train))


# ------------------------------------------------------------------ networks (section 6.1)
class Generator(nn.Module):
    """G(x, z) -> pictures in (-1, 1), of x in [-1, 1], both (n, channels, height, width).

    `depth` convolutions halve the sides, to 1 where these are 2**depth, and as many double them. z
    are the masks of dropout that `draw` gives. `colour`: x is L, and the pictures are a and b.
    """

    def __init__(self, inputs=3, outputs=3, width=64, depth=8, skips=True, colour=False):
        super().__init__()
        self.depth, self.skips, self.colour = depth, skips, colour
        maps = [width * min(2**i, 8) for i in range(depth)]
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for i, (ins, outs) in enumerate(itertools.pairwise([inputs, *maps])):
            layers = [nn.LeakyReLU(0.2, inplace=True)] if i else []
            layers += [nn.Conv2d(ins, outs, 4, 2, 1, bias=False)]
            layers += [norm(outs)] if 0 < i < depth - 1 else []  # none in the bottleneck (errata)
            self.encoder.append(nn.Sequential(*layers))
        self.widths = [*reversed(maps[:-1]), outputs]
        for i, outs in enumerate(self.widths):
            ins = maps[-1 - i] * (2 if skips and i else 1)
            layers = [nn.ReLU(inplace=True), nn.ConvTranspose2d(ins, outs, 4, 2, 1, bias=False)]
            layers += [norm(outs)] if i < depth - 1 else []
            self.decoder.append(nn.Sequential(*layers))
        self.apply(initialise)

    def draw(self, x, seed=None):
        """z for inputs x: which units the first three layers of the decoder drop, half of them.

        Masks (n, maps, height, width) of 0 and 2, or of a seed (1, ...), the same for each input.
        """
        rng = None if seed is None else torch.Generator(x.device).manual_seed(seed)
        n = len(x) if seed is None else 1
        sides = [side >> self.depth for side in self.continued(x)]
        shapes = [(n, w, *(s << i for s in sides)) for i, w in enumerate(self.widths[:3], start=1)]
        return [2.0 * (torch.rand(s, device=x.device, generator=rng) < 0.5) for s in shapes]

    def continued(self, x):
        """The sides of x, made multiples of what `depth` halvings take."""
        return [math.ceil(side / 2**self.depth) << self.depth for side in x.shape[2:]]

    def maps(self, x, z=()):
        """The decoder's last maps, before tanh."""
        height, width = x.shape[2:]
        x, skips = reflected(x, *self.continued(x)), []
        for layer in self.encoder:
            skips.append(x := layer(x))  # which the next layer's leaky ReLU changes in place
        for i, layer in enumerate(self.decoder):
            x = layer(torch.cat([x, skips[-1 - i]], dim=1) if i and self.skips else x)
            if i < len(z):
                x = x * z[i].to(x.dtype)
        return cut(x, height, width)

    def forward(self, x, z=()):
        return torch.tanh(self.maps(x, z)).float()  # under autocast, too


class Discriminator(nn.Module):
    """D(x, y) -> scores (n, 1, rows, columns), logits, each of a patch of `patch` pixels a side.

    Of x and y in [-1, 1], (n, channels, height, width); without `sees_input` of y alone.
    """

    def __init__(self, inputs=3, outputs=3, width=64, patch=70, sees_input=True):
        super().__init__()
        self.sees_input, halvings = sees_input, HALVINGS[patch]
        kernel, padding = (4, 1) if halvings else (1, 0)
        layers, ins = [], outputs + inputs * sees_input
        for i in range(max(2, halvings + 1)):
            outs, stride = width * min(2**i, 8), 2 if i < halvings else 1
            layers += [nn.Conv2d(ins, outs, kernel, stride, padding, bias=False)]
            layers += [norm(outs)] if i else []
            layers, ins = [*layers, nn.LeakyReLU(0.2, inplace=True)], outs
        layers += [nn.Conv2d(ins, 1, kernel, 1, padding, bias=False)]
        self.layers = nn.Sequential(*layers).apply(initialise)

    def forward(self, x, y):
        return self.layers(torch.cat([x, y], dim=1) if self.sees_input else y).float()


def norm(maps):
    """Each map of each picture by itself: the paper's batch norm at its batch of 1."""
    return nn.GroupNorm(maps, maps)


def initialise(module):
    """The paper's initial weights, N(0, 0.02), and the authors' gains of norm, N(1, 0.02)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.GroupNorm):
        nn.init.normal_(module.weight, 1, 0.02)


def reflected(x, height, width):
    """Pictures (..., height, width) continued by reflection to these sides, however far."""
    for dim, total in ((-2, height), (-1, width)):
        if (n := x.shape[dim]) < total:
            at = (torch.arange(total, device=x.device) - (total - n) // 2) % max(1, 2 * n - 2)
            x = x.index_select(dim, torch.minimum(at, (2 * n - 2 - at).abs()))
    return x


def cut(x, height, width):
    """The middle of pictures (..., height, width)."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


# ------------------------------------------------------------------ the training step
def train_step(model, x, y):
    """One update of D, then one of G, on inputs x and truths y (batch, channels, side, side).

    Returns the losses: D's and G's in nats, L1 of values in [-1, 1].
    """
    G, D, args = model.generator, model.discriminator, model.args
    fake = G(x, G.draw(x))
    loss_l1 = (y - fake).abs().mean()
    losses, loss_g = {"loss_l1": loss_l1}, args.l1_weight * loss_l1 if "l1" in args.loss else 0

    if "gan" in args.loss:
        # halved as in section 3.3, though Adam divides such a factor out again
        loss_d = (F.softplus(-D(x, y)).mean() + F.softplus(D(x, fake.detach())).mean()) / 2
        model.optimizer_d.zero_grad()
        loss_d.backward()
        model.optimizer_d.step()
        loss_gan = F.softplus(-D(x, fake)).mean()
        losses, loss_g = losses | {"loss_d": loss_d, "loss_g": loss_gan}, loss_g + loss_gan

    model.optimizer_g.zero_grad()
    loss_g.backward(inputs=list(G.parameters()))  # no gradient for D's weights
    model.optimizer_g.step()
    return losses


class Model(nn.Module):
    """Both networks and their optimisers, as train_step takes them; --loss l1 leaves D alone."""

    def __init__(self, args, data):
        super().__init__()
        self.args, self.samples_per_step, self.kernels = args, args.batch_size, "reference"
        self.examples = data.test[:6], data.about
        self.generator = generator_of(args, data.about)
        sides = data.about["input"], data.about["output"], args.width, args.patch
        self.discriminator = Discriminator(*sides, "cgan" in args.loss)
        self.to(data.train.device)
        adam = {"lr": args.lr, "betas": (0.5, 0.999), "fused": True, "capturable": True}
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), **adam)
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), **adam)
        self.optimizers = [self.optimizer_g, self.optimizer_d]

    def batch(self, data, index):
        """What train_step takes of the pairs of these numbers."""
        crops = [random_crop(data.pairs[i], self.args) for i in index.tolist()]
        return normalise(torch.stack(crops), data.about)


def generator_of(args, about):
    kinds = args.network == "unet", about["colour"]
    return Generator(about["input"], about["output"], args.width, depth_of(args), *kinds)


def depth_of(args):
    """How often a training crop is halved: to a side of 1, or of 2 if it is no power of 2."""
    return int(math.log2(args.image_size))


def random_crop(pair, args):
    """A square of a uint8 pair (channels, height, width), as float32 in [0, 255] (section 6.2)."""
    side = args.image_size if args.no_jitter else round(args.image_size / JITTER)
    pair = reflected(pair, side, side)
    y, x, turned = torch.rand(3, device=pair.device).tolist()
    top, left = int(y * (pair.shape[1] - side + 1)), int(x * (pair.shape[2] - side + 1))
    crop = pair[:, top : top + side, left : left + side].float()
    if not args.no_jitter:
        crop = F.interpolate(crop[None], (args.image_size,) * 2, mode="bilinear")[0]
    return crop if args.no_mirror or turned < 0.5 else crop.flip(-1)


def normalise(pairs, about):
    """x and y in [-1, 1], of pairs (n, channels, height, width) in [0, 255]."""
    if about["colour"]:
        return lightness_and_colour(pairs.float() / 255)
    pairs, sides = pairs.float() / 127.5 - 1, [about["input"], about["output"]]
    return pairs.split(sides[::-1], dim=1)[::-1] if about["swapped"] else pairs.split(sides, dim=1)


# ------------------------------------------------------------------ Lab
FROM_RGB = torch.tensor(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)
WHITE = FROM_RGB.sum(dim=1).view(3, 1, 1)  # of sRGB: D65


def lab(rgb):
    """L in [0, 100], a and b, of sRGB pictures (n, 3 or 1, height, width) in [0, 1] (CIE 1976)."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = torch.einsum("ij,njhw->nihw", FROM_RGB.to(rgb), linear.expand(-1, 3, -1, -1))
    xyz = xyz / WHITE.to(rgb)
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp_min(1e-6) ** (1 / 3), xyz * 841 / 108 + 4 / 29)
    x, y, z = f.unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def rgb(lab):
    """sRGB pictures in [0, 1] of L, a and b (n, 3, height, width); what is no colour is clipped."""
    lightness, a, b = lab.unbind(dim=1)
    y = (lightness + 16) / 116
    f = torch.stack([y + a / 500, y, y - b / 200], dim=1)
    xyz = torch.where(f > 6 / 29, f**3, (f - 4 / 29) * 108 / 841) * WHITE.to(lab)
    linear = torch.einsum("ij,njhw->nihw", FROM_RGB.inverse().to(lab), xyz).clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, linear * 12.92)


def lightness_and_colour(pictures):
    """L, and a and b, in [-1, 1] as the authors scale them, of pictures in [0, 1]."""
    x = lab(pictures)
    return x[:, :1] / 50 - 1, x[:, 1:] / 110


def picture(x, y, colour):
    """Pictures in [0, 1] of inputs x and outputs or truths y, both in [-1, 1]."""
    return rgb(torch.cat([x * 50 + 50, y * 110], dim=1)) if colour else y / 2 + 0.5


# ------------------------------------------------------------------ sampling
@torch.no_grad()
def translate(generator, images, seed=0, noise=True, batch=8):
    """Pictures in [0, 1], of images of any sizes (channels, height, width) in [0, 1], as a list.

    z follows from the seed alone, so that a picture comes out the same each time, by itself or
    among others; without noise no unit is dropped. Up to `batch` images of one size go together.
    Raises ValueError where the channels are not the input's; with `colour` 1 and 3 are taken.
    """
    results = []
    allowed = (1, 3) if generator.colour else (generator.encoder[0][0].in_channels,)
    for x in batches(images, batch):
        shape = x.shape[1:]
        if len(shape) != 3 or shape[0] not in allowed:
            raise ValueError(f"an image of shape {[*shape]}: channels {allowed} are wanted, first")
        x = lightness_and_colour(x)[0] if generator.colour else x * 2 - 1
        y = generator(x, generator.draw(x, seed) if noise else ())
        results += picture(x, y, generator.colour)
    return results


def batches(pictures, n=8):
    """Up to n neighbours of one shape at a time, stacked; of large ones fewer, to save memory."""
    for shape, group in itertools.groupby(pictures, lambda picture: picture.shape):
        equal, k = [*group], max(1, min(n, 2**22 // max(1, shape.numel())))
        for i in range(0, len(equal), k):
            yield torch.stack(equal[i : i + k])


def load_generator(path, device="cpu"):
    """The trained generator of a checkpoint, for `translate(load_generator(path), [image])`."""
    state = load_checkpoint(path)
    generator = generator_of(argparse.Namespace(**state["config"]), state["data"]["about"])
    weights = state["model"].items()
    generator.load_state_dict({k[10:]: w for k, w in weights if k.startswith("generator.")})
    return generator.eval().requires_grad_(False).to(device)


def generate(args):
    """--translate: a picture, or each below a folder, under its own name below --out."""
    device = choose_device(args.device)
    generator = load_generator(args.generate, device)
    if not args.input:
        raise UsageError("--translate CHECKPOINT takes --input, a picture or a folder of pictures")
    source = Path(os.path.expanduser(args.input))
    out = Path(args.out or ("translated" if source.is_dir() else "translated.png"))
    if source.is_dir():
        targets = {p: out / p.relative_to(source).with_suffix(".png") for p in pictures_in(source)}
    elif out.suffix and Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise UsageError(f"--out {out}: no picture is written as {out.suffix}; .png or .jpg is")
    elif out.is_dir():
        targets = {source: out / f"{source.stem}.png"}
    else:
        targets = {source: out if out.suffix else Path(f"{out}.png")}
    read = {path.resolve() for path in targets}
    if any(target.resolve() in read for target in targets.values()):
        raise UsageError(f"--out {out}: a picture would be overwritten; choose another folder")
    if len({*targets.values()}) < len(targets):
        raise UsageError(f"--input {source}: names that differ in their suffix only; rename one")
    channels = 3 if generator.colour else generator.encoder[0][0].in_channels
    paths, size = [*targets], args.batch_size or 8
    for some in (paths[i : i + size] for i in range(0, len(paths), size)):
        images = [with_channels(read_picture(path), channels).to(device) / 255 for path in some]
        results = translate(generator, images, args.seed, not args.no_noise, size)
        for path, result in zip(some, results):
            targets[path].parent.mkdir(parents=True, exist_ok=True)
            save_picture(result, targets[path])


def save_samples(model, path):
    """Rows of input, output and truth, of the first held-out pairs."""
    pairs, about = model.examples
    save_rows(f"{path}.png", *shown(model.generator, pairs, about))


@torch.no_grad()
def shown(generator, pairs, about, seed=0):
    """Inputs, outputs and truths of uint8 pairs, as lists of pictures in [0, 1]."""
    inputs, outputs, truths = [], [], []
    for some in batches(pairs):
        x, y = normalise(some, about)
        inputs += x / 2 + 0.5
        outputs += picture(x, generator(x, generator.draw(x, seed)), about["colour"])
        truths += picture(x, y, about["colour"])
    return inputs, outputs, truths


# ------------------------------------------------------------------ evaluation
def evaluate(model, data):
    """The measures of the docstring on up to 32 held-out pairs."""
    _, outputs, truths = shown(model.generator, measured(data.test)[:32], data.about)
    return measures(outputs, truths, data.about)


def measured(pairs):
    """The first pairs, as many as fit into memory: half a gigabyte as float32, but two at least."""
    return pairs[: max(2, 2**27 // max(pair.numel() for pair in pairs))]


def measures(outputs, truths, about):
    """The measures of the docstring that follow from outputs and truths alone."""
    found = compare(outputs, truths)
    if about["labels"] == "output":
        palette = torch.tensor(about["palette"], device=truths[0].device)
        labels = ((nearest(y, palette), nearest(t, palette)) for y, t in zip(outputs, truths))
        found |= accuracies(sum(confusion(y, t, len(palette)) for y, t in labels))
    return found


def compare(outputs, truths):
    """How like two lists of pictures (1 or 3, height, width) in [0, 1] are."""
    pairs = [*zip(outputs, truths)]
    found = {"l1": sum((y - t).abs().mean().item() for y, t in pairs) / len(pairs)}
    colours = [sum(map(histograms, pictures)) for pictures in (outputs, truths)]
    overlap = torch.minimum(*(count / count.sum(dim=1, keepdim=True) for count in colours))
    names = ("histogram_l", "histogram_a", "histogram_b")[: 3 if len(outputs[0]) == 3 else 1]
    found |= dict(zip(names, overlap.sum(dim=1).tolist()))
    found["sharpness"] = sum(map(energy, outputs)) / max(1e-9, sum(map(energy, truths)))
    if len(outputs) > 1:
        found["diversity"] = mean_distance(outputs) / max(1e-9, mean_distance(truths))
    return found


def histograms(picture):
    """How many pixels of a picture have each L, a and b, (3, 110), in bins of 2 units."""
    first = torch.tensor([0, -110, -110], device=picture.device).view(3, 1)
    bins = ((lab(picture[None])[0].flatten(1) - first) / 2).long().clamp(0, 109)
    return torch.stack([torch.bincount(row, minlength=110) for row in bins]).double()


def energy(picture):
    """The sum of squared differences between neighbours of a picture."""
    return sum(picture.diff(dim=dim).square().sum().item() for dim in (-2, -1))


def mean_distance(pictures):
    """Between every two of the pictures, each averaged to 32x32."""
    small = torch.stack([F.adaptive_avg_pool2d(x, 32).flatten() for x in pictures])
    return torch.pdist(small).mean().item()


# ------------------------------------------------------------------ labels (table 6, section 4.1)
def nearest(image, palette):
    """The number (height, width) of the nearest of colours (k, 3) in [0, 255], of a picture."""
    pixels = image.flatten(1).T * 255
    return torch.cdist(pixels, palette.float()).argmin(dim=1).view(image.shape[1:])


def confusion(found, truth, k):
    """How many pixels have label i and were found to be j, (k, k)."""
    return torch.bincount((truth * k + found).flatten(), minlength=k * k).view(k, k).double()


def accuracies(count):
    """Accuracy per pixel and per class, and intersection over union, of labels that occur."""
    right, there, found = count.diagonal(), count.sum(dim=1), count.sum(dim=0)
    occurs = there > 0
    return {
        "pixel_accuracy": (right.sum() / count.sum()).item(),
        "class_accuracy": (right / there)[occurs].mean().item(),
        "iou": (right / (there + found - right))[occurs].mean().item(),
    }


def trained_segmenter(data, args, path, updates=3000):
    """A narrow U-Net that tells the labels of real photographs, trained on the training pairs.

    It takes x in [-1, 1]; its `maps` are logits (n, labels, height, width). The file at `path`
    keeps it for the next run.
    """
    about, device = data.about, data.train.device
    args = argparse.Namespace(**vars(args) | {"no_jitter": False, "no_mirror": False})
    palette = torch.tensor(about["palette"], device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # leaves the run's alone
        torch.manual_seed(0)
        segmenter = Generator(about["output"], len(palette), 16, depth_of(args)).to(device)
        if path.exists():
            segmenter.load_state_dict(torch.load(path, device, weights_only=True))
            return segmenter
        optimizer = torch.optim.Adam(segmenter.parameters(), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=updates)
        hidden = None if sys.stderr else True  # None: where it is no terminal
        for i in tqdm(range(updates), "segmenter", leave=False, disable=hidden):
            crop = random_crop(data.pairs[i % len(data.train)], args)
            labels, photograph = normalise(crop[None], about)
            label = nearest(labels[0] / 2 + 0.5, palette)
            logits = segmenter.maps(photograph, segmenter.draw(photograph))
            optimizer.zero_grad()
            F.cross_entropy(logits, label[None]).backward()
            optimizer.step()
            schedule.step()
    torch.save(segmenter.state_dict(), buffer := io.BytesIO())
    with contextlib.suppress(OSError):  # the next run trains its own
        write_file(path, buffer.getbuffer())
    return segmenter


@torch.no_grad()
def segmentation(segmenter, inputs, pictures, about):
    """What a segmenter sees in pictures, against the labels that are their inputs."""
    palette = torch.tensor(about["palette"], device=inputs[0].device)
    count = 0
    for labels, photograph in zip(inputs, pictures):
        found = segmenter.maps(photograph[None] * 2 - 1).argmax(dim=1)[0]
        count = count + confusion(found, nearest(labels, palette), len(palette))
    return {f"seen_{name}": value for name, value in accuracies(count).items()}


# ------------------------------------------------------------------ figures
def finish(model, data, folder, rows):
    """The pictures of a finished run, and what its summary.json has beside the last row."""
    G, about, test = model.generator, data.about, measured(data.test)
    save_curves(folder / "curves.png", rows)
    inputs, outputs, truths = shown(G, test, about)
    save_rows(folder / "examples.png", inputs[:12], outputs[:12], truths[:12])
    figures = {"pairs": len(test)} | measures(outputs, truths, about)
    _, again, _ = shown(G, test[:32], about, seed=1)
    changes = torch.stack([(a - b).square().mean() for a, b in zip(again, outputs)]).mean().sqrt()
    figures["noise"] = changes.item()
    if about["labels"] == "input":
        name = f"segmenter-{data.name}-{model.args.image_size}.pt"
        segmenter = trained_segmenter(data, model.args, folder.parent / name)
        figures |= segmentation(segmenter, inputs, outputs, about)
        truth = segmentation(segmenter, inputs, truths, about)
        figures |= {f"{name}_of_truth": value for name, value in truth.items()}
    if data.name == "drawn" and about["labels"] == "input":
        figures |= drawn_figures(inputs, outputs)
    return figures


def save_rows(path, *columns):
    """Rows of pictures in cells of 256 pixels, whatever their own sizes are (figure 4)."""
    sheet = Image.new("RGB", (256 * len(columns), 256 * len(columns[0])), "white")
    for j, column in enumerate(columns):
        for i, image in enumerate(column):
            cell = ImageOps.pad(to_image(image).convert("RGB"), (254, 254), color="white")
            sheet.paste(cell, (256 * j + 1, 256 * i + 1))
    sheet.save(path)


def to_image(image):
    """Pillow's picture, grey or in colour, of one (1 or 3, height, width) in [0, 1]."""
    levels = (image.clamp(0, 1) * 255).round().byte().cpu().movedim(0, -1).numpy()
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def save_curves(path, rows):
    """The losses, and the measures on held-out pairs, against updates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    panels = {left: ("l1", "histogram_a", "histogram_b", "sharpness", "diversity", "iou")}
    panels[right] = ("loss_d", "loss_g", "loss_l1")
    for panel, names in panels.items():
        for name in names:
            if drawn := [(row["step"], row[name]) for row in rows if name in row]:
                panel.plot(*zip(*drawn), label=name)
        panel.set(xlabel="update")
        panel.legend(fontsize="small")
    left.set(title="on held-out pairs", ylim=(0, None))
    right.set(title="losses: nats, and L1 of values in [-1, 1]")
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------ facades whose answers are known
LABELS = ((0, 0, 255), (255, 0, 0), (0, 255, 0), (255, 255, 0))  # sky, wall, window, door
PAINTED = ((170, 200, 230), (0, 0, 0), (40, 45, 60), (90, 60, 40))  # a wall's colour is drawn:
WALLS, SHARES = ((178, 76, 64), (217, 191, 128), (89, 115, 153)), (0.4, 0.25, 0.35)
MEDIAN = (178, 115, 128)  # channel by channel of the walls' colours: a colour that no wall has


class Drawn:
    """Pairs by number, each drawn when it is asked for: a map of labels and a painted facade."""

    def __init__(self, device="cpu", side=32):
        self.device, self.side = device, side

    def __getitem__(self, number):
        """A uint8 pair (6, side, side); numbers below 0 are others than those from 0."""
        rng, side = np.random.default_rng([abs(number), number < 0]), self.side
        label = np.zeros((side, side), int)
        top, left, right = rng.integers(2, 8), rng.integers(1, 6), rng.integers(26, 31)
        label[top:, left:right] = 1
        rows, columns = rng.integers(1, 4), rng.integers(2, 4)
        height, width = (side - 8 - top) // rows, (right - left) // columns
        for i, j in itertools.product(range(rows), range(columns)):
            y, x = top + i * height + 2, left + j * width + 2
            label[y : y + height - 3, x : x + width - 3] = 2
        x = rng.integers(left + 1, right - 6)
        label[side - 6 :, x : x + 4] = 3
        colours = np.array(PAINTED)
        colours[1] = WALLS[rng.choice(3, p=SHARES)]
        pair = np.concatenate([np.array(LABELS)[label], colours[label]], axis=2)
        return torch.tensor(pair.astype(np.uint8), device=self.device).permute(2, 0, 1)


def drawn_figures(inputs, outputs):
    """What the theory says of outputs for drawn labels: the walls' colours, and the layout.

    `wall_from_median` is the mean distance of walls from the median colour, `wall_from_nearest`
    from the nearest of the three there are, in [0, 1]; `wall_share_0`, `_1`, `_2` how many walls
    are nearest to each. `layout` is the accuracy of the labels told from the outputs,
    `layout_of_others` that for other inputs: equal where G ignores its input.
    """
    device = inputs[0].device
    truth = [nearest(x, torch.tensor(LABELS, device=device)) for x in inputs]
    walls = torch.stack([y[:, label == 1].median(dim=1)[0] for y, label in zip(outputs, truth)])
    median, three = (torch.tensor(colour, device=device) / 255 for colour in (MEDIAN, WALLS))
    distance = torch.cdist(walls, three)
    share = torch.bincount(distance.argmin(dim=1), minlength=3) / len(walls)
    palette = torch.tensor([PAINTED[0], MEDIAN, *PAINTED[2:], *WALLS], device=device)
    found = [nearest(y, palette) for y in outputs]
    found = [label.where(label < 4, 1) for label in found]
    others = [*truth[1:], truth[0]]
    agree = [[(a == b).double().mean() for a, b in zip(found, x)] for x in (truth, others)]
    layout, layout_of_others = torch.tensor(agree).mean(dim=1).tolist()
    return {
        "wall_from_median": (walls - median).norm(dim=1).mean().item(),
        "wall_from_nearest": distance.amin(dim=1).mean().item(),
        **{f"wall_share_{i}": value for i, value in enumerate(share.tolist())},
        "layout": layout,
        "layout_of_others": layout_of_others,
    }


# ------------------------------------------------------------------ pairs of pictures
Data = namedtuple("Data", "name about train pairs test")  # about: channels, colour, labels, palette
FACADES = "http://efrosgans.eecs.berkeley.edu/pix2pix/datasets/facades.tar.gz"
# the colours of the facades' labels, as their JPEGs have them
PALETTE = (0, 0, 172), (0, 0, 222), (0, 48, 255), (0, 128, 255), (0, 207, 255), (32, 255, 224)
PALETTE += (112, 255, 143), (192, 255, 64), (255, 240, 0), (255, 160, 0), (255, 80, 0)
PALETTE += (254, 0, 0), (174, 0, 0)


def load_data(args, device):
    """The pairs asked for: `train` are their heights and widths (n, 2), `pairs` and `test` the
    pairs, uint8 (channels, height, width), A's channels before B's; for colours the pictures."""
    name = args.dataset = args.dataset or ("folder" if args.data_dir else "photographs")
    colour = args.task == "colour" or name == "photographs"
    if name not in SETS:
        raise UsageError(f"--dataset {name}: it is one of {', '.join(SETS)}")
    if (args.task == "colour" and name != "folder") or (name == "folder" and not args.data_dir):
        raise UsageError(f"--dataset {name} --task {args.task}: give --data-dir FOLDER alone")
    if colour and args.direction == "BtoA":
        raise UsageError("--direction BtoA: grey to colour has no other direction")
    if name in ("facades", "folder"):
        args.data_dir = os.path.abspath(os.path.expanduser(args.data_dir or "data"))
    channels, palette, labels = (3, 3), (), ""
    if name == "drawn":
        train, palette, labels = Drawn(device), LABELS, "A"
        test, sizes = [train[-1 - i] for i in range(60)], torch.full((10_000, 2), train.side)
    elif name == "photographs":  # a gap between, so that no crop shows what is held out
        whole = [torch.tensor(x).permute(2, 0, 1) for x in load_sample_images().images]
        train, test = [x[:, :, :384] for x in whole], [x[:, :, 400:] for x in whole]
    elif name == "facades":
        train, test, channels = read_folder(facades(args.data_dir), read_pairs)
        palette, labels = PALETTE, "B"
    else:
        train, test, channels = read_folder(args.data_dir, read_colour if colour else read_pairs)
    if name != "drawn":
        train, test = ([pair.to(device) for pair in part] for part in (train, test))
        sizes = torch.tensor([pair.shape[1:] for pair in train])
    ins, outs = channels if args.direction == "AtoB" else channels[::-1]
    about = {"input": ins, "output": outs, "swapped": args.direction == "BtoA", "colour": colour}
    if colour:  # L, and a and b
        about |= {"input": 1, "output": 2}
    if labels:
        labels = "output" if (labels == "A") == about["swapped"] else "input"
    about |= {"labels": labels, "palette": [[*colour] for colour in palette]}
    return Data(name, about, sizes.to(device), train, test)


def facades(folder):
    """Where the authors' facades are, 400, 100 and 106 pairs, downloaded if they are not there."""
    root = Path(folder, "facades")
    if not root.exists():
        try:
            socket.setdefaulttimeout(5)  # a network that never answers is no network
            download_and_extract_archive(FACADES, folder)
        except (OSError, RuntimeError, EOFError, tarfile.TarError, zlib.error) as error:
            reason = f"facades can not be downloaded to --data-dir {folder}"
            raise UsageError(f"{reason}: {error}") from error
        finally:  # unpacked, or a part of it
            Path(folder, "facades.tar.gz").unlink(missing_ok=True)
    counts = [len(pictures_in(root / part)) for part in ("train", "val", "test")]
    if counts != [400, 100, 106]:
        raise UsageError(f"{root} has {counts} pictures, not 400, 100 and 106; delete it")
    return root


def read_folder(folder, read):
    """Pairs to train on and to test with, and the channels of A and B, by a function for a part.

    The parts are train/ and val/ or test/; where these are not, every fifth pair is held out.
    """
    folder = Path(folder)
    for other in ("trainA", "A/train"):
        if (folder / other).is_dir():
            raise UsageError(f"{folder}: its {other}/ is to be train/A/, and the others as this")
    tests = [folder / name for name in ("val", "test") if (folder / name).is_dir()]
    train = folder / "train"
    if tests and not train.is_dir():
        raise UsageError(f"{folder}: beside {tests[0].name}/ the other pairs are to be in train/")
    parts = [train, *tests[:1]] if train.is_dir() else [folder]
    pairs = [read(part) for part in parts]
    if len(pairs) == 1:
        held = range(1, len(pairs[0]), 5)
        pairs = [x for i, x in enumerate(pairs[0]) if i not in held], [pairs[0][i] for i in held]
    if not all(pairs):
        raise UsageError(f"{folder}: two pictures or pairs are the least, one of them to test with")
    channels = [max(len(pair[i]) for part in pairs for pair in part) for i in (0, -1)]
    joined = [[join(pair, channels) for pair in part] for part in pairs]
    return *joined, channels


def join(pair, channels):
    """A tuple of pictures as one tensor, each with as many channels as it shall have."""
    return torch.cat([with_channels(x, n) for x, n in zip(pair, channels)])


def read_colour(folder):
    """The pictures below a folder, each as a tuple of one."""
    return [(with_channels(read_picture(path), 3),) for path in progress(pictures_in(folder))]


def read_pairs(folder):
    """The pairs (A, B) of a folder: of A/ and B/ by their names, or side by side in one picture."""
    if not ((folder / "A").is_dir() and (folder / "B").is_dir()):
        print(f"{SCRIPT}: {folder} has no A/ and B/, so its pictures are taken for A|B")
        return [halves(path) for path in progress(pictures_in(folder))]
    sides, pairs = [], []
    for side in (folder / "A", folder / "B"):
        paths = pictures_in(side)
        sides.append({path.relative_to(side).with_suffix(""): path for path in paths})
        if len(sides[-1]) < len(paths):
            raise UsageError(f"{side}: names that differ in their suffix only; rename one")
    if alone := sorted(sides[0].keys() ^ sides[1].keys()):
        more = f", nor are {len(alone) - 1} more" if len(alone) > 1 else ""
        raise UsageError(f"{folder}: {alone[0]} is not in both A/ and B/{more}")
    for name in progress([*sides[0]]):
        a, b = (read_picture(side[name]) for side in sides)
        if a.shape[1:] != b.shape[1:]:
            sizes = " and ".join(f"{x.shape[2]}x{x.shape[1]}" for x in (a, b))
            raise UsageError(f"{folder}: {name} in A/ and B/ are {sizes}; make them of one size")
        pairs.append((a, b))
    return pairs


def halves(path):
    """A and B of a picture that has them side by side."""
    both = read_picture(path)
    if both.shape[2] % 2:
        size = f"{both.shape[2]}x{both.shape[1]}"
        raise UsageError(f"{path} is {size}: no two equal halves side by side (or use A/ and B/)")
    return both.chunk(2, dim=2)


def progress(paths):
    return tqdm(paths, "reading pictures", leave=False, disable=None if sys.stderr else True)


def pictures_in(folder):
    """The pictures below a folder, in order; nothing hidden, and nothing of a run's folder."""
    folders, seen, found = [Path(folder)], set(), []
    for parent in folders:  # which grows
        if parent.resolve() in seen or (parent / "metrics.csv").exists():  # linked twice, or a run
            continue
        seen.add(parent.resolve())
        inside = sorted(path for path in parent.iterdir() if not path.name.startswith("."))
        folders += [path for path in inside if path.is_dir()]
        found += [p for p in inside if p.suffix.lower() in IMG_EXTENSIONS and p.is_file()]
    if not found:
        raise UsageError(f"{folder} has no pictures ({' '.join(IMG_EXTENSIONS)})")
    return found


def read_picture(path):
    """A file's picture, uint8 (1 or 3, height, width), of 16 bits the upper, on a white ground."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):
            levels = np.asarray(image).astype(np.int64)
            least = 256 if levels.any() else 0  # 8 bits in 16 or 32 would become black
            if levels.min() < 0 or not least <= levels.max() <= 65_535:
                raise ValueError("values that are not of 16 bits; save it with 8 or 16 bits")
            image = Image.fromarray((levels >> 8).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point values; save it with 8 or 16 bits")
        mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        image = image.convert("RGBA")  # what is transparent becomes white
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(mode)
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise UsageError(f"{path}: {error}; mend it or take it out") from error
    return torch.tensor(np.asarray(image)).view(image.height, image.width, -1).permute(2, 0, 1)


def with_channels(image, n):
    """A uint8 picture (1 or 3, height, width) with n channels; grey is the luma of colours."""
    if len(image) == n or n == 3:
        return image.expand(n, -1, -1)
    weights = torch.tensor([299, 587, 114], device=image.device).view(3, 1, 1)
    return (image * weights).sum(dim=0, keepdim=True).div(1000).round().byte()


def save_picture(image, path):
    """Writes a picture (1 or 3, height, width) in [0, 1] as what the name says, grey as grey."""
    kind, buffer = Image.registered_extensions()[path.suffix.lower()], io.BytesIO()
    try:
        to_image(image).save(buffer, kind)
    except ValueError as error:
        raise UsageError(f"{path}: {error}; .png is a format for all pictures") from error
    write_file(path, buffer.getbuffer())


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
