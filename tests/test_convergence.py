"""A hundred training steps with the kernels and with plain PyTorch stay together.

In float64 two runs, one with each, end at the same weights. In float32 two such runs part
whatever the kernels, as training amplifies the last bit; there each step starts both from the
reference's weights.
"""

import gan_kernels
import pytest
import torch
from helpers import shrink
from torch import nn

import infogan

STEPS = 100


def infogan_model(kernels, dtype, *flags):
    """Return a small model of infogan.py and random images for it, the same for all kernels."""
    torch.manual_seed(0)
    args = infogan.arguments().parse_args(["--batch-size", "16", "--kernels", kernels, *flags])
    images = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8)
    labels = torch.zeros(64, dtype=torch.int64)
    data = infogan.Data("made", ["0"], images, labels, images, labels)
    model = infogan.Model(args, data).to(dtype)
    wanted = {"fused": gan_kernels.info_loss, "reference": infogan.info_loss_reference}
    assert model.info_loss is wanted[kernels]
    return model, data


def infogan_step(model, data, step):
    """Return the losses of one update on the step's own images and random numbers."""
    torch.manual_seed(1000 + step)
    (real,) = model.batch(data, torch.randperm(64)[: model.args.batch_size])
    losses = infogan.train_step(model, real.to(next(model.parameters()).dtype))
    return torch.stack([loss.detach() for loss in losses.values()])


def weights(*networks):
    return torch.cat([p.detach().flatten() for net in networks for p in net.parameters()])


def gradient(network):
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def distance(a, b):
    return float((a - b).abs().max())


@pytest.fixture
def small(monkeypatch):
    shrink(infogan, monkeypatch.setattr)


@pytest.fixture
def double():
    """Noise and codes in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


LATENTS = [[], ["--categorical", "5", "3", "--continuous", "1", "--unit-variance"]]


@pytest.mark.parametrize("latent", LATENTS)
def test_infogan_in_float64(latent, small, double):
    (reference, data), (fused, _) = (
        infogan_model(kernels, torch.float64, *latent) for kernels in ("reference", "fused")
    )
    start = weights(reference.generator, reference.discriminator)
    for step in range(STEPS):
        want, got = (infogan_step(model, data, step) for model in (reference, fused))
        assert distance(got, want) < 1e-9
    ends = [weights(model.generator, model.discriminator) for model in (reference, fused)]
    assert distance(*ends) < 1e-9 and distance(ends[0], start) > 0.01


@pytest.mark.parametrize("latent", LATENTS)
def test_infogan_in_float32(latent, small):
    training, data = infogan_model("reference", torch.float32, *latent)
    # Their D stands still: Adam would make a step of a vanishing gradient's noise, and G see it.
    still = (*latent, "--lr-d", "0")
    probes = [infogan_model(k, torch.float32, *still)[0] for k in ("reference", "fused")]
    for step in range(STEPS):
        for probe in probes:
            probe.generator.load_state_dict(training.generator.state_dict())
            probe.discriminator.load_state_dict(training.discriminator.state_dict())
        want, got = (infogan_step(probe, data, step) for probe in probes)
        assert distance(got, want) < 1e-5
        for name in ("generator", "discriminator"):
            want, got = (gradient(getattr(probe, name)) for probe in probes)
            assert float((got - want).norm()) < 1e-5 * float(want.norm())
        infogan_step(training, data, step)


def plain_penalty(critic, x):
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (g.flatten(1).norm(dim=1) - 1).square().mean()


class Wgan:
    """A WGAN-GP of 8 x 8 images that trains its critic three times for each step of G."""

    def __init__(self, penalty, norm, dtype):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 3, 2, 1)]
        if norm:
            layers.append(nn.LayerNorm([16, 2, 2]))
        layers += [nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64, 1)]
        self.critic = nn.Sequential(*layers).to(dtype)
        self.generator = nn.Sequential(
            nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8))
        ).to(dtype)
        self.penalty, self.dtype = penalty, dtype
        adam = {"lr": 2e-3, "betas": (0.0, 0.9)}
        self.optimizers = [
            torch.optim.Adam(net.parameters(), **adam) for net in (self.critic, self.generator)
        ]

    def critic_loss(self, seed):
        """Return the critic's loss on the seed's own images."""
        rng = torch.Generator().manual_seed(seed)
        line = torch.linspace(-1, 1, 8)
        centre = torch.rand(16, 2, 1, 1, generator=rng) - 0.5
        x, y = line - centre[:, :1], line[:, None] - centre[:, 1:]
        real = (2 * torch.exp(-8 * (x**2 + y**2)) - 1).to(self.dtype)
        fake = self.generator(torch.randn(16, 4, generator=rng).to(self.dtype)).detach()
        mix = torch.rand(16, 1, 1, 1, generator=rng).to(self.dtype)
        penalty = self.penalty(self.critic, mix * real + (1 - mix) * fake)
        return self.critic(fake).mean() - self.critic(real).mean() + 10 * penalty

    def step(self, step):
        """Do one update of everything and return the critic's losses."""
        losses = []
        for i in range(3):
            losses.append(self.critic_loss(3 * step + i))
            self.optimizers[0].zero_grad()
            losses[-1].backward()
            self.optimizers[0].step()
        rng = torch.Generator().manual_seed(10_000 + step)
        score = self.critic(self.generator(torch.randn(16, 4, generator=rng).to(self.dtype)))
        self.optimizers[1].zero_grad()
        (-score.mean()).backward(inputs=list(self.generator.parameters()))
        self.optimizers[1].step()
        return torch.stack(losses).detach()


@pytest.mark.parametrize("norm", [False, True])
def test_wgan_in_float64(norm):
    reference = Wgan(plain_penalty, norm, torch.float64)
    fused = Wgan(gan_kernels.gradient_penalty, norm, torch.float64)
    start = weights(reference.critic, reference.generator)
    for step in range(STEPS):
        assert distance(fused.step(step), reference.step(step)) < 1e-9
    ends = [weights(wgan.critic, wgan.generator) for wgan in (reference, fused)]
    assert distance(*ends) < 1e-9 and distance(ends[0], start) > 0.1


@pytest.mark.parametrize("norm", [False, True])
def test_wgan_in_float32(norm):
    wgan = Wgan(plain_penalty, norm, torch.float32)
    for step in range(STEPS):
        found = []
        for penalty in (plain_penalty, gan_kernels.gradient_penalty):
            wgan.penalty = penalty
            wgan.critic.zero_grad()
            loss = wgan.critic_loss(3 * step)
            loss.backward()
            found.append((float(loss.detach()), gradient(wgan.critic)))
        (want_loss, want), (got_loss, got) = found
        assert abs(got_loss - want_loss) < 1e-5 * max(1.0, abs(want_loss))
        assert float((got - want).norm()) < 1e-5 * float(want.norm())
        wgan.penalty = plain_penalty
        wgan.step(step)
