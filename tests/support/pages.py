"""Run the code blocks of a page unchanged."""

import re
import sys
from pathlib import Path

from tests.support import launching


def run_python_page(page: Path, home: Path, env: dict[str, str]) -> str:
    """Run a page's Python blocks as one program in the folder `home`; on PYTHON.md, its commands first. Returns the output."""
    text = page.read_text()
    bash, python = (re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) for kind in ("bash", "python"))
    assert python, f"{page} has no Python block"
    commands = [["bash", "-euo", "pipefail", "-c", block] for block in bash] if page.name == "PYTHON.md" else []
    for command in [*commands, [sys.executable, "-c", "\n".join(python)]]:
        done = launching.run(command, home, env)
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
