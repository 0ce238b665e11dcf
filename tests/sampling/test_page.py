"""The web page in a real browser, and its API as scripts call it."""

import logging
import shlex
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest
import requests
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Page

from dalle_ds.commands.serve import examples_of, run_link
from dalle_ds.data.tokens.dataset import TokenDataset
from dalle_ds.errors import ConfigError
from dalle_ds.sampling.export import load_export
from dalle_ds.sampling.request import Request
from dalle_ds.sampling.sampler import Sampler
from dalle_ds.sampling.scorer import load_scorer
from dalle_ds.sampling.serving import page as page_of_serve
from dalle_ds.sampling.serving.drawing import draw_rows
from dalle_ds.sampling.serving.page import _command, _request, build_page, launch_page
from dalle_ds.sampling.settings import PageLimitsConfig, PriorSamplingConfig, SamplingConfig
from dalle_ds.sampling.validation_samples import validation_of
from tests.sampling.exports import edit_config, make_export
from tests.support.browser import NEEDS_CHROMIUM, browser_page
from tests.support.clip_models import make_clip
from tests.support.launching import free_port

LIMITS = PageLimitsConfig(max_n=12, max_caption=40, max_upload_mb=0.1, max_upload_megapixels=1, max_waiting=30)


class Slow(Sampler):
    """A sampler that pauses after each row, and records its requests."""

    def __init__(self, *parts: object, pause: float = 0.0) -> None:
        super().__init__(*parts)
        self.pause, self.began, self.ended, self.active, self.most_at_once = pause, [], 0, 0, 0

    def draw(self, request, on_rows=None):
        def slowly(rows):
            on_rows(rows)
            time.sleep(self.pause)

        self.began.append(request.captions[0])
        self.active += 1
        self.most_at_once = max(self.most_at_once, self.active)
        try:
            found = super().draw(request, slowly)
            self.ended += 1
            return found
        finally:
            self.active -= 1


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Slow:
    folder = tmp_path_factory.mktemp("page")
    mlflow = {"uri": "http://127.0.0.1:5000", "run_id": "abc"}
    export = load_export(make_export(folder, n_samples=24, n_validation=8, mlflow=mlflow))
    return Slow(export, load_scorer(make_clip(folder / "clip")))


@pytest.fixture(scope="module")
def url(sampler: Slow) -> Iterator[str]:
    examples = [*examples_of(sampler.export), "x" * (LIMITS.max_caption + 1)]
    page, port = build_page(sampler, LIMITS, run_link(sampler.export, None), examples), free_port()
    launch_page(page, LIMITS, "127.0.0.1", port, block=False)
    yield f"http://127.0.0.1:{port}"
    page.close()


@pytest.fixture
def slowly(sampler: Slow) -> Iterator[Slow]:
    sampler.pause, sampler.began, sampler.ended, sampler.most_at_once = 0.1, [], 0, 0
    yield sampler
    sampler.pause = 0.0


def call(client: Client, caption: str, api: str = "/draw", given: tuple = (), **settings: float) -> tuple:
    values = {"n": 4, "keep": 2, "temperature": 1, "seed": 0, "top_k": 0, "top_p": 1, **settings}
    return client.predict(caption, *given, *values.values(), api_name=api)


