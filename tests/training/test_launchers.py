"""Which launcher started a process, and the name of its default folder: a table of environments, without a cluster."""

from __future__ import annotations

import os
import sys

import pytest

from bottleneck.core import default_folder as folders
from bottleneck.core.default_folder import default_folder
from bottleneck.core.errors import UserError
from bottleneck.training.cluster import check_world, cluster_environment, forget_leftovers, global_rank, threads

JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "gpu[3-4]", "SLURM_CPUS_ON_NODE": "8"}
BATCH = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
TASK = JOB | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NODELIST": "gpu3",
}
PTY = JOB | {"SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
HAND = {"LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "NODE_RANK": "0"}


@pytest.fixture
def environ(monkeypatch):
    """Set the variables of a case, without those of the machine that runs the tests."""

    def use(variables: dict[str, str]) -> None:
        for name in list(os.environ):
            if name.startswith(("SLURM_", "TORCHELASTIC_", "LSB_", "OMPI_", "MASTER_")) or name in (
                "LOCAL_RANK",
                "RANK",
            ):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.mark.parametrize(
    "variables, kind, rank",
    [
        ({}, None, 0),
        (TASK, "SrunEnvironment", 1),
        (TASK | {"SLURM_JOB_NAME": "interactive"}, "SrunEnvironment", 1),  # srun inside salloc
        (TASK | {"SLURM_JOB_NAME": "bash"}, "SrunEnvironment", 1),
        (TASK | {"SLURM_NTASKS_PER_NODE": "2"}, "SrunEnvironment", 1),
        (TASK | {"SLURM_STEP_NUM_TASKS": ""}, "SrunEnvironment", 1),  # older Slurm: SLURM_NTASKS is the step's
        (PTY, None, 0),  # srun --pty bash, under any job name
        (PTY | {"SLURM_JOB_NAME": "mine"}, None, 0),
        (JOB | {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "interactive"}, None, 0),  # the shell of salloc
        (BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_STEP_NUM_TASKS": "2"}, None, 0),  # its interactive step
        (BATCH | {"SLURM_NTASKS": "2"}, None, 0),  # sbatch without srun
        ({"LOCAL_RANK": "1"}, None, 0),  # left over from another program
        ({"LOCAL_RANK": "1", "MASTER_PORT": "1"}, None, 0),
        (HAND, "LightningEnvironment", 0),
    ],
)
def test_who_started_a_process(environ, variables, kind, rank):
    environ(variables)
    found = cluster_environment()
    assert (type(found).__name__ if found else None) == kind
    assert global_rank() == rank


def test_tasks_of_a_step_find_each_other(environ):
    """The number of tasks is the step's, not the allocation's; other steps of the job use another port."""
    environ(TASK | {"SLURM_NTASKS": "2", "SLURM_NNODES": "2"})
    found = cluster_environment()
    assert (found.world_size(), found.local_rank(), found.node_rank()) == (2, 1, 0)
    found.validate_settings(num_devices=2, num_nodes=1)
    address, port = found.main_address, found.main_port
    environ(TASK | {"SLURM_STEP_ID": "1"})
    assert address == "gpu3" and cluster_environment().main_port != port


@pytest.mark.parametrize(
    "variables, devices, nodes, words",
    [
        (TASK, 2, 1, None),
        (TASK, 1, 2, None),
        (TASK, 1, 1, "2 processes were started .SrunEnvironment.; the product of both must equal it"),
        (PTY, 2, 1, None),  # it starts two processes itself
        (BATCH | {"SLURM_NTASKS": "2"}, 1, 1, None),
        (BATCH | {"SLURM_NTASKS": "2"}, 2, 1, "has 2 tasks, and this process is none of them; start with srun"),
        (JOB | {"SLURM_JOB_NUM_NODES": "2"}, 2, 2, "start with srun"),
        (BATCH | {"SLURM_NTASKS": "1"}, 2, 1, None),
        ({}, 2, 1, None),
        ({"LOCAL_RANK": "1"}, 2, 1, None),
    ],
)
def test_the_wrong_number_of_processes_is_refused(environ, variables, devices, nodes, words):
    environ(variables)
    if words is None:
        check_world(devices, nodes)
    else:
        with pytest.raises(UserError, match=words):
            check_world(devices, nodes)


def test_a_leftover_local_rank_does_not_silence_a_run(environ, capsys, caplog):
    """Lightning reads it on import, and would then let this process write no files.

    The message goes to the terminal only: a refused command must not change the log in a finished run's folder.
    """
    from pytorch_lightning.utilities import rank_zero_only

    environ({"LOCAL_RANK": "1"})
    rank_zero_only.rank = 1
    with caplog.at_level("INFO"):
        forget_leftovers()
    assert rank_zero_only.rank == 0 and "LOCAL_RANK" not in os.environ
    assert "LOCAL_RANK=1: ignored" in capsys.readouterr().err and not caplog.records


def test_threads_of_a_process(environ, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    environ({})
    assert threads(4) == 4 and threads(32) == 1
    environ(PTY | {"SLURM_CPUS_PER_TASK": "8"})
    assert threads(4) == 4  # one task starts four processes, which share its cores
    environ(TASK | {"SLURM_CPUS_PER_TASK": "8"})
    assert threads(4) == 8  # what the task was given, not to be shared once more


def test_the_default_folder_belongs_to_one_run(environ, monkeypatch, tmp_path):
    """Once, two runs in one Slurm allocation, in parallel steps or in the same second shared a folder, and the second
    overwrote the first.
    """
    monkeypatch.chdir(tmp_path)

    def name(variables, *argv):
        environ(variables)
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        return default_folder("outputs")

    one = name(TASK, "ranks=8")
    assert one == name(TASK | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "ranks=8")  # the processes of one run
    assert one.startswith("slurm-77-")
    others = [
        name(TASK | {"SLURM_STEP_ID": "1"}, "ranks=8"),
        name(TASK, "ranks=16"),
        name(BATCH, "ranks=8"),
        name(BATCH, "ranks=16"),
        name(TASK | {"SLURM_JOB_ID": "78"}, "ranks=8"),
    ]
    assert len({one, *others}) == 6
    again = {"SLURM_RESTART_COUNT": "1"}
    assert name(BATCH | again, "ranks=8", "ckpt_path=last") == others[2]
    assert name(TASK | again, "ranks=8") == one
    (tmp_path / "outputs" / one).mkdir(parents=True)
    assert name(TASK | again | {"SLURM_STEP_ID": "1"}, "ranks=8") == one  # the steps started in another order
    assert name({"TORCHELASTIC_RUN_ID": "x"}) == "torchrun-x"
    assert name({"TORCHELASTIC_RUN_ID": "none"}) == name({"TORCHELASTIC_RUN_ID": "none"})
    first = name({})
    assert first == name({})  # Hydra asks several times
    folders._digits.cache_clear()  # as in another process in the same second
    assert first != name({}) and len(name({}).split("/")) == 2
