"""What several scripts have in common: the marked blocks, word for word."""

import re
from pathlib import Path

import pytest
import torch
from conftest import NO_GPU

import cgan
import infogan
import wgan_gp

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
BLOCK = re.compile(r"^# --- shared: (\w+) ---\n(.*?)^# --- end shared ---$", re.S | re.M)


def blocks(path):
    text = path.read_text()
    found = dict(BLOCK.findall(text))
    assert text.count("# --- shared:") == text.count("# --- end shared") == len(found)
    return found


@pytest.mark.parametrize("name", ["infogan.py", "cgan.py", "wgan_gp.py"])
def test_every_script_has_the_shared_blocks_last(name):
    text = (ROOT / name).read_text()
    assert {"arguments", "data", "run"} <= blocks(ROOT / name).keys()
    method, plumbing = text.split("# ====")
    assert "# --- shared" not in method
    outside = BLOCK.sub("", plumbing.split("plumbing\n")[1])
    assert outside.split() == ["if", "__name__", "==", '"__main__":', "main()"]


def test_shared_blocks_are_identical_word_for_word():
    first = {}
    for path in SCRIPTS:
        for name, text in blocks(path).items():
            assert text == first.setdefault(name, text), f"{name} in {path.name}"
    assert first


# ------------------------------------------------------------------ ways to take a step
def model_and_data(script, device, *flags):
    """A script's model from a fixed seed, with fixed random images."""
    args = script.arguments().parse_args(["--batch-size", "16", *flags])
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(256, (200, 1, 28, 28), dtype=torch.uint8, generator=rng).to(device)
    labels = torch.arange(200, device=device) % 10
    classes = [str(digit) for digit in range(10)]
    data = script.Data("made", classes, images, labels, images, labels)
    torch.manual_seed(0)
    return script.Model(args, data, torch.device(device)), data


def losses_of(script, steps, device, *flags):
    """The losses of the first steps, each on images of its own."""
    model, data = model_and_data(script, device, *flags)
    take_step, size = script.stepper(model, data), model.images_per_step
    index = torch.arange(200, device=device).repeat(5)
    return torch.stack([take_step(index[i * size : (i + 1) * size]).clone() for i in range(steps)])


SCRIPT = pytest.mark.parametrize("script", [infogan, cgan, wgan_gp], ids=lambda s: s.__name__)


@SCRIPT
def test_bf16_gives_nearly_the_losses_of_fp32(script, device):
    exact = losses_of(script, 3, device, "--no-graph")
    rounded = losses_of(script, 3, device, "--no-graph", "--precision", "bf16")
    assert not torch.equal(exact, rounded)
    assert torch.allclose(exact, rounded, rtol=0.1, atol=0.1)


@NO_GPU
@SCRIPT
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_captured_graph_gives_the_losses_of_single_operations(script, precision):
    """Three steps before the capture and three after it, from the same random numbers."""
    flags = ("cuda", "--precision", precision)
    eager = losses_of(script, 6, *flags, "--no-graph")
    assert torch.allclose(losses_of(script, 6, *flags), eager, rtol=1e-3, atol=1e-3)


@NO_GPU
@SCRIPT
def test_step_never_waits_for_the_gpu(script):
    model, data = model_and_data(script, "cuda", "--no-graph")
    index = torch.arange(model.images_per_step, device="cuda")
    script.train_step(model, data, index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        script.train_step(model, data, index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
