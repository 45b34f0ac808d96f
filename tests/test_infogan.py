"""The method of infogan.py: networks, losses, one training step, sampling, measurements."""

import argparse
import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_gradients
from PIL import Image

import infogan


def model_and_data(*flags, images=64):
    args = infogan.arguments().parse_args(["--batch-size", "16", *flags])
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(1)
    train = torch.randint(256, (images, 1, 28, 28), dtype=torch.uint8, generator=rng)
    labels = torch.arange(images) % 10
    classes = [str(digit) for digit in range(10)]
    data = infogan.Data("made", classes, train, labels, train[:20], labels[:20])
    return infogan.Model(args, data), data


def step(model, data):
    """One update on the first batch."""
    return infogan.train_step(model, *model.batch(data, torch.arange(16)))


def parameters(network):
    return sum(p.numel() for p in network.parameters())


# ------------------------------------------------------------------ networks
def test_mnist_networks_have_the_sizes_of_table_1():
    g, d = infogan.Generator(), infogan.Discriminator()
    assert parameters(g) == (
        74 * 1024 + 2 * 1024 + 1024 * 6272 + 2 * 6272 + 16 * 128 * 64 + 2 * 64 + 16 * 64 + 1
    )
    trunk = 16 * 64 + 64 + 16 * 64 * 128 + 2 * 128 + 6272 * 1024 + 2 * 1024
    head = 1024 * 128 + 2 * 128 + 128 * 14 + 14
    assert parameters(d) == trunk + 1024 + 1 + head  # the norms have the others' biases
    images = g(*g.draw(3))
    assert images.shape == (3, 1, 28, 28)
    score, q = d(images)
    assert score.shape == (3,) and q.shape == (3, 14)


