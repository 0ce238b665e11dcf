"""Build the web pages of the paper's human evaluation (figure 7, appendix F): two images of one caption, two questions."""

import base64
import io
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from dalle_ds.errors import DataError
from dalle_ds.evaluation.image_sets import Entry, ImageSet, decode, open_images
from dalle_ds.evaluation.usable_images import require_usable, survey
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import fingerprint

KEY = "key.json"
SIDES = ("ours", "theirs")


def build_pages(
    ours: str | Path, theirs: str | Path, out: Path, *, limit: int = 1000, per_page: int = 100, seed: int = 0
) -> dict[str, Any]:
    """Write pages to vote on, and key.json, which records the left image of each pair.

    Each page is one HTML file that needs no network. A task is a caption with the first image of each set; in reranked samples,
    the first image is the best. The order of tasks and the sides are random by `seed`. Give each page to as many voters as
    votes are needed, five in the paper. The key stays with the person who counts the votes.

    Args:
        ours: images with captions, a source as in `image_sets.open_images`.
        theirs: images of the other model, a source as in `image_sets.open_images`.
        limit: maximum number of tasks; the paper has 1000.
        per_page: tasks per page.

    Returns:
        The summary: numbers of tasks and pages, and numbers of captions that only one set has.

    Raises:
        DataError: no caption is in both sets; or images have no caption or cannot be read, all of which the message lists.
    """
    surveys = [survey(open_images(source, follow_links=False), needs_caption=True) for source in (ours, theirs)]
    require_usable(surveys, 0.0)
    sets = [_by_caption(one.images) for one in surveys]
    shared = [caption for caption in sets[0] if caption in sets[1]]
    if not shared:
        raise DataError(f"{ours} and {theirs} share no caption: they have {len(sets[0])} and {len(sets[1])} captions")
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


def _by_caption(images: ImageSet) -> dict[str, Entry]:
    """Returns the first image of each caption."""
    found: dict[str, Entry] = {}
    for entry in images:
        found.setdefault(str(entry.caption), entry)
    return found


def _pages(tasks: list[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    for name in dict.fromkeys(task["page"] for task in tasks):
        yield [task for task in tasks if task["page"] == name]


def _shown(task: dict[str, str], sets: list[dict[str, Entry]]) -> dict[str, Any]:
    order = sets if task["left"] == SIDES[0] else sets[::-1]
    images = [_data_url(images[task["caption"]]) for images in order]
    return {"task": task["task"], "caption": task["caption"], "images": images}


def _data_url(entry: Entry) -> str:
    # encode all images again in the same way: the format or metadata of a file must not reveal its model
    buffer = io.BytesIO()
    decode(entry).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _html(content: dict[str, Any]) -> str:
    page = files("dalle_ds.evaluation").joinpath("human_page.html").read_text(encoding="utf-8")
    # in a <script> element, only "<" can end the data early
    return page.replace("STUDY_JSON", json.dumps(content).replace("<", "\\u003c"))
