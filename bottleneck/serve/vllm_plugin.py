"""vLLM's side of `--form serve`: vLLM finds `register` by the entry point `vllm.general_plugins` of this package.

Every vLLM process imports this module, so it imports nothing but vLLM, and only inside the function.
"""

from __future__ import annotations


def register() -> None:
    """Register LowRank<Architecture> for every architecture that vLLM knows, lazily."""
    from vllm import ModelRegistry

    from bottleneck.serve.low_rank_head import PREFIX

    for architecture in list(ModelRegistry.get_supported_archs()):
        if not architecture.startswith(PREFIX):
            ModelRegistry.register_model(PREFIX + architecture, f"bottleneck.serve.vllm_models:{PREFIX}{architecture}")
