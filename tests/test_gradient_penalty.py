"""gradient_penalty against plain double backward: same values, same gradients, same absences."""

import copy
import dataclasses
import itertools
import random
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gan_kernels import _convolution, _graph, _norm, _penalty, _rewriting, gradient_penalty
from gan_kernels._penalty import _Penalty
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

ops = torch.ops.gan_kernels


@pytest.fixture
def device(kernels):
    """Where the tensors are; conftest.py has the kernels."""
    return "cuda" if kernels == "cuda" else "cpu"


@pytest.fixture(autouse=True)
def rewrite_all(request, monkeypatch):
    """Rewrite operations of any size, but for tests of what is too small to pay."""
    if "too_small" not in request.node.name:
        for module in (_convolution, _norm, _rewriting):
            monkeypatch.setattr(module, "LEAST", 0)


def plain_penalty(critic, x, target=1.0):
    """Return (penalty, norms) by plain double backward; a zero gradient row has the norm zero."""
    x = x.detach().requires_grad_()
    scores = critic(x)
    (g,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True)
    squares = g.reshape(len(g), -1).square().sum(1)
    norms = torch.where(squares > 0, torch.where(squares > 0, squares, 1).sqrt(), 0)
    return ((norms - target) ** 2).mean(), norms.detach()


def gradients(penalty, parameters, **options):
    return torch.autograd.grad(penalty, parameters, allow_unused=True, **options)


def assert_same_gradients(got, want, tolerance):
    """Both None or both equal, within tolerance of the length of all gradients together."""
    scale = max(1e-30, sum(float(g.detach().double().norm()) for g in want if g is not None))
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            assert float((a - b).detach().double().norm()) <= tolerance * scale


def compare_third_order(first, parameters, second, twins, tolerance):
    """Differentiate the square of all gradients once more, where plain autograd can."""

    def squared(gs, parameters):
        total = sum(g.pow(2).sum() for g in gs if g is not None)
        third = gradients(total, parameters)
        return [
            torch.zeros_like(p) if g is None else g for g, p in zip(third, parameters, strict=True)
        ]

    try:
        want = squared(second, twins)
    except RuntimeError:  # batch norm, for one, has no third derivative
        return
    assert_same_gradients(squared(first, parameters), want, 10 * tolerance)


