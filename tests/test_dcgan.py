"""dcgan.py: networks, the features and their SVM, the other measures, what is its own in runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    assert_conditional_gradients,
    refused_by,
    rows,
    same,
    weights,
    without_figures,
    write_images,
    write_mnist,
)
from PIL import Image
from sklearn.svm import LinearSVC
from torch import nn

import dcgan

CLASSES = [str(digit) for digit in range(10)]
QUICK = ["--dataset", "digits", "--width", "4", "--max-steps", "3", "--out", "run"]


def networks(shape=(1, 28, 28), width=8, classes=()):
    torch.manual_seed(0)
    return dcgan.Generator(shape, width, classes), dcgan.Discriminator(shape, width, classes)


def made_data(n=240, size=28):
    """Noise in which the class is a bright row, so that it can be told."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(120, (n, 1, size, size), dtype=torch.uint8, generator=rng)
    labels = torch.arange(n) % 10
    images[torch.arange(n), :, labels * 2 + 3] += 130
    return dcgan.Data("made", CLASSES, images[40:], labels[40:], images[:40], labels[:40])


def model_of(data, *flags):
    args = dcgan.arguments().parse_args(["--width", "4", *flags])
    dcgan.suit(args, data)
    torch.manual_seed(args.seed)
    return dcgan.Model(args, data).eval()


def summary_of(folder):
    return json.loads(Path(folder, "summary.json").read_text())


# ------------------------------------------------------------------ networks
def test_generator_has_the_maps_of_figure_1():
    g, d = networks((3, 64, 64), 128)
    weights = [p.shape for p in g.parameters() if p.ndim > 1]
    assert weights == [
        (1024 * 4 * 4, 100), (1024, 512, 5, 5), (512, 256, 5, 5), (256, 128, 5, 5), (128, 3, 5, 5)
    ]  # fmt: skip
    weights = [p.shape for p in d.parameters() if p.ndim > 1]
    assert weights == [
        (128, 3, 5, 5), (256, 128, 5, 5), (512, 256, 5, 5), (1024, 512, 5, 5), (1, 1024 * 4 * 4)
    ]  # fmt: skip


def test_networks_with_classes_are_those_of_the_code_for_mnist():
    g, d = networks((1, 28, 28), 64, CLASSES)
    assert [p.shape for p in g.parameters()] == [
        (1024, 100 + 10), (128 * 7 * 7, 1024 + 10), (128 + 10, 64, 5, 5), (64 + 10, 1, 5, 5)
    ]  # fmt: skip
    assert [p.shape for p in d.parameters()] == [
        (64, 1 + 10, 5, 5), (128, 64 + 10, 5, 5), (1024, 128 * 7 * 7 + 10), (1, 1024 + 10), (1,)
    ]  # fmt: skip
    kinds = [type(module) for layer in (g.layers[0], d.hidden) for module in layer]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.LeakyReLU]


@pytest.mark.parametrize("label", [False, True], ids=["plain", "label"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64), (4, 48, 48), (2, 20, 20)])
def test_sizes_and_channels(shape, label):
    g, d = networks(shape, 4, "abc" if label else ())
    images = g(g.draw(5), torch.tensor([0, 1, 2, 0, 1]))
    assert images.shape == (5, *shape) and images.abs().max() <= 1
    assert d(images, torch.tensor([0, 1, 2, 0, 1])).shape == (5,)


def test_guidelines_of_section_3():
    g, d = networks((3, 32, 32))
    kinds = [[type(module) for module in layer] for layer in g.layers]
    inner = [nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU]
    assert kinds == [
        [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Unflatten],
        inner, inner, [nn.ConvTranspose2d, nn.Tanh],
    ]  # fmt: skip
    kinds = [[type(module) for module in layer] for layer in d.layers]
    inner = [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]
    assert kinds == [[nn.Conv2d, nn.LeakyReLU], inner, inner]
    assert all(layer[-1].negative_slope == 0.2 for layer in d.layers)


def test_initial_weights_and_noise():
    g, d = networks((3, 64, 64), 64)
    for network in (g, d):
        for name, p in network.named_parameters():
            if p.ndim > 1:
                assert abs(p.std() - 0.02) < 0.002 and abs(p.mean()) < 0.002, name
    gain = g.layers[0][1].weight
    assert abs(gain.mean() - 1) < 0.002 and abs(gain.std() - 0.02) < 0.002
    noise = g.draw(1000)
    assert noise.min() < -0.99 and noise.max() > 0.99 and noise.abs().max() <= 1
    assert abs(noise.var() - 1 / 3) < 0.01


