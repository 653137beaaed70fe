"""A target over the toy's tokenizer, of another width and with rows of padding."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM


def make_target(backbone: Path, folder: Path) -> Path:
    """Writes the model into a new folder and returns it."""
    shutil.copytree(backbone, folder)
    config = GPTNeoXConfig.from_pretrained(backbone)
    config.hidden_size, config.intermediate_size, config.vocab_size = 48, 96, config.vocab_size + 64
    torch.manual_seed(5)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder
