"""What a head loses beyond perplexity, against brute force in float64; training on the full head; the knee."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import bottleneck.losses.fused as fused
from bottleneck.core.errors import UserError
from bottleneck.core.extensions import METRICS, OBJECTIVES, Metric, Predictions, metrics
from bottleneck.evaluation.agreement import BANDS, bands_of, compare, grouped, metric_sums
from bottleneck.heads.bank import HeadBank, HeadKey
from bottleneck.losses.linear import targets, weights
from bottleneck.losses.objective import BoundObjective, steps
from bottleneck.losses.products import matmul_f32
from bottleneck.results.knee import crossing, knee_lines, knees

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def brute(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """The four numbers, token by token, with loops."""
    out = []
    for s, t in zip(p_logits.astype(np.float64), q_logits.astype(np.float64)):
        p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (s, t))
        five = [set(np.argsort(-x, kind="stable")[:5]) for x in (p, q)]
        out.append(
            [
                sum(a * math.log(a / b) for a, b in zip(p, q)),
                float(p.argmax() == q.argmax()),
                len(five[0] & five[1]) / 5,
                sum(map(min, p, q)),
            ]
        )
    return np.array(out)


def test_the_four_numbers_equal_brute_force():
    g = torch.Generator().manual_seed(0)
    s = 3 * torch.randn(40, 300, generator=g)
    t = s + torch.linspace(0, 2, 40)[:, None] * torch.randn(40, 300, generator=g)
    y = torch.zeros(40, dtype=torch.long)
    p, q = Predictions(torch.log_softmax(s, -1), y), Predictions(torch.log_softmax(t, -1), y)
    built_in = [METRICS[n] for n in ("kl", "top1_agreement", "top5_agreement", "acceptance")]
    found = torch.stack([m.measure(p, q) for m in built_in], -1)
    assert np.allclose(found, brute(s.numpy(), t.numpy()), atol=2e-6)
    same = torch.stack([m.measure(p, p) for m in built_in], -1)
    assert (
        (same[:, 0] == 0).all() and (same[:, 1:3] == 1).all() and torch.allclose(same[:, 3], torch.ones(40), atol=1e-6)
    )


def test_a_plugins_metric_changes_no_bit_of_the_others():
    g = torch.Generator().manual_seed(0)
    y = torch.zeros(300, dtype=torch.long)
    p, q = (Predictions(torch.log_softmax(4 * torch.randn(300, 500, generator=g), -1), y) for _ in range(2))
    built_in = metrics()
    more = [*built_in, *(Metric(str(i), "", lambda p, q: p.log_p_nV[:, 0], "", "", "lower") for i in range(3))]
    assert torch.equal(metric_sums(p, q, more)[:4], metric_sums(p, q, built_in))


def test_groups_of_blocks_are_all_of_the_text():
    """Consecutive blocks are joined, in order; sums over groups are the sums over blocks."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 64, 1234)
    sums = rng.random((3, 1234)) * tokens
    counts, means = grouped(sums, tokens)
    assert len(counts) == 100 and sum(counts) == tokens.sum() and counts[0] == tokens[:13].sum()
    assert np.allclose(np.array(means) @ counts, sums.sum(1), rtol=1e-6)
    sums[1, 7] = np.inf
    assert grouped(sums[:, :9], tokens[:9])[1][1][7] is None and len(grouped(sums[:, :9], tokens[:9])[0]) == 9


