"""A work-around for lm-eval (its issue 3333): texts of rolling log-likelihoods get the beginning-of-text token twice.

`loglikelihood_rolling` puts its prefix token before the tokens of a text; a tokenizer that adds the same token itself
(Llama, Gemma) has already done so. Multiple-choice requests get theirs from the tokenizer only and are correct.
"""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM


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
