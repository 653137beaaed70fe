"""Runs of several processes: equal to one process, in any job of a multirun, also when killed, stopped or silent."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bottleneck.core.errors import LostPeers, UserError
from bottleneck.training.elastic import raise_first_failure
from bottleneck.training.processes import leave_at_once
from bottleneck.training.run_folder import LAST
from bottleneck.training.signals import Flag
from conftest import ROOT, assert_same_heads, command, heads_of, shell
from support.kills import differences, disturb, family, trains


def start(*overrides, **options) -> subprocess.Popen:
    env = dict(os.environ, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5", PYTHONUNBUFFERED="1", **options.pop("env", {}))
    return subprocess.Popen(
        command(*overrides), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def longer(toy) -> list[str]:
    """More steps than a second holds, of two processes."""
    return [*toy, "tokens=76800", "trainer.checkpoint_every=2", "trainer.devices=2", "trainer.log_every=1"]


@pytest.fixture(scope="module")
def whole(longer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = shell(*longer, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.slow
def test_any_number_of_processes_in_any_job_of_a_multirun(toy, tmp_path):
    """Each job has its own processes, batches and curve, and a failing job does not affect the others. Lightning and
    Hydra together do not give that.
    """
    sweep = tmp_path / "sweep"
    done = shell("-m", *toy, "trainer.devices=1,2,3,4,1", f"hydra.sweep.dir={sweep}", "trainer.log_every=1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "batch_size=8: must be a multiple of the 3 processes" in done.stderr and "1 of 5 jobs failed" in done.stderr
    # a refused job leaves no folder; the same heads four times are not one curve
    assert sorted(p.name for p in sweep.iterdir()) == ["0", "1", "3", "4", "multirun.yaml"]
    assert "the jobs' curves are not merged" in done.stdout
    curves = [json.loads((sweep / n / "curve.json").read_text()) for n in "0134"]
    for other in curves[1:]:
        assert other["validation_tokens"] == curves[0]["validation_tokens"]
        for a, b in zip(curves[0]["heads"], other["heads"]):
            assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["initial_loss"] - b["initial_loss"]) < 1e-5
    for number in "0134":  # each step once, from all the batch
        rows = [
            r.split(",") for r in (sweep / number / "metrics.csv").read_text().splitlines()[1:] if "train/loss,r2_" in r
        ]
        assert [int(r[0]) for r in rows] == list(range(1, 21)) and int(rows[-1][1]) == 10240
    assert_same_heads(heads_of(sweep / "0"), heads_of(sweep / "4"))
    left = subprocess.run(["pgrep", "-f", str(sweep)], capture_output=True, text=True).stdout.split()
    assert not left


@pytest.mark.slow
def test_a_killed_process_is_named_and_nothing_is_lost(longer, whole, tmp_path):
    run = start(*longer, f"hydra.run.dir={tmp_path / 'cut'}")
    wait_for(tmp_path / "cut" / LAST, run)
    onlooker, *workers = [p for p in family(run.pid) if trains(p)]
    assert onlooker == run.pid and len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 2 and error.strip().count("\n") == 0, error
    line = error.strip()
    assert f"of 2 (pid {workers[1]}) was killed by SIGKILL" in line and "ckpt_path=last" in line
    assert not any(Path(f"/proc/{p}").exists() for p in workers)
    assert shell(*longer, "ckpt_path=last", f"hydra.run.dir={tmp_path / 'cut'}").returncode == 0
    assert differences(whole, tmp_path / "cut") == []


@pytest.mark.slow
@pytest.mark.parametrize("number, to_all", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_stopped_run_saves_its_last_step_and_resumes(longer, whole, tmp_path, number, to_all):
    """SIGTERM to the process that was started; Ctrl-C, which a terminal sends to all."""
    run = start(*longer, "trainer.checkpoint_every=1000", f"hydra.run.dir={tmp_path / 'cut'}", start_new_session=True)
    metrics = tmp_path / "cut" / "metrics.csv"
    wait_for(metrics, run)
    while ",train/loss,r8" not in metrics.read_text():
        time.sleep(0.02)
    os.killpg(run.pid, number) if to_all else run.send_signal(number)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 128 + number, error
    assert f"stopped by {number.name}" in error and len(error.strip().splitlines()) == 1
    step = torch.load(tmp_path / "cut" / LAST, weights_only=True)["global_step"]
    logged = {int(r.split(",")[0]) for r in metrics.read_text().splitlines()[1:] if "train/loss" in r}
    assert 0 < step < 150 and max(logged) == step  # no step is trained twice
    assert (
        shell(
            *longer, "trainer.checkpoint_every=1000", "ckpt_path=last", f"hydra.run.dir={tmp_path / 'cut'}"
        ).returncode
        == 0
    )
    assert differences(whole, tmp_path / "cut") == []


def test_a_signal_during_imports_is_kept(longer, tmp_path):
    """Slurm's USR1 right after the start: the run stops after its first step with a checkpoint and requeues its job."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ > {tmp_path}/asked\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    env = {"SLURM_JOB_ID": "77", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = start(*longer, "trainer.devices=1", f"hydra.run.dir={tmp_path / 'run'}", env=env)
    while (
        b"SigBlk" not in (status := Path(f"/proc/{run.pid}/status").read_bytes())
        or not int(status.split(b"SigBlk:")[1].split()[0], 16) & 1 << signal.SIGUSR1 - 1
    ):
        time.sleep(0.002)
    run.send_signal(signal.SIGUSR1)
    _, error = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGUSR1 and "stopped by SIGUSR1 after step 1" in error, error
    assert (tmp_path / "asked").read_text() == "requeue 77\n" and (tmp_path / "run" / LAST).exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [4])  # python tests/support/kills.py --kills 20 for more