def test_svhn_networks_have_the_sizes_of_table_2():
    g = infogan.Generator((10, 10, 10, 10), 4, 124, channels=3)
    d = infogan.Discriminator((10, 10, 10, 10), 4, channels=3)
    images = g(*g.draw(2))
    assert images.shape == (2, 3, 32, 32)
    score, q = d(images)
    assert score.shape == (2,) and q.shape == (2, 48)
    widths = [m.out_channels for m in g.modules() if isinstance(m, torch.nn.ConvTranspose2d)]
    assert widths == [256, 128, 64, 3]
    assert [m.out_channels for m in d.trunk if isinstance(m, torch.nn.Conv2d)] == [64, 128, 256]
    norms = [m.num_features for m in d.trunk if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms == [128, 256]  # none after the first convolution
    assert d.score.in_features == 256 * 4 * 4


def test_unit_variance_has_no_outputs_for_variances():
    images = torch.zeros(2, 1, 28, 28)
    assert infogan.Discriminator((3,), 2, unit_variance=True)(images)[1].shape == (2, 5)


def test_each_batch_is_normalised_by_itself():
    """A call of D keeps nothing of the calls before it, and none of an evaluation differs."""
    torch.manual_seed(0)
    d = infogan.Discriminator()
    a, b = torch.randn(8, 1, 28, 28), 3 * torch.randn(6, 1, 28, 28) + 1
    score, q = d(a)
    d(b)
    assert all(map(torch.equal, d(a), (score, q)))
    assert all(map(torch.equal, d.eval()(a), (score, q)))
    assert not torch.allclose(d(torch.cat([a, b]))[0][:8], score, atol=1e-2)


def test_initial_weights():
    d = infogan.Discriminator()
    conv = d.trunk[2].weight
    assert conv.abs().max() <= 0.04 and 0.015 < conv.std() < 0.02
    assert all((m.bias == 0).all() for m in d.modules() if getattr(m, "bias", None) is not None)


# ------------------------------------------------------------------ latent codes and losses
def test_draws_follow_the_prior():
    generator = infogan.Generator((3, 7), 2, noise=4)
    noise, category, code = generator.draw(20000, torch.Generator().manual_seed(0))
    assert noise.shape == (20000, 4) and abs(noise.std() - 1) < 0.02
    for i, k in enumerate((3, 7)):
        share = torch.bincount(category[:, i], minlength=k) / 20000
        assert len(share) == k and (share - 1 / k).abs().max() < 0.02
    assert code.min() >= -1 and code.max() <= 1 and abs(code.std() - 3**-0.5) < 0.02
    assert generator.entropy() == (math.log(3) + math.log(7), 2 * math.log(2))


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("sizes, n", [((10,), 2), ((3, 5), 1), ((), 2), ((4,), 0)])
def test_info_loss_reference_against_distributions(sizes, n, unit):
    torch.manual_seed(0)
    batch = 9
    logits = [torch.randn(batch, k) for k in sizes]
    mean, log_var = torch.randn(batch, n), torch.randn(batch, n)
    category = torch.stack([torch.randint(k, (batch,)) for k in sizes], 1) if sizes else None
    category = torch.empty(batch, 0, dtype=torch.int64) if category is None else category
    code = torch.rand(batch, n) * 2 - 1
    q = torch.cat([*logits, mean, *([] if unit else [log_var])], 1)
    got = infogan.info_loss_reference(q, category, code, sizes)
    categorical = sum(
        (-torch.distributions.Categorical(logits=part).log_prob(category[:, i]).mean()
         for i, part in enumerate(logits)), torch.zeros(())
    )  # fmt: skip
    deviation = torch.ones_like(mean) if unit else (0.5 * log_var).exp()
    normal = torch.distributions.Normal(mean, deviation)
    continuous = -normal.log_prob(code).sum(1).mean()
    assert torch.allclose(got[0], categorical) and torch.allclose(got[1], continuous)


def test_mutual_information_reaches_its_ceiling_and_its_floor():
    sizes, category = (10, 4), torch.stack([torch.arange(40) % 10, torch.arange(40) % 4], 1)
    code = torch.zeros(40, 0)
    perfect = torch.cat([F.one_hot(category[:, i], k) for i, k in enumerate(sizes)], 1) * 100.0
    entropy, _ = infogan.Generator(sizes, 0).entropy()
    nll, _ = infogan.info_loss_reference(perfect, category, code, sizes)
    assert math.isclose(entropy - nll.item(), math.log(40), abs_tol=1e-6)
    nll, _ = infogan.info_loss_reference(torch.zeros(40, 14), category, code, sizes)
    assert math.isclose(entropy - nll.item(), 0, abs_tol=1e-6)


def test_unit_variance_costs_half_log_two_pi():
    code = torch.rand(7, 3)
    empty = torch.empty(7, 0, dtype=torch.int64)
    _, nll = infogan.info_loss_reference(code.clone(), empty, code, ())
    assert math.isclose(nll.item(), 1.5 * math.log(2 * math.pi), rel_tol=1e-6)


# ------------------------------------------------------------------ the training step
def snapshot(network):
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def moved(network, before):
    return {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}


def test_step_trains_every_weight_of_both_networks():
    model, data = model_and_data()
    before_g, before_d = snapshot(model.generator), snapshot(model.discriminator)
    losses = step(model, data)
    assert [*losses] == ["loss_d", "loss_g", "mi_categorical", "mi_continuous"]
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    assert moved(model.generator, before_g) == set(before_g)
    assert moved(model.discriminator, before_d) == set(before_d)


def test_generator_update_leaves_no_gradient_in_the_discriminator():
    """What D's weights hold after the whole step is what D's own update used."""
    model, data = model_and_data()
    discriminator, used = model.discriminator, {}
    model.optimizer_d.register_step_pre_hook(
        lambda *_: used.update({k: p.grad.clone() for k, p in discriminator.named_parameters()})
    )
    step(model, data)
    assert used.keys() == dict(discriminator.named_parameters()).keys()
    for name, p in discriminator.named_parameters():
        assert torch.equal(p.grad, used[name])


def test_lambda_reaches_both_updates():
    """Without D's score, only L_I moves the weights: both the trunk and the generator must move."""
    model, data = model_and_data()
    with torch.no_grad():
        model.discriminator.score.weight.zero_()
    model.discriminator.score.requires_grad_(False)
    before_g, before_d = snapshot(model.generator), snapshot(model.discriminator)
    step(model, data)
    assert "trunk.0.weight" in moved(model.discriminator, before_d)
    assert "layers.0.weight" in moved(model.generator, before_g)


def test_baseline_q_only_watches():
    """With D's score cut off, a baseline's trunk and generator get no gradient, its Q does."""
    model, data = model_and_data("--baseline")
    with torch.no_grad():
        model.discriminator.score.weight.zero_()
    model.discriminator.score.requires_grad_(False)
    before_g, before_d = snapshot(model.generator), snapshot(model.discriminator)
    step(model, data)
    changed = moved(model.discriminator, before_d)
    assert "q.0.weight" in changed and "trunk.0.weight" not in changed
    assert not moved(model.generator, before_g)


def test_step_is_the_same_with_fused_kernels():
    """The default picks up gan_kernels by itself; losses and gradients agree."""
    results = []
    for choice in ("auto", "reference"):
        model, data = model_and_data("--kernels", choice, "--lr-d", "0", "--lr-g", "0")
        losses = step(model, data)
        results.append((model, torch.stack([*losses.values()])))
    (fused, a), (reference, b) = results
    assert fused.kernels == "fused" and reference.kernels == "reference"
    assert torch.allclose(a, b, atol=1e-5)
    for network in ("generator", "discriminator"):
        f, r = (
            torch.cat([p.grad.flatten() for p in getattr(model, network).parameters()])
            for model in (fused, reference)
        )
        assert (f - r).norm() <= 1e-4 * r.norm()


def test_losses_are_those_of_the_paper():
    """At chance D's loss is 2 log 2 and G's log 2; L_I of an uninformed Q is H(c) - log 10 = 0."""
    model, data = model_and_data("--lr-d", "0", "--lr-g", "0")
    with torch.no_grad():
        for layer in (model.discriminator.score, model.discriminator.q[-1]):
            layer.weight.zero_()
    losses = step(model, data)
    assert math.isclose(losses["loss_d"].item(), 2 * math.log(2), rel_tol=1e-5)
    assert math.isclose(losses["loss_g"].item(), math.log(2), rel_tol=1e-5)
    assert math.isclose(losses["mi_categorical"].item(), 0, abs_tol=1e-5)


@pytest.mark.parametrize("flags", [[], ["--baseline"]])
def test_gradients_are_those_of_equation_6(flags, monkeypatch):
    """Of D's loss and of G's, with lambdas of their own, on images that are all moved."""
    lambdas = ["--lambda-categorical", "0.7", "--lambda-continuous", "0.2"]
    rates = ["--lr-d", "0", "--lr-g", "0"]
    model, data = model_and_data(*lambdas, *rates, *flags, "--kernels", "reference")
    (real,), calls = model.batch(data, torch.arange(16)), []
    monkeypatch.setattr(infogan, "augment", lambda x, *by: calls.append((len(x), by)) or x)
    G, D, bce = model.generator, model.discriminator, F.binary_cross_entropy_with_logits
    torch.manual_seed(3)
    latent = G.draw(16)
    fake, one = G(*latent), torch.ones(16)

    def weighted(q):
        categorical, continuous = infogan.info_loss_reference(q, *latent[1:], G.categorical)
        return 0.7 * categorical + 0.2 * continuous

    (score_real, _), (score_fake, q) = D(real), D(fake.detach())
    of_d = bce(score_real, one) + bce(score_fake, 0 * one) + weighted(q)
    score, q = D(fake)
    of_g = bce(score, one) + (0 if flags else weighted(q))
    torch.manual_seed(3)
    losses = (of_d, D), (of_g, G)
    assert_gradients(losses, lambda: infogan.train_step(model, real), atol=1e-5)
    assert calls == [(16, (2.0, 9.0))] * 3


def test_augmentation_moves_real_and_generated_images_alike():
    torch.manual_seed(0)
    image = torch.zeros(200, 1, 28, 28)
    image[:, :, 13:15, 13:15] = 1
    image.requires_grad_()
    out = infogan.augment(image * 2 - 1) / 2 + 0.5
    mass = out.sum(dim=(1, 2, 3))
    assert (mass - 4).abs().max() < 0.5  # nothing is lost
    at = torch.arange(28.0) - 13.5
    x = (out.sum(dim=(1, 2)) @ at) / mass
    assert x.abs().max() < 2.2 and x.abs().max() > 1.5 and abs(x.mean()) < 0.3
    out.sum().backward()
    assert image.grad.abs().sum() > 0
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):  # coordinates keep their digits there too
        assert torch.equal(infogan.augment(image * 2 - 1) / 2 + 0.5, out)
    assert infogan.augment(image, shift=0, rotate=0) is image


