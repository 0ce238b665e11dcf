"""Provenance tags of a run: version and git commit of the code, torch version, host."""

import platform
import subprocess
from pathlib import Path

import torch

import dalle_ds


def code_tags() -> dict[str, str]:
    """Tags with the versions of dalle_ds and torch, the host, and the git commit ("+changes" if tracked files differ from it).

    Without git the commit is omitted.
    """
    tags = {"dalle_ds.version": dalle_ds.__version__, "torch.version": torch.__version__, "host": platform.node()}
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        tags["git.commit"] = commit + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    return tags


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
