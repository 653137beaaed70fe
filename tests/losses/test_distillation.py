"""Distillation: gradients against autograd in float64, a teacher trained in the same run, and its effect."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import bottleneck.losses.taught as taught
from bottleneck.core.errors import UserError
from bottleneck.core.extensions import OBJECTIVES
from bottleneck.heads.bank import HeadBank, HeadKey
from bottleneck.losses.linear import targets, weights
from bottleneck.losses.objective import BoundObjective, steps
from bottleneck.losses.products import matmul_f32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def distilled(heads, W, h, y, temperature, mix, impl, dtype=torch.float32):
    """Losses [H, N] and gradients of heads whose teacher is the full head W; scale 0.5."""
    grads = [(torch.zeros_like(A), torch.zeros_like(B)) for A, B in heads]
    full = W.to(dtype)
    options = {"temperature": temperature, "mix": mix}
    o = BoundObjective(OBJECTIVES["mixed"], options, lambda x: matmul_f32(x, full.T))
    return steps(h.to(dtype), [weights(A, B, dtype, impl) for A, B in heads], targets(y), grads, 0.5, o), grads


def defined(heads, W, h, y, temperature, mix, dtype):
    """The same from the definition, by autograd on logits of a dtype."""
    out, h, keep = [], h.to(dtype), y >= 0
    t = (h @ W.to(dtype).T).to(torch.promote_types(dtype, torch.float32)) / temperature
    for A, B in heads:
        A, B = A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_()
        s = (h @ B.T @ A.T).to(t)
        kl = (torch.softmax(t, -1) * (torch.log_softmax(t, -1) - torch.log_softmax(s / temperature, -1))).sum(-1)
        loss = mix * temperature**2 * kl + (1 - mix) * torch.nn.functional.cross_entropy(
            s, y.clamp(min=0), reduction="none"
        )
        out.append(((loss * keep).detach(), *torch.autograd.grad((loss * keep).sum(), (A, B))))
    return out


def problem(N, D, V, ranks):
    g = torch.Generator().manual_seed(1)
    h, W = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    y = torch.randint(0, V, (N,), generator=g)
    y[::9] = -100
    heads = [(torch.randn(V, r, generator=g), torch.randn(r, D, generator=g) / 3) for r in ranks]
    return [(A.to(DEVICE), B.to(DEVICE)) for A, B in heads], W.to(DEVICE), h.to(DEVICE), y.to(DEVICE)


@pytest.mark.parametrize(
    "impl, temperature, mix",
    [(i, t, m) for t, m in ((1.0, 0.4), (2.0, 0.3)) for i in ("chunked", "fused")]
    + [("chunked", 1.0, 1.0), ("chunked", 2.5, 1.0)],
)
def test_distillation_gradients_are_those_of_the_definition(impl, temperature, mix, monkeypatch):
    """Against autograd in float64: loss and both gradients of two heads, with masked tokens, in several chunks and
    blocks of a row."""
    monkeypatch.setattr(taught, "LEAST_MEMORY", 0)  # chunks of 128
    monkeypatch.setattr(taught, "ROW", taught.Tile(1, 64, 4, 1))
    heads, W, h, y = problem(129 if impl == "fused" else 700, 12, 90, (1, 7))
    losses, grads = distilled(heads, W, h, y, temperature, mix, impl)
    for found, (dA, dB), (want, want_A, want_B) in zip(
        losses, grads, defined(heads, W, h, y, temperature, mix, torch.float64)
    ):
        assert torch.allclose(found.double(), want, atol=1e-4)
        assert torch.allclose(2 * dA.double(), want_A, rtol=1e-4, atol=1e-3) and torch.allclose(
            2 * dB.double(), want_B, rtol=1e-4, atol=1e-3
        )
    for i, head in list(enumerate(heads))[-1 if impl == "fused" else 0 :]:  # alone: the same bits
        loss, ((dA, dB),) = distilled([head], W, h, y, temperature, mix, impl)
        assert torch.equal(loss[0], losses[i]) and torch.equal(dA, grads[i][0]) and torch.equal(dB, grads[i][1])


@pytest.mark.parametrize("temperature, mix", [(1.0, 0.9), (2.0, 0.5)])
def test_distillation_in_sixteen_bits_is_as_close_as_plain_pytorch(temperature, mix):
    """Three ways: the error against float64 is at most that of eager PyTorch in bfloat16, plus 5 %."""
    heads, W, h, y = problem(65, 48, 1300, (5, 40))
    heads, W, h = (
        [tuple(t.bfloat16().float() for t in head) for head in heads],
        W.bfloat16().float() / 3,
        h.bfloat16().float(),
    )
    losses, grads = distilled(heads, W, h, y, temperature, mix, "fused", torch.bfloat16)
    exact, plain = (defined(heads, W, h, y, temperature, mix, d) for d in (torch.float64, torch.bfloat16))
    for loss, (dA, dB), truth, eager in zip(losses, grads, exact, plain):
        for got, want, other in zip((loss, 2 * dA, 2 * dB), truth, eager):
            assert (got - want).norm() <= 1.05 * (other - want).norm()


def test_a_trained_teacher_learns_from_the_data_and_teaches_the_others():
    """The head of rank D has the gradient of cross-entropy, bit for bit; the others that of distillation from its
    logits of the step."""
    g = torch.Generator().manual_seed(2)
    N, D, V = 500, 12, 90
    h, y = torch.randn(N, D, generator=g), torch.randint(0, V, (N,), generator=g)
    keys = [HeadKey(3, 1e-2, 0), HeadKey(D, 1e-2, 0), HeadKey(5, 1e-2, 0)]

    def bank_of(keys):
        bank = HeadBank(keys, V, D, "chunked")
        for key in keys:
            own = torch.Generator().manual_seed(key.rank)
            bank[key].set(torch.randn(V, key.rank, generator=own), torch.randn(key.rank, D, generator=own) / 3)
        bank.zero_gradients()
        return bank

    def gradients(bank, objective):
        bank.objective = objective
        losses = bank.accumulate(h, y, bank.cast(torch.float32), 1 / N)
        return {key: (loss, bank[key].A.grad, bank[key].B.grad) for key, loss in zip(bank.keys, losses)}

    trained = BoundObjective(OBJECTIVES["mixed"], {"temperature": 1.0, "mix": 0.9})
    found = gradients(bank_of(keys), trained)
    teacher = bank_of(keys)[keys[1]]
    fixed = gradients(
        bank_of(keys), dataclasses.replace(trained, teacher_logits=lambda x: (x @ teacher.B.T) @ teacher.A.T)
    )
    plain = gradients(bank_of(keys), None)
    pair = gradients(bank_of(keys[1:]), trained)
    for key, want in ((keys[0], fixed), (keys[1], plain), (keys[2], fixed), (keys[2], pair), (keys[1], pair)):
        assert all(torch.equal(a, b) for a, b in zip(found[key], want[key])), key
    assert not torch.equal(found[keys[0]][1], plain[keys[0]][1])
    for wrong in (keys[:1], [*keys, HeadKey(D, 2e-2, 0)]):
        with pytest.raises(UserError, match="head.teacher=trained"):
            gradients(bank_of(wrong), trained)


def test_a_trained_teacher_through_a_run(run, tmp_path):
    """The recipe names it. It is refused without a head of full rank, and for an objective without KL."""
    curve = run("ranks=[4,32]", "objective=mixed", "head.mix=0.9", "head.teacher=trained").curve
    assert curve["recipe"]["teacher"] == "trained" and [h["status"] for h in curve["heads"]] == ["ok", "ok"]
    for wrong in (("ranks=[4]", "objective=distill", "head.teacher=trained"), ("ranks=[4,32]", "head.teacher=trained")):
        with pytest.raises(UserError, match="head.teacher=trained"):
            run(*wrong, run_dir=tmp_path / "refused")


def test_distillation_ends_nearer_to_the_full_head(run, tmp_path):
    """At the same rank and tokens; the objective is part of the recipe, so merged curves stay apart."""
    ce, kd = (run("ranks=[4]", f"objective={o}", run_dir=tmp_path / o).curve for o in ("ce", "distill"))
    assert kd["heads"][0]["kl"] < ce["heads"][0]["kl"] and ce["heads"][0]["loss"] < kd["heads"][0]["loss"]
    assert kd["recipe"]["objective"] == "distill" and "objective" not in ce["recipe"]
