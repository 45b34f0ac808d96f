"""cgan.py: networks, schedule, measurements, classifier, and what is its own in whole runs."""

import functools
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_conditional_gradients,
    checkpoint,
    files,
    refused_by,
    rows,
    same,
    weights,
    write_images,
    write_mnist,
)
from PIL import Image
from torch import distributions

import cgan

NETWORKS = ("conv", "mlp")
CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(cgan, "SAMPLES", 200)


def quick_classifier(patch):
    """Makes its training two updates on 16 images each."""
    patch.setattr(cgan.train_classifier, "__defaults__", (0, 2, 16))


def model_and_data(*flags, images=64):
    args = cgan.arguments().parse_args(["--batch-size", "16", *flags])
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(1)
    train = torch.randint(256, (images, 1, 28, 28), dtype=torch.uint8, generator=rng)
    labels = torch.arange(images) % 10
    data = cgan.Data("made", CLASSES, train, labels, train[:20], labels[:20])
    cgan.suit(args, data)
    return cgan.Model(args, data), data


def networks(name, classes=10, shape=(1, 28, 28)):
    torch.manual_seed(0)
    return [kind([str(i) for i in range(classes)], shape) for kind in cgan.NETWORKS[name]]


def parameters(network):
    return sum(p.numel() for p in network.parameters())


# ------------------------------------------------------------------ networks
def linear(inputs, outputs):
    return inputs * outputs + outputs


def test_mlp_has_the_sizes_of_the_paper():
    g, d = networks("mlp")
    assert parameters(g) == (
        linear(100, 200) + linear(10, 1000) + linear(1200, 1200) + linear(1200, 784)
    )
    assert parameters(d) == (
        linear(784, 240 * 5) + linear(10, 50 * 5) + linear(290, 240 * 4) + linear(240, 1)
    )


def test_dropout_zeroes_half_and_doubles_the_others():
    torch.manual_seed(0)
    x = cgan.dropout(torch.ones(6, 1000))
    assert set(x.unique().tolist()) == {0, 2} and abs(x.mean() - 1) < 0.05
    assert not torch.equal(x[0], x[1])


def test_mlp_drops_half_of_the_hidden_units_and_g_in_samples_too():
    g, d = networks("mlp")
    g.eval()
    seen = []
    for layer in (g.joint, g.pixels, d.joint, d.score):
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for layer in (g.noise, g.label, g.joint, d.image.linear, d.label.linear, d.joint.linear):
            layer.weight.zero_()
            layer.bias.fill_(1)  # no unit is at rest by itself
        label = torch.arange(50) % 10
        d(g(g.draw(50), label), label)
    assert [x.shape[1] for x in seen] == [1200, 1200, 290, 240]
    assert all(abs((x == 0).double().mean() - 0.5) < 0.03 for x in seen)


def test_conv_has_the_sizes_of_infogan():
    g, d = networks("conv")
    assert parameters(g) == (
        110 * 1024 + 2 * 1024 + 1024 * 6272 + 2 * 6272 + 16 * 128 * 64 + 2 * 64 + 16 * 64 + 1
    )
    trunk = 16 * 64 + 64 + 16 * 64 * 128 + 2 * 128 + 6272 * 1024 + 2 * 1024
    assert parameters(d) == trunk + 1024 + 1 + 10 * 1024  # the norms have the others' biases


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_and_range(name, shape):
    g, d = networks(name, 3, shape)
    label = torch.tensor([0, 1, 2, 0])
    images = g(g.draw(4), label)
    assert images.shape == (4, *shape) and images.abs().max() <= 1
    assert d(images, label).shape == (4,)


@pytest.mark.parametrize("name", NETWORKS)
def test_label_reaches_both_networks(name, monkeypatch):
    """Another label changes the outputs for the same noise and image, for each label."""
    monkeypatch.setattr(cgan, "dropout", lambda x: x)
    g, d = (network.eval() for network in networks(name))
    noise, image = torch.rand(1, 100), torch.rand(1, 1, 28, 28).expand(10, -1, -1, -1)
    images = []
    with torch.no_grad():
        for label in range(10):
            images.append(g(noise, torch.tensor([label])).flatten())
        images, scores = torch.stack(images), d(image, torch.arange(10))
    assert F.pdist(images).min() > 1e-3
    assert len(set(scores.tolist())) == 10


