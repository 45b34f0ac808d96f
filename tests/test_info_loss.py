"""The fused information loss against the plain one, autograd, and its contract."""

import random
import warnings

import gan_kernels
import pytest
import torch
from gan_kernels import info_loss
from torch._subclasses.fake_tensor import FakeTensorMode

from infogan import info_loss_reference

LATENTS = [([10], 2), ([10, 10, 10, 10], 4), ([], 3), ([7], 0), ([1, 2, 33], 1), ([64, 65, 200], 1)]
ops = torch.ops.gan_kernels


@pytest.fixture
def device(kernels):
    """Where the tensors are; conftest.py has the kernels."""
    return "cuda" if kernels == "cuda" else "cpu"


def draw(batch, sizes, n, device, dtype=torch.float64, learned=True, code_dtype=None):
    """Return random arguments of info_loss; q has unit variance if not learned."""
    q = torch.randn(batch, sum(sizes) + (2 if learned else 1) * n, device=device, dtype=dtype)
    category = [torch.randint(size, (batch,), device=device) for size in sizes]
    category = torch.stack(category, 1) if sizes else q.new_empty((batch, 0), dtype=torch.int64)
    code = torch.rand(batch, n, device=device, dtype=code_dtype or dtype) * 2 - 1
    return q, category, code, sizes


def losses_and_gradient(loss, q, *rest):
    """Return the two losses and the gradient of an uneven mixture of them."""
    q = q.detach().requires_grad_()
    a, b = loss(q, *rest)
    (gradient,) = torch.autograd.grad(a + 0.1 * b, q)
    return a, b, gradient


def assert_same(q, category, code, sizes, tolerance):
    """Compare with the reference computed in float64 from the same numbers."""
    got = losses_and_gradient(info_loss, q, category, code, sizes)
    want = losses_and_gradient(info_loss_reference, q.double(), category, code.double(), sizes)
    assert got[0].dtype == got[1].dtype == torch.promote_types(q.dtype, torch.float32)
    assert got[2].dtype == q.dtype and got[2].shape == q.shape
    for x, y in zip(got, want, strict=True):
        scale = max(1.0, float(y.detach().abs().max()))
        assert float((x.double() - y).detach().abs().max()) <= tolerance * scale


@pytest.mark.parametrize("sizes, n", LATENTS)
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("batch", [1, 31, 128, 1500])
def test_float64(sizes, n, learned, batch, device):
    assert_same(*draw(batch, sizes, n, device, learned=learned), 1e-13)


