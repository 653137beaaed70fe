"""The main job on the toys: the promises about exactness, one test each."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bottleneck.core.errors import UserError
from bottleneck.results import curve
from bottleneck.training.checkpoint import AtomicCheckpointIO
from bottleneck.training.run_folder import LAST
from conftest import ROOT, assert_same_heads, command, heads_of, shell


def test_a_run_learns_and_leaves_its_files(run, tmp_path):
    result = run()
    c = json.loads((tmp_path / "run" / "curve.json").read_text())
    assert c == json.loads(json.dumps(result.curve))
    assert {"schema", "backbone", "hidden_size", "vocab_size", "tokens", "data", "reference", "heads"} <= set(c)
    assert (c["schema"], c["hidden_size"], c["vocab_size"], c["tokens"]) == (1, 32, 320, 10240)
    assert [h["rank"] for h in c["heads"]] == [2, 8, 32] and all(h["best"] for h in c["heads"])
    for h in c["heads"]:
        assert h["loss"] < h["initial_loss"] and h["status"] == "ok" and h["init"] == "fisher"
        assert math.isclose(h["perplexity"], math.exp(h["loss"])) and h["parameters"] == h["rank"] * (320 + 32)
    for name in ("curve.csv", "curve.png", "metrics.csv", LAST):
        assert (tmp_path / "run" / name).stat().st_size > 100
    for name, tensors in heads_of(tmp_path / "run").items():
        rank = int(name[1:].split("_")[0])
        assert tensors["A"].shape == (320, rank) and tensors["B"].shape == (rank, 32)
    with safe_open(next((tmp_path / "run" / "heads").glob("r8_*")), "pt") as f:
        about = json.loads(f.metadata()["bottleneck"])
        assert about["rank"] == 8 and about["backbone_hash"] == c["backbone_hash"]


def test_full_rank_fisher_starts_as_the_original_head(run):
    """Before training, the closed form at r = d is the original head: same loss, same bits per byte."""
    c = run("ranks=[32]").curve
    assert math.isclose(c["heads"][0]["initial_loss"], c["reference"]["loss"], rel_tol=1e-5)


def test_reference_is_the_models_own_loss(run, toy_backbone):
    """The original head's loss by plain Transformers over the validation blocks; bits per byte by hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run("ranks=[2]")
    corpus = result.trainer.datamodule.corpus
    model = AutoModelForCausalLM.from_pretrained(toy_backbone, dtype=torch.float32).eval()
    ids = torch.from_numpy(corpus.validation.astype("int64"))
    total = 0.0
    for start in range(0, len(ids) - 1, 64):
        part = ids[start : start + 65]
        with torch.no_grad():
            log_p = torch.log_softmax(model(part[None, :-1]).logits[0].double(), -1)
        total -= log_p.gather(1, part[1:, None]).sum().item()
    reference = result.curve["reference"]
    assert math.isclose(reference["loss"], total / (len(ids) - 1), rel_tol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(toy_backbone)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert math.isclose(reference["bits_per_byte"], total / math.log(2) / len(text.encode()), rel_tol=1e-5)


@pytest.mark.parametrize("init, seeds", [("fisher", [0]), ("scaled", [0, 1])])
def test_a_head_in_a_bank_equals_the_head_alone(run, tmp_path, init, seeds):
    """The main claim: every head of a bank of ranks x rates x seeds is bit for bit the head trained alone."""
    run(f"head.init={init}", "ranks=[2,8]", "optim.lr=[1e-2,3e-2]", f"seed={seeds}", run_dir=tmp_path / "bank")
    together = heads_of(tmp_path / "bank")
    assert len(together) == 4 * len(seeds)
    alone = {}
    for i, (rank, lr, seed) in enumerate([(2, 1e-2, seeds[-1]), (8, 3e-2, 0)]):
        run(f"head.init={init}", f"ranks={rank}", f"optim.lr={lr}", f"seed={seed}", run_dir=tmp_path / str(i))
        alone |= heads_of(tmp_path / str(i))
    assert_same_heads(alone, {name: together[name] for name in alone})


def test_reference_and_chunked_losses_train_alike(run, tmp_path):
    a = run(run_dir=tmp_path / "a").curve["heads"]
    b = run("head.loss_impl=reference", run_dir=tmp_path / "b").curve["heads"]
    for x, y in zip(a, b):
        assert math.isclose(x["loss"], y["loss"], rel_tol=1e-4)


def test_micro_batches_change_nothing_but_rounding(run, tmp_path):
    a = run("trainer.micro_batch_size=8", run_dir=tmp_path / "a").curve["heads"]
    b = run("trainer.micro_batch_size=3", run_dir=tmp_path / "b").curve["heads"]
    for x, y in zip(a, b):
        assert math.isclose(x["loss"], y["loss"], rel_tol=1e-5)


def test_a_diverged_head_does_not_affect_others(run, tmp_path):
    """A rate that overflows: that head is marked and frozen, the others equal a run without it, bit for bit."""
    result = run("ranks=[2,8]", "optim.lr=[1e-2,1e38]", "optim.clip=null", run_dir=tmp_path / "bank")
    status = {(h["rank"], h["lr"]): h for h in result.curve["heads"]}
    for rank in (2, 8):
        assert status[rank, 1e38]["status"] == "diverged" and not status[rank, 1e38]["best"]
        assert status[rank, 1e-2]["status"] == "ok" and status[rank, 1e-2]["best"]
    run("ranks=[2,8]", "optim.lr=1e-2", "optim.clip=null", run_dir=tmp_path / "alone")
    together, alone = heads_of(tmp_path / "bank"), heads_of(tmp_path / "alone")
    assert_same_heads(alone, {name: together[name] for name in alone})
    assert json.loads((tmp_path / "bank" / "curve.json").read_text())  # NaN is not JSON


def test_order_of_the_data_depends_on_data_seed_alone(run, tmp_path, caplog):
    a = run("seed=0", run_dir=tmp_path / "a")
    b = run("seed=1", run_dir=tmp_path / "b")
    assert "nothing random" not in caplog.text
    run("seed=[1,2]", "tokens=1024", run_dir=tmp_path / "both")
    assert "nothing random" in caplog.text  # allowed, with a warning
    c = run("data.seed=1", run_dir=tmp_path / "c")
    assert_same_heads(
        *[{n[:-1]: t for n, t in heads_of(tmp_path / d).items()} for d in "ab"]
    )  # fisher has no randomness
    assert a.curve["heads"][0]["loss"] != c.curve["heads"][0]["loss"] and b.curve["data_hash"] == a.curve["data_hash"]
    d = run("data.epochs=2", run_dir=tmp_path / "d")  # the same budget, of half the text
    assert (
        d.curve["tokens"] == a.curve["tokens"]
        and d.curve["recipe"]["epochs"] == 2
        and "epochs" not in a.curve["recipe"]
    )
    assert (
        d.curve["heads"][0]["loss"] != a.curve["heads"][0]["loss"]
        and d.curve["heads"][0]["initial_loss"] == a.curve["heads"][0]["initial_loss"]
    )


def test_grid_keeps_the_best_and_records_all(run):
    c = run("optim=grid", "optim.lrs=[1e-4,1e-2]", "ranks=[2,8]").curve
    assert len(c["heads"]) == 4
    for rank in (2, 8):
        pair = [h for h in c["heads"] if h["rank"] == rank]
        assert [h["best"] for h in pair].count(True) == 1
        assert min(pair, key=lambda h: h["loss"])["best"]


def test_checkpoint_holds_heads_only_and_resumes_exactly(run, tmp_path):
    """Stopped half-way and resumed equals uninterrupted; the backbone is in no checkpoint; a finished run can be
    resumed.
    """
    whole = run(run_dir=tmp_path / "whole")
    state = torch.load(tmp_path / "whole" / LAST, weights_only=True)
    assert state["state_dict"] and not [n for n in state["state_dict"] if n.startswith("backbone")]
    assert state["bottleneck"]["backbone"] == whole.curve["backbone_hash"] and state["global_step"] == 20

    class Killed(Exception):
        pass

    def stop(trainer, module, *_):
        if trainer.global_step == 11:  # the last checkpoint is of step 9
            raise Killed

    from bottleneck.training.progress import TokenProgress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenProgress, "on_train_batch_end", lambda self, *a: stop(*a))
        with pytest.raises(Killed):
            run("trainer.progress=true", run_dir=tmp_path / "cut")
    with open(tmp_path / "cut" / "metrics.csv", "a") as f:
        f.write("15,7680,train/loss,lost_in_the_kill,9.9\n")  # of a step after the checkpoint: it is trained again
    resumed = run("ckpt_path=last", run_dir=tmp_path / "cut")
    assert_same_heads(heads_of(tmp_path / "whole"), heads_of(tmp_path / "cut"))
    assert resumed.curve == whole.curve
    again = run("ckpt_path=last", run_dir=tmp_path / "cut")
    assert again.curve == whole.curve
    # speeds differ from run to run
    a, b = (
        [r for r in (tmp_path / d / "metrics.csv").read_text().splitlines() if "second" not in r]
        for d in ("whole", "cut")
    )
    assert a == b  # no step is lost, recorded twice, or left over