def test_maxout_is_the_largest_of_its_pieces():
    torch.manual_seed(0)
    layer, x = cgan.Maxout(7, 4, 3), torch.randn(5, 7)
    weight, bias = layer.linear.weight.detach().view(3, 4, 7), torch.randn(3, 4)
    layer.linear.bias.data = bias.flatten()
    for n in range(5):
        for unit in range(4):
            pieces = [float(weight[k, unit] @ x[n] + bias[k, unit]) for k in range(3)]
            assert math.isclose(float(layer(x)[n, unit].detach()), max(pieces), rel_tol=1e-5)


def test_noise_is_normal_for_conv_and_in_the_unit_hypercube_for_mlp():
    torch.manual_seed(0)
    normal, uniform = (networks(name)[0].draw(1000) for name in NETWORKS)
    assert normal.shape == uniform.shape == (1000, 100)
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01
    assert uniform.min() >= 0 and uniform.max() <= 1 and abs(uniform.std() - 12**-0.5) < 0.01


def test_untrained_mlp_draws_the_mean_image():
    model, data = model_and_data("--network", "mlp")
    images = cgan.sample(model.generator.eval(), torch.arange(10))
    assert (images.mean(dim=0) - data.train.float().mean(dim=0) / 255).abs().mean() < 0.015


# ------------------------------------------------------------------ the training step
def test_sgd_follows_the_paper():
    """Against torch's SGD, whose rate and momentum are set by hand before each update."""
    torch.manual_seed(0)
    ours, theirs = torch.zeros(3, requires_grad=True), torch.zeros(3, dtype=torch.float64)
    optimizer, velocity = cgan.PaperSGD([ours], 0.1), torch.zeros(3, dtype=torch.float64)
    for update in range(40):
        if update == 20:  # far into the schedule
            optimizer.state[ours]["updates"].fill_(100_000)
        t = update if update < 20 else 100_000 + update - 20
        gradient = torch.randn(3)
        ours.grad = gradient
        optimizer.step()
        momentum = 0.5 + 0.2 * t / 125_000
        velocity = momentum * velocity - max(0.1 / 1.00004**t, 1e-6) * gradient.double()
        theirs += velocity
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    optimizer.state[ours]["updates"].fill_(1e6)
    optimizer.state[ours]["velocity"].fill_(1)
    before = ours.detach().clone()
    ours.grad = torch.zeros(3)
    optimizer.step()
    assert torch.allclose(ours - before, torch.full((3,), 0.7), atol=1e-6)  # its end
    ours.grad = torch.full((3,), 1e6)
    optimizer.state[ours]["velocity"].zero_()
    optimizer.step()
    assert torch.allclose(optimizer.state[ours]["velocity"], torch.tensor(-1.0))  # rate 1e-6


def test_sgd_goes_on_where_its_state_was():
    """As a resumed run loads it: the state alone, under rates that may be others."""
    torch.manual_seed(0)
    target, ends = torch.randn(2, 3), []
    for stop in (None, 5):
        x = torch.zeros(2, 3, requires_grad=True)
        optimizer = cgan.PaperSGD([x], 0.1)
        for i in range(10):
            if i == stop:
                saved = optimizer.state_dict()["state"]
                optimizer = cgan.PaperSGD([x], 0.1)
                optimizer.load_state_dict(optimizer.state_dict() | {"state": saved})
            x.grad = (x - target).detach()
            optimizer.step()
        ends.append((x.detach(), optimizer.state_dict()))
    assert same(*ends) and ends[0][1]["state"][0]["updates"] == 10
    other = cgan.PaperSGD([x], 0.5)
    other.load_state_dict(other.state_dict() | {"state": saved})
    assert other.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_are_those_of_the_paper(name):
    """At chance D's loss is 2 log 2 and G's log 2."""
    model, data = model_and_data("--network", name, "--lr-d", "0", "--lr-g", "0")
    with torch.no_grad():
        for p in model.discriminator.parameters():
            p.zero_()
    losses = cgan.train_step(model, *model.batch(data, torch.arange(16)))
    assert [*losses] == ["loss_d", "loss_g"]
    assert math.isclose(losses["loss_d"].item(), 2 * math.log(2), rel_tol=1e-5)
    assert math.isclose(losses["loss_g"].item(), math.log(2), rel_tol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_step_moves_every_weight_under_the_labels_of_its_images(name):
    model, data = model_and_data("--network", name)
    seen, index = [], torch.randperm(64)[:16]
    for network in (model.generator, model.discriminator):
        network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    before = {n: p.clone() for n, p in model.named_parameters()}
    cgan.train_step(model, *model.batch(data, index))
    assert all(torch.equal(label, data.train_labels[index]) for label in seen) and len(seen) == 4
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n])]


