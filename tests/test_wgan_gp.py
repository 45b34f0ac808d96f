"""wgan_gp.py: the penalty, Algorithm 1, the networks, the sets of points, whole runs."""

import functools
import json
import math
from pathlib import Path

import gan_kernels
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NO_GPU
from helpers import (
    checkpoint,
    refused_by,
    rows,
    same,
    weights,
    without_figures,
    write_images,
    write_mnist,
)
from PIL import Image
from torch import nn

import wgan_gp

PENALTIES = [wgan_gp.gradient_penalty_reference, gan_kernels.gradient_penalty]
SHAPES = [  # the data of each kind of network, with the flags that choose it
    ((2,), []),
    ((1, 28, 28), []),
    ((3, 32, 32), []),
    ((3, 64, 64), []),
    ((3, 32, 32), ["--network", "resnet"]),
]


@pytest.fixture(autouse=True)
def threads():
    """Leaves PyTorch the threads that it had, of which runs on points take one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made_data(shape, n=200, device="cpu"):
    """Random points or images."""
    train = torch.randn(n, 2) if shape == (2,) else torch.randint(256, (n, *shape)).byte()
    train, labels = train.to(device), torch.zeros(n, dtype=torch.int64, device=device)
    return wgan_gp.Data("made", ["0"], train, labels, train[:50], labels[:50])


def settings(shape, *flags, n=10_000):
    """The arguments that these flags and data of the shape lead to."""
    args = wgan_gp.arguments().parse_args([str(flag) for flag in flags])
    wgan_gp.suit(args, made_data(shape)._replace(train=torch.empty(1).expand(n, *shape)))
    return args


def networks(shape, *flags):
    """G and D of these flags."""
    args = settings(shape, *flags)
    generator = wgan_gp.Generator(shape, args.noise, args.dim, args.network)
    return generator, wgan_gp.Critic(shape, args.dim, args.network, args.critic_norm)


def model_and_data(*flags, shape=(2,), n=200, device="cpu"):
    """A small model on random data of the shape."""
    args = wgan_gp.arguments().parse_args(["--dim", "8", "--batch-size", "16", *map(str, flags)])
    torch.manual_seed(args.seed)
    data = made_data(shape, n, device)
    wgan_gp.suit(args, data)
    return wgan_gp.Model(args, data), data


def step(model, data):
    """One update on the first samples."""
    index = torch.arange(model.samples_per_step, device=data.train.device)
    return wgan_gp.train_step(model, *model.batch(data, index))


def parameters(network):
    return sum(p.numel() for p in network.parameters())


# ------------------------------------------------------------------ the penalty (equation 3)
@pytest.mark.parametrize("target", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalty_of_a_linear_critic(penalty, target):
    """Its gradient is w everywhere: the penalty (|w| - t)^2, with gradient 2 (|w| - t) w / |w|."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    w = critic[1].weight
    value = penalty(critic, torch.randn(5, 3, 2, 2), target=target)
    value.backward()
    norm = w.detach().norm()
    assert torch.allclose(value, (norm - target) ** 2)
    assert torch.allclose(w.grad, 2 * (norm - target) * w.detach() / norm)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalty_where_the_gradient_is_zero(penalty):
    """A dead relu: its samples add target^2 and no gradient, and nothing is nan."""
    critic = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU())
    with torch.no_grad():
        critic[0].weight.copy_(torch.tensor([[3.0, 4.0]]))
    x = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [-2.0, 0.0], [-1.0, 0.5]])
    value = penalty(critic, x, target=1.0)
    value.backward()
    assert math.isclose(value.item(), (16 + 3 * 1) / 4, rel_tol=1e-6)
    assert torch.allclose(critic[0].weight.grad, 2 * 4 * torch.tensor([[0.6, 0.8]]) / 4)