@pytest.mark.parametrize("shift, rotate", [(2, 0), (0, 9)])
def test_augmentation_shifts_either_way_and_turns(shift, rotate):
    """A bar, upright and off the centre: where its middle goes, and how far it leans."""
    torch.manual_seed(0)
    image = torch.zeros(300, 1, 28, 28)
    image[:, :, 6:22, 13:15] = 1
    out = infogan.augment(image, shift, rotate)
    at, mass = torch.arange(28.0) - 13.5, out.sum(dim=(1, 2, 3))
    moved = [out.sum(dim=(1, dim)) @ at / mass for dim in (2, 3)]
    slant = infogan.digit_shape(out)["slant"]
    for centre in moved:
        assert (1.7 < centre.max() < 2.1) == (-2.1 < centre.min() < -1.7) == (shift > 0)
    steepest = math.tan(math.radians(9)) if rotate else 0
    assert abs(slant.max() - steepest) < 0.02 and abs(slant.min() + steepest) < 0.02


def test_accuracy_is_measured_in_batches_of_all_classes():
    """Batch norm by images of one class alone, as they lie in a folder, would be another's."""
    data = infogan.load_data(infogan.arguments().parse_args(["--dataset", "digits"]), "cpu")
    order = data.test_labels.argsort(stable=True).repeat_interleave(5)
    data, seen = data._replace(test=data.test[order], test_labels=data.test_labels[order]), []

    def discriminator(x):
        seen.append(x)
        return None, torch.zeros(len(x), 10)

    generator = argparse.Namespace(categorical=[10])
    model = argparse.Namespace(generator=generator, discriminator=discriminator)
    shares = data.test_labels.bincount() / len(data.test)  # all images are found to be of one
    assert infogan.evaluate(model, data)["accuracy"] == pytest.approx(shares.max().item())
    assert len(seen) == 3 and sum(map(len, seen)) == len(data.test)
    for x in seen:
        assert torch.equal(x.unique(dim=0), infogan.normalise(data.test).unique(dim=0))