@pytest.mark.parametrize("name", NETWORKS)
def test_generator_update_leaves_no_gradient_in_the_discriminator(name):
    model, data = model_and_data("--network", name)
    used = {}
    model.optimizer_d.register_step_pre_hook(
        lambda *_: used.update({n: p.grad.clone() for n, p in discriminator.named_parameters()})
    )
    discriminator = model.discriminator
    cgan.train_step(model, *model.batch(data, torch.arange(16)))
    assert same(used, {n: p.grad for n, p in discriminator.named_parameters()})


def test_batch_has_the_images_in_the_range_of_tanh_and_their_labels():
    model, data = model_and_data()
    index = torch.tensor([13, 4])
    images, labels = model.batch(data, index)
    assert torch.allclose((images + 1) * 127.5, data.train[index].float(), atol=1e-4)
    assert labels.tolist() == [3, 4]


# ------------------------------------------------------------------ sampling
@pytest.mark.parametrize("name", NETWORKS)
def test_sample_obeys_labels_and_leaves_the_training_draws_alone(name):
    g, _ = networks(name)
    g.eval()
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    images = cgan.sample(g, [3, 3, 7], seed=2)
    assert torch.equal(torch.rand(3), want)
    torch.manual_seed(2)
    expected = g(g.draw(3), torch.tensor([3, 3, 7])) / 2 + 0.5
    assert torch.allclose(images, expected, atol=1e-6)
    assert images.min() >= 0 and images.max() <= 1
    assert not torch.equal(images, cgan.sample(g, [3, 3, 7], seed=3))


def test_samples_have_a_row_for_each_label(monkeypatch):
    model, _ = model_and_data()
    monkeypatch.setattr(
        model.generator, "forward",
        lambda noise, label: (label / 5 - 1).float().view(-1, 1, 1, 1).expand(-1, 1, 28, 28),
    )  # fmt: skip
    cgan.save_samples(model, "rows")
    with Image.open("rows.png") as image:
        assert image.size == (10 * 30 + 2, 10 * 30 + 2)
        for row in range(10):
            shades = {image.getpixel((x * 30 + 15, row * 30 + 15))[0] for x in range(10)}
            assert len(shades) == 1 and abs(shades.pop() - row * 25.5) <= 1


# ------------------------------------------------------------------ Parzen window
def mixture(means, sigma):
    windows = distributions.Independent(distributions.Normal(means, sigma), 1)
    return distributions.MixtureSameFamily(
        distributions.Categorical(torch.ones(len(means), dtype=torch.float64)), windows
    )


def test_parzen_is_the_density_of_the_gaussian_mixture():
    torch.manual_seed(0)
    samples, points = torch.rand(37, 5), torch.rand(23, 5)
    sigmas = [0.05, 0.3, 2.0]
    got = cgan.parzen(points, samples, sigmas, chunk=7)
    for row, sigma in zip(got, sigmas):
        assert torch.allclose(row, mixture(samples.double(), sigma).log_prob(points.double()))


def test_parzen_of_normal_samples():
    """Windows of width s on many samples of N(0, 1) have the density of N(0, 1 + s^2)."""
    samples = distributions.Normal(0, 1).icdf((torch.arange(20_000) + 0.5) / 20_000)[:, None]
    points = torch.linspace(-2, 2, 9)[:, None]
    got = cgan.parzen(points, samples, [0.5])[0]
    want = distributions.Normal(0, 1.25**0.5).log_prob(points[:, 0]).double()
    assert torch.allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_the_two_losses(name):
    model, data = model_and_data("--network", name, "--lr-d", "0", "--lr-g", "0")
    assert_conditional_gradients(cgan, model, data)
    rates = "--lr-g", "0.25", "--lr-d", "0.5"
    model, _ = model_and_data("--network", name, *rates)
    optimizers = model.optimizer_g, model.optimizer_d
    assert [x.param_groups[0]["lr"] for x in optimizers] == [0.25, 0.5]


