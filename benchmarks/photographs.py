"""One update of dcgan.py beside the public example that most DCGANs start from, in one run.

    python benchmarks/photographs.py           # prints the table, writes photographs-<device>.md
    python benchmarks/photographs.py --smoke   # small networks, nothing written

The example is written here anew, from its description: 4x4 kernels, normal noise, probabilities and
their cross-entropy, a backward pass of D for the photographs and one for the fakes, one of both
networks for G, Adam as PyTorch has it by default, two losses read from the device an update, and a
loader that opens each photograph, resizes it and cuts its middle out. Both take the same files, at
64x64 in colour, with equal width and batch. Each does all that an update needs, loading included:
the loader in the same process, since a second one would work while the other contestant is timed.
They take turns, with the matrix products of the same machine.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import machine, medians
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision import datasets, transforms
from training import MATRIX, Operations, update_on_files

PHOTOGRAPHS, BATCH, SECONDS = 512, 64, 60


def usual_generator(width):
    """Noise (n, 100, 1, 1) to images of 64x64."""
    layers, inputs = [], 100
    for k, stride, padding in ((8, 1, 0), (4, 2, 1), (2, 2, 1), (1, 2, 1)):
        layers += [nn.ConvTranspose2d(inputs, k * width, 4, stride, padding, bias=False)]
        layers += [nn.BatchNorm2d(k * width), nn.ReLU(True)]
        inputs = k * width
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())


def usual_discriminator(width):
    """Images of 64x64 to probabilities."""
    layers = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for k in (1, 2, 4):
        layers += [nn.Conv2d(k * width, 2 * k * width, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(2 * k * width), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, bias=False), nn.Sigmoid())


def photographs(folder):
    """Batches of a folder for ever, each image opened, resized and cut by itself."""
    steps = [transforms.Resize(64), transforms.CenterCrop(64), transforms.ToTensor()]
    steps.append(transforms.Normalize([0.5] * 3, [0.5] * 3))
    found = datasets.ImageFolder(folder, transforms.Compose(steps))
    order = RandomSampler(found, replacement=True, num_samples=10**9)
    return iter(DataLoader(found, BATCH, sampler=order))


def usual_update(folder, width, device):
    """The example's update, as a function without arguments."""
    G, D = usual_generator(width).to(device), usual_discriminator(width).to(device)
    optimizer_g, optimizer_d = (
        torch.optim.Adam(x.parameters(), 2e-4, betas=(0.5, 0.999)) for x in (G, D)
    )
    stream, bce = photographs(folder), nn.BCELoss()
    ones, zeros = torch.ones(BATCH, device=device), torch.zeros(BATCH, device=device)

    def update():
        real = next(stream)[0].to(device)
        D.zero_grad()
        loss_real = bce(D(real).flatten(), ones)
        loss_real.backward()
        fake = G(torch.randn(BATCH, 100, 1, 1, device=device))
        loss_fake = bce(D(fake.detach()).flatten(), zeros)
        loss_fake.backward()
        optimizer_d.step()
        G.zero_grad()
        loss_g = bce(D(fake).flatten(), ones)
        loss_g.backward()
        optimizer_g.step()
        return (loss_real + loss_fake).item(), loss_g.item()

    return update


def our_update(folder, width, device):
    """dcgan.py's update, as a function without arguments; its photographs are read before."""
    flags = ["--dataset", "folder", "--data-dir", folder, "--image-size", "64"]
    flags += ["--width", str(width), "--batch-size", str(BATCH)]
    return update_on_files("dcgan", flags, device)


def write_photographs(folder, n):
    """n smooth JPEGs of the size of the usual faces, in two classes."""
    rng = np.random.default_rng(0)
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (27, 22, 3), dtype=np.uint8))
        path = Path(folder, str(i % 2), f"{i}.jpg")
        path.parent.mkdir(exist_ok=True)
        small.resize((178, 218), Image.Resampling.BICUBIC).save(path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true", help="small networks, nothing written")
    smoke = parser.parse_args().smoke
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    updates, operations = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(folder, 2 * BATCH if smoke else PHOTOGRAPHS)
        for width in (4,) if smoke else (128, 64, 32):
            for name, make in (("dcgan.py", our_update), ("the example", usual_update)):
                updates[width, name] = make(folder, width, device)
                with Operations() as counter:
                    updates[width, name]()
                operations[width, name] = counter.total
        a, b = torch.randn(2, MATRIX, MATRIX, device=device)
        stream = photographs(folder)
        others = {"product": lambda: a @ b, "loading": lambda: next(stream)}
        times = medians(updates | others, device.type, 0 if smoke else SECONDS)
    peak = 2 * MATRIX**3 / times["product"]
    lines = [
        f"{machine(device.type)}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, "
        f"float32, 64x64 in colour, batch {BATCH}; matrix products at {peak / 1e9:.0f} GFLOP/s; "
        f"{times['loading'] * 1e3:.0f} ms of the example's update are its loader's",
        "",
        "| width | | ms an update | images/s | GFLOP an update | share of the products' rate | "
        "images/s, over the example's | GFLOP/s, over the example's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for width, name in updates:
        time = times[width, name]
        rate, example = operations[width, name] / time, (width, "the example")
        cells = [str(width), name, f"{time * 1e3:.0f}", f"{BATCH / time:.0f}"]
        cells += [f"{operations[width, name] / 1e9:.0f}", f"{rate / peak:.2f}"]
        cells.append(f"{times[example] / time:.2f}")
        cells.append(f"{rate / (operations[example] / times[example]):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if not smoke:
        Path(__file__).with_name(f"photographs-{device.type}.md").write_text(text)


if __name__ == "__main__":
    main()