def compare(critic, x, tolerance=1e-10, target=1.0, order=2):
    """Compare one critic with its copy under plain autograd; order 3 differentiates once more."""
    twin = copy.deepcopy(critic)
    if order > 2:
        for name, layer in list(twin.named_children()):
            if isinstance(layer, nn.LayerNorm):
                setattr(twin, name, PlainLayerNorm(layer))
    parameters, twins = (
        [p for p in c.parameters() if p.requires_grad] if isinstance(c, nn.Module) else []
        for c in (critic, twin)
    )
    torch.manual_seed(3)
    try:
        want, want_norms = plain_penalty(twin, x, target)
    except RuntimeError as error:  # an in-place operation on what is still needed
        assert "inplace" in str(error)
        with pytest.raises(RuntimeError, match="inplace"):
            gradient_penalty(critic, x)
        return
    torch.manual_seed(3)
    got, norms = gradient_penalty(critic, x, target=target, return_norms=True)
    assert not norms.requires_grad
    scale = max(1.0, float(want_norms.max()))
    assert float((norms - want_norms).abs().max()) <= tolerance * scale
    assert float((got - want).detach().abs()) <= tolerance * max(1.0, float(want.detach()))
    first, second = (
        gradients(p, q, create_graph=order > 2) for p, q in ((got, parameters), (want, twins))
    )
    assert_same_gradients(first, second, tolerance)
    if order > 2:
        compare_third_order(first, parameters, second, twins, tolerance)
    for (name, a), b in zip(critic.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{name} was changed in another way"


class PlainLayerNorm(nn.Module):
    """Layer norm from its parts: the third derivative of PyTorch's own is silently wrong (2.15)."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.dims = tuple(range(-len(layer.normalized_shape), 0))

    def forward(self, x):
        centred = x - x.mean(self.dims, keepdim=True)
        variance = centred.square().mean(self.dims, keepdim=True)
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias


class Residual(nn.Module):
    def __init__(self, body, shortcut):
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x):
        y = self.shortcut(x)
        return y + self.body(x)


class Twice(nn.Module):
    """A shared submodule."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(self.body(x))


def random_convolution(pick, n, channels, out):
    kernel = pick.choice([1, 2, 3, 4, 5])
    groups = pick.choice([1, 1, 2])
    options = {"bias": pick.random() < 0.8, "groups": groups}
    if pick.random() < 0.25:
        stride = pick.choice([1, 2, 3])
        transpose = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][n - 1]
        options |= {"stride": stride, "padding": pick.randrange((kernel + 1) // 2)}
        options |= {"output_padding": pick.randrange(stride), "dilation": pick.choice([1, 1, 2])}
        layer = transpose(channels, out, kernel, **options)
    else:
        plain = [nn.Conv1d, nn.Conv2d, nn.Conv3d][n - 1]
        options["dilation"] = pick.choice([1, 1, 2])
        if pick.random() < 0.3:
            options["padding"] = pick.choice(["same", "valid"])
        else:
            options |= {"stride": pick.choice([1, 2]), "padding": pick.randrange(3)}
        modes = ["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]
        options["padding_mode"] = pick.choice(modes)
        layer = plain(channels, out, kernel, **options)
    wrap = pick.random()
    if wrap < 0.1:
        return parametrizations.spectral_norm(layer)
    if wrap < 0.2:
        return parametrizations.weight_norm(layer)
    return layer


def random_activation(pick, channels):
    inplace = pick.random() < 0.4
    return pick.choice(
        [
            lambda: nn.ReLU(inplace),
            lambda: nn.LeakyReLU(0.2, inplace),
            lambda: nn.LeakyReLU(0.1, inplace),
            lambda: nn.ReLU6(inplace),
            lambda: nn.Hardtanh(-0.5, 0.7, inplace),
            lambda: nn.PReLU(pick.choice([1, channels])),
            nn.Tanh,
            nn.Sigmoid,
            nn.Softplus,
            lambda: nn.SiLU(inplace),
            nn.GELU,
            lambda: nn.ELU(0.9, inplace),
            lambda: nn.RReLU(),
            lambda: nn.Dropout(0.3),
        ]
    )()


def random_resampling(pick, n):
    names = ["AvgPool", "MaxPool", "AdaptiveAvgPool", "AdaptiveMaxPool"]
    name = pick.choice([*names, "ReflectionPad", "ReplicationPad", "Upsample"])
    if name == "Upsample":
        mode = pick.choice(["nearest", ["linear", "bilinear", "trilinear"][n - 1]])
        return nn.Upsample(scale_factor=2, mode=mode)
    layer = getattr(nn, f"{name}{n}d")
    if "Adaptive" in name:
        return layer(pick.choice([1, 2, 3]))
    if "Pad" in name:
        return layer(1)
    options = {"ceil_mode": pick.random() < 0.5, "padding": pick.choice([0, 1])}
    return layer(pick.choice([2, 3]), stride=pick.choice([None, 1, 2]), **options)


def random_norm(pick, n, shape):
    channels = shape[1]
    return pick.choice(
        [
            lambda: nn.LayerNorm(shape[1:]),
            lambda: nn.GroupNorm(2, channels),
            lambda: [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d][n - 1](
                channels, affine=True
            ),
            lambda: [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][n - 1](channels),
        ]
    )()


def random_critic(seed):
    """Return a random critic in float64 and an input for it."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    n = pick.choice([0, 1, 2, 2, 2, 3])
    if n == 0:
        widths = [pick.choice([3, 8, 17]) for _ in range(pick.randrange(2, 5))]
        layers = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b, bias=pick.random() < 0.8), random_activation(pick, b)]
            if pick.random() < 0.3:
                layers.append(nn.LayerNorm(b))
        critic = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        return critic.double(), torch.randn(5, widths[0], dtype=torch.float64)
    x = torch.randn(3, pick.choice([1, 2, 4]), *[pick.choice([8, 9, 11])] * n)
    x = x[:, :, :5, :5] if n == 3 else x
    layers, y = [], x
    for _ in range(pick.randrange(2, 6)):
        channels = y.shape[1]
        kind = pick.random()
        if kind < 0.6:
            out = pick.choice([2, 4, 6])
            even = channels % 2 == 0
            layer = random_convolution(pick, n, channels, out) if even else None
            layer = layer or [nn.Conv1d, nn.Conv2d, nn.Conv3d][n - 1](channels, out, 3, padding=1)
        elif kind < 0.75:
            layer = random_resampling(pick, n)
        elif kind < 0.85 and channels % 2 == 0 and y[0, 0].numel() > 1:
            layer = random_norm(pick, n, y.shape)
        elif kind < 0.95:
            conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][n - 1]
            body = nn.Sequential(nn.ReLU(), conv(channels, channels, 3, padding=1), nn.ReLU(True))
            layer = pick.choice([Twice(body), Residual(body, nn.Identity())])
        else:
            layer = nn.Identity()
        try:  # a kernel that does not fit is left out
            z = layer(y)
        except RuntimeError:
            continue
        if z[0].numel() > 4000:
            continue
        layers.append(layer)
        y = z.detach()
        if pick.random() < 0.8:
            layers.append(random_activation(pick, y.shape[1]))
    critic = nn.Sequential(*layers, nn.Flatten(), nn.Linear(y[0].numel(), 1))
    if pick.random() < 0.2:  # a frozen parameter
        pick.choice(list(critic.parameters())).requires_grad_(False)
    x = x.double()
    if n == 2 and pick.random() < 0.3:
        critic, x = (c.to(memory_format=torch.channels_last) for c in (critic, x))
    return critic.double(), x


@pytest.mark.parametrize("seed", range(80))
def test_random_critics(seed, device):
    critic, x = random_critic(seed)
    compare(critic.to(device), x.to(device), 1e-10, target=[1.0, 0.0, 0.3][seed % 3])


@pytest.mark.parametrize("seed", range(0, 80, 4))
def test_random_critics_in_float32(seed, device):
    critic, x = random_critic(seed)
    compare(critic.float().to(device), x.float().to(device), 1e-5)


@pytest.mark.parametrize("seed", range(0, 80, 5))
def test_third_derivatives(seed, device):
    critic, x = random_critic(seed)
    compare(critic.to(device), x.to(device), 1e-9, order=3)


def small_critic(activation=nn.LeakyReLU, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    critic = nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1), activation(), nn.Conv2d(4, 6, 3, 2, 1), activation(),
        nn.Flatten(), nn.Linear(24, 1),
    )  # fmt: skip
    return critic.to(device, dtype), torch.randn(5, 2, 8, 8, dtype=dtype, device=device)


class Work(TorchDispatchMode):
    """Counts the floating-point operations of convolutions and matrix products."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            count = flop_registry[func._overloadpacket]
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def work_of(penalty, critic, x):
    with Work() as work:
        penalty(critic, x).backward()
    return work.total


@pytest.mark.parametrize("activation", [nn.LeakyReLU, nn.ReLU, nn.Tanh])
def test_work_is_that_of_the_floor(activation):
    """Forward, backward to the input, tangent forward, weight gradients: four times the forward."""
    critic, x = small_critic(activation)
    mlp = nn.Sequential(
        nn.Linear(9, 9), activation(), nn.Linear(9, 7), activation(), nn.Linear(7, 1)
    )
    for net, at in ((critic, x), (mlp, torch.randn(5, 9))):
        with Work() as forward, torch.no_grad():
            net(at)
        ours = work_of(gradient_penalty, net, at)
        plain = work_of(lambda *a: plain_penalty(*a)[0], net, at)
        if activation is nn.Tanh:
            assert ours <= plain
        else:  # the last layer has no tangent
            assert 3.5 * forward.total < ours <= 4 * forward.total < plain


def test_the_example_of_the_readme():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = re.findall("```python\n(import torch\n.*?)```", readme, re.DOTALL)
    torch.manual_seed(0)
    names = {}
    exec(example, names)
    critic, real = names["critic"], names["real"]
    assert all(p.grad.isfinite().all() for p in critic.parameters()) and critic[0].weight.grad.any()
    torch.testing.assert_close(names["r1"], plain_penalty(critic, real, 0.0)[0])


def test_zero_gradient_rows(device):
    critic, x = small_critic(nn.ReLU, device=device)
    with torch.no_grad():
        critic[0].bias.fill_(-1)  # a black image gives zero everywhere behind the first relu
    x[1] = 0
    x[3] = 0
    for target in (1.0, 0.0):
        critic.zero_grad()
        penalty, norms = gradient_penalty(critic, x, target=target, return_norms=True)
        assert norms[1] == norms[3] == 0 and penalty.isfinite()
        penalty.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in critic.parameters())
        compare(critic, x, target=target)
        rest = x[[0, 2, 4]]
        want = (gradient_penalty(critic, rest, target=target) * 3 + 2 * target**2) / 5
        torch.testing.assert_close(penalty, want)


def test_a_critic_whose_gradient_is_zero_everywhere(device):
    critic = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).to(device)
    with torch.no_grad():
        critic[0].bias.fill_(-100)
    penalty = gradient_penalty(critic, torch.randn(6, 3, device=device), target=2.0)
    assert float(penalty.detach()) == 4.0
    penalty.backward()
    assert all(p.grad is None or not p.grad.any() for p in critic.parameters())


def test_inplace_activation_changes_what_others_see():
    class Preactivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            h = self.first(x)
            F.leaky_relu(h, 0.2, inplace=True)  # the result is not taken
            y = h + self.second(F.relu_(h + 0.1))
            y.relu_()
            torch.relu_(y)
            F.hardtanh_(y, -3.0, 3.0)
            F.leaky_relu_(y, 0.3)
            return y.mean((1, 2, 3))

    torch.manual_seed(0)
    compare(Preactivation().double(), torch.randn(3, 2, 7, 7, dtype=torch.float64), order=3)


def test_inplace_activation_of_a_view(device):
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(2, 4, 3), nn.Linear(100, 1)

        def forward(self, x):
            y = self.first(x)
            y.flatten(1).relu_()
            return self.last(y.flatten(1))

    critic = Critic().to(device, torch.float64)
    compare(critic, torch.randn(3, 2, 7, 7, dtype=torch.float64, device=device))


class Around(nn.Module):
    """A critic around one operation."""

    def __init__(self, operation):
        super().__init__()
        self.operation, self.conv = operation, nn.Conv2d(2, 2, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        y = self.operation(self.conv(x) * self.scale).flatten(1)
        return (y.tanh() * torch.linspace(1, 2, y.shape[1]).to(y)).sum(1)


def test_every_spelling_is_exact(device):
    spellings = [
        lambda x: x.relu(), torch.relu, lambda x: x.clone().relu_(), F.relu6,
        lambda x: F.leaky_relu(input=x, negative_slope=0.3), lambda x: F.leaky_relu(x, -0.5),
        lambda x: F.leaky_relu(x.clone(), 0.0, True), lambda x: F.hardtanh(x, inplace=False),
        lambda x: F.threshold(x, 0.1, 0.0), lambda x: x.clamp(-0.5, 0.5), lambda x: x.abs(),
        lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), lambda x: F.pad(x, (1, 2)),
        lambda x: F.pad(x, (1, 2, 2, 1), "replicate"), lambda x: F.pad(x, (1, 2, 0, 1), "circular"),
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0], lambda x: torch.max_pool2d(x, 3, 1),
        lambda x: F.max_pool2d(x, 3, stride=2, dilation=2, padding=1, ceil_mode=True),
        lambda x: F.avg_pool2d(x, (2, 3), divisor_override=5), lambda x: F.avg_pool2d(x, [2], 1),
        lambda x: F.adaptive_avg_pool2d(x, (None, 3)), lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: F.adaptive_max_pool2d(x, (2, None)), lambda x: F.adaptive_max_pool2d(x, (2, 3)),
        lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[0],
        lambda x: F.avg_pool1d(x.flatten(2), 3, 2, 1),
        lambda x: F.max_pool1d(x.flatten(2), 3, 2, 1),
        lambda x: F.adaptive_avg_pool1d(x.flatten(2), 5), lambda x: F.lp_pool2d(x.abs() + 1, 2, 2),
        lambda x: F.adaptive_max_pool1d(x.flatten(2), 5), lambda x: F.interpolate(x, size=5),
        lambda x: F.prelu(x, x.new_tensor([0.3])), lambda x: x.max(dim=2).values, F.celu, F.mish,
        lambda x: F.conv2d(x, x.new_ones(6, 2, 2, 2), padding="same", dilation=3),
        lambda x: F.conv2d(input=x, weight=x.new_ones(6, 2, 2, 2), stride=(2,), padding="valid"),
        lambda x: F.conv_transpose2d(x, x.new_ones(2, 3, 3, 3), stride=2, output_padding=1),
        lambda x: F.conv2d(x[0], x.new_ones(3, 2, 3, 3)).mean() + x,  # unbatched
        lambda x: F.pixel_unshuffle(x[..., :6, :6], 3), lambda x: torch.cat([x, x.flip(2)], 1),
    ]  # fmt: skip
    for seed, spelling in enumerate(spellings):
        torch.manual_seed(seed)
        critic = Around(spelling).to(device, torch.float64)
        compare(critic, torch.randn(3, 2, 7, 7, dtype=torch.float64, device=device))


