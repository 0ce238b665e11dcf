"""The words of scenes, with what each of them looks like, and the combinations that training never sees."""

from typing import Final

SHAPES: Final = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")

COLOURS: Final = {
    "red": (212, 22, 42),
    "orange": (246, 122, 0),
    "yellow": (251, 222, 36),
    "green": (36, 162, 66),
    "blue": (30, 88, 228),
    "purple": (150, 44, 166),
    "pink": (252, 128, 198),
    "black": (22, 22, 28),
}
"""sRGB. From each other and from every ground 100 or more apart, 40 or more in CIELAB: a lossy codebook keeps them."""

SIZES: Final = {"small": 0.145, "large": 0.205}
"""Radius as a share of the image's side: 4.6 and 6.6 pixels of 32, where four large objects lie two or three pixels apart."""

COUNTS: Final = {"one": 1, "two": 2, "three": 3, "four": 4}

# Where the first object lies, seen from the second: steps right and down.
RELATIONS: Final = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}

OPPOSITES: Final = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

ZERO_SHOT_COLOURS: Final = frozenset(
    {
        ("blue", "circle"),
        ("purple", "square"),
        ("green", "triangle"),
        ("yellow", "star"),
        ("red", "heart"),
        ("pink", "cross"),
        ("orange", "ring"),
        ("black", "moon"),
    }
)
"""Pairs of colour and shape that training never sees: each shape lacks one colour, and each colour one shape."""

ZERO_SHOT_COMPANIONS: Final = frozenset(
    {
        frozenset({"circle", "square"}),
        frozenset({"heart", "star"}),
        frozenset({"triangle", "ring"}),
        frozenset({"cross", "moon"}),
    }
)
"""Pairs of shapes that training never sees in one image."""

GROUNDS: Final = {
    "white": (252, 252, 250),
    "cream": (253, 246, 226),
    "sky": (226, 240, 252),
    "mint": (226, 246, 234),
    "lilac": (241, 233, 251),
    "grey": (237, 238, 240),
}
"""sRGB of the pale colours behind the objects; captions do not name them."""

TEXTURES: Final = ("plain", "stripes", "checks", "dots")