def test_label_joins_every_layer_as_constant_maps():
    g, d = networks(classes=CLASSES)
    inputs = []
    for layer in [layer[0] for layer in (*g.layers, *d.layers, d.hidden)] + [d.score]:
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    label = torch.tensor([3, 7])
    d(g(g.draw(2), label), label)
    assert len(inputs) == 8
    for x in inputs:
        beside = x[:, -10:].flatten(2) if x.ndim == 4 else x[:, -10:, None]
        assert torch.equal(beside.argmax(dim=1), label[:, None].expand(-1, beside.shape[2]))
        assert torch.equal(beside.sum(dim=1), torch.ones(2, beside.shape[2]))
    assert not any(m.affine for m in g.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)))


def test_step_updates_d_then_g_from_the_same_fakes():
    data = made_data()
    model = model_of(data).train()
    real, label = model.batch(data, torch.arange(16))
    assert real.min() >= -1 and real.max() <= 1
    before = [p.clone() for p in model.discriminator.parameters()]
    torch.manual_seed(1)
    losses = dcgan.train_step(model, real, label)
    other = model_of(data).train()
    torch.manual_seed(1)
    fake = other.generator(other.generator.draw(16))
    bce = nn.functional.binary_cross_entropy_with_logits
    d_real, d_fake = other.discriminator(real), other.discriminator(fake)
    expected = bce(d_real, torch.ones(16)) + bce(d_fake, torch.zeros(16))
    torch.testing.assert_close(losses["loss_d"], expected)
    other.discriminator.load_state_dict(model.discriminator.state_dict())
    expected = bce(other.discriminator(fake), torch.ones(16))  # by the new D: not saturating
    torch.testing.assert_close(losses["loss_g"], expected)
    assert not any(map(torch.equal, before, model.discriminator.parameters()))


# ------------------------------------------------------------------ sampling
@pytest.mark.parametrize("flags", [[], ["--label"]])
def test_gradients_are_those_of_the_two_losses(flags):
    data = made_data()
    model = model_of(data, "--lr", "0", *flags).train()
    assert [x.defaults["betas"] for x in model.optimizers] == [(0.5, 0.999)] * 2
    assert_conditional_gradients(dcgan, model, data)


def test_image_follows_from_its_noise_alone():
    g = networks()[0].eval()
    many = dcgan.sample(g, 30, seed=3)
    torch.testing.assert_close(dcgan.sample(g, 30, seed=3)[:1], many[:1], rtol=0, atol=0)
    noise = g.draw(30, dcgan.own_rng(g, 3))
    with torch.no_grad():
        torch.testing.assert_close(g(noise[:1]) / 2 + 0.5, many[:1])
    state = {name: value.clone() for name, value in g.state_dict().items()}
    batch = dcgan.sample(g, 30, seed=3, batch_statistics=True)
    assert batch.shape == many.shape and not torch.allclose(batch, many)
    assert same(state, dict(g.state_dict())) and not g.training  # the averages are as they were


def test_running_averages_and_batch_statistics_agree_after_training(monkeypatch):
    """Both ways to sample: of a generator that has been trained they give like images."""
    without_figures(dcgan, monkeypatch.setattr)
    dcgan.main([*QUICK[:4], "--max-steps", "60", "--out", "run"])
    g = dcgan.load_generator("run/checkpoint.pt")
    one, other = (dcgan.sample(g, 200, batch_statistics=way) for way in (False, True))
    assert one.min() >= 0 and one.max() <= 1
    assert (one - other).abs().mean() < 0.05


def test_classes_take_turns_unless_they_are_named():
    g = networks(classes=CLASSES)[0].eval()
    turns = dcgan.sample(g, 20)
    assert torch.equal(turns, dcgan.sample(g, 20, list(range(10)) * 2))
    assert not torch.allclose(turns[1:2], dcgan.sample(g, 20, [0] * 20)[1:2])


def test_walks_are_straight_and_end_where_they_should():
    g = networks(classes=CLASSES)[0].eval()
    images = dcgan.walks(g, rows=3, steps=5)
    assert images.shape == (3, 5, 1, 28, 28)
    start, end = g.draw(6, dcgan.own_rng(g, 1)).chunk(2)
    label = torch.arange(3)
    with torch.no_grad():
        for step, noise in ((0, start), (2, (start + end) / 2), (4, end)):
            torch.testing.assert_close(images[:, step], g(noise, label) / 2 + 0.5)