def test_a_real_run_has_them_for_every_head(run, tmp_path):
    """Over all validation tokens, equal to a direct evaluation of the saved heads; full rank from the original head
    loses nothing."""
    result = run("tokens=2048", "ranks=[2,32]", "optim.lr=[1e-9,1e-2]", "trainer.micro_batch_size=3")
    module, c = result.module, json.loads((tmp_path / "run" / "curve.json").read_text())
    hidden, goals = [], []
    for inputs, y in module.validation(0, 1):
        keep = y.flatten() != -100
        hidden.append(module.backbone(inputs).flatten(0, 1)[keep])
        goals.append(y.flatten()[keep])
    h, y = torch.cat(hidden), torch.cat(goals)
    full = module.backbone.head.logits(h).double()
    band = module.bands[y]
    for row in c["heads"]:
        head = module.bank[HeadKey(row["rank"], row["lr"], row["seed"])]
        logits = h.double() @ head.B.double().T @ head.A.double().T
        want = brute(full.detach().numpy(), logits.detach().numpy()).mean(0)
        assert np.allclose(
            [row[k] for k in ("kl", "top1_agreement", "top5_agreement", "acceptance")], want, atol=1e-5
        ), row["rank"]
        losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        for i, found in enumerate(row["bands"]):
            at = band == i
            assert found["tokens"] == int(at.sum())
            assert (found["loss"] is None) == (not at.any()) and (
                not at.any() or abs(found["loss"] - losses[at].mean().item()) < 1e-5
            )
        groups = zip(c["reference"]["group_tokens"], row["group_losses"])
        assert abs(sum(n * x for n, x in groups) / len(y) - row["loss"]) < 1e-5
        counted = sum(b["tokens"] * b["loss"] for b in row["bands"] if b["tokens"]) / len(y)
        assert abs(counted - row["loss"]) < 1e-5  # the bands are all of the loss
    (untouched,) = [r for r in c["heads"] if r["rank"] == 32 and r["lr"] == 1e-9]
    assert untouched["kl"] < 1e-6 and untouched["top1_agreement"] == 1 and abs(untouched["acceptance"] - 1) < 1e-4
    assert (
        "kl" in (tmp_path / "run" / "curve.csv").read_text().splitlines()[0]
        and (tmp_path / "run" / "details.png").stat().st_size > 10_000
    )


def test_kl_of_the_full_head_with_itself_is_zero(run):
    module = run("tokens=1024", "ranks=[32]").module
    key = module.bank.keys[0]
    bank = HeadBank([key], module.backbone.vocab_size, module.backbone.hidden_size)
    bank[key].set(module.backbone.head.W_VD, torch.eye(module.backbone.hidden_size))
    (found,) = compare(module.backbone, bank, module.validation(0, 1), module.bands)["heads"].values()
    assert (
        found["kl"] == 0
        and found["top1_agreement"] == found["top5_agreement"] == 1
        and abs(found["acceptance"] - 1) < 1e-6
    )


def test_bands_follow_the_counts():
    text = np.repeat(np.arange(2000), np.arange(2000, 0, -1)).astype(np.uint16)
    np.random.default_rng(0).shuffle(text)
    bands = bands_of(text, 20_000)
    for i, (first, last) in enumerate(BANDS):
        assert ((torch.arange(20_000) >= first - 1) & (torch.arange(20_000) < (last or 20_000)) == (bands == i)).all()


def taught(heads, W, h, y, temperature, mix, impl, dtype=torch.float32):
    """Losses [H, N] and gradients of heads that the full head W teaches; scale 0.5."""
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


def pupils(N, D, V, ranks):
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
    monkeypatch.setattr(fused, "GOAL_MEMORY", 0)  # chunks of 128
    monkeypatch.setattr(fused, "ROW", fused.Tile(1, 64, 4, 1))
    heads, W, h, y = pupils(129 if impl == "fused" else 700, 12, 90, (1, 7))
    losses, grads = taught(heads, W, h, y, temperature, mix, impl)
    for found, (dA, dB), (want, want_A, want_B) in zip(
        losses, grads, defined(heads, W, h, y, temperature, mix, torch.float64)
    ):
        assert torch.allclose(found.double(), want, atol=1e-4)
        assert torch.allclose(2 * dA.double(), want_A, rtol=1e-4, atol=1e-3) and torch.allclose(
            2 * dB.double(), want_B, rtol=1e-4, atol=1e-3
        )
    for i, head in list(enumerate(heads))[-1 if impl == "fused" else 0 :]:  # alone: the same bits
        loss, ((dA, dB),) = taught([head], W, h, y, temperature, mix, impl)
        assert torch.equal(loss[0], losses[i]) and torch.equal(dA, grads[i][0]) and torch.equal(dB, grads[i][1])


@pytest.mark.parametrize("temperature, mix", [(1.0, 0.9), (2.0, 0.5)])
def test_distillation_in_sixteen_bits_is_as_close_as_plain_pytorch(temperature, mix):
    """Three ways: the error against float64 is at most that of eager PyTorch in bfloat16, plus 5 %."""
    heads, W, h, y = pupils(65, 48, 1300, (5, 40))
    heads, W, h = (
        [tuple(t.bfloat16().float() for t in head) for head in heads],
        W.bfloat16().float() / 3,
        h.bfloat16().float(),
    )
    losses, grads = taught(heads, W, h, y, temperature, mix, "fused", torch.bfloat16)
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
    fixed = gradients(bank_of(keys), dataclasses.replace(trained, teacher_logits=lambda x: (x @ teacher.B.T) @ teacher.A.T))
    plain = gradients(bank_of(keys), None)
    pair = gradients(bank_of(keys[1:]), trained)
    for key, want in ((keys[0], fixed), (keys[1], plain), (keys[2], fixed), (keys[2], pair), (keys[1], pair)):
        assert all(torch.equal(a, b) for a, b in zip(found[key], want[key])), key
    assert not torch.equal(found[keys[0]][1], plain[keys[0]][1])
    for wrong in (keys[:1], [*keys, HeadKey(D, 2e-2, 0)]):
        with pytest.raises(UserError, match="head.teacher=trained"):
            gradients(bank_of(wrong), trained)


