"""The frozen backbone: a Transformers causal LM run without its head, and proof that its hidden states are the right ones.

Dims: N sequences, T sequence length, D hidden size (width of what the head receives), V vocabulary of the head.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bottleneck.backbone.weights import hash_weights, layers_of, materialise, randoms, shape_hash, units
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.errors import UserError, check
from bottleneck.losses.products import matmul_f32

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class FullHead:
    """The backbone's own head: logits = cap(scale · (h Wᵀ + b)), with cap(x) = c · tanh(x / c) where there is a cap c."""

    W_VD: Tensor
    bias_V: Optional[Tensor] = None
    scale: float = 1.0
    softcap: Optional[float] = None

    @property
    def plain(self) -> bool:
        """True where the head is W alone, as in the paper."""
        return self.bias_V is None and self.scale == 1.0 and self.softcap is None

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states [..., D] to logits [..., V], in the dtype of W."""
        return self._capped(F.linear(h.to(self.W_VD.dtype), self.W_VD, self.bias_V))

    def float_logits(self, h_ND: Tensor) -> Tensor:
        """Hidden states [N, D] to float32 logits [N, V]: of 16-bit weights the sums of products as they are, not rounded again.

        Between 16 and 32 bfloat16 has steps of 0.125: rounded logits tie at the top, and the loss gains up to a hundredth of a nat.
        """
        z = matmul_f32(h_ND.to(self.W_VD.dtype), self.W_VD.T)
        return self._capped(z if self.bias_V is None else z + self.bias_V.float())

    def _capped(self, z: Tensor) -> Tensor:
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap


def label(cfg: BackboneConfig) -> str:
    """The backbone's name in files and pictures."""
    if cfg.name:
        return cfg.name if not cfg.revision else f"{cfg.name}@{cfg.revision}"
    last = Path(cfg.path).name or cfg.path
    return last if not cfg.revision else f"{last}@{cfg.revision}"


def _source(cfg: BackboneConfig) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"revision": cfg.revision, "trust_remote_code": cfg.trust_remote_code}
    if cfg.gguf_file:
        kwargs["gguf_file"] = cfg.gguf_file
    return {k: v for k, v in kwargs.items() if v is not None}


def _check_path(cfg: BackboneConfig) -> None:
    """A path that looks local must exist: otherwise Transformers would search the Hub for it and report that."""
    path = Path(cfg.path).expanduser()
    local = path.is_absolute() or cfg.path.startswith((".", "~")) or cfg.path.count("/") > 1
    check(not local or path.is_dir(), f"backbone.path={cfg.path}: no such folder")
    if cfg.gguf_file and path.is_dir():
        found = ", ".join(sorted(p.name for p in path.glob("*.gguf"))) or "none"
        check(
            (path / cfg.gguf_file).is_file(),
            f"backbone.gguf_file={cfg.gguf_file}: not in {path}; GGUF files there: {found}",
        )


def _load(what: str, cfg: BackboneConfig, load):
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # Transformers, safetensors and tokenizers raise many kinds for bad names and files
        where = cfg.path + (f" (revision {cfg.revision})" if cfg.revision else "")
        absent = "" if Path(cfg.path).expanduser().exists() else "no such folder here, and from the Hub: "
        raise UserError(
            f"backbone.path={where}: {absent}cannot load its {what}: {type(error).__name__}: {error}"
        ) from error


def load_tokenizer(cfg: BackboneConfig):
    """The backbone's tokenizer. Raises UserError where there is none, or it has no end-of-text token."""
    _check_path(cfg)
    if cfg.tokenizer:
        kwargs: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
        tokenizer = _load("tokenizer", cfg, lambda: AutoTokenizer.from_pretrained(cfg.tokenizer, **kwargs))
    else:
        tokenizer = _load("tokenizer", cfg, lambda: AutoTokenizer.from_pretrained(cfg.path, **_source(cfg)))
    # an empty tokenizer is what Transformers makes of a folder without tokenizer files
    words = tokenizer("text in words", add_special_tokens=False)["input_ids"]
    check(
        len(set(words)) > 1,
        f"backbone.tokenizer: the tokenizer of {cfg.tokenizer or cfg.path} turns words into nothing; are its files there?",
    )
    check(
        tokenizer.eos_token_id is not None,
        f"backbone {label(cfg)}: its tokenizer has no end-of-text token to join documents",
    )
    return tokenizer


