"""gan.py: networks, schedule, both ways of an update, measures, the line, and what a run leaves."""

import functools
import json
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_gradients,
    error_of,
    refused_by,
    rows,
    same,
    shrink,
    weights,
    write_images,
    write_mnist,
)
from PIL import Image

import evaluate
import gan

refused = functools.partial(refused_by, gan)


@pytest.fixture(autouse=True)
def small_networks(request, monkeypatch):
    if "paper" not in request.node.name:
        shrink(gan, monkeypatch.setattr)


def made_data(images=60):
    rng = torch.Generator().manual_seed(1)
    train = torch.randint(256, (images, 1, 28, 28), dtype=torch.uint8, generator=rng)
    labels = torch.arange(images) % 10
    return gan.Data("made", list("0123456789"), train, labels, train[:20], labels[:20])


def made_model(*flags, data=None):
    data = data or made_data()
    args = gan.arguments().parse_args(["--batch-size", "10", *map(str, flags)])
    torch.manual_seed(args.seed)
    gan.suit(args, data)
    return gan.Model(args, data), data


# ------------------------------------------------------------------ networks
def test_networks_are_those_of_the_paper():
    """Sizes, initial weights, biases, and dropout before each of D's layers alone."""
    torch.manual_seed(0)
    g, d = gan.Generator(), gan.Discriminator()
    linear = [m for m in g.modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [
        (100, 1200), (1200, 1200), (1200, 784),
    ]  # fmt: skip
    pieces = [m for m in d.modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in pieces] == [
        (784, 240 * 5), (240, 240 * 5), (240, 1),
    ]  # fmt: skip
    assert [m.p for m in d.modules() if isinstance(m, torch.nn.Dropout)] == [0.2, 0.5, 0.5]
    assert not any(isinstance(m, torch.nn.Dropout) for m in g.modules())
    for layers, reach in ((linear, 0.05), (pieces, 0.005)):
        for layer in layers:
            assert reach * 0.9 < layer.weight.abs().max() <= reach and not layer.bias.any()
            assert abs(layer.weight.std() / (reach / 3**0.5) - 1) < 0.2  # uniform
    z = g.draw(1000)
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.01 and z.abs().max() <= 3**0.5


def test_maxout_is_the_largest_of_its_pieces():
    torch.manual_seed(0)
    layer, x = gan.Maxout(7, 4, 3), torch.randn(5, 7)
    weight, bias = layer.linear.weight.detach().view(3, 4, 7), torch.randn(3, 4)
    layer.linear.bias.data = bias.flatten()
    for n in range(5):
        for unit in range(4):
            pieces = [float(weight[k, unit] @ x[n] + bias[k, unit]) for k in range(3)]
            assert math.isclose(float(layer(x)[n, unit].detach()), max(pieces), rel_tol=1e-5)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1,)])
def test_shapes_and_range(shape):
    g, d = gan.Generator(shape), gan.Discriminator(shape)
    x = g(g.draw(4))
    assert x.shape == (4, *shape) and d(x).shape == (4,)
    assert len(shape) == 1 or 0 <= x.min() <= x.max() <= 1


def test_untrained_images_are_about_the_mean_image():
    model, data = made_model()
    mean = data.train.float().mean(dim=0) / 255
    assert (gan.sample(model.generator, 10).mean(dim=0) - mean).abs().mean() < 0.005


# ------------------------------------------------------------------ the training step
def test_sgd_follows_the_authors_schedule():
    """Against the closed form of its rates, over updates at both ends of the schedule."""
    torch.manual_seed(0)
    ours, theirs = torch.zeros(3, requires_grad=True), torch.zeros(3, dtype=torch.float64)
    optimizer, velocity = gan.PaperSGD([ours], 0.1), torch.zeros(3, dtype=torch.float64)
    for t in [*range(10), *range(100_000, 100_010), *range(900_000, 900_010)]:
        optimizer.state[ours]["updates"].fill_(t)
        ours.grad = gradient = torch.randn(3)
        optimizer.step()
        assert optimizer.state[ours]["updates"] == t + 1
        rate, momentum = 0.1 / 1.000004**t, 0.5 + 0.2 * min(t / 125_000, 1)
        velocity = momentum * velocity - rate * gradient.double()
        theirs += velocity
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-6)


