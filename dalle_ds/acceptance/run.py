"""Run the steps: each in a process with a time limit, results written after each step, resumable after a stop."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil

import dalle_ds
from dalle_ds.acceptance.record import read_record
from dalle_ds.acceptance.table import REHEARSAL_SECONDS, STEPS, Step
from dalle_ds.console import progress
from dalle_ds.errors import ConfigError
from dalle_ds.storage.atomic import atomic_write

SUMMARY = "acceptance.json"
TAIL_LINES = 25
END_GRACE = 10.0
"""Seconds beyond its limit in which a step may print its stacks and exit by itself."""
WORTH_STARTING = 8.0
"""If fewer seconds of the whole run are left, no further step starts: Python and torch alone take most of this time."""

Outcome = Literal["ended", "failed", "crashed", "hung", "out of time"]
"""Outcome of a process. ended: it exited normally, also if rows are WRONG. failed: it raised. crashed: a signal killed it.
hung: it exceeded its own limit. out of time: the time of the whole run was over before the step started or while it ran."""


@dataclass
class StepResult:
    """Result of one step. If the outcome is not "ended", `tail` is the end of the step's output."""

    name: str
    settles: str
    outcome: Outcome
    seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    tail: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether the step ended and no row is WRONG. Rows that are off are correct, only slower or larger than expected."""
        return self.outcome == "ended" and all(row["verdict"] != "WRONG" for row in self.rows)


def accept(
    folder: Path,
    *,
    rehearse: bool = False,
    minutes: float = 10.0,
    names: Sequence[str] = (),
    again: Sequence[str] = (),
    steps: Sequence[Step] = STEPS,
) -> dict[str, Any]:
    """Run the steps that have not ended in `folder` yet. Returns the summary, which is also in `folder`/acceptance.json.

    Args:
        folder: output folder for acceptance.json and, per step, NAME.jsonl (its results) and NAME.log (its output).
        rehearse: run small sizes on the CPU, even if there is a GPU.
        minutes: time limit of all steps of this call together.
        names: names of the steps to run. If empty, all steps run.
        again: names of steps to repeat although they have ended, or "all" for all steps.

    Raises:
        ConfigError: a name is not the name of a step, or `folder` has results of another machine, torch version or mode, or its
            acceptance.json can't be read.
    """
    known = {step.name: step for step in steps}
    for name in (*names, *again):
        if name not in known and name != "all":
            raise ConfigError(f"there is no step {name!r}; the steps are {', '.join(known)}")
    folder.mkdir(parents=True, exist_ok=True)
    identity = {"host": platform.node(), "torch": _version("torch"), "rehearsal": rehearse}
    results = {} if "all" in again else _earlier(folder, identity)
    chosen = [step for step in steps if not names or "all" in names or step.name in names]
    due = [s for s in chosen if s.name in again or s.name not in results or results[s.name].outcome != "ended"]
    began, left = time.monotonic(), minutes * 60.0
    limits = {step.name: float(REHEARSAL_SECONDS if rehearse else step.seconds) for step in due}
    with progress(total=len(due), what="acceptance", unit="step") as bar:
        for number, step in enumerate(due):
            remaining = left - (time.monotonic() - began)
            latest = min(remaining, sum(limits[s.name] for s in due[number:]))
            results[step.name] = _run(step, folder, rehearse, limits[step.name], remaining, _Told(bar, step.name, latest))
            bar.update()
            _write(folder, identity, [results[s.name] for s in steps if s.name in results])
    return _write(folder, identity, [results[s.name] for s in steps if s.name in results])


class _Told:
    """Postfix of the progress bar: the running step, and an upper bound of the time left. The bar's own ETA assumes that all
    steps take the same time."""

    def __init__(self, bar: Any, name: str, latest: float) -> None:
        self._bar, self._name, self._end, self._next = bar, name, time.monotonic() + latest, 0.0
        self._every = 1.0 if sys.stderr.isatty() else 10.0

    def say(self) -> None:
        """Update the postfix: once per second on a terminal, every ten seconds in a log file."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._every
            self._bar.set_postfix_str(f"{self._name}, at most {max(0.0, self._end - now) / 60:.1f} min left")


