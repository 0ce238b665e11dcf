"""Where the captions of a sampling run come from: options, a file, standard input, or the validation split."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.sampling.export import Export
from dalle_ds.sampling.held_out import choose_held_out

STDIN = Path("-")


@dataclass(frozen=True)
class SampleSource:
    """Where captions come from, exactly one of the first three (none will do for a given picture); and the given picture."""

    captions: Sequence[str] = ()
    captions_file: Path | None = None
    """`STDIN` reads standard input."""
    n_held_out: int = 0
    data_url: str | None = None
    image: Path | None = None
    rows: int | None = None

    def check(self) -> None:
        """Raises ConfigError."""
        n_sources = sum((bool(self.captions), self.captions_file is not None, self.n_held_out > 0))
        if n_sources > 1 or (n_sources == 0 and self.image is None):
            raise ConfigError("captions come from exactly one of --caption, --captions and --validation")
        if self.rows is not None and self.image is None:
            raise ConfigError(f"--rows {self.rows} says how much of a picture is kept: give it by --image")

    def read(self, export: Export, seed: int) -> tuple[list[str], Tensor | None, dict[str, Any]]:
        """Captions, codes of their real pictures where there are some, and what the record says about them."""
        if self.n_held_out:
            held_out = choose_held_out(export, self.n_held_out, data_url=self.data_url, seed=seed)
            return held_out.captions, held_out.image_SN, {"held_out_keys": held_out.keys}
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
