"""The private parts of torch and Lightning that the project uses still exist and behave as expected."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import socket

import pytest
import torch
import torch.distributed as dist

from bottleneck.training.fused_adamw import HeadAdamW
from bottleneck.training.lost_peers import lost_peers
from bottleneck.training.out_of_memory import out_of_memory


def test_lightning_leaves_signals_to_us(run):
    """The trainer has neither Lightning's signal handlers nor its query of all processes before each step."""
    from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
    from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector

    assert "_broadcast_sigterm_tensor" in inspect.getsource(_TrainingEpochLoop.advance)
    assert hasattr(_SignalConnector, "register_signal_handlers")
    trainer = run("tokens=512", "ranks=[2]").trainer
    assert "_broadcast_sigterm_tensor" in vars(trainer.fit_loop.epoch_loop)
    assert "register_signal_handlers" in vars(trainer._signal_connector)


def test_fused_adamw_reads_divisor_and_skip_flag_group_by_group():
    """Against plain AdamW on divided gradients; a flagged group keeps its values."""
    parameters = [torch.nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(i))) for i in range(3)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    options = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours = HeadAdamW([{"params": [p], "lr": 0.1} for p in parameters], torch.tensor([0.0, 1.0, 0.0]), **options)
    plain = torch.optim.AdamW([{"params": [p], "lr": 0.1} for p in twins], fused=True, **options)
    for step in range(3):
        ours.divisors = torch.tensor([1.0, 1.0, 4.0])
        for i, (p, twin) in enumerate(zip(parameters, twins)):
            p.grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * step + i))
            twin.grad = p.grad / (1.0, 1.0, 4.0)[i]
        before = parameters[1].detach().clone()
        ours.step()
        plain.step()
        assert torch.equal(parameters[1], before)
        assert torch.equal(parameters[0], twins[0]) and torch.equal(parameters[2], twins[2])


def test_exhausted_cpu_memory_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value) and out_of_memory(MemoryError()) and not out_of_memory(RuntimeError("x"))


def _peer(rank: int, port: int, queue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    dist.barrier()
    if rank:
        os._exit(1)
    try:
        for _ in range(100):
            dist.all_reduce(torch.ones(1000))
        queue.put(None)
    except RuntimeError as error:
        queue.put((str(error), lost_peers(error)))


def test_a_lost_gloo_peer_is_recognised():
    """The error that gloo raises when another process is gone must match."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_peer, args=(rank, port, queue)) for rank in range(2)]
    for w in workers:
        w.start()
    found = queue.get(timeout=60)
    for w in workers:
        w.join(10)
    assert found is not None and found[1], found
    assert not lost_peers(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
