"""Work-arounds for special tokens in lm-eval: one at the beginning of every text, none at its end.

Its issue 3333: texts of rolling log-likelihoods get the beginning-of-text token twice.

`loglikelihood_rolling` puts its prefix token before the tokens of a text; a tokenizer that adds the same token itself
(Llama, Gemma) has already done so. Multiple-choice requests get theirs from the tokenizer only and are correct.
"""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing

from bottleneck.core.errors import check


def without_ending(tokenizer: Any) -> Any:
    """A tokenizer that puts nothing behind a text; changed in place if it did (`add_eos_token` of Llama, XGLM, T5).

    lm-eval takes the tokens beyond those of the question for the answer: with an end of text behind both, the answer
    lost its first token and was scored after an end of text.

    Raises: UserError if it does and cannot be changed.
    """
    text, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = [i for i in range(len(whole) - len(text) + 1) if whole[i : i + len(text)] == text]
    if not starts or whole[starts[0] + len(text) :] == []:
        return tokenizer
    front = whole[: starts[0]]
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    check(
        hasattr(backend, "post_processor"),
        f"backbone.tokenizer: {type(tokenizer).__name__} puts special tokens behind every text, with which lm-eval "
        "scores wrong tokens; give a tokenizer that does not",
    )
    names = tokenizer.convert_ids_to_tokens(front)
    backend.post_processor = TemplateProcessing(single=[*names, "$A"], special_tokens=list(zip(names, front)))
    return tokenizer


class OneBOS(HFLM):
    """lm-eval's Transformers model with one beginning-of-text token before every text."""

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As in lm-eval, but texts are encoded without special tokens, so that only its prefix token is added."""
        before: Any = self.add_bos_token
        self.add_bos_token: Any = False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = before
