"""Speed, memory and quality of ctgan.py beside the package ctgan 0.12.1, in one run.

    python benchmarks/tables.py                # prints tables, writes benchmarks/tables-<device>.md
    python benchmarks/tables.py --epochs 300   # as many as the paper's, about an hour
    python benchmarks/tables.py --smoke        # a small simulated table, nothing written

The package is not open source, and no dependency of this project: pip installs it into a virtual
environment of its own, build/ctgan-0.12.1 or --peer, which borrows PyTorch and all else that is
here from this one. An environment that has it already is used as it is.

Each of the two runs in a process of its own, with as many threads, on the same rows of Adult (the
paper's split), with the same discrete columns, batch and epochs. They take turns: one sets up, then
the other, then each trains an epoch, and so on. Their progress bars are replaced by a clock that
waits for the other; nothing else of them is changed.
"""

import argparse
import os
import pickle
import resource
import subprocess
import sys
import time
import venv
from pathlib import Path

import numpy as np
import torch
from timing import machine
from torch.optim.optimizer import register_optimizer_step_post_hook
from training import load_script

ROOT = Path(__file__).resolve().parent.parent
PEER = "ctgan==0.12.1"
BATCH, SAMPLES, SAMPLED = 500, 5, 10_000
CAP, UPDATES = 12 * 2**30, 5  # of the test of memory: bytes that a process may have, and updates
MEASURES = ("column_shapes", "pair_trends", "rare_categories_kept", "rare_frequency_error")
MEASURES += ("f1_mean", "f1_boosting", "auc_boosting", "condition_obeyed", "condition_obeyed_worst")
NOTES = f"""\
Both see packs of ten rows, which is not ctgan.py's default. Set-up is all before the first update:
finding modes, encoding, networks; of ctgan 0.12.1 also what its sampling needs. What ctgan.py's
needs, to rake, it finds with its first rows, which have a line of their own. An update is its share
of the median epoch. Memory is what {UPDATES} updates of CTGAN add to the peak of a process, on a
simulated table of 24 columns, 16 of them discrete and one of these with 5,000 categories; a process
had {CAP >> 30} GB at most. Quality is that of as many rows as were trained on: shapes and trends
beside the held-out rows; the F1 and the area under the ROC curve, on these, of classifiers that
were trained on synthetic rows. `real` has real rows in their place: the training rows, for the rare
categories the held-out ones. Of `rare_frequency_error` less is better.

Known of ctgan 0.12.1, and left as it is: to sample, it draws conditions by the logarithm of their
frequency, so that rare values come too often; asked for a value, it passes the right condition on
for the first discrete column only, and batch norm, in training mode still, takes out what all rows
have in common; its TVAE takes the likeliest category, so that rare ones vanish.
"""


# ------------------------------------------------------------------ a contestant's own process
class This:
    """ctgan.py of this checkout."""

    def __init__(self):
        self.module = load_script(ROOT, "ctgan")
        self.loops = [self.module]

    def fit(self, model, epochs):
        numbers = self.table.keys() - self.discrete
        settings = {"epochs": epochs, "batch_size": BATCH, "pac": 10}
        self.model = self.module.fit(self.table, model, self.discrete, numbers, **settings)

    def sample(self, n):
        return self.module.sample(self.model, n)

    def obeyed(self):
        return self.module.obeyed(self.model)


class Peer:
    """The package."""

    def __init__(self):
        from ctgan.synthesizers import ctgan, tvae

        self.classes, self.loops = {"ctgan": ctgan.CTGAN, "tvae": tvae.TVAE}, [ctgan, tvae]

    def fit(self, model, epochs):
        from pandas import DataFrame

        self.model = self.classes[model](epochs=epochs, batch_size=BATCH)
        self.model.set_random_state(0)
        self.model.fit(DataFrame(self.table), sorted(self.discrete))

    def sample(self, n):
        frame = self.model.sample(n)
        return {name: frame[name].to_numpy().astype(x.dtype) for name, x in self.table.items()}

    def obeyed(self):
        """As ctgan.py's: the share of rows that have the value asked for, of 500 for each value."""
        shares = []
        for column in sorted(self.discrete):
            for value in np.unique(self.table[column]):
                made = self.model.sample(500, column, value)[column]
                shares.append(float((made == value).mean()))
        return {"condition_obeyed": np.mean(shares), "condition_obeyed_worst": min(shares)}


class EnoughUpdates(Exception):
    """Ends a fit whose memory is measured."""


