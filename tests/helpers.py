"""What several test files use: made data, small networks, runs that must end in an error."""

import csv
import functools
import importlib
import os
import pkgutil
import signal
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from tools.sync_shared import SCRIPTS

ALL = (*SCRIPTS, "ctgan", "pix2pix")  # SCRIPTS are those of images


# ------------------------------------------------------------------ made data
def no_network(*args, **kwargs):
    """In place of urllib.request.urlopen."""
    raise URLError("no network in tests")


def write_mnist(folder, train=40, test=10, cut=0):
    """Files in MNIST's own format: big-endian header, then bytes."""
    raw = Path(folder) / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, n in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8).tobytes()
        head = b"".join(v.to_bytes(4, "big") for v in (0x803, n, 28, 28))
        content = head + images
        content = content[: len(content) - cut] if name == "train" else content
        (raw / f"{name}-images-idx3-ubyte").write_bytes(content)
        labels = (np.arange(n) % 10).astype(np.uint8).tobytes()
        head = b"".join(v.to_bytes(4, "big") for v in (0x801, n))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(head + labels)
    return folder


def write_images(folder, n=10, size=(40, 30)):
    """Noise in colour, in the sub-folders cat and dog by turns."""
    rng = np.random.default_rng(0)
    for i in range(n):
        path = Path(folder) / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def write_table(path="table.csv", rows=100):
    """A CSV file with text, integers, decimals, gaps and dates."""
    rng = np.random.default_rng(0)
    with open(path, "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["kind", "size", "price", "gap", "day"])
        for i in range(rows):
            kind = "abc"[int(rng.integers(3))]
            day = np.datetime64("2020-01-01") + int(rng.integers(999))
            gap = rng.integers(99) if i % 5 else ""
            lines.writerow([kind, rng.integers(1000), f"{rng.normal():.2f}", gap, day])


def write_pairs(folder="data", n=100, size=(16, 16)):
    """Pictures with A, noise, at the left, and B, its negative, at the right."""
    rng = np.random.default_rng(0)
    Path(folder).mkdir(exist_ok=True)
    for i in range(n):
        a = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(np.concatenate([a, 255 - a], axis=1)).save(Path(folder, f"{i:03}.png"))


# ------------------------------------------------------------------ what a run has left
def rows(folder):
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def weights(folder):
    """The model and the optimisers' states of a run's checkpoint."""
    state = checkpoint(folder)
    return state["model"], state["optimizers"]


def same(a, b):
    """Whether two nested structures of tensors are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def files(folder="."):
    """All below the folder but the locks, and when each file was last written to."""
    found = (path for path in Path(folder).rglob("*") if path.name != ".lock")
    return {path: path.is_file() and path.stat().st_mtime_ns for path in found}


# ------------------------------------------------------------------ runs that end in an error
def error_of(script, capsys, *flags):
    """The message on stderr of a call that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main([str(flag) for flag in flags])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in printed
    usage, start, error = printed.rpartition(f"{script.SCRIPT}: error: ")
    assert start and (not usage or usage.startswith(f"usage: {script.SCRIPT}"))
    return error


def refused_by(script, capsys, *flags):
    """The message of error_of, from a call that must leave every file as it is."""
    before = files()
    error = error_of(script, capsys, *flags)
    assert files() == before
    return error


# ------------------------------------------------------------------ smaller scripts
SMALL_NETWORKS = {  # by flags, beside what shrink does
    "infogan": [],
    "gan": [],
    "cgan": ["--network", "mlp"],
    "wgan_gp": ["--dim", "4", "--n-critic", "1"],
    "dcgan": ["--width", "4"],
    "oversampling": ["--width", "2", "--latent", "4", "--n-critic", "1", "--rows", "copies"],
    "ctgan": ["--dim", "8", "--noise", "4", "--pac", "2"],
    "pix2pix": ["--dataset", "folder", "--data-dir", "data", "--width", "2"],
}
# --data goes before any --dataset; what is not held out are as many samples as made MNIST has
SMALL_NETWORKS["ctgan"] += ["--data", "table.csv", "--test-rows", "20"]


def without_figures(script, patch=setattr):
    """For tests that look at a run's numbers alone."""
    patch(script, "finish", lambda *args: {})


def no_step(model, *batch):
    """In place of train_step."""
    return {"loss": torch.zeros(())}


def without_method(script, step=no_step, patch=setattr):
    """Leaves the plumbing alone: nothing is measured or drawn, and step is train_step."""
    patch(script, "train_step", step)
    patch(script, "evaluate", lambda model, data: {})
    patch(script, "save_samples", lambda model, path: Path(f"{path}.png").write_bytes(b"a picture"))
    patch(script, "finish", lambda *args: {})


def shrink(script, patch=setattr):
    """Makes a run of the script a matter of a second; patch may be a monkeypatch's setattr."""
    smaller_networks = {
        "infogan": {"Generator": small_generator, "Discriminator": small_d_and_q},
        "gan": {},
        "cgan": {"MLPGenerator": small_mlp_generator, "MLPDiscriminator": small_maxout},
        "wgan_gp": {},
        "dcgan": {},
        "oversampling": {},
        "ctgan": {},
        "pix2pix": {},
    }
    for name, replace in smaller_networks[script.SCRIPT].items():
        network = getattr(script, name)
        patch(network, "__init__", smaller(network.__init__, replace))
    if script.SCRIPT == "infogan":
        patch(script.code_effects, "__defaults__", (4, 5))  # rows and points
    if script.SCRIPT == "gan":
        patch(script, "SAMPLES", 200)
        patch(script.Generator.__init__, "__defaults__", ((1, 28, 28), 16))  # shape and width
        patch(script.Discriminator.__init__, "__defaults__", ((1, 28, 28), 8))
    if script.SCRIPT == "cgan":
        patch(script, "SAMPLES", 200)
        patch(script.train_classifier, "__defaults__", (1, 2, 32))  # epochs, updates, batch
    if script.SCRIPT == "oversampling":
        patch(script.train_classifier, "__defaults__", (1, 2, 32))  # epochs, updates, batch
        patch(script.image_figures, "__defaults__", (2,))  # images a class
    if script.SCRIPT == "dcgan":
        patch(script, "labelled", lambda data: False)  # no SVM, which test_dcgan.py tries


def smaller(init, replace):
    """A network's constructor that then has its layers replaced."""

    @functools.wraps(init)
    def small(self, *args, **kwargs):
        with torch.device("meta"):
            init(self, *args, **kwargs)
        replace(self)

    return small


def small_generator(network):
    inputs, channels = network.layers[0].in_features, network.layers[-2].out_channels
    side = 7 if channels == 1 else 8
    network.layers = nn.Sequential(
        nn.Linear(inputs, 8 * side**2, bias=False), nn.BatchNorm1d(8 * side**2), nn.ReLU(),
        nn.Unflatten(1, (8, side, side)), nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(8, channels, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


def small_d_and_q(network):
    channels, outputs = network.trunk[0].in_channels, network.q[-1].out_features
    network.trunk = nn.Sequential(
        nn.Conv2d(channels, 8, 4, 2, 1), nn.LeakyReLU(0.1), nn.Conv2d(8, 16, 4, 2, 1, bias=False),
        nn.BatchNorm2d(16, track_running_stats=False), nn.LeakyReLU(0.1), nn.Flatten(),
    )  # fmt: skip
    features = 784 if channels == 1 else 1024
    network.score = nn.Linear(features, 1)
    network.q = nn.Sequential(nn.Linear(features, 32), nn.LeakyReLU(0.1), nn.Linear(32, outputs))


def small_mlp_generator(network):
    network.noise = nn.Linear(network.noise.in_features, 8)
    network.label = nn.Linear(network.label.in_features, 8)
    network.joint = nn.Linear(16, 16)
    network.pixels = nn.Linear(16, network.pixels.out_features)
    small_weights(network)


def small_maxout(network):
    for layer, inputs, outputs in (("image", None, 8), ("label", None, 4), ("joint", 12, 8)):
        maxout = getattr(network, layer)
        maxout.pieces = 2
        maxout.linear = nn.Linear(inputs or maxout.linear.in_features, 2 * outputs)
    network.score = nn.Linear(8, 1)
    small_weights(network)


def small_weights(network):
    """As the paper's are; from larger ones its learning rate leads to nan."""
    for p in network.parameters():
        nn.init.uniform_(p, -0.05, 0.05)


# ------------------------------------------------------------------ processes
def child(name, flags, environment, prepare, limit):
    """What a process of the fixture start does: main(flags) of the script of this name.

    prepare, "module:function", changes the script before; limit is the most bytes of a file.
    """
    for stream in (1, 2):
        os.dup2(os.open("output.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell began it by &
    os.environ.update(environment)  # which the script reads as it is imported
    torch.set_num_threads(1)
    script = importlib.import_module(name)
    shrink(script)
    if prepare:
        pkgutil.resolve_name(prepare)(script)
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    script.main(flags)


def exit_code(process, timeout=300):
    """That of a process of the fixture start, or None if it does not end."""
    process.join(timeout)
    return process.exitcode


def assert_gradients(losses, step, atol=1e-6):
    """After step() each network of the pairs (loss, network) has the gradients of its loss."""
    wanted = [torch.autograd.grad(x, [*net.parameters()], retain_graph=True) for x, net in losses]
    step()
    for (_, net), grads in zip(losses, wanted):
        for p, g in zip(net.parameters(), grads):
            torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=atol)


def assert_conditional_gradients(script, model, data):
    """Those of a step of cgan.py and dcgan.py, at a rate of 0: the two cross-entropies'."""
    (real, label), one = model.batch(data, torch.arange(16)), torch.ones(16)
    G, D, bce = model.generator, model.discriminator, F.binary_cross_entropy_with_logits
    torch.manual_seed(1)
    fake = G(G.draw(16), label)
    of_d = bce(D(real, label), one) + bce(D(fake.detach(), label), 0 * one)
    losses = (of_d, D), (bce(D(fake, label), one), G)
    torch.manual_seed(1)
    assert_gradients(losses, lambda: script.train_step(model, real, label))
