"""The losses: every implementation against float64, gradients against autograd, masks, shapes, memory."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

from bottleneck.losses import linear_cross_entropy, loss_names

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# N, D, R, V: odd sizes, one token, rank 1, a vocabulary that no chunk divides
SHAPES = [(252, 123, 17, 507), (1, 8, 1, 11), (300, 16, 48, 1000), (64, 32, 32, 320), (1030, 4, 2, 3000)]


def truth(h, A, B, y, reduction):
    """float64, straight from the definition."""
    h, A, B = (t.detach().double().requires_grad_() for t in (h, A, B))
    log_p = torch.log_softmax(h @ (A @ B).T, dim=-1)
    keep = y != -100
    loss = -log_p[keep].gather(1, y[keep][:, None]).sum()
    loss = loss / keep.sum() if reduction == "mean" else loss
    loss.backward()
    return loss.detach(), h.grad, A.grad, B.grad


def problem(shape, masked=True, scale=1.0, seed=0):
    N, D, R, V = shape
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(N, D, generator=g)
    A, B = scale * torch.randn(V, R, generator=g), torch.randn(R, D, generator=g) / D**0.5
    y = torch.randint(0, V, (N,), generator=g)
    if masked and N > 1:
        y[::3] = -100
    return tuple(t.to(DEVICE) for t in (h, A, B, y))


@pytest.mark.parametrize("impl", loss_names())
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_float64(impl, reduction, shape):
    h, A, B, y = problem(shape)
    for t in (h, A, B):
        t.requires_grad_()
    loss = linear_cross_entropy(h, A, B, y, impl=impl, reduction=reduction)
    loss.backward()
    wanted = truth(h, A, B, y, reduction)
    for got, want in zip((loss, h.grad, A.grad, B.grad), wanted):
        assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max())), impl


@pytest.mark.parametrize("impl", ["chunked", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(500, 64, 32, 2000), (252, 123, 100, 507), (300, 96, 48, 9001), (150, 320, 300, 1300)]
)
@pytest.mark.parametrize("scale", [0.2, 1.0])
@pytest.mark.parametrize("weights", ["float32", "sixteen"])
def test_sixteen_bits_are_as_close_as_plain_pytorch(impl, dtype, shape, scale, weights):
    """Three ways: the error against float64 is at most that of plain PyTorch in the same dtype.

    Also where A and B are of 16 bits.
    """
    h, A, B, y = problem(shape, scale=scale)
    h, A, B = (t.to(dtype).float() for t in (h, A, B))  # what both see is exact in 16 bits
    wanted = truth(h, A, B, y, "mean")
    errors = {}
    for name in (impl, "reference"):
        of = torch.float32 if weights == "float32" else dtype
        x, a, b = (t.to(d).requires_grad_() for t, d in ((h.clone(), dtype), (A.clone(), of), (B.clone(), of)))
        loss = linear_cross_entropy(x, a, b, y, impl=name)
        loss.backward()
        errors[name] = [
            ((g.double() - w).norm() / w.norm()).item() for g, w in zip((loss.detach(), x.grad, a.grad, b.grad), wanted)
        ]
        assert a.grad.dtype == of and x.grad.dtype == dtype
    floor = [1e-4, 1e-5, 1e-5, 1e-5]  # the loss is a mean: its rounding errors may cancel by luck
    for ours, plain, least in zip(errors[impl], errors["reference"], floor):
        assert ours <= 1.05 * plain + least, errors


@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_gradients_that_float16_holds_are_not_lost_on_the_way(impl):
    """4,096 times the same target: the sum of the gradients is beyond float16, their mean is not."""
    h, A, B, _ = problem((4096, 8, 4, 50), masked=False)
    y = torch.full((4096,), 3, device=DEVICE)
    a, b = (20 * A.abs()).half().requires_grad_(), (8 * B.abs()).half().requires_grad_()
    linear_cross_entropy(h.abs().half(), a, b, y, impl=impl).backward()
    assert torch.isfinite(a.grad).all() and torch.isfinite(b.grad).all() and a.grad.norm() > 10


@pytest.mark.parametrize("impl", ["reference", "chunked", "fused"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rank", [6, 300])
def test_without_a_counted_token_gradients_are_zero(impl, reduction, rank):
    """All targets masked, or no tokens at all: the mean is NaN as PyTorch's is, gradients are 0 and harm no sum."""
    for n in (5, 0):
        h, A, B, _ = problem((5, 8, rank, 11))
        h, A, B = (t.requires_grad_() for t in (h[:n].clone(), A, B))
        loss = linear_cross_entropy(h, A, B, torch.full((n,), -100, device=DEVICE), impl=impl, reduction=reduction)
        loss.backward()
        assert loss.isnan() if reduction == "mean" else loss == 0
        assert all(t.grad is not None and not t.grad.any() for t in (h, A, B)), n


