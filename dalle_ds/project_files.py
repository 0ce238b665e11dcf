"""Where the project's launchers, recipes and DeepSpeed JSON are: at the root of a checkout, inside of the package of a wheel.

Standard library alone, for `dalle_ds/wheel.py` reads this file where nothing else is installed.
"""

import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHIPPED = (
    "launchers/train_prior.sh",
    "launchers/ranks.sh",
    "launchers/mlflow_server.sh",
    "launchers/slurm/*.sbatch",
    "launchers/recipes/*.yaml",
    "ds_configs/*.json",
)
"""What a wheel carries, as patterns from the root of a checkout. The demo and the tests are left to a checkout."""
IN_WHEEL = "shipped"
"""Folder of the package that a wheel has them in, by the same names."""
COMMIT_FILE = "commit.txt"
"""File of the package that says, in wheels and source distributions, which commit they were built from."""


def checkout() -> Path | None:
    """Root of the checkout, or unpacked source distribution, that this package is imported from; None in a wheel."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").exists() and (root / "launchers" / "train_prior.sh").exists() else None


def root() -> Path:
    """What names of shipped files, such as "ds_configs/zero3_fp16.json", are relative to."""
    return checkout() or PACKAGE / IN_WHEEL


def names() -> list[str]:
    """Every shipped file, in the order of `SHIPPED`, relative to `root`."""
    base = root()
    return [path.relative_to(base).as_posix() for pattern in SHIPPED for path in sorted(base.glob(pattern))]


def find(name: str) -> Path | None:
    """The shipped file of that name, "tiny.yaml" as well as "launchers/recipes/tiny.yaml"; None where there is none."""
    return next((root() / known for known in names() if f"/{known}".endswith(f"/{name}")), None)


def here_or_shipped(name: str | Path) -> Path:
    """`name` as a path, where such a file exists; else the shipped file of that name; else the path all the same."""
    here = Path(name)
    return here if here.exists() else find(str(name)) or here


def requirements() -> list[str]:
    """The project's dependencies, without those of its extras; none where the package is neither a checkout nor installed."""
    import tomllib  # here, for every command imports this module
    from importlib import metadata

    tree = checkout()
    if tree is not None:
        return tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    try:
        return [line for line in metadata.requires("dalle-ds") or () if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        return []


def commit() -> str | None:
    """The git commit of this code, with "+changes" where the tree differs from it; None where nothing tells."""
    tree = checkout()
    if tree is not None:  # elsewhere git would name the commit of whatever repository the environment lies in
        try:
            changes = _git(tree, "status", "--porcelain", "--untracked-files=no")
            return _git(tree, "rev-parse", "HEAD") + ("+changes" if changes else "")
        except (OSError, subprocess.CalledProcessError):
            pass
    file = PACKAGE / COMMIT_FILE
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
