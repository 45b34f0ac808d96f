"""oversampling.py: losses, sampling, the table's measures, arrays in and out, what is its own."""

import copy
import csv
import json
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import checkpoint, refused_by, same, shrink, without_figures, write_images
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score

import evaluate
import oversampling

SMALL = {"width": 4, "latent": 4, "n_critic": 1, "max_steps": 2}
FLAGS = ["--dataset", "digits", "--width", "2", "--latent", "4", "--max-steps", "2", "--out", "run"]


def made_data(n=120, k=3, shape=(1, 12, 12)):
    """Noise in which the class is a bright row, so that it can be told."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(100, (n, *shape), dtype=torch.uint8, generator=rng)
    labels = torch.arange(n) % k
    images[torch.arange(n), :, labels * 3 + 2] += 150
    half = n // 2
    classes = [f"c{c}" for c in range(k)]
    parts = images[:half], labels[:half], images[half:], labels[half:]
    return oversampling.Data("made", classes, *parts)


def model_of(data, *flags):
    """A small model without dropout, so that it can be computed again."""
    small = ["--width", "2", "--latent", "4", "--dropout", "0", "--batch-size", "6"]
    args = oversampling.arguments().parse_args([*small, *flags])
    oversampling.suit(args, data)
    torch.manual_seed(args.seed)
    return oversampling.Model(args, data)


def equal_weights(mixer, z, label, rng=None):
    """In place of weights: no chance."""
    return torch.full(z.shape[:2], 1 / z.shape[1])


# ------------------------------------------------------------------ networks
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (2, 30, 21), (1, 3, 5)])
def test_any_sides_and_channels(shape):
    E, D = oversampling.Encoder(shape, 2, 5), oversampling.Decoder(shape, 2, 5)
    C = oversampling.Critic(shape, 2, classes=3)
    x, label = torch.rand(4, *shape), torch.tensor([0, 1, 2, 2])
    z = E(x)
    images = D(z, label)
    assert z.shape == (4, 5) and images.shape == x.shape and C(images, label).shape == (4,)
    assert images.min() > 0 and images.max() < 1


def test_networks_have_the_published_kinds_of_layers():
    conv = [m.weight.shape for m in oversampling.Encoder(width=64) if hasattr(m, "kernel_size")]
    assert conv == [(64, 1, 4, 4), (128, 64, 4, 4)]
    linear = [m for m in oversampling.Encoder(width=64) if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(6272, 1024), (1024, 64)]
    kinds = {type(m) for m in oversampling.Critic().modules()}
    assert not kinds & {torch.nn.BatchNorm2d, torch.nn.BatchNorm1d, torch.nn.Dropout}


def test_critic_and_conditional_decoder_see_the_label():
    C, one = oversampling.Critic(width=2), torch.rand(1, 1, 28, 28).expand(2, -1, -1, -1)
    assert C(one, torch.tensor([0, 1])).diff().abs() > 0
    z = torch.randn(1, 4).expand(2, -1)
    for classes in (0, 3):
        D = oversampling.Decoder((1, 8, 8), 2, 4, classes).eval()
        images = D(z, torch.tensor([0, 1]))
        assert torch.equal(images[0], images[1]) == (classes == 0)


# ------------------------------------------------------------------ mixing
@pytest.mark.parametrize("t", [2, 5])
def test_mixtures_are_convex(t):
    torch.manual_seed(0)
    z, label = torch.randn(50, t, 4), torch.arange(50) % 3
    for mixer in (None, oversampling.Mixer(4, 3, t, 16).eval()):
        alpha = oversampling.weights(mixer, z, label)
        assert alpha.shape == (50, t) and alpha.min() >= 0
        torch.testing.assert_close(alpha.sum(dim=1), torch.ones(50))
        mixed = oversampling.convex(z, alpha)
        assert (mixed <= z.amax(dim=1) + 1e-6).all() and (mixed >= z.amin(dim=1) - 1e-6).all()
    by_hand = sum(alpha[7, k] * z[7, k] for k in range(t))
    torch.testing.assert_close(mixed[7], by_hand)


def test_uniform_alpha_is_uniform():
    torch.manual_seed(0)
    alpha = oversampling.weights(None, torch.zeros(20_000, 2, 1), None)[:, 0]
    histogram = alpha.histc(10, 0, 1) / 20_000
    assert (histogram - 0.1).abs().max() < 0.01


def test_another_class_is_never_the_same_and_any_of_the_others():
    torch.manual_seed(0)
    label = torch.arange(3).repeat(500)
    other = oversampling.another(label, 3)
    pairs = torch.stack([label, other]).unique(dim=1)
    assert (other != label).all() and pairs.shape[1] == 6


def test_tuples_are_of_different_images_of_the_label_all_as_likely():
    model = model_of(made_data(), "--counts", "4", "9", "2")
    G = model.generator
    assert G.labels().tolist() == [0] * 4 + [1] * 9 + [2] * 2
    torch.manual_seed(0)
    numbers = G.draw(torch.arange(3).repeat(2000), 2)
    assert torch.equal(G.labels()[numbers[:, 0]], torch.arange(3).repeat(2000))
    assert torch.equal(G.labels()[numbers[:, 0]], G.labels()[numbers[:, 1]])
    assert (numbers[:, 0] != numbers[:, 1]).all()
    pairs, often = numbers[::3].unique(dim=0, return_counts=True)
    assert len(pairs) == 12 and often.min() > 120  # of 2,000, 167 each
    triples = G.draw(torch.zeros(50, dtype=torch.int64), 3)
    assert all(len(set(row)) == 3 for row in triples.tolist())


def test_batches_have_all_classes_alike():
    model = model_of(made_data(), "--counts", "20", "9", "2", "--n-critic", "2")
    x, label = model.batch(None, range(6))
    assert x.shape == (3, 6, 3, 1, 12, 12) and label.bincount().tolist() == [2, 2, 2]
    rows = x[..., 0, :, :].mean(dim=-1).argmax(dim=-1)  # the bright row tells the class
    assert torch.equal(rows, (label * 3 + 2)[None, :, None].expand(3, 6, 3))


def test_images_are_moved_by_at_most_so_much():
    torch.manual_seed(0)
    image = torch.zeros(200, 1, 9, 9, dtype=torch.uint8)
    image[:, :, 4, 4] = 255
    y, x = oversampling.moved(image, 2)[:, 0].nonzero()[:, 1:].T
    assert {*y.tolist()} == {*x.tolist()} == {2, 3, 4, 5, 6}


# ------------------------------------------------------------------ losses
@pytest.mark.parametrize("mixer", ["network", "uniform"])
def test_latent_step_has_the_papers_losses(mixer, monkeypatch):
    model = model_of(made_data(), "--mixer", mixer, "--reconstruction", "0.7")
    label = torch.arange(6) % 3
    x = model.generator.tuples(label, 2)
    E, L, M, D = (
        copy.deepcopy(net) for net in (model.encoder, model.linear, model.mixer, model.decoder)
    )
    kept = copy.deepcopy(model.decoder.state_dict())
    torch.manual_seed(1)
    losses = oversampling.latent_step(model, x, label, model.decoder)
    torch.manual_seed(1)
    z = E(x.flatten(0, 1))
    both = label.repeat_interleave(2)
    points = F.cross_entropy(L(z), both)
    error = (D(z, both) - x.flatten(0, 1)).abs().mean()
    alpha = oversampling.weights(M, z.detach().view(6, 2, 4), label)
    z = z.view(6, 2, 4)
    mixed = alpha.detach()[:, :1] * z[:, 0] + alpha.detach()[:, 1:] * z[:, 1]
    loss_mixed = F.cross_entropy(L(mixed), label)
    torch.testing.assert_close(losses["loss_points"], points)
    torch.testing.assert_close(losses["loss_mixed"], loss_mixed)
    torch.testing.assert_close(losses["absolute_error"], error)
    (points + loss_mixed + 0.7 * error).backward()
    for ours, p in zip(model.encoder.parameters(), E.parameters()):
        torch.testing.assert_close(ours.grad, p.grad)
    after = model.decoder.named_parameters()
    assert all(torch.equal(p, kept[name]) and p.grad is None for name, p in after)
    if mixer == "network":
        other = oversampling.another(label, 3)
        point = alpha[:, :1] * z[:, 0].detach() + alpha[:, 1:] * z[:, 1].detach()
        loss = F.cross_entropy(L(point), other)
        torch.testing.assert_close(losses["loss_mixer"], loss)
        M.zero_grad()
        loss.backward()
        for ours, p in zip(model.mixer.parameters(), M.parameters()):
            torch.testing.assert_close(ours.grad, p.grad)


def test_class_weights_weigh_the_loss():
    model = model_of(made_data())
    label, weight = torch.arange(6) % 3, torch.tensor([0.1, 1, 5])
    x = model.generator.tuples(label, 1)
    logits = copy.deepcopy(model.linear)(copy.deepcopy(model.encoder)(x[:, 0]))
    own = F.cross_entropy(logits, label, reduction="none") * weight[label]
    losses = oversampling.latent_step(model, x, label, weight=weight)
    torch.testing.assert_close(losses["loss_points"], own.sum() / weight[label].sum())
    assert losses.keys() == {"loss_points"}  # tuples of one are not mixed


def test_flags_reach_what_they_are_for(monkeypatch):
    moves = []
    monkeypatch.setattr(oversampling, "moved", lambda x, most: moves.append(most) or x)
    model = model_of(made_data(), "--shift", "3", "--lr", "0.25", "--lr-d", "0.5")
    model.batch(None, range(6))
    assert moves == [3, 3]  # the tuples and what is real to the critic
    for optimizer, lr, decay in (
        (model.optimizer_e, 0.25, 1e-3),
        (model.optimizer_m, 0.25, 0),
        (model.optimizer_d, 0.5, 0),
        (model.optimizer_c, 0.5, 0),
    ):
        (group,) = optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (lr, decay)


@pytest.mark.parametrize("class_weight", ["0", "3"])
def test_critic_and_decoder_have_wgan_gps_losses(class_weight, monkeypatch):
    monkeypatch.setattr(oversampling, "weights", equal_weights)
    flags = ["--n-critic", "1", "--kernels", "reference", "--class-weight", class_weight]
    model = model_of(made_data(), *flags, "--gp-weight", "3")
    x, label = model.batch(None, range(6))
    C, D = copy.deepcopy(model.critic), copy.deepcopy(model.decoder)
    seen = []
    penalty = model.gradient_penalty
    model.gradient_penalty = lambda critic, v: seen.append(v) or penalty(critic, v)
    losses = oversampling.train_step(model, x, label)
    G = model.generator
    with torch.no_grad():
        fake = D(G.mix(x[1, :, :-1], label), label)
    real = x[1, :, -1]
    torch.testing.assert_close(losses["distance"], (C(real, label) - C(fake, label)).mean())
    expected = oversampling.gradient_penalty_reference(lambda v: C(v, label), seen[0])
    torch.testing.assert_close(losses["penalty"], expected)
    (C(fake, label).mean() - C(real, label).mean() + 3 * expected).backward()
    for ours, p in zip(model.critic.parameters(), C.parameters()):
        torch.testing.assert_close(ours.grad, p.grad, rtol=1e-3, atol=1e-6)
    share = ((seen[0] - fake) / (real - fake)).flatten(1)  # of the way from fake to real
    torch.testing.assert_close(share, share[:, :1].expand_as(share), atol=1e-3, rtol=0)
    assert share.min() >= -1e-3 and share.max() <= 1 + 1e-3
    fake = D(G.mix(x[0, :, :-1], label), label)
    loss = -model.critic(fake, label).mean()
    torch.testing.assert_close(losses["loss_decoder"], loss)
    if class_weight != "0":
        loss = loss + 3 * F.cross_entropy(G(fake), label)
    loss.backward()
    for ours, p in zip(model.decoder.parameters(), D.parameters()):
        torch.testing.assert_close(ours.grad, p.grad, rtol=1e-3, atol=1e-6)


def test_fused_penalty_is_the_references_for_a_conditional_critic():
    kernels = pytest.importorskip("gan_kernels")
    torch.manual_seed(0)
    C = oversampling.Critic(width=2, classes=3).double()
    x, label = torch.rand(5, 1, 28, 28).double(), torch.arange(5) % 3
    found = []
    for penalty in (kernels.gradient_penalty, oversampling.gradient_penalty_reference):
        C.zero_grad()
        value = penalty(lambda v: C(v, label), x)
        value.backward()
        found.append([value.detach(), *(p.grad.clone() for p in C.parameters() if p.ndim > 1)])
    for ours, reference in zip(*found):
        torch.testing.assert_close(ours, reference)


def test_averages_follow_weights_and_statistics_and_are_never_trained():
    model = model_of(made_data())
    assert model.encoder.training and not model.generator.encoder.training
    before = copy.deepcopy(model.generator.state_dict())
    x, label = model.batch(None, range(6))
    oversampling.train_step(model, x, label)
    after = model.generator.state_dict()
    for key, value in model.encoder.state_dict().items():
        if value.is_floating_point():
            expected = before[f"encoder.{key}"].lerp(value, 9 / 11)  # the first is to be forgotten
            torch.testing.assert_close(after[f"encoder.{key}"], expected)
    assert not torch.equal(after["encoder.1.running_mean"], before["encoder.1.running_mean"])
    assert not any(module.training for module in model.generator.modules())
    assert not any(p.requires_grad for p in model.generator.parameters())
    model.generator.updates.fill_(1e4)
    before = copy.deepcopy(model.generator.state_dict())
    oversampling.follow(model.generator, model)
    after, value = model.generator.state_dict(), model.linear.weight
    expected = before["linear.weight"].lerp(value, 0.01)
    torch.testing.assert_close(after["linear.weight"], expected)


# ------------------------------------------------------------------ measures
def test_measures_of_known_recalls():
    truth = torch.arange(3).repeat_interleave(4)
    found = torch.tensor([0, 0, 0, 0, 1, 1, 0, 2, 2, 0, 0, 1])  # recalls 1, 1/2, 1/4
    figures, recall = oversampling.measures(truth, found, [9, 5, 2])
    assert recall == [1, 0.5, 0.25]
    assert figures["acsa"] == pytest.approx(balanced_accuracy_score(truth, found))
    assert figures["f1"] == pytest.approx(f1_score(truth, found, average="macro"))
    assert figures["gm"] == pytest.approx(0.125 ** (1 / 3))
    assert figures["gm_macro"] == pytest.approx(math.sqrt(7 / 12 * (5 / 8 + 7 / 8 + 7 / 8) / 3))
    never = oversampling.measures(truth, found.where(found != 2, 1), [9, 5, 2])[0]
    assert never["gm"] == 0 < never["gm_macro"]  # one class lost, and all is


def test_rarest_are_the_three_of_fewest_images_that_are_tested():
    truth = torch.tensor([0, 1, 2, 3, 4])
    found = torch.tensor([0, 1, 2, 0, 0])
    figures, _ = oversampling.measures(truth, found, [5, 4, 3, 2, 1])
    assert figures["rarest"] == pytest.approx(1 / 3)
    figures, _ = oversampling.measures(truth[:4], found[:4], [5, 4, 3, 2, 1])  # none of class 4
    assert figures["rarest"] == pytest.approx(2 / 3) and figures["acsa"] == 0.75


def test_smote_lies_on_segments_between_neighbours():
    rows = np.random.default_rng(0).normal(size=(12, 6))
    made = oversampling.smote(rows, 40, seed=1)
    assert made.shape == (40, 6) and made.dtype == rows.dtype
    order = np.linalg.norm(rows[:, None] - rows[None], axis=2).argsort(axis=1)
    segments = [(rows[i], rows[j]) for i in range(12) for j in order[i, 1:6]]
    for point in made:
        off = [
            np.linalg.norm(point - a) + np.linalg.norm(point - b) - np.linalg.norm(a - b)
            for a, b in segments
        ]
        assert min(off) < 1e-9
    assert oversampling.smote(rows[:2], 3).shape == (3, 6)  # fewer neighbours than five


def test_smote_is_imbalanced_learns():
    over_sampling = pytest.importorskip("imblearn.over_sampling")
    rows = np.random.default_rng(0).normal(size=(50, 6))
    y = np.repeat([0, 1], [38, 12])
    theirs, _ = over_sampling.SMOTE(random_state=3).fit_resample(rows, y)
    np.testing.assert_allclose(oversampling.smote(rows[38:], 26, seed=3), theirs[50:])


def test_density_and_coverage_are_those_of_evaluate():
    torch.manual_seed(0)
    real, fake = torch.randn(60, 4), torch.randn(40, 4) * 2
    wanted = evaluate.neighbourhoods(real, fake)
    found = oversampling.density_and_coverage(real, fake)
    assert found == pytest.approx((wanted["density"], wanted["coverage"]))
    assert oversampling.density_and_coverage(real, real) == pytest.approx((1.2, 1))


def test_what_is_right_at_both_ends_is_right_between():
    """The linear layer is affine, so that a mixer can not find a mixture that it gets wrong."""
    data = made_data()
    figures = oversampling.latent_figures(model_of(data).generator, data)
    assert figures["pairs_right_between"] >= figures["pairs_both_right"] - 1e-9
    assert 0 <= figures["alpha_above_0.99"] <= figures["alpha_above_0.9"] <= 1


def test_copies_are_preserved_and_noise_is_not():
    data = made_data()
    G = model_of(data).generator

    def judge(images):
        rows = images[:, 0].mean(dim=2)
        return rows, rows[:, 2:11:3]

    figures = oversampling.image_figures(G, data, judge, each=8)
    assert figures["preserved_copies"] == figures["preserved_smote"] == 1
    assert figures["preserved_generated"] < 1 and figures["density_copies"] > 0.3
    assert figures["preserved"].keys() == {"c0", "c1", "c2"}


# ------------------------------------------------------------------ counts and rows
def test_counts_are_drawn_by_the_seed():
    data = made_data()
    one, again, other = (
        model_of(data, "--counts", "5", "4", "3", "--seed", seed).generator for seed in "001"
    )
    assert one.count.tolist() == [5, 4, 3] and len(one.images) == 12
    assert torch.equal(one.images, again.images) and not torch.equal(one.images, other.images)
    for image, label in zip(one.images, one.labels()):
        of_class = data.train[data.train_labels == label]
        assert (of_class == image).flatten(1).all(dim=1).any()
    assert len(one.images.unique(dim=0)) == 12


@pytest.mark.parametrize("name", ["nothing", "weights", "copies", "smote", "uniform", "filled"])
def test_rows_of_the_table_differ_in_what_they_see_alone(name, monkeypatch):
    data = made_data()
    full = model_of(data, "--counts", "12", "4", "2")
    steps, started = [], []

    def step(model, x, label, decoder=None, weight=None):
        steps.append((x.shape[0], x.shape[1], label, weight, model.generator.count.tolist()))
        started.append(copy.deepcopy(model.encoder.state_dict()))
        assert decoder is None and (model.mixer is None) == (name == "uniform")
        return {}

    monkeypatch.setattr(oversampling, "latent_step", step)
    oversampling.train_row(name, full, data, 30)
    assert len(steps) == 30 and all(n * t == 12 for n, t, *_ in steps)  # images an update
    assert {t for _, t, *_ in steps} == {2 if name == "uniform" else 1}
    shares = torch.cat([label for _, _, label, *_ in steps]).bincount(minlength=3)
    if name in ("nothing", "weights"):
        assert shares.argsort().tolist() == [2, 1, 0]
    else:
        assert shares.tolist() == [60 if name == "uniform" else 120] * 3
    *_, weight, count = steps[0]
    assert count == ([12] * 3 if name in ("smote", "filled") else [12, 4, 2])
    assert (weight is None) == (name != "weights")
    if weight is not None:
        assert weight.tolist() == pytest.approx([0.5, 1.5, 3])
    torch.manual_seed(full.args.seed)
    began = oversampling.Model(full.args, data).encoder.state_dict()
    assert name == "uniform" or same(dict(started[0]), dict(began))


@pytest.mark.parametrize("name", [name for name in oversampling.ROWS if name != "full"])
def test_rows_are_made_of_what_they_are_named_for(name, monkeypatch):
    data, made, moves, tuples = made_data(), [], [], []
    full = model_of(data, "--counts", "12", "4", "2")
    for maker in ("generated", "pixel_smote"):
        make = getattr(oversampling, maker)

        def recorded(*given, make=make, maker=maker):
            made.append(maker)
            return make(*given)

        monkeypatch.setattr(oversampling, maker, recorded)
    monkeypatch.setattr(oversampling, "moved", lambda x, most: moves.append(most) or x)
    monkeypatch.setattr(
        oversampling, "latent_step", lambda m, x, *a, **k: tuples.append(x.shape[1])
    )
    oversampling.train_row(name, full, data, 1)
    makers = {"smote": {"pixel_smote"}, "filled": {"generated"}, "part-filled": {"generated"}}
    assert set(made) == makers.get(name, set())
    assert tuples == [2 if name in ("uniform", "mixer") else 1]
    assert moves == [1] * (name == "shifted")


def test_second_seed_is_a_training_of_its_own(monkeypatch):
    data, began = made_data(), []
    flags = ["--counts", "12", "4", "2", "--rows", "full"]
    model = model_of(data, *flags, "--seeds", "2")

    def train_whole(model, updates):
        began.append((model.args.seed, updates, model.generator.images))

    monkeypatch.setattr(oversampling, "train_whole", train_whole)
    oversampling.table(model, data, 7)
    ((seed, updates, images),) = began
    assert (seed, updates) == (1, 7)
    assert torch.equal(images, model_of(data, *flags, "--seed", "1").generator.images)


def test_measures_look_at_held_out_images_alone():
    data = made_data()
    model = model_of(data, "--counts", "12", "4", "2", "--rows", "copies", "smote")
    G, data = model.generator, data._replace(train=None, train_labels=None)
    oversampling.evaluate(model, data)
    oversampling.table(model, data, 1)
    oversampling.latent_figures(G, data)

    def judge(images):
        rows = images[:, 0].mean(dim=2)
        return rows, rows[:, 2:11:3]

    oversampling.image_figures(G, data, judge, each=4)


def test_kinds_of_images_are_by_their_own_weights(monkeypatch):
    G, label = model_of(made_data()).generator, torch.arange(6) % 3

    def first_or_last(mixer, z, label, rng=None):
        return F.one_hot(torch.full((len(z),), 0 if mixer is None else 1), 2).float()

    monkeypatch.setattr(oversampling, "weights", first_or_last)
    kinds = oversampling.kinds_of_images(G, label)
    with torch.no_grad():
        z = G.latents(G.tuples(label, 2, oversampling.own_rng(G, 1)))
        wanted = {"uniform": z[:, 0], "reconstructed": z[:, 0], "generated": z[:, 1]}
        for name, latents in (wanted | {"equal": z.mean(dim=1)}).items():
            torch.testing.assert_close(kinds[name], G.decoder(latents, label))


@pytest.mark.parametrize("flags", [["--mixer", "uniform"], ["--precision", "bf16"], ["--shift", 3]])
def test_rows_mean_the_same_whatever_the_run_is_told(flags, monkeypatch):
    """Mixtures by M or by uniform alpha, in the run's precision, with moved images one row less."""
    data, mixers, precise = made_data(), [], []
    rows = ["--rows", *oversampling.ROWS, *map(str, flags)]
    full = model_of(data, "--counts", "12", "4", "2", *rows)

    def step(model, *batch, **others):
        mixers.append(model.mixer)
        precise.append(not torch.is_autocast_enabled("cpu"))

    monkeypatch.setattr(oversampling, "latent_step", step)
    for name in ("uniform", "mixer"):
        oversampling.train_row(name, full, data, 1)
    assert mixers[0] is None and mixers[1] is not None
    assert precise == ["bf16" not in flags] * 2
    rows = [result["row"] for result in oversampling.table(full, data, 1)]
    assert ("shifted" in rows) == ("--shift" not in flags) and len(rows) >= 9


