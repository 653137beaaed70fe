"""Truncated heads as draft files: rows, vLLM's maps, and the distribution that vLLM computes from them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from bottleneck.core.errors import UserError
from bottleneck.heads.vocabulary import REST
from bottleneck.serve.export import export, open_run


@pytest.mark.parametrize("kind, ranks", [("truncated", "auto"), ("low_rank_truncated", "[8]")])
def test_a_truncated_head_is_exported_with_the_maps_of_vllm(kind, ranks, run, tmp_path):
    """The scatter of logits to arange(K) + d2t, as vLLM's EAGLE-3 drafts do it, has the head's distribution."""
    done = run(f"ranks={ranks}", f"head.kind={kind}", "head.options={rows:50}", "tokens=1024")
    finished = open_run(done.run_dir)
    (row,) = finished.curve["heads"]
    assert row["status"] == "ok" and row["loss"] < 20
    folder = export(finished, row, tmp_path / "out", form="factored")
    stored, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    assert config["draft_vocab_size"] == 50 and stored["d2t"].dtype == torch.int64 and stored["t2d"].sum() == 50
    bank, backbone = done.module.bank, done.module.backbone
    h = backbone(torch.arange(40)[None])[0]
    W = stored["lm_head.weight"] if kind == "truncated" else stored["lm_head.up.weight"] @ stored["lm_head.down.weight"]
    served = torch.full((40, 320), -torch.inf)
    served[:, torch.arange(50) + stored["d2t"]] = h @ W.T
    assert (served.isfinite() == stored["t2d"]).all()
    trained = torch.softmax(bank[bank.keys[0]].logits(h), -1)
    torch.testing.assert_close(torch.softmax(served, -1), trained, rtol=1e-4, atol=2 * REST)
    with pytest.raises(UserError, match="is not one matrix"):
        export(finished, row, tmp_path / "dense", form="dense")
