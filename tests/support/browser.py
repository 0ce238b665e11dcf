"""A real browser for the project's web pages: Debian's Chromium, headless, driven by playwright."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)")


@contextmanager
def browser_page(width: int = 1280, height: int = 900, harmless: Sequence[str] = ()) -> Iterator[Page]:
    """Yields a page in a new browser. If its console or scripts report an error, the test fails at the end; errors that contain
    one of `harmless` are ignored."""
    complaints: list[str] = []
    with sync_playwright() as playwright:
        # as root, for example in a container, Chromium only starts without its sandbox
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height}, accept_downloads=True)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        try:
            yield page
        finally:
            browser.close()
    complaints = [complaint for complaint in complaints if not any(part in complaint for part in harmless)]
    assert not complaints, complaints