def test_each_rewriting_is_met_by_a_critic_of_the_benchmark(monkeypatch):
    """Of spellings of one operation it need be one; what only works in place is such a spelling."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    from critics import CRITICS

    forms = _convolution.CONVOLUTIONS | _norm.NORMS | _rewriting.PIECEWISE_LINEAR
    rewrite, met = _rewriting.Rewriting._rewritten, set()

    def noted(self, func, *args):
        y = rewrite(self, func, *args)
        met.update([forms[func]] if y is not NotImplemented else [])
        return y

    monkeypatch.setattr(_rewriting.Rewriting, "_rewritten", noted)
    for make in CRITICS.values():
        critic, shape = make(True)
        x = torch.randn(shape, requires_grad=True)
        with _rewriting.Rewriting(_graph.Asked(x)):
            critic(x)
    in_place = {torch.relu_, torch.Tensor.relu_, F.leaky_relu_}
    assert {form for function, form in forms.items() if function not in in_place} == met


def test_several_inputs_and_a_branch_beside_the_path(device):
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(3, 4)
            self.side = nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(0.2), nn.Linear(5, 5))
            self.body = nn.Linear(6, 5)
            self.late = nn.Linear(4, 1)
            self.unused = nn.Linear(2, 2)
            self.head = nn.Linear(5, 1)

        def forward(self, x, label):
            e = self.embedding(label)
            h = F.leaky_relu(self.body(x) + self.side(e), 0.2)
            return self.head(h) + F.relu(self.late(e))

    torch.manual_seed(0)
    critic = Conditional().to(device, torch.float64)
    x = torch.randn(4, 6, device=device, dtype=torch.float64)
    label = torch.tensor([0, 2, 1, 1], device=device)
    parameters = list(critic.parameters())
    got = gradients(gradient_penalty(lambda v: critic(v, label), x), parameters)
    want = gradients(plain_penalty(lambda v: critic(v, label), x)[0], parameters)
    assert_same_gradients(got, want, 1e-12)
    assert any(g is None for g in want) and any(g is not None and not g.any() for g in want)


def test_backward_accumulates_like_plain(device):
    critic, x = small_critic(device=device)
    twin = copy.deepcopy(critic)
    for net, penalty in ((critic, gradient_penalty), (twin, lambda *a: plain_penalty(*a)[0])):
        loss = net(x + 1).mean() - net(x).mean() + 10 * penalty(net, x)
        loss.backward()
        penalty(net, x * 2).backward()
    for p, q in zip(critic.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def test_the_graph_can_be_kept(device):
    critic, x = small_critic(device=device)
    parameters = list(critic.parameters())
    penalty = gradient_penalty(critic, x)
    first = gradients(penalty, parameters, retain_graph=True)
    second = gradients(2 * penalty, parameters)
    assert_same_gradients([None if g is None else g * 2 for g in first], second, 1e-14)
    with pytest.raises(RuntimeError):
        gradients(penalty, parameters)


def test_x_is_detached_and_the_module_unchanged(device):
    critic, x = small_critic(device=device)
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    x.requires_grad_()
    gradient_penalty(critic, x * 1).backward()
    assert x.grad is None
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    assert type(critic[0]) is nn.Conv2d and critic[0].forward.__func__ is nn.Conv2d.forward


def test_inside_no_grad(device):
    critic, x = small_critic(device=device)
    want, norms = gradient_penalty(critic, x, return_norms=True)
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            got, same = gradient_penalty(critic, x, return_norms=True)
        assert not got.requires_grad
        torch.testing.assert_close(got, want.detach())
        torch.testing.assert_close(same, norms)


def test_a_critic_with_no_grad_inside(device):
    body, x = small_critic(device=device)
    fixed = copy.deepcopy(body)

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, x):
            with torch.no_grad():
                weight = fixed(x).sigmoid()
            return self.body(x) * weight

    compare(Critic(), x)


def test_hooks_scripts_and_distributed(device, tmp_path):
    critic, x = small_critic(device=device)
    parameters = list(critic.parameters())
    want = gradients(plain_penalty(critic, x)[0], parameters)
    with torch.autograd.graph.save_on_cpu():
        assert_same_gradients(gradients(gradient_penalty(critic, x), parameters), want, 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        scripted = torch.jit.script(critic)
    assert_same_gradients(gradients(gradient_penalty(scripted, x), parameters), want, 1e-12)
    twin = copy.deepcopy(critic)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        for net, penalty in ((critic, gradient_penalty), (twin, lambda *a: plain_penalty(*a)[0])):
            parallel = nn.parallel.DistributedDataParallel(net)
            (penalty(parallel, x) + parallel(x).mean()).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert_same_gradients([p.grad for p in parameters], [p.grad for p in twin.parameters()], 1e-12)


class Saving(nn.Module):
    """A critic whose first layers are computed again in the backward pass."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, x):
        return self.critic[2:](checkpoint(self.critic[:2], x, use_reentrant=False))


