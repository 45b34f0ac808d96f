"""Time the kernels against what PyTorch offers, as ratios measured in one run.

    python benchmarks/kernels.py            # every row; writes benchmarks/kernels-<device>.{md,png}
    python benchmarks/kernels.py --smoke    # the smallest rows briefly, nothing written

Every figure is a median of interleaved repeats: each repeat runs all the contestants of a row in
turn, so that a slow moment of the machine falls on all of them. "plain / ours" is the median of the
quotients of each turn. Plain autograd runs twice a turn: how far "plain / plain" is from 1 is what
the row can not tell apart.
"""

import argparse
import copy
import itertools
import sys
from pathlib import Path

import gan_kernels
import torch
from critics import CRITICS
from timing import machine, medians, middle, ratio, turns

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from infogan import info_loss_reference  # noqa: E402

BATCHES = [64, 128, 1024, 16_384, 131_072, 1_048_576, 4_194_304]
LATENTS = [([10], 2), ([10, 10, 10, 10], 4)]


def info_loss_rows(device, batches, seconds):
    """Yield one row a batch and latent code: forward and backward of a + 0.1 b to q."""
    compiled = torch.compile(info_loss_reference, dynamic=False)
    for sizes, n in LATENTS:
        torch._dynamo.reset()
        for batch in batches:
            q = torch.randn(batch, sum(sizes) + 2 * n, device=device, requires_grad=True)
            category = torch.stack([torch.randint(s, (batch,), device=device) for s in sizes], 1)
            code = torch.rand(batch, n, device=device) * 2 - 1
            rest = category, code, sizes

            def step(loss, q=q, rest=rest):
                a, b = loss(q, *rest)
                return torch.autograd.grad(a + 0.1 * b, q)

            source, target = q.detach(), torch.empty_like(q)
            t = medians(
                {
                    "fused": lambda step=step: step(gan_kernels.info_loss),
                    "eager": lambda step=step: step(info_loss_reference),
                    "compiled": lambda step=step: step(compiled),
                    "copy": lambda source=source, target=target: target.copy_(source),
                },
                device,
                seconds,
            )
            yield {
                "latents": "(" + ",".join(map(str, sizes)) + f")+{n}",
                "batch": batch,
                "fused, us": t["fused"] * 1e6,
                "eager / fused": t["eager"] / t["fused"],
                "compile / fused": t["compiled"] / t["fused"],
                "fused / 2 copies": t["fused"] / (2 * t["copy"]),
            }


def plain_penalty(critic, x):
    """The penalty as it is usually written."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return ((g.flatten(1).norm(dim=1) - 1) ** 2).mean()


def is_curved(critic, x):
    """Whether the critic's second derivative along some direction is not zero."""
    critic, x = copy.deepcopy(critic).double(), x.double().requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    along = (g * torch.randn_like(g)).sum()
    if not along.requires_grad:
        return False
    (second,) = torch.autograd.grad(along, x, allow_unused=True)
    return second is not None and bool(second.abs().max() > 1e-9 * g.abs().max())