def test_norm_of_a_gradient_that_is_nan_is_nan_in_its_row_alone():
    x = torch.tensor([[3.0, 4.0], [math.nan, 1.0], [0.0, 0.0]])
    norms = wgan_gp.gradient_norms(lambda x: (x**2).sum(dim=1) / 2, x)
    torch.testing.assert_close(norms, torch.tensor([5.0, math.nan, 0.0]), equal_nan=True)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalty_of_a_gradient_that_is_nan_is_nan(penalty):
    critic = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(5, 2)
    assert penalty(critic, x).isfinite()
    x[3] = math.nan
    assert penalty(critic, x).isnan()


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_gradient_that_is_nan_shows_in_the_loss(kernels):
    """The scores are finite: that is the root of zero, whose derivative is infinite."""
    model, data = model_and_data("--n-critic", 2, "--kernels", kernels)
    layers = model.critic.layers
    model.critic.forward = lambda x: (layers(x) + (0 * x[:, :1]).sqrt()).squeeze(1)
    losses = step(model, data)
    assert losses["loss_critic"].isnan() and losses["penalty"].isnan()


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("shape, flags", SHAPES)
def test_fused_penalty_gives_the_reference_gradients(shape, flags, norm):
    torch.manual_seed(0)
    _, critic = networks(shape, "--dim", 8, "--critic-norm", norm, *flags)
    x, found = torch.randn(4, *shape), []
    for penalty in PENALTIES:
        critic.zero_grad()
        value = penalty(critic, x)
        value.backward()
        grads = [p.grad.flatten() for p in critic.parameters() if p.grad is not None]
        found.append(torch.cat([value.detach()[None], *grads]))
    assert (found[0] - found[1]).norm() <= 1e-4 * found[0].norm()