def test_checkpointed_regions(device):
    critic, x = small_critic(device=device)
    compare(Saving(critic), x)


class Ensemble(nn.Module):
    """The mean score of several perceptrons by torch.func, their first layer on x itself."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 5, 4))
        self.slopes, self.last = nn.Parameter(torch.rand(3, 1)), nn.Parameter(torch.randn(3, 5))

    def forward(self, x):
        one = lambda w, s, v: F.prelu(F.linear(x, w), s) @ v  # noqa: E731
        return torch.func.vmap(one)(self.first, self.slopes, self.last).mean(0)


class Slope(nn.Module):
    """A score of the derivative of a convolutional network by torch.func.grad."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 3)

    def forward(self, x):
        inner = lambda v: F.leaky_relu(self.conv(v), 0.3).tanh().sum()  # noqa: E731
        return torch.func.grad(inner)(x).flatten(1).square().sum(1)


@pytest.mark.parametrize("kind", [Ensemble, Slope])
def test_transforms_inside_the_critic(kind, device):
    torch.manual_seed(1)
    x = torch.randn(6, 4) if kind is Ensemble else torch.randn(6, 1, 9)
    compare(kind().to(device, torch.float64), x.to(device, torch.float64))


def test_attention_in_its_default_form(device):
    """Plain double backward needs the mathematical form; here it is used without being asked."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).to(device, torch.float64)
    critic = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 1)).to(device, torch.float64)
    x = torch.randn(4, 3, 8, dtype=torch.float64, device=device)
    parameters = list(critic.parameters())
    got = gradients(gradient_penalty(critic, x), parameters)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        want = gradients(plain_penalty(critic, x)[0], parameters)
    assert_same_gradients(got, want, 1e-10)


def test_attention_in_a_critic_that_was_too_small_before(device):
    """Both have the same code, a lambda's, by which is remembered that it runs plainly."""
    small = nn.Sequential(nn.Flatten(), nn.Linear(24, 1))
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    for critic in (small, small, nn.Sequential(layer, *small)):
        critic.to(device)
        gradient_penalty(lambda v: critic(v), torch.randn(4, 3, 8, device=device)).backward()  # noqa: B023


