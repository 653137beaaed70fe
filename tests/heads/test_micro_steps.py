"""Micro-steps that are recorded equal eager ones bit for bit; on a CPU with a recorder that runs the work again."""

from __future__ import annotations

import logging

import pytest
import torch

from bottleneck.heads.bank import HeadBank
from bottleneck.heads.key import HeadKey
from bottleneck.heads.micro_steps import MOVES, MicroSteps, record

V, D = 61, 16
CUDA = torch.cuda.is_available()


class Recorder:
    """Stands in for CUDA graphs: a recording reads and writes the same tensors each time it runs."""

    def __init__(self):
        self.recordings = self.runs = 0

    def __call__(self, work):
        self.recordings += 1
        gradients = [p.grad.clone() for p in self.bank.parameters()]
        result = work()
        for p, grad in zip(self.bank.parameters(), gradients):  # recording launches nothing
            p.grad.copy_(grad)

        def replay():
            self.runs += 1
            for old, new in zip(flat(result), flat(work())):
                old.copy_(new)

        return replay, result


def flat(result):
    return [result] if torch.is_tensor(result) else [t for read in result for t in read if torch.is_tensor(t)]


def bank_of(device="cpu", V=V, D=D, ranks=(2, 5)):
    bank = HeadBank([HeadKey(rank, 0.1, seed=0) for rank in ranks], V, D).to(device)
    g = torch.Generator().manual_seed(0)
    for p in bank.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g))
    return bank


def steps(bank, micro, batches, move_at=()):
    """Losses and gradients of optimizer steps by plain descent, each of several micro-batches."""
    seen = []
    for number, batch in enumerate(batches):
        bank.zero_gradients()
        if number in move_at:
            for p in bank.parameters():
                p.grad = p.grad.clone()
        micro.begin(batch[0][0].dtype)
        losses = torch.zeros(len(bank), dtype=torch.float64, device=batch[0][0].device)
        for h, y in batch:
            losses += micro(h, y, 0.125)
        seen += [losses, *(p.grad.clone() for p in bank.parameters())]
        with torch.no_grad():
            for p in bank.parameters():
                p -= 0.1 * p.grad
    return seen


def batches_of(sizes, dtype=torch.float32, device="cpu", V=V, D=D):
    g = torch.Generator().manual_seed(1)

    def batch(n):
        return torch.randn(n, D, generator=g).to(device, dtype), torch.randint(V, (n,), generator=g).to(device)

    return [[batch(n) for n in step] for step in sizes]


def test_recorded_steps_have_the_bits_of_eager_ones():
    """Shapes change, gradients move once, parameters change at every step: each is a way to read stale numbers."""
    sizes = [[8, 8], [8, 8], [8, 3], [8, 3], [8, 8]]
    eager, mine, recorder = bank_of(), bank_of(), Recorder()
    recorder.bank = mine
    want = steps(eager, MicroSteps(eager, recorded=False), batches_of(sizes))
    found = steps(mine, MicroSteps(mine, recorder=recorder), batches_of(sizes), move_at=(3,))
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))
    assert recorder.runs > 8 and recorder.recordings == 5  # two casts, two sizes, and one of them again


def test_what_cannot_be_recorded_runs_eagerly(caplog):
    bank = bank_of()
    want = steps(bank, MicroSteps(bank, recorded=False), batches_of([[8]] * 3))

    def refuse(work):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    mine = bank_of()
    with caplog.at_level(logging.INFO, logger="bottleneck"):
        found = steps(mine, MicroSteps(mine, recorder=refuse), batches_of([[8]] * 3))
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))
    assert [r.getMessage() for r in caplog.records] == [
        "head steps are issued one kernel at a time: operation not permitted"
    ]


def test_gradients_that_move_at_every_step_end_the_recording(caplog):
    mine, recorder = bank_of(), Recorder()
    recorder.bank = mine
    micro = MicroSteps(mine, recorder=recorder)
    with caplog.at_level(logging.INFO, logger="bottleneck"):
        steps(mine, micro, batches_of([[8]] * 8), move_at=range(8))
    assert not micro.recorded and recorder.recordings <= 2 * MOVES and len(caplog.records) == 1


def test_only_heads_that_launch_kernels_alone_are_recorded():
    assert MicroSteps(bank_of()).recorded  # until `begin` sees that this is a CPU
    mixed = HeadBank([HeadKey(2, 0.1, seed=0), HeadKey(2, 0.1, seed=0, kind="mos")], V, D)
    assert not MicroSteps(mixed).recorded
    bank = bank_of()
    micro = MicroSteps(bank)
    bank.zero_gradients()
    micro.begin(torch.float32)
    assert not micro.recorded


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU; the tests above cover the bookkeeping")
@pytest.mark.parametrize("ranks", [(8, 64, 200), (100, 300, 512)])
def test_graphs_have_the_bits_of_eager_steps(ranks):
    shape = {"V": 5003, "D": 512}
    sizes = [[1024, 1024], [1024, 1024, 512], [1024, 1024, 512]]
    batches = batches_of(sizes, torch.bfloat16, "cuda", **shape)
    eager, mine = bank_of("cuda", ranks=ranks, **shape), bank_of("cuda", ranks=ranks, **shape)
    want = steps(eager, MicroSteps(eager, recorded=False), batches)
    micro = MicroSteps(mine, recorder=record)
    found = steps(mine, micro, batches)
    assert micro.recorded and micro._recordings
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))