def test_without_checkpoints_there_are_none(run, tmp_path):
    run("trainer.checkpoint_every=null")
    assert list((tmp_path / "run").glob("heads/*.safetensors")) and not list((tmp_path / "run").glob("**/*.ckpt"))


def test_validation_during_training_changes_nothing(run, tmp_path):
    a, b = run(run_dir=tmp_path / "a"), run("trainer.val_every=7", run_dir=tmp_path / "b")
    assert a.curve == b.curve
    steps = [
        r.split(",")[0] for r in (tmp_path / "b" / "metrics.csv").read_text().splitlines() if ",val/loss,full," in r
    ]
    assert steps == ["0", "7", "14", "20"]


@pytest.mark.parametrize(
    "first, then, words",
    [
        ([], [], "holds a run already"),
        ([], ["ckpt_path=last", "optim.weight_decay=0.2"], "optim.weight_decay=0.2: the run in .* has 0.1"),
        ([], ["ckpt_path=last", "ranks=[2,8]"], "ranks"),
        ([], ["ckpt_path=/no/file.ckpt"], "no such file"),
    ],
)
def test_resuming_the_wrong_thing_is_refused(run, first, then, words):
    run("tokens=1024", *first)
    with pytest.raises(UserError, match=words):
        run("tokens=1024", *then)


