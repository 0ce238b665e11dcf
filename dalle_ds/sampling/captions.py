"""Sources of the captions of a sampling run: options, a file, standard input, or the validation split."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.sampling.export import Export
from dalle_ds.sampling.validation_samples import choose_validation
from dalle_ds.storage.bounded import read_bounded
from dalle_ds.storage.text import decode_text, lines_of

STDIN = Path("-")


@dataclass(frozen=True)
class SampleSource:
    """Source of captions: exactly one of `captions`, `captions_file` and `n_validation`; with an image prompt, one or none."""

    captions: Sequence[str] = ()
    captions_file: Path | None = None
    """File with one caption per line. `STDIN` reads standard input."""
    n_validation: int = 0
    data_url: str | None = None
    image_prompt: Path | None = None
    prompt_rows: int | None = None

    def check(self) -> None:
        """Raises ConfigError if the sources of captions or the image prompt options do not fit together."""
        n_sources = sum((bool(self.captions), self.captions_file is not None, self.n_validation > 0))
        if n_sources > 1 or (n_sources == 0 and self.image_prompt is None):
            raise ConfigError("expected exactly one of --caption, --captions and --validation")
        if self.prompt_rows is not None and self.image_prompt is None:
            raise ConfigError(f"--prompt-rows {self.prompt_rows} without --image-prompt: expected both")
        if self.image_prompt is not None and not self.image_prompt.is_file():
            what = "not a regular file" if self.image_prompt.exists() else "no such file"
            raise DataError(f"image {self.image_prompt} cannot be read: {what}")

    @cached_property
    def texts(self) -> list[str]:
        """The captions of options, of the file or of standard input, which can be read once. Empty for the validation split.

        Raises:
            DataError: the captions cannot be read, or are not UTF-8.
        """
        if self.captions_file == STDIN:
            return captions_of(_read_stdin(), "standard input")
        if self.captions_file is not None:
            return read_captions(self.captions_file)
        for caption in self.captions:
            if any("\ud800" <= letter <= "\udfff" for letter in caption):  # stands for a byte that is not UTF-8
                raise DataError(f"--caption {ascii(caption)[:200]} is not UTF-8; expected text in UTF-8")
        return list(self.captions)

    def read_texts(self) -> None:
        """Read the captions now, so that a file that cannot be read is told before the model is loaded. Raises as `texts`."""
        _ = self.texts

    def read(self, export: Export, seed: int) -> tuple[list[str], Tensor | None, dict[str, Any]]:
        """Returns the captions, the codes (C, N) of their real images or None, and further entries for samples.json.

        Only captions of the validation split have real images.
        """
        if self.n_validation:
            validation = choose_validation(export, self.n_validation, data_url=self.data_url, seed=seed)
            return validation.captions, validation.image_SN, {"validation_keys": validation.keys}
        return self.texts or [""], None, {}


def read_captions(path: Path) -> list[str]:
    """Read one caption per line, skipping empty lines. Raises DataError if the file cannot be read or has no caption."""
    try:
        return captions_of(decode_text(read_bounded(path)), f"captions file {path}")
    except OSError as error:
        raise DataError(f"captions file {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"captions file {path} is not UTF-8: {error}") from None


def _read_stdin() -> str:
    try:
        return decode_text(read_bounded(sys.stdin.buffer))
    except OSError as error:
        raise DataError(f"standard input cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8: {error}") from None


def captions_of(text: str, source: str) -> list[str]:
    """Split a text into one caption per line, skipping empty lines. Raises DataError if there is none; it names `source`."""
    captions = [line.strip() for line in lines_of(text)]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise DataError(f"{source} contains no caption; expected one per line")
    return captions
