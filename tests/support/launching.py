"""Start real jobs with the real launchers, and always end all their processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
TRAIN_PRIOR = str(ROOT / "launchers" / "train_prior.sh")
QUICK_START = ROOT / "tests" / "launched" / "sitecustomize.py"
RANKS = QUICK_START.with_name("ranks.py")
TINY = ["--recipe", str(ROOT / "launchers" / "recipes" / "tiny.yaml")]


def words(*settings: str) -> list[str]:
    """Returns the words of a command line for KEY=VALUE settings. Of settings with the same key, the last is used."""
    last = {setting.partition("=")[0]: setting for setting in settings}
    return [word for setting in last.values() for word in ("--set", setting)]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns a job's environment: this Python's launchers first on the PATH, without variables of a surrounding job."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    env["DS_ACCELERATOR"], env["CUDA_VISIBLE_DEVICES"] = "cpu", ""  # even on a machine with GPUs
    env["PYTHONPATH"] = f"{ROOT}:{QUICK_START.parent}"
    return {**env, **(extra or {})}


def deepspeed(n_ranks: int | None = 2) -> list[str]:
    """Returns the deepspeed launcher's command with a free port, so that tests can run in parallel with other jobs."""
    ranks = [] if n_ranks is None else ["--num_gpus", str(n_ranks)]
    return ["deepspeed", *ranks, "--master_port", str(free_port())]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(
    command: list[str], cwd: Path, extra_env: Mapping[str, str] | None = None, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and capture its output."""
    with started(command, cwd, extra_env) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run_ranks(n_ranks: int, script: Path, *arguments: str, cwd: Path, extra_env: Mapping[str, str] | None = None) -> None:
    """Run a script on several ranks without a launcher: a launcher takes as long to start as the ranks."""
    job = {**(extra_env or {}), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = run([sys.executable, str(RANKS), str(n_ranks), str(script), *arguments], cwd, job)
    assert done.returncode == 0, done.stderr[-4000:]


@contextmanager
def started(command: list[str], cwd: Path, extra_env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Start a job in its own session. At the end of the context, all its processes are killed."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(extra_env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    tree: set[psutil.Process] = set()
    try:
        yield process
    finally:
        tree |= family(process.pid)
        for member in tree:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait(timeout=30)


def family(pid: int) -> set[psutil.Process]:
    """Returns all processes of the session that `pid` leads, including orphans, and their descendants in other sessions."""
    found = set()
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == pid:
                found |= {process, *process.children(recursive=True)}
        except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            continue
    return found


def ranks_of(pid: int) -> dict[int, psutil.Process]:
    """Returns the training processes by rank, without launchers and without the processes that ranks started."""
    found = {}
    for process in family(pid):
        with suppress(psutil.Error):
            if "-u" in process.cmdline() and "RANK" in process.environ():
                found[int(process.environ()["RANK"])] = process
    return found


def wait_for(condition: Any, what: str, timeout: float = 120, process: subprocess.Popen[str] | None = None) -> None:
    """Poll until `condition()` is true. If `process` ends first, fail with its output."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process is not None and process.poll() is not None:
            out, err = process.communicate()
            raise AssertionError(f"ended with {process.returncode} before {what}:\n{out[-2000:]}\n{err[-4000:]}")
        assert time.monotonic() < deadline, f"no {what} within {timeout} s"
        time.sleep(0.05)


def kill_tree(pid: int, number: int = signal.SIGKILL) -> None:
    for member in family(pid):
        try:
            member.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def last_json(text: str) -> dict[str, Any]:
    """Returns the summary, the last JSON line of stdout with --json. The deepspeed launcher may log more lines after it."""
    return json.loads([line for line in text.splitlines() if line.startswith("{")][-1])
