"""Preemption: stop signals, a dead launcher."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dalle_ds.training.preemption import LAUNCHER_VARIABLE, StopFlag


def test_sigterm_only_sets_the_flag() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopFlag() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_second_interrupt_acts_at_once() -> None:
    with StopFlag(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_death_of_the_launcher_sets_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setenv(LAUNCHER_VARIABLE, str(launcher.pid))
    with StopFlag(poll_seconds=0.05) as stop:
        time.sleep(0.3)
        assert not stop.requested
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + 10
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.02)
        assert str(launcher.pid) in stop.reason
