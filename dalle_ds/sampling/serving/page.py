"""The web page of `dalle-ds serve`: it samples images for a caption and shows them row by row while they are sampled.

Requests run one at a time; the others wait in a first-in, first-out queue.
"""

import inspect
import logging
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dalle_ds.errors import ConfigError, UserError
from dalle_ds.recipes import from_values
from dalle_ds.redaction import redacted
from dalle_ds.sampling.export import told_of_cut
from dalle_ds.sampling.image_prompt import PAPER_SHARE, ImagePrompt, make_image_prompt
from dalle_ds.sampling.request import Request
from dalle_ds.sampling.sampler import Sampler
from dalle_ds.sampling.serving.drawing import Shown, draw_rows
from dalle_ds.sampling.settings import PageLimitsConfig, SampleOptionsConfig

try:
    import gradio as gr
except ImportError:
    raise ConfigError("the page needs gradio, which is not installed: pip install 'dalle-ds[page]'") from None

log = logging.getLogger(__name__)

LISTENER_S, UNREAD_S = 3.0, 15.0
"""Seconds within which a client must read its first message, and any later one. Without a reader the drawing ends."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# System fonts: the page must not load any from another server.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
# Small images are enlarged without smoothing, up to four of them in two columns. Labels lie below their images, not on them. On
# a phone, the examples are one line to scroll along, and the images come before the settings, in two columns: gradio's own four
# are wider than the screen.
STYLE = """
#images img { image-rendering: pixelated; }
#images .grid-wrap { max-height: 80vh; }
#images .grid-wrap:not(:has(.grid-container > :nth-child(5))) { max-height: none; }
#images .grid-container:not(:has(> :nth-child(5))) { grid-template-columns: repeat(2, minmax(0, 1fr)); }
#images .gallery-item { min-width: 0; }
#images .grid-container .thumbnail-item { aspect-ratio: auto; height: auto; width: 100%; }
#images .grid-container img { aspect-ratio: 1; width: 100%; height: auto; }
#images .grid-container .caption-label { position: static; max-width: none; border: 0; }
@media (max-width: 700px) {
  #asking { display: contents; }
  #asking > * { order: 0; min-width: 100%; }
  #results { order: 1; }
  #asking > #settings { order: 2; }
  #examples .gallery { flex-wrap: nowrap; overflow-x: auto; }
  #examples .gallery-item { flex: none; }
  #images .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
}
"""


def build_page(
    sampler: Sampler,
    limits: PageLimitsConfig,
    mlflow_url: str | None = None,
    examples: Sequence[str] = (),
    *,
    shows_paths: bool = False,
) -> gr.Blocks:
    """Build the web page of an export, with one tab for captions and one for image prompts.

    Args:
        mlflow_url: url of the training run's page, linked at the top.
        examples: captions that a click samples.
        shows_paths: the equivalent command has the paths of export and CLIP, so that it runs as it is; else only their last
            parts.
    """
    export, has_scorer = sampler.export, sampler.scorer is not None
    grid, size = export.dvae.config.grid, export.dvae.config.image_size

    def draw(client: gr.Request, caption: str, file: str | None, rows: int, *values: Any) -> Iterator[tuple[str, Shown, str]]:
        listener = _Listener(page, client.session_hash)
        if not listener.answers_within(LISTENER_S):
            log.info("nobody listens to a request: it is not sampled")
            raise gr.Error("Nobody reads the answer: nothing is drawn.", print_exception=False)
        try:
            request = _request(sampler, limits, caption, file, rows, dict(zip(names, values, strict=True)))
            cut = export.cut_captions(request.captions)
            note = f"; {told_of_cut(cut)}" if cut else ""
            for status, shown in draw_rows(sampler, request, listener.listens):
                yield f"{status}{note}", shown, _command(sampler, request, file, shows_paths)
        except UserError as error:
            said = str(error).replace(export.url, _last(export.url))  # the server's paths are nobody's business
            raise _refusal(said) from None
        except Exception:
            log.exception("a request failed")
            raise gr.Error("The server failed; its log has the reason.", duration=None, print_exception=False) from None

    def draw_from_caption(client: gr.Request, caption: str, *values: Any) -> Iterator[tuple[str, Shown, str]]:
        yield from draw(client, caption, None, 0, *values)

    def draw_from_image(
        client: gr.Request, caption: str, image: str | None, rows: int, *values: Any
    ) -> Iterator[tuple[str, Shown, str]]:
        if image is None:
            raise _refusal("Choose an image first.")
        yield from draw(client, caption, image, int(rows), *values)

    with gr.Blocks(title="dalle_ds", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(_headline(sampler, mlflow_url))
        with gr.Row():
            with gr.Column(scale=2, min_width=320, elem_id="asking"):
                with gr.Tabs():
                    with gr.Tab("From a caption"):
                        caption = gr.Textbox(label="Caption", max_length=limits.max_caption, elem_id="caption")
                        button = gr.Button("Draw", variant="primary", elem_id="draw")
                        shortest = [[example] for example in examples if len(example) <= limits.max_caption]
                        clickable = gr.Dataset(
                            label="Examples: a click draws one",
                            components=[caption],
                            samples=shortest,
                            visible=bool(shortest),
                            elem_id="examples",
                        )
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
                n, keep = min(16, limits.max_n), min(4, limits.max_n) if has_scorer else None
                defaults = SampleOptionsConfig(n=n, keep=keep).for_prior(export.record.sampling)
                with gr.Column(elem_id="settings"):
                    settings = {"n": gr.Slider(1, limits.max_n, defaults.n, step=1, label="Images to sample", elem_id="n")}
                    if has_scorer:
                        settings["keep"] = gr.Slider(1, limits.max_n, defaults.keep, step=1, label="Best images to keep")
                    hottest = max(2, defaults.temperature)
                    settings["temperature"] = gr.Slider(0, hottest, defaults.temperature, step=0.05, label="Temperature")
                    settings["seed"] = gr.Number(defaults.seed, precision=0, minimum=0, label="Seed", elem_id="seed")
                    with gr.Accordion("More", open=False):
                        settings["top_k"] = gr.Number(0, precision=0, minimum=0, label="Top-k (0: all)")
                        settings["top_p"] = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
                        if export.record.caption_dropout > 0:
                            strongest = max(8, defaults.guidance)
                            settings["guidance"] = gr.Slider(
                                0, strongest, defaults.guidance, step=0.05, label="Guidance (1: none)"
                            )
            with gr.Column(scale=3, min_width=320, elem_id="results"):
                status = gr.Textbox(label="Progress", interactive=False, lines=1, elem_id="status")
                gallery = gr.Gallery(
                    label="Images",
                    show_label=False,
                    columns=4,
                    format="png",
                    object_fit="contain",
                    elem_id="images",
                    buttons=["download"],
                )
                command = gr.Textbox(
                    label="Equivalent command", interactive=False, lines=2, buttons=["copy"], elem_id="command"
                )
        names, controls, results = list(settings), list(settings.values()), [status, gallery, command]
        for function in (draw_from_caption, draw_from_image):
            _name_parameters(function, names)
        for control in (caption, second_caption, rows, *controls):
            _refuse_in_one_line(control)
        # one concurrency id for all events: together they run one request at a time
        options: dict[str, Any] = {"concurrency_id": "drawing", "concurrency_limit": 1, "show_progress": "minimal"}
        gr.on([button.click, caption.submit], draw_from_caption, [caption, *controls], results, api_name="draw", **options)
        clicked = clickable.click(
            lambda sample: sample[0], clickable, caption, show_progress="hidden", api_visibility="private"
        )
        clicked.then(draw_from_caption, [caption, *controls], results, api_visibility="private", **options)
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


def _refusal(said: str) -> gr.Error:
    """An error of the user, whose message the client shows. The server's log has it in one line."""
    log.info("a request was refused: %s", said)
    return gr.Error(said, duration=None, print_exception=False)


