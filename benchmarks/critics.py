"""Critics that people train, each at two sizes, for benchmarks/kernels.py.

`CRITICS` maps a name to make(big), which returns a critic of one score a row and the shape of its
input. The architectures follow the papers named beside them, at widths a benchmark can afford.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

CRITICS = {}


def critic(name):
    """Enter a make(big) under a name."""

    def enter(make):
        CRITICS[name] = make
        return make

    return enter


def leaky():
    return nn.LeakyReLU(0.2)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Sum(nn.Module):
    """The sum of what several modules make of the same input."""

    def __init__(self, *modules):
        super().__init__()
        self.terms = nn.ModuleList(modules)

    def forward(self, x):
        first, *rest = (module(x) for module in self.terms)
        for term in rest:
            first = first + term
        return first


def mean_score(channels):
    """A linear score of the mean over all positions."""
    return nn.Sequential(Apply(lambda x: x.flatten(2).mean(2)), nn.Linear(channels, 1))


def patches():
    """The mean of a map of patch scores."""
    return Apply(lambda x: x.flatten(1).mean(1))


def pyramid(activation, norm=None, convolution=nn.Conv2d):
    """Make a critic of 32x32 pictures: three convolutions, the second and third halve it."""

    def make(big):
        width, batch = (32, 64) if big else (8, 8)
        layers, channels = [], 3
        for i, out in enumerate((width, 2 * width, 4 * width)):
            layers.append(convolution(channels, out, 3, 1 if i == 0 else 2, 1))
            layers += [norm(out, 32 if i == 0 else 32 // 2**i)] if norm else []
            layers.append(activation())
            channels = out
        return nn.Sequential(*layers, mean_score(channels)), (batch, 3, 32, 32)

    return make


def spectral(*args):
    return parametrizations.spectral_norm(nn.Conv2d(*args))


def weight_norm(*args):
    return parametrizations.weight_norm(nn.Conv2d(*args))


CRITICS |= {
    "convolutions, leaky ReLU": pyramid(leaky),
    "convolutions, ReLU": pyramid(nn.ReLU),
    "convolutions, PReLU": pyramid(nn.PReLU),
    "convolutions, SiLU": pyramid(nn.SiLU),
    "convolutions, GELU": pyramid(nn.GELU),
    "convolutions, softplus": pyramid(nn.Softplus),
    "convolutions, ELU": pyramid(nn.ELU),
    "convolutions, tanh": pyramid(nn.Tanh),
    "convolutions, batch norm": pyramid(leaky, lambda c, s: nn.BatchNorm2d(c)),
    "convolutions, batch norm in evaluation": pyramid(leaky, lambda c, s: nn.BatchNorm2d(c).eval()),
    "convolutions, instance norm": pyramid(leaky, lambda c, s: nn.InstanceNorm2d(c)),
    "convolutions, affine instance norm": pyramid(
        leaky, lambda c, s: nn.InstanceNorm2d(c, affine=True)
    ),
    "convolutions, group norm": pyramid(leaky, lambda c, s: nn.GroupNorm(4, c)),
    "convolutions, group norm, SiLU": pyramid(nn.SiLU, lambda c, s: nn.GroupNorm(4, c)),
    "convolutions, layer norm": pyramid(leaky, lambda c, s: nn.LayerNorm([c, s, s])),
    "convolutions, spectral norm (SNGAN)": pyramid(leaky, convolution=spectral),
    "convolutions, weight norm": pyramid(leaky, convolution=weight_norm),
    "convolutions, max pooling": pyramid(lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, 1, 1))),
}


@critic("MNIST, 5x5 stride 2 (infogan.py's size)")
def _(big):
    w, batch = (64, 64) if big else (8, 8)
    return nn.Sequential(
        nn.Conv2d(1, w, 5, 2, 2), leaky(), nn.Conv2d(w, 2 * w, 5, 2, 2), leaky(),
        nn.Conv2d(2 * w, 4 * w, 5, 2, 2), leaky(), nn.Flatten(), nn.Linear(64 * w, 1),
    ), (batch, 1, 28, 28)  # fmt: skip


@critic("MNIST with layer norm")
def _(big):
    w, batch = (64, 64) if big else (8, 8)
    return nn.Sequential(
        nn.Conv2d(1, w, 5, 2, 2), nn.LayerNorm([w, 14, 14]), leaky(),
        nn.Conv2d(w, 2 * w, 5, 2, 2), nn.LayerNorm([2 * w, 7, 7]), leaky(),
        nn.Conv2d(2 * w, 4 * w, 5, 2, 2), nn.LayerNorm([4 * w, 4, 4]), leaky(),
        nn.Flatten(), nn.Linear(64 * w, 1),
    ), (batch, 1, 28, 28)  # fmt: skip


def dcgan(norm):
    def make(big):
        w, batch = (64, 16) if big else (8, 4)
        layers, channels = [], 3
        for out in (w, 2 * w, 4 * w, 8 * w):
            layers.append(nn.Conv2d(channels, out, 4, 2, 1))
            layers += [nn.BatchNorm2d(out)] if norm and channels > 3 else []
            layers.append(leaky())
            channels = out
        return nn.Sequential(*layers, nn.Conv2d(channels, 1, 4), nn.Flatten()), (batch, 3, 64, 64)

    return make


CRITICS |= {"DCGAN, 64x64": dcgan(False), "DCGAN with batch norm, 64x64": dcgan(True)}


def mlp(batch, sizes, activation, norm=None):
    """Make a perceptron's layers over `sizes` features."""
    layers = [nn.Flatten()] if len(batch) > 2 else []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), *([norm(b)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 1)), batch


