"""Records: metadata that is stored as JSON, with a format number, and with a digest where readers trust it."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from dalle_ds.errors import DataError
from dalle_ds.recipes import canonical_json
from dalle_ds.storage import objects

DIGEST = "digest"
"""Key of a sealed record: SHA-256 of all its other keys and values."""


class Record(BaseModel):
    """Base class of frozen records that are stored as JSON. Unknown fields, as added by a later version, are ignored."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        populate_by_name=True,
        serialize_by_alias=True,
        ser_json_inf_nan="strings",  # JSON has no inf and nan
    )

    def to_json(self) -> bytes:
        return self.model_dump_json(exclude_none=True, indent=1).encode()


class SealedRecord(Record):
    """A record whose JSON carries a digest of itself, so that a reader notices a single changed bit."""

    needs_digest: ClassVar[bool] = False
    """Whether JSON without a digest is damaged. False for records that earlier versions wrote without one: if a changed bit
    hides the name of the digest, all other values are still right."""

    def to_json(self) -> bytes:
        return seal(json.loads(super().to_json()))


class OtherFormat(DataError):
    """This version does not read the record's format."""


def path_below(path: str) -> str:
    """Returns `path`. Raises ValueError if it does not name something below a folder."""
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"{path[:200]!r}: expected a path below the folder of the data, without ..")
    return path


PathBelow = Annotated[str, AfterValidator(path_below)]
"""Type of a field that names something below the folder of a record. The record may come from somebody else: with ../ in it,
readers would read, and writers that copy its names would write, outside of that folder."""

R = TypeVar("R", bound=Record)


def seal(tree: dict[str, Any]) -> bytes:
    """The JSON of `tree` with its digest."""
    return json.dumps({**tree, DIGEST: _digest(tree)}, indent=1).encode()


def unseal(data: bytes, url: str | Path) -> dict[str, Any]:
    """Read JSON that `seal` made, or JSON of an earlier version without a digest. Returns it without its digest.

    Raises:
        DataError: the bytes are not a JSON object, or not the ones that were written.
    """
    _require_digest(data, url)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{url} is damaged: {error}") from None
    if not isinstance(tree, dict):
        raise DataError(f"{url} is damaged: it is not a JSON object")
    tree.pop(DIGEST, None)
    return tree


def read_record(record_class: type[R], url: str | Path) -> R:
    """Read the record at `url`.

    Raises:
        DataError: the record is missing or damaged.
        OtherFormat: the record has another format.
    """
    try:
        data = objects.read_bytes(url)
    except OSError as error:
        raise DataError(f"{url} cannot be read: {error}") from None
    return parse(record_class, data, url)


def parse(record_class: type[R], data: bytes, url: str | Path) -> R:
    """Parse and validate JSON bytes; `url` is for messages.

    Raises:
        DataError: the bytes are not a valid record, or not the ones that were written. The message names the problems.
        OtherFormat: the record has another format.
    """
    sealed = issubclass(record_class, SealedRecord)
    has_digest = _require_digest(data, url) if sealed else False
    name = record_class.__name__.partition("[")[0]
    try:
        record = record_class.model_validate_json(data)
    except ValidationError as error:
        # a record with another format and without a digest is of an earlier version: one changed bit cannot cause both
        if any(problem["loc"] == ("format",) and problem["type"] != "missing" for problem in error.errors()):
            raise OtherFormat(f"{url} was written by another version of dalle_ds: {_explain(error)}") from None
        raise DataError(f"{url}: not a valid {name}: {_explain(error)}") from None
    if sealed and record_class.needs_digest and not has_digest:
        raise DataError(f"{url}: not a valid {name}: it lacks {DIGEST}")
    return record


def _require_digest(data: bytes, url: str | Path) -> bool:
    """Whether the JSON carries a digest. Raises DataError if the digest is not that of the other values."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return False  # the caller tells what is wrong with the JSON
    if not isinstance(tree, dict) or DIGEST not in tree:
        return False
    expected = tree.pop(DIGEST)
    if _digest(tree) != expected:
        raise DataError(f"{url} has changed since it was written: its content does not have the digest {expected}")
    return True


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(tree).encode()).hexdigest()


def _explain(error: ValidationError) -> str:
    problems = error.errors()
    lacking = [".".join(map(str, problem["loc"])) for problem in problems if problem["type"] == "missing"]
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    told = [(".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")) for problem in problems]
    more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
    return "; ".join(f"{place or 'as a whole'}: {message}" for place, message in told[:3]) + more