def _refuse_in_one_line(control: Any) -> None:
    """Where gradio itself refuses a value, its log would have a traceback."""
    preprocess = control.preprocess

    def refusing(payload: Any) -> Any:
        try:
            return preprocess(payload)
        except gr.Error as error:
            raise _refusal(f"{control.label}: {error.message}") from None

    control.preprocess = refusing


def _name_parameters(function: Any, names: Sequence[str]) -> None:
    """Put `names` for the *values of a function, since gradio names the arguments of the API by the signature."""
    signature = inspect.signature(function)
    own = [one for one in signature.parameters.values() if one.kind is not one.VAR_POSITIONAL]
    named = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    function.__signature__ = signature.replace(parameters=[*own, *named])


class _Listener:
    """Whether a client reads the messages of its request. A client of the API may start a request and never read them."""

    def __init__(self, page: gr.Blocks, session: str | None) -> None:
        self._page, self._session = page, session
        self._n_unread, self._since = 0, time.monotonic()

    def answers_within(self, seconds: float) -> bool:
        """Wait until the client has read all messages so far. Returns False if it has not after `seconds`."""
        deadline = time.monotonic() + seconds
        while self._unread():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def listens(self) -> bool:
        """Returns False if the client has not read any message for UNREAD_S although there are some."""
        n_unread, now = self._unread(), time.monotonic()
        if n_unread == 0 or n_unread < self._n_unread:
            self._since = now
        self._n_unread = n_unread
        return now - self._since < UNREAD_S

    def _unread(self) -> int:
        messages = self._page._queue.pending_messages_per_session.get(self._session)  # gradio's; no public call tells it
        return 1 if messages is None else messages.qsize()