def test_classifier_learns_from_training_images_alone(digits, monkeypatch):
    monkeypatch.setattr(cgan.train_classifier, "__defaults__", (0, 20, 16))
    others = digits._replace(test_labels=(digits.test_labels + 1) % 10)
    one, accuracy = cgan.train_classifier(digits)
    other, wrong = cgan.train_classifier(others)
    assert same(one.state_dict(), other.state_dict()) and accuracy != wrong


def test_parzen_figures_choose_sigma_on_training_images_and_score_the_test_images():
    """Images a known distance from the samples: the best sigma is that distance over root d."""
    rng = torch.Generator().manual_seed(0)
    sample = torch.full((1, 1, 28, 28), 0.5)
    noise = 0.2 * torch.randn(1200, 1, 28, 28, generator=rng)
    noise[1000:] *= 0.5  # test images are nearer, and have no say in it
    images = (127.5 + 255 * noise).clamp(0, 255).byte()
    data = cgan.Data("made", ["a", "b"], images[:1000], None, images[1000:], None)
    figures = cgan.parzen_figures(sample, data)
    assert abs(figures["parzen_sigma"] / 0.2 - 1) < 0.06  # the grid's step is 11 %
    want = mixture(sample.flatten(1).double(), figures["parzen_sigma"])
    nats = want.log_prob(images[1000:].flatten(1).double() / 255)
    assert math.isclose(figures["parzen_nats"], nats.mean(), rel_tol=1e-6)
    assert math.isclose(figures["parzen_standard_error"], nats.std() / 200**0.5, rel_tol=0.01)


# ------------------------------------------------------------------ classifier
@pytest.fixture(scope="module")
def digits():
    args = cgan.arguments().parse_args(["--dataset", "digits"])
    return cgan.load_data(args, "cpu")


@pytest.fixture(scope="module")
def yardstick(digits):
    """The classifier and its accuracy; training it leaves the random numbers as they are."""
    draws = torch.get_rng_state()
    found = cgan.train_classifier(digits)
    assert torch.equal(torch.get_rng_state(), draws)
    return found


def test_classifier_of_digits_is_a_yardstick(digits, yardstick):
    classifier, accuracy = yardstick
    assert accuracy >= 0.97
    features, logits = classifier(digits.test[:7] / 255)
    assert features.shape == (7, 128) and logits.shape == (7, 10)
    found = cgan.classify(classifier, digits.test)
    assert torch.equal(found, cgan.classify(classifier, digits.test / 255))
    assert (found == digits.test_labels).double().mean() == accuracy


def test_classifier_is_the_same_each_time_and_trained_once_a_run(digits, monkeypatch):
    quick_classifier(monkeypatch)
    (first, _), (second, _) = cgan.train_classifier(digits), cgan.train_classifier(digits)
    assert same(first.state_dict(), second.state_dict()) and not first.training
    train, calls = cgan.train_classifier, []
    monkeypatch.setattr(cgan, "train_classifier", lambda data: calls.append(1) or train(data))
    model, data = model_and_data()
    names = model.state_dict().keys()
    for _ in range(2):
        assert 0 <= cgan.evaluate(model.eval(), data)["label_fidelity_estimate"] <= 1
    assert calls == [1] and model.state_dict().keys() == names  # it is not in the checkpoint


@pytest.mark.parametrize("n", [2, 130])
def test_classifier_of_a_set_of_any_size(n, monkeypatch):
    quick_classifier(monkeypatch)
    _, data = model_and_data(images=n)
    _, accuracy = cgan.train_classifier(data._replace(classes=["a"] * 10))
    assert 0 <= accuracy <= 1


