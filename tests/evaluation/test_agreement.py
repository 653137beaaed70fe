"""Agreement with the original head and losses by band, against brute force in float64."""

from __future__ import annotations

import json
import math

import numpy as np
import torch

from bottleneck.core.extensions import METRICS, Metric, Predictions, metrics
from bottleneck.core.most_likely import most_likely
from bottleneck.evaluation.agreement import BANDS, _Sums, bands_of, compare, grouped, metric_sums
from bottleneck.heads.bank import HeadBank, HeadKey

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


def test_the_most_likely_tokens_are_those_of_a_sort():
    g = torch.Generator().manual_seed(0)
    for V in (5, 300, 1_279, 1_280, 1_345, 8_192, 50_257):
        values = torch.randn(7, V, generator=g)
        values[0, -5:] += 9.0  # in the rest behind the last whole group
        values[1, :5] += 9.0  # all in one group
        values[2, 3] = float("nan")  # of a diverged head: above all others, as in torch.sort
        assert most_likely(values, 5).equal(values.sort(descending=True).indices[:, :5])
    equal = torch.zeros(2, 50_257)
    assert len(set(most_likely(equal, 5)[0].tolist())) == 5


def test_metrics_of_one_measure_compute_it_once():
    """Nine built-in metrics share `acceptance`, which reads all logits several times."""
    calls = []

    def measure(original, head):
        calls.append(1)
        return torch.ones(len(head.targets_n))

    g = torch.Generator().manual_seed(0)
    found = Predictions(torch.randn(6, 9, generator=g).log_softmax(-1), torch.randint(9, (6,), generator=g))
    named = [Metric(name=n, summary="", measure=measure, title=n, unit="", better="higher") for n in "abc"]
    assert metric_sums(found, found, named).tolist() == [6.0] * 3 and len(calls) == 1
    sums = _Sums(1, named, torch.device("cpu"))
    sums.compare(0, found, found)
    assert sums.metrics_HK[0].tolist() == [6.0] * 3 and len(calls) == 2


def test_a_plugins_metric_changes_no_bit_of_the_others():
    g = torch.Generator().manual_seed(0)
    y = torch.zeros(300, dtype=torch.long)
    p, q = (Predictions(torch.log_softmax(4 * torch.randn(300, 500, generator=g), -1), y) for _ in range(2))
    built_in = metrics()
    more = [*built_in, *(Metric(str(i), "", lambda p, q: p.log_p_nV[:, 0], "", "", "lower") for i in range(3))]
    assert torch.equal(metric_sums(p, q, more)[: len(built_in)], metric_sums(p, q, built_in))


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
    """Means over all validation tokens equal a direct evaluation of the saved heads; at r = d nothing is lost."""
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


def test_the_last_validation_runs_on_the_device_of_training(run, tmp_path, monkeypatch):
    """Lightning's teardown moves the backbone to the CPU, so validation comes before it. A resumed finished run moves
    the backbone back.
    """
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
