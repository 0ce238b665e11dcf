"""The run: every step a process with a limit, what is known written after each, and all of it gone on with after a stop."""

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
"""Seconds that a step gets beyond its limit to print its stacks and end by itself."""
WORTH_STARTING = 8.0
"""With less left of the whole no further step is begun: Python and torch alone take most of it."""

Outcome = Literal["ended", "failed", "crashed", "hung", "out of time"]
"""Of a process: it came to its end, whatever it found; it raised; a signal ended it; it went past its own limit; the whole
run's time was over, before or while it ran."""


@dataclass
class StepResult:
    """What one step did. `tail` is the end of its output where it did not come to its end."""

    name: str
    settles: str
    outcome: Outcome
    seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    tail: str = ""

    @property
    def is_ok(self) -> bool:
        """It came to its end and found nothing wrong. What is off is right, only slower or larger than it might be."""
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
    """Run what of `steps` has not come to its end in `folder` yet -> the summary, which `folder`/acceptance.json holds too.

    Args:
        folder: gets acceptance.json, and of every step NAME.jsonl (its findings as they came) and NAME.log (its output).
        rehearse: small, on the CPU, whatever else there is.
        minutes: for the steps of this call together.
        names: of the steps to run; none: all.
        again: of steps to repeat although they have ended; "all": every one.

    Raises:
        ConfigError: a name that is no step's; a folder with results of another machine, torch, or kind of run.
    """
    known = {step.name: step for step in steps}
    for name in (*names, *again):
        if name not in known and name != "all":
            raise ConfigError(f"no step {name!r}; there are {', '.join(known)}")
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
    """What the bar says beside its own ETA, which takes all steps for equal: which step runs, and the latest end of all."""

    def __init__(self, bar: Any, name: str, latest: float) -> None:
        self._bar, self._name, self._end, self._next = bar, name, time.monotonic() + latest, 0.0
        self._every = 1.0 if sys.stderr.isatty() else 10.0

    def say(self) -> None:
        """Once a second, in a log file once in ten."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._every
            self._bar.set_postfix_str(f"{self._name}, at most {max(0.0, self._end - now) / 60:.1f} min left")


def _run(step: Step, folder: Path, rehearse: bool, limit: float, left: float, told: _Told) -> StepResult:
    record, log = folder / f"{step.name}.jsonl", folder / f"{step.name}.log"
    record.unlink(missing_ok=True)
    if left < WORTH_STARTING:
        return StepResult(
            step.name, step.settles, "out of time", 0.0, tail=f"not begun: {max(left, 0.0):.0f} s were left of the whole"
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
        return "hung"  # its own watch ended it, or we did
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
    """End a step and all that it ever started: ranks of a launcher have sessions of their own, and outlive one that crashes."""
    for member in family | _descendants(process.pid):
        with suppress(psutil.Error):
            member.kill()
    process.kill()
    process.wait()


def _environment(rehearse: bool) -> dict[str, str]:
    """Of a step: the project importable from anywhere, and nothing of a launcher that may have started us."""
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
    """The last lines, and how the process ended."""
    # of a bar that was redrawn, what it said last
    lines = [line.rpartition("\r")[2] for line in log.read_bytes().decode(errors="replace").split("\n") if line][-TAIL_LINES:]
    end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return "\n".join([*lines, f"({end})"])


def _earlier(folder: Path, identity: Mapping[str, Any]) -> dict[str, StepResult]:
    try:
        saved = json.loads((folder / SUMMARY).read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise ConfigError(f"{folder / SUMMARY} is not valid JSON ({error}): remove it, or name another folder") from None
    try:
        results = {one["name"]: StepResult(**one) for one in saved["steps"]}
        identity_then = saved["identity"]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / SUMMARY} is of another version of this program ({error}): name another folder, or --again all"
        ) from None
    if identity_then != identity:
        raise ConfigError(
            f"{folder} holds results of {identity_then}, this is {dict(identity)}: name another folder, or --again all"
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
