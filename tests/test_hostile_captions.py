"""Captions of strangers on our pages, in a real browser: no script of theirs runs, and nothing is asked for elsewhere."""

import json
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page

from dalle_ds.evaluation.human_page import build_pages
from preprocessing.stages.stats_page import page_of_raw
from tests.support.browser import NEEDS_CHROMIUM, browser_page

ELSEWHERE = "http://elsewhere.invalid/x"
OWN = "window.owned=1"
CAPTIONS = [
    f"<script>{OWN}</script>",
    f"</script><script>{OWN}</script>",
    f"</textarea></title></style></table><script>{OWN}</script>",
    f"<img src=x onerror={OWN}>",
    f"<svg/onload={OWN}>",
    f'" autofocus onfocus={OWN} x="',
    f"' onmouseover='{OWN}",
    f"<a href='javascript:{OWN}'>a</a>",
    f"<iframe srcdoc='<script>parent.{OWN}</script>'></iframe>",
    f"<img src={ELSEWHERE}><link rel=stylesheet href={ELSEWHERE}><script src={ELSEWHERE}></script>",
    f"<style>@import '{ELSEWHERE}';</style><meta http-equiv=refresh content='0;url={ELSEWHERE}'>",
    f"<!--><script>{OWN}</script>-->",
    f"<![CDATA[<script>{OWN}</script>]]>",
    f"\\u003cscript\\u003e{OWN}\\u003c/script\\u003e",
    f"${{{OWN}}} {{{{{OWN}}}}} `+{OWN}+` ';{OWN};' \";{OWN};\"",
    f"\u2028{OWN}\u2029//",
    f"&lt;script&gt;{OWN}&lt;/script&gt;",
]


def look_at(page: Page, file: Path) -> list[str]:
    """Open a page. Returns the urls that it asked for, besides its own and data in it."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_load_state("networkidle")
    assert page.evaluate("window.owned") is None, "a script ran"
    return [url for url in asked if url != file.as_uri() and not url.startswith("data:")]


@NEEDS_CHROMIUM
def test_the_page_of_stats(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    told = {"root": CAPTIONS[0], CAPTIONS[3]: CAPTIONS[9]}
    text = page_of_raw(told, {CAPTIONS[4]: 3}, [(image, caption) for caption in CAPTIONS])
    (tmp_path / "stats.html").write_text(text, encoding="utf-8")
    with browser_page() as page:
        assert look_at(page, tmp_path / "stats.html") == []
        shown = page.inner_text("body")
        for caption in CAPTIONS:
            assert "".join(caption.split()) in "".join(shown.split()), "a caption is shown as it is"


@NEEDS_CHROMIUM
def test_the_page_for_voters(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        images = [{"file": f"{number}.png", "caption": caption} for number, caption in enumerate(CAPTIONS)]
        for image in images:
            Image.new("RGB", (16, 16)).save(tmp_path / name / image["file"])
        (tmp_path / name / "samples.json").write_text(json.dumps({"images": images}))
    build_pages(tmp_path / "ours", tmp_path / "theirs", tmp_path / "pages")
    shown = set()
    with browser_page() as page:
        assert look_at(page, tmp_path / "pages" / "page-000.html") == []
        page.get_by_label("Your name").fill(CAPTIONS[1])
        page.get_by_role("button", name="Begin").click()
        for _ in CAPTIONS:
            shown.add(page.evaluate("document.getElementById('caption').textContent"))
            for question in (0, 1):
                page.get_by_role("group").nth(question).get_by_label("Image 1").check()
            page.get_by_role("button", name="Next").click()
        assert page.evaluate("window.owned") is None, "a script ran"
    assert shown == set(CAPTIONS), "a caption is shown as it is"
