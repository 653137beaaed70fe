"""Banks of several kinds from the command line: the same bits alone and in company, resume, sweeps, labels."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from bottleneck.config.checks import check_config, check_shapes
from bottleneck.config.schema import OptimConfig
from bottleneck.core.errors import UserError
from bottleneck.core.extensions import HEAD_KINDS
from bottleneck.heads.head import count_parameters
from bottleneck.heads.key import HeadKey
from bottleneck.results import table
from bottleneck.results.schema import fault, series
from bottleneck.training import inputs
from bottleneck.training.finished_run import open_run
from bottleneck.training.optim import bank_keys, power_rate, rates
from conftest import composed, heads_of, shell
from support.kills import differences, disturb
from train import train

BANK = (
    "heads=[{kind: low_rank, rank: [4, 8]}, {kind: mos, rank: 4, components: 2}, {kind: mos, rank: 4, components: 3}, "
    "{kind: gated, rank: 4, lr: [1e-2, 3e-3]}, {kind: full}]"
)
FEW = ["tokens=2560", "data.validation_tokens=600"]
NAMES = [
    "mos-components2_r4_",
    "mos-components3_r4_",
    "gated_r4_lr1e-2_",
    "gated_r4_lr3e-3_",
    "full_r32_",
    "r4_",
    "r8_",
]


@pytest.fixture(scope="module")
def mixed(toy, tmp_path_factory):
    """The mixed bank's result and its folder."""
    folder = tmp_path_factory.mktemp("mixed") / "run"
    return train(composed([*toy, *FEW, "ranks=auto", BANK]), folder), folder


def test_a_mixed_bank(mixed, run, tmp_path):
    """All heads are there; each has the bits that it has alone; curve.json is valid; labels tell kinds apart."""
    result, folder = mixed
    rows = result.curve["heads"]
    assert len(rows) == len(NAMES) and fault(json.loads((folder / "curve.json").read_text())) is None
    assert {n for n in NAMES if any(k.startswith(n) for k in heads_of(folder))} == set(NAMES)
    assert {series(h) for h in rows} == {
        "fisher",
        "fisher, full",
        "fisher, gated",
        "fisher, mos components=2",
        "fisher, mos components=3",
    }
    assert all(h["best"] for h in rows if h.get("kind") != "gated")
    out = io.StringIO()
    table.show([result.curve], Console(file=out, width=200))
    assert all(name in out.getvalue() for name in ("mos components=2", "gated", "full", "low_rank"))
    assert {k["init"] for k in result.curve["knee"]} == {series(h) for h in rows}
    for alone in ("{kind: mos, rank: 4, components: 3}", "{kind: gated, rank: 4, lr: 3e-3}"):
        run(*FEW, "ranks=auto", f"heads=[{alone}]", run_dir=tmp_path / alone[7:10])
        for name, tensors in heads_of(tmp_path / alone[7:10]).items():
            assert all(torch.equal(t, heads_of(folder)[name][n]) for n, t in tensors.items()), name


def test_entries_and_the_old_keys_give_the_same_head(mixed, run, tmp_path):
    """head.kind with head.options is one entry of heads: the same file."""
    run(*FEW, "ranks=[4]", "head.kind=mos", "head.options={components:2}", run_dir=tmp_path / "one")
    ((name, tensors),) = heads_of(tmp_path / "one").items()
    assert all(torch.equal(t, heads_of(mixed[1])[name][n]) for n, t in tensors.items())


def test_ranks_and_seeds_hold_for_all_entries():
    """An entry without a rank takes those of ranks; every entry is trained with every seed."""
    c = check_config(
        composed(["ranks=[2,4]", "seed=[0,1]", "heads=[{}, {kind: mos, components: 2}, {kind: gated, rank: 3}]"])
    )
    keys = bank_keys(c.optim, c.head.init, check_shapes(c, 32, 512), c.seed, 32, 320)
    found = sorted((key.kind, key.rank, key.seed) for key in keys)
    wanted = [
        (k, r, s)
        for k, ranks in (("gated", (3,)), ("low_rank", (2, 4)), ("mos", (2, 4)))
        for r in ranks
        for s in (0, 1)
    ]
    assert found == wanted


