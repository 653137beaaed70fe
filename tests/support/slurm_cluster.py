"""A real Slurm of one node on this machine: Debian's slurm-wlm and munge, started in a folder and torn down again."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Iterator

CPUS = 4  # CPUs that Slurm is configured with, whatever the machine has
DAEMONS = ("munged", "slurmctld", "slurmd")


def install() -> None:
    """Install Debian's packages if they are missing. Raises RuntimeError if that is not possible."""
    if all(shutil.which(d) for d in DAEMONS):
        return
    if os.geteuid() or not shutil.which("apt-get"):
        raise RuntimeError("Slurm's tests need Debian's packages slurm-wlm and munge")
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=env, stdout=subprocess.DEVNULL)
    subprocess.run(
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "slurm-wlm", "munge"],
        check=True,
        env=env,
        stdout=subprocess.DEVNULL,
    )


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Cluster:
    """Commands against the cluster in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = dict(os.environ, SLURM_CONF=str(folder / "slurm.conf"))
        self.started: list[subprocess.Popen] = []

    def start(self) -> None:
        host, f = socket.gethostname().split(".")[0], self.folder
        for name in ("state", "spool"):
            (f / name).mkdir()
        (f / "munge.key").write_bytes(secrets.token_bytes(128))
        (f / "munge.key").chmod(0o400)
        (f / "slurm.conf").write_text(
            f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={f}/munge.sock
SlurmctldPort={_port()}
SlurmdPort={_port()}
StateSaveLocation={f}/state
SlurmdSpoolDir={f}/spool
SlurmctldPidFile={f}/slurmctld.pid
SlurmdPidFile={f}/slurmd.pid
SlurmctldLogFile={f}/slurmctld.log
SlurmdLogFile={f}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=30
MessageTimeout=20
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={CPUS} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
        )
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--socket={f}/munge.sock",
            f"--key-file={f}/munge.key",
            f"--pid-file={f}/munge.pid",
            f"--seed-file={f}/munge.seed",
            f"--log-file={f}/munge.log",
        )
        self.until(lambda: (f / "munge.sock").exists(), 10, "munged does not start")
        self._daemon("slurmctld", "-D", "-f", str(f / "slurm.conf"))
        self.slurmd()

    def slurmd(self) -> subprocess.Popen:
        """Start the node's daemon and wait for the node."""
        found = self._daemon("slurmd", "-D", "-f", str(self.folder / "slurm.conf"))
        self.until(
            lambda: self.run("sinfo", "-h", "-o", "%T").strip() in ("idle", "mixed", "allocated"),
            60,
            "the node does not come up",
        )
        return found

    def _daemon(self, *command: str) -> subprocess.Popen:
        with open(self.folder / f"{command[0]}.out", "ab") as out:
            self.started.append(subprocess.Popen(command, env=self.env, stdout=out, stderr=out, start_new_session=True))
        return self.started[-1]

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Output of a Slurm command; "" where it failed."""
        return subprocess.run(command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=60).stdout

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED …"""
        words = dict(w.split("=", 1) for w in self.run("scontrol", "show", "job", job, "-o").split() if "=" in w)
        return words.get("JobState", "")

    def hurry(self, job: str) -> None:
        """Start a requeued job at once; Slurm would wait for two minutes."""
        self.until(lambda: self.state(job) == "PENDING", 90, f"job {job} is not back in the queue")
        # slurmd refuses a job that begins in the second in which it ended ("already killed, do not launch batch job")
        time.sleep(3)
        self.until(
            lambda: (
                self.run("scontrol", "update", f"jobid={job}", "starttime=now") is not None
                and self.state(job) == "RUNNING"
            ),
            90,
            f"job {job} does not start again",
        )

    def until(self, condition, seconds: float, words: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(f"{p.name}: {p.read_text()[-1500:]}" for p in self.folder.glob("*.log"))
                raise AssertionError(f"{words}\n{logs}")
            time.sleep(0.3)

    def stop(self) -> None:
        self.run("scancel", "--user=root")
        for process in reversed(self.started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A running cluster whose files are in `folder`."""
    install()
    found = Cluster(folder)
    try:
        found.start()
        yield found
    finally:
        found.stop()
