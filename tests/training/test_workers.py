"""Workers of a run of several processes end with it: within seconds of a signal, at any moment, and when the agent is
killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bottleneck.training.elastic import WORKERS
from conftest import ROOT


def start(folder: Path, *wrapper: str) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k != "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    script = str(ROOT / "tests" / "support" / "two_workers.py")
    return subprocess.Popen(
        [*wrapper, sys.executable, script, str(folder)],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def at_work(folder: Path) -> bool:
    return all((folder / f"at-{rank}").exists() for rank in (0, 1))


def spawned(run: subprocess.Popen) -> list[psutil.Process]:
    """The two workers, without Python's resource tracker, perhaps still importing."""
    children = psutil.Process(run.pid).children(recursive=True)
    return [p for p in children if "spawn_main" in " ".join(p.cmdline())]


def semaphores(run: subprocess.Popen) -> set[str]:
    """Files of the semaphores that a process has open. They are mapped under another name: the C library renames them.

    Tests that run beside this one have semaphores too.
    """
    maps = Path(f"/proc/{run.pid}/maps").read_text().splitlines()
    inodes = {int(line.split()[4]) for line in maps if "/dev/shm/sem." in line}
    return {e.path for e in os.scandir("/dev/shm") if e.name.startswith("sem.mp-") and e.inode() in inodes}


def assert_nothing_left(folder: Path, processes: list[psutil.Process]) -> None:
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes), 30)
    assert not list(folder.glob(f"{WORKERS}*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_run_does_not_wait_for_torchs_timeout(tmp_path, number):
    """Once, workers waited 60 s for an agent that never collects their results: SIGTERM took 61 s, although the
    checkpoint was written after 0.01 s. Preemption allows 30 s.
    """
    run = start(tmp_path)
    until(lambda: at_work(tmp_path))
    workers = spawned(run)
    began = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(run.pid, number)  # a terminal sends Ctrl-C to all
    else:
        run.send_signal(number)
    _, error = run.communicate(timeout=100)
    assert run.returncode == 128 + number and error == f"stopped by {signal.Signals(number).name}\n", error
    assert time.monotonic() - began < 30
    assert_nothing_left(tmp_path, workers)


def test_ctrl_c_while_workers_start_is_one_line(tmp_path):
    """Once, each worker printed a traceback of its imports, 20 to 176 lines."""
    run = start(tmp_path)
    until(lambda: len(spawned(run)) == 2)
    workers = spawned(run)
    os.killpg(run.pid, signal.SIGINT)
    _, error = run.communicate(timeout=100)
    assert run.returncode == 130 and error == "stopped by SIGINT\n", error
    assert not at_work(tmp_path)
    assert_nothing_left(tmp_path, workers)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting", pytest.param("at work", marks=pytest.mark.slow)])
def test_workers_of_a_killed_agent_end(tmp_path, moment):
    """Once, they stayed in init_process_group for over 18 minutes and held the folder's lock and nine semaphores."""
    run = start(tmp_path)
    until(lambda: len(spawned(run)) == 2)
    if moment == "at work":
        until(lambda: at_work(tmp_path))
    family, held = psutil.Process(run.pid).children(recursive=True), semaphores(run)
    assert held
    run.kill()
    run.wait()
    assert_nothing_left(tmp_path, family)
    until(lambda: not any(map(os.path.exists, held)), 10)


@pytest.mark.slow
def test_a_closed_terminal_ends_workers_and_nohup_does_not(tmp_path):
    run = start(tmp_path, "nohup")
    until(lambda: at_work(tmp_path))
    os.killpg(run.pid, signal.SIGHUP)
    time.sleep(3)
    assert run.poll() is None and len(spawned(run)) == 2
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 128 + signal.SIGTERM
    (tmp_path / "other").mkdir()
    run = start(tmp_path / "other")
    until(lambda: at_work(tmp_path / "other"))
    os.killpg(run.pid, signal.SIGHUP)
    assert run.wait(60) == 128 + signal.SIGHUP
