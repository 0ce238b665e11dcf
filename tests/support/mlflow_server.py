"""A real `mlflow server` for tests, which can be killed and restarted."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class MlflowServer:
    """An `mlflow server` process on a free port."""

    def __init__(self, folder: Path, empty_store: Path, *options: str) -> None:
        """`options` go to launchers/mlflow_server.sh."""
        self.folder, self.options, self.process = folder, options, None
        folder.mkdir()
        shutil.copy(empty_store, folder / "mlflow.db")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            "bash",
            REPOSITORY / "launchers" / "mlflow_server.sh",
            "--folder",
            self.folder,
            "--port",
            str(self.port),
            *self.options,
        ]
        environment = {**os.environ, "PYTHON": sys.executable}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + 120
        while True:
            try:
                assert urllib.request.urlopen(f"{self.uri}/health", timeout=2).read() == b"OK"
                return
            except OSError:
                log_end = (self.folder / "server.log").read_text()[-3000:]
                assert self.process.poll() is None and time.monotonic() < deadline, log_end
                time.sleep(0.2)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # the process group of the server and its worker
            self.process.wait()
            self.process = None
