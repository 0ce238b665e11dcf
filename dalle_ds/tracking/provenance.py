"""What a run was made from, as tags: the code's commit and the fingerprints of its inputs."""

import platform

import torch

import dalle_ds
from dalle_ds import project_files


def code_tags() -> dict[str, str]:
    """Version, git commit (with "+changes" if the tree differs from it) and machine; without a commit what is known."""
    tags = {"dalle_ds.version": dalle_ds.__version__, "torch.version": torch.__version__, "host": platform.node()}
    if (commit := project_files.commit()) is not None:
        tags["git.commit"] = commit
    return tags