def test_label_fidelity_counts_the_samples_of_the_class_asked_for(monkeypatch):
    model, data = model_and_data()
    model.yardstick = (None, 1.0)
    labels = cgan.every_class(data.classes, 1000, "cpu")
    assert torch.bincount(labels).tolist() == [100] * 10
    monkeypatch.setattr(cgan, "classify", lambda _, images: torch.where(labels == 3, 4, labels))
    share, per_class = cgan.right_labels(model, data, None, labels)
    assert math.isclose(share, 0.9)
    assert per_class == {name: float(name != "3") for name in CLASSES}
    assert cgan.every_class(["a"] * 3, 100, "cpu").tolist() == sorted([0, 1, 2] * 33)


# ------------------------------------------------------------------ whole runs
SMALL = ["--dataset", "mnist", "--batch-size", "8", "--epochs", "2", "--log-every", "4"]
SMALL += ["--device", "cpu"]


@pytest.fixture(scope="module", params=NETWORKS)
def finished(request, tmp_path_factory):
    """A run of two epochs of ten updates on made MNIST files, with a row every four updates."""
    home = tmp_path_factory.mktemp("finished")
    write_mnist(home / "data", train=80, test=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cgan, "SAMPLES", 200)
        quick_classifier(patch)
        flags = ["--network", request.param, "--data-dir", str(home / "data")]
        cgan.main([*SMALL, *flags, "--out", str(home / "run")])
    return home / "run"


refused = functools.partial(refused_by, cgan)