def test_two_threads_leave_the_settings_of_the_process(device):
    """The first to come is the first to go."""
    import torch._dynamo.eval_frame as dynamo

    first, second, gone = (threading.Event() for _ in range(3))
    net, x = nn.Linear(3, 1).to(device), torch.randn(4, 3, device=device)

    def critic_a(v):
        first.set()
        assert second.wait(30)
        return net(v)

    def critic_b(v):
        second.set()
        assert gone.wait(30)
        assert dynamo._stance.stance == "force_eager"
        assert not torch.backends.cuda.flash_sdp_enabled()
        return net(v)

    before = dynamo._stance, torch.backends.cuda.flash_sdp_enabled()
    with ThreadPoolExecutor(2) as pool:
        a = pool.submit(gradient_penalty, critic_a, x)
        assert first.wait(30)
        b = pool.submit(gradient_penalty, critic_b, x)
        a.result()
        gone.set()
        b.result()
    assert (dynamo._stance, torch.backends.cuda.flash_sdp_enabled()) == before == (before[0], True)


def test_products_called_with_keywords(device):
    w = nn.Parameter(torch.randn(4, 8, 2, dtype=torch.float64, device=device))
    x = torch.randn(4, 3, 8, dtype=torch.float64, device=device)
    for product in (
        lambda v: torch.matmul(input=v, other=w),
        lambda v: torch.bmm(input=v, mat2=w),
    ):
        critic = lambda v, product=product: F.relu(product(v)).square().sum((1, 2))  # noqa: E731
        got, want = gradient_penalty(critic, x), plain_penalty(critic, x)[0]
        assert_same_gradients(gradients(got, [w]), gradients(want, [w]), 1e-10)


def test_x_as_the_weight_of_an_operation(device):
    """Of a convolution over fixed images, as in cross-correlation, and of a layer norm."""
    image = nn.Parameter(torch.randn(8, 3, 9, 9, dtype=torch.float64, device=device))
    x = torch.randn(4, 3, 3, 3, dtype=torch.float64, device=device)
    for critic in (
        lambda v: F.conv2d(image, v).square().mean((0, 2, 3)) + v.flatten(1).sum(1),
        lambda v: F.layer_norm(image[:4, :, :3, :3], v.shape, v).square().flatten(1).sum(1),
    ):
        got, want = gradient_penalty(critic, x), plain_penalty(critic, x)[0]
        torch.testing.assert_close(got, want)
        assert_same_gradients(gradients(got, [image]), gradients(want, [image]), 1e-10)


def test_sparse_tables_and_nodes_with_a_variable_of_their_own(device):
    """A sparse gradient stays sparse; a Function may keep what it likes in ctx.variable."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.variable = 3
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    table = nn.Embedding(10, 16, sparse=True).to(device)
    body, head = nn.Linear(6, 16).to(device), nn.Linear(16, 1).to(device)
    index = torch.arange(4, device=device)

    def critic(v):
        return head(F.relu(Scale.apply(body(v)) + table(index)))

    (gradient_penalty(critic, torch.randn(4, 6, device=device)) + table(index).sum()).backward()
    assert table.weight.grad.is_sparse


def test_autocast_of_prelu(device):
    """It answers in the precision of PyTorch's own, whatever the input's."""
    layer, slope = nn.Conv2d(3, 4, 3).to(device), nn.PReLU(4).to(device)

    def critic(v):
        with torch.autocast(device, torch.bfloat16):
            found.extend([slope(layer(v)), slope(layer(v).float())])
        return (found[-1] + found[-2]).float().flatten(1).sum(1)

    found, x = [], torch.randn(2, 3, 8, 8, device=device)
    gradient_penalty(critic, x).backward()
    critic(x)
    assert [y.dtype for y in found[:2]] == [y.dtype for y in found[2:]]


def test_slopes_that_do_not_fit_the_channels(device):
    slope, head = nn.PReLU(3).to(device), nn.Linear(8, 1).to(device)
    with pytest.raises(RuntimeError, match="parameter"):
        gradient_penalty(lambda v: head(slope(v[:, None])[:, 0]), torch.randn(4, 8, device=device))


def test_classes_that_are_not_in_the_batch(device):
    """A norm, or a layer without outputs, may see nothing."""

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.nothing = nn.Linear(4 * 64, 0)

        def forward(self, x):
            y = self.body(x)
            y = torch.cat([y, self.norm(y[:0])]).flatten(1)
            return y.sum(1) + self.nothing(y).sum(1)

    critic = Critic().to(device, torch.float64)
    compare(critic, torch.randn(3, 2, 8, 8, dtype=torch.float64, device=device))


def test_forward_mode_inside_the_critic(device):
    """A critic that scores a slope along a direction, which torch.autograd.forward_ad finds."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 1))
    net.to(device, torch.float64)

    def critic(v):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(v, torch.ones_like(v))
            return torch.autograd.forward_ad.unpack_dual(net(dual)).tangent

    x = torch.randn(3, 2, 8, 8, dtype=torch.float64, device=device)
    wanted = [*net.parameters()][:3]  # the slope does not depend on the last bias
    got = torch.autograd.grad(gradient_penalty(critic, x), wanted)
    assert_same_gradients(got, torch.autograd.grad(plain_penalty(critic, x)[0], wanted), 1e-10)