def test_a_row_that_diverges_is_left_out_and_the_others_stand(monkeypatch, capsys):
    data, step = made_data(), oversampling.latent_step
    full = model_of(data, "--counts", "12", "4", "2", "--rows", "nothing", "weights", "copies")

    def diverges(model, x, label, weight=None, **others):
        step(model, x, label, weight=weight, **others)
        if weight is not None:
            next(model.encoder.parameters()).data.fill_(math.nan)

    monkeypatch.setattr(oversampling, "latent_step", diverges)
    results = oversampling.table(full, data, 1)
    assert [result["row"] for result in results] == ["nothing", "copies", "full"]
    assert "weights, seed 0, is left out: nan after training" in capsys.readouterr().out


def test_part_filled_classes_are_five_times_as_large_at_most(monkeypatch):
    data, seen = made_data(), []
    full = model_of(data, "--counts", "12", "4", "2")
    monkeypatch.setattr(
        oversampling, "latent_step", lambda model, *a, **k: seen.append(model.generator.count)
    )
    oversampling.train_row("part-filled", full, data, 1)
    assert seen[0].tolist() == [12, 12, 10]


def test_summary_has_means_and_spreads_over_seeds():
    keys = ("acsa", "f1", "gm", "gm_macro", "rarest")
    results = [{"row": "copies", **dict.fromkeys(keys, value)} for value in (0.8, 0.9)]
    summary = oversampling.summarise(results)
    assert summary["copies"]["n"] == 2
    assert summary["copies"]["acsa"] == pytest.approx([0.85, 0.1 / math.sqrt(2)])
    assert "85.0 ± 7.1" in oversampling.as_text(summary)


