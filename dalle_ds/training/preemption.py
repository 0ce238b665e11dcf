"""Preemption of a long-running command: stop signals, a dead launcher."""

import os
import signal
import threading
from types import FrameType, TracebackType

import psutil

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
        self.request(signal.Signals(number).name)

    def _watch_launchers(self) -> None:
        while not self._done.wait(self._poll_seconds):
            for process in self._launchers:
                # psutil also compares the creation time, so a reused pid is not mistaken for the launcher
                if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                    self.request(f"the launching process {process.pid} has died")
                    return

    def request(self, reason: str) -> None:
        """Ask the command to stop."""
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