def test_a_bias_may_be_written_before_the_backward_pass(device):
    """Nothing needs its values, and plain autograd does not save it."""
    critic = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(144, 1)
    )
    critic.to(device)
    penalty = gradient_penalty(critic, torch.randn(3, 2, 8, 8, device=device))
    with torch.no_grad():
        critic[0].bias.zero_()
        critic[1].bias.zero_()
    penalty.backward()


def test_in_place_on_the_input_is_refused_before_it_is_written(device):
    x = torch.randn(4, 6, device=device)
    before, net = x.clone(), nn.Linear(6, 1).to(device)
    of_a_view = lambda v: F.leaky_relu(v.view(2, 12), 0.1, True).view(4, 6)  # noqa: E731
    for in_place in (F.relu_, lambda v: F.leaky_relu(v, 0.1, True), of_a_view):
        with pytest.raises(RuntimeError, match="in-place"):
            gradient_penalty(lambda v, f=in_place: net(f(v)), x)
        assert torch.equal(x, before)


def test_sizes_as_numpy_integers(device):
    two = np.int64(2)
    net = nn.Sequential(nn.MaxPool2d(two), nn.AvgPool2d(two), nn.Flatten(), nn.Linear(12, 1))
    compare(net.to(device, torch.float64), torch.randn(4, 3, 8, 8, device=device).double())


def test_where_there_are_no_kernels():
    """The meta device, which stands for other accelerators."""
    net = nn.Linear(3, 1, device="meta")
    assert gradient_penalty(net, torch.randn(4, 3, device="meta")).shape == ()


def test_what_is_too_small_runs_plainly(device):
    """Bit for bit, and after one look without looking again."""
    critic, x = small_critic(dtype=torch.float32, device=device)
    parameters = list(critic.parameters())
    with _rewriting.Rewriting(_graph.Asked(x)) as rewriting:
        critic(x.requires_grad_())
    assert not rewriting.changed
    first, second = (gradients(gradient_penalty(critic, x), parameters) for _ in range(2))
    assert _penalty._unchanged[critic] == [x.shape, 1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)
    assert_same_gradients(first, gradients(plain_penalty(critic, x)[0], parameters), 1e-6)
    gradient_penalty(critic, torch.cat([x, x]))
    assert _penalty._unchanged[critic] == [torch.Size([2 * len(x), *x.shape[1:]]), 0]


@pytest.mark.parametrize(("width", "pays"), [(256, False), (1024, True)])
def test_a_relu_with_too_small_a_layer_below_it(width, pays, device):
    """Where the relu below is left alone, zeros of its own go down: only what is between counts."""
    below, last = nn.Linear(1560, 256), nn.Linear(width, 1)
    critic = nn.Sequential(below, nn.ReLU(), nn.Linear(256, width), nn.ReLU(), last).to(device)
    x = torch.randn(48 if device == "cpu" else 4800, 1560, device=device, requires_grad=True)
    with _rewriting.Rewriting(_graph.Asked(x)) as rewriting:
        critic(x)
    assert len(rewriting.silenced) == pays


@dataclasses.dataclass
class Scaled:
    """A critic that has no hash, and so cannot be remembered by itself."""

    factor: float

    def __call__(self, x):
        return self.factor * x.square().sum(1)


def test_a_critic_without_a_hash(device):
    x = torch.randn(4, 3, dtype=torch.float64, device=device)
    want, _ = plain_penalty(Scaled(1.5), x)
    for _ in range(2):
        torch.testing.assert_close(gradient_penalty(Scaled(1.5), x), want)


def test_what_is_refused_is_refused_clearly(device):
    critic, x = small_critic(device=device)
    weight = critic[5].weight.detach()
    functional = torch.func.functional_call
    with pytest.raises(RuntimeError, match="requires_grad_"):
        torch.func.grad(
            lambda w: gradient_penalty(lambda v: functional(critic, {"5.weight": w}, (v,)), x)
        )(weight)


