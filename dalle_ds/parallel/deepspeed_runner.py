"""The deepspeed launcher, with an exit code for a launch that a signal has ended: DeepSpeed itself exits with 0 then."""

import os
import subprocess
import sys
from collections.abc import Sequence
from signal import Signals
from types import SimpleNamespace
from typing import Any

from dalle_ds.console import print_error
from dalle_ds.redaction import redacted

STOPPED = 128 + Signals.SIGTERM


def run(arguments: Sequence[str]) -> None:
    """Do what `deepspeed ARGUMENTS` does.

    Raises:
        SystemExit: the exit code of DeepSpeed; or 143, as of every run that was stopped, if a signal killed the process that
            it started: its node launcher, pdsh or mpirun.
    """
    from deepspeed.launcher import runner

    arguments = list(arguments)
    if any(redacted(word) != word for word in arguments):
        print_error(
            "warning: the command line has a password or token of a url, which the process list shows; expected it in the "
            "environment, as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. DeepSpeed's log, which would show it too, "
            "is off"
        )
        arguments = ["--log_level=critical", *arguments]  # it shows the command of a rank that fails as an error
    if (port := os.environ.get("MASTER_PORT")) and not any(word.startswith("--master_port") for word in arguments):
        arguments = [f"--master_port={port}", *arguments]  # DeepSpeed would replace it by 29500
    started: list[subprocess.Popen[Any]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            started.append(self)

    runner.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": Recorded})
    runner.main(arguments)
    code = started[0].returncode if started else 0
    if code < 0:
        print_error(f"error: the launcher's process {started[0].pid} was killed by {Signals(-code).name}: the job is not done")
        sys.exit(STOPPED)
