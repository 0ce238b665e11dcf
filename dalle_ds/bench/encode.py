"""What does the encode stage cost beside its encoder? It is measured in a process of its own: the library knows no pipeline."""

import json
import subprocess
import sys

from dalle_ds.bench.machine import machine_for
from dalle_ds.bench.report import Report
from dalle_ds.bench.settings import EncodeSettings
from dalle_ds.bench.timing import Ratio
from dalle_ds.errors import UserError


def run(settings: EncodeSettings) -> Report:
    """`preprocessing/bench.py` takes the turns; its last line tells what it saw.

    Raises:
        UserError: it came to no end; what it said stands on stderr.
    """
    with machine_for(settings) as machine:
        options = settings.model_dump() | {"device": machine.device.type}
        command = [sys.executable, "-m", "preprocessing.bench", json.dumps(options)]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if child.returncode:
            raise UserError(f"python -m preprocessing.bench ended with exit code {child.returncode}; the preprocessing package "
                            "of this project must be importable here")  # fmt: skip
        seen = json.loads(child.stdout.splitlines()[-1])
        report = Report("encode", machine.name)
    for row in seen["rows"]:
        report.add(row["what"], row["other"], row["ours_seconds"], row["other_seconds"], Ratio(*row["ratio"]))
    return report.note(**seen["notes"])
