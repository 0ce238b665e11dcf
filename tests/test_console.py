"""Progress output of commands, on a terminal, in a log, and on a closed pipe."""

import io
import os
import re
import subprocess
import sys

import pytest

from dalle_ds.console import print_error, progress


def test_work_goes_on_where_nobody_reads_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as in ranks whose ssh session has ended
    with io.TextIOWrapper(os.fdopen(writer, "wb", 0), write_through=True) as unread:
        monkeypatch.setattr(sys, "stderr", unread)
        with pytest.raises(BrokenPipeError):
            sys.stderr.write("unread")
        with progress(total=3, what="work", unit="piece") as bar:
            bar.set_postfix(loss=1.0)
            for _ in range(3):
                bar.update()
            bar.refresh()
        assert bar.n == 3
        print_error("error: nobody reads it")


def test_progress_on_a_log_is_whole_lines_with_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(total=4, what="work", unit="piece") as bar:
        bar.update(4)
    err = capsys.readouterr().err
    assert "work:" in err and "4/4" in err and "piece/s" in err


def test_log_lines_beside_progress_on_a_log_begin_their_own_lines() -> None:
    program = """
import logging
from dalle_ds.console import progress, setup_logging
setup_logging()
with progress(total=4, what="work", unit="piece") as bar, progress(total=2, what="inner", unit="piece") as inner:
    bar.update(4)
    bar.refresh()
    inner.refresh()
    logging.getLogger("x").info("half of it")
"""
    err = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stderr.decode()
    assert "\r" not in err and "\x1b" not in err
    lines = err.splitlines()
    assert all(line.startswith(("work:", "inner:")) or re.match(r"\d\d:\d\d:\d\d I x: half of it$", line) for line in lines), (
        err
    )
    assert len(lines) >= 5
