"""launchers/combine.ipynb runs from its first cell to its last: on a small export, and on artists whose answer is known."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import dalle_ds
from dalle_ds.scenes.meaning import Meaning
from dalle_ds.scenes.render import render
from dalle_ds.scenes.scene import scene_of
from dalle_ds.scenes.score import require_meaning
from tests.sampling.exports import make_export
from tests.support import launching

NOTEBOOK = launching.ROOT / "launchers" / "combine.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_notebook() -> None:
    """Run all code cells in one namespace, as a notebook does."""
    namespace: dict[str, object] = {}
    for n, cell in enumerate(code_cells()):
        exec(compile(cell, f"combine.ipynb, cell {n}", "exec"), namespace)


class Artist:
    """Stands in for a model: draws what `reading` makes of a caption."""

    def __init__(self, reading: Callable[[Meaning, int], Meaning]) -> None:
        self.reading = reading

    def sample(self, captions: list[str], *, n: int, seed: int, temperature: float) -> list[list[SimpleNamespace]]:
        rng = np.random.default_rng(seed)
        scenes = [[scene_of(self.reading(require_meaning(c), k), rng) for k in range(n)] for c in captions]
        return [[SimpleNamespace(image=Image.fromarray(render(scene, 32))) for scene in row] for row in scenes]


def swap_colours(meaning: Meaning) -> Meaning:
    if len(meaning.wanted) == 1:
        return meaning
    one, other = meaning.wanted
    return Meaning((replace(one, colour=other.colour), replace(other, colour=one.colour)), meaning.relation)


@pytest.mark.parametrize(
    "reading, answer, right",
    [
        (lambda meaning, k: meaning, "yes", ["100%", "100%", "100%", "0%"]),
        (lambda meaning, k: swap_colours(meaning) if k % 2 else meaning, "no", ["100%", "100%", "50%", "50%"]),
        (lambda meaning, k: Meaning(meaning.wanted[: 1 + (k % 2)]), "sometimes", ["100%", "100%", "50%", "0%"]),
        (lambda meaning, k: swap_colours(meaning), "no", ["100%", "100%", "0%", "100%"]),
        (lambda meaning, k: require_meaning("a red moon"), "cannot be said", ["0%", "0%", "0%", "0%"]),
    ],
    ids=["draws what is asked", "mixes colours up", "draws both now and then", "swaps colours", "draws one thing only"],
)
def test_the_answer_for_artists_that_are_known(reading, answer, right, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dalle_ds, "load", lambda url: Artist(reading), raising=False)
    run_notebook()
    printed = capsys.readouterr().out
    assert re.search(rf"Does it combine 'a purple heart' and 'a green star'\? {answer}", printed)
    assert re.findall(r"^ *(\d+%) \(", printed, re.MULTILINE) == right
    assert "a purple heart and a green star: zero_shot" in printed
    assert Image.open("does_it_combine.png").width > 1000


def test_it_runs_on_an_export(monkeypatch, tmp_path, capsys):
    make_export(tmp_path / "runs" / "demo", n_samples=16, n_validation=4, grid=16)
    monkeypatch.chdir(tmp_path)
    run_notebook()
    assert "cannot be said" in capsys.readouterr().out, "an untrained prior"