# ------------------------------------------------------------------ arrays
def arrays(shape=(8, 8), dtype=np.uint8, names=("a", "b", "c"), counts=(12, 6, 3)):
    """Images with the class in their brightness, and labels in a mixed order."""
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(np.arange(3), counts))
    X = rng.random((len(y), *shape)) * 0.3 + y.reshape(-1, *[1] * len(shape)) * 0.3
    X = X * 255 if np.dtype(dtype).kind in "ui" else X * 2 - 1
    return X.astype(dtype), np.array(names)[y]


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((64,), np.float64),
        ((192,), np.uint8),
        ((8, 8), np.uint8),
        ((10, 7), np.float32),
        ((1, 8, 8), np.float32),
        ((8, 9, 3), np.uint8),
        ((8, 8), np.int16),
    ],
)
def test_fit_resample_gives_back_what_it_was_given(shape, dtype):
    X, y = arrays(shape, dtype)
    given = X.copy(), y.copy()
    more, labels = oversampling.fit_resample(X, y, **SMALL)
    assert np.array_equal(X, given[0]) and np.array_equal(y, given[1])
    assert more.dtype == X.dtype and more.shape == (36, *shape) and labels.dtype == y.dtype
    assert np.array_equal(more[:21], X) and np.array_equal(labels[:21], y)
    assert [(labels == name).sum() for name in "abc"] == [12, 12, 12]
    low, high = (0, 255) if dtype == np.uint8 else (X.min(), X.max())
    assert more.min() >= low and more.max() <= high


