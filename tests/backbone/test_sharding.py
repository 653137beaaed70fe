"""A backbone sharded over two processes equals the whole one bit for bit, and so do its heads; ZeRO-2's to 1e-6.

Run by torchrun, this file is one of the processes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import torch
import transformers as T

from bottleneck.backbone.model import Backbone
from bottleneck.backbone.sharding import even
from bottleneck.config.checks import check_config
from bottleneck.config.schema import BackboneConfig, OptimConfig
from bottleneck.core.errors import UserError
from bottleneck.heads.bank import HeadBank, HeadKey
from bottleneck.training.optim import build_optimizer, clip_per_head
from bottleneck.training.run_folder import LAST
from conftest import ROOT, assert_same_heads, composed, heads_of, shell

SMALL = dict(
    vocab_size=128,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
)
IDS = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))
KEYS = [HeadKey(2, 1e-2, 0), HeadKey(5, 3e-2, 0), HeadKey(7, 1e-3, 0)]
OPTIM = OptimConfig(clip=0.5, weight_decay=0.1)


def two_processes(*args: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", __file__, *args]
    # torchrun puts this file's folder on the path; the helpers of the tests lie one above
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT)))}
    done = subprocess.run(launch, cwd=ROOT / "tests", env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def gguf_llama(folder: Path) -> str:
    """Write a tiny random Llama as a GGUF file, without a head, hence tied. Returns the file's name."""
    from gguf import GGUFWriter

    w = GGUFWriter(folder / "tiny.gguf", "llama")
    for add, value in (
        (w.add_block_count, 2),
        (w.add_context_length, 64),
        (w.add_embedding_length, 32),
        (w.add_feed_forward_length, 64),
        (w.add_head_count, 4),
        (w.add_head_count_kv, 4),
        (w.add_layer_norm_rms_eps, 1e-5),
        (w.add_vocab_size, 128),
        (w.add_rope_dimension_count, 8),
        (w.add_rope_freq_base, 10000.0),
        (w.add_bos_token_id, 0),
        (w.add_eos_token_id, 0),
    ):
        add(value)
    shapes = {"token_embd": (128, 32), "output_norm": (32,)}
    for i in range(2):
        square = {f"blk.{i}.attn_{n}": (32, 32) for n in ("q", "k", "v", "output")}
        wide = {f"blk.{i}.ffn_gate": (64, 32), f"blk.{i}.ffn_up": (64, 32), f"blk.{i}.ffn_down": (32, 64)}
        shapes |= square | wide | {f"blk.{i}.attn_norm": (32,), f"blk.{i}.ffn_norm": (32,)}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        w.add_tensor(f"{name}.weight", rng.normal(0, 0.2, shape).astype(np.float32))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    return "tiny.gguf"


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> dict[str, BackboneConfig]:
    """Untied, tied, GGUF, bfloat16, random."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    for name, shape in {
        "untied": T.GPTNeoXConfig(
            **SMALL, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False, initializer_range=0.3
        ),
        "tied": T.LlamaConfig(**SMALL, tie_word_embeddings=True, initializer_range=0.3),
    }.items():
        T.AutoModelForCausalLM.from_config(shape).save_pretrained(folder / name)
    out = {name: BackboneConfig(path=str(folder / name)) for name in ("untied", "tied")}
    out["bfloat16"] = dataclasses.replace(out["untied"], dtype="bfloat16")
    out["random"] = dataclasses.replace(out["tied"], weights="random")
    return out | {"gguf": BackboneConfig(path=str(folder), gguf_file=gguf_llama(folder))}


@pytest.mark.parametrize("mode", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_sharded_backbone_is_the_whole_one(backbones, tmp_path, mode):
    """Hidden states, original head and hash; each process keeps about half of the body, also after a forward pass."""
    (tmp_path / "cases.json").write_text(json.dumps({name: dataclasses.asdict(cfg) for name, cfg in backbones.items()}))
    two_processes("backbones", mode, str(tmp_path))
    for name, cfg in backbones.items():
        whole = Backbone.load(cfg)
        elements = sum(p.numel() for p in whole.body.parameters())
        for rank in range(2):
            got = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert torch.equal(got["hidden"], whole(IDS)), name
            # of five rows: gathered weights lie elsewhere in memory, and some CPUs round such a product by that
            torch.testing.assert_close(got["again"], whole(IDS[:1, :5]))
            assert torch.equal(got["head"], whole.head.W_VD) and got["hash"] == whole.hash, name
            # ZeRO keeps scales and biases whole
            assert 0.45 < got["held"] / elements < (0.51 if mode == "fsdp" else 0.56), (name, got["held"], elements)
    assert (tmp_path / "refused-0").read_text() == (tmp_path / "refused-1").read_text() != ""


def gradients(step: int, rank: int) -> list[torch.Tensor]:
    """A process's gradients: head 0 is clipped, head 2 is not; head 1 is NaN in step 2 on one process only."""
    g = torch.Generator().manual_seed(100 * step + rank)
    out = [
        torch.randn(shape, generator=g) * size
        for key, size in zip(KEYS, (1.0, 1.0, 1e-3))
        for shape in ((33, key.rank), (key.rank, 16))
    ]
    if step == 2 and rank == 1:
        out[2][0, 0] = float("nan")
    return out