# ------------------------------------------------------------------ features and SVM
def test_fixed_statistics_are_the_means_over_batches_of_128():
    d = networks()[1]
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (384, 1, 28, 28), dtype=torch.uint8, generator=rng)
    images[:200] //= 4  # a class in front of another: batches are of both
    before = {name: value.clone() for name, value in d.state_dict().items()}
    fixed = dcgan.with_fixed_statistics(d, images)
    with torch.no_grad():
        inner = [d.layers[1][0](d.layers[0](dcgan.normalise(images[i::3]))) for i in range(3)]
    means = torch.stack([x.mean(dim=(0, 2, 3)) for x in inner]).mean(dim=0)
    variances = torch.stack([x.var(dim=(0, 2, 3)) for x in inner]).mean(dim=0)
    torch.testing.assert_close(fixed.layers[1][1].running_mean, means)
    torch.testing.assert_close(fixed.layers[1][1].running_var, variances)
    assert same(before, dict(d.state_dict())) and d.training and not fixed.training
    one = dcgan.features(fixed, images[:1])
    np.testing.assert_allclose(dcgan.features(fixed, images)[:1], one, atol=1e-5)


def test_features_are_every_layer_pooled_to_4x4():
    d = networks((3, 32, 32))[1].eval()
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    found = dcgan.features(d, images)
    assert found.shape == (2, (8 + 16 + 32) * 16)
    with torch.no_grad():
        first = d.activations(dcgan.normalise(images))[0]
    corner = first[:, :, :4, :4].amax(dim=(2, 3))
    np.testing.assert_allclose(found[:, : 8 * 16 : 16], corner)


def test_svm_in_the_span_of_its_images_is_the_svm():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = rng.normal(size=(60, 200)) + labels[:, None] * rng.normal(size=200) * 0.3
    tests = rng.normal(size=(90, 200)) + labels.repeat(2)[:90, None] * 0.1, labels.repeat(2)[:90]
    found = dcgan.svm_error(lambda x: x, images, labels, tests, [0.01, 0.0001])
    plain = [LinearSVC(C=c, random_state=0).fit(images, labels) for c in (0.01, 0.0001)]
    expected = [np.mean(machine.predict(tests[0]) != tests[1]) for machine in plain]
    np.testing.assert_allclose(found, expected, atol=1 / 90)


def test_draws_hold_as_many_of_each_class():
    labels = np.array([0] * 500 + [1] * 300 + [2] * 9)
    for index in dcgan.labelled_draws(labels, 3, np.random.default_rng(0)):
        assert np.bincount(labels[index]).tolist() == [4, 4, 4] and len(set(index)) == 12
    many = np.arange(3000) % 10
    draws = [*dcgan.labelled_draws(many, 2, np.random.default_rng(0))]
    assert [len(set(index)) for index in draws] == [1000, 1000] and set(draws[0]) != set(draws[1])
    (index,) = dcgan.labelled_draws(np.arange(20_000) % 100, 1, np.random.default_rng(0))
    assert len(index) == 1000  # and not as many as make a day of the protocol


def test_part_of_a_set_that_is_ordered_by_class_has_all_classes():
    labels = torch.arange(2500) // 250  # as those of a folder are
    assert labels[dcgan.evenly(labels, 1000)].bincount().tolist() == [100] * 10
    assert dcgan.evenly(labels, 9999).tolist() == [*range(2500)]


def test_batch_statistics_of_any_number_of_images():
    """501 were 500 and one, of which there are no statistics."""
    g = networks(width=4)[0]
    assert len(dcgan.sample(g, 501, batch_statistics=True)) == 501


def test_protocol_keeps_validation_from_the_draws_and_chooses_c_by_it(monkeypatch):
    data, seen = made_data(), []

    def recorded(extract, images, labels, tests, penalties):
        seen.append((images, tests, penalties))
        return np.array([abs(np.log10(c) + 3) / 10 for c in penalties])

    monkeypatch.setattr(dcgan, "svm_error", recorded)
    found = dcgan.svm_protocol(dcgan.pixels, data, 4)
    assert found == {"error": 0, "spread": 0, "c": 0.001}
    validation = {row.tobytes() for row in seen[0][1][0]}
    drawn = {row.tobytes() for images, *_ in seen for row in dcgan.pixels(images)}
    assert len(validation) == 200 // 6 and not validation & drawn
    assert [len(penalties) for *_, penalties in seen] == [7] * 10 + [1] * 4
    np.testing.assert_array_equal(seen[-1][1][0], dcgan.pixels(data.test))