def test_many_random_shapes(device):
    pick = random.Random(0)
    for _ in range(150):
        sizes = [pick.choice([1, 2, 5, 10, 70]) for _ in range(pick.randrange(5))]
        n = pick.randrange(0 if sizes else 1, 5)
        dtype, tolerance = pick.choice([(torch.float64, 1e-13), (torch.float32, 2e-6)])
        code_dtype = pick.choice([dtype, torch.float32])
        batch = pick.choice([1, 2, 16, 33, 100, 700])
        arguments = draw(batch, sizes, n, device, dtype, pick.random() < 0.7, code_dtype)
        assert_same(*arguments, tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("code_dtype", [None, torch.float32])
def test_half_precision_accumulates_in_float32(dtype, tolerance, code_dtype, device):
    q, category, code, sizes = draw(3000, [10, 10], 2, device, dtype, code_dtype=code_dtype)
    assert_same(q, category, code, sizes, tolerance)
    a, b = info_loss(q, category, code, sizes)
    x, y = info_loss_reference(q.double(), category, code.double(), sizes)
    torch.testing.assert_close(a.double(), x, rtol=1e-5, atol=0)
    torch.testing.assert_close(b.double(), y, rtol=1e-5, atol=0)


def test_any_strides(device):
    q, category, code, sizes = draw(70, [10, 3], 2, device)
    wide = torch.randn(140, 60, device=device, dtype=q.dtype)
    layouts = [
        q.t().contiguous().t(),
        wide[::2, 3 : 3 + q.shape[1]],
        wide.flip(0)[:70, : 2 * q.shape[1] : 2],
        q[:1].expand(70, -1),
        q[:, :1].expand(-1, q.shape[1]),
    ]
    for layout in layouts:
        assert_same(layout, category, code, sizes, 1e-13)
    assert_same(q, category.t().contiguous().t(), code[:1].expand(70, -1), sizes, 1e-13)


def test_huge_rows(device):
    assert_same(*draw(3, [200_000, 5], 3, device), 1e-13)
    assert_same(*draw(3, [200_000, 5], 3, device, torch.float32), 2e-6)


@pytest.mark.parametrize("dtype, tolerance, batch", [
    (torch.float64, 1e-13, 41), (torch.float32, 2e-6, 4 * 8192 + 37),  # more than a grid's warps
    (torch.bfloat16, 2e-2, 41), (torch.float16, 2e-3, 41),
])  # fmt: skip
def test_rows_too_wide_for_shared_memory(dtype, tolerance, batch, device):
    assert_same(*draw(batch, [100], 1, device, dtype), tolerance)


def test_a_large_batch(device):
    q, category, code, sizes = draw(1000, [10], 2, device, torch.float32)
    want = losses_and_gradient(info_loss, q, category, code, sizes)
    # q takes more than 32 MiB, and more blocks than the largest grid has
    many = (t.repeat(1100, 1) for t in (q, category, code))
    got = losses_and_gradient(info_loss, *many, sizes)
    torch.testing.assert_close(got[:2], want[:2], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[2], (want[2] / 1100).repeat(1100, 1), rtol=1e-5, atol=1e-12)


def test_extreme_values(device):
    q = torch.tensor([[1e4, -1e4, 0.0, 3.0, 40.0], [-1e30, 1e30, -1e30, 0.0, -40.0]], device=device)
    category = torch.tensor([[0], [1]], device=device)
    code = torch.zeros(2, 1, device=device)
    assert_same(q, category, code, [3], 1e-6)
    minus = float("-inf")
    q = torch.tensor([[minus, 0.0, 1.0], [0.0, minus, minus]], device=device, dtype=torch.float64)
    assert_same(q, torch.tensor([[1], [0]], device=device), code[:, :0].double(), [3], 1e-13)
    q[0, 0] = float("nan")
    a, _ = info_loss(q, torch.tensor([[1], [0]], device=device), code[:, :0].double(), [3])
    assert a.isnan()


def test_exp_and_log_over_their_whole_range(device):
    # One mean of zero and an error of one leave exp(-v) / 2 in the gradient of the mean.
    for dtype, low, high, bound in [
        (torch.float32, -87, 88, 3e-7),
        (torch.float64, -708, 709, 4e-16),
    ]:
        v = torch.linspace(low, high, 100_001, device=device, dtype=dtype)
        q = torch.stack([torch.zeros_like(v), v], 1)
        code = torch.ones_like(v)[:, None]
        category = torch.empty(len(v), 0, dtype=torch.int64, device=device)
        one, zero = q.new_ones(()), q.new_zeros(())
        gradient = ops.info_loss_backward(zero, one * len(v), q, category, code, [])
        want = torch.exp(-v.double())
        # below the smallest normal number the last digit is as large as just above it
        unit = want.clamp_min(torch.finfo(dtype).tiny)
        assert float(((-gradient[:, 0].double() - want) / unit).abs().max()) < bound
        # Two logits t and 0 give log(1 + exp(-|t|)) for the larger.
        t = torch.linspace(-40, 40, 513, device=device, dtype=dtype)
        for x in t:
            pair = torch.stack([x, x * 0])[None]
            index = torch.zeros(1, 1, dtype=torch.int64, device=device)
            a, _ = ops.info_loss(pair, index, q[:1, :0], [2])
            want = torch.logaddexp(-x.double(), torch.zeros_like(x.double()))
            assert abs(float(a) - float(want)) <= 4 * bound * max(1, float(want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_beyond_its_range(dtype, device):
    """Infinity, subnormal numbers, zero and NaN, as exp(-v) in the gradient of the mean."""
    inf, nan = float("inf"), float("nan")
    v = [-inf, -1e30, -800, -89, -88.7, -88.5, 87.5, 88.5, 95, 103, 104.5, 110, 800, 1e30, inf, nan]
    v = torch.tensor(v, device=device, dtype=dtype)
    q = torch.stack([torch.zeros_like(v), v], 1)
    category = torch.empty(len(v), 0, dtype=torch.int64, device=device)
    one, zero = q.new_ones(()), q.new_zeros(())
    gradient = ops.info_loss_backward(
        zero, one * len(v), q, category, torch.ones_like(v)[:, None], []
    )
    want = torch.exp(-v.double()).to(dtype)
    # Two units of float32's last subnormal place.
    torch.testing.assert_close(-gradient[:, 0], want, rtol=3e-7, atol=3e-45, equal_nan=True)


@pytest.mark.parametrize("sizes, n", [([4], 2), ([2, 3], 0), ([], 2), ([70], 1)])
@pytest.mark.parametrize("learned", [True, False])
def test_gradcheck(sizes, n, learned, device):
    q, category, code, sizes = draw(5, sizes, n, device, learned=learned)
    inputs = (q.requires_grad_(), code.requires_grad_(n > 0))

    def both(q, code):
        return info_loss(q, category, code, sizes)

    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(both, inputs)


def test_one_loss_alone_and_frozen_q(device):
    q, category, code, sizes = draw(20, [5], 2, device)
    q.requires_grad_()
    for i in range(2):
        (got,) = torch.autograd.grad(info_loss(q, category, code, sizes)[i], q)
        (want,) = torch.autograd.grad(info_loss_reference(q, category, code, sizes)[i], q)
        torch.testing.assert_close(got, want)
    assert not info_loss(q.detach(), category, code, sizes)[0].requires_grad
    with torch.no_grad():
        assert not info_loss(q, category, code, sizes)[0].requires_grad


def test_func_grad(device):
    q, category, code, sizes = draw(20, [5, 3], 2, device)

    def total(loss):
        return lambda q: sum(loss(q, category, code, sizes))

    got, want = torch.func.grad(total(info_loss))(q), torch.func.grad(total(info_loss_reference))(q)
    torch.testing.assert_close(got, want)

    def curvature(loss):
        return torch.func.grad(lambda q: (torch.func.grad(total(loss))(q) ** 2).sum())

    torch.testing.assert_close(curvature(info_loss)(q), curvature(info_loss_reference)(q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes, n", [([10], 2), ([], 1), ([3, 4], 0)])
def test_opcheck(sizes, n, dtype, device):
    arguments = draw(6, sizes, n, device, dtype, code_dtype=torch.float32)
    torch.library.opcheck(ops.info_loss.default, arguments)
    scalar = torch.ones((), device=device)
    torch.library.opcheck(ops.info_loss_backward.default, (scalar, scalar, *arguments))


def test_compiles_without_graph_breaks(device):
    q, category, code, sizes = draw(40, [10], 2, device, torch.float32)

    def step(q):
        a, b = info_loss(q * 2, category, code, sizes)
        return a + 0.1 * b

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # traced, and then run again
        x, y = (q.clone().requires_grad_() for _ in range(2))
        compiled(x).backward()
        step(y).backward()
        torch.testing.assert_close(x.grad, y.grad)


def test_autocast(device):
    layer = torch.nn.Linear(6, 14, device=device)
    x = torch.randn(30, 6, device=device)
    _, category, code, sizes = draw(30, [10], 2, device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        q = layer(x)
        a, b = info_loss(q, category, code, sizes)
    assert q.dtype == torch.bfloat16 and a.dtype == b.dtype == torch.float32
    (a + b).backward()
    assert layer.weight.grad.dtype == torch.float32


def test_results_do_not_depend_on_the_number_of_threads():
    arguments = draw(20_000, [10, 10], 2, "cpu", torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(losses_and_gradient(info_loss, *arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def bad_arguments():
    """Yield (the argument the message must name, a change of valid arguments)."""
    yield "q", lambda q, k, c, s: (q.long(), k, c, s)
    yield "q", lambda q, k, c, s: (q[0], k, c, s)
    yield "q", lambda q, k, c, s: (q[:, :-1], k, c, s)
    yield "q", lambda q, k, c, s: (torch.cat([q, q], 1), k, c, s)
    yield "q", lambda q, k, c, s: (q[:0], k[:0], c[:0], s)
    yield "q", lambda q, k, c, s: (q[:, :0], k[:, :0], c[:, :0], [])
    yield "q", lambda q, k, c, s: (q > 0, k, c, s)
    yield "q", lambda q, k, c, s: (q[None], k, c, s)
    yield "q", lambda q, k, c, s: (q, k, c[:, :1], s)
    yield "q", lambda q, k, c, s: (None, k, c, s)
    yield "category", lambda q, k, c, s: (q, None, c, s)
    yield "code", lambda q, k, c, s: (q, k, None, s)
    yield "category", lambda q, k, c, s: (q, k.tolist(), c, s)
    yield "category", lambda q, k, c, s: (q, k.int(), c, s)
    yield "category", lambda q, k, c, s: (q, k[:, :1], c, s)
    yield "category", lambda q, k, c, s: (q, k[:-1], c, s)
    yield "category", lambda q, k, c, s: (q, k[:, 0], c, s)
    yield "code", lambda q, k, c, s: (q, k, c[:-1], s)
    yield "code", lambda q, k, c, s: (q, k, c.long(), s)
    yield "code", lambda q, k, c, s: (q, k, c.half(), s)
    yield "code", lambda q, k, c, s: (q, k, c[:, 0], s)
    yield "sizes", lambda q, k, c, s: (q, k, c, [0, 5])
    yield "sizes", lambda q, k, c, s: (q, k, c, [-3, 8])
    yield "sizes", lambda q, k, c, s: (q, k, c, [2**62, 2**62])
    yield "sizes", lambda q, k, c, s: (q, k, c, [1.5, 5])
    yield "sizes", lambda q, k, c, s: (q, k, c, None)


@pytest.mark.parametrize("case", range(len(list(bad_arguments()))))
def test_malformed_arguments_are_named(case, device):
    name, change = list(bad_arguments())[case]
    arguments = draw(6, [3, 5], 2, device, torch.float64)
    with pytest.raises(RuntimeError, match=rf"(info_loss: |argument '){name}\b"):
        info_loss(*change(*arguments))


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("index", [-1, 500, 2**40, -(2**63), 2**63 - 1])
def test_category_out_of_range(index, column, kernels, device):
    q, category, code, sizes = draw(40, [3, 500], 2, device, torch.float32)
    category[37, column] = index
    scalar = torch.ones((), device=device)
    if kernels == "cpu":
        with pytest.raises(RuntimeError, match="category"):
            info_loss(q, category, code, sizes)
        with pytest.raises(RuntimeError, match="category"):
            ops.info_loss_backward(scalar, scalar, q, category, code, sizes)
    else:
        a, b = info_loss(q, category, code, sizes)
        assert a.isnan() and b.isfinite()
        gradient = ops.info_loss_backward(scalar, scalar, q, category, code, sizes)
        first, second = gradient[37, :3], gradient[37, 3:503]
        hit, spared = (second, first) if column else (first, second)
        assert hit.isnan().all() and spared.isfinite().all()
        assert gradient[:37].isfinite().all() and gradient[38:].isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_tensors_on_different_devices():
    q, category, code, sizes = draw(6, [3], 1, "cpu", torch.float32)
    with pytest.raises(RuntimeError, match="category"):
        info_loss(q, category.cuda(), code, sizes)
    with pytest.raises(RuntimeError, match="code"):
        info_loss(q, category, code.cuda(), sizes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_indices_beyond_two_to_the_31_on_cuda():
    batch = 2**31 // 14 + 1000
    q = torch.zeros(batch, 14, device="cuda", dtype=torch.bfloat16)
    q[-1, 3] = 5
    category = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    code = torch.zeros(batch, 2, device="cuda")
    one = torch.full((), float(batch), device="cuda")
    gradient = ops.info_loss_backward(one, one, q, category, code, [10])
    want = ops.info_loss_backward(one, one, q[-7:], category[-7:], code[-7:], [10]) * (7 / batch)
    torch.testing.assert_close(gradient[-7:], want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_cuda_graph_capture():
    q, category, code, sizes = draw(200, [10], 2, "cuda", torch.float32)
    losses_and_gradient(info_loss, q, category, code, sizes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = losses_and_gradient(info_loss, q, category, code, sizes)
    graph.replay()
    for x, y in zip(
        captured, losses_and_gradient(info_loss, q, category, code, sizes), strict=True
    ):
        assert torch.equal(x, y)


@pytest.fixture
def no_kernels(monkeypatch):
    """As on a GPU for which the library was not built; what follows is computed elsewhere."""
    from gan_kernels import _info_loss, _library

    monkeypatch.setattr(_library, "has_cuda", False)
    monkeypatch.setattr(
        _info_loss, "usable", lambda _: _library._usable_on(torch.device("cuda", 0))
    )
    monkeypatch.setattr(_info_loss, "_forward", None)
    _library._tried_on.cache_clear()
    yield
    _library._tried_on.cache_clear()


TOLD = pytest.mark.filterwarnings("ignore:gan_kernels computes in plain PyTorch")


@TOLD
@pytest.mark.parametrize("learned", [True, False])
def test_plain_pytorch_on_a_gpu_without_kernels(learned, request):
    """The same losses and gradients."""
    arguments = draw(31, [3, 4], 2, "cpu", learned=learned)
    want = losses_and_gradient(info_loss, *arguments)
    request.getfixturevalue("no_kernels")
    for a, b in zip(losses_and_gradient(info_loss, *arguments), want, strict=True):
        torch.testing.assert_close(a, b)


@TOLD
def test_transforms_on_a_gpu_without_kernels(no_kernels):
    q, category, code, sizes = draw(31, [3, 4], 2, "cpu")

    def total(loss):
        return lambda q: sum(loss(q, category, code, sizes))

    want = torch.func.grad(total(info_loss_reference))(q)
    torch.testing.assert_close(torch.func.grad(total(info_loss))(q), want)
    torch._dynamo.reset()
    compiled = torch.compile(total(info_loss), fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(q.requires_grad_()), q)
    torch.testing.assert_close(got, want)


@TOLD
def test_what_the_kernels_refuse_is_refused_without_them(no_kernels):
    q, category, code, sizes = draw(6, [3], 2, "cpu")
    for wrong in (
        (q[:, :6], category, code),  # 3 + 2 + 1 columns
        (q, category, code[:1]),
        (q, category[:1], code),
        (q, category.int(), code),
        (q.long(), category, code),
        (q[:0], category[:0], code[:0]),
    ):
        with pytest.raises(RuntimeError, match="info_loss: "):
            info_loss(*wrong, sizes)
    for sizes in ([0, 5], [-3, 8]):
        with pytest.raises(RuntimeError, match="do not fit"):
            info_loss(q[:, [0] * 9], category[:, [0, 0]], code, sizes)
    with pytest.raises(RuntimeError, match="do not fit"):
        info_loss(q[:, :0], category[:, :0], code[:, :0], [])


def test_more_codes_than_the_cuda_kernels_take_are_computed_plainly(monkeypatch):
    """A table of 257 columns, say, by TVAE."""
    from gan_kernels import _info_loss

    n = _info_loss.CUDA_CODES + 1
    monkeypatch.setattr(_info_loss, "usable", lambda _: True)
    monkeypatch.setattr(_info_loss, "_forward", None)
    with FakeTensorMode():
        q = torch.empty(4, 2 * n, device="cuda")
        category = torch.zeros(4, n, dtype=torch.int64, device="cuda")
        a, b = info_loss(q, category, q[:, :0], [2] * n)
    assert a.shape == b.shape == () and a.device.type == "cuda"


@pytest.fixture
def first_call(monkeypatch):
    """A call to ask whether a GPU's kernels can be used, as if none had been made."""
    from gan_kernels import _library

    monkeypatch.setattr(_library, "has_cuda", True)
    _library._tried_on.cache_clear()
    yield lambda: _library._usable_on(torch.device("cuda", 0))
    _library._tried_on.cache_clear()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_no_memory_says_nothing_of_the_kernels(error, first_call, monkeypatch):
    def full(*_, **__):
        raise error("CUDA out of memory")

    monkeypatch.setattr(torch, "ones", full)
    with pytest.raises(error, match="out of memory"):
        first_call()


def test_a_first_call_in_a_capture_says_what_to_do_and_is_forgotten(first_call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before a CUDA graph is captured"):
        first_call()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert first_call()


def test_fake_tensors_say_nothing_of_the_kernels(first_call, monkeypatch):
    ones, seen = torch.ones, []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch, "ones", lambda *size, device: seen.append(ones(*size)) or seen[0])
    with FakeTensorMode():
        assert first_call()
    assert type(seen[0]) is torch.Tensor


@pytest.mark.skipif(torch.__version__ < "2.13", reason="earlier versions do not say why")
def test_no_memory_in_an_operator_is_said():
    q = torch.zeros(1, 4).expand(2**44, 4)
    rest = torch.zeros(1, 1, dtype=torch.int64).expand(2**44, 1), q[:, :0], [4]
    with pytest.raises(RuntimeError, match="memory"):
        ops.info_loss_backward(torch.ones(()), torch.ones(()), q, *rest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_of_a_longer_code_has_its_precision(dtype, device):
    q, category, code, sizes = draw(4096, [3], 2, device, dtype, code_dtype=torch.float32)
    (got,) = torch.autograd.grad(info_loss(q, category, code.requires_grad_(), sizes)[1], code)
    (want,) = torch.autograd.grad(info_loss(q.float(), category, code, sizes)[1], code)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_a_gpu_without_kernels_is_told_once(no_kernels):
    arguments = draw(6, [3], 1, "cpu")
    with pytest.warns(UserWarning, match="plain PyTorch on this GPU: it was built without CUDA"):
        info_loss(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        info_loss(*arguments)


@TOLD
@pytest.mark.parametrize("index", [-1, 5, -100, 2**40])
def test_category_out_of_range_in_plain_pytorch(index, no_kernels):
    """NaN as from the CUDA kernels, in the loss and in the gradient of that category's logits."""
    from gan_kernels._info_loss import _plain_backward

    q, category, code, sizes = draw(4, [3, 5], 2, "cpu")
    category[2, 1] = index
    a, b, gradient = losses_and_gradient(info_loss, q, category, code, sizes)
    assert a.isnan() and b.isfinite()
    wrong = torch.zeros_like(q, dtype=torch.bool)
    wrong[2, 3:8] = True
    assert torch.equal(gradient.isnan(), wrong)
    q.requires_grad_()
    one = q.new_ones(())
    first = _plain_backward(one, one, q, category, code, sizes)  # under create_graph=True
    assert torch.equal(first.isnan(), wrong)
    (second,) = torch.autograd.grad(first.square().sum(), q)
    assert torch.equal(second.isnan(), wrong)


def test_build_info_is_one_line():
    text = gan_kernels.build_info()
    assert text.startswith("gan_kernels: CPU (") and "\n" not in text
    assert gan_kernels.has_cuda == ("; CUDA 1" in text)