def test_the_best_matrix_of_a_mixed_bank_can_be_used(mixed, run, tmp_path):
    """Other runs learn from the best head of the highest rank that is one matrix; heads are found by their names."""
    finished = open_run(mixed[1])
    assert [h["rank"] for h in finished.matrices()] == [4, 8, 32]
    for row in finished.curve["heads"]:
        name = HeadKey.of(row).name
        assert finished.named(name) is row and finished.named(f"run/heads/{name}.safetensors") is row
    with pytest.raises(UserError, match="--head nothing: .* has no such head; its heads are "):
        finished.named("nothing")
    taught = run(*FEW, "ranks=[4]", "objective=distill", f"head.teacher={mixed[1]}", run_dir=tmp_path / "taught").curve
    assert taught["recipe"]["teacher"].startswith("full_r32_")


def test_kind_lr_ref_is_the_reference_of_its_kind():
    """optim.kind_lr_ref replaces the start's lr_ref, and the rate follows the parameters: lr = ref (n_ref / n)^γ."""
    o = OptimConfig(lr_ref=1e-3, gamma=0.5, kind_lr_ref={"mos": 4e-3})
    n = count_parameters(HeadKey(8, 1.0, 0, "mos", (("components", 2),)), 320, 32)
    n_ref = 32 * (320 + 32)
    assert n == 8 * 320 + 2 * 8 * 32 + 2 * 32
    wanted = float(f"{4e-3 * (n_ref / n) ** 0.5:.3g}")
    assert rates(o, "fisher", 8, 32, 320, parameters=n, kind="mos") == [wanted]
    assert power_rate(o, "fisher", 32, 32, 320) == 1e-3 and power_rate(o, "fisher", 32, 32, 320, kind="mos") == 4e-3
    grid = OptimConfig(lr_rule="grid", lr_ref=1e-3, gamma=0.5, kind_lr_ref={"mos": 4e-3}, grid_factors=[0.5, 1.0])
    assert rates(grid, "fisher", 8, 32, 320, parameters=n, kind="mos") == [pytest.approx(wanted / 2, rel=1e-2), wanted]


@pytest.mark.slow
def test_every_kind_resumes_after_sigkill_bit_for_bit(toy, run, tmp_path):
    """One bank of all registered kinds, killed at a random moment and resumed on the CPU: every head file has the bytes
    of the undisturbed run's.
    """
    own = {"low_rank_sparse": ", rows: 64"}  # whose usual number is above the toy's vocabulary
    kinds = [f"{{kind: {k.name}{'' if k.full_rank else ', rank: 4'}{own.get(k.name, '')}}}" for k in HEAD_KINDS]
    longer = ["tokens=30720", "trainer.checkpoint_every=2", "ranks=auto", f"heads=[{', '.join(kinds)}]"]
    whole = run(*longer, run_dir=tmp_path / "whole")
    assert disturb([*toy, *longer], tmp_path / "cut", kills=1, seed=3) == 1
    assert differences(tmp_path / "whole", tmp_path / "cut") == []
    assert json.loads((tmp_path / "cut" / "curve.json").read_text())["heads"] == whole.curve["heads"]


