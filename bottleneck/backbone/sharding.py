"""A frozen backbone that one GPU cannot hold: sharded over the processes of a run, gathered layer by layer.

`fsdp` is PyTorch's FSDP2, `zero3` DeepSpeed's ZeRO stage 3. Both handle parameters that never have a gradient. Neither
handles the heads, which stay whole on every process and are reduced by DDP. Process 0 reads the weights into its own
memory (from the Hub, a folder or a GGUF file) and broadcasts them part by part, so that a GPU never holds more than its
share and one layer. Prefer `fsdp`: it is part of PyTorch, compiles nothing, and gathers by layer, whereas
ZeRO-3 runs Python hooks around every module. The backbone's original head stays whole on every process: the reference
loss and the closed-form starts need all of it.

A forward pass is collective: every process must call it equally often; see `even`.
"""

from __future__ import annotations

import datetime
import importlib.util
import logging
import os
import warnings
from typing import Any, Callable, Iterable, Iterator, Optional

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import Strategy
from torch import Tensor, nn

from bottleneck.backbone.load import check_no_export
from bottleneck.backbone.model import Backbone, empty_model, label, load_model
from bottleneck.backbone.weights import (
    body_of,
    check_numbers,
    hash_weights,
    layers_of,
    materialise,
    randoms,
    shape_hash,
    units,
    untie,
)
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.errors import UserError, check

log = logging.getLogger(__name__)
IGNORE = -100  # target that does not count
LOADING = datetime.timedelta(hours=6)  # the other processes wait for process 0, which may have to download first


def connect(strategy: Strategy) -> None:
    """Join the process group before the backbone is loaded; Lightning itself joins only when it fits."""
    cluster = getattr(strategy, "cluster_environment", None)
    outside = cluster is not None and cluster.creates_processes_externally
    check(
        outside,
        "trainer.shard: all processes must start before the backbone is loaded; start train.py, torchrun or srun",
    )
    strategy.setup_environment()


def deepspeed(device: torch.device) -> Any:
    """The DeepSpeed package, prepared for a device. Raises UserError if it is not installed."""
    found = importlib.util.find_spec("deepspeed") is not None
    check(found, "trainer.shard: DeepSpeed is not installed: pip install -e '.[deepspeed]'")
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # srun does not set it
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated.*")
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # None of its compiled parts is used. Without this entry it would probe for a compiler, and on a CPU build its own
    # collectives for a minute.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})
    return deepspeed


def load(cfg: BackboneConfig, mode: str, device: torch.device, *, block_size: Optional[int] = None) -> Backbone:
    """Load a backbone, sharded over all processes (a collective call), and prove that its hidden states are right.

    Args:
        mode: "fsdp" or "zero3".
        device: of this process.
        block_size: see `Backbone`.
    Raises: UserError in every process, as `Backbone.load`; and if a family does not name its layers.
    """
    model, identity = _announce(cfg, device)
    check(
        bool(layers_of(body_of(model))),
        f"backbone {label(cfg)}: family {model.config.model_type} does not name its layers, it cannot be sharded",
    )
    dtypes = sorted({str(p.dtype) for p in model.parameters()})
    check(
        len(dtypes) == 1,
        f"backbone {label(cfg)}: its weights are {' and '.join(dtypes)}, which cannot be sharded; "
        "give backbone.dtype=float32",
    )
    make: Callable[[nn.Parameter], Tensor]
    make = randoms(model, device) if cfg.weights == "random" else lambda old: _everywhere(old, device)
    elements = sum(p.numel() for p in body_of(model).parameters())
    untie(model)  # the head stays whole, the embeddings do not
    shard, finish = (_fsdp if mode == "fsdp" else _zero3)(device, next(model.parameters()).dtype, elements)
    for unit, modules in units(model):
        materialise(modules, make)
        if unit is not model:
            shard(unit)
    for module in model.modules():
        module._buffers.update({name: b.to(device) for name, b in module._buffers.items() if b is not None})
    engine = finish(body_of(model))
    backbone = Backbone(model, label(cfg), identity, block_size=block_size)
    check(
        backbone.body is not model,
        f"backbone {label(cfg)}: family {backbone.family} has no body that runs without its head, it cannot be sharded",
    )
    # DeepSpeed's hooks live as long as its engine; in a tuple the engine does not become a submodule
    backbone.engine = (engine,)
    log.info("%s: spread by %s, %.1f%% of its body in each process", label(cfg), mode, 100 * held(backbone) / elements)
    return backbone