def test_svm_tells_classes_that_pixels_show():
    found = dcgan.svm_protocol(dcgan.pixels, made_data(), 3)
    assert found["error"] < 0.05 and found["c"] in dcgan.PENALTIES
    shuffled = made_data()._replace(test_labels=(made_data().test_labels + 5) % 10)
    assert dcgan.svm_protocol(dcgan.pixels, shuffled, 3)["error"] > 0.95


# ------------------------------------------------------------------ other measures
def test_nearest_error_of_a_hand_made_case():
    images = torch.zeros(3, 1, 2, 2)
    images[1], images[2] = 0.5, 1
    points = torch.tensor([0, 100, 150, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    truth = torch.tensor([0, 1, 0, 2])  # the nearest are 0, 1, 1, 2
    assert dcgan.nearest_error(points, truth, images, torch.arange(3)) == 0.25
    assert dcgan.nearest_error(points, truth, (images * 255).byte(), torch.arange(3)) == 0.25


def test_evenness_of_equal_steps_and_of_a_leap():
    line = torch.arange(5.0).view(1, 5, 1, 1, 1).expand(2, 5, 1, 2, 2)
    assert dcgan.evenness(line, lambda x: (x.flatten(1), None)) == pytest.approx(1)
    assert dcgan.evenness((line > 2).float(), lambda x: (x.flatten(1), None)) == pytest.approx(4)


def test_arithmetic_of_a_generator_that_adds(monkeypatch):
    """Noise 0 is the brightness, noise 1 the class: arithmetic carries both over."""

    class Adds(nn.Module):
        classes = ()

        def __init__(self):
            super().__init__()
            self.device = nn.Parameter(torch.zeros(1))

        def draw(self, n, rng=None):
            noise = torch.rand(n, 100, generator=rng) * 2 - 1
            noise[:, 1] = noise[:, 1].sign()
            return noise

        def forward(self, noise, label=None):
            image = noise[:, :1].expand(-1, 8) / 2
            return torch.cat([image, noise[:, 1:2] * 0.1], dim=1).view(-1, 1, 3, 3)

    monkeypatch.setattr(dcgan, "classify", lambda _, images: (images[:, 0, 2, 2] > 0.5).long())
    g = Adds()
    means = dcgan.concepts(g, None)
    assert sorted(means) == [0, 1]
    for c, (bright, dark) in means.items():
        assert bright[1] == dark[1] == 2 * c - 1 and bright[0] > 0.99 and dark[0] < -0.99
    classes, images = dcgan.arithmetic(g, means)
    assert classes.tolist() == [1, 0] and images.shape == (2, 5, 1, 3, 3)
    figures = dcgan.arithmetic_figures(classes, images, None)
    assert figures["arithmetic_class"] == figures["arithmetic_class_of_dark_c"] == 1
    assert figures["arithmetic_brightness"] == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(images[:, 3], images[:, 4], atol=0.02, rtol=0)


# ------------------------------------------------------------------ runs
@pytest.mark.parametrize("flags", [[], ["--label"]])
def test_estimates_while_training_are_of_test_images(flags, monkeypatch):
    data, seen = made_data(), []
    for name in ("svm_error", "nearest_error"):
        monkeypatch.setattr(dcgan, name, lambda *a: seen.append(a) or np.zeros(1))
    monkeypatch.setattr(dcgan, "features", lambda discriminator, images: images)
    dcgan.evaluate(model_of(data, *flags), data)
    points, truth = seen[0][:2] if flags else seen[0][3]
    assert np.array_equal(truth, data.test_labels) and torch.equal(points, data.test)


def test_run_measures_features_and_controls(monkeypatch):
    monkeypatch.setattr(dcgan.train_classifier, "__defaults__", (0, 20, 16))
    monkeypatch.setattr(dcgan, "PENALTIES", (0.001, 0.01))
    dcgan.main([*QUICK, "--draws", "2"])
    summary = summary_of("run")
    wanted = {f"svm{of}_{what}" for of in ("", "_untrained", "_pixels") for what in ("error", "c")}
    assert wanted <= set(summary) and summary["svm_error"] < 0.3
    assert summary["walk_largest_step"] >= 1 and "neighbour_error" not in summary
    assert 0 < float(rows("run")[-1]["svm_estimate"]) < 0.3
    for name in ("curves", "walks", "filters", "samples/0000003"):
        assert np.asarray(Image.open(f"run/{name}.png")).std() > 1


def test_untrained_control_is_the_d_that_the_run_began_with(monkeypatch):
    began, seen = model_of(data := made_data()).discriminator, []
    model = model_of(data)
    with torch.no_grad():
        for p in model.discriminator.parameters():
            p.add_(1)
    monkeypatch.setattr(dcgan, "train_classifier", lambda data: (None, 1.0))
    monkeypatch.setattr(dcgan, "walk_figures", lambda *args: {})
    monkeypatch.setattr(dcgan, "concepts", lambda *args: {})
    for name in ("save_curves", "save_filters", "save_image"):
        monkeypatch.setattr(dcgan, name, lambda *args, **flags: None)
    monkeypatch.setattr(dcgan, "with_fixed_statistics", lambda d, images: seen.append(d) or d)
    monkeypatch.setattr(dcgan, "svm_protocol", lambda *args: {"error": 0.0})
    dcgan.finish(model, data, Path("."), [])
    assert seen[0] is model.discriminator
    assert all(map(torch.equal, seen[1].parameters(), began.parameters()))


def test_labelled_run_is_scored_by_nearest_neighbours(monkeypatch):
    monkeypatch.setattr(dcgan.train_classifier, "__defaults__", (0, 2, 16))
    dcgan.main([*QUICK, "--label"])
    summary = summary_of("run")
    assert summary["neighbours"] == 1435 and summary["neighbour_error"] > 0.3
    assert summary["neighbour_error_real"] < 0.03  # of real digits
    assert "svm_error" not in summary and float(rows("run")[-1]["neighbour_estimate"]) > 0.3
    for flags in ([], ["--label", "3", "7"], ["--batch-statistics"]):
        dcgan.main(["--generate", "run/checkpoint.pt", "--out", "a.png", *flags])
        assert Image.open("a.png").size[1] == (62 if "--label" in flags else 302)


def test_folder_of_any_size():
    """Colour pictures of 50x150, as users of other versions have them, at 64 and at 48 pixels."""
    write_images("pictures", 10, (50, 150))
    for size in ("64", "48"):
        flags = ["--dataset", "folder", "--data-dir", "pictures", "--image-size", size]
        dcgan.main([*flags, "--width", "2", "--max-steps", "1", "--out", f"run{size}"])
        images = dcgan.sample(dcgan.load_generator(f"run{size}/checkpoint.pt"), 2)
        assert (
            images.shape == (2, 3, int(size), int(size)) and 0 <= images.min() <= images.max() <= 1
        )
        assert "svm_error" not in summary_of(f"run{size}")  # too few images


def test_labelled_run_goes_on_bit_for_bit():
    write_mnist("data", train=80, test=20)
    flags = ["--dataset", "mnist", "--batch-size", "8", "--width", "4", "--label"]
    dcgan.main([*flags, "--max-steps", "14", "--out", "whole"])
    dcgan.main([*flags, "--max-steps", "7", "--out", "part"])
    dcgan.main(["--resume", "part/checkpoint.pt", "--max-steps", "14"])
    assert same(weights("whole"), weights("part"))


def test_rate_of_a_labelled_run_falls_to_0_in_its_second_half():
    data, found = made_data(120), {}
    for label in ([], ["--label"]):
        model = model_of(data, "--batch-size", "8", "--epochs", "1", "--lr", "0.1", *label)
        for _ in range(10):
            dcgan.train_step(model, *model.batch(data, torch.arange(8)))
            for optimizer in model.optimizers:
                found.setdefault(len(label), []).append(float(optimizer.param_groups[0]["lr"]))
    falling = [0.1] * 6 + [0.08, 0.06, 0.04, 0.02]
    assert np.allclose(found[1], np.repeat(falling, 2)) and np.allclose(found[0], 0.1)


def test_mistakes(capsys):
    write_images("pictures/cat", 10)
    folder = ["--dataset", "folder", "--data-dir", "pictures", "--out", "run"]
    assert "two or more classes" in refused_by(dcgan, capsys, *folder, "--label")
    assert "go with --generate" in refused_by(dcgan, capsys, *folder, "--label", "cat")
    assert "go with --generate" in refused_by(dcgan, capsys, *folder, "--batch-statistics")
    assert "no multiple of 4" in refused_by(dcgan, capsys, *folder, "--image-size", "50")
    write_images("parts/train/all")
    write_images("parts/test/all")
    parts = ["--dataset", "folder", "--data-dir", "parts", "--out", "run"]
    assert "not ['test', 'train']" in refused_by(dcgan, capsys, *parts, "--label")
    dcgan.main([*folder, "--width", "2", "--max-steps", "1"])
    asked = ["--generate", "run/checkpoint.pt", "--label", "cat"]
    assert "trained without --label" in refused_by(dcgan, capsys, *asked)