def _last(path: str) -> str:
    """The last part of a path or url."""
    return path.rstrip("/").rpartition("/")[2]


def _request(
    sampler: Sampler, limits: PageLimitsConfig, caption: str, file: str | None, rows: int, values: dict[str, Any]
) -> Request:
    """Build and check the request. The browser's limits are not enough, because a script can send any values."""
    caption = (caption or "").strip()
    if len(caption) > limits.max_caption:
        raise ConfigError(f"the caption has {len(caption)} characters, expected at most {limits.max_caption}")
    given = {name: value for name, value in values.items() if value is not None}
    if "keep" in given and given["keep"] > (n := given.get("n", 0)):
        raise ConfigError(f"keep {given['keep']} of {n}: expected to keep at most as many images as are sampled")
    settings = from_values(SampleOptionsConfig, given, "the request").for_prior(sampler.export.record.sampling)
    if settings.n > limits.max_n:
        raise ConfigError(f"{settings.n} images, expected at most {limits.max_n}")
    image_prompt = _image_prompt(sampler, limits, file, rows) if file else None
    request = Request((caption,), settings, image_prompt)
    sampler.check(request)
    return request


def _image_prompt(sampler: Sampler, limits: PageLimitsConfig, file: str, rows: int) -> ImagePrompt:
    max_pixels = int(limits.max_upload_megapixels * 1e6)
    return make_image_prompt(sampler.export, Path(file).read_bytes(), rows, max_pixels=max_pixels)


def _scorer(sampler: Sampler, shows_paths: bool = False) -> str | None:
    """Name of the scorer: of a folder its last part, unless `shows_paths`, else the hub name."""
    if sampler.scorer is None:
        return None
    is_path = Path(sampler.scorer.name).exists()
    return _last(sampler.scorer.name) if is_path and not shows_paths else sampler.scorer.name


def _headline(sampler: Sampler, mlflow_url: str | None) -> str:
    export = sampler.export
    config, n_parameters = export.prior.config, sum(parameter.numel() for parameter in export.prior.parameters())
    about = [
        f"prior of {n_parameters / 1e6:,.1f} million parameters",
        f"{config.grid} x {config.grid} tokens of {config.n_codes}",
        f"{export.dvae.config.image_size} pixels",
        f"export `{export.fingerprint}`",
    ]
    about += [f"scores by `{_scorer(sampler)}`"] if sampler.scorer else ["no scorer: all candidates are shown"]
    about += [f"[training run]({mlflow_url})"] if mlflow_url else []
    return f"# dalle_ds\n{' · '.join(about)}"


def _command(sampler: Sampler, request: Request, file: str | None, shows_paths: bool) -> str:
    """The command that draws the same images. Where temperature and guidance may differ from 1, it names them."""
    export = sampler.export
    words = ["dalle-ds", "sample", redacted(export.url) if shows_paths else _last(export.url)]
    words += ["--caption", request.captions[0]] if request.captions[0] else []
    words += ["--clip", str(_scorer(sampler, shows_paths))] if sampler.scorer else []
    words += (
        ["--image-prompt", Path(file).name, "--prompt-rows", str(request.image_prompt.rows)]
        if file and request.image_prompt
        else []
    )
    plain = SampleOptionsConfig().model_dump()
    changed = {key: value for key, value in request.settings.model_dump().items() if value != plain[key]}
    if export.record.caption_dropout == 0:
        del changed["guidance"]  # 1: no other value is possible
    for key, value in changed.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return shlex.join(words)
