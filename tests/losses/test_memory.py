"""head.loss_memory: what auto gives on a card, and that the bytes reach the loss and the checkpoint."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bottleneck.heads.bank import HeadBank, HeadKey
from bottleneck.losses import memory

CARD = torch.device("cuda:0")
GIB = 1 << 30


@pytest.fixture
def card(monkeypatch):
    """Pretends that there is a GPU with so many GiB in all and free."""

    def set_to(total: float, free: float, cached: float = 0.0) -> None:
        memory.of_card.cache_clear()
        about = SimpleNamespace(total_memory=int(total * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * GIB), about.total_memory))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(cached * GIB))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)

    yield set_to
    memory.of_card.cache_clear()


@pytest.mark.parametrize(
    "total, free, cached, mib",
    [
        (80, 70, 0, 2560),  # one part in 32
        (80, 10.1, 0, 2560),  # a few heads more or less change nothing
        (80, 4.0, 0, 640),  # halved until a quarter of what is free holds it
        (80, 0.1, 4.0, 640),  # what torch holds for itself is free, too
        (80, 0.0, 0, 256),  # never below
        (8, 7, 0, 256),
    ],
)
def test_auto_is_a_share_of_the_card(card, total, free, cached, mib):
    card(total, free, cached)
    assert memory.decide(CARD, "auto") == mib << 20
    assert memory.decide(CARD, 12345) == 12345


def test_a_cpu_has_chunks_of_its_own():
    assert memory.decide(torch.device("cpu"), "auto") == 0


def test_a_bank_hands_its_memory_to_every_head():
    bank = HeadBank([HeadKey(2, 0.1, 0), HeadKey(3, 0.1, 0)], 7, 5, "chunked")
    assert [w.memory for w in bank.cast(torch.float32)] == [0, 0]
    bank.memory = 1 << 30
    assert [w.memory for w in bank.cast(torch.float32)] == [1 << 30] * 2
