"""vLLM models with a head of two matrices: logits = up(down(h)). A class LowRank<Architecture> for each of vLLM's.

`up` is sharded over the vocabulary like any head of vLLM's, `down` is replicated. vLLM calls a head through its
quantization method, so that method's instance also computes the product with `down`. A wrapper class would break
loading, which checks the method's type.

Dims: D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import PPMissingLayer

from bottleneck.serve.low_rank_head import DOWN, PREFIX, UP

OLD_HEADS = ("lm_head.", "embed_out.", "output.weight")  # names of the original head, if a folder still has it


class LowRankLMHead(ParallelLMHead):
    """vLLM's head with an input of R numbers, and the matrix [R, D] that computes them from a hidden state."""

    def __init__(self, hidden_size: int, rank: int, vocab_size: int, head_dtype: torch.dtype | None) -> None:
        super().__init__(vocab_size, rank)
        self.down = ReplicatedLinear(hidden_size, rank, bias=False, return_bias=False)
        product = self.quant_method.apply

        def apply(layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            if head_dtype is None or head_dtype == x.dtype:
                return product(layer, self.down(x), bias)
            z = F.linear(x.to(head_dtype), self.down.weight.to(head_dtype))
            return F.linear(z, self.weight.to(head_dtype))

        self.quant_method.apply = apply


class _Processor(LogitsProcessor):
    """Logits of one fixed head, whatever head an architecture passes (Gemma 2: its embeddings); no scale, no cap."""

    def __init__(self, vocab_size: int, head: LowRankLMHead) -> None:
        super().__init__(vocab_size)
        self.head_dtype = None  # the head itself handles the dtype
        self.head = (head,)  # in a tuple, because it is already a submodule of the model

    def forward(self, lm_head: Any, hidden_states: Tensor, _: Any = None, skip_gather: bool = False) -> Tensor | None:
        return super().forward(self.head[0], hidden_states, None, skip_gather)

    def get_top_tokens(self, lm_head: Any, hidden_states: Tensor, _: Any = None) -> Tensor:
        return super().get_top_tokens(self.head[0], hidden_states)


def _low_rank(architecture: str) -> type:
    base: Any = ModelRegistry.models[architecture].load_model_cls()

    class LowRank(base):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            model = vllm_config.model_config
            config = model.hf_config
            for each in (config, model.hf_text_config):
                each.tie_word_embeddings = False
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.folder = model.model
            if isinstance(getattr(self, "lm_head", None), PPMissingLayer):
                return
            rows, width = config.head_shape
            self.lm_head = LowRankLMHead(width, config.head_rank, rows, model.head_dtype)
            self.logits_processor = _Processor(rows, self.lm_head)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            """Load the head's two matrices here, all other weights as the architecture does."""
            loaded: set[str] = set()

            def rest() -> Iterable[tuple[str, Tensor]]:
                for name, tensor in weights:
                    if name in (UP, DOWN):
                        loaded.update(self._load_head(name, tensor))
                    elif not name.startswith(OLD_HEADS):
                        yield name, tensor

            try:
                body = super().load_weights(rest())
            except (AssertionError, KeyError, RuntimeError, ValueError) as error:
                why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise ValueError(f"{self.folder}: its weights do not fit its config.json: {why}") from error
            return (body or set()) | loaded

        def _load_head(self, name: str, tensor: Tensor) -> set[str]:
            if isinstance(self.lm_head, PPMissingLayer):
                return set()
            if name == DOWN:
                default_weight_loader(self.lm_head.down.weight, tensor)
                return {"lm_head.down.weight"}
            self.lm_head.weight_loader(self.lm_head.weight, tensor)
            return {"lm_head.weight"}

    LowRank.__name__ = LowRank.__qualname__ = PREFIX + architecture
    LowRank.__module__ = __name__
    return LowRank


def __getattr__(name: str) -> Any:
    architecture = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or architecture not in ModelRegistry.models:
        raise AttributeError(name)
    globals()[name] = _low_rank(architecture)
    return globals()[name]