def test_rows_are_shown_while_they_are_drawn_and_the_best_at_last(slowly: Slow) -> None:
    slowly.pause = 0.4
    request = Request(("a red circle",), SamplingConfig(n=4, keep=2))
    seen = list(draw_rows(slowly, request))
    grid = slowly.export.dvae.config.grid
    assert [status for status, _ in seen[:-1]] == [f"row {row + 1} of {grid}" for row in range(grid)]
    whole = slowly.images(Sampler(slowly.export).draw(Request(request.captions, SamplingConfig(n=4)))[0])
    size = whole[0].width
    for row, (_, shown) in enumerate(seen[:-1]):
        assert len(shown) == 4
        for (image, _), full in zip(shown, whole, strict=True):
            below = image.crop((0, size * (row + 1) // grid, size, size)) if row + 1 < grid else None
            assert below is None or len(set(below.getdata())) == 1, "nothing is drawn there yet"
            if row + 1 == grid:
                assert image.tobytes() == full.tobytes()
    best = slowly.draw(request, lambda _: None)[0]
    assert [image.tobytes() for image, _ in seen[-1][1]] == [image.tobytes() for image in slowly.images(best)]
    assert [label for _, label in seen[-1][1]] == [f"no. {b.index.candidate + 1}, score {b.score:.3f}" for b in best]


def test_a_drawing_that_nobody_looks_at_any_more_ends(slowly: Slow) -> None:
    watching = draw_rows(slowly, Request(("a red circle",), SamplingConfig(n=2)))
    next(watching)
    watching.close()
    assert slowly.began and not slowly.ended and not slowly.active


def test_twenty_at_once_are_served_one_by_one_as_they_came(url: str, slowly: Slow) -> None:
    slowly.pause = 0.02
    clients = [Client(url, verbose=False) for _ in range(20)]
    captions, jobs = [f"circle {i}" for i in range(20)], []
    for i, (client, caption) in enumerate(zip(clients, captions, strict=True)):
        jobs.append(client.submit(caption, 2, 1, 1, i, 0, 1, api_name="/draw"))
        deadline = time.monotonic() + 10
        while jobs[-1].status().rank is None and not jobs[-1].done():  # until it is queued
            assert time.monotonic() < deadline
            time.sleep(0.005)
    outcomes = [job.result(timeout=900) for job in jobs]
    assert slowly.began == captions
    assert (slowly.most_at_once, slowly.ended) == (1, 20)
    assert all("sampled in" in status and len(images) == 1 for status, images, _ in outcomes)


def test_what_a_script_may_not_ask_for(
    url: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # handlers of earlier tests may have a closed stderr
    caplog.set_level(logging.INFO)
    client = Client(url, verbose=False)
    with pytest.raises(AppError, match="^the caption is empty: expected text"):
        call(client, "  ")
    with pytest.raises(AppError, match="maximum length|100 characters, expected at most 40"):
        call(client, "x" * 100)
    with pytest.raises(AppError, match="^Images to sample: Value 13 is greater than maximum value 12"):
        call(client, "a red circle", n=13)
    with pytest.raises(AppError, match="^keep 5 of 4: expected to keep at most as many images as are sampled"):
        call(client, "a red circle", keep=5)
    (tmp_path / "words.png").write_text("no image")
    with pytest.raises(AppError, match="the image prompt is unreadable: expected an image file"):
        call(client, "a red circle", "/draw_from_image", (handle_file(tmp_path / "words.png"), 2))
    (tmp_path / "large.png").write_bytes(bytes(200_000))
    with pytest.raises(ValueError, match="exceeds the maximum file size of 100000 bytes"):
        call(client, "a red circle", "/draw_from_image", (handle_file(tmp_path / "large.png"), 2))
    with (tmp_path / "large.png").open("rb") as file:  # bypasses the checks of the client
        assert requests.post(f"{url}/gradio_api/upload", files={"files": file}, timeout=10).status_code == 413
    Image.new("RGBA", (2000, 501)).save(tmp_path / "bomb.png")  # 6 kB
    with pytest.raises(AppError, match="the image prompt is too large: .* 1 megapixels or less"):
        call(client, "a red circle", "/draw_from_image", (handle_file(tmp_path / "bomb.png"), 2))
    assert "4 sampled in" in call(client, "a red circle")[0], "still there"
    refused = [record for record in caplog.records if record.message.startswith("a request was refused: ")]
    assert len(refused) == 6 and not any("\n" in record.message or record.exc_info for record in refused)
    assert "Traceback" not in capfd.readouterr().err


def test_arguments_of_the_api_have_names(url: str) -> None:
    told = Client(url, verbose=False).view_api(return_format="dict", print_info=False)["named_endpoints"]
    names = {api: [one["parameter_name"] for one in about["parameters"]] for api, about in told.items()}
    settings = ["n", "keep", "temperature", "seed", "top_k", "top_p"]
    assert names == {"/draw": ["caption", *settings], "/draw_from_image": ["caption", "image", "rows", *settings]}
    status, *_ = Client(url, verbose=False).predict(caption="a red circle", n=2, keep=1, api_name="/draw")
    assert "2 sampled in" in status, "the other settings have the values of the page"


def test_the_page_begins_with_the_settings_of_the_export(sampler: Slow) -> None:
    meant = PriorSamplingConfig(temperature=0.45, guidance=1.5)
    record = sampler.export.record.model_copy(update={"caption_dropout": 0.1, "sampling": meant})
    guided = Slow(replace(sampler.export, record=record), sampler.scorer)
    page = build_page(guided, LIMITS, shows_paths=True)
    values = {block.label: block.value for block in page.blocks.values() if isinstance(block, gr.Slider)}
    assert (values["Temperature"], values["Guidance (1: none)"]) == (0.45, 1.5)
    request = _request(guided, LIMITS, "a red circle", None, 0, {"n": 2, "keep": None})
    assert (request.settings.temperature, request.settings.guidance) == (0.45, 1.5)
    command = shlex.split(_command(guided, request, None, shows_paths=True))
    assert command[:3] == ["dalle-ds", "sample", sampler.export.url], "the path as the user gave it: the command runs"
    assert command[command.index("--clip") + 1] == sampler.scorer.name
    asked = {name: command[command.index(f"--{name}") + 1] for name in ("n", "temperature", "guidance")}
    assert asked == {"n": "2", "temperature": "0.45", "guidance": "1.5"}


def test_drawings_that_nobody_listens_to_are_not_drawn(url: str, slowly: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_of_serve, "LISTENER_S", 1.0)
    values = [2, 1, 1, 0, 0, 1]
    for number in range(4):
        asked = requests.post(f"{url}/gradio_api/call/draw", json={"data": [f"unread {number}", *values]}, timeout=10)
        assert asked.status_code == 200
    event = requests.post(f"{url}/gradio_api/call/draw", json={"data": ["read by a script", *values]}, timeout=10).json()
    with requests.get(f"{url}/gradio_api/call/draw/{event['event_id']}", stream=True, timeout=60) as answer:
        assert "sampled in" in answer.text
    assert "1 sampled in" in call(Client(url, verbose=False), "listened to", n=1, keep=1)[0]
    assert slowly.began == ["read by a script", "listened to"]


def test_a_drawing_ends_when_its_client_stops_reading(slowly: Slow) -> None:
    wanted = iter([True, True, True, False])
    seen = list(draw_rows(slowly, Request(("a red circle",), SamplingConfig(n=2)), lambda: next(wanted)))
    assert len(seen) < slowly.export.dvae.config.grid and slowly.began and not slowly.ended


def test_the_page_tells_no_path_of_the_server(url: str, sampler: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(url, verbose=False)
    told = str(client.view_api(return_format="dict")) + requests.get(f"{url}/config", timeout=10).text
    told += call(client, "a red circle")[2]
    assert "dalle-ds sample export --caption 'a red circle' --clip clip" in told

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error", sampler.export.url)

    monkeypatch.setattr(sampler, "draw", fail)
    with pytest.raises(AppError, match="its log has the reason"):
        call(client, "a red circle")
    monkeypatch.setattr(sampler, "check", lambda _: (_ for _ in ()).throw(ConfigError(f"{sampler.export.url} cannot")))
    with pytest.raises(AppError, match="^export cannot"):
        call(client, "a red circle")
    assert str(Path(sampler.export.url).parent) not in told


def wait_for_status(page: Page, text: str) -> None:
    page.wait_for_function(f"document.querySelector('#status input, #status textarea').value.includes('{text}')")


@NEEDS_CHROMIUM
def test_in_a_browser(url: str, slowly: Slow, tmp_path: Path) -> None:
    slowly.pause = 0.5
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "noise.png")
    with browser_page() as page:
        page.goto(url)
        assert page.get_by_role("link", name="training run").get_attribute("href") == "http://127.0.0.1:5000/#/runs/abc"
        page.fill("#caption input, #caption textarea", "a red circle")
        page.click("#draw")
        wait_for_status(page, "row ")
        page.wait_for_selector("#images img")
        wait_for_status(page, "sampled in")
        page.wait_for_function("document.querySelectorAll('#images .grid-container img').length == 4")
        assert "score" in page.inner_text("#images")
        assert "--keep 4" in page.input_value("#command textarea")
        page.screenshot(path=tmp_path / "caption.png")

        page.get_by_role("tab", name="From an image").click()
        page.set_input_files("#image input[type=file]", tmp_path / "noise.png")
        page.wait_for_selector("#image img")
        page.click("#draw-2")
        wait_for_status(page, "row ")
        wait_for_status(page, "sampled in")
        assert "--image-prompt noise.png --prompt-rows" in page.input_value("#command textarea")
        page.screenshot(path=tmp_path / "image.png")
    assert slowly.began == ["a red circle", ""]


BOXES = """selector => [...document.querySelectorAll(selector)].map(e => {
    const { left, right, top, bottom, width } = e.getBoundingClientRect()
    return { left, right, top: top + scrollY, bottom: bottom + scrollY, width, looks: getComputedStyle(e).imageRendering }
})"""


@NEEDS_CHROMIUM
@pytest.mark.parametrize("width, image_width", [(1280, 300), (390, 120)])
def test_a_click_on_an_example_draws_images_that_a_person_can_see(
    url: str, slowly: Slow, tmp_path: Path, width: int, image_width: int
) -> None:
    slowly.pause = 0
    with browser_page(width, 844) as page:
        page.goto(url)
        page.wait_for_selector("#examples .gallery-item")
        shown = page.locator("#examples .gallery-item").all_inner_texts()
        assert [caption.strip() for caption in shown] == examples_of(slowly.export), "but none that is too long"
        page.locator("#examples .gallery-item").first.click()
        wait_for_status(page, "sampled in")
        page.wait_for_function("document.querySelectorAll('#images .grid-container img').length == 4")
        assert page.input_value("#caption input, #caption textarea") == shown[0].strip()
        page.screenshot(path=tmp_path / "example.png", full_page=True)
        images, labels = (page.evaluate(BOXES, f"#images {what}") for what in ("img", ".caption-label"))
        (settings,), (asking,) = (page.evaluate(BOXES, what) for what in ("#settings", "#caption"))
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert all(box["left"] >= 0 and box["right"] <= width for box in (*images, *labels, settings, asking))
    assert all(box["width"] >= image_width and box["looks"] == "pixelated" for box in images)
    assert len(labels) == 4 and all(label["top"] >= image["bottom"] for image, label in zip(images, labels, strict=True))
    on_a_phone = width < 700
    assert (max(box["bottom"] for box in images) <= settings["top"]) == on_a_phone, "there the settings are below"
    assert images[0]["bottom"] < 844, "seen without scrolling"


def test_examples_are_captions_that_training_has_not_seen(sampler: Slow, tmp_path: Path, caplog) -> None:
    dataset = TokenDataset(sampler.export.record.data_urls[0], "validation")
    known = set(validation_of([dataset], 16).captions)
    examples = examples_of(sampler.export)
    assert examples and set(examples) <= known and len(set(map(str.lower, examples))) == len(examples) <= 6
    alone = make_export(tmp_path, n_samples=16, n_validation=4)
    edit_config(alone, data_urls=[str(tmp_path / "gone")])
    assert examples_of(load_export(alone)) == [] and "no examples" in caplog.text


def test_a_port_that_is_taken_is_named(url: str, sampler: Slow) -> None:
    port = int(url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 cannot be used"):
        launch_page(build_page(sampler, LIMITS), LIMITS, "127.0.0.1", port, block=False)
