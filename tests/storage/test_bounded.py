"""What is endless is refused after the bound, and pipes are read."""

import errno
import io
import os
import threading
from pathlib import Path

import pytest

from dalle_ds.commands.sample import SampleSource
from dalle_ds.errors import UserError
from dalle_ds.parallel.engine_config import load_engine_config
from dalle_ds.parallel.launch import take_environment
from dalle_ds.storage import objects
from dalle_ds.storage.bounded import read_bounded
from dalle_ds.storage.samples_record import read_samples_record
from tests.support.memory import peak_of

ENDLESS = Path("/dev/zero")


def test_the_bound(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    assert len(read_bounded(tmp_path / "a", 100)) == 100
    for source in (tmp_path / "a", io.BytesIO(bytes(100)), ENDLESS):
        with pytest.raises(OSError, match="more than 99 bytes") as refused:
            read_bounded(source, 99)
        assert refused.value.errno == errno.EFBIG


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    assert peak_of(lambda: read_bounded(tmp_path / "a", 1 << 30)) < 10e6


def test_what_is_read_as_a_whole_is_a_regular_file(tmp_path: Path) -> None:
    """A record, a manifest or a tokenizer: a device has no end, and nobody may ever write to a pipe."""
    os.mkfifo(tmp_path / "pipe")
    for path in (ENDLESS, tmp_path / "pipe"):
        with pytest.raises(UserError, match=f"{path}: a device or a pipe, expected a regular file"):
            objects.read_bytes(path)
    with pytest.raises(UserError, match="/dev/zero"):
        read_samples_record(ENDLESS)


def test_a_pipe_is_read_to_its_end() -> None:
    reader, writer = os.pipe()  # as `--captions <(command)`

    def write() -> None:
        with os.fdopen(writer, "wb") as pipe:
            for _ in range(100):
                pipe.write(b"a red heart\n" * 100)

    thread = threading.Thread(target=write)
    thread.start()
    assert len(SampleSource(captions_file=Path(f"/dev/fd/{reader}")).texts) == 10_000
    thread.join()
    os.close(reader)


def test_endless_files_of_users_are_refused_with_a_message() -> None:
    for read in (
        lambda: SampleSource(captions_file=ENDLESS).texts,
        lambda: take_environment(ENDLESS),
        lambda: load_engine_config(ENDLESS, micro_batch=1, accumulation=1, clip=1.0),
    ):
        with pytest.raises(UserError, match=r"/dev/zero cannot be read.*has more than \d+ bytes"):
            read()