@critic("perceptron, 784-512-512-256")
def _(big):
    return mlp((1024 if big else 64, 1, 28, 28), (784, 512, 512, 256), leaky)


@critic("perceptron with layer norm")
def _(big):
    width = 512 if big else 32
    return mlp((256 if big else 32, 64), (64, width, width), leaky, nn.LayerNorm)


@critic("perceptron with batch norm")
def _(big):
    width = 512 if big else 32
    return mlp((256 if big else 32, 64), (64, width, width), leaky, nn.BatchNorm1d)


@critic("points, 2-512-512-512, ReLU (wgan_gp.py's)")
def _(big):
    width = 512 if big else 64
    return mlp((256, 2), (2, width, width, width), nn.ReLU)


@critic("tiny perceptron, 2-16-16, tanh")
def _(big):
    return mlp((256 if big else 16, 2), (2, 16, 16), nn.Tanh)


@critic("tiny perceptron, 2-16-16, ReLU")
def _(big):
    return mlp((256 if big else 16, 2), (2, 16, 16), nn.ReLU)


def residual_linear(activation):
    def make(big):
        width, batch = (256, 256) if big else (16, 64)
        blocks = [
            Sum(nn.Identity(), nn.Sequential(nn.Linear(width, width), activation()))
            for _ in range(30)
        ]
        return nn.Sequential(*blocks, nn.Linear(width, 1)), (batch, width)

    return make


CRITICS |= {
    "30 residual linear layers, ReLU": residual_linear(nn.ReLU),
    "30 residual linear layers, tanh": residual_linear(nn.Tanh),
}


@critic("table in packs of ten, dropout (CTGAN)")
def _(big):
    columns, width, batch = (150, 256, 50) if big else (12, 32, 10)
    return nn.Sequential(
        nn.Linear(10 * columns, width), leaky(), nn.Dropout(0.5),
        nn.Linear(width, width), leaky(), nn.Dropout(0.5), nn.Linear(width, 1),
    ), (batch, 10 * columns)  # fmt: skip


class TabularAttention(nn.Module):
    """Two decision steps of TabNet: a mask over the columns, gated linear units, batch norm."""

    def __init__(self, columns, width):
        super().__init__()
        self.norm = nn.BatchNorm1d(columns)
        self.masks = nn.ModuleList(nn.Linear(columns, columns) for _ in range(2))
        self.gated = nn.ModuleList(
            nn.Sequential(nn.Linear(columns, 2 * width), nn.BatchNorm1d(2 * width), nn.GLU())
            for _ in range(2)
        )
        self.last = nn.Linear(width, 1)

    def forward(self, x):
        x, total, prior = self.norm(x), 0, 1
        for mask, gated in zip(self.masks, self.gated, strict=True):
            attention = (mask(x) * prior).softmax(1)
            prior = prior * (1.3 - attention)
            total = total + gated(x * attention).relu()
        return self.last(total)