# ------------------------------------------------------------------ Algorithm 1
@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_step_is_algorithm_1(kernels):
    """The weights after one step equal those of the algorithm written out plainly."""
    flags = ("--n-critic", 3, "--gp-weight", 10, "--decay-steps", 0)
    model, data = model_and_data(*flags, "--kernels", kernels)
    plain, _ = model_and_data(*flags)
    g, d = plain.generator, plain.critic
    # plain descent: Adam would enlarge the rounding of a gradient that cancels to zero
    model.optimizer_g, model.optimizer_d, *optimizers = (
        torch.optim.SGD(net.parameters(), 0.01) for net in (model.generator, model.critic, g, d)
    )

    torch.manual_seed(7)
    losses = step(model, data)
    torch.manual_seed(7)
    total, penalties = 0, 0
    for i in range(3):
        x, fake = data.train[16 * i : 16 * (i + 1)], g(torch.randn(16, 2)).detach()
        epsilon = torch.rand(16, 1)
        between = (epsilon * x + (1 - epsilon) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(d(between).sum(), between, create_graph=True)
        penalty = ((slope.norm(dim=1) - 1) ** 2).mean()
        loss = d(fake).mean() - d(x).mean() + 10 * penalty
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        total, penalties = total + loss.item() / 3, penalties + penalty.item() / 3
    loss_g = -d(g(torch.randn(16, 2))).mean()
    optimizers[0].zero_grad()
    loss_g.backward()
    optimizers[0].step()

    assert model.kernels == kernels
    named = {"loss_critic": total, "loss_generator": loss_g.item(), "penalty": penalties}
    assert {k: loss.item() for k, loss in losses.items()} == pytest.approx(named, rel=1e-4)
    for ours, theirs in ((model.generator, g), (model.critic, d)):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            assert torch.allclose(p, q, atol=1e-5)


def test_initial_weights_are_the_authors():
    """Uniform, with the variance of each kind of layer; biases are zero; strides thin out fans."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(64, 128, 5, 2), torch.nn.ConvTranspose2d(128, 64, 5, 2)
    first, second = wgan_gp.initialise(layers)
    (dense,) = wgan_gp.initialise([torch.nn.Linear(256, 512)])
    (points,) = wgan_gp.initialise([torch.nn.Linear(256, 512)], points=True)
    wanted = 4 / ((64 + 128 / 4) * 25), 4 / ((128 / 4 + 64) * 25), 2 / (256 + 512), 2 / 256
    for layer, variance in zip((first, second, dense, points), wanted):
        assert layer.weight.var().item() == pytest.approx(variance, rel=0.02)
        assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(3 * variance), rel=0.01)
        assert not layer.bias.any()


def test_flags_of_the_penalty_do_not_go_with_clip(capsys):
    for flags in (["--gp-weight", "5"], ["--betas", "0", "0.9"]):
        flags = ["--dataset", "8gaussians", "--clip", "0.01", *flags, "--out", "run"]
        assert "--clip has no penalty" in refused_by(wgan_gp, capsys, *flags)


def test_optimizers_are_the_papers():
    model, _ = model_and_data(shape=(1, 28, 28))
    for optimizer in (model.optimizer_g, model.optimizer_d):
        assert isinstance(optimizer, torch.optim.Adam)
        assert optimizer.defaults["lr"].item() == pytest.approx(1e-4)
        assert optimizer.defaults["betas"] == (0.0, 0.9)


def test_no_gradient_reaches_the_generator_in_critic_updates():
    model, data = model_and_data("--kernels", "reference")
    seen, graphs = [], []
    model.optimizer_d.register_step_pre_hook(
        lambda *_: seen.append([p.grad for p in model.generator.parameters()])
    )
    model.generator.register_forward_hook(
        lambda net, noise, out: graphs.append((len(out), out.requires_grad))
    )
    step(model, data)
    assert graphs == [(16, False)] * 5 + [(16, True)]
    assert len(seen) == 5 and all(grad is None for grads in seen for grad in grads)
    assert all(p.grad is not None for p in model.generator.parameters())


def test_generator_update_leaves_no_gradient_in_the_critic():
    """What the critic's weights hold after the whole step is what its own last update used."""
    model, data = model_and_data()
    used, critic = {}, model.critic
    model.optimizer_d.register_step_pre_hook(
        lambda *_: used.update({name: p.grad.clone() for name, p in critic.named_parameters()})
    )
    step(model, data)
    assert len(used) == 8
    assert all(torch.equal(p.grad, used[name]) for name, p in critic.named_parameters())


def test_penalty_is_taken_on_one_point_between_each_pair():
    """One epsilon serves all pixels of a sample."""
    model, data = model_and_data("--n-critic", 1, "--kernels", "reference", shape=(1, 28, 28))
    batches, between = [], []
    model.critic.register_forward_hook(lambda net, x, out: batches.append(x[0].detach()))
    penalty = model.gradient_penalty
    model.gradient_penalty = lambda critic, x: between.append(x) or penalty(critic, x)
    step(model, data)
    assert [len(batch) for batch in batches] == [16] * 4  # fake, real, between, and G's
    fake, real = batches[:2]
    assert torch.allclose(real, data.train[:16] / 255, atol=1e-6)
    epsilon = ((between[0] - fake) / (real - fake)).flatten(1)
    middle = epsilon.nanmedian(dim=1).values
    want = torch.lerp(fake, real, middle.view(-1, 1, 1, 1))
    assert torch.allclose(between[0], want, atol=1e-4)
    assert middle.min() >= 0 and middle.max() <= 1 and len(middle.unique()) == 16


def test_clip_is_the_original_wgan():
    model, data = model_and_data("--clip", 0.03)
    model.gradient_penalty = None  # not called
    assert isinstance(model.optimizer_d, torch.optim.RMSprop) and model.args.lr == 5e-5
    losses = step(model, data)
    assert losses["penalty"] == 0 and all(loss.isfinite() for loss in losses.values())
    weights = torch.cat([p.flatten() for p in model.critic.parameters()])
    assert weights.abs().max() <= 0.03 and (weights.abs() == torch.tensor(0.03)).sum() > 10


@pytest.mark.parametrize("clip", [[], ["--clip", 0.1]])
def test_learning_rate_falls_to_zero_over_the_decay_steps(clip):
    model, data = model_and_data("--decay-steps", 4, "--lr", 0.1, "--n-critic", 2, *clip)
    rates = {optimizer: [] for optimizer in model.optimizers}
    for optimizer in model.optimizers:
        optimizer.register_step_post_hook(
            lambda of, *_: rates[of].append(float(of.param_groups[0]["lr"]))
        )
    for _ in range(5):
        step(model, data)
    assert np.allclose(rates[model.optimizer_g], [0.1, 0.075, 0.05, 0.025, 0])
    assert np.allclose(rates[model.optimizer_d], [*np.arange(8, 0, -1) / 80, 0, 0])


def test_learning_rate_stays_without_decay():
    model, data = model_and_data("--decay-steps", 0, "--lr", 0.1)
    for _ in range(3):
        step(model, data)
    assert all(o.param_groups[0]["lr"] == torch.tensor(0.1) for o in model.optimizers)


def test_residual_networks_draw_twice_the_batch_for_g_and_see_spread_grey_values():
    flags = ("--network", "resnet", "--n-critic", 2, "--batch-size", 2)
    model, data = model_and_data(*flags, shape=(3, 32, 32), n=8)
    (real,) = model.batch(data, torch.arange(4))
    grey = (data.train[:4].float() / 255) * (255 / 256) * 2 - 1
    assert (real - grey).min() >= -1e-6 and (real - grey).max() <= 1 / 128 + 1e-6
    assert len((real - grey).mul(1000).round().unique()) > 5
    seen = []
    model.generator.register_forward_hook(lambda net, z, out: seen.append(len(out)))
    wgan_gp.train_step(model, real)
    assert seen == [2, 2, 4]


def test_flags_left_out_suit_the_data():
    mnist = settings((1, 28, 28))
    assert (mnist.batch_size, mnist.dim, mnist.noise, mnist.lr) == (50, 64, 128, 1e-4)
    assert (mnist.betas, mnist.gp_weight, mnist.n_critic, mnist.epochs) == ([0, 0.9], 10, 5, 50)
    assert mnist.decay_steps == 0
    assert settings((3, 64, 64)).dim == 64 and settings((3, 64, 64)).batch_size == 64
    resnet = settings((3, 32, 32), "--network", "resnet")
    assert (resnet.lr, resnet.decay_steps, resnet.dim) == (2e-4, 100_000, 128)
    points = settings((2,), "--dim", 512)
    assert (points.dim, points.lr, points.gp_weight, points.noise) == (512, 2e-3, 0.1, 2)
    assert (points.betas, points.batch_size, points.epochs) == ([0.5, 0.9], 256, 20)
    clip = settings((2,), "--clip", 0.01)
    assert (clip.lr, clip.decay_steps) == (5e-5, 0)


def test_rate_of_points_falls_to_0_over_the_run():
    model, data = model_and_data("--epochs", 2, "--n-critic", 2, "--lr", 0.1)  # of 6 updates each
    rates = []
    model.optimizer_g.register_step_post_hook(
        lambda of, *_: rates.append(float(of.param_groups[0]["lr"]))
    )
    for _ in range(12):
        step(model, data)
    assert np.allclose(rates, 0.1 * np.arange(12, 0, -1) / 12)


@pytest.mark.parametrize("shape, network", SHAPES)
def test_flags_that_are_given_stay(shape, network):
    given = {"lr": 0.0, "betas": [0.0, 0.0], "gp_weight": 0.0, "noise": 1, "dim": 3}
    given |= {"batch_size": 2, "epochs": 1, "decay_steps": 0, "n_critic": 1}
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    words = " ".join(flags).replace("[", "").replace("]", "").replace(",", "").split()
    args = vars(settings(shape, *network, *words))
    assert {name: args[name] for name in given} == given


@pytest.mark.parametrize("shape", [(2,), (1, 28, 28), (3, 64, 64)])
def test_residual_networks_are_for_their_size_alone(shape):
    with pytest.raises(wgan_gp.UsageError, match="32x32"):
        settings(shape, "--network", "resnet")


@NO_GPU
@pytest.mark.parametrize("flags", [[], ["--clip", 0.01], ["--clip", 0.01, "--decay-steps", 9]])
def test_step_does_not_synchronise(flags):
    model, data = model_and_data(*flags, device="cuda")
    (real,) = model.batch(data, torch.arange(model.samples_per_step, device="cuda"))
    for _ in range(2):
        wgan_gp.train_step(model, real)
    torch.cuda.set_sync_debug_mode("error")
    try:
        wgan_gp.train_step(model, real)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------ networks
def linear(i, o):
    return i * o + o


def conv(i, o, k=5):
    return k * k * i * o + o


def test_networks_have_the_sizes_of_the_authors():
    sizes = {}
    for shape, flags in SHAPES:
        g, d = networks(shape, *(["--dim", 512] if shape == (2,) else []), *flags)
        sizes[shape, *flags] = parameters(g), parameters(d)
    hidden = 2 * linear(512, 512)
    assert sizes[(2,),] == (
        linear(2, 512) + hidden + linear(512, 2),
        linear(2, 512) + hidden + linear(512, 1),
    )
    trunk = conv(64, 128) + conv(128, 256)
    assert sizes[(1, 28, 28),] == (
        linear(128, 4096) + trunk - 256 - 128 + 128 + 64 + conv(64, 1),
        conv(1, 64) + trunk + linear(4096, 1),
    )
    assert sizes[(3, 32, 32),][1] == (
        conv(3, 128) + conv(128, 256) + conv(256, 512) + linear(8192, 1)
    )
    assert sizes[(3, 64, 64),][1] == (conv(3, 64) + trunk + conv(256, 512) + linear(8192, 1))
    plain = 2 * conv(128, 128, 3)
    assert sizes[(3, 32, 32), "--network", "resnet"] == (
        linear(128, 2048) + 3 * (plain + conv(128, 128, 1) + 4 * 128) + 2 * 128 + conv(128, 3, 3),
        conv(3, 128, 3) + conv(128, 128, 3) + conv(3, 128, 1)
        + 3 * plain + conv(128, 128, 1) + linear(128, 1),
    )  # fmt: skip


@pytest.mark.parametrize("shape, flags", SHAPES)
def test_shapes_and_ranges(shape, flags):
    generator, critic = networks(shape, "--dim", 8, *flags)
    samples = wgan_gp.sample(generator.eval(), 3)
    assert samples.shape == (3, *shape) and critic(samples).shape == (3,)
    if len(shape) == 3:
        assert samples.min() >= 0 and samples.max() <= 1
        data = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
        want = [0, 1] if shape[-1] == 28 else [-1, 1]
        assert wgan_gp.normalise(data, generator.low).flatten().tolist() == pytest.approx(want)
    assert torch.equal(samples, wgan_gp.sample(generator, 3))
    assert not torch.equal(samples, wgan_gp.sample(generator, 3, seed=1))


def test_layer_norm_has_a_gain_for_each_channel_and_keeps_samples_apart():
    norm = wgan_gp.LayerNorm(6)
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
    x = torch.randn(4, 6, 3, 5)
    assert torch.allclose(norm(x), F.group_norm(x, 1, norm.weight, norm.bias), atol=1e-6)
    assert torch.allclose(norm(x)[:1], norm(x[:1]), atol=1e-6)
    y = torch.randn(4, 6)
    assert torch.allclose(norm(y), F.layer_norm(y, (6,), norm.weight, norm.bias), atol=1e-6)


# ------------------------------------------------------------------ sets of points
@pytest.mark.parametrize(
    "name, k, reach", [("8gaussians", 8, 2 / 1.414), ("25gaussians", 25, 4 / 2.828)]
)
def test_gaussians_have_the_authors_scales(name, k, reach):
    centres, sigma = wgan_gp.modes(name)
    classes, points, labels, held_out, held_out_labels = wgan_gp.gaussians(name, 20_000)
    assert points.shape == (20_000, 2) and held_out.shape == (10_000, 2) and len(classes) == k
    assert torch.bincount(labels, minlength=k).min() > 0.8 * 20_000 / k
    assert math.isclose(centres.max(), reach, rel_tol=1e-5) and len(centres.unique(dim=0)) == k
    for x, mode in ((points, labels), (held_out, held_out_labels)):
        assert math.isclose((x - centres[mode]).std(), sigma, rel_tol=0.02)
    again = wgan_gp.gaussians(name, 20_000)
    assert torch.equal(points, again[1]) and not torch.equal(points[:10_000], held_out)


def test_swiss_roll_has_the_authors_scale():
    _, points, labels, held_out, _ = wgan_gp.swiss_roll(5000)
    assert points.shape == (5000, 2) and held_out.shape == (10_000, 2) and not labels.any()
    radius = points.norm(dim=1)
    assert 1.5 * math.pi / 7.5 * 0.8 < radius.min() and radius.max() < 4.5 * math.pi / 7.5 * 1.1


def test_mode_figures():
    """Two modes of four have samples; 30 of 40 samples lie within three deviations."""
    centres = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]])
    near = torch.tensor([[0.029, 0.0]]).expand(28, 2)
    one = torch.tensor([[1.0, 0.0]]).expand(1, 2)
    far = torch.tensor([[0.5, 0.5], [0.031, 0.0]]).repeat(5, 1)
    figures = wgan_gp.mode_figures(torch.cat([near, one, one, far]), centres, 0.01)
    assert figures == {"modes_covered": 2, "modes_total": 4, "share_within_3_sigma": 0.75}
    # one sample of 40 is a tenth of the equal share of 10; of 41 it is less
    figures = wgan_gp.mode_figures(torch.cat([near, one, far, far[:2]]), centres, 0.01)
    assert figures["modes_covered"] == 1


