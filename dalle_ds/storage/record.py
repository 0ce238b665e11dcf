"""Records: metadata that is stored as JSON, with a format number."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dalle_ds.errors import DataError
from dalle_ds.storage import objects


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


class OtherFormat(DataError):
    """This version does not read the record's format."""


R = TypeVar("R", bound=Record)


def read_record(record_class: type[R], url: str | Path) -> R:
    """Read the record at `url`.

    Raises:
        DataError: the record is missing or damaged.
        OtherFormat: the record has another format.
    """
    try:
        return record_class.model_validate_json(objects.read_bytes(url))
    except OSError as error:
        raise DataError(f"{url} cannot be read: {error}") from None
    except ValidationError as error:
        if any(problem["loc"] == ("format",) and problem["type"] != "missing" for problem in error.errors()):
            raise OtherFormat(f"{url} was written by another version of dalle_ds: {_explain(error)}") from None
        raise DataError(f"{url} is not a valid record of this version: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    problems = error.errors()
    lacking = [".".join(map(str, problem["loc"])) for problem in problems if problem["type"] == "missing"]
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    return "; ".join(f"{'.'.join(map(str, problem['loc'])) or 'as a whole'}: {problem['msg']}" for problem in problems[:3])