@pytest.mark.parametrize("names", [(1, 5, 7), (2.5, 0.5, 1.5), (True, False, True), ("x", "", "é")])
def test_labels_of_any_kind(names):
    X, y = arrays(names=names)
    _, labels = oversampling.fit_resample(X, y, **SMALL)
    assert labels.dtype == y.dtype and set(labels.tolist()) == set(y.tolist())
    assert len({*np.unique(labels, return_counts=True)[1].tolist()}) == 1


def test_same_seed_same_images_and_the_callers_random_numbers_are_left_alone():
    X, y = arrays()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    one = oversampling.fit_resample(X, y, random_state=3, **SMALL)[0]
    assert torch.equal(torch.rand(3), wanted)
    assert np.array_equal(one, oversampling.fit_resample(X, y, random_state=3, **SMALL)[0])
    assert not np.array_equal(one, oversampling.fit_resample(X, y, random_state=4, **SMALL)[0])
    state = np.random.RandomState(3)
    first, second, third = (
        oversampling.fit_resample(X, y, random_state=state, **SMALL)[0]
        for state in (np.random.RandomState(3), state, state)
    )
    assert np.array_equal(first, second) and not np.array_equal(second, third)


@pytest.mark.parametrize(
    "strategy, wanted",
    [
        ("auto", [12, 12, 12]),
        ("not majority", [12, 12, 12]),
        ("all", [12, 12, 12]),
        ("minority", [12, 6, 12]),
        ("not minority", [12, 12, 3]),
        ({"c": 7}, [12, 6, 7]),
        ({"a": 14, "b": 6}, [14, 6, 3]),
        (lambda y: {"b": 8}, [12, 8, 3]),
    ],
)
def test_strategies_are_imbalanced_learns(strategy, wanted):
    y = np.repeat(["a", "b", "c"], [12, 6, 3])
    added = oversampling.to_add(y, strategy)
    assert [n + added[name] for name, n in zip("abc", (12, 6, 3))] == wanted
    theirs = pytest.importorskip("imblearn.over_sampling").RandomOverSampler
    _, labels = theirs(sampling_strategy=strategy).fit_resample(np.arange(21.0)[:, None], y)
    assert [(labels == name).sum() for name in "abc"] == wanted


