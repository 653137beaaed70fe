"""Head kinds: gradients against float64, the same bits alone and in a bank, runs that resume, files that load."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import bottleneck.heads.head as head_module
from bottleneck.backbone.model import FullHead
from bottleneck.config.checks import check_config
from bottleneck.config.head_groups import head_groups
from bottleneck.config.schema import OptimConfig
from bottleneck.core.errors import UserError
from bottleneck.core.extensions import HEAD_KINDS, OBJECTIVES
from bottleneck.heads.bank import HeadBank
from bottleneck.heads.calibration import calibrate
from bottleneck.heads.head import build_head, count_parameters, product
from bottleneck.heads.key import HeadKey
from bottleneck.heads.starting import make_start
from bottleneck.heads.vocabulary import REST, draft_to_target
from bottleneck.losses import targets, weights
from bottleneck.losses.objective import BoundObjective, steps
from bottleneck.training.finished_run import open_run
from bottleneck.training.optim import build_optimizer, clip_per_head
from bottleneck.training.run_folder import LAST
from conftest import composed, heads_of

V, D, N = 70, 12, 150
LINEAR_KINDS = ("low_rank", "full", "block", "low_rank_sparse")


# options that make small heads of a kind interesting
SMALL = {
    "block": (("bands", (20, 45)), ("shrink", 2)),
    "low_rank_sparse": (("rows", 9),),
    "low_rank_truncated": (("rows", 9),),
    "mos": (("components", 3),),
    "plif": (("limit", 1.5), ("pieces", 7)),
    "truncated": (("rows", 9),),
}


def key_of(kind: str, rank: int = 5) -> HeadKey:
    return HeadKey(D if HEAD_KINDS[kind].full_rank else rank, 1e-2, 0, kind, SMALL.get(kind, ()))


@pytest.fixture
def setting():
    """Hidden states, targets of which some are ignored, and a head that teaches; float64."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(N, D, generator=g, dtype=torch.float64)
    y = torch.randint(0, V, (N,), generator=g).masked_fill(torch.rand(N, generator=g) < 0.2, -100)
    return h, y, torch.randn(V, D, generator=g, dtype=torch.float64) / 2


def randomised(key: HeadKey, dtype: torch.dtype = torch.float64):
    """A head with random parameters that depend on its key alone."""
    head = build_head(key, V, D).to(dtype)
    g = torch.Generator().manual_seed(len(key.name))
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / 3)
            p.grad = torch.zeros_like(p)
    return head