@pytest.mark.parametrize("impl", ["reference", "chunked", "fused"])
@pytest.mark.parametrize("wrong", [-1, 11, 2**31, 2**32])
def test_wrong_targets_are_always_reported(impl, wrong):
    """An error, or a loss that is NaN (on a GPU nothing can be raised without waiting)."""
    if DEVICE == "cuda" and impl != "fused":
        pytest.skip("an assertion on the device would end the process")
    h, A, B, y = problem((5, 8, 4, 11), masked=False)
    y[2] = wrong
    try:
        assert linear_cross_entropy(h, A, B, y, impl=impl).isnan()
    except (IndexError, RuntimeError) as error:
        assert impl != "fused" and ("out of bounds" in str(error) or "out of range" in str(error))


@pytest.mark.parametrize("impl", ["reference", "chunked", "fused"])
def test_any_integers_are_targets(impl):
    h, A, B, y = problem((20, 8, 4, 11))
    assert (
        len({linear_cross_entropy(h, A, B, y.to(t), impl=impl).item() for t in (torch.int64, torch.int32, torch.int16)})
        == 1
    )
    with pytest.raises(ValueError, match="float64") if impl == "fused" else contextlib.nullcontext():
        assert linear_cross_entropy(h.double(), A, B, y, impl=impl).item() == pytest.approx(
            linear_cross_entropy(h, A, B, y).item(), rel=1e-5
        )


@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_large_logits_stay_finite(impl):
    """The literal N(0,1) start has losses above 1,000; a confident head has losses near 0. Both to float accuracy."""
    for scale, shift in ((300.0, 0), (40.0, 1)):
        h, A, B, y = problem((50, 16, 16, 400), masked=False, scale=scale)
        if shift:
            y = (h @ B.T @ A.T).argmax(-1)
        got = linear_cross_entropy(h, A, B, y, impl=impl, reduction="sum").double()
        want = truth(h, A, B, y, "sum")[0]
        # float32 logits of size 500 are good to 3e-5 each
        assert torch.isclose(got, want, rtol=1e-5, atol=1e-3), (got, want)


@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_masked_rows_do_not_count(impl):
    """Garbage in masked rows changes nothing: loss and gradients equal those of the kept rows alone."""
    h, A, B, y = problem((90, 12, 6, 70))
    keep = y != -100
    h[~keep] = 1e4
    out = []
    for hh, yy in ((h, y), (h[keep], y[keep])):
        a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
        loss = linear_cross_entropy(hh, a, b, yy, impl=impl, reduction="sum")
        loss.backward()
        out.append((loss.detach(), a.grad, b.grad))
    for one, other in zip(*out):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_leading_dims_and_errors():
    h, A, B, y = problem((60, 12, 6, 70))
    flat = linear_cross_entropy(h, A, B, y)
    assert torch.equal(flat, linear_cross_entropy(h.view(3, 20, 12), A, B, y.view(3, 20)))
    for bad in (dict(impl="fast"), dict(reduction="none")):
        with pytest.raises(ValueError, match="must be"):
            linear_cross_entropy(h, A, B, y, **bad)
    with pytest.raises(ValueError, match="shapes do not fit"):
        linear_cross_entropy(h, A.T, B, y)


def test_chunked_never_holds_all_logits(monkeypatch):
    """Largest tensor made inside the chunked loss: one chunk of logits, however many tokens there are."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    from bottleneck.losses.chunked import chunk_rows

    rows = chunk_rows(20_000, DEVICE)
    h, A, B, y = problem((20 * rows, 8, 4, 20_000), masked=False)
    A.requires_grad_(), B.requires_grad_()
    with Watch():
        linear_cross_entropy(h, A, B, y, impl="chunked").backward()
    assert rows * 20_000 / 2 <= largest <= rows * 20_000


def test_without_gradients_none_are_computed(monkeypatch):
    """Validation pays for one product, not three."""
    import bottleneck.losses.chunked as chunked

    h, A, B, y = problem((60, 12, 6, 70))
    A.requires_grad_()
    calls = []
    plain = chunked.matmul_f32
    monkeypatch.setattr(chunked, "matmul_f32", lambda *a, **k: calls.append(1) or plain(*a, **k))
    with torch.no_grad():
        quiet = linear_cross_entropy(h, A, B, y, impl="chunked")
    assert len(calls) == 1
    assert torch.equal(quiet, linear_cross_entropy(h, A, B, y, impl="chunked").detach())


def test_rank_of_the_head():
    """rank(A B) ≤ r: the softmax bottleneck itself."""
    h, A, B, y = problem((10, 40, 5, 90))
    assert torch.linalg.matrix_rank(A @ B) == 5
    logits = h @ B.T @ A.T
    assert torch.linalg.matrix_rank(logits - logits.mean(-1, keepdim=True)) <= 5
    assert torch.isclose(F.cross_entropy(logits[:9], y[1:]), linear_cross_entropy(h[:9], A, B, y[1:]), rtol=1e-5)
