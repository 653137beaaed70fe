"""Documents in one sequence: attention and positions of each, against the documents alone; refusals; a run."""

from __future__ import annotations

import shutil

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from bottleneck.backbone import documents as documents_module
from bottleneck.backbone.documents import Documents
from bottleneck.backbone.model import Backbone
from bottleneck.backbone.tiny_configs import VOCABULARY, tiny_config
from bottleneck.core.errors import UserError

EOS, LENGTHS = 5, (9, 1, 14, 8)  # of documents in a sequence of 32, each with end-of-text before it


def model_of(family: str, attention: str = "sdpa", **changes):
    torch.manual_seed(0)
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def packed(seed: int = 0) -> list[torch.Tensor]:
    """Documents [length], each of which begins with end-of-text."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randint(6, VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    for d in found:
        d[0] = EOS
    return found


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama", "opt", "gemma"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("bos", [None, 3])
def test_a_document_in_a_sequence_has_the_logits_that_it_has_alone(family, attention, bos):
    """Alone it begins with the token that the tokenizer puts before every text, or with end-of-text without such."""
    model = model_of(family, attention)
    docs, others = packed(), packed(1)
    with torch.no_grad():
        begun = [torch.cat([torch.tensor([EOS if bos is None else bos]), d[1:]]) for d in docs]
        alone = torch.cat([model(d[None]).logits for d in begun], 1)
    backbone = Backbone(model, family)
    backbone.separate(Documents(EOS, reset=True, mask=True, bos=bos), 32)
    rows = torch.stack([torch.cat(docs), torch.cat(others)])
    got = backbone.head.float_logits(backbone(rows)[0])
    assert torch.allclose(got, alone[0], atol=1e-4 * alone.abs().max())
    backbone.documents = None
    plain = backbone.head.float_logits(backbone(rows)[0])
    assert (plain - alone[0]).abs().max() > 0.01 * alone.abs().max()  # the test can fail


MIXED = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("family", ["cohere2", "gemma3_text", "mistral", "olmo3", "qwen2", "phi3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [4, 10, 64])
def test_layers_that_see_a_window_keep_it(family, attention, window):
    """Gemma 3 was refused where a sequence is longer than its window: one mask widened the window to the document."""
    more = {} if family in ("mistral", "phi3") else {"layer_types": MIXED, "use_sliding_window": True}
    model = model_of(family, attention, sliding_window=window, **more)
    docs = packed()
    with torch.no_grad():
        alone = torch.cat([model(d[None]).logits for d in docs], 1)
    backbone = Backbone(model, family)
    backbone.separate(Documents(EOS, reset=True, mask=True), 32)
    got = backbone.head.float_logits(backbone(torch.cat(docs)[None])[0])
    assert torch.allclose(got, alone[0], atol=1e-4 * alone.abs().max())
    backbone._windows = {}
    wide = backbone.head.float_logits(backbone(torch.cat(docs)[None])[0])
    assert torch.allclose(wide, alone[0], atol=1e-4 * alone.abs().max()) == (window == 64)  # the test can fail


def test_documents_of_a_token_file_begin_with_its_own_beginning_of_text():
    """[BOS … EOS] [BOS … EOS]: no second BOS, and end-of-text stays the last token of its document."""
    docs, bos = packed(), 3
    docs = [torch.cat([torch.tensor([bos]), d[1:], torch.tensor([EOS])]) for d in docs]
    model = model_of("llama")
    with torch.no_grad():
        alone = torch.cat([model(d[None]).logits for d in docs], 1)
    backbone = Backbone(model, "llama")
    backbone.separate(Documents(EOS, reset=True, mask=True, bos=bos), 36)
    rows = torch.cat(docs)[None]
    last = torch.cat([rows, torch.tensor([[bos]])], 1)  # else the end of the row could be a beginning
    got = backbone.head.float_logits(backbone(last)[0, :-1])
    assert torch.allclose(got, alone[0], atol=1e-4 * alone.abs().max())


@pytest.mark.parametrize("eos, bos", [(1, 2), (2, 1), (5, 5), (VOCABULARY - 1, 0)])
def test_the_trial_holds_no_beginning_by_chance(eos, bos):
    Backbone(model_of("gemma"), "x").separate(Documents(eos, reset=True, mask=True, bos=bos), 32)


@pytest.mark.parametrize("reset", [True, False])
def test_each_switch_by_itself(reset):
    """Positions [0, 1, …] from each end-of-text on, or a mask of blocks: against loops over the definition."""
    ids = torch.cat(packed())[None].repeat(2, 1)
    ids[1] = 7  # one document without a start
    got = Documents(EOS, reset=reset, mask=not reset).arguments(ids, torch.float32)
    for row, positions, mask in zip(ids.tolist(), got["position_ids"].tolist(), got["attention_mask"][:, 0]):
        starts = [max([j for j in range(i + 1) if row[j] == EOS], default=0) for i in range(len(row))]
        assert positions == [i - starts[i] if reset else i for i in range(len(row))]
        for i in range(len(row)):
            first = 0 if reset else starts[i]
            assert (mask[i] == 0).tolist() == [first <= j <= i for j in range(len(row))]
    backbone = Backbone(model_of("gpt_neox"), "x")
    backbone.separate(Documents(EOS, reset=reset, mask=not reset), 32)
    assert backbone.documents is not None


@pytest.mark.parametrize("family, reset, mask", [("mamba", True, True), ("rwkv", False, True), ("mpt", True, False)])
def test_backbones_that_cannot_are_refused(family, reset, mask):
    backbone = Backbone(model_of(family, "eager"), family)
    with pytest.raises(UserError, match=rf"backbone {family} .*cannot keep documents apart") as caught:
        backbone.separate(Documents(EOS, reset=reset, mask=mask), 32)
    assert "\n" not in str(caught.value)


def test_wrong_arguments_are_noticed(monkeypatch):
    """The proof sees a mask that is missing and positions that do not begin again."""
    right = Documents.arguments
    for name, words in (("attention_mask", "depends on the one before it"), ("position_ids", "other hidden states")):

        def wrong(self, ids, dtype, windows, name=name):
            plain = right(Documents(self.eos, False, False), ids, dtype)
            return right(self, ids, dtype, windows) | {name: plain[name]}

        monkeypatch.setattr(documents_module.Documents, "arguments", wrong)
        with pytest.raises(UserError, match=words):
            Backbone(model_of("gpt2"), "x").separate(Documents(EOS, reset=True, mask=True), 32)


def test_a_run_with_documents_apart(run, tmp_path):
    """Losses differ from those of joined text; the settings are part of the curve's identity."""
    small = ("ranks=[2]", "tokens=1024", "data.block_size=64", "data.validation_fraction=0.1")
    curves = [run(*small, *more, run_dir=tmp_path / str(i)).curve for i, more in enumerate(
        ((), ("data.mask_documents=true",), ("data.mask_documents=true", "data.reset_positions=true")))]  # fmt: skip
    losses = [c["reference"]["loss"] for c in curves]
    assert losses[0] != losses[1] and len({c["data_hash"] for c in curves}) == 1
    assert curves[2]["recipe"]["mask_documents"] and curves[2]["recipe"]["reset_positions"]
    assert "mask_documents" not in curves[0]["recipe"]


def test_a_run_reads_the_beginning_that_its_tokenizer_puts(run, toy_backbone, tmp_path, monkeypatch):
    folder = shutil.copytree(toy_backbone, tmp_path / "led")
    tokenizer = AutoTokenizer.from_pretrained(folder, bos_token="!")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", bos)])
    tokenizer.save_pretrained(folder)
    seen, separate = [], Backbone.separate

    def watched(self, documents, block_size):
        seen.append(documents)
        separate(self, documents, block_size)

    monkeypatch.setattr(Backbone, "separate", watched)
    small = (
        "ranks=[2]",
        "tokens=1024",
        "data.block_size=64",
        "data.validation_fraction=0.1",
        "data.mask_documents=true",
    )
    run(*small, f"backbone.path={folder}", run_dir=tmp_path / "run")
    assert [d.bos for d in seen] == [bos] and bos != seen[0].eos
