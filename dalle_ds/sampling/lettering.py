"""Draw captions in any script: each letter in Pillow's own font, or else in an installed font that has it."""

import io
import logging
import unicodedata
from collections.abc import Iterable
from functools import cache, lru_cache

from PIL import ImageDraw, ImageFont

log = logging.getLogger(__name__)

PACKAGES = (
    (("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH"), "fonts-noto-cjk"),
    (("EMOJI", "FACE", "HEART"), "fonts-symbola"),
)
"""Parts of the Unicode names of letters, and Debian's package of fonts for them. So (symbols) have the package of emoji."""
OTHER_SCRIPTS = "fonts-noto-core"
LAST = ("bold", "italic", "oblique", "mono", "serif", "condensed", "black", "light")
"""Parts of the names of fonts that are used only if no other font has a letter."""
UNUSABLE = ("lastresort", "lastresorthe")
"""Fonts that draw a placeholder for every letter."""

_said: set[str] = set()


class Lettering:
    """A size of letters, in pixels. Runs of letters that one font has are drawn together, so that the font can join them."""

    def __init__(self, size: int) -> None:
        self.size = size

    def length(self, text: str) -> float:
        """Width of a line in pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def draw(self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, fill: tuple[int, int, int]) -> None:
        """Draw one line with its upper left corner at `place`."""
        x, y = place
        base = y + _font(None, self.size).getmetrics()[0]
        for font, run in self._runs(text):
            draw.text((x, base), run, fill=fill, font=font, anchor="ls")
            x += font.getlength(run)

    def _runs(self, text: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
        runs: list[tuple[str | None, str]] = []
        for letter in text:
            path = _path_for(letter) if _is_drawn(letter) else None
            if runs and (runs[-1][0] == path or not _is_drawn(letter)):  # what has no shape belongs to the letter before
                runs[-1] = (runs[-1][0], runs[-1][1] + letter)
            else:
                runs.append((path, letter))
        return [(_font(path, self.size), run) for path, run in runs]


def missing_letters(texts: Iterable[str]) -> str:
    """The different letters of `texts` that no font on this machine has."""
    letters = dict.fromkeys("".join(texts))
    return "".join(letter for letter in letters if _is_drawn(letter) and letter not in _own() and not _path_for(letter))


def advice(letters: str) -> str:
    """A message: which letters no font has, and which packages have such fonts."""
    packages = dict.fromkeys(map(_package, letters))
    shown = " ".join(letters[:10]) + (" ..." if len(letters) > 10 else "")
    return f"no installed font has {shown}: on grids they are empty boxes; apt-get install {' '.join(packages)}"


def say_missing_letters(texts: Iterable[str]) -> None:
    """Log a warning about letters that no font has, once per letter."""
    letters = "".join(letter for letter in missing_letters(texts) if letter not in _said)
    if letters:
        _said.update(letters)
        log.warning("%s", advice(letters))


def _package(letter: str) -> str:
    name = unicodedata.name(letter, "")
    found = next((package for parts, package in PACKAGES if any(part in name for part in parts)), None)
    return found or ("fonts-symbola" if unicodedata.category(letter) == "So" else OTHER_SCRIPTS)


def _is_drawn(letter: str) -> bool:
    """Whether a letter has a shape: not a control, a joiner, a variation selector, or a mark of direction."""
    return unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp") and not "\ufe00" <= letter <= "\ufe0f"


@lru_cache(maxsize=4096)
def _path_for(letter: str) -> str | None:
    """Path of an installed font with this letter. None: Pillow's own font, which has it, or no font has it."""
    if letter in _own():
        return None
    return next((path for path in _installed() if letter in _letters_of(path)), None)


@lru_cache(maxsize=64)
def _font(path: str | None, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


@lru_cache(maxsize=1)
def _own() -> frozenset[str]:
    return _letters_in(ImageFont.load_default(20).font_bytes)


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    from matplotlib import get_data_path
    from matplotlib.font_manager import findSystemFonts

    def order(path: str) -> tuple[int, str]:
        name = path.rpartition("/")[2].lower()
        return sum(part in name for part in LAST), path

    paths = [f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", *sorted(findSystemFonts(), key=order)]
    return tuple(path for path in paths if not any(part in path.lower().replace("-", "") for part in UNUSABLE))


@cache
def _letters_of(path: str) -> frozenset[str]:
    try:
        ImageFont.truetype(path, 20)  # fonts of bitmaps, such as Noto Color Emoji, have no other size than their own
        with open(path, "rb") as file:
            return _letters_in(file.read())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def _letters_in(data: bytes) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    return frozenset(map(chr, FT2Font(io.BytesIO(data)).get_charmap()))