@critic("table, TabNet's steps")
def _(big):
    columns, width, batch = (100, 128, 512) if big else (10, 8, 32)
    return TabularAttention(columns, width), (batch, columns)


class Recurrent(nn.Module):
    """A score of a recurrent cell's last output."""

    def __init__(self, kind, features, width):
        super().__init__()
        self.cell, self.last = kind(features, width, batch_first=True), nn.Linear(width, 1)

    def forward(self, x):
        return self.last(self.cell(x)[0][:, -1])


def recurrent(kind):
    def make(big):
        width, batch = (128, 64) if big else (8, 8)
        return Recurrent(kind, 16, width), (batch, 24, 16)

    return make


CRITICS |= {"LSTM": recurrent(nn.LSTM), "GRU": recurrent(nn.GRU), "tanh cells": recurrent(nn.RNN)}


class SelfAttention(nn.Module):
    """SAGAN's layer: attention over positions with 1x1 convolutions, a gate that starts at 0."""

    def __init__(self, channels):
        super().__init__()
        self.query = spectral(channels, channels // 8, 1)
        self.key = spectral(channels, channels // 8, 1)
        self.value = spectral(channels, channels, 1)
        self.gate = nn.Parameter(torch.full((), 0.1))

    def forward(self, x):
        q, k, v = (f(x).flatten(2) for f in (self.query, self.key, self.value))
        weights = (q.transpose(1, 2) @ k).softmax(2)
        return x + self.gate * (v @ weights.transpose(1, 2)).view_as(x)


@critic("self-attention (SAGAN)")
def _(big):
    w, batch = (32, 16) if big else (8, 4)
    return nn.Sequential(
        spectral(3, w, 4, 2, 1), leaky(), spectral(w, 2 * w, 4, 2, 1), leaky(),
        SelfAttention(2 * w), spectral(2 * w, 4 * w, 4, 2, 1), leaky(), mean_score(4 * w),
    ), (batch, 3, 32 if not big else 64, 32 if not big else 64)  # fmt: skip


class Encoder(nn.Module):
    """Transformer layers over a sequence, by the attention that can be differentiated twice."""

    def __init__(self, features, width, layers, activation):
        super().__init__()
        self.first = nn.Linear(features, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, activation, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.last = nn.Linear(width, 1)

    def forward(self, x):
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return self.last(self.layers(self.first(x)).mean(1))


@critic("transformer encoder, ReLU")
def _(big):
    width, batch = (128, 32) if big else (16, 4)
    return Encoder(16, width, 2, "relu"), (batch, 32, 16)


@critic("transformer encoder, GELU (ViT's patches)")
def _(big):
    width, batch = (128, 32) if big else (16, 4)
    patch = Apply(lambda x: F.unfold(x, 4, stride=4).transpose(1, 2))
    return nn.Sequential(patch, Encoder(48, width, 2, "gelu")), (batch, 3, 32, 32)


class Residual(nn.Module):
    """A residual block of WGAN-GP's CIFAR critic, halving the picture if down."""

    def __init__(self, channels, out, down, norm=None):
        super().__init__()
        half = [nn.AvgPool2d(2)] if down else []
        self.body = nn.Sequential(
            *([norm(channels)] if norm else []), nn.ReLU(), nn.Conv2d(channels, out, 3, padding=1),
            *([norm(out)] if norm else []), nn.ReLU(), nn.Conv2d(out, out, 3, padding=1), *half,
        )  # fmt: skip
        one = [nn.Conv2d(channels, out, 1)] if down or channels != out else []
        self.shortcut = nn.Sequential(*half, *one)

    def forward(self, x):
        return self.shortcut(x) + self.body(x)


def residual(norm=None):
    def make(big):
        w, batch = (128, 16) if big else (16, 4)
        return nn.Sequential(
            nn.Conv2d(3, w, 3, padding=1), nn.ReLU(), nn.Conv2d(w, w, 3, padding=1),
            nn.AvgPool2d(2), Residual(w, w, True, norm), Residual(w, w, False, norm),
            Residual(w, w, False, norm), nn.ReLU(), mean_score(w),
        ), (batch, 3, 32, 32)  # fmt: skip

    return make


CRITICS |= {
    "residual (WGAN-GP's CIFAR critic)": residual(),
    "residual, batch norm": residual(nn.BatchNorm2d),
    "residual, layer norm over channels": residual(lambda c: nn.GroupNorm(1, c)),
}


class Projection(nn.Module):
    """A score with the projection of a label's embedding (Miyato and Koyama 2018)."""

    def __init__(self, width, batch):
        super().__init__()
        self.body = nn.Sequential(
            Residual(3, width, True), Residual(width, width, True), nn.ReLU(),
            Apply(lambda x: x.sum((2, 3))),
        )  # fmt: skip
        self.embedding, self.last = nn.Embedding(10, width), nn.Linear(width, 1)
        self.register_buffer("label", torch.arange(batch) % 10)

    def forward(self, x):
        features = self.body(x)
        label = self.embedding(self.label[: len(x)])
        return self.last(features).squeeze(1) + (label * features).sum(1)


@critic("residual with projected labels")
def _(big):
    width, batch = (64, 16) if big else (8, 4)
    return Projection(width, batch), (batch, 3, 32, 32)


class Equalised(nn.Module):
    """A convolution whose weight is scaled as it is used, behind a blur that halves if down."""

    def __init__(self, channels, out, kernel, down=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, channels, kernel, kernel))
        self.bias, self.down = nn.Parameter(torch.zeros(out)), down
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("blur", (taps[:, None] * taps / 64).expand(channels, 1, 4, 4))

    def forward(self, x):
        weight = self.weight / math.sqrt(self.weight[0].numel())
        padding = weight.shape[-1] // 2
        if self.down:
            x = F.conv2d(F.pad(x, [padding + 1] * 4), self.blur, groups=x.shape[1])
            padding = 0
        return F.conv2d(x, weight, self.bias, 2 if self.down else 1, padding)


class Scaled(nn.Module):
    """Leaky ReLU times the root of 2."""

    def forward(self, x):
        return F.leaky_relu(x, 0.2) * math.sqrt(2)


class StyleBlock(nn.Module):
    """A residual block of StyleGAN2's critic."""

    def __init__(self, channels, out):
        super().__init__()
        self.body = nn.Sequential(
            Equalised(channels, channels, 3), Scaled(), Equalised(channels, out, 3, True), Scaled()
        )
        self.skip = Equalised(channels, out, 1, True)

    def forward(self, x):
        return (self.body(x) + self.skip(x)) / math.sqrt(2)


class BatchDeviation(nn.Module):
    """Adds the standard deviation over groups of the batch as a channel."""

    def forward(self, x):
        group = x.view(-1, 4, *x.shape[1:]) if len(x) % 4 == 0 else x[None]
        spread = (group.var(1, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
        spread = spread.repeat_interleave(group.shape[1])[: len(x), None, None, None]
        return torch.cat([x, spread.expand(-1, 1, *x.shape[2:])], 1)


@critic("residual with blur (StyleGAN2)")
def _(big):
    w, batch = (32, 8) if big else (8, 4)
    return nn.Sequential(
        Equalised(3, w, 1), Scaled(), StyleBlock(w, 2 * w), StyleBlock(2 * w, 4 * w),
        BatchDeviation(), Equalised(4 * w + 1, 4 * w, 3), Scaled(), mean_score(4 * w),
    ), (batch, 3, 32, 32)  # fmt: skip


def patch_critic(norm):
    def make(big):
        w, size, batch = (64, 128, 2) if big else (8, 64, 1)
        return nn.Sequential(
            nn.Conv2d(6, w, 4, 2, 1), leaky(), nn.Conv2d(w, 2 * w, 4, 2, 1), norm(2 * w), leaky(),
            nn.Conv2d(2 * w, 4 * w, 4, 2, 1), norm(4 * w), leaky(),
            nn.Conv2d(4 * w, 8 * w, 4, 1, 1), norm(8 * w), leaky(), nn.Conv2d(8 * w, 1, 4, 1, 1),
            patches(),
        ), (batch, 6, size, size)  # fmt: skip

    return make


CRITICS |= {
    "PatchGAN, batch norm": patch_critic(nn.BatchNorm2d),
    "PatchGAN, instance norm": patch_critic(nn.InstanceNorm2d),
}


@critic("1-D convolutions (WaveGAN)")
def _(big):
    w, batch = (32, 16) if big else (8, 4)
    return nn.Sequential(
        nn.Conv1d(1, w, 25, 4, 11), leaky(), nn.Conv1d(w, 2 * w, 25, 4, 11), leaky(),
        nn.Conv1d(2 * w, 4 * w, 25, 4, 11), leaky(), mean_score(4 * w),
    ), (batch, 1, 4096 if big else 1024)  # fmt: skip


class Gated(nn.Module):
    """WaveNet's gated, dilated residual layer."""

    def __init__(self, width, dilation):
        super().__init__()
        self.both = nn.Conv1d(width, 2 * width, 3, padding=dilation, dilation=dilation)

    def forward(self, x):
        a, b = self.both(x).chunk(2, 1)
        return x + a.tanh() * b.sigmoid()


@critic("1-D dilated gated convolutions")
def _(big):
    w, batch = (32, 16) if big else (8, 4)
    return nn.Sequential(
        nn.Conv1d(1, w, 1), *(Gated(w, 2**i) for i in range(6)), mean_score(w)
    ), (batch, 1, 1024 if big else 128)  # fmt: skip


@critic("3-D convolutions")
def _(big):
    w, batch = (16, 4) if big else (4, 2)
    return nn.Sequential(
        nn.Conv3d(1, w, 4, 2, 1), leaky(), nn.Conv3d(w, 2 * w, 4, 2, 1), leaky(),
        nn.Conv3d(2 * w, 4 * w, 4, 2, 1), leaky(), mean_score(4 * w),
    ), (batch, 1, 32 if big else 16, 32 if big else 16, 32 if big else 16)  # fmt: skip


@critic("depthwise 7x7, GELU")
def _(big):
    w, batch = (64, 16) if big else (8, 4)
    blocks = [
        Sum(
            nn.Identity(),
            nn.Sequential(
                nn.Conv2d(w, w, 7, padding=3, groups=w), nn.Conv2d(w, 2 * w, 1), nn.GELU(),
                nn.Conv2d(2 * w, w, 1),
            ),
        )
        for _ in range(2)
    ]  # fmt: skip
    return nn.Sequential(nn.Conv2d(3, w, 4, 4), *blocks, mean_score(w)), (batch, 3, 64, 64)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of a picture."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@critic("ConvNeXt blocks")
def _(big):
    w, batch = (64, 16) if big else (8, 4)

    def block(c):
        return Sum(
            nn.Identity(),
            nn.Sequential(
                nn.Conv2d(c, c, 7, padding=3, groups=c), ChannelNorm(c), nn.Conv2d(c, 4 * c, 1),
                nn.GELU(), nn.Conv2d(4 * c, c, 1),
            ),
        )  # fmt: skip

    return nn.Sequential(
        nn.Conv2d(3, w, 4, 4), ChannelNorm(w), block(w), ChannelNorm(w), nn.Conv2d(w, 2 * w, 2, 2),
        block(2 * w), mean_score(2 * w),
    ), (batch, 3, 32, 32)  # fmt: skip


@critic("separable, squeeze and excite (MobileNet)")
def _(big):
    w, batch = (32, 16) if big else (8, 4)

    class Excite(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.gate = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c // 4, 1), nn.ReLU(),
                nn.Conv2d(c // 4, c, 1), nn.Sigmoid(),
            )  # fmt: skip

        def forward(self, x):
            return x * self.gate(x)

    def block(c):
        return nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1, groups=c), nn.ReLU6(), Excite(c), nn.Conv2d(c, c, 1),
            nn.Hardswish(),
        )  # fmt: skip

    return nn.Sequential(nn.Conv2d(3, w, 3, 2, 1), block(w), block(w), mean_score(w)), (
        batch, 3, 32, 32,
    )  # fmt: skip


class UNet(nn.Module):
    """A critic that looks at the picture at two scales, with transposed convolutions."""

    def __init__(self, w):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, w, 4, 2, 1), leaky())
        self.inner = nn.Sequential(
            nn.Conv2d(w, 2 * w, 4, 2, 1), leaky(), nn.ConvTranspose2d(2 * w, w, 4, 2, 1), leaky()
        )
        self.up = nn.Sequential(nn.ConvTranspose2d(2 * w, w, 4, 2, 1), leaky(), nn.Conv2d(w, 1, 1))

    def forward(self, x):
        x = self.down(x)
        return self.up(torch.cat([x, self.inner(x)], 1)).flatten(1).mean(1)


@critic("U-Net")
def _(big):
    w, batch = (32, 16) if big else (8, 4)
    return UNet(w), (batch, 3, 32, 32)


class Dense(nn.Module):
    """Each layer reads all before it (DenseNet)."""

    def __init__(self, channels, growth, layers):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(channels + i * growth, growth, 3, padding=1) for i in range(layers)
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        return x


@critic("dense blocks")
def _(big):
    w, batch = (16, 16) if big else (4, 4)
    return nn.Sequential(nn.Conv2d(3, w, 3, 2, 1), Dense(w, w, 4), mean_score(5 * w)), (
        batch, 3, 32, 32,
    )  # fmt: skip


@critic("several scales, average pooling")
def _(big):
    w, batch = (32, 16) if big else (8, 4)

    def scale(factor):
        return nn.Sequential(
            nn.AvgPool2d(factor), nn.Conv2d(3, w, 4, 2, 1), leaky(), nn.Conv2d(w, 2 * w, 4, 2, 1),
            leaky(), nn.Conv2d(2 * w, 1, 3, 1, 1), patches(),
        )  # fmt: skip

    return Sum(scale(1), scale(2), scale(4)), (batch, 3, 64, 64)


@critic("perceptrons over patches (MLP-Mixer)")
def _(big):
    width, batch = (128, 32) if big else (16, 4)

    class Mix(nn.Module):
        def __init__(self, tokens):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
            self.tokens = nn.Sequential(
                nn.Linear(tokens, 64), nn.GELU(), nn.Linear(64, tokens)
            )  # fmt: skip
            self.channels = nn.Sequential(
                nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
            )

        def forward(self, x):
            x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
            return x + self.channels(self.norms[1](x))

    patch = Apply(lambda x: F.unfold(x, 4, stride=4).transpose(1, 2))
    last = nn.Sequential(Apply(lambda x: x.mean(1)), nn.Linear(width, 1))
    return nn.Sequential(patch, nn.Linear(48, width), Mix(64), Mix(64), last), (batch, 3, 32, 32)


@critic("coordinates, sines (SIREN)")
def _(big):
    width, batch = (256, 1024) if big else (32, 64)
    sine = lambda: Apply(lambda x: torch.sin(30 * x))  # noqa: E731
    return mlp((batch, 3), (3, width, width), sine)


@critic("sets of points (PointNet)")
def _(big):
    w, batch = (64, 16) if big else (16, 4)
    return nn.Sequential(
        nn.Conv1d(3, w, 1), nn.ReLU(), nn.Conv1d(w, 4 * w, 1), nn.ReLU(),
        Apply(lambda x: x.amax(2)), nn.Linear(4 * w, w), nn.ReLU(), nn.Linear(w, 1),
    ), (batch, 3, 256 if big else 64)  # fmt: skip


@critic("maxout (Goodfellow et al. 2014)")
def _(big):
    width, batch = (240, 256) if big else (24, 16)
    maxout = lambda a, b: nn.Sequential(  # noqa: E731
        nn.Linear(a, 5 * b), Apply(lambda x: x.view(len(x), 5, -1).amax(1))
    )
    return nn.Sequential(
        nn.Flatten(), maxout(784, width), maxout(width, width), nn.Linear(width, 1)
    ), (batch, 1, 28, 28)


@critic("sorted groups (GroupSort)")
def _(big):
    width, batch = (256, 256) if big else (32, 32)
    group_sort = lambda: Apply(lambda x: x.view(len(x), -1, 2).sort(2).values.flatten(1))  # noqa: E731
    return mlp((batch, 64), (64, width, width), group_sort)


@critic("messages on a graph")
def _(big):
    width, batch = (64, 64) if big else (16, 8)

    class Messages(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, width), nn.Linear(width, width)
            self.last = nn.Linear(width, 1)
            self.register_buffer("graph", (torch.arange(400).view(20, 20) % 7 == 0) / 3.0)

        def forward(self, x):
            x = F.relu(self.first(self.graph @ x))
            return self.last(F.relu(self.second(self.graph @ x)).mean(1))

    return Messages(), (batch, 20, 8)
