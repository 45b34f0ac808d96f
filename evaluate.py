# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.10", "torchvision", "numpy", "tqdm", "matplotlib", "scikit-learn"]
# ///
"""One yardstick for the trained generators of the scripts that draw images from noise.

    python evaluate.py runs/A/checkpoint.pt runs/B/checkpoint.pt --out scores

writes scores.csv and scores.png (a row of samples of each) and prints the table. Results, with n:
docs/evaluate.md. Images are compared with one half of the test set (but for the score and shares of
classes), in the features of a small classifier trained on the training images, whose test accuracy
is stated. The other half is scored like a generator: it is the ceiling, with as many images.

- frechet: the Fréchet distance of Gaussians fitted to the features (Heusel et al. 2017,
  https://arxiv.org/abs/1706.08500); 0 is best. It depends on the classifier and on the number of
  images, so it compares rows of one table and nothing else.
- score: exp of the mean KL(p(y|x) || p(y)), Inception's score with this classifier (Salimans et al.
  2016, https://arxiv.org/abs/1606.03498); from 1 to the number of classes.
- precision, recall: share of one set within the third-neighbour balls of the other (Kynkäänniemi et
  al. 2019, https://arxiv.org/abs/1904.06991).
- density, coverage: a fifth of the number of fifth-neighbour balls of real images around a sample,
  and the share of balls that hold one (Naeem et al. 2020, https://arxiv.org/abs/2002.09797).
- the share of samples that the classifier puts in each class.
"""

import argparse
import csv
import importlib
import io
import os
import socket
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import make_grid
from tqdm import tqdm

from infogan import UsageError, choose_device, load_data, write_file

SCRIPT = "evaluate"
SCRIPTS = ("infogan", "gan", "cgan", "dcgan", "wgan_gp", "oversampling")