def test_images_are_scaled_to_the_range_of_tanh():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert infogan.normalise(images).flatten().tolist() == [-1, 1]


# ------------------------------------------------------------------ sampling and measurements
def test_sample_obeys_the_codes_asked_for():
    torch.manual_seed(0)
    generator = infogan.Generator(noise=5).eval()
    images = infogan.sample(generator, 4, category=[3], code=[0.5, -1])
    noise, _, _ = generator.draw(4, torch.Generator().manual_seed(0))
    want = generator(noise, torch.full((4, 1), 3), torch.tensor([[0.5, -1.0]] * 4))
    assert torch.allclose(images, want / 2 + 0.5)
    assert images.min() >= 0 and images.max() <= 1
    assert not torch.equal(
        images, infogan.sample(generator, 4, category=[3], code=[0.5, -1], seed=1)
    )
    for category in ([-1], [10], [1, 2]):
        with pytest.raises(ValueError, match="sizes"):
            infogan.sample(generator, 4, category=category)
    with pytest.raises(ValueError, match="2 continuous"):
        infogan.sample(generator, 4, code=[1.0])


def test_sampling_leaves_the_training_draws_alone():
    model, data = model_and_data()
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    infogan.evaluate(model, data)
    infogan.sample(model.generator, 2)
    assert torch.equal(torch.rand(3), want)


