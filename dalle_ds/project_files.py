"""Paths of launchers, recipes and DeepSpeed JSON: at the root of a checkout, or inside the package of an installed wheel.

This module imports the standard library only, because `dalle_ds/wheel.py` runs it before dependencies are installed.
"""

import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHIPPED = (
    "launchers/train_prior.sh",
    "launchers/ranks.sh",
    "launchers/mlflow_server.sh",
    "launchers/slurm/*.sbatch",
    "launchers/kubernetes/*.yaml",
    "launchers/recipes/*.yaml",
    "ds_configs/*.json",
)
"""Patterns of the files in a wheel, relative to the root of a checkout. The demo and the tests need a checkout."""
IN_WHEEL = "shipped"
"""Folder of the package that holds these files in a wheel, under the same names."""
COMMIT_FILE = "commit.txt"
"""File of the package with the commit that a wheel or source distribution was built from."""


def checkout() -> Path | None:
    """Return the root of the checkout or unpacked source distribution that holds this package, or None in a wheel."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").exists() and (root / "launchers" / "train_prior.sh").exists() else None


def root() -> Path:
    """Return the folder that names of shipped files, such as "ds_configs/zero3_fp16.json", are relative to."""
    return checkout() or PACKAGE / IN_WHEEL


def names() -> list[str]:
    """Return the names of all shipped files, relative to `root`, in the order of `SHIPPED`."""
    base = root()
    return [path.relative_to(base).as_posix() for pattern in SHIPPED for path in sorted(base.glob(pattern))]


def find(name: str) -> Path | None:
    """Return the shipped file with this name ("tiny.yaml" or "launchers/recipes/tiny.yaml"), or None if there is none."""
    return next((root() / known for known in names() if f"/{known}".endswith(f"/{name}")), None)


def here_or_shipped(name: str | Path) -> Path:
    """Return `name` as a path if that file exists, else the shipped file with this name, else `name` as a path."""
    here = Path(name)
    return here if here.exists() else find(str(name)) or here


def requirements() -> list[str]:
    """Return the project's requirements without extras; an empty list if the package is neither a checkout nor installed."""
    import tomllib  # imported here, because every command imports this module
    from importlib import metadata

    tree = checkout()
    if tree is not None:
        return tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    try:
        return [line for line in metadata.requires("dalle-ds") or () if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        return []


def commit() -> str | None:
    """Return the git commit of this code, with "+changes" if tracked files differ from it, or None if it is unknown."""
    tree = checkout()
    if tree is not None:  # outside a checkout, git would report the commit of an unrelated repository around it
        try:
            changes = _git(tree, "status", "--porcelain", "--untracked-files=no")
            return _git(tree, "rev-parse", "HEAD") + ("+changes" if changes else "")
        except (OSError, subprocess.CalledProcessError):
            pass
    file = PACKAGE / COMMIT_FILE
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
