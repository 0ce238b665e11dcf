"""The page of the paper's human evaluation (figure 7, appendix F): two images of one caption, two questions."""

import base64
import io
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from dalle_ds.errors import DataError
from dalle_ds.evaluation.image_sets import Entry, decode, open_images
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import fingerprint

KEY = "key.json"
SIDES = ("ours", "theirs")


def build_pages(
    ours: str | Path, theirs: str | Path, out: Path, *, limit: int = 1000, per_page: int = 100, seed: int = 0
) -> dict[str, Any]:
    """Pages to vote on, one HTML file each that needs no network, and key.json, which tells whose image is where.

    A task is a caption with the first image of either set, which is the best where samples were reranked. The order of tasks
    and the sides are drawn by `seed`. Each page is for as many people as votes are wanted, five in the paper; the key stays
    with whoever tallies.

    Args:
        ours, theirs: images with captions, as `image_sets.open_images` takes them.
        limit: tasks in all; the paper has 1000. per_page: on one page.

    Returns:
        The summary: tasks, pages, captions that only one side has.

    Raises:
        DataError: no caption is in both sets, or an image can't be read.
    """
    sets = [_by_caption(source) for source in (ours, theirs)]
    shared = [caption for caption in sets[0] if caption in sets[1]]
    if not shared:
        raise DataError(f"{ours} and {theirs}: no caption with an image in both, of {len(sets[0])} and {len(sets[1])}")
    rng = np.random.default_rng(seed)
    captions = [shared[i] for i in rng.permutation(len(shared))[:limit]]
    lefts = [SIDES[i] for i in rng.integers(2, size=len(captions))]
    tasks = [
        {"task": f"t{number:04d}", "caption": caption, "left": left, "page": f"page-{number // per_page:03d}"}
        for number, (caption, left) in enumerate(zip(captions, lefts, strict=True))
    ]
    marks = {
        f"{side}/{task['task']}": images[task["caption"]].data
        for side, images in zip(SIDES, sets, strict=True)
        for task in tasks
    }
    study = fingerprint({"tasks": tasks}, marks)
    out.mkdir(parents=True, exist_ok=True)
    for page in _pages(tasks):
        shown = [_shown(task, sets) for task in page]
        content = {"study": study, "page": page[0]["page"], "tasks": shown}
        objects.write_bytes(out / f"{page[0]['page']}.html", _html(content).encode())
    key = {"schema": 1, "study": study, "seed": seed, "ours": str(ours), "theirs": str(theirs), "tasks": tasks}
    objects.write_bytes(out / KEY, json.dumps(key, indent=1, ensure_ascii=False).encode())
    unshared = [len(images) - len(shared) for images in sets]
    summary = {"out": str(out), "study": study, "tasks": len(tasks), "pages": len(list(_pages(tasks)))}
    return {**summary, "only_ours": unshared[0], "only_theirs": unshared[1]}


def _by_caption(source: str | Path) -> dict[str, Entry]:
    """The first image of each caption. A DataError where an image has none."""
    found: dict[str, Entry] = {}
    for entry in open_images(source):
        if not entry.caption:
            raise DataError(f"{source}: image {entry.key} has no caption; people are asked which image matches it")
        found.setdefault(entry.caption, entry)
    return found


def _pages(tasks: list[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    for name in dict.fromkeys(task["page"] for task in tasks):
        yield [task for task in tasks if task["page"] == name]


def _shown(task: dict[str, str], sets: list[dict[str, Entry]]) -> dict[str, Any]:
    order = sets if task["left"] == SIDES[0] else sets[::-1]
    images = [_data_url(images[task["caption"]]) for images in order]
    return {"task": task["task"], "caption": task["caption"], "images": images}


def _data_url(entry: Entry) -> str:
    # encoded again, all alike: a file's format or metadata must not tell whose it is
    buffer = io.BytesIO()
    decode(entry).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _html(content: dict[str, Any]) -> str:
    page = files("dalle_ds.evaluation").joinpath("human_page.html").read_text(encoding="utf-8")
    # in a <script> element nothing but "<" can end the data early
    return page.replace("STUDY_JSON", json.dumps(content).replace("<", "\\u003c"))
