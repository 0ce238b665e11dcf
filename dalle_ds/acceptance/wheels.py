"""Collect wheels for a node with torch but no package registry: `python -m dalle_ds.acceptance.wheels FOLDER --python 3.12`.

On that node, from this project's folder: `pip install --no-index --find-links FOLDER -r FOLDER/requirements.txt`, then
`python -m dalle_ds.cli accept`.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from dalle_ds import project_files

CARRIED = (
    "deepspeed",
    "einops",
    "fsspec",
    "numpy",
    "pillow",
    "psutil",
    "pydantic",
    "pyyaml",
    "safetensors",
    "sentencepiece",
    "tenacity",
    "tqdm",
    "click",
)
"""The dependencies in pyproject.toml, without torch, that the steps import. A test imports the steps with no other packages."""

OLDEST_GLIBC, GLIBC = 17, 28
"""Minor versions: glibc 2.17 to 2.28. torch's own wheels need 2.28, so a machine with torch has it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", help="the node's Python version"
    )
    options = parser.parse_args()
    collect(options.folder, options.python)
    n_bytes = sum(file.stat().st_size for file in options.folder.glob("*.whl"))
    print(f"{len(list(options.folder.glob('*.whl')))} wheels, {n_bytes / 1e6:.0f} MB in {options.folder}")


def collect(folder: Path, python: str) -> None:
    """Write wheels for Python version `python` (x.y) on Linux with this machine's architecture, and requirements.txt.

    Raises:
        subprocess.CalledProcessError: pip found no wheel for such a machine; pip's output names the package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = requirements()
    (folder / "requirements.txt").write_text("\n".join(wanted.values()) + "\n")
    pip = [sys.executable, "-m", "pip"]
    # DeepSpeed is an sdist; its wheel is pure Python if it compiles no operators
    made = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), wanted["deepspeed"]]
    subprocess.run(made, check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
    # download DeepSpeed's dependencies, not DeepSpeed itself, for which pip would also download torch
    others = [line for name, line in wanted.items() if name != "deepspeed"] + _needs_of_deepspeed(folder)
    machine = platform.machine()
    tags = [f"manylinux_2_{n}_{machine}" for n in range(GLIBC, OLDEST_GLIBC - 1, -1)] + [f"manylinux2014_{machine}"]
    place = ["--python-version", python, "--implementation", "cp", *(word for tag in tags for word in ("--platform", tag))]
    subprocess.run([*pip, "download", "--quiet", "--only-binary", ":all:", *place, "--dest", str(folder), *others], check=True)


def requirements() -> dict[str, str]:
    """Returns the requirement of each package in `CARRIED`, as written in pyproject.toml."""
    named = {re.split(r"[^\w.-]", line, maxsplit=1)[0]: line for line in project_files.requirements()}
    return {name: named[name] for name in CARRIED}


def _needs_of_deepspeed(folder: Path) -> list[str]:
    wheel = next(folder.glob("deepspeed-*.whl"))
    found = next(iter(metadata.distributions(path=[str(wheel)])))
    return [line for line in found.requires or [] if "extra ==" not in line and not line.startswith("torch")]


if __name__ == "__main__":
    main()
