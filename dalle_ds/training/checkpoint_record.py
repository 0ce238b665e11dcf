"""checkpoint.json: the commit of a checkpoint, which lists its files and carries a digest of itself."""

import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Generic, Literal, TypeVar

from pydantic import Field

from dalle_ds.errors import Damaged, DataError
from dalle_ds.storage import objects
from dalle_ds.storage.record import PathBelow, Record, SealedRecord, read_record
from dalle_ds.storage.verified_files import CommittedFile, verified_pieces

COMMIT_FILE = "checkpoint.json"
NAME = re.compile(r"update_[0-9]{8,}", re.ASCII)

About = TypeVar("About", bound=Record)


Files = dict[PathBelow, CommittedFile]
"""Files by their path relative to the checkpoint folder."""


class CheckpointRecord(SealedRecord, Generic[About]):
    """Content of checkpoint.json."""

    needs_digest: ClassVar[bool] = True

    format: Literal[3]
    update: int
    world_size: int
    """Number of ranks that wrote it."""
    attempt: Annotated[str, Field(pattern="^[0-9a-z]+$")]
    """Folder of the ranks' files: a name, not a path."""
    about: About
    """The trainer's description of the run. Readers get it without opening the tensors."""
    files: Files


@dataclass(frozen=True)
class Checkpoint(Generic[About]):
    """A committed checkpoint."""

    url: str
    record: CheckpointRecord[About]

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]

    @property
    def update(self) -> int:
        return self.record.update

    @property
    def about(self) -> About:
        return self.record.about

    @property
    def data(self) -> str:
        """Folder of the ranks' files."""
        return objects.join(self.url, self.record.attempt)

    @property
    def data_files(self) -> Files:
        """The ranks' files by name, without the folder."""
        return {path.removeprefix(f"{self.record.attempt}/"): file for path, file in self.record.files.items()}


def name_of(update: int) -> str:
    """Name of the folder of the checkpoint of an update."""
    return f"update_{update:08d}"


def is_name(name: str) -> bool:
    """Whether `name_of` gives this name. What people put beside the checkpoints, such as a copy update_00000500_best, is not
    ours to use or to delete."""
    return NAME.fullmatch(name) is not None


def read_checkpoint(url: str, about: type[About]) -> Checkpoint[About]:
    """Read the commit of the checkpoint at `url`.

    Raises:
        DataError: the commit is missing, damaged, or that of another update than the folder's name says.
        OtherFormat: the commit was written by another version.
    """
    checkpoint = Checkpoint(url, read_record(CheckpointRecord[about], objects.join(url, COMMIT_FILE)))  # type: ignore[valid-type]
    if checkpoint.name != name_of(checkpoint.update):
        raise DataError(f"{url}/{COMMIT_FILE} is the commit of {name_of(checkpoint.update)}, expected {checkpoint.name}")
    return checkpoint


def damage_of(checkpoint: Checkpoint[About], file: str) -> str | None:
    """Compare a file with the commit. Returns how it differs, or None."""
    url, expected = objects.join(checkpoint.url, file), checkpoint.record.files[file]
    try:
        problem = damage_of_sizes(checkpoint, {url: objects.size(url)}, [file])
        if problem is None:
            deque(verified_pieces(url, expected), maxlen=0)
    except FileNotFoundError:
        return f"{file} is missing"
    except Damaged as error:
        return str(error)
    return problem


def damage_of_sizes(checkpoint: Checkpoint[About], sizes: Mapping[str, int], files: Iterable[str]) -> str | None:
    """Compare the sizes in a listing, by url, with the commit. Returns how a file differs, or None."""
    for file in files:
        size, expected = sizes.get(objects.join(checkpoint.url, file)), checkpoint.record.files[file].bytes
        if size != expected:
            return f"{file} is missing" if size is None else f"{file} has {size} bytes, expected {expected}"
    return None
