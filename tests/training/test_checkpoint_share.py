"""How often a run writes checkpoints: as told, or so that they take at most a share of its time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bottleneck.training import checkpoint
from conftest import composed


class Clock:
    """A trainer whose steps and checkpoints take the seconds given, and the clock that sees them."""

    def __init__(self, step: float, save: float, steps: int):
        self.now, self.seconds, self.saved = 0.0, (step, save), []
        self.global_step, self.max_steps = 0, steps
        self.strategy = SimpleNamespace(broadcast=lambda value: value)

    def save_checkpoint(self, path: object) -> None:
        self.now += self.seconds[1]
        self.saved.append(self.global_step)

    def run(self, callback: checkpoint.SaveLast, batches: int = 1) -> list[int]:
        """Steps after which a checkpoint was written. Args: batches: calls of the callback for each step."""
        while self.global_step < self.max_steps:
            self.now += self.seconds[0]
            self.global_step += 1
            for _ in range(batches):
                callback.on_train_batch_end(self, None)
        return self.saved


@pytest.fixture
def made(tmp_path, monkeypatch):
    def make(every, **times):
        clock = Clock(**times)
        monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock.now)
        return clock, checkpoint.SaveLast(tmp_path, every)

    return make


def test_a_number_is_kept_to_however_long_a_checkpoint_takes(made):
    clock, callback = made(5, step=1.0, save=100.0, steps=23)
    assert clock.run(callback, batches=2) == [5, 10, 15, 20, 23]


def test_auto_keeps_to_its_steps_where_checkpoints_are_quick(made):
    clock, callback = made("auto", step=1.0, save=0.1, steps=240)
    assert clock.run(callback) == [50, 100, 150, 200, 240]


@pytest.mark.parametrize("save", [4.0, 11.0, 60.0])
def test_auto_takes_at_most_its_share_of_the_time(made, save):
    clock, callback = made("auto", step=0.26, save=save, steps=20_001)
    saved = clock.run(callback)
    assert len(saved) > 3 and saved[0] == 50 and saved[-1] == 20_001
    assert all(step % checkpoint.EVERY == 0 for step in saved[:-1])
    between = len(saved) - 2  # the first and the last are always written
    assert between * save <= checkpoint.SHARE * clock.now < (between + 1) * save + checkpoint.EVERY * 0.26 * between


def test_the_first_process_decides(made):
    """Saving is a common act: a process whose clock says otherwise follows."""
    clock, callback = made("auto", step=1.0, save=1000.0, steps=150)
    clock.strategy.broadcast = lambda value: clock.global_step == 150 or clock.global_step == 100
    assert clock.run(callback) == [100, 150]


def test_auto_is_the_default_and_a_number_is_read(made):
    from bottleneck.config.checks import check_config

    assert check_config(composed([])).trainer.checkpoint_every == "auto"
    assert check_config(composed(["trainer.checkpoint_every=100"])).trainer.checkpoint_every == 100
    assert check_config(composed(["trainer.checkpoint_every=null"])).trainer.checkpoint_every is None