def summary(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


def test_run_folder(finished):
    assert {path.name for path in finished.iterdir()} - {".lock"} == {
        "samples", "curves.png", "metrics.csv", "config.json", "summary.json", "checkpoint.pt",
    }  # fmt: skip
    header = (finished / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,epoch,seconds,loss_d,loss_g,label_fidelity_estimate"
    assert [bool(row["label_fidelity_estimate"]) for row in rows(finished)] == [0, 0, 0, 0, 1]
    found = summary(finished)
    assert found["kernels"] == "reference" and found["step"] == 20
    assert 0 <= found["label_fidelity"] <= 1 and 0 <= found["classifier_accuracy"] <= 1
    per_class = found["label_fidelity_per_class"]
    assert len(per_class) == 10
    assert math.isclose(sum(per_class.values()) / 10, found["label_fidelity"], abs_tol=1e-9)
    assert found["parzen_nats"] < 0 < found["parzen_standard_error"]
    assert 0.05 <= found["parzen_sigma"] <= 1
    with Image.open(finished / "curves.png") as image:
        assert np.asarray(image.convert("L")).std() > 1  # not blank


def test_resume_equals_uninterrupted(finished, monkeypatch):
    """In mid-epoch; the mlp's schedule goes on where it was."""
    quick_classifier(monkeypatch)
    config = json.loads((finished / "config.json").read_text())
    flags = ["--network", config["network"], "--data-dir", config["data_dir"]]
    cgan.main([*SMALL, *flags, "--out", "run", "--max-steps", "7"])
    cgan.main(["--resume", "run/checkpoint.pt", "--max-steps", "1000"])
    assert same(weights("run"), weights(finished))
    if config["network"] == "mlp":
        for optimizer in checkpoint("run")["optimizers"]:
            assert all(state["updates"] == 20 for state in optimizer.values())
    whole, resumed = summary(finished), summary("run")
    differ = {name for name in whole if whole[name] != resumed[name]}
    assert differ == {"out", "resume", "max_steps", "seconds"}


def suited(n, *flags):
    args = cgan.arguments().parse_args(flags)
    cgan.suit(args, model_and_data(images=n)[1])
    return args.epochs, args.batch_size, args.lr_d, args.lr_g


def test_flags_left_out_suit_network_and_data():
    assert suited(1000) == (50, 128, 2e-4, 1e-3) and suited(999) == (50, 32, 2e-4, 1e-3)
    assert suited(100, "--network", "mlp") == (50, 100, 0.1, 0.1)
    assert suited(24)[1] == suited(24, "--network", "mlp")[1] == 24
    given = ("--epochs", "3", "--batch-size", "7", "--lr-d", "0", "--lr-g", "2")
    assert suited(64, *given) == (3, 7, 0, 2)


def test_network_of_a_run_stays(finished, capsys):
    other = {"conv": "mlp", "mlp": "conv"}[checkpoint(finished)["config"]["network"]]
    error = refused(capsys, "--resume", finished / "checkpoint.pt", "--network", other)
    assert "--network: the run has" in error


def test_label_does_not_begin_a_training(capsys):
    assert "--generate" in refused(capsys, "--dataset", "digits", "--label", "3")


def test_generate_by_name(finished, capsys):
    path = str(finished / "checkpoint.pt")
    cgan.main(["--generate", path, "--out", "a.png", "--label", "3 - three", "7"])
    with Image.open("a.png") as image:
        assert image.size == (10 * 30 + 2, 2 * 30 + 2)
    cgan.main(["--generate", path])
    with Image.open("grid.png") as image:
        assert image.size == (10 * 30 + 2, 10 * 30 + 2)
    generator = cgan.load_generator(path)
    assert not generator.training and generator.classes[3] == "3 - three"
    assert cgan.sample(generator, [3] * 5).shape == (5, 1, 28, 28)
    for label in ("cat", "10", "-1", "2.5", "²"):
        assert "0 - zero, 1 - one" in refused(capsys, "--generate", path, f"--label={label}")


def test_folder_of_named_classes(capsys, monkeypatch):
    """Names of classes go before their numbers, and are kept in the checkpoint."""
    quick_classifier(monkeypatch)
    write_images("pictures", n=24)
    Path("pictures/dog").rename("pictures/0")
    pictures = files("pictures")
    flags = ["--dataset", "folder", "--data-dir", "pictures", "--batch-size", "8", "--out", "run"]
    cgan.main([*flags, "--max-steps", "1", "--device", "cpu"])
    assert files("pictures") == pictures  # nothing lands among them
    assert summary("run")["label_fidelity_per_class"].keys() == {"0", "cat"}
    cgan.main(["--generate", "run/checkpoint.pt", "--label", "cat"])
    with Image.open("grid.png") as image:
        assert image.size == (10 * 34 + 2, 34 + 2)
    assert cgan.class_number(["1", "0"], "0") == 1
    assert "cat" in refused(capsys, "--generate", "run/checkpoint.pt", "--label", "dog")


def test_folder_of_one_class(capsys):
    write_images("pictures")
    for path in Path("pictures/dog").iterdir():
        path.rename(Path("pictures/cat") / path.name)
    flags = ("--dataset", "folder", "--data-dir", "pictures", "--batch-size", 2)
    assert "one class" in refused(capsys, *flags)
    for path in Path("pictures/cat").iterdir():
        path.rename(Path("pictures") / path.name)
    assert "sub-folder" in refused(capsys, *flags)


def test_what_is_no_class_is_not_learnt_as_one(capsys):
    flags = ("--data-dir", "pictures", "--batch-size", 2)
    write_images("pictures")
    Path("pictures/cat/0.png").rename("pictures/0.png")
    assert "pictures in ['']: sub-folders" in refused(capsys, *flags)
    Path("pictures/0.png").unlink()
    Path("pictures/cat").rename("pictures/train")
    Path("pictures/dog").rename("pictures/test")
    assert "pictures in ['test', 'train']: sub-folders" in refused(capsys, *flags)


def test_bad_flags(capsys):
    for flags in (["--network", "deep"], ["--lr-g", "nan"], ["--lr-d", -1]):
        assert flags[0] in refused(capsys, "--dataset", "digits", *flags)


def test_labels_are_obeyed_after_a_hundred_updates(yardstick, monkeypatch):
    """Chance is 0.1."""
    monkeypatch.setattr(cgan, "train_classifier", lambda data: yardstick)
    monkeypatch.setattr(cgan, "SAMPLES", 500)
    flags = ["--dataset", "digits", "--batch-size", "16", "--max-steps", "120", "--out", "run"]
    cgan.main([*flags, "--device", "cpu"])
    assert summary("run")["label_fidelity"] > 0.4


def test_import_leaves_no_trace():
    draws = torch.get_rng_state()
    spec = importlib.util.spec_from_file_location("cgan_again", cgan.__file__)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cgan_again", module)
        spec.loader.exec_module(module)
    assert torch.equal(torch.get_rng_state(), draws) and not list(Path().iterdir())