def _run(step: Step, folder: Path, rehearse: bool, limit: float, left: float, told: _Told) -> StepResult:
    record, log = folder / f"{step.name}.jsonl", folder / f"{step.name}.log"
    record.unlink(missing_ok=True)
    if left < WORTH_STARTING:
        return StepResult(
            step.name, step.settles, "out of time", 0.0, tail=f"not started: {max(left, 0.0):.0f} s of the run were left"
        )
    command = [sys.executable, "-m", "dalle_ds.acceptance.child", step.module, str(record), f"{limit}"]
    command.append("rehearsal" if rehearse else "full")
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(rehearse),
            start_new_session=True,
        )
        family: set[psutil.Process] = set()
        try:
            while process.poll() is None and time.monotonic() - began < min(limit + END_GRACE, left):
                family |= _descendants(process.pid)
                told.say()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.5)
            is_running = process.poll() is None
        finally:
            _end(process, family)
    seconds = time.monotonic() - began
    outcome = _outcome(process.returncode, is_running, seconds, limit)
    rows, details = read_record(record)
    tail = "" if outcome == "ended" else _tail(log, process.returncode)
    return StepResult(step.name, step.settles, outcome, round(seconds, 1), rows, details, tail)


def _outcome(code: int, is_running: bool, seconds: float, limit: float) -> Outcome:
    if code != 0 and seconds >= limit:
        return "hung"  # ended by its own guard or by this process
    if is_running:
        return "out of time"
    if code < 0:
        return "crashed"
    return "failed" if code else "ended"


def _descendants(pid: int) -> set[psutil.Process]:
    with suppress(psutil.Error):
        return set(psutil.Process(pid).children(recursive=True))
    return set()


def _end(process: subprocess.Popen[bytes], family: set[psutil.Process]) -> None:
    """Kill a step's process and all processes that it ever started: a launcher's ranks have their own sessions, and outlive a
    launcher that crashes."""
    for member in family | _descendants(process.pid):
        with suppress(psutil.Error):
            member.kill()
    process.kill()
    process.wait()


def _environment(rehearse: bool) -> dict[str, str]:
    """Returns the environment of a step: the project is importable from any folder, and a launcher's variables are removed."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in launched}
    root = str(Path(dalle_ds.__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    env["PYTHONUNBUFFERED"] = "1"
    if rehearse:
        env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        env.setdefault("OMP_NUM_THREADS", "1")
    return env


def _tail(log: Path, code: int) -> str:
    """Returns the last lines of the log, and the signal or exit code that ended the process."""
    # a progress bar redraws its line: keep its last state
    lines = [line.rpartition("\r")[2] for line in log.read_bytes().decode(errors="replace").split("\n") if line][-TAIL_LINES:]
    end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return "\n".join([*lines, f"({end})"])


def _earlier(folder: Path, identity: Mapping[str, Any]) -> dict[str, StepResult]:
    try:
        saved = json.loads((folder / SUMMARY).read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise ConfigError(f"{folder / SUMMARY} is not valid JSON ({error}): remove it, or use another folder") from None
    try:
        results = {one["name"]: StepResult(**one) for one in saved["steps"]}
        identity_then = saved["identity"]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / SUMMARY} is from another version of this program ({error}): use another folder, or --again all"
        ) from None
    if identity_then != identity:
        raise ConfigError(
            f"{folder} holds results of {identity_then}, this is {dict(identity)}: use another folder, or --again all"
        )
    return results


def _write(folder: Path, identity: Mapping[str, Any], results: Sequence[StepResult]) -> dict[str, Any]:
    verdicts = [row["verdict"] for result in results for row in result.rows]
    summary = {
        "ok": all(result.is_ok for result in results),
        "not_ok": [result.name for result in results if not result.is_ok],
        "wrong": verdicts.count("WRONG"),
        "off": verdicts.count("off"),
        "identity": dict(identity),
        "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "steps": [vars(result) for result in results],
    }
    with atomic_write(folder / SUMMARY, one_writer=True) as file:
        file.write_text(json.dumps(summary, indent=1))
    return summary


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
