"""Drafted tokens that vLLM accepted, by position, against those predicted in the same contexts.

    BOTTLENECK_VLLM=.venv/vllm/bin/python PYTHONPATH=.:tests python -m support.served_acceptance TARGET DRAFT

DRAFT is a `--form serve` folder, TARGET a folder with weights. A drafted token is accepted with probability
Σ_v min(p_v, q_v) in the context at hand, the curve's `acceptance`, where requests sample at temperature 1; and where
the arg-maxes are equal, the curve's `top1_agreement`, where they are greedy. p and q are computed in float64 from the
text that was served. The differences between accepted and predicted are uncorrelated, so the variance of their sum is
the sum of α (1 - α).

Dims: K tokens of a draft, T tokens of a text, V vocabulary.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bottleneck.core.extensions import Predictions
from bottleneck.evaluation.metrics.agreement import acceptance, top1_agreement


class Served(NamedTuple):
    """Sums by position [K]; `examined` are the drafted tokens up to the first that was refused."""

    drafted: int
    examined: Tensor
    accepted: Tensor
    predicted: Tensor
    variance: Tensor

    @property
    def z(self) -> float:
        """Standard errors between accepted and predicted, over all positions."""
        return float((self.accepted.sum() - self.predicted.sum()) / self.variance.sum().sqrt())

    @property
    def z_K(self) -> Tensor:
        """The same, position by position."""
        return (self.accepted - self.predicted) / self.variance.sqrt()

    def table(self) -> str:
        """Lines for the terminal."""
        rows = [f"{self.drafted} drafted"]
        for k, (n, a, p, z) in enumerate(zip(self.examined, self.accepted, self.predicted, self.z_K), start=1):
            rows.append(f"position {k}: {int(n)} examined, {int(a)} accepted, {p:.1f} predicted, z {z:.2f}")
        return "\n".join(
            [*rows, f"all: {int(self.accepted.sum())} accepted, {self.predicted.sum():.1f}, z {self.z:.2f}"]
        )


@torch.no_grad()
def log_probabilities(model: Any, prompt: list[int], tokens: list[int]) -> Tensor:
    """[T, V], float64: of the token at each position of `tokens`, given all tokens before it."""
    logits_TV = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits_TV.double().log_softmax(-1)


def acceptance_of(
    target: Path, draft: str, answers: list[dict], prompts: list[list[int]], K: int, *, temperature: float
) -> Served:
    """Args: answers: of `vllm_answers`, one for each prompt. temperature: 0 or 1."""
    judge = AutoModelForCausalLM.from_pretrained(target).double().eval()
    author = AutoModelForCausalLM.from_pretrained(draft, trust_remote_code=True).double().eval()
    examined, accepted, predicted, variance = torch.zeros(4, K, dtype=torch.float64)
    drafted = 0
    for prompt, got in zip(prompts, answers):
        p, q = (
            Predictions(log_probabilities(m, prompt, got["tokens"]), torch.tensor(got["tokens"]))
            for m in (judge, author)
        )
        alpha_T = (acceptance if temperature else top1_agreement)(p, q).double()
        at = got["steps"][0]
        for new in got["steps"][1:-1]:  # the last step is cut by the length asked for
            drafted += K
            for k in range(min(new, K)):  # positions that were examined: all accepted, and the first refused
                a = alpha_T[at + k]
                examined[k] += 1
                predicted[k] += a
                variance[k] += a * (1 - a)
                accepted[k] += new > k + 1
            at += new
    return Served(drafted, examined, accepted, predicted, variance)


def main() -> None:
    """Serve, compare, print."""
    from support.serving import vllm_answers

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("draft")
    parser.add_argument("--prompts", type=int, default=32, help="of 12 random tokens each (default: 32)")
    parser.add_argument("--tokens", type=int, default=100, help="of each answer (default: 100)")
    parser.add_argument("--drafted", type=int, default=4, help="tokens of a draft (default: 4)")
    parser.add_argument("--temperatures", type=int, nargs="+", default=[0, 1], choices=(0, 1))
    args = parser.parse_args()
    args.target, args.draft = args.target.resolve(), str(Path(args.draft).resolve())
    prompts = [
        torch.randint(2, 8000, (12,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(args.prompts)
    ]
    for temperature in args.temperatures:
        method = "probabilistic" if temperature else "greedy"
        how = {"model": args.draft, "num_speculative_tokens": args.drafted, "draft_sample_method": method}
        job = {"folder": str(args.target), "prompts": prompts, "tokens": args.tokens, "temperature": temperature}
        with tempfile.TemporaryDirectory() as folder:
            (answer,) = vllm_answers(os.environ["BOTTLENECK_VLLM"], [{**job, "draft": how}], Path(folder))
        assert "prompts" in answer, answer
        found = acceptance_of(
            args.target, args.draft, answer["prompts"], prompts, args.drafted, temperature=temperature
        )
        print(f"temperature {temperature}: {found.table()}", flush=True)


if __name__ == "__main__":
    main()
