"""Preemption of a long-running command: stop signals, a dead launcher, a second start in the same folder."""

import fcntl
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from dalle_ds.errors import UserError

log = logging.getLogger(__name__)

EXIT_STOPPED = 143
"""Exit code of a command that was asked to stop and has saved its state: 128 + SIGTERM, as in shells."""

LAUNCHER_VARIABLE = "DALLE_DS_LAUNCHER_PID"
"""Environment variable with the process id of a launcher whose death must end the command.

Launchers among the parent processes are found without it."""


class StopFlag:
    """Is set on SIGTERM or SIGINT, and when a launching process has died.

    A signal only sets the flag; after the current update the trainer saves and exits. A second SIGINT raises KeyboardInterrupt
    at once. Orphans must stop too: a killed shell leaves its children running, and they would conflict with the restarted run.
    """

    def __init__(self, poll_seconds: float = 1.0) -> None:
        self.requested = False
        self.reason = ""
        self._poll_seconds = poll_seconds
        self._launchers = _launching_processes()
        self._done = threading.Event()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        if self._launchers:
            threading.Thread(target=self._watch_launchers, name="launcher-watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._request(signal.Signals(number).name)

    def _watch_launchers(self) -> None:
        while not self._done.wait(self._poll_seconds):
            for process in self._launchers:
                # psutil also compares the creation time, so a reused pid is not mistaken for the launcher
                if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                    self._request(f"the launching process {process.pid} has died")
                    return

    def _request(self, reason: str) -> None:
        self.requested, self.reason = True, reason


def _launching_processes() -> list[psutil.Process]:
    """The processes whose death must end this one: the process of `LAUNCHER_VARIABLE`, and launchers among the parents.

    If DeepSpeed's node launcher (`deepspeed.launcher.launch`) has no runner among its parents, ssh started it. Then the ssh
    session counts as a launcher too, because it ends when the host or the process that started the job is gone. Other ssh
    sessions do not count: they end when a user logs out.
    """
    found = []
    named = os.environ.get(LAUNCHER_VARIABLE, "")
    if named.isdigit() and psutil.pid_exists(int(named)):
        found.append(psutil.Process(int(named)))
    is_of_node = False
    for ancestor in psutil.Process().parents():
        try:
            command = " ".join(ancestor.cmdline()[:4])
        except psutil.Error:
            continue
        if "deepspeed" in command or "torchrun" in command or "torch.distributed" in command:
            found.append(ancestor)
            is_of_node = "deepspeed.launcher.launch" in command
        elif is_of_node and command.startswith("sshd"):
            found.append(ancestor)
            break
    return found


class RunLock:
    """Lets only one process at a time work in a folder. The advisory lock (flock) ends with its process, also after a crash.

    Raises:
        UserError: the folder is still in use after `wait_seconds`, which a stopping run needs to save. Names the holder.
    """

    def __init__(self, folder: Path, wait_seconds: float = 60.0) -> None:
        self._path = folder / ".lock"
        self._wait_seconds = wait_seconds

    def __enter__(self) -> "RunLock":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+")
        deadline = time.monotonic() + self._wait_seconds
        told = False
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = self._holder()
                if time.monotonic() > deadline:
                    raise UserError(f"{self._path.parent} is in use by {holder}: wait for it to end, or stop it") from None
                if not told:
                    log.info("%s is in use by %s; waiting up to %.0f s", self._path.parent, holder, self._wait_seconds)
                    told = True
                time.sleep(0.5)
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}))
        self._file.flush()
        return self

    def _holder(self) -> str:
        self._file.seek(0)
        return self._file.read() or "another process"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()