def test_damaged_and_foreign_checkpoints(run, tmp_path, toy_backbone, caplog):
    run("tokens=1024")
    last = tmp_path / "run" / LAST
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        run("tokens=1024", "ckpt_path=last")
    torch.save({"x": 1}, last)
    with pytest.raises(UserError, match="not a checkpoint of bottleneck"):
        run("tokens=1024", "ckpt_path=last")
    last.write_bytes(whole)
    state = torch.load(last, weights_only=True)
    torch.save({"bottleneck": {}}, last)
    with pytest.raises(UserError, match="not a checkpoint of bottleneck"):
        run("tokens=1024", "ckpt_path=last")
    with pytest.raises(UserError, match="holds a run already"), caplog.at_level(logging.DEBUG):  # hydra.verbose=true
        run("tokens=1024", f"ckpt_path={ROOT / 'pyproject.toml'}")
    lock = [r for r in caplog.records if r.name == "filelock"]
    assert not lock  # a refused command wrote its lines to the finished run's train.log
    (tmp_path / "run" / "curve.json").unlink()  # else the run is finished, and nothing is loaded
    state["bottleneck"]["backbone"] = "0" * 16
    AtomicCheckpointIO().save_checkpoint(state, last)  # with the checksum of its content
    with pytest.raises(UserError, match="other backbone weights"):
        run("tokens=1024", "ckpt_path=last")


def test_two_processes_equal_one(run, toy, tmp_path):
    """gloo, same global batch: the same sequences reach each step, losses agree to 1e-5."""
    one = run(run_dir=tmp_path / "one").curve
    # micro-batches of 3 out of a share of 4: gradients add up before they are reduced; 47 validation blocks are odd
    many = [*toy, "trainer.devices=2", "trainer.micro_batch_size=3", f"hydra.run.dir={tmp_path / 'two'}"]
    done = shell(*many)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("starting heads") == 1  # only one process logs
    two = json.loads((tmp_path / "two" / "curve.json").read_text())
    for a, b in zip(one["heads"], two["heads"]):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["initial_loss"] - b["initial_loss"]) < 1e-5
    assert abs(one["reference"]["loss"] - two["reference"]["loss"]) < 1e-6
    assert one["validation_tokens"] == two["validation_tokens"] and math.ceil((one["validation_tokens"]) / 64) % 2 == 1
    logs = [
        {
            r.rsplit(",", 1)[0]: float(r.rsplit(",", 1)[1])
            for r in (tmp_path / d / "metrics.csv").read_text().splitlines()[1:]
            if "second" not in r
        }
        for d in ("one", "two")
    ]
    assert logs[0].keys() == logs[1].keys()
    for name, value in logs[0].items():  # what is logged is the whole batch's, too
        assert math.isclose(value, logs[1][name], rel_tol=1e-4), name