def test_ratio_is_for_two_classes():
    assert oversampling.to_add(np.array([1] * 10 + [0] * 2), 0.5) == {0: 3, 1: 0}
    assert oversampling.to_add(np.array([1] * 10 + [0] * 2), 1) == {0: 8, 1: 0}
    assert oversampling.to_add(np.array([1] * 10 + [0] * 2), np.float32(0.5)) == {0: 3, 1: 0}
    for labels, ratio in (([1] * 10 + [0] * 2 + [3], 0.5), ([1] * 10 + [0] * 2, 2.0)):
        with pytest.raises(ValueError, match="of two classes, a ratio up to 1"):
            oversampling.to_add(np.array(labels), ratio)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda X, y: (X[:, None, None, None], y, {}), "it has to be"),
        (lambda X, y: (X.astype(str), y, {}), "it has to be"),
        (lambda X, y: (X[:0], y[:0], {}), "it has to be"),
        (lambda X, y: (X.reshape(len(X), -1)[:, :60], y, {}), "give shape="),
        (lambda X, y: (X, y, {"shape": (3, 3)}), "give shape="),
        (lambda X, y: (np.where(X > 9, X, np.nan), y, {}), "nan"),
        (lambda X, y: (X, y[:-1], {}), "a label for each"),
        (lambda X, y: (X, y[:, None], {}), "a label for each"),
        (lambda X, y: (X, y, {"widht": 3}), "widht"),
        (lambda X, y: (X[y == "a"], y[y == "a"], {"sampling_strategy": {"a": 99}}), "one class"),
        (lambda X, y: (X[y == "a"], y[y == "a"], {}), "one class"),
        (lambda X, y: (X, y, {"seed": 3}), "seed: the settings are"),  # random_state
        (lambda X, y: (X, y, {"seeds": 3}), "seeds: the settings are"),
        (lambda X, y: (X, y, {"mixer": "netwrok"}), "--mixer: invalid choice: 'netwrok'"),
        (lambda X, y: (X, y, {"epochs": 0}), "--epochs"),
        (lambda X, y: (X, y, {"lr": "x"}), "--lr"),
        (lambda X, y: (X, y, {"batch_size": 30}), "--batch-size 30: of 21 images"),
        (lambda X, y: (X, y, {"lr": 1e9, "lr_d": 1e9, "max_steps": 5}), "nan after training"),
        (lambda X, y: (X, y, {"sampling_strategy": {"d": 9}}), "9 of 'd', there are 0"),
        (lambda X, y: (X, y, {"sampling_strategy": {"a": 9}}), "9 of 'a', there are 12"),
        (lambda X, y: (X, y, {"sampling_strategy": "most"}), "sampling_strategy 'most'"),
        (lambda X, y: (X, y, {"t": 4}), "class c has 3 image"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, message):
    X, y, flags = change(*arrays())
    with pytest.raises(ValueError, match=message):
        oversampling.fit_resample(X, y, **SMALL | flags)