@pytest.mark.parametrize("kind", [k for k in HEAD_KINDS.names() if k != "low_rank"])
@pytest.mark.parametrize("objective", ["ce", "mixed"])
def test_gradients_are_autograds_in_float64(kind, objective, setting, monkeypatch):
    """Chunks of 7 tokens add up to the gradient of the whole loss, ignored tokens left out."""
    monkeypatch.setattr(head_module, "chunk_rows", lambda *a: 7)
    h, y, W = setting
    head, t = randomised(key_of(kind)), targets(y)
    options = {"temperature": 1.7, "mix": 0.3}
    o = BoundObjective(OBJECTIVES["mixed"], options, lambda x: x @ W.T)
    if objective == "ce":
        losses = head.step(h, t, None, 0.5)
    else:
        (losses,) = type(head).taught_steps([head], h, t, [None], 0.5, o)
    found = [p.grad.clone() for p in head.parameters()]
    keep = y >= 0
    logits = head.logits(h[keep])
    want = torch.nn.functional.cross_entropy(logits, y[keep], reduction="none")
    if objective == "mixed":
        p = torch.softmax(h[keep] @ W.T / 1.7, -1)
        kl = (p * (p.log() - torch.log_softmax(logits / 1.7, -1))).sum(-1)
        want = 0.3 * 1.7**2 * kl + 0.7 * want
    for a, b in zip(found, torch.autograd.grad(0.5 * want.sum(), list(head.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(losses[keep].double(), want.detach(), rtol=1e-5, atol=1e-6)
    assert (losses[~keep] == 0).all()


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_the_fast_path_of_an_objective_is_its_definition(name, setting):
    """Low-rank heads: losses and gradients of the chunked step against the declared loss in float64."""
    h, y, W = setting
    declared = OBJECTIVES[name]
    options = {**declared.options, **({"temperature": 1.3} if "temperature" in declared.options else {})}
    g = torch.Generator().manual_seed(3)
    A, B = torch.randn(V, 4, generator=g) / 2, torch.randn(4, D, generator=g) / 2
    A64, B64 = (t.double().requires_grad_() for t in (A, B))
    keep = y >= 0
    T = options.get("temperature", 1.0)
    log_teacher = torch.log_softmax(h[keep] @ W.T / T, -1)
    want = declared.loss((h[keep] @ B64.T) @ A64.T, y[keep], log_teacher if declared.teacher else None, options)
    gradients = torch.autograd.grad(want.sum(), (A64, B64))
    for slow in (False, True):  # without `fast`, the declared loss is differentiated
        o = BoundObjective(
            dataclasses.replace(declared, fast=None) if slow else declared, options, lambda x: x @ W.float().T
        )
        if declared.fast is None and not slow:
            continue
        dA, dB = torch.zeros_like(A), torch.zeros_like(B)
        losses = steps(h.float(), [weights(A, B, torch.float32, "chunked")], targets(y), [(dA, dB)], 1.0, o)
        torch.testing.assert_close(losses[0][keep].double(), want.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((dA.double(), dB.double()), gradients, rtol=1e-4, atol=1e-4)
        assert (losses[0][~keep] == 0).all()


def test_16_bit_products_add_in_float32():
    """`product` rounds its operands only: value and gradients against float64 of the rounded operands."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(40, 6, generator=g).bfloat16().requires_grad_(), torch.randn(30, 6, generator=g).requires_grad_()
    out = product(x, W)
    G = torch.randn(40, 30, generator=g).bfloat16()
    out.backward(G.float())
    exact = x.detach().double() @ W.detach().bfloat16().double().T
    assert out.dtype == torch.float32 and torch.allclose(out.double(), exact, atol=1e-5)
    assert torch.allclose(W.grad.double(), G.double().T @ x.detach().double(), atol=1e-4)
    assert torch.allclose(x.grad.double(), G.double() @ W.detach().bfloat16().double(), rtol=1e-2, atol=1e-1)


def trained(keys: list[HeadKey], h: torch.Tensor, y: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Parameters of each head after three optimizer steps."""
    bank = HeadBank(keys, V, D, "chunked")
    for key in keys:
        bank[key].load(randomised(key, torch.float32).tensors())
    optimizer = build_optimizer(bank, OptimConfig(clip=0.1))
    for _ in range(3):
        bank.zero_gradients()
        losses = bank.accumulate(h, y, bank.cast(torch.float32), 1 / N)
        _, optimizer.divisors = clip_per_head(bank, 0.1, losses, optimizer.norms())
        optimizer.step()
    return {key.name: [p.detach().clone() for p in bank[key].parameters()] for key in keys}


def test_a_head_has_the_same_bits_alone_and_in_a_bank(setting):
    """One bank with a head of every kind: each has the bits that it has by itself, clipped by its own norm."""
    h, y = setting[0].float(), setting[1]
    keys = [key_of(kind) for kind in HEAD_KINDS.names()] + [HeadKey(3, 1e-2, 0)]
    together = trained(keys, h, y)
    for key in keys:
        for a, b in zip(trained([key], h, y)[key.name], together[key.name]):
            assert torch.equal(a, b), key


def from_start(kind: str, rank: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of a head of a kind and of the low-rank head of the same start, on calibration states."""
    g = torch.Generator().manual_seed(0)
    h, head = torch.randn(400, D, generator=g), FullHead(torch.randn(V, D, generator=g))
    moments = calibrate([h], head)
    A, B = make_start("fisher", head, moments)(HeadKey(rank, 0.1, 0))
    own = build_head(key_of(kind, rank), V, D)
    own.begin(key_of(kind, rank), A, B, head=head, moments=moments)
    return torch.log_softmax(own.logits(h), -1), torch.log_softmax(h @ B.float().T @ A.float().T, -1)


@pytest.mark.parametrize("kind", ["context_temperature", "gated", "low_rank_bias"])
def test_kinds_that_begin_as_the_low_rank_head(kind):
    torch.testing.assert_close(*from_start(kind), rtol=1e-4, atol=1e-4)


def test_how_the_other_kinds_begin():
    """Full rows are exact at full rank, blocks keep the best part, a mixture is near the head that it mixes."""
    own, plain = from_start("low_rank_sparse", D)
    torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-4)
    own, plain = from_start("low_rank_sparse")
    assert not torch.allclose(own, plain, atol=0.1)
    for kind, limit in (("mos", 0.5), ("block", 0.5)):
        own, plain = from_start(kind)
        assert 0 < (plain.exp() * (plain - own)).sum(-1).mean() < limit


@pytest.mark.parametrize("kind", ["truncated", "low_rank_truncated"])
def test_truncated_heads_keep_the_tokens_that_are_expected_most(kind):
    """Among its tokens a head is the start's softmax; the others share one part in a million, and no gradient."""
    rank = D if kind == "truncated" else 5
    own, plain = from_start(kind, rank)
    g = torch.Generator().manual_seed(0)
    h, W = torch.randn(400, D, generator=g), torch.randn(V, D, generator=g)
    kept = torch.softmax(h @ W.T, -1).mean(0).topk(9).indices.sort().values
    torch.testing.assert_close(own[:, kept].log_softmax(-1), plain[:, kept].log_softmax(-1), rtol=1e-4, atol=1e-4)
    others = own.exp().sum(-1) - own[:, kept].exp().sum(-1)
    torch.testing.assert_close(others, torch.full((400,), REST), rtol=0.2, atol=5e-7)
    head = randomised(key_of(kind))
    head.tokens_K.copy_(kept)
    (other,) = torch.tensor([v for v in range(V) if v not in kept])[:1]
    loss = torch.nn.functional.cross_entropy(head.logits(h.double()), other.expand(400))
    assert loss.isfinite() and all(g.abs().max() < 1e-12 for g in torch.autograd.grad(loss, list(head.parameters())))
    assert (torch.arange(9) + draft_to_target(head.tokens_K) == kept).all()


def test_formulas_of_the_kinds(setting):
    """Probabilities from the definitions of the papers, in float64."""
    h = setting[0]
    mos = randomised(key_of("mos"))
    prior = torch.softmax(h @ mos.G.T, -1)
    p = sum(prior[:, k, None] * torch.softmax(h @ B.T @ mos.A.T, -1) for k, B in enumerate(mos.B))
    torch.testing.assert_close(mos.logits(h).exp(), p)
    sig = randomised(key_of("sigsoftmax"))
    s = h @ sig.B.T @ sig.A.T
    p = s.exp() * torch.sigmoid(s)
    torch.testing.assert_close(torch.softmax(sig.logits(h), -1), p / p.sum(-1, keepdim=True))
    plif = randomised(key_of("plif"))
    s = h @ plif.B.T @ plif.A.T
    knots = torch.linspace(-1.5, 1.5, 8, dtype=torch.float64)[:-1]
    slopes = torch.nn.functional.softplus(plif.slopes)
    f = -1.5 + slopes[0] * (s + 1.5)
    for knot, change in zip(knots[1:], slopes.diff()):
        f = f + change * (s - knot).clamp(min=0)
    torch.testing.assert_close(plif.logits(h), f)
    order = s.flatten().argsort()
    assert (f.flatten()[order].diff() > 0).all() and (s.abs() > 1.5).any()


@pytest.mark.parametrize("kind", HEAD_KINDS.names())
def test_logits_that_are_not_numbers_are_a_loss_that_is_not(kind):
    """In float16, z of a head that diverges overflows. `plif` looked up a piece of a NaN, and the run ended."""
    head, y = randomised(key_of(kind), torch.float32), torch.zeros(4, dtype=torch.long)
    h = torch.full((4, D), float("nan"))
    for p in head.parameters():
        p.grad = torch.zeros_like(p)
    assert head.step(h, y, head.read(h.dtype, head.impl(h.dtype, 4, "auto")), 1.0).isnan().all()


def test_gradient_of_slopes_has_the_same_bits_with_several_threads():
    """Plain indexing added it in float32, by atomics: 4e-4 off, and a resumed run differed. Tests used one thread."""
    head, n = build_head(key_of("plif"), 8192, 16), 256
    with torch.no_grad():
        for i, p in enumerate((head.A, head.B)):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    h = torch.randn(n, 16, generator=torch.Generator().manual_seed(2))
    y = torch.arange(n) * 31

    def gradient(head, h):
        loss = torch.nn.functional.cross_entropy(head.logits(h), y, reduction="sum")
        return torch.autograd.grad(loss, head.slopes)[0]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [gradient(head, h) for _ in range(4)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(g, found[0]) for g in found)
    want = gradient(copy.deepcopy(head).double(), h.double())
    assert (found[0] - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_linear_kinds_are_one_matrix(kind, setting):
    """`dense` is W with logits = h Wᵀ; the other kinds have none."""
    head, h = randomised(key_of(kind), torch.float32), setting[0].float()
    torch.testing.assert_close(head.logits(h), h @ head.dense().T)
    assert all((randomised(key_of(k)).dense() is None) == (k not in LINEAR_KINDS) for k in HEAD_KINDS.names())


def test_numbers_of_one_value_name_one_head():
    """A limit of 10 and of 10.0 is one head, listed twice."""
    heads = "[{kind: plif, rank: 5, limit: 10},{kind: plif, rank: 5, limit: 10.0}]"
    entries = check_config(composed([f"heads={heads}"])).heads
    assert entries[0] == entries[1] and type(entries[0]["limit"]) is float
    plain = check_config(composed(["head.kind=plif", "head.options={limit: 10}"]))
    assert head_groups(plain)[0].options["limit"] == 10 and type(head_groups(plain)[0].options["limit"]) is float


def test_one_component_is_the_low_rank_head(setting):
    """`mos` with K = 1 is `low_rank` bit for bit: it is the same class."""
    h, y = setting[0].float(), setting[1]
    keys = HeadKey(5, 1e-2, 0), HeadKey(5, 1e-2, 0, "mos", (("components", 1),))
    found = []
    for key in keys:
        bank = HeadBank([key], V, D, "chunked")
        bank[key].set(*(torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in ((V, 5), (5, D))))
        bank.zero_gradients()
        found.append([bank.accumulate(h, y, bank.cast(h.dtype), 1 / N), *(p.grad for p in bank.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in HEAD_KINDS.names() if k not in ("low_rank", "full")])
def test_runs_of_every_kind_resume(kind, run, tmp_path):
    """The loss falls below the start's; a run stopped at step 18 of 20 resumes to the same bits; head files load."""
    options = ",".join(
        f"{n}:{str(list(v) if isinstance(v, tuple) else v).replace(' ', '')}" for n, v in SMALL.get(kind, ())
    )
    ranks = "auto" if HEAD_KINDS[kind].full_rank else "[8]"
    words = [f"ranks={ranks}", f"head.kind={kind}", f"head.options={{{options}}}"]
    whole = run(*words, run_dir=tmp_path / "whole")
    run(*words, run_dir=tmp_path / "cut")
    (tmp_path / "cut" / LAST).unlink()
    (tmp_path / "cut" / "curve.json").unlink()
    assert run(*words, "ckpt_path=last", run_dir=tmp_path / "cut").curve["heads"] == whole.curve["heads"]
    (row,) = whole.curve["heads"]
    assert row["kind"] == kind and row["loss"] < row["initial_loss"]
    head = open_run(tmp_path / "whole").head(row)
    for a, b in zip(head.parameters(), whole.module.bank.parameters()):
        assert torch.equal(a, b)


def test_counts_and_names():
    assert count_parameters(HeadKey(5, 0.1, 0), V, D) == 5 * (V + D)
    assert count_parameters(HeadKey(D, 0.1, 0, "full"), V, D) == V * D
    assert HeadKey(D, 0.1, 0, "full").name == "full_r12_lr1e-1_s0"
    key = HeadKey(8, 0.01, 3, "mos", (("components", 4), ("mix", 0.5)))
    assert key.name == "mos-components4-mix5e-1_r8_lr1e-2_s3"
    assert HeadKey.of({"rank": 8, "lr": 0.01, "seed": 3, **key.facts}) == key
    assert HeadKey(8, 0.01, 3).facts == {}


def test_a_run_of_the_full_kind(run, tmp_path):
    """It starts as rank d of W = A B does; the row names the kind; a resumed run has the same bits; its file loads."""
    plain = run("ranks=[32]", run_dir=tmp_path / "plain").curve["heads"][0]
    result = run("ranks=auto", "head.kind=full", run_dir=tmp_path / "whole")
    (row,) = result.curve["heads"]
    assert row["kind"] == "full" and row["rank"] == 32 and row["parameters"] == 320 * 32 and "kind" not in plain
    assert row["initial_loss"] == pytest.approx(plain["initial_loss"], abs=1e-5)
    assert row["loss"] < row["initial_loss"] and row["status"] == "ok" and row["kl"] > 0
    run("ranks=auto", "head.kind=full", run_dir=tmp_path / "cut")
    (tmp_path / "cut" / LAST).unlink()
    (tmp_path / "cut" / "curve.json").unlink()
    resumed = run("ranks=auto", "head.kind=full", "ckpt_path=last", run_dir=tmp_path / "cut")
    assert resumed.curve["heads"] == result.curve["heads"]
    (name,) = heads_of(tmp_path / "whole")
    assert torch.equal(heads_of(tmp_path / "whole")[name]["W"], heads_of(tmp_path / "cut")[name]["W"])
    finished = open_run(tmp_path / "whole")
    assert torch.equal(finished.dense(row), result.module.bank[result.module.bank.keys[0]].W.detach())
    with pytest.raises(UserError, match="kind full has no factors"):
        finished.factors(row)


def test_a_full_head_teaches_another_run(run, tmp_path):
    """head.teacher=FOLDER takes a head of any kind that is one matrix."""
    run("ranks=auto", "head.kind=full", "optim.lr=1e-1", run_dir=tmp_path / "teacher")
    curve = run(
        "ranks=[4]", "objective=distill", f"head.teacher={tmp_path / 'teacher'}", run_dir=tmp_path / "taught"
    ).curve
    assert curve["recipe"]["teacher"].startswith("full_r32_lr1e-1_s0:")


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("head.kind=magic",), "head.kind=magic: no such head kind; allowed are "),
        (("head.kind=full", "ranks=[8]"), "head.kind=full exists at rank 32 only; leave ranks out"),
        (("head.kind=full", "ranks=auto", "head.whiten=true"), "head.whiten: does not go with head.kind=full"),
        (("head.kind=full", "ranks=auto", "optim.lr_ratio=2"), "optim.lr_ratio: does not go with head.kind=full"),
        (("head.kind=full", "ranks=auto", "head.loss_impl=reference"), "does not go with head.kind=full"),
        (("head.options={components: 4}",), "head.options.components: not an option of this run's kind"),
        (("head.options=3",), "head.options=3: must be options by name"),
        (("head.kind=mos", "head.options.components=0"), "head.options.components=0: must be at least 1"),
        (("head.kind=mos", "head.options.components=two"), "head.options.components=two: must be a whole number"),
        (("head.kind=mos", "head.options.components=true"), "head.options.components=True: must be a whole number"),
        (("head.kind=mos", "head.options.components=[2]"), "components=[2]: must be a whole number"),
        (("head.kind=plif", "head.options.pieces=2.5"), "head.options.pieces=2.5: must be a whole number"),
        (("head.kind=plif", "head.options.pieces=0"), "head.options.pieces=0: must be at least 1"),
        (("head.kind=plif", "head.options.limit=-3"), "head.options.limit=-3.0: must be between 0.01 and 1000"),
        (
            ("head.kind=plif", "head.options.limit=1e9"),
            "head.options.limit=1000000000.0: must be between 0.01 and 1000",
        ),
        (("head.kind=block", "head.options.bands=[5,900]"), "kind block: bands=[5, 900]: must be below 320, the vocab"),
        (("head.kind=plif", "head.options.limit=nan"), "head.options.limit=nan: must be a finite number"),
        (("head.kind=block", "head.options.bands=[5,2]"), "head.options.bands=[5, 2]: must be rising"),
        (("head.kind=block", "head.options.bands=[a]"), "head.options.bands=['a']: must be rising whole numbers"),
        (("head.kind=block", "head.options.bands=[1,null]"), "bands=[1, None]: must be rising whole numbers"),
        (("head.kind=plif", "head.options.pieces=1000000000000"), "pieces=1000000000000: must be at most 65,536"),
        (("head.kind=block", "head.options.bands=3"), "head.options.bands=3: must be a list"),
        (("head.kind=block", "head.options.shrink=0"), "head.options.shrink=0: must be at least 1"),
        (("head.kind=low_rank_sparse", "head.options.rows=-1"), "head.options.rows=-1: must be at least 1"),
        (("head.passes=3",), "head.passes=3: head.init=fisher does not use it; refined does"),
        (("head.temperature=2",), "head.objective=ce does not use it; distill, mixed do"),
        (("objective=distill", "head.mix=0.3"), "head.mix=0.3: head.objective=distill does not use it; mixed does"),
    ],
)
def test_incompatible_options_are_refused(run, tmp_path, overrides, words):
    with pytest.raises(UserError) as caught:
        run(*overrides)
    assert words in str(caught.value) and not (tmp_path / "run" / "curve.json").exists()


@pytest.mark.parametrize("kind", ["low_rank_sparse", "low_rank_truncated", "truncated"])
def test_more_rows_than_tokens_are_refused(kind):
    """The name of a head says how many rows it has; only the default shrinks to a small vocabulary, if it can."""
    if kind == "low_rank_sparse":
        with pytest.raises(UserError, match=f"rows=1024: must be below {V}, .* so that tokens are left for A B"):
            count_parameters(HeadKey(D, 1e-2, 0, kind), V, D)
    else:
        assert count_parameters(HeadKey(D, 1e-2, 0, kind), V, D) >= V * D
    with pytest.raises(UserError, match=f"rows={V + 1}: allowed are 1 to {V}, the vocabulary's size"):
        count_parameters(HeadKey(D, 1e-2, 0, kind, (("rows", V + 1),)), V, D)