def arguments():
    parser = argparse.ArgumentParser(SCRIPT, description="Scores trained generators.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="of one data set")
    parser.add_argument("--data-dir", help="where the data set is now, if it has moved")
    parser.add_argument("--out", default="scores", help="for scores.csv and scores.png")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


# ------------------------------------------------------------------ measures
def frechet_distance(a, b):
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the rows of a (n, d) and b (m, d)."""
    a, b = a.double(), b.double()
    s_a, s_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_b @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + s_a.trace() + s_b.trace() - 2 * cross
    return distance.clamp_min(0).item()


def inception_score(logits):
    """exp E[KL(p(y|x) || p(y))], from logits (n, classes)."""
    log_p = logits.double().log_softmax(dim=1)
    marginal = log_p.exp().mean(dim=0).clamp_min(1e-300).log()
    return (log_p.exp() * (log_p - marginal)).sum(dim=1).mean().exp().item()


def distances(a, b):
    """Between the rows of a and b: exact, so that of a row to itself is 0."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def neighbour_distances(x, *ks):
    """For each k the distance (n,) of each row of x (n, d) to its k-th nearest other row."""
    most = min(max(ks), len(x) - 1) + 1
    near = [distances(part, x).topk(most, largest=False).values for part in x.split(1000)]
    return [torch.cat(near)[:, min(k, len(x) - 1)] for k in ks]


def neighbourhoods(real, fake, radii=None):
    """precision, recall, density and coverage of the rows of fake (m, d) beside real (n, d).

    radii are the distances of real's rows to their third and fifth neighbours.
    """
    third, fifth = radii or neighbour_distances(real, 3, 5)
    (own,) = neighbour_distances(fake, 3)
    precise, counts = [], []
    recalled, covered = torch.zeros(2, len(real), dtype=torch.bool, device=real.device)
    for part, radius in zip(fake.split(1000), own.split(1000)):
        apart = distances(part, real)
        within = apart <= fifth
        precise.append((apart <= third).any(dim=1))
        counts.append(within.sum(dim=1))
        covered |= within.any(dim=0)
        recalled |= (apart <= radius[:, None]).any(dim=0)
    return {
        "precision": torch.cat(precise).double().mean().item(),
        "recall": recalled.double().mean().item(),
        "density": torch.cat(counts).double().mean().item() / min(5, len(real) - 1),
        "coverage": covered.double().mean().item(),
    }


@torch.no_grad()
def scores(classifier, real, radii, images, classes):
    """One row of the table: images (n, channels, size, size) in [0, 1] beside the real features,
    whose neighbourhoods have these radii."""
    parts = [classifier(part) for part in images.split(500)]
    features, logits = (torch.cat(part) for part in zip(*parts))
    share = torch.bincount(logits.argmax(dim=1), minlength=len(classes)).double() / len(images)
    row = {"images": len(images), "frechet": frechet_distance(real, features)}
    row |= {"score": inception_score(logits), **neighbourhoods(real, features, radii)}
    return row | {f"class {name}": value for name, value in zip(classes, share.tolist())}


# ------------------------------------------------------------------ checkpoints
def read_generators(paths, device):
    """The state of the first checkpoint, and {name: (module, generator)} of them all."""
    found, first = {}, None
    for path in paths:
        try:
            script = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["script"]
            if script not in SCRIPTS:
                raise ValueError(f"it is not of {', '.join(SCRIPTS)}")
            module = importlib.import_module(script)
            state, generator = module.load_checkpoint(path), module.load_generator(path, device)
        except Exception as error:  # a damaged file raises many kinds
            raise UsageError(f"{path} is no whole checkpoint: {error!s:.200}") from error
        first = first or state
        if len(state["data"]["shape"]) != 4:
            raise UsageError(f"{path} draws points, not images")
        if state["data"] != first["data"]:
            raise UsageError(f"{path} is of other data than {paths[0]}: score them apart")
        name = f"{module.SCRIPT} {Path(path).absolute().parent.name}"
        found[name if name not in found else str(path)] = module, generator
    return first, found


def read_data(state, data_dir, device):
    """The data that a checkpoint's run was trained on, and no other."""
    config = argparse.Namespace(**state["config"])
    if data_dir is None and config.dataset != "digits" and not Path(config.data_dir).is_dir():
        raise UsageError(f"the run's data are no longer in {config.data_dir}: give --data-dir")
    config.data_dir = data_dir or config.data_dir
    data = load_data(config, device)
    if state["data"] != {"about": data.classes, "shape": [*data.train.shape]}:
        raise UsageError(f"--data-dir {config.data_dir}: these are not the run's data")
    if len(data.test) < 20:
        raise UsageError(f"{data.name} has {len(data.test)} test images; scores need 20 or more")
    return data


def draw(module, generator, labels):
    """As many images in [0, 1]; of a conditional generator, of these classes."""
    images = []
    for i, label in enumerate(labels.split(500)):
        taken = {"cgan": [label], "dcgan": [len(label), label], "oversampling": [len(label), label]}
        what = taken.get(module.SCRIPT, [len(label)])
        images.append(module.sample(generator, *what, seed=1000 + 500 * i))
    return torch.cat(images)


# ------------------------------------------------------------------ what is left behind
def table(rows, accuracy):
    """The rows as text, with a column for each measure."""
    names = [key for key in next(iter(rows.values())) if not key.startswith("class ")]
    wide = max(len(name) for name in rows)
    lines = [" ".join([" " * wide, *(f"{name:>9}" for name in names)])]
    for label, row in rows.items():
        cells = [f"{row[name]:9d}" if name == "images" else f"{row[name]:9.3f}" for name in names]
        lines.append(" ".join([f"{label:{wide}}", *cells]))
    return "\n".join([*lines, f"(classifier: test accuracy {accuracy:.4f})"])


def write_csv(path, rows, accuracy):
    rows = [{"name": name, **row, "classifier_accuracy": accuracy} for name, row in rows.items()]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def save_rows(path, images):
    """A picture with a row of 16 images for each name in images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.8 * len(images) + 0.2), layout="constrained")
    axes = figure.subplots(len(images), 1, squeeze=False)[:, 0]
    for axis, (name, part) in zip(axes, images.items()):
        axis.imshow(make_grid(part[:16], nrow=16, padding=1).permute(1, 2, 0).cpu().numpy())
        axis.set_title(name, fontsize=8, parse_math=False)  # a run's name may hold dollar signs
        axis.axis("off")
    figure.savefig(path, dpi=150)


def evaluate(args):
    """Draws, measures, writes the table and the picture, and prints the table."""
    out, device = Path(args.out), choose_device(args.device)
    if not out.name:
        raise UsageError(f"--out {args.out!r}: give a name, of which .csv and .png are made")
    torch.backends.cudnn.allow_tf32 = False
    state, generators = read_generators(args.checkpoints, device)
    data = read_data(state, args.data_dir, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    classifier, accuracy = train_classifier(data)
    mixed = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0)).to(device)
    halves = mixed.chunk(2)
    reference, held = (data.test[half] / 255 for half in halves)
    labels = data.test_labels[halves[1]]  # conditional generators draw the same classes
    with torch.no_grad():
        real = torch.cat([classifier(part)[0] for part in reference.split(500)])
        radii = neighbour_distances(real, 3, 5)
    rows, images = {}, {}
    for name, found in {"held-out real": None, **generators}.items():  # one in memory at a time
        part = draw(*found, labels) if found else held
        rows[name] = scores(classifier, real, radii, part, data.classes)
        images[name] = part[:16].clone()
    try:
        write_csv(Path(f"{out}.csv"), rows, accuracy)
        save_rows(Path(f"{out}.png"), images)
    finally:  # what can not be written is printed all the same
        print(f"{data.name}, beside {len(reference)} real images\n{table(rows, accuracy)}")


def main(argv=None):
    """Scores the checkpoints; a mistake of the user's ends in a message and exit code 2."""
    parser, timeout = arguments(), socket.getdefaulttimeout()
    args = parser.parse_args(argv)
    try:
        evaluate(args)
    except (UsageError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        parser.exit(2, f"{SCRIPT}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{SCRIPT}: error: stopped\n")
    finally:  # a notebook goes on
        socket.setdefaulttimeout(timeout)


# ================================================================== plumbing
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


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # a notebook asks for its own, which may be missing here
    for stream in (sys.stdout, sys.stderr):  # there may be none, or one of few letters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    main()