def test_a_trained_teacher_through_a_run(run, tmp_path):
    """Said in the recipe; refused where there is no head of the full rank, or no KL."""
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


def curve_of(losses: dict[tuple[int, int], float], own: float) -> dict:
    heads = [
        {"init": "fisher", "rank": r, "seed": s, "loss": x, "status": "ok", "best": True}
        for (r, s), x in losses.items()
    ]
    return {"reference": {"loss": own}, "heads": heads}


def test_the_knee_of_a_known_curve():
    """loss = 2 + 1 / r at powers of two: between two ranks the line in log2 r is met where it crosses the target."""
    points = [(r, 2 + 1 / r) for r in (2, 4, 8, 16, 32)]
    assert crossing(points, 2.25) == pytest.approx(4) and crossing(points, 2.1) == pytest.approx(
        2 ** (3 + (0.125 - 0.1) / 0.0625)
    )
    assert crossing(points, 3) == 2 and crossing(points, 1.9) is None
    assert crossing([(2, 2.0), (4, 2.3), (8, 2.0)], 2.1) == pytest.approx(2 ** (2 + 2 / 3))  # a dip does not count
    c = curve_of({(r, 0): 2 + 1 / r for r in (2, 4, 8, 16, 32)} | {(r, 1): 2 + 1.5 / r for r in (2, 4, 8, 16, 32)}, 2.0)
    one, five, ten = c["knee"] = knees(c)
    assert one["rank"] is None and one["low"] is None and five["percent"] == 5 and five["seeds"] == 2
    assert (
        ten["low"] == ten["rank"] < ten["high"]
        and crossing([(r, 2 + 1.5 / r) for r in (2, 4, 8, 16, 32)], 2.2) == ten["high"]
    )
    (line,) = knee_lines(c)
    assert "1 %: none of these ranks; 5 %: rank" in line and "over 2 seeds" in line


def test_the_knee_tells_of_seeds_that_do_not_reach_it():
    lucky = {(r, 0): 2 + 1 / r for r in (2, 4, 8, 16, 32)}
    c = curve_of(lucky | {(r, 1): 3.0 for r in (2, 4, 8, 16, 32)}, 2.0)
    *_, ten = c["knee"] = knees(c)
    assert (ten["seeds"], ten["reached"]) == (2, 1) and ten["low"] == ten["high"] == ten["mean"] == ten["rank"]
    assert "over 1 of 2 seeds)" in knee_lines(c)[0] and "1 %: none of these ranks" in knee_lines(c)[0]
    # a rank that one seed has alone is left out of the spread, not the spread
    wide = curve_of(lucky | {(r, 1): 2 + 1.5 / r for r in (2, 4, 8, 16, 32, 64)}, 2.0)
    *_, ten = knees(wide)
    assert ten["seeds"] == ten["reached"] == 2 and ten["low"] < ten["high"]


def test_the_last_validation_runs_where_the_training_did(run, tmp_path, monkeypatch):
    """Before Lightning takes the run apart, which moves the backbone to the CPU; a finished run that is resumed moves
    it back."""
    from pytorch_lightning.strategies import SingleDeviceStrategy

    import bottleneck.training.module
    from bottleneck.training.module import HeadSweep

    events, compare, teardown, to = [], bottleneck.training.module.compare, SingleDeviceStrategy.teardown, HeadSweep.to
    monkeypatch.setattr(bottleneck.training.module, "compare", lambda *a: (events.append("compared"), compare(*a))[1])
    monkeypatch.setattr(
        SingleDeviceStrategy, "teardown", lambda self: (events.append("taken apart"), teardown(self))[1]
    )
    monkeypatch.setattr(HeadSweep, "to", lambda self, device: (events.append(f"to {device}"), to(self, device))[1])
    run("tokens=1024")
    assert events.index("compared") < events.index("taken apart") and events.count("compared") == 1
    (tmp_path / "run" / "curve.json").unlink()
    events.clear()
    run("tokens=1024", "ckpt_path=last")
    assert events[-3:] == ["taken apart", "to cpu", "compared"]