@pytest.mark.slow
def test_heads_as_a_hydra_sweep(toy, tmp_path):
    """Two banks as jobs of a multirun, merged into one curve with a line for each kind and option."""
    sweep = "heads=[{kind: low_rank, rank: 4}],[{kind: mos, rank: 4, components: 2}, {kind: mos, rank: 4}]"
    done = shell(*toy, "ranks=auto", sweep, f"hydra.sweep.dir={tmp_path / 'sweep'}", "-m")
    assert done.returncode == 0, done.stderr
    merged = json.loads((tmp_path / "sweep" / "curve" / "curve.json").read_text())
    assert {series(h) for h in merged["heads"]} == {"fisher", "fisher, mos", "fisher, mos components=2"}


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["heads=[]"], "heads=[]: must be a list of kinds with their options, such as heads=[{kind: low_rank"),
        (["heads=mos"], "heads=mos: must be a list of kinds"),
        (["heads=[mos]"], "heads=['mos']: must be a list of kinds"),
        (["heads={kind: mos}"], "heads={'kind': 'mos'}: must be a list of kinds"),
        (["heads=[{kind: magic}]"], "heads[0].kind=magic: no such kind; allowed are block, context_temperature, "),
        (["heads=[{}, {kind: mos, rank: 0}]"], "heads[1].rank=0: must be a whole number of at least 1"),
        (["heads=[{rank: [8, 8]}]"], "heads[0].rank: 8 is listed twice"),
        (["heads=[{rank: []}]"], "heads[0].rank=[]: give at least one value"),
        (["heads=[{lr: -1}]"], "heads[0].lr=-1: must be a number above 0"),
        (["heads=[{kind: mos, pieces: 3}]"], "heads[0].pieces: not an option of mos; allowed are kind, rank, lr, comp"),
        (["heads=[{kind: mos, components: two}]"], "heads[0].components=two: must be a whole number"),
        (["heads=[{kind: mos, components: 0}]"], "heads[0].components=0: must be at least 1"),
        (["heads=[{kind: mos, components: 2000}]"], "heads[0].components=2000: must be at most 1,024"),
        (["heads=[{}]", "head.kind=mos"], "head.kind=mos: heads names the kinds; give one of both keys"),
        (["heads=[{rank: 8}]", "ranks=[4]"], "ranks: every entry of heads has a rank of its own; leave one out"),
        (["heads=[{lr: 0.1}]", "optim.lr=0.2"], "optim.lr: every entry of heads has an lr of its own; leave one out"),
        (["heads=[{}, {kind: mos}]", "head.whiten=true"], "head.whiten: does not go with heads[1].kind=mos"),
        (["heads=[{}, {kind: mos}]", "optim.lr_ratio=2"], "optim.lr_ratio: does not go with heads[1].kind=mos"),
        (["heads=[{kind: full}]", "head.loss_impl=fused"], "head.loss_impl=fused: does not go with heads[0].kind=full"),
        (["heads=[{kind: mos}]", "head.options={components: 2}"], "head.options.components: not an option of this run"),
        (["optim.kind_lr_ref={magic: 1}"], "optim.kind_lr_ref.magic: no such kind; allowed are block, "),
        (["optim.kind_lr_ref={mos: 0}"], "optim.kind_lr_ref.mos=0: must be a number above 0"),
        (["optim.kind_lr_ref=3"], "optim.kind_lr_ref=3: must be rates by kind"),
    ],
)
def test_impossible_banks_are_refused(overrides, words):
    """One line before anything is loaded."""
    with pytest.raises(UserError) as caught:
        check_config(composed(overrides))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "heads, words",
    [
        ("[{kind: full, rank: 8}]", "heads[0].rank: heads[0].kind=full exists at rank 32 only; leave rank out"),
        ("[{rank: 64}]", "heads[0].rank: 64 is above the hidden size of the backbone; allowed are 1 to 32"),
        ("[{rank: 8}, {kind: low_rank, rank: [4, 8]}]", "heads[1]: the same head as heads[0], r8_lr"),
        ("[{rank: 4}, {rank: 8, lr: 0.1}, {rank: 8, lr: [0.2, 0.1]}]", "heads[2]: the same head as heads[1], r8_"),
        ("[{kind: mos, rank: 8}, {kind: mos, rank: 8, components: 4}]", "heads[1]: the same head as heads[0], mos_r8_"),
    ],
)
def test_banks_that_do_not_fit_the_backbone_are_refused_before_the_text_is_opened(run, heads, words, monkeypatch):
    monkeypatch.setattr(inputs, "prepare", lambda *a: pytest.fail("the text was opened"))
    with pytest.raises(UserError) as caught:
        run("ranks=auto", f"heads={heads}")
    assert words in str(caught.value)


@pytest.mark.parametrize("name, shape", [("smollm2", (49_152, 576)), ("gemma3", (262_144, 640))])
def test_the_experiment_gives_every_kind_the_same_parameters(name, shape):
    """conf/experiment/kinds_*.yaml: within 2 % of low_rank at ranks 32, 64 and 128; each with a grid of rates."""
    c = check_config(composed([f"experiment=kinds_{name}"]))
    groups = check_shapes(c, shape[1], None)
    assert {g.kind for g in groups} >= {"low_rank", "mos", "plif", "gated", "sigsoftmax", "block"}
    for group in groups:
        options = tuple(sorted(group.options.items()))
        for rank, budget in zip(group.ranks, (32, 64, 128)):
            n = count_parameters(HeadKey(rank, 1.0, 0, group.kind, options), *shape)
            assert n == pytest.approx(budget * sum(shape), rel=0.02), (group.kind, rank)
    keys = bank_keys(c.optim, c.head.init, groups, c.seed, shape[1], shape[0])
    assert len(keys) == len(groups) * 3 * len(c.optim.grid_factors)
