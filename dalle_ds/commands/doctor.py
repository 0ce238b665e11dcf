"""`dalle-ds doctor`: preflight checks of this machine."""

import importlib.metadata
import platform
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dalle_ds.commands.settings import DoctorConfig
from dalle_ds.console import Outcome
from dalle_ds.redaction import redacted
from dalle_ds.storage import objects
from dalle_ds.tracking.store import resolve_uri, sqlite_file, store_problem

TRACKING_SECONDS = 60.0  # an MLflow store that needs longer for a list of one experiment cannot keep up with a run
SCRIPTS = ("é", "ж", "λ", "א", "ع", "अ", "ไ", "猫", "ね", "고", "😀")
"""A letter of each script that captions may have: Latin, Cyrillic, Greek, Hebrew, Arabic, Devanagari, Thai, Chinese, Japanese,
Korean, emoji."""


@dataclass(frozen=True)
class Finding:
    """Result of one check. If `must` is set, training cannot run unless the check passes."""

    name: str
    ok: bool
    must: bool
    detail: str


def examine(urls: Sequence[str] = (), *, min_free_gib: float = 2.0, mlflow_uri: str | None = None) -> list[Finding]:
    """Run all checks in a fixed order. A check that raises becomes a failed finding.

    Args:
        urls: locations that must be writable: folders, file:// or s3:// prefixes. The test file is removed again.
        min_free_gib: GiB that must be free on the disk of the working directory.
        mlflow_uri: MLflow store that must answer. If None: MLFLOW_TRACKING_URI, or local files if that is unset.
    """
    checks: list[tuple[str, bool, Callable[[], tuple[bool, str]]]] = [
        ("python", True, _python),
        ("torch", True, lambda: _package("torch")),
        ("deepspeed", True, lambda: _package("deepspeed")),
        ("mlflow", True, lambda: _package("mlflow")),
        ("accelerator", False, _accelerator),
        ("kernels", False, _kernels),  # without Triton kernels everything runs in plain PyTorch, several times slower
        ("disk", True, lambda: _disk(min_free_gib)),
        *((f"write {url}", True, lambda url=url: _write(url)) for url in urls),
        ("tracking", False, lambda: _tracking(mlflow_uri)),  # training also runs while MLflow is unreachable
        ("fonts", False, _fonts),
    ]
    return [_examined(*check) for check in checks]


def summary(findings: Sequence[Finding]) -> dict[str, Any]:
    """The summary that the command prints last."""
    return {
        "ok": all(finding.ok for finding in findings if finding.must),
        "failed": [finding.name for finding in findings if finding.must and not finding.ok],
        "warnings": [finding.name for finding in findings if not finding.must and not finding.ok],
        "findings": [asdict(finding) for finding in findings],
    }


def table(findings: Sequence[Finding]) -> str:
    """A table with one line per check."""
    width = max(len(finding.name) for finding in findings)
    marks = {finding.name: "ok     " if finding.ok else "MISSING" if finding.must else "warning" for finding in findings}
    return "\n".join(f"{marks[finding.name]}  {finding.name:<{width}}  {finding.detail}" for finding in findings)


def run(config: DoctorConfig) -> Outcome:
    """Run all checks. The outcome is complete (exit code 0) if every check that training needs passed."""
    findings = examine(config.places, min_free_gib=config.min_free_gib, mlflow_uri=config.mlflow_uri)
    outcome = summary(findings)
    return Outcome(outcome, outcome["ok"], text=table(findings))


def _examined(name: str, must: bool, check: Callable[[], tuple[bool, str]]) -> Finding:
    try:
        ok, detail = check()
    except Exception as error:  # any exception of a check is reported as its finding
        ok, detail = False, f"{type(error).__name__}: {str(error)[:300]}"
    return Finding(name, ok, must, detail)


def _python() -> tuple[bool, str]:
    return sys.version_info >= (3, 11), f"{platform.python_version()} at {sys.executable} (expected 3.11 or later)"


def _package(name: str) -> tuple[bool, str]:
    found = importlib.metadata.version(name)
    from packaging.requirements import Requirement

    wanted = [line for line in map(Requirement, importlib.metadata.requires("dalle-ds") or []) if line.name == name]
    ok = all(line.specifier.contains(found, prereleases=True) for line in wanted)
    return ok, f"{found} (expected {wanted[0].specifier if wanted else 'any'})"


def _accelerator() -> tuple[bool, str]:
    import torch

    from dalle_ds.ops.devices import use_cuda

    if not use_cuda():
        why = "DS_ACCELERATOR leaves the GPUs out" if torch.cuda.is_available() else "none"
        return False, f"{why}: {torch.get_num_threads()} CPU threads, enough for the tiny preset"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices)
    product = torch.ones(64, 64, device="cuda", dtype=torch.float16) @ torch.ones(64, 64, device="cuda", dtype=torch.float16)
    return bool((product == 64).all()), f"{names}; CUDA {torch.version.cuda}; `dalle-ds accept` tests this GPU in full"


def _kernels() -> tuple[bool, str]:
    from dalle_ds.ops.devices import use_cuda
    from dalle_ds.ops.kernel_compiler import kernel_problem

    if not use_cuda():
        return True, "not needed without a GPU"
    problem = kernel_problem()
    return problem is None, problem or "Triton compiles kernels for this GPU"


def _disk(min_free_gib: float) -> tuple[bool, str]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return free >= min_free_gib, f"{free:.1f} GiB free in {Path.cwd()} (expected {min_free_gib:g} GiB or more)"


def _write(url: str) -> tuple[bool, str]:
    probe, data = objects.join(url, f".dalle-ds-doctor-{uuid.uuid4().hex}"), uuid.uuid4().bytes
    began = time.perf_counter()
    objects.write_bytes(probe, data)  # not in the block below: an error of `delete` would hide its own
    try:
        same = objects.read_bytes(probe) == data
    finally:
        objects.delete(probe)
    free = objects.free_bytes(url)
    room = f", {free / 2**30:.1f} GiB free" if free is not None else ""
    said = "written, read back and removed" if same else "the bytes read back differ from the bytes written"
    return same, f"{said} in {time.perf_counter() - began:.2f} s{room}"


def _tracking(uri: str | None) -> tuple[bool, str]:
    uri = resolve_uri(uri, Path.cwd() / "run")
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):  # a closed port is told at once; MLflow would try again
        with socket.create_connection(
            (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)), timeout=5
        ):
            pass
    problem = store_problem(uri, TRACKING_SECONDS)
    if problem is not None:
        return False, f"{redacted(uri)}: {problem}"
    database = sqlite_file(uri)
    if database is not None and not database.exists():
        return True, f"{redacted(uri)} can be created by the first run"
    return True, f"{redacted(uri)} answers"


def _fonts() -> tuple[bool, str]:
    from PIL import ImageFont, features

    if not (features.check("freetype2") and isinstance(ImageFont.load_default(20), ImageFont.FreeTypeFont)):
        return False, "Pillow lacks FreeType: grids cannot show captions"
    from dalle_ds.sampling.lettering import advice, missing_letters

    missing = missing_letters(SCRIPTS)
    return not missing, advice(missing) if missing else f"letters on grids: {' '.join(SCRIPTS)}"