def test_rate_falls_on_the_line_and_goes_on_where_its_state_was():
    x = torch.zeros(2, requires_grad=True)
    optimizer = gan.falling_adam([x], 0.1, 4, 8)
    x.grad = torch.ones(2)
    for t in range(4):
        optimizer.step()
        assert math.isclose(optimizer.param_groups[0]["lr"], 0.1 / 1.001**t, rel_tol=1e-5)
    optimizer.step()
    optimizer.step()
    other = gan.falling_adam([x], 0.1, 4, 8)
    other.load_state_dict(other.state_dict() | {"state": optimizer.state_dict()["state"]})
    other.step()
    assert math.isclose(other.param_groups[0]["lr"], 0.05 / 1.001**6, rel_tol=1e-5)


def test_rate_goes_down_to_0_in_the_last_share_of_a_run():
    at = torch.tensor([0.0, 60, 80, 90, 99, 100])
    decay = 1.000004**-at
    rates = gan.learning_rate(at, 0.5, 80, 100) / decay
    assert torch.allclose(rates, torch.tensor([0.5, 0.5, 0.5, 0.25, 0.025, 0]))
    assert torch.allclose(gan.learning_rate(at, 0.5, 100, 100)[:5], 0.5 * decay[:5])


@pytest.mark.parametrize("fall, last", [(0, 1), (0.5, 0.2), (1, 0.1)])
def test_run_ends_where_its_rate_does(fall, last):
    """The last of ten updates, 2 epochs of 5, moves G's bias by that share of the first rate."""
    flags = ["--epochs", 2, "--batch-size", 4, "--lr", 0.5, "--lr-fall", fall]
    model, data = made_model(*flags, data=made_data(20))
    lively(model)
    for optimizer in model.optimizers:
        for state in optimizer.state.values():
            state["updates"].fill_(9)
    bias = model.generator.layers[4].bias
    before = bias.detach().clone()
    gan.train_step(model, *model.batch(data, torch.arange(4)))
    assert torch.allclose(bias - before, -0.5 * last * bias.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("line", [False, True])
def test_rate_of_d_ends_with_the_run_where_it_has_more_updates(line):
    """Of 10 steps of three updates of D and one of G, D's rate falls to 0 in the last."""
    data = gan.Data("1d", *gan.line_set(60)) if line else made_data(60)
    flags = ("--alternate", 3, "--batch-size", 20, "--epochs", 10, "--lr-fall", 0.1)
    model, data = made_model(*flags, data=data)
    lively(model)
    weight, moved = model.discriminator.layers[-1 if line else 6].weight, []
    for _ in range(10):
        before = weight.detach().clone()
        gan.train_step(model, *model.batch(data, torch.arange(60)))
        moved.append((weight.detach() - before).norm())
    assert moved[8] > moved[5] / 10 and 0 < moved[9] < moved[8]


def test_value_is_minus_log_4_where_d_is_a_half():
    assert math.isclose(gan.value(torch.zeros(5), torch.zeros(7)), -math.log(4), rel_tol=1e-6)
    score_real, score_fake = torch.randn(5), torch.randn(7)
    d_real, d_fake = score_real.sigmoid(), score_fake.sigmoid()
    want = d_real.log().mean() + (1 - d_fake).log().mean()
    assert torch.allclose(gan.value(score_real, score_fake), want, atol=1e-5)


def lively(model):
    """D as after some training: at the start G's gradients are 1e-9, and would pass for nothing."""
    with torch.no_grad():
        for p in model.discriminator.parameters():
            p.mul_(30)


def by_hand(model, real, saturating):
    """The gradients of D and G, at the same weights, from the same samples and dropout."""
    G, D = model.generator, model.discriminator
    fake = G(G.draw(len(real)))
    d_fake, d_real = D(fake).sigmoid(), D(real).sigmoid()
    of_d = -(d_real.log().mean() + (1 - d_fake).log().mean()) / 2
    of_g = (1 - d_fake).log().mean() if saturating else -d_fake.log().mean()
    on_d = torch.autograd.grad(of_d, list(D.parameters()), retain_graph=True)
    return on_d, torch.autograd.grad(of_g, list(G.parameters())), of_d, of_g


@pytest.mark.parametrize("flags", [[], ["--saturating"]])
def test_update_is_of_both_networks_at_once(flags):
    """D's dropout is drawn once: G's loss has the mask that D's has."""
    model, data = made_model(*flags)
    lively(model)
    (real,) = model.batch(data, torch.arange(10))
    before = [[p.clone() for p in x.parameters()] for x in (model.discriminator, model.generator)]
    masks = []
    first = model.discriminator.layers[1]
    first.register_forward_hook(lambda *_: masks.append(1))
    torch.manual_seed(3)
    *gradients, of_d, of_g = by_hand(model, real, bool(flags))
    masks.clear()
    torch.manual_seed(3)
    losses = gan.train_step(model, real)
    assert len(masks) == 2 and first.training  # one pass on real images, one on generated
    assert torch.allclose(losses["loss_d"], of_d) and torch.allclose(losses["loss_g"], of_g)
    after = [list(x.parameters()) for x in (model.discriminator, model.generator)]
    for old, new, gradient in zip(before, after, gradients):
        for p, q, g in zip(old, new, gradient):
            assert torch.allclose(q, p - 0.1 * g, atol=1e-7) and g.any()


def test_saturating_loss_has_no_slope_where_d_is_sure():
    """D(G(z)) near 0: the slope of log(1 - D) is near 0, that of -log D near -1."""
    model, data = made_model()
    (real,), slopes = model.batch(data, torch.arange(10)), {}
    for p in model.discriminator.parameters():
        p.data.zero_()
    model.discriminator.layers[-1].bias.data.fill_(-20)
    for saturating in (True, False):
        model.args.saturating = saturating
        score = []
        hook = model.discriminator.register_forward_hook(
            lambda _, __, out, score=score: (out.retain_grad(), score.append(out))[1]
        )
        torch.manual_seed(0)
        kept = [p.clone() for p in model.parameters()]
        gan.train_step(model, real)
        hook.remove()
        slopes[saturating] = score[0].grad.sum().item()
        for p, old in zip(model.parameters(), kept):
            p.data.copy_(old)
    assert abs(slopes[True]) < 1e-6 and abs(slopes[False] + 1) < 1e-3


def test_alternate_is_algorithm_1(monkeypatch):
    """K updates of D on parts of the batch, then one of G, each from samples of its own."""
    model, data = made_model("--alternate", 3)
    assert model.samples_per_step == 30
    events, draw = [], model.generator.draw
    monkeypatch.setattr(model.generator, "draw", lambda n: events.append(f"z {n}") or draw(n))
    for name in ("optimizer_d", "optimizer_g"):
        optimizer = getattr(model, name)
        optimizer.register_step_pre_hook(lambda *_, name=name: events.append(name))
    gan.train_step(model, *model.batch(data, torch.arange(30)))
    assert events == ["z 10", "optimizer_d"] * 3 + ["z 10", "optimizer_g"]
    parse = gan.arguments().parse_args
    assert parse(["--alternate"]).alternate == 1 and parse([]).alternate is None


def test_gradients_of_algorithm_1_are_of_a_part_of_the_batch_each():
    model, data = made_model("--alternate", 2, "--lr", "0")
    lively(model)
    (real,) = model.batch(data, torch.arange(20))
    G, D, seen = model.generator, model.discriminator, []
    torch.manual_seed(3)
    for x in real.chunk(2):
        d_fake, d_real = D(G(G.draw(10))).sigmoid(), D(x).sigmoid()
        of_d = -(d_real.log().mean() + (1 - d_fake).log().mean()) / 2
    of_g = -D(G(G.draw(10))).sigmoid().log().mean()
    D.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(3)
    assert_gradients([(of_d, D), (of_g, G)], lambda: gan.train_step(model, real), atol=1e-7)
    assert torch.equal(torch.cat(seen[1:4:2]), real)


def test_evaluation_is_of_held_out_images_and_samples():
    model, data = made_model()
    data = data._replace(test=data.test // 2)  # darker than samples, which this D can tell
    model.discriminator.forward = lambda x: 8 * x.flatten(1).mean(dim=1) - 3
    found, sure = gan.evaluate(model.eval(), data), 1 / (1 + math.exp(-1))
    assert found["d_real"] == pytest.approx(1 - sure, abs=0.02)
    assert found["d_fake"] == pytest.approx(sure, abs=0.02)
    assert found["value"] == pytest.approx(2 * math.log(1 - sure), abs=0.05)
    others = data.train.clone()
    others[torch.arange(60) % 7 < 6] = 0
    assert gan.evaluate(model, data._replace(train=others)) == found


def test_every_seventh_image_is_held_out():
    model, data = made_model()
    (seen,) = model.batch(data, torch.arange(14))
    numbers = [0, 1, 2, 3, 4, 5, 5, 7, 8, 9, 10, 11, 12, 12]
    assert torch.equal(seen, data.train[numbers] / 255)


# ------------------------------------------------------------------ measures
def test_nearest_image_and_its_distance():
    data = made_data()
    images = data.train[[7, 3]] / 255
    images[1, 0, 0, 0] += 0.25
    neighbours, distance = gan.nearest(images, data.train)
    assert torch.equal(neighbours, data.train[[7, 3]] / 255)
    assert torch.allclose(distance, torch.tensor([0, 0.25]), atol=1e-6)


def test_interpolation_goes_straight_from_one_z_to_another():
    generator, seen = gan.Generator(), []
    generator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    gan.interpolate(generator, rows=3, columns=5, seed=2)
    z, ends = seen[0].view(3, 5, 100), generator.draw(6, 2)
    assert torch.equal(z[:, 0], ends[:3]) and torch.allclose(z[:, -1], ends[3:])
    assert torch.allclose(z[:, 2], (ends[:3] + ends[3:]) / 2, atol=1e-6)


def test_ceiling_is_the_score_of_real_images(monkeypatch, tmp_path):
    """Where G draws the real images themselves, both figures are one; sigma is from those held out.

    Images N(1/2, 0.2) in each pixel, so that sigma is known: one sample's best is 0.2 * root 2.
    """
    rng = torch.Generator().manual_seed(0)
    train = (127.5 + 51 * torch.randn(140, 1, 28, 28, generator=rng)).clamp(0, 255).byte()
    model, data = made_model(data=made_data()._replace(train=train, test=train[6::7]))
    real = gan.some(train[torch.arange(140) % 7 < 6], 200)
    monkeypatch.setattr(gan, "sample", lambda generator, n: real)
    monkeypatch.setattr(gan, "save_curves", lambda *_: None)
    found = gan.finish(model.eval(), data, tmp_path, [])
    assert found["parzen_nats"] == found["parzen_nats_of_real_images"]
    assert found["parzen_real_images"] == 120
    assert abs(found["parzen_sigma"] / (0.2 * 2**0.5) - 1) < 0.12  # the grid's step
    assert found["nearest_training_image"] == 0 < found["nearest_training_image_of_real"]


# ------------------------------------------------------------------ the line
def test_shares_of_p_data_are_those_of_its_points():
    p = gan.data_share()
    assert math.isclose(p.sum(), 1) and len(p) == 202
    _, train, *_ = gan.line_set(200_000)
    assert train.shape == (200_000, 1)
    found = gan.distances(p, gan.share(train))
    assert found["total_variation"] < 0.02 and found["jensen_shannon"] < 1e-3
    at = p[1:-1].cumsum(0) + p[0]
    middle = gan.EDGES[1:] == 0
    assert torch.allclose(at[middle], torch.tensor([0.3 * 0.99957 + 0.25 + 0.2 * 3.2e-5]).double())


def test_distances_of_known_densities():
    a, b = torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([0, 0, 0.25, 0.75])
    far, same_ = gan.distances(a, b), gan.distances(a, a)
    assert math.isclose(far["total_variation"], 1)
    assert math.isclose(far["jensen_shannon"], math.log(2), rel_tol=1e-6)
    assert same_["total_variation"] == same_["jensen_shannon"] == 0
    half = gan.distances(torch.tensor([1.0, 0]), torch.tensor([0.5, 0.5]))
    assert math.isclose(half["total_variation"], 0.5)
    want = 0.5 * (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert math.isclose(half["jensen_shannon"], want, rel_tol=1e-6)


def test_generator_that_is_p_data_has_no_distance():
    """Evenly spaced z under p_data's quantiles, which bisection finds."""

    def quantiles(z):
        u = (z[:, 0].double() / 3**0.5 + 1) / 2
        low, high = torch.full_like(u, -9), torch.full_like(u, 9)
        weight, mean, deviation = gan.MIXTURE.double()[..., None]
        for _ in range(60):
            x = (low + high) / 2
            below = (weight * torch.special.ndtr((x - mean) / deviation)).sum(dim=0) < u
            low, high = torch.where(below, x, low), torch.where(below, high, x)
        return x[:, None].float()

    quantiles.layers = [Namespace(weight=torch.zeros(1))]
    found = gan.distances(gan.data_share(), gan.share(gan.even_points(quantiles)[1]))
    assert found["total_variation"] < 2e-3 and found["jensen_shannon"] < 1e-4


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A run of 300 updates."""
    folder = tmp_path_factory.mktemp("line")
    threads = torch.get_num_threads()
    gan.main(["--dataset", "1d", "--epochs", "3", "--device", "cpu", "--out", str(folder / "run")])
    assert torch.get_num_threads() == threads
    return folder / "run"


def test_line_is_learned(line):
    found = json.loads((line / "summary.json").read_text())
    assert found["total_variation"] < 0.5 and abs(found["value"] + math.log(4)) < 0.1
    assert abs(found["d_real"] - 0.5) < 0.1 and abs(found["d_fake"] - 0.5) < 0.1
    assert [row["step"] for row in rows(line)] == ["100", "200", "300"]
    panels = sorted((line / "samples").iterdir())
    with Image.open(line / "figure1.png") as strip, Image.open(panels[-1]) as last:
        assert strip.size == (3 * last.width, last.height)
        right = strip.crop((2 * last.width, 0, *strip.size))
        assert np.array_equal(np.asarray(right), np.asarray(last))


def test_run_on_the_line_goes_on_and_is_drawn_from(line, capsys):
    flags = ["--dataset", "1d", "--epochs", "3", "--device", "cpu", "--out", "run"]
    gan.main([*flags, "--max-steps", "120"])
    gan.main(["--resume", "run/checkpoint.pt", "--max-steps", "1000"])
    assert same(weights("run"), weights(line))
    path = line / "checkpoint.pt"
    gan.main(["--generate", str(path), "--out", "line.jpg"])
    with Image.open("line.jpg") as image:
        assert image.format == "JPEG"
    assert gan.sample(gan.load_generator(path), 7).shape == (7, 1)
    assert "points, not images" in refused_by(evaluate, capsys, path)


# ------------------------------------------------------------------ whole runs
def test_run_on_images_leaves_figures_and_their_numbers():
    write_mnist("data", train=70, test=20)
    flags = ["--dataset", "mnist", "--batch-size", "10", "--epochs", "2", "--device", "cpu"]
    gan.main([*flags, "--out", "run"])
    names = {path.name for path in Path("run").iterdir()}
    assert names >= {"curves.png", "interpolation.png", "nearest.png"}
    with Image.open("run/nearest.png") as image:
        assert image.size == (10 * 30 + 2, 10 * 30 + 2)
    found = json.loads(Path("run/summary.json").read_text())
    assert found["parzen_real_images"] == 60 and found["parzen_nats_of_real_images"] < 0
    assert found["nearest_training_image"] > 0 and found["parzen_estimate"] < 0
    assert (found["lr"], found["lr_fall"], found["epochs"]) == (0.1, 0.2, 2)
    images = gan.sample(gan.load_generator("run/checkpoint.pt"), 3)
    assert images.shape == (3, 1, 28, 28) and F.relu(-images).sum() == 0


def test_flags_left_out_suit_the_data():
    def suited(data, *flags):
        args = gan.arguments().parse_args(flags)
        threads = torch.get_num_threads()
        gan.suit(args, data)
        torch.set_num_threads(threads)
        return args.epochs, args.batch_size, args.lr, args.lr_fall

    assert suited(made_data(1000)) == (250, 100, 0.1, 0.2)
    assert suited(made_data(10_000)) == (800, 100, 0.1, 0.2)
    assert suited(made_data(), "--alternate", "3") == (250, 20, 0.1, 0.2)
    given = ["--epochs", "3", "--batch-size", "7", "--lr", "0", "--lr-fall", "0"]
    assert suited(made_data(), *given) == (3, 7, 0, 0)
    line = gan.Data("1d", *gan.line_set(100))
    assert suited(line) == (30, 100, 2e-3, 0)


def test_bad_flags(capsys):
    for flags in (["--lr", "nan"], ["--lr-fall", 1.1], ["--alternate", 0]):
        assert flags[0] in refused(capsys, "--dataset", "digits", *flags)
    write_images("pictures", n=5)
    flags = ["--dataset", "folder", "--data-dir", "pictures", "--batch-size", "2", "--out", "run"]
    assert "7 are the least" in error_of(gan, capsys, *flags) and not Path("run").exists()
