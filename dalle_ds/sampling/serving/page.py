"""The web page of `dalle-ds serve`: it samples images for a caption and shows them row by row while they are sampled.

Requests run one at a time; the others wait in a first-in, first-out queue.
"""

import logging
import shlex
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from dalle_ds.errors import ConfigError, UserError
from dalle_ds.recipes import from_options
from dalle_ds.sampling.decode import partial_images
from dalle_ds.sampling.image_prompt import PAPER_SHARE, make_image_prompt
from dalle_ds.sampling.request import Request
from dalle_ds.sampling.sampler import Candidate, RowsDecoded, Sampler
from dalle_ds.sampling.settings import PageLimitsConfig, SamplingConfig

try:
    import gradio as gr
except ImportError:
    raise ConfigError("the page needs gradio, which is not installed: pip install 'dalle-ds[page]'") from None

log = logging.getLogger(__name__)

Shown = list[tuple[Image.Image, str]]
"""Images and the text below each."""

SHORTEST_PAUSE_S, SHARE_FOR_SHOWING = 0.3, 0.2
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# System fonts: the page must not load any from another server. Small images are enlarged without smoothing.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
STYLE = "#images img { image-rendering: pixelated; }"


def draw_rows(sampler: Sampler, request: Request) -> Iterator[tuple[str, Shown]]:
    """Yields (status, images) while a request is sampled, at last with the kept images. Closing the generator ends sampling.

    Raises:
        Exception: any exception of sampling.
    """
    drawing = _Drawing(sampler, request)
    drawing.start()
    try:
        while not drawing.ended.is_set():
            if drawing.changed.wait(0.1):
                drawing.changed.clear()
                yield drawing.status, drawing.shown
        drawing.join()
        if drawing.error is not None:
            raise drawing.error
        yield drawing.status, drawing.shown
    finally:
        drawing.abandoned = True
        drawing.join()


class _Abandoned(Exception):
    pass


class _Drawing(threading.Thread):
    def __init__(self, sampler: Sampler, request: Request) -> None:
        super().__init__(name="drawing", daemon=True)
        self._sampler, self._request, self._n_batches = sampler, request, len(request.work_items())
        self.changed, self.ended, self.abandoned = threading.Event(), threading.Event(), False
        self.status, self.shown, self.error = "", [], None
        self._next_at = 0.0

    def run(self) -> None:
        began = time.monotonic()
        try:
            chosen = [candidate for row in self._sampler.draw(self._request, self._show) for candidate in row]
            self.shown = list(zip(self._sampler.images(chosen), map(_label, chosen), strict=True))
            self.status = f"{self._request.settings.n} sampled in {time.monotonic() - began:.1f} s"
        except _Abandoned:
            log.info("the client closed the page: sampling was cancelled")
        except Exception as error:  # the page shows any error
            self.error = error
        self.ended.set()

    def _show(self, rows: RowsDecoded) -> None:
        if self.abandoned:
            raise _Abandoned
        began = time.monotonic()
        if began < self._next_at:
            return
        grid = self._sampler.export.dvae.config.grid
        images = partial_images(self._sampler.export.dvae, rows.codes_BN, rows.n_rows)
        batch = f", batch {rows.item.number + 1} of {self._n_batches}" if self._n_batches > 1 else ""
        self.shown = [(image, f"{k + 1}") for k, image in zip(rows.item.candidates, images, strict=True)]
        self.status = f"row {rows.n_rows} of {grid}{batch}"
        self.changed.set()
        # previews take time from sampling: wait, so that they take at most SHARE_FOR_SHOWING of the time
        seconds = time.monotonic() - began
        self._next_at = time.monotonic() + max(SHORTEST_PAUSE_S, seconds * (1 / SHARE_FOR_SHOWING - 1))


def _label(candidate: Candidate) -> str:
    score = "" if candidate.score is None else f", score {candidate.score:.3f}"
    return f"no. {candidate.index.candidate + 1}{score}"


