"""Small configs for every causal LM that Transformers knows; `serve.families` tries them all.

The numbers of a family's default config are recognised by their names and made small. Families whose numbers depend
on each other in ways that names do not show have an entry in `EXTRA`.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 96
CONTEXT = 128
_BY_NUMBER = {
    32: "hidden_size d_model n_embd dim embed_dim embedding_size input_embedding_size output_embedding_size "
    "word_embed_proj_dim hidden_dim emb_dim",
    64: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner feed_forward_size n_inner ffn_hidden_size "
    "shared_expert_intermediate_size moe_intermediate_size dim_ff intermediate_size_mlp d_ff shared_intermediate_size "
    "moe_shared_expert_intermediate_size attention_hidden_size block_ff_dim",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers num_key_value_heads num_kv_heads num_experts_per_tok moe_top_k moe_k num_experts_per_token",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads mamba_n_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts",
    8: "head_dim attention_head_size attention_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim",
    16: "kv_lora_rank q_lora_rank",
    CONTEXT: "max_position_embeddings n_positions max_target_positions max_seq_len max_source_positions context_length "
    "seq_length max_sequence_length",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
}
_SMALL = {name: number for number, names in _BY_NUMBER.items() for name in names.split()}
_MLA = dict(num_key_value_heads=4, head_dim=8)
EXTRA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), _MLA),
    **{f: dict(rotary_dim=4) for f in ("codegen", "gptj")},
    **{f: dict(head_dim=8) for f in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "ministral3")},
    "beam": dict(final_logit_softcapping=30.0),
    "glm4_moe_lite": _MLA,
    "axk1": dict(**_MLA, n_group=1, topk_group=1),
    "deepseek_v2": dict(**_MLA, num_experts_per_tok=2, n_group=1, topk_group=1),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, num_experts_per_tok=2),
    "gemma3n_text": dict(num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(num_heads=8, head_dim=8, state_size=8, n_groups=1),
    "nemotron": dict(num_key_value_heads=2, head_dim=8),
    "reformer": dict(
        axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 16], is_decoder=True, attn_layers=["local", "local"]
    ),
    "xmod": dict(default_language="en_XX"),
    "zaya": dict(num_experts_per_tok=1),
    # in published checkpoints of these families the original head is more than W
    "falcon_h1": dict(lm_head_multiplier=0.25),
    "granite": dict(logits_scaling=8.0),
    "hyperclovax": dict(logits_scaling=0.125),
    "inkling_text": dict(unpadded_vocab_size=90),
    "mpt": dict(logit_scale="inv_sqrt_d_model"),
    "rwkv": dict(rescale_every=1),
}


def tiny_config(family: str) -> Any:
    """A config of two layers, 32 dimensions and 96 tokens. Raises what the config raises if it cannot be shrunk."""
    kind = CONFIG_MAPPING[family]
    defaults = kind().to_dict()
    first: Exception | None = None
    for lists in (False, True):
        try:
            return kind(**_shrunk(defaults, lists) | EXTRA.get(family, {}))
        except Exception as error:  # huggingface_hub's dataclasses raise their own kinds
            first = first or error
    assert first is not None
    raise first


def _shrunk(defaults: dict[str, Any], lists: bool) -> dict[str, Any]:
    """Args: lists: also keep the first and last entry of lists with one entry a layer."""
    out: dict[str, Any] = {}
    for name, value in defaults.items():
        if name in _SMALL and isinstance(value, int) and not isinstance(value, bool):
            out[name] = _SMALL[name]
        elif name in _SMALL and isinstance(value, list) and value:
            out[name] = [_SMALL[name]] * 2
        elif name == "is_decoder":
            out[name] = True
        elif isinstance(value, dict) and name.endswith("config") and value:
            out[name] = _shrunk(value, lists) | ({"model_type": value["model_type"]} if "model_type" in value else {})
        elif name.endswith("token_id") and isinstance(value, int):
            out[name] = 1
        elif lists and isinstance(value, list) and len(value) > 2:
            out[name] = value[:1] + value[-1:]
    return out