def test_epochs_and_updates_of_fit_are_those_of_a_run():
    X, y = arrays()
    settings = SMALL | {"batch_size": 10}
    for flags, updates in (({"epochs": 2}, 2), ({"epochs": 1, "max_steps": 5}, 2), ({}, 2)):
        model = oversampling.fit(X, y, **settings | flags)
        assert model.updates == updates, flags


def test_labels_that_are_numbers_are_found_by_value():
    X, y = arrays(names=(1.0, 2.0, 3.0))
    model = oversampling.fit(X, y, **SMALL)
    for label in (1.0, 2, np.float64(3)):
        found = oversampling.as_labels(model, 4, label)
        assert found.tolist() == [model.classes.index(label)] * 4


def test_integers_of_any_kind_are_grey_values_to_a_model_of_a_checkpoint():
    X, y = arrays()
    model = oversampling.fit(X, y, **SMALL)
    model.form = None  # as a checkpoint has it
    seen = []
    model.forward = lambda x: seen.append(x) or torch.zeros(len(x), 3)
    for dtype in (np.uint8, np.int64, np.int16):
        oversampling.predict(model, X.astype(dtype))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert len(seen[0].unique()) > 50


def test_batch_of_one_is_refused():
    X, y = arrays()
    with pytest.raises(ValueError, match="batch norm needs 2"):
        oversampling.fit(X, y, **SMALL | {"batch_size": 1})


