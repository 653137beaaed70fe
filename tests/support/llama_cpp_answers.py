"""Run by the Python of `make llama-cpp`: convert a dense export with llama.cpp's converter, and continue prompts.

    .venv/llama-cpp/bin/python llama_cpp_answers.py FOLDER PROMPTS.json ANSWERS.json

PROMPTS.json is a list of lists of token ids. An answer is the most likely next token and its log-probability, or null:
the server leaves out tokens that end within a character.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

SOURCE = Path(sys.prefix) / "llama.cpp"


def convert(folder: str, to: str) -> None:
    """Convert with float32 weights. The converter does not know the embedded tokenizer, which splits as GPT-2's."""
    sys.path[:0] = [str(SOURCE), str(SOURCE / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv[1:] = [folder, "--outfile", to, "--outtype", "f32"]
    convert_hf_to_gguf.main()


def answers(path: str, prompts: list[list[int]]) -> list[list | None]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 256, 1, 1
    parameters.warmup = False
    server = xllamacpp.Server(parameters)
    found = []
    for prompt in prompts:
        request = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "n_probs": 1, "ignore_eos": True}
        told = server.handle_completions(request)["choices"][0]["logprobs"]
        found.append([told["content"][0]["id"], told["content"][0]["logprob"]] if told and told["content"] else None)
    return found


if __name__ == "__main__":
    folder, prompts, out = sys.argv[1:]
    convert(folder, out + ".gguf")
    content = answers(out + ".gguf", json.loads(Path(prompts).read_text()))
    Path(out).write_text(json.dumps(content))
    os._exit(0)  # its threads may outlive the server