def peak():
    """The most bytes of memory that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory(contestant, rows, categories):
    """What UPDATES of CTGAN on a simulated table add to the peak, or None if beyond CAP."""
    before, left = peak(), iter(range(2 * UPDATES - 1))  # each update has steps of two optimisers

    def after_step(*_):
        if next(left, None) is None:
            raise EnoughUpdates

    contestant.table, contestant.discrete = simulated(rows, categories)
    register_optimizer_step_post_hook(after_step)
    resource.setrlimit(resource.RLIMIT_DATA, (CAP, CAP))
    try:
        contestant.fit("ctgan", UPDATES)
    except EnoughUpdates:
        return peak() - before
    except (MemoryError, RuntimeError) as error:  # NumPy's, PyTorch's
        if isinstance(error, MemoryError) or "memory" in str(error):
            return None
        raise


def simulated(rows, categories):
    """A table of 24 columns, the first with so many categories, and its 16 discrete columns."""
    rng, table = np.random.default_rng(0), {}
    for i, size in enumerate([categories, *range(2, 17)]):
        values = np.array([f"value {value}" for value in range(size)])
        table[f"category {i}"] = values[rng.permutation(np.arange(rows) % size)]
    discrete = {*table}
    for i in range(8):
        table[f"number {i}"] = rng.normal(rng.integers(-5, 6, rows), 0.1 * (1 + i))
    return table, discrete


def clock():
    """Seconds of the processor, over all threads of this process, and seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.process_time(), time.perf_counter()])