def test_real_samples_have_the_best_figures(device):
    _, points, *_ = wgan_gp.gaussians("25gaussians", 10_000)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        figures = wgan_gp.mode_figures(points.to(device), *wgan_gp.modes("25gaussians"))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    # a normal draw in the plane lies within three deviations with probability 1 - exp(-9/2)
    assert figures["modes_covered"] == 25
    assert abs(figures["share_within_3_sigma"] - (1 - math.exp(-4.5))) < 0.005


# ------------------------------------------------------------------ measurements
def test_evaluation_of_a_known_critic():
    """Critic D(x) = 3 a - 4 b: the distance is that of the means, the gradient norm is 5."""
    model, data = model_and_data()
    w = torch.tensor([3.0, -4.0])
    model.critic.forward = lambda x: x @ w
    model.generator.forward = lambda z: 0 * z
    data = data._replace(test=data.train[:50] + 1)
    figures = wgan_gp.evaluate(model, data)
    train = data.train[torch.arange(50) * 200 // 50].mean(dim=0) @ w
    assert figures["wasserstein_train"] == pytest.approx(train.item(), abs=1e-4)
    heldout = data.test.mean(dim=0) @ w
    assert figures["wasserstein_heldout"] == pytest.approx(heldout.item(), abs=1e-4)
    assert figures["gradient_norm"] == pytest.approx(5)


@pytest.mark.parametrize("shape, flags", SHAPES)
def test_evaluation_on_a_single_held_out_sample(shape, flags):
    model, data = model_and_data("--dim", 4, *flags, shape=shape)
    data = data._replace(test=data.test[:1], test_labels=data.test_labels[:1])
    figures = wgan_gp.evaluate(model.eval(), data)
    assert list(figures) == ["wasserstein_train", "wasserstein_heldout", "gradient_norm"]
    assert all(isinstance(value, float) and math.isfinite(value) for value in figures.values())


def test_measuring_leaves_the_training_draws_alone():
    model, data = model_and_data(shape=(1, 28, 28))
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    wgan_gp.evaluate(model, data)
    wgan_gp.save_samples(model, Path("a"))
    assert torch.equal(torch.rand(3), want)


# ------------------------------------------------------------------ whole runs
POINTS = ["--dataset", "8gaussians", "--device", "cpu", "--kernels", "reference", "--dim", "16"]
POINTS += ["--batch-size", "40", "--epochs", "2", "--log-every", "4"]


def fewer_points(patch):
    patch.setitem(wgan_gp.SETS, "8gaussians", lambda: wgan_gp.gaussians("8gaussians", 2000))


@pytest.fixture
def few_points(monkeypatch):
    """For tests that look at weights alone."""
    fewer_points(monkeypatch)
    without_figures(wgan_gp, monkeypatch.setattr)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs of ten updates on points, with a row every four updates."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        fewer_points(patch)
        wgan_gp.main([*POINTS, "--out", str(folder)])
    return folder


def summary(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


refused = functools.partial(refused_by, wgan_gp)


def test_run_folder(finished):
    assert {path.name for path in finished.iterdir()} - {".lock"} == {
        "samples", "levels.png", "curves.png", "metrics.csv", "config.json", "summary.json",
        "checkpoint.pt",
    }  # fmt: skip
    assert [p.name for p in (finished / "samples").iterdir()] == ["0000020.png"]
    for picture in finished.rglob("*.png"):
        with Image.open(picture) as image:
            assert np.asarray(image).std() > 1  # not blank


def test_metrics_and_summary(finished):
    header = (finished / "metrics.csv").read_text().splitlines()[0]
    assert header == (
        "step,epoch,seconds,loss_critic,loss_generator,penalty,"
        "wasserstein_train,wasserstein_heldout,gradient_norm"
    )
    table = rows(finished)
    assert [int(row["step"]) for row in table] == [4, 8, 12, 16, 20]
    for name in ("wasserstein_train", "wasserstein_heldout", "gradient_norm"):
        assert [bool(row[name]) for row in table] == [False] * 4 + [True]
    figures = summary(finished)
    assert figures["script"] == "wgan_gp" and figures["step"] == 20
    assert figures["modes_total"] == 8 and 0 <= figures["share_within_3_sigma"] <= 1
    assert 0 <= figures["modes_covered"] <= 8
    assert {k: figures[k] for k in table[-1]} == {k: float(v) for k, v in table[-1].items()}


def test_resume_equals_uninterrupted(finished, few_points):
    """In mid-epoch; the decay of the learning rate, over the whole run, goes on too."""
    wgan_gp.main([*POINTS, "--max-steps", "7", "--out", "run"])
    wgan_gp.main(["--resume", "run/checkpoint.pt", "--max-steps", "1000"])
    assert same(weights("run"), weights(finished))


DECAYS = [["--decay-steps", "0"], ["--decay-steps", "8"]]


@pytest.mark.parametrize("clip", [[], ["--clip", "0.02"]], ids=["penalty", "clip"])
@pytest.mark.parametrize("decay", DECAYS, ids=["", "decay"])
def test_resume_with_and_without_decay(decay, clip, few_points):
    """Bit for bit; and after a decay to the end nothing moves any more."""
    flags = [*POINTS, *decay, *clip, "--epochs", "1"]
    wgan_gp.main([*flags, "--out", "a"])
    wgan_gp.main([*flags, "--out", "b", "--max-steps", "6"])
    wgan_gp.main(["--resume", "b/checkpoint.pt", "--max-steps", "1000"])
    assert same(weights("a"), weights("b"))
    wgan_gp.main([*flags, "--out", "c", "--max-steps", "9"])
    assert same(weights("a")[0], weights("c")[0]) == (decay == DECAYS[1])


def test_learning_rate_may_change_at_resume(capsys, few_points):
    wgan_gp.main([*POINTS, "--clip", "0.02", "--epochs", "1", "--max-steps", "4", "--out", "run"])
    before = weights("run")[0]
    assert "clip: the run has 0.02" in refused(capsys, "--resume", "run/checkpoint.pt", "--clip", 1)
    wgan_gp.main(["--resume", "run/checkpoint.pt", "--max-steps", "6", "--lr", "0"])
    assert same(weights("run")[0], before) and checkpoint("run")["rows"][-1]["step"] == 6
    wgan_gp.main(["--resume", "run/checkpoint.pt", "--max-steps", "8", "--lr", "0.01"])
    assert not same(weights("run")[0], before)


def test_images_run_and_resume():
    write_mnist("data", train=80, test=20)
    flags = ["--dataset", "mnist", "--dim", "4", "--batch-size", "8", "--device", "cpu"]
    flags += ["--epochs", "2", "--kernels", "reference", "--critic-norm", "layer"]
    wgan_gp.main([*flags, "--out", "a"])
    wgan_gp.main([*flags, "--out", "b", "--max-steps", "3"])
    wgan_gp.main(["--resume", "b/checkpoint.pt", "--max-steps", "1000"])
    assert same(weights("a"), weights("b")) and summary("a")["step"] == 4
    assert "modes_covered" not in summary("a") and not Path("a/levels.png").exists()


@pytest.mark.parametrize("size, flags", [(64, []), (32, ["--network", "resnet"])])
def test_colour_runs(size, flags):
    write_images("pictures", n=30)
    wgan_gp.main(
        ["--dataset", "folder", "--data-dir", "pictures", "--image-size", str(size), "--dim", "4",
         "--n-critic", "2", "--batch-size", "4", "--max-steps", "2", "--device", "cpu",
         "--out", "run", *flags]
    )  # fmt: skip
    assert summary("run")["kernels"] == "fused"
    with Image.open("run/samples/0000002.png") as image:
        assert image.size == (10 * (size + 2) + 2,) * 2


def test_modes_are_found():
    """Six hundred short updates at half the width find most of the modes."""
    flags = ["--dataset", "8gaussians", "--device", "cpu", "--max-steps", "600", "--seed", "1"]
    wgan_gp.main([*flags, "--decay-steps", "600", "--dim", "64", "--n-critic", "2", "--out", "run"])
    figures = summary("run")
    assert figures["modes_covered"] >= 6 and figures["share_within_3_sigma"] > 0.25
    assert 0.5 < figures["gradient_norm"] < 2 and figures["wasserstein_heldout"] < 0.5


def test_generate(finished):
    path = str(finished / "checkpoint.pt")
    wgan_gp.main(["--generate", path, "--out", "a.png"])
    with Image.open("a.png") as image:
        assert np.asarray(image).std() > 1
    generator = wgan_gp.load_generator(path)
    assert not generator.training and wgan_gp.sample(generator, 5).shape == (5, 2)


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch-size", 300],  # five times that is more than there are
        ["--n-critic", 0],
        ["--clip", 0],
        ["--clip", "nan"],
        ["--gp-weight", -1],
        ["--lr", "inf"],
        ["--betas", 0, 1],
        ["--betas", 0.5],
        ["--dim", 0],
        ["--noise", 0],
        ["--decay-steps", -1],
        ["--critic-norm", "batch"],
        ["--network", "resnet"],
    ],
)
def test_bad_flags(flags, capsys):
    refused(capsys, "--dataset", "digits", *flags)


def test_dequantised_grey_values_fill_the_range(monkeypatch):
    grey = torch.arange(256.0)[:, None] * 2 / 255 - 1
    low, high = [], []
    for noise, found in ((0.0, low), (1.0, high)):
        monkeypatch.setattr(
            torch, "rand", lambda shape, noise=noise, **kw: torch.full(shape, noise)
        )
        found.extend(wgan_gp.dequantise(grey))
    low, high = torch.stack(low), torch.stack(high)
    torch.testing.assert_close(low[1:], high[:-1])
    torch.testing.assert_close(torch.stack([low[0], high[-1]]), torch.tensor([[-1.0], [1.0]]))