def test_kills_at_random_moments(longer, whole, tmp_path, kills):
    assert disturb(longer, tmp_path / "cut", kills, seed=kills) == kills
    assert differences(whole, tmp_path / "cut") == []


@pytest.mark.slow
def test_a_silent_process_is_given_up_in_the_stated_time(longer, tmp_path):
    """After 6 seconds; torch's agent waits another 30 for the silent process, which does not react to SIGTERM."""
    run = start(*longer, "trainer.timeout_minutes=0.1", f"hydra.run.dir={tmp_path / 'run'}")
    wait_for(tmp_path / "run" / LAST, run)
    workers = [p for p in family(run.pid) if trains(p)][1:]
    os.kill(workers[1], signal.SIGSTOP)
    began = time.monotonic()
    _, error = run.communicate(timeout=100)
    assert run.returncode == 2 and time.monotonic() - began < 60, error
    assert error.strip().count("\n") == 0, error
    line = error.strip()
    assert "lost the others, or had no answer for 0.1 minutes (trainer.timeout_minutes)" in line
    assert not any(Path(f"/proc/{p}").exists() for p in workers)


@pytest.mark.slow
def test_a_full_disk_during_a_checkpoint(longer, whole, tmp_path):
    """With files limited to 40 kB the first checkpoint fails: one line, no partial file. Then the run succeeds."""

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    folder = tmp_path / "run"
    run = start(*longer, f"hydra.run.dir={folder}", preexec_fn=small)
    _, error = run.communicate(timeout=120)
    (line,) = error.strip().splitlines()
    assert run.returncode == 2 and "last.ckpt: cannot be written" in line
    assert not list(folder.rglob("*.part")) and not (folder / LAST).exists()
    assert shell(*longer, "ckpt_path=last", f"hydra.run.dir={folder}").returncode == 0
    assert differences(whole, folder) == []