def fresh_bank() -> HeadBank:
    bank, g = HeadBank(KEYS, 33, 16, "reference"), torch.Generator().manual_seed(5)
    for key in KEYS:
        bank[key].set(torch.randn(33, key.rank, generator=g), torch.randn(key.rank, 16, generator=g))
    return bank


@pytest.mark.slow
def test_zero2_is_ddp_head_by_head(tmp_path):
    """Norms, clipping, rates, weight decay, a head that diverges; consolidated state at the end and halfway."""
    two_processes("zero2", str(tmp_path))
    bank = fresh_bank()
    ours = build_optimizer(bank, OPTIM)
    for step in range(5):
        for p, a, b in zip(bank.parameters(), gradients(step, 0), gradients(step, 1)):
            p.grad = (a + b) / 2
        norms, ours.divisors = clip_per_head(bank, OPTIM.clip, torch.zeros(3))
        ours.param_groups[0]["lr"] = 1e-2 / (step + 1)
        ours.step()
        got = torch.load(tmp_path / f"step{step}.pt", weights_only=True)
        assert torch.allclose(got["norms"], norms, rtol=1e-6, equal_nan=True) and got["diverged"] == [
            0.0,
            float(step >= 2),
            0.0,
        ]
        for p, q in zip(bank.parameters(), got["heads"]):
            assert torch.allclose(p, q, atol=1e-6)
        mine, theirs = ours.state_dict(), got["state"]
        assert mine["param_groups"] == theirs["param_groups"] and mine["state"].keys() == theirs["state"].keys()
        for index, state in mine["state"].items():
            for name, value in state.items():
                assert (
                    torch.allclose(value, theirs["state"][index][name], atol=1e-6)
                    and value.shape == theirs["state"][index][name].shape
                )


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory) -> Callable[[str], Path]:
    """whole(trainer): the folder of an undisturbed run, trained once for all tests."""
    return functools.cache(lambda trainer: trained(toy, tmp_path_factory.mktemp(trainer), trainer))


def trained(toy, folder: Path, trainer: str, *overrides: str) -> Path:
    """A run of two processes; 47 validation blocks do not divide by 2, nor 4 sequences by micro-batches of 3."""
    done = shell(
        *toy,
        f"trainer={trainer}",
        "trainer.accelerator=cpu",
        "trainer.micro_batch_size=3",
        f"hydra.run.dir={folder}",
        *overrides,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["fsdp", "deepspeed_zero2", "deepspeed_zero3"])
def test_heads_equal_those_of_ddp(whole, trainer):
    """The checkpoint is equal too; it has heads and optimizer, and nothing of the backbone."""
    ddp, folder = whole("ddp"), whole(trainer)
    same_heads(heads_of(ddp), heads_of(folder), exact=trainer != "deepspeed_zero2")
    a, b = (json.loads((f / "curve.json").read_text()) for f in (ddp, folder))
    assert a["reference"] == b["reference"] and a["backbone_hash"] == b["backbone_hash"]
    a, b = (torch.load(f / LAST, weights_only=True) for f in (ddp, folder))
    assert a["state_dict"].keys() == b["state_dict"].keys() and not [n for n in b["state_dict"] if "backbone" in n]
    mine, theirs = a["optimizer_states"][0], b["optimizer_states"][0]
    assert mine["param_groups"] == theirs["param_groups"] and mine["state"].keys() == theirs["state"].keys()
    for index, state in mine["state"].items():
        for name, value in state.items():
            assert torch.allclose(value, theirs["state"][index][name], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["fsdp", "deepspeed_zero2", "deepspeed_zero3"])
def test_resuming_is_exact(whole, toy, tmp_path, trainer):
    """From the checkpoint before the last, at step 18 of 20."""
    on = trained(toy, tmp_path / "on", trainer, f"ckpt_path={whole(trainer) / LAST.with_name('previous.ckpt')}")
    same_heads(heads_of(whole(trainer)), heads_of(on), exact=True)


@pytest.mark.slow
def test_zero2_resumes_ddp_and_ddp_resumes_zero2(whole, toy, tmp_path):
    for trainer, other in (("deepspeed_zero2", "ddp"), ("ddp", "deepspeed_zero2")):
        on = trained(toy, tmp_path / trainer, trainer, f"ckpt_path={whole(other) / LAST.with_name('previous.ckpt')}")
        same_heads(heads_of(whole("ddp")), heads_of(on), False)