def load_shape(cfg: BackboneConfig) -> tuple[int, Optional[int], int]:
    """Hidden size the head receives, context length (None: no limit) and vocabulary, from the config alone (no weights)."""
    _check_path(cfg)
    text = _load("config", cfg, lambda: AutoConfig.from_pretrained(cfg.path, **_source(cfg))).get_text_config()
    # OPT-350m projects its hidden states to the width of the embeddings before the head
    width = getattr(text, "word_embed_proj_dim", None) or text.hidden_size
    context = getattr(text, "max_position_embeddings", None)
    return width, context if context and context > 0 else None, text.vocab_size


def _options(cfg: BackboneConfig, device_type: str) -> dict[str, Any]:
    name = cfg.dtype if cfg.dtype != "auto" else ("bfloat16" if device_type == "cuda" else "float32")
    attention = {"attn_implementation": cfg.attn_implementation} if cfg.attn_implementation else {}
    return {"dtype": DTYPES[name], **attention}


def empty_model(cfg: BackboneConfig, device_type: str = "cpu", tied: Optional[bool] = None) -> Any:
    """The model that the config alone describes, in eval mode: parameters and buffers on the meta device, in nobody's memory.

    Args: tied: whether head and embeddings are one parameter, where the weights know better than the config.
    """
    _check_path(cfg)

    def build() -> Any:
        shape = AutoConfig.from_pretrained(cfg.path, **_source(cfg))
        if tied is not None:
            shape.tie_word_embeddings = shape.get_text_config().tie_word_embeddings = tied
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                shape, trust_remote_code=cfg.trust_remote_code, **_options(cfg, device_type)
            ).eval()

    return _load("config", cfg, build)


def random_model(cfg: BackboneConfig, device_type: str = "cpu") -> Any:
    """`empty_model` with random weights in memory: see `randoms`."""
    model = empty_model(cfg, device_type)
    draw, memo = randoms(model, torch.device("cpu")), {}
    for _, modules in units(model):
        materialise(modules, draw, memo)
    return model


def load_model(cfg: BackboneConfig, device_type: str = "cpu") -> Any:
    """The whole Transformers model with its own head, in eval mode.

    Args:
        device_type: "cuda" or "cpu": what dtype "auto" stands for (bfloat16 or float32).
    Raises: UserError where it cannot be loaded, or the files lack weights.
    """
    if cfg.weights == "random":
        return random_model(cfg, device_type)
    _check_path(cfg)
    kwargs = {**_source(cfg), **_options(cfg, device_type), "output_loading_info": True}
    transformers.utils.logging.disable_progress_bar()
    model, report = _load("weights", cfg, lambda: AutoModelForCausalLM.from_pretrained(cfg.path, **kwargs))
    absent = sorted(map(str, report["missing_keys"])) + sorted(map(str, report["mismatched_keys"]))
    check(not absent, f"backbone.path={cfg.path}: weights are missing or of another shape: {', '.join(absent[:5])}")
    return model


class Backbone(nn.Module):
    """Hidden states that the model's own head receives; frozen, always in eval mode, never in a checkpoint.

    Attributes:
        head: the model's own `FullHead` (its tensors are the model's, not copies).
        family: Transformers' model type, for messages.
        hash: identity of the weights, independent of the dtype they are loaded in; given, where no process holds them all.
    """

    def __init__(self, model: nn.Module, name: str, weights_hash: Optional[str] = None):
        super().__init__()
        self.name = name
        self.family = model.config.model_type
        lm_head = model.get_output_embeddings()
        check(
            lm_head is not None and hasattr(lm_head, "weight"),
            f"backbone {name}: family {self.family} has no linear LM head",
        )
        self.body = getattr(model, model.base_model_prefix, None)
        check(
            self.body is not None and self.body is not model,
            f"backbone {name}: family {self.family} has no body without its head",
        )
        self.lm_head = lm_head  # kept as a submodule, so that it moves along between devices
        self.requires_grad_(False)
        self.eval()
        config = model.config.get_text_config()
        self._scale = _logit_scale(config)
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._compiled_for: Optional[tuple[int, int]] = None
        self.engine: Optional[tuple] = None  # what holds the parameters, where they are spread over processes
        self._parity(model)
        self.hash = weights_hash or hash_weights(self)

    @classmethod
    def load(cls, cfg: BackboneConfig, device: Union[torch.device, str] = "cpu") -> Backbone:
        """Load weights from the Hub, a local folder or a GGUF file, and prove that the hidden states are right.

        Args:
            device: where it goes, and the proof runs; decides what dtype "auto" stands for (bfloat16 on a GPU, else float32).
        Raises: UserError where it cannot be loaded, or the family's logits are not its hidden states times its head.
        """
        model = load_model(cfg, torch.device(device).type).to(device)
        return cls(model, label(cfg), shape_hash(model) if cfg.weights == "random" else None)

    @property
    def head(self) -> FullHead:
        return FullHead(self.lm_head.weight, getattr(self.lm_head, "bias", None), self._scale, self._softcap)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and the hidden states."""
        return self.lm_head.weight.dtype

    @property
    def hidden_size(self) -> int:
        return self.lm_head.weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """Rows of the head, padding rows included."""
        return self.lm_head.weight.shape[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Backbone:
        """Where it is spread over processes it stays on its device: Lightning would bring it to the CPU after the fit."""
        return self if self.engine is not None else super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode: dropout would change what the heads are trained on."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, ids_NT: Tensor) -> Tensor:
        """Token ids [N, T] to hidden states [N, T, D] after the final norm."""
        odd = self._compiled_for is not None and tuple(ids_NT.shape) != self._compiled_for
        with torch.compiler.set_stance("force_eager") if odd else contextlib.nullcontext():
            return self.body(input_ids=ids_NT, use_cache=False).last_hidden_state

    def compile_layers(self, shape: tuple[int, int]) -> bool:
        """Compile the body's repeated layers for batches [N, T] of one shape; batches of other shapes run as they are.

        One layer is compiled for all, which takes seconds where compiling the whole body takes a minute.
        Returns: False, and nothing is done, where the family does not name its layers.
        """
        layers = layers_of(self.body)
        for layer in layers:
            layer.compile(dynamic=False)
        self._compiled_for = shape if layers else None
        return bool(layers)

    @torch.no_grad()
    def _parity(self, model: nn.Module) -> None:
        """hidden state x own head must equal the model's logits, on a probe batch (random ids, fixed seed)."""
        was_training = model.training
        model.eval()
        embedding = model.get_input_embeddings()
        size = min(
            self.vocab_size, getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]
        )  # ZeRO-3 hides the weight
        device = self.lm_head.weight.device
        ids = torch.randint(0, size, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
        wanted = model(input_ids=ids, use_cache=False).logits.float()
        got = self.head.logits(self(ids)).float()
        model.train(was_training)
        if got.shape == wanted.shape:
            error = ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()
            check(error == error, f"backbone {self.name}: its weights are not numbers: its logits hold NaN or infinity")
            # both sides run the same product in the same dtype: what is allowed is another order of summation
            if error < (1e-4 if self.lm_head.weight.dtype == torch.float32 else 6e-3):
                return
            detail = f"relative error {error:.2g}"
        else:
            detail = f"shapes {list(got.shape)} and {list(wanted.shape)}"
        raise UserError(
            f"backbone {self.name}: family {self.family} is not supported: its logits are not its last hidden states "
            f"times its head ({detail}); it does something between the two that bottleneck does not know"
        )


def _logit_scale(config: Any) -> float:
    """Cohere multiplies its logits by logit_scale, Granite divides them by logits_scaling."""
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        return float(scale)
    divisor = getattr(config, "logits_scaling", None)
    return 1.0 if divisor is None else 1.0 / float(divisor)
