"""Provenance tags of a run: version and git commit of the code, torch version, host."""

import platform

import torch

import dalle_ds
from dalle_ds import project_files


def code_tags() -> dict[str, str]:
    """Tags with the versions of dalle_ds and torch, the host, and the git commit ("+changes" if tracked files differ from it).

    If no commit is known, its tag is omitted.
    """
    tags = {"dalle_ds.version": dalle_ds.__version__, "torch.version": torch.__version__, "host": platform.node()}
    if (commit := project_files.commit()) is not None:
        tags["git.commit"] = commit
    return tags