def work(contestant):
    """Does what the process that started this one orders, and answers with the time it took."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # what the contestants print
    started = None

    def answer(result=None):
        pickle.dump((clock() - started, result), answers)
        answers.flush()

    def next_order():
        nonlocal started
        try:
            order = pickle.load(sys.stdin.buffer)
        except EOFError:  # the other end is closed
            sys.exit()
        started = clock()
        return order

    def in_turn(items, *_, **__):
        """Stands in for tqdm, and waits before each epoch; other bars are of columns."""
        for item in items:
            if isinstance(items, range):
                answer()
                next_order()
            yield item

    while True:
        name, *values = next_order()
        if name == "take":
            contestant.table, contestant.discrete = values
            answer()
        elif name == "memory":
            answer(memory(contestant, *values))
        else:
            for module in contestant.loops:
                module.tqdm = in_turn
            answer(getattr(contestant, name)(*values))


# ------------------------------------------------------------------ the process that orders
class Contestant:
    """Starts a contestant's process; a call gives it an order and returns (seconds, result)."""

    def __init__(self, kind, python, threads):
        settings = {"OMP_NUM_THREADS": f"{threads}", "LOKY_MAX_CPU_COUNT": f"{threads}"}  # joblib's
        self.process = subprocess.Popen(
            [python, "-W", "ignore", __file__, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | settings,
        )

    def __call__(self, *order):
        pickle.dump(order, self.process.stdin)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def installed(folder):
    """The Python of a virtual environment that has the peer, after installing it if need be."""
    python, (package, _, version) = folder / "bin" / "python", PEER.partition("==")
    if not python.exists():
        venv.create(folder, with_pip=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        here = [path for path in sys.path if path.endswith("-packages")]
        (packages / "borrowed.pth").write_text("\n".join(here))
    test = f"from importlib.metadata import version; assert version({package!r}) == {version!r}"
    if subprocess.run([python, "-c", test], stderr=subprocess.DEVNULL).returncode:
        print(f"installing {PEER} into {folder}")
        subprocess.run([python, "-m", "pip", "install", "--quiet", PEER], check=True)
    return python


def fit(contestants, model, epochs):
    """Each contestant's seconds (1 + epochs, 2): of setting up, then of each epoch, in turns."""
    seconds = {name: [] for name in contestants}
    for turn in range(1 + epochs):
        for name, ask in contestants.items():
            order = ("continue",) if turn else ("fit", model, epochs)
            seconds[name].append(ask(*order)[0])
    return {name: np.array(turns) for name, turns in seconds.items()}


def speed(contestants, model, epochs, updates):
    """{(what, target ratio): {contestant: seconds (2,)}}; leaves models of so many epochs."""
    runs, samples = [fit(contestants, model, n) for n in (1, 1, epochs)], []
    for _ in range(SAMPLES):
        samples.append({name: ask("sample", SAMPLED)[0] for name, ask in contestants.items()})
    found = {}
    for name in contestants:
        setup = np.median([run[name][0] for run in runs], axis=0)
        update = np.median(runs[-1][name][1:], axis=0) / updates
        found[name] = {
            ("set-up", 10): setup,
            ("update", 1.7): update,
            (f"whole fit, {epochs} epochs", 2): runs[-1][name].sum(axis=0),
            ("300 epochs, by set-up and update", 2): setup + 300 * updates * update,
            (f"first {SAMPLED:,} rows sampled", 1): samples[0][name],
            (f"{SAMPLED:,} rows sampled", 1): np.median([s[name] for s in samples[1:]], axis=0),
        }
    return {row: {name: found[name][row] for name in found} for row in found[name]}


def markdown(columns, rows):
    lines = [f"| {' | '.join(row)} |" for row in (columns, *rows)]
    return [lines[0], "|" + "---|" * len(columns), *lines[1:], ""]


def main():
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--epochs", type=int, default=20, help="of the fits whose quality is measured")
    add("--threads", type=int, default=1, help="of each of the two")
    add("--data-dir", default=ROOT / "data", help="where adult is kept")
    peer = ROOT / "build" / PEER.replace("==", "-")
    add("--peer", type=Path, default=peer, help="a virtual environment that has the peer, or will")
    add("--smoke", action="store_true", help="a small simulated table, nothing written")
    args = parser.parse_args()
    this, other = names = "ctgan.py", PEER.replace("==", " ")
    pythons = sys.executable, installed(args.peer)

    def start():
        kinds = zip(names, ("This", "Peer"), pythons)
        return {name: Contestant(kind, python, args.threads) for name, kind, python in kinds}

    def stop(contestants):
        for contestant in contestants.values():
            contestant.close()

    memories = []  # first, since a process inherits the peak of the one that starts it
    for rows, categories in [(600, 20)] if args.smoke else [(20_000, 5000), (200_000, 5000)]:
        contestants, taken = start(), []
        for ask in contestants.values():  # one after the other: together they may be too much
            taken.append(ask("memory", rows, categories)[1])
        stop(contestants)
        cells = [f"more than {CAP >> 20:,}" if x is None else f"{x >> 20:,}" for x in taken]
        ratio = f"{(taken[1] or CAP) / taken[0]:.1f}" + " or more" * (taken[1] is None)
        memories.append([f"{rows:,}", *cells, ratio, "2"])
        print(*memories[-1], flush=True)  # each as it is there; the table follows

    ctgan = load_script(ROOT, "ctgan")
    if args.smoke:
        (train, discrete), test = simulated(600, 20), simulated(300, 20)[0]
        target, ordinal, epochs = "category 1", {}, 2
    else:
        flags = ["--dataset", "adult", "--test-rows", "10000", "--data-dir", str(args.data_dir)]
        data = ctgan.load_data(ctgan.arguments().parse_args(flags), torch.device("cpu"))
        train, test, discrete = data.table, data.test, ctgan.discrete_names(data)
        target, ordinal, epochs = "income", {"education": ctgan.SCHOOLS.split()}, args.epochs
    n = len(train[target])

    def quality(made):
        found = ctgan.quality(test, made, discrete) | ctgan.rare_values(train, made, discrete)
        return found | ctgan.efficacy(train, made, test, target, discrete, ordinal)["synthetic"]

    contestants, speeds, qualities = start(), [], []
    for ask in contestants.values():
        ask("take", train, discrete)
    real = quality(train) | ctgan.rare_values(train, test, discrete)
    for model in ("ctgan", "tvae"):
        for (what, target), seconds in speed(contestants, model, epochs, n // BATCH).items():
            cells = [model, what]
            for unit in (0, 1):
                a, b = seconds[this][unit], seconds[other][unit]
                cells += [f"{a:.3g}", f"{b:.3g}", f"{b / a:.2f}"]
            speeds.append([*cells, f"{target}" if model == "ctgan" else ""])
            print(*speeds[-1], flush=True)
        found = []
        for ask in contestants.values():
            made = ask("sample", n)[1]
            found.append(quality(made) | (ask("obeyed")[1] if model == "ctgan" else {}))
        for name in MEASURES:
            cells = [f"{x[name]:.3f}" if name in x else "" for x in (*found, real)]
            if any(cells[:2]):
                qualities.append([model, name, *cells])
                print(*qualities[-1], flush=True)
    stop(contestants)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = f"{machine(device)}, {args.threads} thread{'s' * (args.threads > 1)} each"
    columns = [f"{this}, CPU s", f"{other}, CPU s", "ratio", f"{this}, s", f"{other}, s", "ratio"]
    lines = [
        f"{where}, PyTorch {torch.__version__}; {'a simulated table' if args.smoke else 'Adult'}, "
        f"{n:,} rows, batch {BATCH}, {n // BATCH} updates an epoch",
        "",
        *markdown(["model", "what", *columns, "target"], speeds),
        *markdown(["rows", f"{this}, MB", f"{other}, MB", "ratio", "target"], memories),
        *markdown(["model", f"after {epochs} epochs", this, other, "real"], qualities),
    ]
    text = "\n".join(lines) + "\n" + NOTES
    print(text)
    if not args.smoke:
        Path(__file__).with_name(f"tables-{device}.md").write_text(text)


if __name__ == "__main__":
    if sys.argv[1:] in (["This"], ["Peer"]):
        work({"This": This, "Peer": Peer}[sys.argv[1]]())
    else:
        main()