def build_page(sampler: Sampler, limits: PageLimitsConfig, mlflow_url: str | None = None) -> gr.Blocks:
    """Build the web page of an export, with one tab for captions and one for image prompts.

    Args:
        mlflow_url: url of the training run's page, linked at the top.
    """
    export, has_scorer = sampler.export, sampler.scorer is not None
    grid, size = export.dvae.config.grid, export.dvae.config.image_size

    def draw(caption: str, file: str | None, rows: int, *values: Any) -> Iterator[tuple[str, Shown, str]]:
        try:
            request = _request(sampler, limits, caption, file, rows, dict(zip(names, values, strict=True)))
            for status, shown in draw_rows(sampler, request):
                yield status, shown, _command(sampler, request, file)
        except UserError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from None

    def draw_from_caption(caption: str, *values: Any) -> Iterator[tuple[str, Shown, str]]:
        yield from draw(caption, None, 0, *values)

    def draw_from_image(caption: str, file: str | None, rows: int, *values: Any) -> Iterator[tuple[str, Shown, str]]:
        if file is None:
            raise gr.Error("Choose an image first.", print_exception=False)
        yield from draw(caption, file, int(rows), *values)

    with gr.Blocks(title="dalle_ds", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(_headline(sampler, mlflow_url))
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                with gr.Tabs():
                    with gr.Tab("From a caption"):
                        caption = gr.Textbox(label="Caption", max_length=limits.max_caption, elem_id="caption")
                        button = gr.Button("Draw", variant="primary", elem_id="draw")
                    with gr.Tab("From an image"):
                        image = gr.Image(
                            label=f"Image, at least {size} pixels a side",
                            type="filepath",
                            sources=["upload", "clipboard"],
                            image_mode=None,
                            height=220,
                            elem_id="image",
                        )
                        # pass the uploaded file on unopened: gradio would open it, and show its own error if it is not an image
                        image.preprocess = lambda payload: payload and payload.path
                        rows = gr.Slider(0, grid - 1, round(PAPER_SHARE * grid), step=1, label="Rows kept from the top")
                        second_caption = gr.Textbox(
                            label="Caption (empty: variations of the image)", max_length=limits.max_caption, elem_id="caption-2"
                        )
                        second_button = gr.Button("Draw", variant="primary", elem_id="draw-2")
                defaults = SamplingConfig(n=min(16, limits.max_n), keep=min(4, limits.max_n) if has_scorer else None)
                settings = {"n": gr.Slider(1, limits.max_n, defaults.n, step=1, label="Images to sample", elem_id="n")}
                if has_scorer:
                    settings["keep"] = gr.Slider(1, limits.max_n, defaults.keep, step=1, label="Best images to keep")
                settings["temperature"] = gr.Slider(0, 2, defaults.temperature, step=0.05, label="Temperature")
                settings["seed"] = gr.Number(defaults.seed, precision=0, minimum=0, label="Seed", elem_id="seed")
                with gr.Accordion("More", open=False):
                    settings["top_k"] = gr.Number(0, precision=0, minimum=0, label="Top-k (0: all)")
                    settings["top_p"] = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
                    if export.record.caption_dropout > 0:
                        settings["guidance"] = gr.Slider(0, 8, 1, step=0.25, label="Guidance (1: none)")
            with gr.Column(scale=3, min_width=320):
                status = gr.Textbox(label="Progress", interactive=False, lines=1, elem_id="status")
                gallery = gr.Gallery(
                    label="Images", columns=4, format="png", object_fit="contain", elem_id="images", buttons=["download"]
                )
                command = gr.Textbox(
                    label="Equivalent command", interactive=False, lines=2, buttons=["copy"], elem_id="command"
                )
        names, controls, results = list(settings), list(settings.values()), [status, gallery, command]
        # one concurrency id for all events: together they run one request at a time
        options: dict[str, Any] = {"concurrency_id": "drawing", "concurrency_limit": 1, "show_progress": "minimal"}
        gr.on([button.click, caption.submit], draw_from_caption, [caption, *controls], results, api_name="draw", **options)
        inputs = [second_caption, image, rows, *controls]
        starts = [second_button.click, second_caption.submit]
        gr.on(starts, draw_from_image, inputs, results, api_name="draw_from_image", **options)
    return page.queue(max_size=limits.max_waiting)


def launch_page(page: gr.Blocks, limits: PageLimitsConfig, host: str, port: int, *, block: bool = True) -> None:
    """Serve the page. With `block`, the function returns when the process is asked to stop.

    Raises:
        ConfigError: the port is in use, or this machine cannot bind to `host` and `port`.
    """
    if host not in LOOPBACK:
        log.warning("listening on %s: anyone who can reach it can use the page; put a proxy with a login in front of it", host)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=int(limits.max_upload_mb * 1e6),
            show_error=True,
            footer_links=["api"],
            theme=THEME,
            css=STYLE,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise ConfigError(f"port {port} of {host} cannot be used ({error}); choose another with --port") from None
    print(f"serving on http://{host}:{port}", flush=True)
    if block:
        page.block_thread()


def _request(
    sampler: Sampler, limits: PageLimitsConfig, caption: str, file: str | None, rows: int, values: dict[str, Any]
) -> Request:
    """Build and check the request. The browser's limits are not enough, because a script can send any values."""
    caption = (caption or "").strip()
    if len(caption) > limits.max_caption:
        raise ConfigError(f"the caption has {len(caption)} characters, expected at most {limits.max_caption}")
    settings = from_options(SamplingConfig, values)
    if settings.n > limits.max_n:
        raise ConfigError(f"{settings.n} images, expected at most {limits.max_n}")
    image_prompt = make_image_prompt(sampler.export, Path(file).read_bytes(), rows) if file else None
    request = Request((caption,), settings, image_prompt)
    sampler.check(request)
    return request


def _headline(sampler: Sampler, mlflow_url: str | None) -> str:
    export = sampler.export
    config, n_parameters = export.prior.config, sum(parameter.numel() for parameter in export.prior.parameters())
    about = [
        f"prior of {n_parameters / 1e6:,.1f} million parameters",
        f"{config.grid} x {config.grid} tokens of {config.n_codes}",
        f"{export.dvae.config.image_size} pixels",
        f"export `{export.fingerprint}`",
    ]
    about += [f"scores by `{sampler.scorer.name}`"] if sampler.scorer else ["no scorer: all candidates are shown"]
    about += [f"[training run]({mlflow_url})"] if mlflow_url else []
    return f"# dalle_ds\n{' · '.join(about)}"


def _command(sampler: Sampler, request: Request, file: str | None) -> str:
    words = ["dalle-ds", "sample", sampler.export.url]
    words += ["--caption", request.captions[0]] if request.captions[0] else []
    words += ["--clip", sampler.scorer.name] if sampler.scorer else []
    words += (
        ["--image-prompt", Path(file).name, "--prompt-rows", str(request.image_prompt.rows)]
        if file and request.image_prompt
        else []
    )
    plain = SamplingConfig()
    changed = {key: value for key, value in request.settings.model_dump().items() if value != getattr(plain, key)}
    for key, value in changed.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return shlex.join(words)