def test_class_of_one_image_is_refused_by_name():
    X, y = arrays(counts=(9, 5, 1))
    with pytest.raises(ValueError, match=r"class c has 1 image.*more images, or leave it out"):
        oversampling.fit_resample(X, y, **SMALL)


def test_balanced_set_comes_back_as_a_copy():
    X, y = arrays(counts=(4, 4, 4))
    more, labels = oversampling.fit_resample(X, y)
    assert np.array_equal(more, X) and np.array_equal(labels, y) and more is not X


def test_predict_gives_the_labels_that_were_learned():
    X, y = arrays((8, 8), np.float32, counts=(40, 20, 10))
    settings = {"width": 4, "latent": 8, "n_critic": 1, "max_steps": 60, "dropout": 0.0}
    model = oversampling.fit(X, y, **settings)
    found = oversampling.predict(model, X)
    assert found.dtype == y.dtype and (found == y).mean() > 0.95
    assert oversampling.predict(model, X[:1]).tolist() == [found[0]]
    assert (oversampling.predict(model, X.reshape(len(X), 64)) == found).all()
    for wrong in ((X * 255).astype(np.uint8), X[:, ::2], X[:, None], X.reshape(-1, 4, 16)):
        with pytest.raises(ValueError, match=r"fit had floats, \(8, 8\)"):
            oversampling.predict(model, wrong)
    bright = [oversampling.sample(model, 20, c).mean() for c in "abc"]
    assert bright[0] < bright[1] < bright[2]  # as the classes are
    images = oversampling.sample(model, 5, "b")
    assert images.shape == (5, 1, 8, 8) and 0 <= images.min() <= images.max() <= 1
    assert torch.equal(images, oversampling.sample(model, 5, "b"))
    assert not torch.equal(images, oversampling.sample(model, 5, "b", seed=1))
    assert torch.equal(images, oversampling.sample(model, 5, torch.ones(5, dtype=torch.int64)))


def test_in_a_pipeline_of_imbalanced_learn():
    imblearn = pytest.importorskip("imblearn")
    pipeline = pytest.importorskip("imblearn.pipeline")
    linear = pytest.importorskip("sklearn.linear_model")
    X, y = arrays((64,), np.float64)
    sampler = imblearn.FunctionSampler(func=oversampling.fit_resample, kw_args=SMALL)
    steps = pipeline.make_pipeline(sampler, linear.LogisticRegression(max_iter=1000))
    assert steps.fit(X, y).score(X, y) > 0.9
    images, labels = arrays((1, 8, 8))
    sampler = imblearn.FunctionSampler(
        func=oversampling.fit_resample, kw_args=SMALL, validate=False
    )
    assert sampler.fit_resample(images, labels)[0].shape == (36, 1, 8, 8)


# ------------------------------------------------------------------ runs
@pytest.fixture
def small(monkeypatch):
    shrink(oversampling, monkeypatch.setattr)