def penalty_rows(device, small, seconds):
    """Yield one row a critic and size: the penalty and its gradients in the parameters.

    The floor of a piecewise-linear critic is one forward, one backward to the input, one tangent
    forward and one weight gradient, timed as forward + (forward and backward), the backward to the
    input as well as to the parameters; with curvature it is twice (forward and backward).
    """
    for name, big in itertools.product(CRITICS, [False] if small else [False, True]):
        torch.manual_seed(0)
        critic, shape = CRITICS[name](big)
        critic = critic.to(device)
        x = torch.randn(shape, device=device)
        parameters = list(critic.parameters())

        def forward(critic=critic, x=x):
            with torch.no_grad():
                critic(x)

        def both(wanted, critic=critic, x=x):
            return torch.autograd.grad(critic(x).sum(), wanted)

        def gradients(penalty, critic=critic, x=x, parameters=parameters):
            return torch.autograd.grad(penalty(critic, x), parameters, allow_unused=True)

        curved = is_curved(critic, x)
        leaf = x.clone().requires_grad_()
        times = turns(
            {
                "ours": lambda f=gradients: f(gan_kernels.gradient_penalty),
                "plain": lambda f=gradients: f(plain_penalty),
                "plain again": lambda f=gradients: f(plain_penalty),
                "forward": forward,
                "parameters": lambda f=both, p=parameters: f(p),
                "all": lambda f=both, c=critic, p=parameters, v=leaf: f([v, *p], c, v),
            },
            device,
            seconds,
        )
        t = middle(times)
        floor = 2 * t["all"] if curved else t["forward"] + t["all"]
        strict = 2 * t["parameters"] if curved else t["forward"] + t["parameters"]
        yield {
            "critic": name,
            "batch": len(x),
            "ours, ms": t["ours"] * 1e3,
            "plain / ours": ratio(times["plain"], times["ours"]),
            "plain / plain": ratio(times["plain again"], times["plain"]),
            "ours / floor": t["ours"] / floor,
            "plain / floor": t["plain"] / floor,
            "ours / floor without x": t["ours"] / strict,
        }


def shown(rows):
    """Return rows as a list, each printed as soon as it is there."""
    found = []
    for row in rows:
        print(*table([row]).splitlines()[2 if found else 0 :], sep="\n", flush=True)
        found.append(row)
    print()
    return found


def table(rows):
    """Return rows, dictionaries with the same keys, as a Markdown table."""

    def text(value):
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(map(text, row.values())) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def plot(info, penalties, path):
    """Draw both tables as one figure; of the penalty each critic at its larger batch."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    larger = list({row["critic"]: row for row in penalties}.values())
    larger.sort(key=lambda row: row["plain / ours"])
    height = max(4, 1 + 0.15 * len(larger))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), constrained_layout=True)
    for latents in dict.fromkeys(row["latents"] for row in info):
        chosen = [row for row in info if row["latents"] == latents]
        batches = [row["batch"] for row in chosen]
        for key, style in (("eager / fused", "o-"), ("compile / fused", "s--")):
            left.plot(batches, [row[key] for row in chosen], style, label=f"{key}, {latents}")
    left.set(xscale="log", xlabel="batch", ylabel="times faster", title="info_loss")
    left.axhline(1, color="grey", linewidth=0.8)
    left.legend(fontsize=7)
    places = range(len(larger))
    for key, mark in (("plain / floor", "o"), ("ours / floor", "s")):
        right.plot([row[key] for row in larger], places, mark, markersize=4, label=key)
    right.set_yticks(
        places, [f"{row['critic']}, batch {row['batch']}" for row in larger], fontsize=7
    )
    right.axvline(1, color="grey", linewidth=0.8)
    right.grid(axis="y", linewidth=0.3)
    right.margins(y=0.01)
    right.set(xscale="log", xlabel="time over the floor", title="gradient_penalty, larger batches")
    right.set_xticks(ticks := [0.7, 1, 1.5, 2, 3, 5, 7], map(str, ticks))
    right.minorticks_off()
    right.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row")
    parser.add_argument("--smoke", action="store_true", help="the smallest rows, nothing written")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    seconds = 0.0 if args.smoke else args.seconds
    head = (
        f"{machine(args.device)}, {args.threads} threads, PyTorch {torch.__version__}; "
        f"{gan_kernels.build_info()}"
    )
    print(head)
    info = shown(info_loss_rows(args.device, BATCHES[:2] if args.smoke else BATCHES, seconds))
    penalties = shown(penalty_rows(args.device, args.smoke, seconds))
    if not args.smoke:
        text = "\n\n".join([head, "## info_loss", table(info), "## gradient_penalty"])
        (HERE / f"kernels-{args.device}.md").write_text(f"{text}\n\n{table(penalties)}\n")
        plot(info, penalties, HERE / f"kernels-{args.device}.png")


if __name__ == "__main__":
    main()