def test_compiled_critic(device):
    critic, x = small_critic(device=device)
    want = gradients(gradient_penalty(critic, x), list(critic.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(critic, backend="aot_eager")
    compiled(x)
    got = gradients(gradient_penalty(compiled, x), list(critic.parameters()))
    assert_same_gradients(got, want, 1e-12)


def test_compiled_caller(device):
    critic, x = small_critic(device=device)
    want = gradients(gradient_penalty(critic, x * 2), list(critic.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: gradient_penalty(critic, x * 2) * 3, backend="aot_eager")
    got = gradients(compiled(x) / 3, list(critic.parameters()))
    assert_same_gradients(got, want, 1e-12)


@pytest.mark.parametrize("outside", [False, True])
def test_autocast(outside, device):
    critic, x = small_critic(dtype=torch.float32, device=device)
    twin = copy.deepcopy(critic)

    def within(net):
        def call(x):
            with torch.autocast(device, torch.bfloat16):
                return net(x)

        return call

    with torch.autocast(device, torch.bfloat16, enabled=outside):
        got = gradient_penalty(within(critic), x)
        want = plain_penalty(within(twin), x)[0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-3)
    got, want = (gradients(v, list(c.parameters())) for v, c in ((got, critic), (want, twin)))
    assert_same_gradients(got, want, 2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, device):
    critic, x = small_critic(dtype=dtype, device=device)
    penalty, norms = gradient_penalty(critic, x, return_norms=True)
    assert penalty.dtype == norms.dtype == torch.float32
    want = plain_penalty(critic.float(), x.float())[0]
    torch.testing.assert_close(penalty, want, rtol=5e-2, atol=1e-2)


def test_bad_arguments(device):
    critic, x = small_critic(device=device)
    for kind, wrong in ((TypeError, x.long()), (TypeError, None), (ValueError, x[:0])):
        with pytest.raises(kind, match="gradient_penalty: x"):
            gradient_penalty(critic, wrong)
    with pytest.raises(ValueError, match="gradient_penalty: x"):
        gradient_penalty(critic, x.sum())
    for wrong in (
        lambda x: critic(x).mean(),
        lambda x: critic(x)[1:],
        lambda x: critic(x).expand(-1, 2),
        lambda x: [critic(x)],
    ):
        with pytest.raises(ValueError, match="critic"):
            gradient_penalty(wrong, x)
    for wrong, advice in (
        (lambda x: (critic(x), x), r"critic\(x\)\[0\]"),
        (lambda x: critic(x)[..., None, None].expand(-1, 1, 4, 4), r"flatten\(1\)\.mean\(1\)"),
        (lambda x: critic(x).view(-1, 2).sum(1), "a pack a row"),
    ):
        with pytest.raises(ValueError, match=advice):
            gradient_penalty(wrong, torch.cat([x, x]))
    with pytest.raises(TypeError, match="close over"):
        gradient_penalty(critic, (x, x))
    for constant in (lambda x: x.new_ones(len(x)), lambda x: critic(torch.ones_like(x))):
        with pytest.raises(ValueError, match="depend on x"):
            gradient_penalty(constant, x)


def test_a_linear_critic_without_parameters(device):
    x = torch.randn(4, 3, device=device)
    penalty = gradient_penalty(lambda v: 2 * v.sum(1), x, target=0.0)
    torch.testing.assert_close(penalty, torch.tensor(12.0, device=device))
    assert not penalty.requires_grad
    x = torch.randn(4, device=device)
    torch.testing.assert_close(
        gradient_penalty(lambda v: v**2, x, target=0.0), (4 * x**2).mean(), rtol=1e-5, atol=0
    )


LAYOUTS = {
    "contiguous": lambda g: g,
    "channels last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "permuted": lambda g: g.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "sliced": lambda g: torch.cat([g, g], 3)[..., ::2],
    "rows apart": lambda g: torch.cat([g, g], 1)[:, : g.shape[1]],
    "expanded": lambda g: g[:1].expand_as(g),
    "expanded inside": lambda g: g[..., :1].expand_as(g),
    "one row": lambda g: g[:1].contiguous(memory_format=torch.channels_last),
    "wide": lambda g: g.reshape(1, -1, 1, 1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8192 + 5, 3), (3, 2 * 8192 + 1), (129, 129)])
def test_launches(shape, dtype, device):
    """More rows than a grid has blocks, rows in several pieces, more rows than threads."""
    check_fused_penalty(torch.randn(shape, device=device).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fused_penalty(layout, dtype, device):
    check_fused_penalty(LAYOUTS[layout](torch.randn(6, 3, 37, 50, device=device).to(dtype)))


def check_fused_penalty(g):
    """Compare the operators with autograd in float64."""
    dtype = g.dtype
    penalty, norms = ops.penalty(g, 0.7)
    exact = g.double().requires_grad_()
    want = exact.flatten(1).norm(dim=1)
    value = ((want - 0.7) ** 2).mean()
    tolerance = {"rtol": 1e-13, "atol": 0} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 0}
    torch.testing.assert_close(norms.double(), want.detach(), **tolerance)
    torch.testing.assert_close(penalty.double(), value.detach(), **tolerance)
    got = ops.penalty_backward(torch.full_like(penalty, 1.5), g, norms, 0.7)
    assert got.dtype == dtype and got.shape == g.shape
    (slope,) = torch.autograd.grad(1.5 * value, exact)
    torch.testing.assert_close(
        got, slope.to(dtype), rtol=1e-2 if g.itemsize == 2 else 1e-5, atol=1e-6
    )


def test_plain_pytorch_on_a_gpu_without_kernels(monkeypatch):
    """What a GPU gets for which the library was not built: the same penalty and gradients."""
    critic, x = small_critic()
    want = plain_penalty(critic, x)
    monkeypatch.setattr(_penalty, "usable", lambda tensor: False)
    monkeypatch.setattr(_penalty, "Rewriting", None)
    got = gradient_penalty(critic, x, return_norms=True)
    torch.testing.assert_close(got, want)
    parameters = list(critic.parameters())
    assert_same_gradients(
        gradients(got[0], parameters), gradients(want[0], parameters), tolerance=1e-12
    )


@pytest.mark.parametrize("order", [1, 2])
def test_nan_gradient_stays_visible(order, device):
    w = torch.tensor([[float("nan"), 1.0]], device=device, requires_grad=True)
    penalty = gradient_penalty(lambda x: x @ w.T, torch.ones(2, 2, device=device))
    assert penalty.isnan()
    (first,) = gradients(penalty, [w], create_graph=order == 2)
    assert first.isnan().any()


def test_huge_row(device):
    g = torch.randn(2, 3_000_017, device=device)
    torch.testing.assert_close(
        ops.penalty(g, 0.0)[1].double(), g.double().norm(dim=1), rtol=1e-6, atol=0
    )
    assert ops.penalty(g[:, :0], 2.0)[0] == 4


def test_gradcheck(device):
    g = torch.randn(4, 3, 2, device=device, dtype=torch.float64, requires_grad=True)

    def penalty(g):
        return _Penalty.apply(g, 0.7)[0]

    assert torch.autograd.gradcheck(penalty, (g,))
    assert torch.autograd.gradgradcheck(penalty, (g,))


NORMS = {
    "layer": lambda c, affine: nn.LayerNorm([c, 4, 5], elementwise_affine=affine),
    "wide layer": lambda c, affine: nn.LayerNorm([c, 25, 40], elementwise_affine=affine),
    "last layer": lambda c, affine: nn.LayerNorm(7, elementwise_affine=affine),
    "group": lambda c, affine: nn.GroupNorm(2, c, affine=affine),
    "instance": lambda c, affine: nn.InstanceNorm2d(c, affine=affine),
    "batch": lambda c, affine: nn.BatchNorm2d(c, affine=affine),
    "short batch": lambda c, affine: nn.BatchNorm1d(c, affine=affine),
}


class SecondDerivatives(TorchDispatchMode):
    """Counts the calls of the normalisations' kernel."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is ops.norm_double_backward.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", NORMS)
def test_norms(kind, affine, device):
    """Normalisations between curved neighbours are exact, and it is our kernel that computes."""
    shape = {"wide layer": (6, 25, 40), "last layer": (6, 3, 7), "short batch": (6, 40)}
    critic = nn.Sequential(
        nn.Tanh(), NORMS[kind](6, affine), nn.Tanh(), nn.Flatten(1), nn.LazyLinear(1)
    )
    x = torch.randn(3, *shape.get(kind, (6, 4, 5)), dtype=torch.float64, device=device)
    critic.to(x)(x)
    for parameter in critic.parameters():
        nn.init.normal_(parameter)
    compare(critic, x)
    with SecondDerivatives() as counted:
        gradients(gradient_penalty(critic, x), list(critic.parameters()))
    assert counted.calls == 1
    single = gradients(gradient_penalty(critic.float(), x.float()), list(critic.parameters()))
    double = gradients(gradient_penalty(critic.double(), x), list(critic.parameters()))
    assert_same_gradients([g if g is None else g.double() for g in single], double, 1e-4)


def test_malformed_calls_of_the_norms_operator(device):
    x, mean = torch.randn(4, 6, 5, device=device), torch.randn(8, device=device)
    weight = torch.randn(6, device=device)
    call = ops.norm_double_backward
    call(x, x, x, mean, mean, weight, 2, 3, False)
    for wrong, message in [
        ((x, x[:, :5], x, mean, mean, weight, 2, 3, False), "g must"),
        ((x, x, x, mean, mean[:4], weight, 2, 3, False), "rstd must"),
        ((x, x, x, mean, mean, weight, 3, 3, False), "weight does not fit"),
        ((x, x, x, mean, mean, weight, 2, 7, False), "do not fit x"),
        ((x, x, x, mean, mean, weight, 0, 3, False), "positive"),
        ((x[:0], x[:0], x[:0], mean, mean, weight[:0], 1, 1, False), "weight does not fit"),
        ((x, x, x, mean, mean, None, 1, 2**61 + 3, False), "do not fit x"),  # times 8 it wraps
        ((x[:0], x[:0], x[:0], mean, mean, None, 1, 2**60, False), "do not fit x"),
        ((x.half(), x.half(), x.half(), mean, mean, None, 2, 3, False), "float32 or float64"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(*wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_schemas(dtype, device):
    """What the operators say of themselves: they change nothing they are given, and what comes."""
    g = torch.randn(4, 3, 5, 5, device=device, dtype=dtype)
    penalty, norms = ops.penalty(g, 1.0)
    tests = "test_schema", "test_faketensor"
    for layout in (g, g.contiguous(memory_format=torch.channels_last), g[..., ::2]):
        torch.library.opcheck(ops.penalty.default, (layout, 1.0), test_utils=tests)
        arguments = penalty, layout, norms, 1.0
        torch.library.opcheck(ops.penalty_backward.default, arguments, test_utils=tests)
    if dtype != torch.bfloat16:
        mean, weight = g.new_ones(12), g.new_ones(3)
        for rest in ((weight, 3, 1, False), (None, 1, 1, False)):
            call = g, g, g, mean, mean, *rest
            torch.library.opcheck(ops.norm_double_backward.default, call, test_utils=tests)


def test_fake_tensors():
    """Memory is estimated so: by shapes without values."""
    with FakeTensorMode():
        layers = nn.Conv2d(3, 16, 3), nn.LayerNorm([16, 30, 30]), nn.ReLU(), nn.Conv2d(16, 8, 3)
        critic = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 28 * 28, 1))
        penalty, norms = gradient_penalty(critic, torch.randn(64, 3, 32, 32), return_norms=True)
        penalty.backward()
        assert penalty.shape == () and norms.shape == (64,)
        assert all(p.grad is None or p.grad.shape == p.shape for p in critic.parameters())
        assert critic[0].weight.grad is not None


def test_a_norm_stays_where_no_kernel_can_compute(monkeypatch):
    """The layer may be on another device than x, which says nothing of it."""
    monkeypatch.setattr(_norm, "usable", lambda _: False)
    critic = nn.Sequential(nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)).double()
    with SecondDerivatives() as counted:
        compare(critic, torch.randn(4, 5, dtype=torch.float64))
    assert counted.calls == 0


def test_malformed_calls_of_the_operators(device):
    g = torch.randn(4, 3, device=device)
    penalty, norms = ops.penalty(g, 1.0)
    for bad in (g.long(), g[:0], g.sum()):
        with pytest.raises((RuntimeError, TypeError), match="gradient"):
            ops.penalty(bad, 1.0)
    for wrong in ((penalty, g, norms[:3]), (penalty.double(), g, norms), (norms, g, norms)):
        with pytest.raises(RuntimeError, match="penalty"):
            ops.penalty_backward(*wrong, 1.0)
    with pytest.raises(RuntimeError, match="norms"):
        ops.penalty_backward(penalty, g, norms[:1].expand(4), 1.0)
