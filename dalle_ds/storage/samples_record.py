"""samples.json: the record in a folder of samples. It may come from somebody else, so it is checked before use."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, FiniteFloat

from dalle_ds.errors import DataError
from dalle_ds.storage.record import R, Record, read_record


def _name(value: str) -> str:
    if value in ("", ".", "..") or any(character in value for character in "/\\\0"):
        raise ValueError(f"{value[:200]!r}: expected the name of a file beside the record, not a path")
    return value


FileName = Annotated[str, AfterValidator(_name)]
"""Type of a field that names a file beside its record."""
Count = Annotated[int, Field(ge=0, le=2**31)]


class NamedImage(Record):
    """An image and its caption: all that is read of the record of another model's samples."""

    file: FileName
    caption: str


class NamedImages(Record):
    images: tuple[NamedImage, ...] = Field(min_length=1)

    def files(self, record_file: Path) -> dict[str, Path]:
        """Returns the path of each image by its name.

        Raises:
            DataError: images are missing, or are links: a link may lead to files that the record's author must not see.
        """
        paths = {image.file: record_file.parent / image.file for image in self.images}
        linked = [name for name, path in paths.items() if path.is_symlink()]
        missing = [name for name, path in paths.items() if not path.is_file()]
        for what, names in (("links", linked), ("missing", missing)):
            if names:
                raise DataError(f"{record_file} names {len(paths)} images, of which {len(names)} are {what}: {_some(names)}")
        return paths


class SampledImage(NamedImage):
    row: Count
    candidate: Count
    seed: int
    score: FiniteFloat | None = None


class PromptRecord(Record):
    sha256: str
    rows: Count
    codes: tuple[Count, ...]


class SamplesRecord(NamedImages):
    """The fields by which images are reproduced or compared. `settings` are those of `SamplingConfig`."""

    export_fingerprint: str
    dvae: str
    settings: dict[str, Any]
    captions: tuple[str, ...] = Field(min_length=1)
    images: tuple[SampledImage, ...] = Field(min_length=1)  # type: ignore[assignment]
    scorer: str | None = None
    scorer_name: str | None = None
    scores: tuple[tuple[FiniteFloat | None, ...], ...] | None = None
    image_prompt: PromptRecord | None = None
    dtype: Literal["fp16"] | None = None
    """Format of the prior's residual branches. None: fp32."""


def read_samples_record(file: Path) -> SamplesRecord:
    """Read the record of `dalle-ds sample`.

    Raises:
        DataError: the file is missing or is not such a record, or its parts contradict each other.
    """
    record = _read(SamplesRecord, file)
    n, n_captions = record.settings.get("n"), len(record.captions)
    for image in record.images:
        if image.row >= n_captions or record.captions[image.row] != image.caption:
            raise DataError(f"{file}: image {image.file} is of caption {image.row}, which is another or none of {n_captions}")
        if not isinstance(n, int) or image.candidate >= n:
            raise DataError(f"{file}: image {image.file} is candidate {image.candidate} of {n}: expected less")
    if len({(image.row, image.candidate) for image in record.images}) < len(record.images):
        raise DataError(f"{file}: an image occurs twice; expected each caption's candidates once")
    scores = record.scores
    if scores is not None and (len(scores) != n_captions or any(len(row) != n for row in scores)):
        raise DataError(f"{file}: its scores do not fit {n_captions} captions with {n} candidates each")
    return record


def read_named_images(file: Path) -> NamedImages:
    """Read only names and captions of the images of a samples.json, which may be of another model.

    Raises:
        DataError: the file is missing or is not such a record.
    """
    return _read(NamedImages, file)


def _read(record_class: type[R], file: Path) -> R:
    try:
        return read_record(record_class, file)
    except DataError as error:
        said = str(error).removeprefix(f"{file}").lstrip(": ")
        raise DataError(f"{file} is not a record of samples ({said}); `dalle-ds sample` writes one") from None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
