"""Run by the Python of a venv with vLLM: answers of several served folders, in one process, without HTTP.

    VENV/bin/python vllm_answers.py JOBS.json ANSWERS.json

JOBS is a list; a job has `folder`, `prompts` (lists of token ids), `tokens`, `temperature`, and optionally `draft`
(`model`, `num_speculative_tokens`, `draft_sample_method`). An answer has, for each prompt, `tokens`, `logprobs`, and
`steps`: how many tokens each step of the engine added, which is one more than the accepted drafts.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def repair_temperatures() -> None:
    """vLLM 0.32.0 on a CPU divides the target's logits by memory that nothing wrote (vllm-project/vllm issue 55005).

    Its kernel that repeats a request's temperature for each drafted token writes into a copy. Greedy requests do not
    use it. Until that is mended, speculative sampling on a CPU is wrong, so the repetition is done here by torch.
    """
    from vllm.v1.sample import rejection_sampler

    def repeat(x: Any, ends: Any, total: int, replace_from: int = 0, replace_to: int = 0) -> Any:
        counts = ends.diff(prepend=ends.new_zeros(1)).long()
        return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts)

    rejection_sampler.expand_batch_to_tokens = repeat


def answer(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.sampling_params import RequestOutputKind

    draft = {"speculative_config": {"method": "draft_model", **job["draft"]}} if "draft" in job else {}
    arguments = EngineArgs(
        model=job["folder"],
        dtype="float32",
        max_model_len=job.get("length", 128),
        max_num_seqs=16,
        enforce_eager=True,
        gpu_memory_utilization=0.2,
        disable_log_stats=True,
        enable_prefix_caching=False,
        **draft,
    )
    engine = LLMEngine.from_engine_args(arguments)
    for n, prompt in enumerate(job["prompts"]):
        parameters = SamplingParams(
            temperature=job["temperature"],
            max_tokens=job["tokens"],
            ignore_eos=True,
            logprobs=0,
            output_kind=RequestOutputKind.DELTA,
            detokenize=False,
        )
        engine.add_request(str(n), {"prompt_token_ids": prompt}, parameters)
    found: list[dict[str, list]] = [{"tokens": [], "logprobs": [], "steps": []} for _ in job["prompts"]]
    while engine.has_unfinished_requests():
        for output in engine.step():
            mine, new = found[int(output.request_id)], output.outputs[0]
            mine["tokens"] += new.token_ids
            mine["logprobs"] += [each[t].logprob for t, each in zip(new.token_ids, new.logprobs or [])]
            mine["steps"].append(len(new.token_ids))
    del engine
    cleanup_dist_env_and_memory()
    return {"prompts": found}


if __name__ == "__main__":
    with open(sys.argv[1]) as f:
        jobs = json.load(f)
    repair_temperatures()
    answers = []
    for each in jobs:
        try:
            answers.append(answer(each))
        except (RuntimeError, ValueError) as error:  # a folder that was refused
            answers.append({"refused": str(error)})
    with open(sys.argv[2], "w") as f:
        json.dump(answers, f)
