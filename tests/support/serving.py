"""A vLLM server in its own process and venv, and requests to it over HTTP on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any, Iterator

from conftest import ROOT


def installed_as_plugin(folder: Path) -> Path:
    """A folder for PYTHONPATH that makes the checkout look installed: metadata with its entry points."""
    info = folder / "bottleneck-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bottleneck\nVersion: 0.1.0\n")
    import tomllib

    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    text = "".join(
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in points.items()
    )
    (info / "entry_points.txt").write_text(text)
    return folder


def _environment(plugin: Path) -> dict[str, str]:
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    settings |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    settings |= {"PYTHONPATH": os.pathsep.join((str(plugin), str(ROOT)))}
    return {k: v for k, v in {**os.environ, **settings}.items() if k != "TRITON_INTERPRET"}


def vllm_answers(python: str, jobs: list[dict], folder: Path, timeout: float = 840) -> list[dict]:
    """The answers of `vllm_answers.py` to its jobs. Raises AssertionError, with the end of the log, if it fails.

    Args: folder: an empty one to work in.
    """
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("vllm_answers.py")
    done = subprocess.run(
        [python, script, folder / "jobs.json", folder / "answers.json"],
        env=_environment(installed_as_plugin(folder / "plugin")),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads((folder / "answers.json").read_text())


@contextlib.contextmanager
def vllm_server(python: str, model: Path, plugin: Path, log: Path, timeout: float = 400) -> Iterator[int]:
    """Serve a folder on a free port. Raises AssertionError, with the end of the log, if it does not come up."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = _environment(plugin)
    words = ["--model", model, "--served-model-name", "m", "--host", "127.0.0.1", "--port", port, "--dtype", "float32"]
    words += ["--max-model-len", 128, "--enforce-eager", "--gpu-memory-utilization", 0.2, "--max-num-seqs", 4]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)]
    with open(log, "wb") as out:
        process = subprocess.Popen(command, env=env, cwd=log.parent, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + timeout
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(1)
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def ask(port: int, ids: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """The greedy continuation of a prompt of token ids, and the log-probability of each of its tokens."""
    body: dict[str, Any] = {"model": "m", "prompt": ids, "max_tokens": tokens, "temperature": 0, "logprobs": 1}
    body |= {"return_tokens_as_token_ids": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found = json.load(answer)["choices"][0]["logprobs"]
    return [int(t.removeprefix("token_id:")) for t in found["tokens"]], found["token_logprobs"]