@pytest.mark.slow
def test_multirun_merged_equals_side_by_side(run, toy, tmp_path):
    """ranks=[2,8,32] in one run equals -m ranks=2,8,32 merged: heads and values; a failing job affects no other."""
    one = run(run_dir=tmp_path / "one").curve
    sweep = [o for o in toy if not o.startswith("ranks")]
    done = shell("-m", *sweep, "ranks=2,0,8,32", f"hydra.sweep.dir={tmp_path / 'many'}")
    assert done.returncode == 2 and "ranks=0: must be" in done.stderr and "Traceback" not in done.stderr
    left = json.loads((tmp_path / "many" / "curve" / "curve.json").read_text())  # by the multirun itself
    assert left == json.loads(json.dumps(one))
    assert curve.main([str(tmp_path / "many"), "--out", str(tmp_path / "merged")]) == 0
    merged = json.loads((tmp_path / "merged" / "curve.json").read_text())
    assert merged == json.loads(json.dumps(one))
    together, apart = heads_of(tmp_path / "one"), {}
    files = {p.name: p.read_bytes() for p in (tmp_path / "many").rglob("*.safetensors")}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "one" / "heads").iterdir()}
    for job in (tmp_path / "many").iterdir():
        apart |= heads_of(job) if job.is_dir() else {}
    assert_same_heads(together, apart)


def kill_until_done(overrides, folder, kills: int, seed: int) -> int:
    """Run, SIGKILL at a random moment, resume, and so on; then let it finish.

    Returns how often it was killed while running.
    """
    rng = random.Random(seed)
    killed = 0
    for attempt in range(kills + 1):
        args = [*overrides, "ckpt_path=last", f"hydra.run.dir={folder}"]
        process = subprocess.Popen(
            command(*args), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        if attempt < kills:
            began = time.monotonic()
            while process.poll() is None and not (folder / LAST).exists() and time.monotonic() - began < 60:
                time.sleep(0.05)  # from then on there is something to lose
            time.sleep(rng.uniform(0.0, 6.0))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                killed += 1
        assert process.wait(300) in (0, -signal.SIGKILL)
    return killed


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bit_identical(toy, run, tmp_path, kills):
    longer = [*toy, "tokens=25600", "trainer.checkpoint_every=2"]
    run("tokens=25600", "trainer.checkpoint_every=2", run_dir=tmp_path / "whole")
    killed = kill_until_done(longer, tmp_path / "cut", kills, seed=kills)
    assert killed >= 1
    assert_same_heads(heads_of(tmp_path / "whole"), heads_of(tmp_path / "cut"))
    assert not list((tmp_path / "cut").rglob("*.part"))


@pytest.mark.slow
def test_the_default_sweep_is_a_curve(tmp_path):
    """The default run: perplexity falls with rank, by more than noise; the best head is within 5 % of the original."""
    folder = Path(os.environ.get("BOTTLENECK_SWEEP", tmp_path / "run"))  # .ci/run has trained it
    if folder == tmp_path / "run":
        done = shell("trainer=cpu", f"hydra.run.dir={folder}", timeout=580)
        assert done.returncode == 0, done.stderr[-2000:]
    c = json.loads((folder / "curve.json").read_text())
    assert [h["rank"] for h in c["heads"]] == [8, 16, 32, 64, 128, 256] and c["hidden_size"] == 256
    perplexity = [h["perplexity"] for h in c["heads"]]
    assert all(low > 1.2 * high for low, high in zip(perplexity, perplexity[1:])), perplexity
    assert perplexity[-1] < 1.05 * c["reference"]["perplexity"]
    assert all(h["loss"] < h["initial_loss"] for h in c["heads"][:-1])
    closed = [h["initial_loss"] for h in c["heads"]]
    assert closed == sorted(closed, reverse=True)
    assert math.isclose(closed[-1], c["reference"]["loss"], rel_tol=1e-5)


@pytest.mark.slow
def test_embedded_side_by_side_equals_multirun(tmp_path):
    """As for the toys, with a vocabulary of many chunks and the default number of threads."""
    short = ["trainer=cpu", "tokens=24576", "data.validation_tokens=4000"]
    assert shell(*short, "ranks=[8,32,128]", f"hydra.run.dir={tmp_path / 'one'}", timeout=580).returncode == 0
    assert shell("-m", *short, "ranks=8,32,128", f"hydra.sweep.dir={tmp_path / 'many'}", timeout=580).returncode == 0
    assert curve.main([str(tmp_path / "many"), "--out", str(tmp_path / "merged")]) == 0
    one, merged = ((tmp_path / d / "curve.json").read_text() for d in ("one", "merged"))
    assert json.loads(one) == json.loads(merged)
    apart = {p.name: p.read_bytes() for p in (tmp_path / "many").rglob("*.safetensors")}
    assert apart == {p.name: p.read_bytes() for p in (tmp_path / "one" / "heads").iterdir()}
