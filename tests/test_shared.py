"""The form of the scripts: shared blocks, sizes, a method part to copy, ways to take a step."""

import ast
import contextlib
import importlib
import itertools
import json
import math
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import NO_GPU
from helpers import ALL, checkpoint, error_of, rows, write_table

from tools.sync_shared import BLOCK, ROOT, SCRIPTS

MODULES = [importlib.import_module(script) for script in ALL]
EVERY = pytest.mark.parametrize("script", MODULES, ids=ALL)


def text_of(script):
    return (ROOT / f"{script}.py").read_text()


# ------------------------------------------------------------------ shared blocks and sizes
def sync(root, *arguments):
    command = [sys.executable, root / "tools" / "sync_shared.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_shared_blocks_are_identical_word_for_word():
    done = sync(ROOT, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_sync_copies_the_blocks_of_the_file_that_was_edited(tmp_path):
    for path in ("evaluate.py", "tools/sync_shared.py", *(f"{script}.py" for script in ALL)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    sync(tmp_path)
    edited, others = tmp_path / "cgan.py", [tmp_path / "infogan.py", tmp_path / "wgan_gp.py"]
    edited.write_text(edited.read_text().replace("def load_data(", "def load_all_data("))
    before = [path.read_text() for path in others]
    done = sync(tmp_path, "--check")
    assert done.returncode == 1 and "tools/sync_shared.py FILE" in done.stderr
    assert done.stdout == "block data: cgan.py differs from infogan.py\n"
    assert [path.read_text() for path in others] == before  # --check writes nothing
    assert sync(tmp_path, "cgan.py").returncode == 0
    assert all("def load_all_data(" in path.read_text() for path in others)
    assert sync(tmp_path, "--check").returncode == 0
    tables = tmp_path / "ctgan.py"  # which evaluate.py does not list
    tables.write_text(tables.read_text().replace("def run_updates(", "def run_all_updates("))
    done = sync(tmp_path, "--check")
    assert done.returncode == 1 and done.stdout == "block run: ctgan.py differs from infogan.py\n"
    assert sync(tmp_path).returncode == 0 and "def run_updates(" in tables.read_text()


def test_sync_refuses_a_file_that_lost_a_marker(tmp_path):
    """Its blocks would go on to the next marker, and so into every other file."""
    for path in ("evaluate.py", "tools/sync_shared.py", "infogan.py", "cgan.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    edited, other = tmp_path / "cgan.py", tmp_path / "infogan.py"
    whole, before = edited.read_text(), other.read_text()
    for marker in ("# --- end shared ---\n", "# --- shared: data ---\n"):
        edited.write_text(whole.replace(marker, "", 1))
        done = sync(tmp_path, "cgan.py")
        assert done.returncode == 1 and done.stderr.startswith("cgan.py: each '# --- shared")
        assert other.read_text() == before
    assert "choose from" in sync(tmp_path, "nosuch.py").stderr


@pytest.mark.parametrize("script", ALL)
def test_shared_blocks_stand_last_and_alone(script):
    method, plumbing = text_of(script).split("# ====")
    assert "# --- shared" not in method and "# --- end" not in method
    names = [block[1] for block in BLOCK.finditer(plumbing)]
    assert {"arguments", "run"} <= set(names) and len(names) == len(set(names))
    assert ("data" in names) == (script in SCRIPTS)  # of pictures
    assert plumbing.count("# --- shared: ") == plumbing.count("# --- end shared ---") == len(names)
    head, guard = BLOCK.sub("", plumbing).split("if __name__ ==")
    assert head.strip("= \n") == "plumbing"
    assert "main()" in guard and "def " not in guard
    assert guard == text_of(SCRIPTS[0]).split("if __name__ ==")[1]


def test_sizes():
    """The limits of a script that is read beside its paper, in lines of any kind."""
    blocks = {block[1]: block[2].count("\n") for block in BLOCK.finditer(text_of("infogan"))}
    assert blocks["arguments"] <= 40 and blocks["data"] <= 82 and blocks["run"] <= 180
    assert sum(blocks.values()) <= 300
    lines = {path.name: path.read_text().count("\n") for path in ROOT.glob("*.*") if path.is_file()}
    assert max(lines["infogan.py"], lines["gan.py"]) <= 800
    assert max(lines["cgan.py"], lines["wgan_gp.py"]) <= 880
    assert lines["dcgan.py"] <= 980 and lines["ctgan.py"] <= 2020 and lines["pix2pix.py"] <= 1100
    assert lines["oversampling.py"] <= 1470
    assert lines["README.md"] <= 140


# ------------------------------------------------------------------ a script of tables
TABLES = """
import argparse, functools, io, json, math, os, socket, sys, time
from collections import namedtuple
from datetime import datetime
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm
SCRIPT = "tables"
Data = namedtuple("Data", "name columns train held_out")
def arguments():
    parser = run_arguments("Means of columns.")
    parser.add_argument("--dataset", default="two", help="two, or a CSV file")
    return parser
def load_data(args, device):
    if args.dataset == "two":
        return Data("two", ["a", "b"], torch.arange(40.0, device=device).view(20, 2), None)
    args.dataset = os.path.abspath(args.dataset)
    columns = Path(args.dataset).read_text().split("\\n")[0].split(",")
    rows = torch.tensor(np.loadtxt(args.dataset, delimiter=",", skiprows=1)).float()
    return Data(Path(args.dataset).stem, columns, rows.to(device), None)
def suit(args, data):
    args.epochs, args.batch_size = args.epochs or 2, args.batch_size or 5
class Model(nn.Module):
    def __init__(self, args, data):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(len(data.columns), device=data.train.device))
        self.optimizers, self.kernels = [torch.optim.SGD([self.mean], 0.1)], "reference"
        self.samples_per_step, self.columns = args.batch_size, data.columns
    def batch(self, data, index):
        return (data.train[index],)
def train_step(model, rows):
    loss = (rows - model.mean).square().mean()
    model.optimizers[0].zero_grad()
    loss.backward()
    model.optimizers[0].step()
    return {"loss": loss}
def evaluate(model, data):
    return {}
def finish(model, data, folder, rows):
    return {"means": model.mean.tolist()}
def save_samples(model, path):
    Path(f"{path}.csv").write_text(",".join(model.columns))
def generate(args):
    state = load_checkpoint(args.generate)
    write_file(Path(args.out), ",".join(state["data"]["about"]).encode())
"""


def test_blocks_of_arguments_and_of_the_run_serve_a_script_of_tables(capsys, monkeypatch):
    """Rows in place of images, columns in place of classes, a file in place of a set's name."""
    blocks = {block[1]: block[2] for block in BLOCK.finditer(text_of("infogan"))}
    Path("tables.py").write_text(TABLES + blocks["arguments"] + blocks["run"])
    monkeypatch.syspath_prepend(".")
    tables = importlib.import_module("tables")
    Path("data").mkdir()
    Path("data/more.csv").write_text("x,y,z\n" + "1,2,3\n" * 10)
    tables.main(["--dataset", "two", "--device", "cpu"])
    assert [path.name[:11] for path in Path("runs").iterdir()] == ["tables-two-"]
    tables.main(["--dataset", "data/more.csv", "--out", "run", "--device", "cpu"])
    assert len(rows("run")) == 1 and len(json.loads(Path("run/summary.json").read_text())["means"])
    assert Path("run/samples/0000004.csv").read_text() == "x,y,z"
    tables.main(["--generate", "run/checkpoint.pt", "--out", "more.csv"])
    assert Path("more.csv").read_text() == "x,y,z"
    Path("data").rename("moved")
    resume = ["--resume", "run/checkpoint.pt", "--epochs", "3"]
    assert "data/more.csv" in error_of(tables, capsys, *resume)
    assert "not the run's data" in error_of(tables, capsys, *resume, "--dataset", "two")
    tables.main([*resume, "--dataset", "moved/more.csv"])
    assert checkpoint("run")["data"] == {"about": ["x", "y", "z"], "shape": [10, 3]}
    assert [row["step"] for row in rows("run")] == ["4", "6"]
    monkeypatch.delitem(sys.modules, "tables")


# ------------------------------------------------------------------ the method part, copied
def names_in(node):
    """What a definition may take from outside."""
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    own |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    return {n.id for n in names} - own


def defined_by(node):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def copied(script, *wanted):
    """A namespace of the definitions wanted, and of those that they need, alone.

    They must lie in the method part, and need no import but PyTorch and the standard library's.
    """
    text, imports, method, plumbing = text_of(script), {}, {}, set()
    border = text[: text.index("# ====")].count("\n")
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports |= {alias.asname or alias.name: (node, alias) for alias in node.names}
        elif node.lineno > border:
            plumbing |= defined_by(node)
        else:
            method |= dict.fromkeys(defined_by(node), node)
    needed, found, kept = [*wanted], set(), []
    while needed:
        name = needed.pop()
        if name in found:
            continue
        found.add(name)
        assert name not in plumbing, f"{name} is plumbing"
        if name in method:
            kept.append(method[name])
            needed += names_in(method[name])
        elif name in imports:
            node, alias = imports[name]
            module = getattr(node, "module", None) or alias.name
            assert module.split(".")[0] in {"torch", "math", "functools", "itertools"}, name
            kept.append(type(node)(**{**vars(node), "names": [alias]}))
    kept.sort(key=lambda node: node.lineno)
    space = {}
    exec(compile(ast.Module(list(dict.fromkeys(kept)), []), script, "exec", 0, True), space)
    return SimpleNamespace(**space)


def trains(step, networks, *batches):
    """Whether 20 updates have finite losses and move every layer's weights."""
    weights = [p for network in networks for p in network.parameters() if p.ndim > 1]
    before = [p.clone() for p in weights]
    for batch in itertools.islice(itertools.cycle(batches), 20):
        losses = step(*batch)
        assert losses and all(loss.isfinite() for loss in losses.values())
    return not any(map(torch.equal, before, weights))


def images(n=8):
    torch.manual_seed(0)
    return torch.rand(n, 1, 28, 28) * 2 - 1


def adam(network):
    return torch.optim.Adam(network.parameters(), 2e-4, betas=(0.5, 0.999))


def test_infogan_copied_into_a_notebook():
    lib = copied("infogan", "train_step", "Generator", "Discriminator", "info_loss_reference")
    G, D = lib.Generator(), lib.Discriminator()
    args = Namespace(lambda_categorical=1, lambda_continuous=0.1, shift=2, rotate=9, baseline=False)
    model = SimpleNamespace(generator=G, discriminator=D, args=args)
    model.optimizer_g, model.optimizer_d = adam(G), adam(D)
    model.info_loss = lib.info_loss_reference
    assert trains(lambda real: lib.train_step(model, real), [G, D], [images()], [-images()])


@pytest.mark.parametrize("shape", [(1, 28, 28), (1,)], ids=["images", "points"])
def test_gan_copied_into_a_notebook(shape):
    lib = copied("gan", "train_step", "Generator", "Discriminator", "PaperSGD")
    G, D = lib.Generator(shape, 32), lib.Discriminator(shape, 16)
    model = SimpleNamespace(generator=G, discriminator=D)
    model.args = Namespace(alternate=None, saturating=False)
    model.optimizer_g, model.optimizer_d = (lib.PaperSGD(x.parameters(), 0.1) for x in (G, D))
    real = images() if len(shape) == 3 else torch.randn(8, 1)
    assert trains(lambda real: lib.train_step(model, real), [G, D], [real], [-real])


@pytest.mark.parametrize("network", ["Conv", "MLP"])
def test_cgan_copied_into_a_notebook(network):
    wanted = [f"{network}Generator", f"{network}Discriminator"]
    lib = copied("cgan", "train_step", *wanted)
    G, D = (getattr(lib, name)() for name in wanted)
    model = SimpleNamespace(generator=G, discriminator=D)
    model.optimizer_g, model.optimizer_d = adam(G), adam(D)
    batches = [images(), torch.arange(8)], [-images(), torch.arange(8) // 4]
    assert trains(lambda *batch: lib.train_step(model, *batch), [G, D], *batches)


@pytest.mark.parametrize("shape", [(1, 28, 28), (2,)], ids=["images", "points"])
def test_wgan_gp_copied_into_a_notebook(shape):
    lib = copied("wgan_gp", "train_step", "Generator", "Critic", "gradient_penalty_reference")
    G, D = lib.Generator(shape, dim=16), lib.Critic(shape, dim=16)
    args = Namespace(n_critic=2, gp_weight=10, clip=None, network="auto")
    model = SimpleNamespace(generator=G, critic=D, args=args)
    model.optimizer_g, model.optimizer_d = adam(G), adam(D)
    model.gradient_penalty = lib.gradient_penalty_reference
    real = images() if len(shape) == 3 else torch.randn(8, 2)
    assert trains(lambda real: lib.train_step(model, real), [G, D], [real], [-real])


@pytest.mark.parametrize("classes", ["", "0123456789"], ids=["plain", "label"])
def test_dcgan_copied_into_a_notebook(classes):
    lib = copied("dcgan", "train_step", "Generator", "Discriminator")
    G, D = (kind(width=8, classes=classes) for kind in (lib.Generator, lib.Discriminator))
    model = SimpleNamespace(generator=G, discriminator=D)
    model.optimizer_g, model.optimizer_d = adam(G), adam(D)
    batches = [images(), torch.arange(8)], [-images(), torch.arange(8) // 4]
    assert trains(lambda *batch: lib.train_step(model, *batch), [G, D], *batches)


@pytest.mark.parametrize("mixer", ["network", "uniform"])
def test_oversampling_copied_into_a_notebook(mixer):
    wanted = ("train_step", "Oversampler", "Encoder", "Mixer", "Decoder", "Critic")
    lib = copied("oversampling", *wanted, "gradient_penalty_reference")
    args = Namespace(width=4, latent=8, dropout=0.4, t=2, mixer=mixer, n_critic=2, gp_weight=10)
    vars(args).update(decoder="plain", class_weight=1.0, reconstruction=1.0)
    shape, k = (1, 28, 28), 4
    pool = (torch.rand(12, *shape) * 255).byte()
    G = lib.Oversampler(range(k), pool, [3] * k, args).requires_grad_(False)
    M = lib.Mixer(8, k, 2, 64) if mixer == "network" else None
    networks = lib.Encoder(shape, 4, 8), torch.nn.Linear(8, k), lib.Decoder(shape, 4, 8), M
    model = SimpleNamespace(generator=G, critic=lib.Critic(shape, 4, k), args=args)
    model.encoder, model.linear, model.decoder, model.mixer = networks
    model.gradient_penalty = lib.gradient_penalty_reference
    model.optimizer_e = adam(torch.nn.Sequential(*networks[:2]))
    model.optimizer_d, model.optimizer_c = adam(networks[2]), adam(model.critic)
    model.optimizer_m = adam(M) if M else None
    trained = [x for x in (*networks, model.critic) if x is not None]
    batches = [[torch.rand(3, 8, 3, *shape), torch.arange(8) % k] for _ in range(2)]
    assert trains(lambda *batch: lib.train_step(model, *batch), trained, *batches)


def rows_of_spans(sizes, alphas, n=8):
    """Rows as TVAE and CTGAN take them: the values of each span, places alpha, all in one."""
    category = torch.stack([torch.randint(size, (n,)) for size in sizes], dim=1)
    spans = [F.one_hot(c, size).float() for c, size in zip(category.T, sizes)]
    alpha = torch.rand(n, alphas) * 2 - 1
    return category, alpha, torch.cat([*spans, alpha], dim=1)


def test_ctgan_copied_into_a_notebook():
    lib = copied("ctgan", "ctgan_step", "Generator", "Critic", "gradient_penalty_reference")
    G, D = lib.Generator(11, 5, noise=8, dim=16), lib.Critic(11, 5, pac=2, dim=16)
    args = Namespace(pac=2, gp_weight=10)
    model = SimpleNamespace(generator=G, critic=D, args=args, sizes=[3, 2, 4])
    model.column_of = torch.tensor([0, 0, 0, 1, 1])
    model.noise = lambda n: torch.randn(n, 8)
    model.optimizer_g, model.optimizer_d = adam(G), adam(D)
    model.gradient_penalty = lib.gradient_penalty_reference
    real, condition = rows_of_spans([3, 2, 4], 2)[2], torch.arange(8) % 5
    batches = [real, condition, condition.flip(0)], [-real, condition, condition]
    assert trains(lambda *batch: lib.ctgan_step(model, *batch), [G, D], *batches)


def test_tvae_copied_into_a_notebook():
    lib = copied("ctgan", "tvae_step", "Encoder", "Decoder", "reconstruction_loss_reference")
    encoder, decoder = lib.Encoder(11, noise=8, dim=16), lib.Decoder(11, 2, noise=8, dim=16)
    model = SimpleNamespace(encoder=encoder, decoder=decoder, sizes=[3, 2, 4])
    model.optimizer = adam(torch.nn.ModuleList([encoder, decoder]))
    model.reconstruction_loss = lib.reconstruction_loss_reference
    category, alpha, real = rows_of_spans([3, 2, 4], 2)
    batches = [real, category, alpha], [real.flip(0), category.flip(0), alpha.flip(0)]
    assert trains(lambda *batch: lib.tvae_step(model, *batch), [encoder, decoder], *batches)


@pytest.mark.parametrize("loss", ["l1", "gan", "l1+cgan"])
def test_pix2pix_copied_into_a_notebook(loss):
    lib = copied("pix2pix", "train_step", "Generator", "Discriminator")
    G, D = lib.Generator(1, 1, 4, depth=4), lib.Discriminator(1, 1, 4, 16, "c" in loss)
    model = SimpleNamespace(generator=G, discriminator=D, args=Namespace(loss=loss, l1_weight=100))
    model.optimizer_g, model.optimizer_d = adam(G), adam(D)
    batches = [images(), -images()], [-images(), images()]
    networks = [G] if loss == "l1" else [G, D]
    assert trains(lambda *batch: lib.train_step(model, *batch), networks, *batches)


# ------------------------------------------------------------------ ways to take a step
def made_data(script, device):
    if script.SCRIPT == "ctgan":
        write_table("made.csv", rows=203)
        flags = ["--data", "made.csv", "--test-rows", "3"]
        return script.load_data(script.arguments().parse_args(flags), device)
    if script.SCRIPT == "pix2pix":
        args = script.arguments().parse_args(["--dataset", "drawn"])
        return script.load_data(args, torch.device(device))
    rng = torch.Generator().manual_seed(1)
    pictures = torch.randint(256, (200, 1, 28, 28), dtype=torch.uint8, generator=rng).to(device)
    labels = torch.arange(200, device=device) % 10
    return script.Data("made", [*"0123456789"], pictures, labels, pictures, labels)


def made_model(script, data, *flags):
    """A script's model from a fixed seed."""
    args = script.arguments().parse_args(["--batch-size", "16", *flags])
    torch.manual_seed(0)
    script.suit(args, data)
    return script.Model(args, data)


def losses_of(script, steps, device, *flags):
    """The losses of the first steps, each on images and noise of its own."""
    data = made_data(script, device)
    model = made_model(script, data, *flags)
    step, losses = script.stepper(model.args, model, torch.device(device)), []
    index = torch.arange(200, device=device).repeat(5).split(model.samples_per_step)
    for i in range(steps):
        torch.manual_seed(i)
        losses.append(torch.stack([*step(*model.batch(data, index[i])).values()]).clone())
    assert not losses[0].requires_grad  # a loss that is kept would keep its graph
    return torch.stack(losses)


@EVERY
def test_bf16_gives_nearly_the_losses_of_fp32(script, device):
    flags = [device, "--no-graph", *(["--dim", "16"] if script.SCRIPT == "wgan_gp" else [])]
    exact = losses_of(script, 2, *flags)
    rounded = losses_of(script, 2, *flags, "--precision", "bf16")
    assert not torch.equal(exact, rounded)
    assert torch.allclose(exact, rounded, rtol=0.1, atol=0.1)


# In bf16 weights that differ by half a last digit change the losses of six steps by up to 0.03.
@NO_GPU
@EVERY
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("tf32", 1e-2), ("bf16", 0.1)])
def test_captured_graph_gives_the_losses_of_single_operations(script, precision, tolerance):
    """Three steps before the capture and three after it, from the same random numbers."""
    script.choose_device("cuda")  # away from the default stream, which can not be captured
    flags = ("cuda", "--precision", precision)
    eager = losses_of(script, 6, *flags, "--no-graph")
    captured = losses_of(script, 6, *flags)
    assert torch.allclose(captured, eager, rtol=tolerance, atol=tolerance)


@NO_GPU
@EVERY
def test_step_never_waits_for_the_gpu(script):
    data = made_data(script, "cuda")
    model = made_model(script, data)
    batch = model.batch(data, torch.arange(model.samples_per_step, device="cuda"))
    script.train_step(model, *batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        script.train_step(model, *batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_step_is_replayed_on_a_copy_of_each_batch(monkeypatch):
    """The flow around a CUDA graph, with a graph that a CPU can play."""
    script, calls, recorded, capturing = importlib.import_module(SCRIPTS[0]), [], [], []

    def train_step(model, real):
        calls.append(real)
        losses = {"loss": real.sum()}
        if capturing:  # which computes nothing
            losses["loss"].fill_(math.nan)
            recorded.append((real, losses["loss"]))
        return losses

    @contextlib.contextmanager
    def capture(graph):
        capturing.append(graph)
        yield
        capturing.clear()

    class Graph:
        def replay(self):
            real, loss = recorded[0]
            loss.copy_(real.sum())

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(script, "train_step", train_step)
    model, device = SimpleNamespace(optimizers=[]), SimpleNamespace(type="cuda")
    step = script.stepper(script.arguments().parse_args([]), model, device)
    batches = [torch.full((2,), float(i)) for i in range(7)]
    assert [step(batch)["loss"].item() for batch in batches] == [0, 2, 4, 6, 8, 10, 12]
    assert len(calls) == 4 and len(recorded) == 1  # three to set up, one captured
    assert torch.equal(batches[3], torch.full((2,), 3.0))  # the capture has a batch of its own