def test_run_leaves_the_table_and_the_pictures(small, capsys):
    rows = ["nothing", "smote", "full", "filled"]
    oversampling.main([*FLAGS, "--seeds", "2", "--rows", *rows])
    summary = json.loads(Path("run/summary.json").read_text())
    assert list(summary["table"]) == rows and summary["table"]["full"]["n"] == 2
    with open("run/table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["row"], row["seed"]) for row in table] == [(r, s) for s in "01" for r in rows]
    full = table[2]
    assert float(full["acsa"]) == summary["acsa"]  # of the run itself
    assert float(full["acsa"]) == pytest.approx(
        np.mean([float(full[f"recall {c}"]) for c in range(10)])
    )
    assert table[6] != full | {"seed": "1"} and "three rarest" in capsys.readouterr().out
    assert summary["counts"] == [140, 95, 65, 45, 30, 20, 14, 10, 7, 5]
    for name in ("curves", "classes", "nearest", "latents", "samples/0000002"):
        assert np.asarray(Image.open(f"run/{name}.png")).std() > 1


def test_updates_without_the_plumbing_are_those_of_a_run(monkeypatch):
    """So the second seed of a table is the run of that seed."""
    without_figures(oversampling, monkeypatch.setattr)
    oversampling.main([*FLAGS, "--seed", "1"])
    args = Namespace(**checkpoint("run")["config"])
    data = oversampling.load_data(args, "cpu")
    torch.manual_seed(1)
    model = oversampling.Model(args, data)
    oversampling.train_whole(model, 2)
    assert same(dict(model.state_dict()), dict(checkpoint("run")["model"]))


def test_classifier_and_images_of_a_checkpoint(monkeypatch):
    without_figures(oversampling, monkeypatch.setattr)
    oversampling.main(FLAGS)
    model = oversampling.load_generator("run/checkpoint.pt")
    kept = checkpoint("run")["model"]
    assert torch.equal(model.images, kept["generator.images"]) and len(model.images) == 431
    x = model.images[::40]
    found = oversampling.predict(model, x.numpy())
    assert found.tolist() == oversampling.predict(model, x.numpy() / 255).tolist()
    with torch.no_grad():
        logits = model(x / 255)
    assert found.tolist() == [model.classes[c] for c in logits.argmax(dim=1)]
    oversampling.main(["--generate", "run/checkpoint.pt", "--label", "9", "3", "--out", "a.png"])
    assert Image.open("a.png").size == (302, 62)


def test_own_pictures_come_back_balanced(small, capsys):
    write_images("pictures", 12)
    for i in (1, 3):
        Path(f"pictures/dog/{i}.png").unlink()
    flags = ["--dataset", "folder", "--data-dir", "pictures", *FLAGS[2:], "--rows", "copies"]
    oversampling.main([*flags, "--balance", "balanced"])
    names = {c: sorted(path.name for path in Path("balanced", c).iterdir()) for c in ("cat", "dog")}
    assert [name[:8] for name in names["cat"]] == ["original"] * 5  # one of six is held out
    assert [name[:8] for name in names["dog"]] == ["generate"] * 2 + ["original"] * 3
    model = oversampling.load_generator("run/checkpoint.pt")
    picture = np.asarray(Image.open(Path("balanced/cat", names["cat"][2])))
    assert np.array_equal(np.moveaxis(picture, 2, 0), model.images[2].numpy())
    assert Image.open(Path("balanced/dog", names["dog"][0])).size == (32, 32)
    made = ["--generate", "run/checkpoint.pt", "--balance"]
    oversampling.main([*made, "more/of them", "--target", "7"])
    assert [len([*Path("more/of them", c).iterdir()]) for c in ("cat", "dog")] == [7, 7]
    assert "is there already" in refused_by(oversampling, capsys, *made, "balanced")
    Image.new("L", (8, 8), 9).save("pictures/stray.png")
    assert "pictures in ['']" in refused_by(oversampling, capsys, *flags)
    Path("pictures/stray.png").unlink()
    flags += ["--balance"]
    assert "is there already" in refused_by(oversampling, capsys, *flags, "balanced")
    assert "is among the pictures" in refused_by(oversampling, capsys, *flags, "pictures/more")


def test_balanced_set_that_can_not_be_written_costs_no_run(small, capsys):
    Path("file").write_text("no folder")
    oversampling.main([*FLAGS, "--rows", "copies", "--balance", "file/balanced"])
    assert Path("run/table.csv").exists() and Path("run/summary.json").exists()
    assert "--generate run/checkpoint.pt --balance ANOTHER" in capsys.readouterr().out


def test_run_of_so_many_updates_is_extended_by_more(small):
    oversampling.main([*FLAGS, "--rows", "copies"])
    oversampling.main(["--resume", "run/checkpoint.pt", "--max-steps", "5"])
    assert json.loads(Path("run/summary.json").read_text())["step"] == 5


def test_mistakes(capsys):
    assert "--target goes with" in refused_by(oversampling, capsys, *FLAGS, "--target", "7")
    made = ["--generate", "run/checkpoint.pt", "--target", "7"]
    assert "--target goes with" in refused_by(oversampling, capsys, *made)
    made += ["--balance", "new", "--label", "9"]
    assert "--label without it" in refused_by(oversampling, capsys, *made)
    refused = [*FLAGS, "--counts"]
    assert "have [142" in refused_by(oversampling, capsys, *refused, "5", "5")
    assert "have [142" in refused_by(oversampling, capsys, *refused, *["5"] * 9, "9999")
    few = refused_by(oversampling, capsys, *refused, *["5"] * 9, "1")
    assert "class 9 has 1 image" in few and "leave it out" in few
    assert "class 9 has 5 image" in refused_by(oversampling, capsys, *FLAGS, "--t", "6")
    assert "goes with --generate" in refused_by(oversampling, capsys, *FLAGS, "--label", "3")
    assert "--rows" in refused_by(oversampling, capsys, *FLAGS, "--rows", "most")
    write_images("pictures/cat", 10)
    write_images("one", 10)
    for path in Path("one/dog").iterdir():
        path.unlink()
    folder = ["--dataset", "folder", "--data-dir"]
    assert "one class" in refused_by(oversampling, capsys, *folder, "one", "--out", "run")