def held(backbone: Backbone) -> int:
    """Elements of the body's parameters that this process keeps between forward passes."""
    return sum(_local(p).numel() for p in backbone.body.parameters())


def even(validation: Callable[[int, int], Any], width: int = 2) -> Callable[[int, int], Iterable]:
    """Equally many validation batches on every process: a process with fewer adds batches of tokens that do not count.

    Args: validation: (process, processes) -> batches with a length, of which process 0 has the most.
    """

    def batches(rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
        mine = validation(rank, world)
        yield from mine
        for _ in range(len(validation(0, world)) - len(mine)):
            yield torch.zeros(1, width, dtype=torch.long), torch.full((1, width), IGNORE)

    return batches


def _local(p: Tensor) -> Tensor:
    return p.to_local() if hasattr(p, "to_local") else getattr(p, "ds_tensor", p)


def _announce(cfg: BackboneConfig, device: torch.device) -> tuple[Any, str]:
    """The model, and the hash of its weights. Process 0 loads it; the others get it without weights (meta device)."""
    group = dist.new_group(backend="gloo", timeout=LOADING)
    model: Any = None
    about: dict[str, Any] = {}
    if dist.get_rank() == 0:
        try:
            model, about = _whole(cfg, device.type)
        except UserError as error:
            about = {"error": str(error)}
    message = [about]
    dist.broadcast_object_list(message, 0, group=group, device=torch.device("cpu"))
    dist.destroy_process_group(group)
    about = message[0]
    if "error" in about:
        raise UserError(about["error"])
    if model is None:
        model = empty_model(cfg, device.type, about["tied"])
        for name, buffer in about["buffers"].items():
            module, _, last = name.rpartition(".")
            model.get_submodule(module)._buffers[last] = buffer
    mine = _outline(model)
    check(
        mine == about["parameters"],
        f"backbone {label(cfg)}: its weights do not have the layout of its config, it cannot be sharded",
    )
    return model, about["hash"]


def _whole(cfg: BackboneConfig, device_type: str) -> tuple[Any, dict[str, Any]]:
    """The model and what the other processes must know about it."""
    if cfg.weights == "random":
        model = empty_model(cfg, device_type)
        randoms(model, torch.device("cpu"))  # fills the buffers
        identity = shape_hash(model)
    else:
        check_no_export(cfg)
        model = load_model(cfg, device_type)
        check_numbers(model, label(cfg))
        # under the names of `Backbone`: heads trained on the whole backbone can resume on the sharded one
        identity = hash_weights(nn.ModuleDict({"body": body_of(model), "lm_head": model.get_output_embeddings()}))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model, {
        "tied": tied,
        "hash": identity,
        "parameters": _outline(model),
        "buffers": dict(model.named_buffers()),
    }


def _outline(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, p.shape, p.dtype) for name, p in model.named_parameters()]


def _everywhere(old: Tensor, device: torch.device) -> Tensor:
    """Process 0's values, on every process; process 0 frees its own copy."""
    if old.is_meta:
        new = torch.empty(old.shape, dtype=old.dtype, device=device)
    else:
        new = old.detach().to(device, copy=True).contiguous()
        old.data = old.data.new_empty(0)
    dist.broadcast(new, 0)
    return new


Engine = tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any]]  # spreads one part; makes the whole body run


def _fsdp(device: torch.device, dtype: torch.dtype, elements: int) -> Engine:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # by default the root keeps its parameters whole for a backward pass, of which there is none
    return lambda part: fully_shard(part, mesh=mesh, reshard_after_forward=True), lambda body: None


def _zero3(device: torch.device, dtype: torch.dtype, elements: int) -> Engine:
    ds = deepspeed(device)
    zero = {
        "stage": 3,
        "memory_efficient_linear": False,  # is for backward passes, and replaces torch's own function globally
        "stage3_param_persistence_threshold": min(100_000, elements // 1000),  # norms and biases stay whole
    }
    half = {torch.bfloat16: {"bf16": {"enabled": True}}, torch.float16: {"fp16": {"enabled": True}}}.get(dtype, {})
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **half}
    return lambda part: ds.zero.Init(module=part, config_dict_or_path=config), lambda body: ds.initialize(
        model=body, config=config
    )[0]
