"""Causal LMs of Transformers with a head of any kind of bottleneck: log p is not linear in the hidden state.

`python -m bottleneck.export --form modelling` copies this file into the folders it writes, where
AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) finds it; it needs nothing but Transformers. There
is a class Kind<Architecture> for every architecture of Transformers whose head is called lm_head. The formulas are
those of bottleneck/heads/kinds, where their sources are named.

Dims: D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import gelu, log_softmax, logsigmoid, softplus

PREFIX = "Kind"
# Without this file's code Transformers would load the architecture's own class, with a random head and a warning. A
# weight of the original head's name that fits no head makes it refuse; the other name in its report says what to do.
REFUSED = ("lm_head.weight", "lm_head.needs_trust_remote_code")
REST = 1e-6  # probability of all tokens together that have no row
Tensors = Mapping[str, Tensor]
Formula = Callable[[Tensor, Tensors, Mapping[str, Any]], Tensor]


def low_rank(h: Tensor, t: Tensors, options: Mapping[str, Any]) -> Tensor:
    """A B h, also the part of other kinds that is linear."""
    return (h @ t["B"].T @ t["A"].T).float()


def full(h: Tensor, t: Tensors, options: Mapping[str, Any]) -> Tensor:
    """W h."""
    return (h @ t["W"].T).float()


def low_rank_bias(h: Tensor, t: Tensors, options: Mapping[str, Any]) -> Tensor:
    """A B h + b."""
    return low_rank(h, t, options) + t["bias"].float()


def low_rank_sparse(h: Tensor, t: Tensors, options: Mapping[str, Any]) -> Tensor:
    """A B h, but U h for the tokens that have rows of their own."""
    return low_rank(h, t, options).index_copy(-1, t["tokens_F"], (h @ t["U"].T).float())


def block(h: Tensor, t: Tensors, options: Mapping[str, Any]) -> Tensor:
    """A_i B_i h of each band of tokens, in the order of ids."""
    bands = range(sum(name.startswith("A_") for name in t))
    parts = [h @ t[f"B_{i}"].T @ t[f"A_{i}"].T for i in bands]
    return torch.cat(parts, -1).index_select(-1, t["place_V"]).float()


def truncated(h: Tensor, t: Tensors, options: Mapping[str, Any]) -> Tensor:
    """W h for the kept tokens."""
    return _over_vocabulary((h @ t["W"].T).float(), t["tokens_K"], options)


def low_rank_truncated(h: Tensor, t: Tensors, options: Mapping[str, Any]) -> Tensor:
    """A B h for the kept tokens."""
    return _over_vocabulary(low_rank(h, t, options), t["tokens_K"], options)


def _over_vocabulary(kept: Tensor, tokens_K: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Logits of all tokens; those without a row have the probability `REST` together."""
    others = options["vocab_size"] - len(tokens_K)
    if not others:
        return kept
    rest = torch.logsumexp(kept, -1, keepdim=True) + math.log(REST / (1 - REST) / others)
    return rest.expand(*kept.shape[:-1], options["vocab_size"]).index_copy(-1, tokens_K, kept)


def mos(h: Tensor, t: Tensors, options: Mapping[str, Any]) -> Tensor:
    """log Σ_k π_k softmax(A B_k h) with π = softmax(G h)."""
    if options["components"] == 1:
        return low_rank(h, t, options)
    log_prior = log_softmax((h @ t["G"].T).float(), -1)
    total = None
    for k, B in enumerate(t["B"]):
        log_p = log_softmax((h @ B.T @ t["A"].T).float(), -1) + log_prior[..., k, None]
        total = log_p if total is None else torch.logaddexp(total, log_p)
    assert total is not None
    return total


def sigsoftmax(h: Tensor, t: Tensors, options: Mapping[str, Any]) -> Tensor:
    """s + log σ(s) with s = A B h."""
    s = low_rank(h, t, options)
    return s + logsigmoid(s)


