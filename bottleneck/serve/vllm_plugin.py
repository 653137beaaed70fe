"""vLLM's side of `--form serve`: vLLM finds `register` by the entry point `vllm.general_plugins` of this package.

Every vLLM process imports this module, so it imports nothing but vLLM, and only inside the functions.
"""

from __future__ import annotations

import os
from typing import Any


def register() -> None:
    """Register LowRank<Architecture> for every architecture that vLLM knows, lazily, with its changes of the config."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    from bottleneck.serve.low_rank_head import PREFIX

    for architecture in list(ModelRegistry.get_supported_archs()):
        if not architecture.startswith(PREFIX):
            name = PREFIX + architecture
            ModelRegistry.register_model(name, f"bottleneck.serve.vllm_models:{name}")
            MODELS_CONFIG_MAP[name] = _checked(MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig))


def _checked(base: type) -> type:
    """An architecture's changes of the config, after a check of the folder: before tokenizer and weights are read."""

    class Checked(base):  # type: ignore[misc, valid-type]  # the base is known at run time only
        @classmethod
        def verify_and_update_model_config(cls, model_config: Any) -> None:
            from bottleneck.serve.low_rank_head import check_folder

            if os.path.isdir(model_config.model):  # else a Hub name, whose files come later
                try:
                    check_folder(model_config.model, model_config.tokenizer)
                except ValueError as error:  # which pydantic would turn into three lines
                    raise RuntimeError(str(error)) from error
            super().verify_and_update_model_config(model_config)

    return Checked
