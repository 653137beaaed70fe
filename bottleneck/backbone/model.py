"""The frozen backbone: a Transformers causal LM run without its head, and proof that its hidden states are right.

Dims: N sequences, T sequence length, D hidden size (width of the head's input), V vocabulary of the head.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from bottleneck.backbone import proof
from bottleneck.backbone.documents import Documents, fault, windows_of
from bottleneck.backbone.head import FullHead, UnknownHeadError
from bottleneck.backbone.load import (
    DTYPES,
    check_no_export,
    empty_model,
    label,
    load_config,
    load_model,
    load_shape,
    load_tokenizer,
    random_model,
)
from bottleneck.backbone.weights import check_numbers, hash_weights, layers_of, shape_hash
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.errors import UserError, check

log = logging.getLogger(__name__)
__all__ = [
    "DTYPES",
    "Backbone",
    "FullHead",
    "empty_model",
    "label",
    "load_config",
    "load_model",
    "load_shape",
    "load_tokenizer",
    "random_model",
]
SHORT = 64  # block length of the causality check if the caller does not know the run's


class Backbone(nn.Module):
    """Hidden states that the model's original head receives; frozen, always in eval mode, never in a checkpoint.

    Attributes:
        head: the original head, a `FullHead` (its tensors are the model's, not copies).
        family: Transformers' model type, for messages.
        documents: how documents of one sequence are kept apart; None: not at all.
        hash: identity of the weights, independent of the dtype they are loaded in.
        rewrites_weights: whether the family changes its weights in place when it runs (RWKV rescales them).

    Args:
        weights_hash: the identity, if no process holds all weights.
        block_size: tokens in a sequence of the run, the length at which causality is checked.
    Raises: UserError if the family has no linear head, does something unknown between it and the logits, cannot run
        on token ids alone, looks at later tokens or at other sequences, is not deterministic, or has a weight that
            is not a usable number.
    """

    def __init__(
        self, model: Any, name: str, weights_hash: Optional[str] = None, *, block_size: Optional[int] = None
    ) -> None:
        super().__init__()
        self.name = name
        self.family: str = model.config.model_type
        model.eval()
        model.requires_grad_(False)
        if weights_hash is None:
            check_numbers(model, name)
        self.engine: Optional[tuple] = None  # owner of the parameters if they are sharded over processes
        self.documents: Optional[Documents] = None
        self._windows: dict[str, Optional[int]] = {}
        self._compiled_for: Optional[tuple[int, int]] = None
        versions = [p._version for p in model.parameters()]
        parts = self._take_apart(model)
        wrong = proof.parity(self.head, parts.hidden, parts.logits)
        check(
            wrong is None,
            f"backbone {name}: family {self.family} is not supported: its logits are not its hidden states times its "
            f"head ({wrong}); it does something between the two that bottleneck does not know",
        )
        self._check_dependence(block_size, _marks(model.config))
        self.rewrites_weights = versions != [p._version for p in model.parameters()]
        self.hash = weights_hash or hash_weights(self)

    @classmethod
    def load(
        cls, cfg: BackboneConfig, device: Union[torch.device, str] = "cpu", *, block_size: Optional[int] = None
    ) -> Backbone:
        """Load weights from the Hub, a folder, a GGUF file or an adapter, and prove that the hidden states are right.

        Args:
            device: of the weights and the proof; decides the dtype that "auto" stands for (bfloat16 on a GPU, else
                float32).
            block_size: see `Backbone`.
        Raises: UserError if it cannot be loaded, and as `Backbone`.
        """
        check_no_export(cfg)
        model = load_model(cfg, torch.device(device).type).to(device)
        return cls(model, label(cfg), shape_hash(model) if cfg.weights == "random" else None, block_size=block_size)

    def _take_apart(self, model: Any) -> proof.Parts:
        """Find body and head of a model."""
        try:
            parts = proof.take_apart(model)
        except UnknownHeadError as error:
            raise UserError(f"backbone {self.name}: family {self.family} is not supported: {error}") from error
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models that need images, speech or a language raise various kinds of errors
            dtypes = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
            raise UserError(
                f"backbone {self.name}: family {self.family} does not run on token ids alone, with weights in "
                f"{dtypes}: {type(error).__name__}: {str(error)[:200]}"
            ) from error
        # Both are submodules, so that they move between devices with the backbone. The body comes first: the hash names
        # the weight of a tied head after the embeddings.
        self.body: Any = parts.body
        self.lm_head: Any = parts.linear
        self._alone = parts.body is not model
        self._map = parts.map
        self._tokens = min(parts.map.V, proof.id_bound(model))
        if parts.map.added_V is not None:
            self.register_buffer("added_V", parts.map.added_V, persistent=False)
        return parts

    def _check_dependence(self, block_size: Optional[int], marks: Sequence[int]) -> None:
        block, device = block_size or SHORT, self.lm_head.weight.device
        try:
            found = proof.dependence(self, self._tokens, block, device, marks)
        except (IndexError, RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            check(
                block_size is None,
                f"data.block_size={block}: backbone {self.name} (family {self.family}) cannot read so many tokens: "
                f"{type(error).__name__}: {str(error)[:200]}",
            )
            found = proof.dependence(self, self._tokens, proof.PROBE[1], device, marks)
        check(
            found.others is None,
            f"backbone {self.name}: family {self.family} as configured gives the same tokens other hidden states in "
            f"another pass or beside other sequences, by {found.others or 0:.2g} of their length: is dropout, a cache "
            "or normalisation over the batch left on?",
        )
        check(
            found.later is None,
            f"backbone {self.name}: family {self.family} as configured is not causal: changing later tokens moves "
            f"earlier hidden states by {found.later or 0:.2g} of their length, so heads would see what they predict",
        )

    @property
    def head(self) -> FullHead:
        """The original head."""
        if self._map.added_V is not None:
            self._map.added_V = self.get_buffer("added_V")  # which moves between devices
        return self._map.of(self.lm_head)

    @property
    def dtype(self) -> torch.dtype:
        """Of the head's weights and the hidden states."""
        return self.lm_head.weight.dtype

    @property
    def hidden_size(self) -> int:
        """Width of the head's input."""
        return self.lm_head.weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """Columns of the logits: rows of the head, padding rows included unless the family cuts them off."""
        return self._map.V

    def _apply(self, fn: Any, recurse: bool = True) -> Backbone:
        """A sharded backbone stays on its device: Lightning would bring it to the CPU after the fit."""
        return self if self.engine is not None else super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode: dropout would change what the heads are trained on."""
        return super().train(False)

    def separate(self, documents: Documents, block_size: int) -> None:
        """Keep documents apart from now on. Raises UserError if the backbone cannot."""
        device = self.lm_head.weight.device
        config = getattr(self.body, "config", None)
        self._windows = windows_of(config.get_text_config()) if config is not None else {}

        def run(ids_NT: Tensor, kept: Optional[Documents]) -> Tensor:
            self.documents = kept
            return self(ids_NT)

        try:
            wrong = fault(run, documents, self._tokens, block_size, device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a family that does not know these arguments raises various kinds of errors
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        check(
            wrong is None,
            f"{documents.keys}: backbone {self.name} (family {self.family}) cannot keep documents apart: {wrong};"
            " leave it out, or try backbone.attn_implementation=eager",
        )
        self.documents = documents

    @torch.no_grad()
    def forward(self, ids_NT: Tensor) -> Tensor:
        """Token ids [N, T] to the head's input [N, T, D], in the head's dtype."""
        odd = self._compiled_for is not None and tuple(ids_NT.shape) != self._compiled_for
        with torch.compiler.set_stance("force_eager") if odd else contextlib.nullcontext():
            more: dict[str, Any] = {}
            if self.documents is not None:
                more = self.documents.arguments(ids_NT, self.dtype, self._windows)
                ids_NT = self.documents.begun(ids_NT)
            if self._alone:
                hidden = self.body(input_ids=ids_NT, use_cache=False, **more).last_hidden_state
            else:
                hidden = proof.through(self.body, self.lm_head, ids_NT, **more)
        return hidden.to(self.dtype)

    def compile_layers(self, shape: tuple[int, int]) -> bool:
        """Compile the body's repeated layers for batches [N, T] of one shape; batches of other shapes run uncompiled.

        One layer is compiled for all; this takes seconds, compiling the whole body a minute.
        Returns: False, without compiling, if the family does not name its layers.
        """
        layers = layers_of(self.body)
        for layer in layers:
            layer.compile(dynamic=False)
        self._compiled_for = shape if layers else None
        return bool(layers)


def _marks(config: Any) -> list[int]:
    """End of text and padding, as a config names them: ids that a family may treat in a way of their own."""
    text = config.get_text_config()
    found = [getattr(c, name, None) for c in (config, text) for name in ("eos_token_id", "pad_token_id")]
    flat = [i for value in found for i in (value if isinstance(value, list) else [value])]
    return [i for i in flat if isinstance(i, int)]
