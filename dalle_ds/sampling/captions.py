"""Where the captions of a sampling run come from: options, a file, standard input, or the validation split."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.sampling.export import Export
from dalle_ds.sampling.validation_samples import choose_validation

STDIN = Path("-")


@dataclass(frozen=True)
class SampleSource:
    """Where captions come from, exactly one of the first three, or none beside an image prompt."""

    captions: Sequence[str] = ()
    captions_file: Path | None = None
    """`STDIN` reads standard input."""
    n_validation: int = 0
    data_url: str | None = None
    image_prompt: Path | None = None
    prompt_rows: int | None = None

    def check(self) -> None:
        """Raises ConfigError."""
        n_sources = sum((bool(self.captions), self.captions_file is not None, self.n_validation > 0))
        if n_sources > 1 or (n_sources == 0 and self.image_prompt is None):
            raise ConfigError("captions come from exactly one of --caption, --captions and --validation")
        if self.prompt_rows is not None and self.image_prompt is None:
            raise ConfigError(f"--prompt-rows {self.prompt_rows} without --image-prompt: expected both")

    def read(self, export: Export, seed: int) -> tuple[list[str], Tensor | None, dict[str, Any]]:
        """Captions, codes of their real images where there are some, and what the record says about them."""
        if self.n_validation:
            validation = choose_validation(export, self.n_validation, data_url=self.data_url, seed=seed)
            return validation.captions, validation.image_SN, {"validation_keys": validation.keys}
        if self.captions_file == STDIN:
            return captions_of(sys.stdin.read(), "standard input"), None, {}
        if self.captions_file is not None:
            return read_captions(self.captions_file), None, {}
        return list(self.captions) or [""], None, {}


def read_captions(path: Path) -> list[str]:
    """One caption a line; empty lines are skipped. Raises DataError where the file can't be read or holds none."""
    try:
        return captions_of(path.read_text(encoding="utf-8"), f"captions file {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"captions file {path}: {error}") from None


def captions_of(text: str, source: str) -> list[str]:
    """One caption a line; empty lines are skipped. Raises DataError where there is none."""
    captions = [line.strip() for line in text.splitlines()]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise DataError(f"{source} holds no caption; expected one a line")
    return captions
