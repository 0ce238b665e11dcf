"""Pickles that make a folder where they are loaded as code: no reader of ours may."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch


class Attack:
    """An object whose unpickling calls `function(*arguments)`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self._call


def pickles(owned: Path) -> dict[str, bytes]:
    """Files by name, in the forms that torch and numpy read. Each makes the folder `owned` if its code runs."""
    mkdir, system = Attack(os.mkdir, str(owned)), Attack(os.system, f"mkdir {owned}")
    evaluated = Attack(eval, f"__import__('os').mkdir({str(owned)!r})")
    weights = {"update": 3, "model": {"w": torch.zeros(2)}}
    found = {
        "mkdir": _saved(mkdir),
        "system": _saved(system),
        "eval": _saved(evaluated),
        "nested": _saved({**weights, "model": {"w": [[mkdir]]}}),
        "key": _saved({**weights, "extra": (evaluated, torch.zeros(1))}),
        "legacy": _saved({**weights, "model": mkdir}, _use_new_zipfile_serialization=False),
        "bare pickle": pickle.dumps(mkdir),
        "protocol 0": pickle.dumps(system, protocol=0),
        "object array": _npy(np.array([mkdir], dtype=object)),
        "npz": _npz(np.array([mkdir], dtype=object)),
    }
    script = torch.jit.script(torch.nn.Linear(1, 1))
    file = io.BytesIO()
    torch.jit.save(script, file)
    return {**found, "torchscript": _with_member(file.getvalue(), "data.pkl", pickle.dumps(mkdir, protocol=2))}


def _saved(content: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def _npz(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, codes=array, hashes=array, keys=array)
    return file.getvalue()


def _with_member(archive: bytes, suffix: str, data: bytes) -> bytes:
    """The zip file with one member replaced."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith(suffix) else old.read(name))
    return file.getvalue()
