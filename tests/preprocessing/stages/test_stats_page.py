"""The HTML page of `stats`, in a real browser."""

from pathlib import Path

import pytest
from PIL import Image

from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from preprocessing.configs import StatsConfig
from preprocessing.stages import encode, stats
from preprocessing.stages.stats_page import page_of_raw
from tests.conftest import S3
from tests.preprocessing.conftest import N_IMAGES, World
from tests.support.browser import NEEDS_CHROMIUM, browser_page
from tests.support.fault_proxy import FaultProxy


@NEEDS_CHROMIUM
def test_the_page_shows_what_the_summary_says_and_needs_no_other_file(world: World, tmp_path: Path) -> None:
    out = str(tmp_path / "tokens")
    encode.run(world.config(out))
    found = stats.run(StatsConfig(root=out, images=5)).summary
    raw = stats.run(StatsConfig(root=world.raw, page=str(tmp_path / "raw.html"), images=7)).summary
    for summary, n_images, n_charts in ((found, 5, 2), (raw, 7, 1 if raw["dropped"] else 0)):
        text = Path(str(summary["page"])).read_text(encoding="utf-8")
        assert "http" not in text and "<script" not in text, "nothing is loaded from elsewhere"
        with browser_page() as page:
            page.goto(Path(str(summary["page"])).as_uri())
            told = page.inner_text("table")
            assert f"{summary['bytes']:,}" in told and str(summary["fingerprint"]) in told
            assert page.locator("figure img").count() == n_images
            assert page.locator("img.chart").count() == n_charts
            assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert found["samples"]["train"] + found["samples"]["validation"] == N_IMAGES


def test_a_page_without_images_and_where_it_goes(world: World, any_root: str) -> None:
    summary = stats.run(StatsConfig(root=world.raw, page=f"{any_root}/page.html", images=0)).summary
    assert summary["page"] == f"{any_root}/page.html"
    assert "<figure>" not in objects.read_bytes(f"{any_root}/page.html").decode()


def test_what_captions_hold_is_shown_as_text() -> None:
    text = page_of_raw({"root": "<b>", "n": 1}, {}, [(Image.new("RGB", (3, 2)), "<script>alert(1)</script>")])
    assert "<script>" not in text and "&lt;script&gt;" in text and "<b>" not in text


@pytest.mark.s3
def test_where_nothing_may_be_written_or_decoded_there_are_numbers(
    world: World, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = f"{s3.url}/tokens"
    encode.run(world.config(out))
    objects.delete(f"{out}/dvae.safetensors")
    with FaultProxy(s3.server.endpoint, every=1_000_000, read_only=True) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        summary = stats.run(StatsConfig(root=out)).summary
        assert summary["page"] is None and summary["samples"]["train"] > 0
        assert "set stats.page to another location" in caplog.text and "dvae.safetensors" in caplog.text
        with pytest.raises(DataError, match=r"cannot be written to .*/page.html: not allowed to write"):
            stats.run(StatsConfig(root=out, page=f"{out}/page.html"))
        summary = stats.run(StatsConfig(root=out, page=str(tmp_path / "page.html"))).summary
    assert "<figure>" not in Path(str(summary["page"])).read_text(encoding="utf-8")