def test_sweep_changes_one_code_only():
    generator = infogan.Generator((4,), noise=5).eval()
    seen = []
    generator.forward = lambda *latent: (
        seen.append([t.clone() for t in latent]) or torch.zeros(6, 1, 28, 28)
    )
    images = infogan.sweep(generator, "continuous", 1, [-2.0, 2.0], rows=6)
    assert images.shape == (6, 2, 1, 28, 28)
    (noise_a, category_a, code_a), (noise_b, category_b, code_b) = seen
    assert torch.equal(noise_a, noise_b) and torch.equal(category_a, category_b)
    assert category_a[:, 0].tolist() == [0, 1, 2, 3, 0, 1]
    assert torch.equal(code_a[:, 0], code_b[:, 0])
    assert (code_a[:, 1] == -2).all() and (code_b[:, 1] == 2).all()


def test_matched_accuracy_finds_the_best_matching():
    label = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])
    category = torch.tensor([2, 2, 0, 0, 1, 1, 1, 0])
    assert infogan.matched_accuracy(category, label, 3) == 7 / 8
    assert infogan.matched_accuracy(torch.zeros(8, dtype=torch.int64), label, 3) == 4 / 8


def bar(slant=0.0, width=4.0, height=16.0, size=28):
    """A soft-edged bar, sheared by `slant` (x per y)."""
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    x = at[None, :] - slant * at[:, None]
    inside = ((width / 2 - x.abs()) + 0.5).clamp(0, 1)
    return (inside * ((height / 2 - at.abs()) + 0.5).clamp(0, 1)[:, None])[None, None]


def test_digit_shape_against_bars_of_known_form():
    shape = infogan.digit_shape(torch.cat([bar(), bar(slant=0.4), bar(slant=-0.4), bar(width=8)]))
    slant, width, thickness = (shape[name] for name in ("slant", "width", "thickness"))
    assert torch.allclose(slant, torch.tensor([0, 0.4, -0.4, 0], dtype=torch.float64), atol=0.02)
    # the standard deviation of a uniform bar is its width over root 12, whatever its slant
    want = torch.tensor([4, 4, 4, 8], dtype=torch.float64) / 12**0.5
    assert torch.allclose(width, want, rtol=0.05)
    assert thickness[3] > thickness[0]


def test_thickness_is_that_of_the_stroke_whatever_the_size_or_slant():
    """A ring: twice the stroke is twice the thickness, a larger ring has the same."""

    def ring(radius, stroke, lean=0.0):
        at = torch.arange(28, dtype=torch.float64) - 13.5
        distance = ((at[None] - lean * at[:, None]) ** 2 + at[:, None] ** 2).sqrt()
        return (stroke / 2 - (distance - radius).abs() + 0.5).clamp(0, 1)[None, None]

    rings = torch.cat([ring(8, 2), ring(8, 4), ring(10, 2), ring(8, 2, 0.3)])
    thin, thick, large, leaning = infogan.digit_shape(rings)["thickness"]
    assert abs(thick / thin - 2) < 0.1
    assert abs(large / thin - 1) < 0.05 and abs(leaning / thin - 1) < 0.1


def test_mean_rho_is_spearmans():
    values = torch.tensor([[1.0, 2, 4, 3, 9], [5, 4, 3, 2, 1], [2, 2, 2, 2, 2]])
    want = (0.9 - 1 + 0) / 3  # 1 - 6 sum d^2 / (n (n^2 - 1)); a constant row counts as 0
    assert math.isclose(infogan.mean_rho(values), want, abs_tol=1e-9)


