"""One update of pix2pix.py beside the way most implementations of the paper go, in one run.

    python benchmarks/pairs.py           # prints the table, writes benchmarks/pairs-<device>.md
    python benchmarks/pairs.py --smoke   # small networks, nothing written

The other way is written here, from its description: a U-Net of nested blocks with batch norm,
biases where there is no norm, a pass of D for the fakes, one for the truths and a third for G,
during which D's weights are frozen, Adam as PyTorch has it by default, and a DataLoader that opens
each picture, splits it, enlarges it to 286x286, cuts 256x256 and mirrors it. Both take the same
pictures from the same files, with the networks' sizes, batch, loss and threads equal, and both do
all that an update needs, loading included. They take turns.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import machine, medians
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as T
from training import update_on_files

PICTURES, SECONDS = 40, 90


class Block(nn.Module):
    """A convolution down, what lies inside, and one up, beside what came in."""

    def __init__(self, ins, inner, outs, inside=None, outermost=False, dropout=False):
        super().__init__()
        down = nn.Conv2d(ins, inner, 4, 2, 1, bias=outermost)
        up = nn.ConvTranspose2d(inner * (1 if inside is None else 2), outs, 4, 2, 1, bias=outermost)
        if outermost:
            layers = [down, inside, nn.ReLU(True), up, nn.Tanh()]
        elif inside is None:
            layers = [nn.LeakyReLU(0.2, True), down, nn.ReLU(True), up, nn.BatchNorm2d(outs)]
        else:
            layers = [nn.LeakyReLU(0.2, True), down, nn.BatchNorm2d(inner), inside]
            layers += [nn.ReLU(True), up, nn.BatchNorm2d(outs)]
        self.layers = nn.Sequential(*layers, *[nn.Dropout(0.5)] * dropout)
        self.outermost = outermost

    def forward(self, x):
        return self.layers(x) if self.outermost else torch.cat([x, self.layers(x)], 1)


def nested_unet(width):
    block = Block(8 * width, 8 * width, 8 * width)
    for _ in range(3):
        block = Block(8 * width, 8 * width, 8 * width, block, dropout=True)
    for k in (4, 2, 1):
        block = Block(k * width, 2 * k * width, k * width, block)
    return Block(3, width, 3, block, outermost=True)


def patch_discriminator(width):
    layers = [nn.Conv2d(6, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for k, stride in ((1, 2), (2, 2), (4, 1)):
        layers += [nn.Conv2d(k * width, 2 * k * width, 4, stride, 1, bias=False)]
        layers += [nn.BatchNorm2d(2 * k * width), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))


class Pairs(Dataset):
    """Pairs side by side, opened, enlarged, cut and mirrored one by one."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        both = Image.open(self.paths[i]).convert("RGB")
        half = both.width // 2
        pair = both.crop((0, 0, half, both.height)), both.crop((half, 0, both.width, both.height))
        top, left, turned = torch.randint(30, (3,)).tolist()
        done = []
        for image in pair:
            image = T.resize(image, [286, 286], T.InterpolationMode.BICUBIC)
            image = T.crop(image, top, left, 256, 256)
            image = T.hflip(image) if turned < 15 else image
            done.append(T.normalize(T.to_tensor(image), [0.5] * 3, [0.5] * 3))
        return done


def usual_update(paths, width, device):
    """The other way's update, as a function without arguments."""
    G, D = nested_unet(width).to(device), patch_discriminator(width).to(device)
    optimizer_g, optimizer_d = (
        torch.optim.Adam(x.parameters(), 2e-4, betas=(0.5, 0.999)) for x in (G, D)
    )
    bce, l1 = nn.BCEWithLogitsLoss(), nn.L1Loss()

    def batches():
        while True:
            yield from DataLoader(Pairs(paths), shuffle=True)

    stream = batches()

    def update():
        x, y = (part.to(device) for part in next(stream))
        fake = G(x)
        D.requires_grad_(True)
        optimizer_d.zero_grad()
        score_fake = D(torch.cat([x, fake.detach()], 1))
        score_real = D(torch.cat([x, y], 1))
        loss_fake = bce(score_fake, torch.zeros_like(score_fake))
        loss_d = (loss_fake + bce(score_real, torch.ones_like(score_real))) * 0.5
        loss_d.backward()
        optimizer_d.step()
        D.requires_grad_(False)
        optimizer_g.zero_grad()
        score = D(torch.cat([x, fake], 1))
        loss_g = bce(score, torch.ones_like(score)) + 100 * l1(fake, y)
        loss_g.backward()
        optimizer_g.step()

    return update


def our_update(folder, width, device):
    """pix2pix.py's update, as a function without arguments; its pictures are read before."""
    flags = ["--data-dir", folder, "--image-size", "256", "--width", str(width)]
    return update_on_files("pix2pix", [*flags, "--batch-size", "1"], device)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true", help="small networks, nothing written")
    smoke = parser.parse_args().smoke
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rng, contestants = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(4 if smoke else PICTURES):  # smooth, as photographs are
            small = Image.fromarray(rng.integers(0, 256, (32, 64, 3), dtype=np.uint8))
            small.resize((512, 256), Image.Resampling.BICUBIC).save(Path(folder, f"{i}.jpg"))
        paths = sorted(Path(folder).iterdir())
        for width in (4,) if smoke else (64, 32, 16):
            contestants[width, "pix2pix.py"] = our_update(folder, width, device)
            contestants[width, "the usual way"] = usual_update(paths, width, device)
        times = medians(contestants, device.type, 0 if smoke else SECONDS)
    lines = [
        f"{machine(device.type)}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, "
        "float32, 256x256, batch 1, L1 + cGAN, 70x70 patches, loading included",
        "",
        "| width | pix2pix.py, ms an update | the usual way | ratio |",
        "|---|---|---|---|",
    ]
    for width in dict.fromkeys(width for width, _ in contestants):
        ours, theirs = times[width, "pix2pix.py"], times[width, "the usual way"]
        lines.append(f"| {width} | {ours * 1e3:.0f} | {theirs * 1e3:.0f} | {theirs / ours:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if not smoke:
        Path(__file__).with_name(f"pairs-{device.type}.md").write_text(text)


if __name__ == "__main__":
    main()