@pytest.mark.parametrize("error, code", [(UserError("x"), 2), (RuntimeError("x"), 1), (KeyboardInterrupt(), 130)])
def test_after_a_failure_nccls_shutdown_is_skipped(monkeypatch, error, code):
    """The exit function is called before those that were registered earlier."""
    called, ended = [], []
    monkeypatch.setattr("atexit.register", called.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr("os._exit", ended.append)
    for backend in ("gloo", "nccl"):
        monkeypatch.setattr(torch.distributed, "get_backend", lambda backend=backend: backend)
        leave_at_once(error)
        assert len(called) == (backend == "nccl")
    called[0]()
    assert ended == [code]


def test_layers_are_compiled_for_the_share_of_a_process(run, monkeypatch):
    shapes = []
    monkeypatch.setattr(
        "bottleneck.backbone.model.Backbone.compile_layers", lambda self, shape: shapes.append(shape) or False
    )
    run("backbone.compile=true", "trainer.micro_batch_size=64")
    assert shapes == [(8, 64)]


def torchrun(*overrides, processes: int = 2, restarts: int = 0) -> subprocess.Popen:
    env = dict(os.environ, PYTHON=sys.executable, NPROC=str(processes), RESTARTS=str(restarts), PYTHONUNBUFFERED="1")
    run_dir = next(o.split("=", 1)[1] for o in overrides if o.startswith("RUN_DIR="))
    rest = [o for o in overrides if not o.startswith("RUN_DIR=")]
    return subprocess.Popen(
        [str(ROOT / "launch/torchrun.sh"), *rest],
        env=dict(env, RUN_DIR=run_dir),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_torchrun_restarts_the_group_from_the_last_checkpoint(longer, whole, tmp_path):
    run = torchrun(*longer, f"RUN_DIR={tmp_path / 'cut'}", restarts=1)
    wait_for(tmp_path / "cut" / LAST, run)
    workers = [p for p in family(run.pid) if trains(p) and p != run.pid]
    os.kill(workers[-1], signal.SIGKILL)
    out, error = run.communicate(timeout=200)
    assert run.returncode == 0, error[-3000:]
    assert "resuming from" in out and differences(whole, tmp_path / "cut") == []


@pytest.mark.slow
def test_a_world_of_another_size_is_refused(toy, tmp_path):
    """More processes than the config says: they would train the wrong batches."""
    run = torchrun(*toy, f"RUN_DIR={tmp_path / 'run'}", "trainer.devices=1")
    _, error = run.communicate(timeout=200)
    assert (
        run.returncode != 0
        and "error: trainer.devices=1, trainer.num_nodes=1: 2 processes were started (TorchElasticEnvironment)" in error
        and not (tmp_path / "run" / "heads").exists()
    )


def test_several_nodes_need_a_launcher(toy):
    done = shell(*toy, "trainer.num_nodes=2")
    assert done.returncode == 2 and "srun or torchrun" in done.stderr


def test_a_flag_is_what_any_process_has():
    flag = Flag()
    assert not flag.agreed()
    flag.listen((signal.SIGUSR1,))
    os.kill(os.getpid(), signal.SIGUSR1)
    assert flag.number == signal.SIGUSR1 and flag.agreed()
    flag.leave()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    flag.send(torch.tensor([0.0]))  # the sum at that step, before this process received its signal
    flag.send(torch.tensor([10.0]))
    assert not flag.agreed() and flag.agreed()


def test_on_a_gpu_flags_are_read_later_unless_steps_are_long():
    """Short steps do not wait for the sum of flags. Long steps do, so that the run stops before a time limit."""
    for passes, steps_later in ((1, 4), (2, 2), (4, 1), (5, 0), (16, 0)):
        flag = Flag()
        for step in range(1, 10):
            flag.send(torch.tensor([float(step == 1)]), passes)
            flag._sums[-1] = (flag._sums[-1][0], SimpleNamespace(synchronize=lambda: None))  # as if it were on a GPU
            if flag.agreed():
                break
        assert step == 1 + steps_later


@pytest.mark.parametrize(
    "exits, kind, words",
    [
        ([-signal.SIGABRT, -signal.SIGKILL], UserError, "process 1 of 2 (pid 11) was killed by SIGKILL"),
        (
            [-signal.SIGABRT, -signal.SIGABRT],
            LostPeers,
            "process 0 of 2 (pid 10) was ended by SIGABRT: it lost the others, or had no answer for 2.5 minutes",
        ),
    ],
)
def test_the_first_cause_is_reported(exits, kind, words):
    """NCCL's watchdog aborts the processes that wait for one that is gone."""
    failures = {i: SimpleNamespace(exitcode=e, pid=10 + i, message="", timestamp=i) for i, e in enumerate(exits)}
    with pytest.raises(kind) as caught:
        raise_first_failure(SimpleNamespace(failures=failures), 2, minutes=2.5, run_dir=Path("runs/one"))
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_gradients_sent_in_bfloat16(toy, tmp_path):
    """Half the bytes between processes: losses differ in the last digits, and all processes keep equal heads."""
    done = shell(
        "-m", *toy, "trainer.devices=2", "trainer.reduce_dtype=float32,bfloat16", f"hydra.sweep.dir={tmp_path}"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    whole, half = (json.loads((tmp_path / n / "curve.json").read_text()) for n in "01")
    gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(whole["heads"], half["heads"])]
    assert 1e-6 < max(gaps) < 2e-3, gaps


@pytest.mark.slow
def test_a_mixed_bank_on_two_processes_is_that_of_one(toy, tmp_path):
    """Every kind under DDP (gloo) and with sharded moments: the losses of one process to rounding, as many tokens."""
    kinds = (
        "{rank: 4}, {kind: mos, rank: 4, components: 2}, {kind: plif, rank: 4}, {kind: gated, rank: 4}, {kind: full}"
    )
    more = "{kind: low_rank_bias, rank: 4}, {kind: low_rank_sparse, rank: 4, rows: 9}, {kind: sigsoftmax, rank: 4}"
    last = "{kind: block, rank: 4, bands: [50]}, {kind: context_temperature, rank: 4}"
    words = [*toy, "tokens=5120", "data.validation_tokens=1000", "ranks=auto", f"heads=[{kinds}, {more}, {last}]"]
    ways = [["trainer.devices=1"], ["trainer.devices=2"]]
    if importlib.util.find_spec("deepspeed") is not None:
        ways.append(["trainer=deepspeed_zero2", "trainer.accelerator=cpu", "trainer.devices=2"])
    curves = []
    for i, way in enumerate(ways):
        done = shell(*words, *way, f"hydra.run.dir={tmp_path / str(i)}")
        assert done.returncode == 0, done.stderr[-2000:]
        curves.append(json.loads((tmp_path / str(i) / "curve.json").read_text()))
    for other in curves[1:]:
        assert len(other["heads"]) == 10 and other["validation_tokens"] == curves[0]["validation_tokens"]
        for a, b in zip(curves[0]["heads"], other["heads"]):
            assert (a.get("kind"), a["lr"]) == (b.get("kind"), b["lr"])
            assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["initial_loss"] - b["initial_loss"]) < 1e-5, a
            assert a["loss"] != a["initial_loss"]