def plif(h: Tensor, t: Tensors, options: Mapping[str, Any]) -> Tensor:
    """f(A B h) with an increasing piecewise linear f."""
    s, pieces, limit = low_rank(h, t, options), options["pieces"], float(options["limit"])
    width, slopes = 2 * limit / pieces, softplus(t["slopes"].float())
    below = torch.cat([slopes.new_zeros(1), slopes.cumsum(0)[:-1]]) * width - limit  # f at each left knot
    piece = ((s + limit) / width).floor().clamp(0, pieces - 1).nan_to_num(0).long()
    return below[piece] + slopes[piece] * (s + limit - piece * width)


def gated(h: Tensor, t: Tensors, options: Mapping[str, Any]) -> Tensor:
    """A ((B h) ⊙ (1 + GELU(G h)))."""
    z = (h @ t["B"].T) * (1 + gelu(h @ t["G"].T))
    return (z @ t["A"].T).float()


def context_temperature(h: Tensor, t: Tensors, options: Mapping[str, Any]) -> Tensor:
    """exp(w · h) A B h."""
    return (h @ t["w"].T).float().exp() * low_rank(h, t, options)


FORMULAS: dict[str, Formula] = {
    f.__name__: f
    for f in (
        low_rank,
        full,
        low_rank_bias,
        low_rank_sparse,
        block,
        mos,
        sigsoftmax,
        plif,
        gated,
        context_temperature,
        truncated,
        low_rank_truncated,
    )
}


class KindHead(nn.Module):
    """Hidden states [..., D] to logits [..., V].

    Args:
        options: of the kind, and `vocab_size`.
        shapes: of its tensors by name; those of whole numbers are listed in `whole`.
        divisor: the logits are divided by it, where the model multiplies them by it afterwards.
    """

    def __init__(
        self,
        kind: str,
        options: Mapping[str, Any],
        shapes: Mapping[str, list[int]],
        whole: list[str],
        divisor: float,
    ) -> None:
        super().__init__()
        self.kind, self.options, self.names, self.divisor = kind, dict(options), list(shapes), divisor
        for name, shape in shapes.items():
            if name in whole:
                self.register_buffer(name, torch.zeros(shape, dtype=torch.int64))
            else:
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    @property
    def weight(self) -> Tensor:
        """Some families ask their head's weight for its dtype or device."""
        return next(self.parameters())

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits, in the dtype of the hidden states; softmaxes and sums over components are float32."""
        tensors = {name: getattr(self, name) for name in self.names}
        logits = FORMULAS[self.kind](hidden, tensors, self.options) / self.divisor
        return logits.to(hidden.dtype)


def _with_kind(architecture: str) -> type:
    base: Any = getattr(transformers, architecture)

    class WithKind(base):  # type: ignore[misc]  # the base is known at run time only
        _tied_weights_keys: dict[str, str] = {}  # as in Transformers' own classes
        _keys_to_ignore_on_load_unexpected = [*(base._keys_to_ignore_on_load_unexpected or ()), *REFUSED]

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            h = config.kind_head
            self.lm_head = KindHead(h["kind"], h["options"], h["shapes"], h["whole"], h["divisor"])

        @classmethod
        def is_custom_code(cls) -> bool:
            """All is initialised as in Transformers' own classes: else Falcon-H1's buffers stay without values."""
            return False

        @classmethod
        def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
            """As Transformers', with a folder whose weights are not complete refused."""
            report = kwargs.pop("output_loading_info", False)
            try:
                model, found = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
            except SafetensorError as error:
                raise ValueError(f"{path}: its weights are damaged or cut short: {error}") from error
            absent = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
            if absent:
                raise ValueError(f"{path}: weights are missing or of another shape: {', '.join(absent[:5])}")
            return (model, found) if report else model

        def save_pretrained(self, path: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
            """As Transformers'."""
            state = dict(self.state_dict() if state_dict is None else state_dict)
            state |= {name: torch.zeros(1) for name in REFUSED}
            return super().save_pretrained(path, *args, state_dict=state, **kwargs)

        def _init_weights(self, module: Any) -> None:
            """Families initialise linear layers that are not in the files; all tensors of this head are."""
            if not isinstance(module, KindHead):
                super()._init_weights(module)

    WithKind.__name__ = WithKind.__qualname__ = PREFIX + architecture
    return WithKind


def __getattr__(name: str) -> Any:
    architecture = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or not hasattr(transformers, architecture):
        raise AttributeError(name)
    globals()[name] = _with_kind(architecture)
    return globals()[name]