def same_heads(a, b, exact: bool) -> None:
    if exact:
        assert_same_heads(a, b)
    assert a.keys() == b.keys() and all(torch.allclose(a[n][t], b[n][t], atol=1e-6) for n in a for t in "AB")


def test_processes_validate_equally_many_batches():
    """Shares of 3 and 2 batches: the second process adds a third batch that does not count."""
    shares = [[(torch.ones(1, 4), torch.ones(1, 4))] * n for n in (3, 2)]
    padded = even(lambda rank, world: shares[rank])
    first, second = list(padded(0, 2)), list(padded(1, 2))
    assert len(first) == len(second) == 3 and first == shares[0] and second[:2] == shares[1]
    assert (second[2][1] == -100).all() and second[2][0].dtype == torch.long


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["trainer.shard=magic"], "trainer.shard=magic: must be one of none, fsdp, zero3, zero2"),
        (["trainer=fsdp", "trainer.devices=1"], "trainer.shard=fsdp: needs several processes, this run has one"),
        (["trainer=fsdp", "backbone.compile=true"], "backbone.compile=true: does not go with trainer.shard=fsdp"),
        (["trainer.reduce_dtype=float8"], "trainer.reduce_dtype=float8: must be one of float32, bfloat16"),
        (
            ["trainer=deepspeed_zero2", "trainer.reduce_dtype=bfloat16"],
            "trainer.reduce_dtype=bfloat16: does not go with trainer.shard=zero2",
        ),
        (["backbone.weights=none"], "backbone.weights=none: must be one of pretrained, random"),
    ],
)
def test_impossible_values(overrides, words):
    with pytest.raises(UserError) as caught:
        check_config(composed(overrides))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_deepspeed_is_reported(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else find(name, *a))
    for trainer in ("deepspeed_zero2", "deepspeed_zero3"):
        with pytest.raises(UserError, match=r"DeepSpeed is not installed: pip install -e '\.\[deepspeed\]'"):
            check_config(composed([f"trainer={trainer}"]))
    check_config(composed(["trainer=fsdp"]))


def backbones_process(mode: str, folder: Path) -> None:
    from bottleneck.backbone import sharding

    rank = torch.distributed.get_rank()
    for name, cfg in json.loads((folder / "cases.json").read_text()).items():
        backbone = sharding.load(BackboneConfig(**cfg), mode, torch.device("cpu"))
        hidden, again = backbone(IDS), backbone(IDS[:1, :5])
        assert backbone.to("meta") is backbone and not any(p.requires_grad for p in backbone.parameters())
        out = {
            "hidden": hidden,
            "again": again,
            "head": backbone.head.W_VD.detach(),
            "hash": backbone.hash,
            "held": sharding.held(backbone),
        }
        torch.save(out, folder / f"{name}-{rank}.pt")
    try:
        sharding.load(BackboneConfig(path=str(folder)), mode, torch.device("cpu"))
    except UserError as error:
        (folder / f"refused-{rank}").write_text(str(error))


def zero2_process(folder: Path) -> None:
    """Five steps; before the fourth, engine and heads are rebuilt from the saved state."""
    from bottleneck.training.module import HandOver
    from bottleneck.training.zero2 import Zero2AdamW

    rank = torch.distributed.get_rank()
    bank = fresh_bank()
    optimizer = Zero2AdamW(bank, OPTIM)
    for step in range(5):
        if step == 3:
            saved, heads = torch.load(folder / "step2.pt", weights_only=True), bank
            bank = fresh_bank()
            bank.load_state_dict(heads.state_dict())
            optimizer = Zero2AdamW(bank, OPTIM)
            optimizer.load_state_dict(saved["state"])
        bank.zero_gradients()
        for p, g in zip(bank.parameters(), gradients(step, rank)):
            p.grad.copy_(g)
        optimizer.backward(HandOver.apply(*bank.parameters()))
        norms, optimizer.divisors = clip_per_head(bank, OPTIM.clip, torch.zeros(3), optimizer.norms())
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        flats = [g["params"][0] for g in optimizer.inner.param_groups]
        share = sum(optimizer.inner.state[f]["exp_avg"].numel() for f in flats) / sum(
            p.numel() for p in bank.parameters()
        )
        assert 0.5 <= share < 0.52, share
        optimizer.consolidate_state_dict()
        state = optimizer.state_dict()
        assert bool(state["state"]) == (rank == 0)
        if rank == 0:
            heads = [p.detach().clone() for p in bank.parameters()]
            torch.save(
                {"norms": norms, "diverged": bank.diverged.tolist(), "heads": heads, "state": state},
                folder / f"step{step}.pt",
            )
        torch.distributed.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    if sys.argv[1] == "zero2":
        zero2_process(Path(sys.argv[2]))
    else:
        backbones_process(sys.argv[2], Path(sys.argv[3]))
    torch.distributed.destroy_process_group()