def test_code_effects_recognise_a_code_that_slants():
    class Bars(infogan.Generator):
        def forward(self, noise, category, code):
            bars = [bar(slant=0.2 * s, width=4 - w) for s, w in code.double().tolist()]
            return torch.cat(bars).float() * 2 - 1

    slanting, narrowing = infogan.code_effects(Bars(noise=3), rows=3, points=7)
    assert slanting["slant"] > 0.99 and abs(slanting["width"]) < 0.7
    assert narrowing["width"] < -0.99


@pytest.mark.parametrize("sizes", [[5], []])
def test_there_is_no_accuracy_where_categories_can_not_match(sizes):
    flags = ["--categorical", *map(str, sizes)]
    model, data = model_and_data(*flags)
    assert infogan.evaluate(model, data) == {}


def test_information_is_that_of_an_uninformed_q_and_has_its_ceiling():
    model, _ = model_and_data("--unit-variance", "--categorical", "10", "3")
    with torch.no_grad():
        model.discriminator.q[-1].weight.zero_()
    figures = infogan.information(model)
    assert math.isclose(figures["mi_categorical_max"], math.log(30))
    assert math.isclose(figures["mi_categorical"], 0, abs_tol=1e-5)
    # of uniform codes under a standard normal: 2 log 2 - log 2 pi - E[code^2]
    want = 2 * math.log(2) - math.log(2 * math.pi) - 1 / 3
    assert math.isclose(figures["mi_continuous"], want, abs_tol=0.02)


def test_discriminator_is_measured_as_in_training_and_measuring_changes_nothing():
    model, data = model_and_data()
    for _ in range(3):
        step(model, data)
    g, d = model.eval().generator, model.discriminator
    before = {name: value.clone() for name, value in d.state_dict().items()}
    with torch.no_grad():
        images = g(*g.draw(32))
        assert all(map(torch.equal, d.train()(images), d.eval()(images)))
    infogan.evaluate(model, data)
    assert all(torch.equal(value, before[name]) for name, value in d.state_dict().items())


@pytest.mark.parametrize("n", [1, 2, 501, 1001])
def test_accuracy_of_a_test_set_of_any_size(n):
    model, data = model_and_data("--categorical", "10")
    images, labels = torch.zeros(n, 1, 28, 28, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)
    figures = infogan.evaluate(model, data._replace(test=images, test_labels=labels))
    assert figures == {} if n == 1 else 0 <= figures["accuracy"] <= 1


# ------------------------------------------------------------------ arguments and figures
def suited(n, *flags):
    args = infogan.arguments().parse_args(flags)
    infogan.suit(args, model_and_data(images=n)[1])
    return args.epochs, args.batch_size


def test_flags_left_out_suit_the_data():
    assert suited(10_000) == (50, 128) and suited(9_999) == (50, 32) and suited(18) == (50, 18)
    assert suited(64, "--epochs", "3", "--batch-size", "7") == (3, 7)


def test_figures_of_codes_and_curves(tmp_path):
    generator = infogan.Generator((3,), 1, noise=2).eval()
    effects = [{"slant": 0.95, "width": 0.1, "thickness": -0.2}]
    infogan.save_codes(generator, tmp_path / "codes.png", effects)
    names = ("mi_categorical", "loss_d", "loss_g")
    rows = [{"step": i} | dict.fromkeys(names, i / 9) for i in (1, 5, 9)]
    infogan.save_curves(generator, tmp_path / "curves.png", rows)
    for name in ("codes.png", "curves.png"):
        with Image.open(tmp_path / name) as image:
            assert np.asarray(image.convert("L")).std() > 1  # not blank


def test_import_leaves_no_trace(tmp_path, monkeypatch):
    """A second import of the file writes nothing and draws nothing."""
    monkeypatch.chdir(tmp_path)
    draws = torch.get_rng_state()
    spec = importlib.util.spec_from_file_location("infogan_again", infogan.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "infogan_again", module)
    spec.loader.exec_module(module)
    assert isinstance(module.arguments(), argparse.ArgumentParser)
    assert torch.equal(torch.get_rng_state(), draws) and not list(tmp_path.iterdir())
