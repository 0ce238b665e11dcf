"""The HTML page of `stats`: one self-contained file that shows the content of a data set."""

import base64
import html
import io
import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from dalle_ds.data.images import decode_image
from dalle_ds.data.raw.metadata import read_image, sample_rows
from dalle_ds.data.raw.shards import list_raw_shards
from dalle_ds.data.tokens.dataset_files import DatasetManifest, load_index
from dalle_ds.data.tokens.shards import read_block
from dalle_ds.figures import drawn, new_figure
from dalle_ds.storage import objects
from dalle_ds.storage.names import DVAE_FILE
from preprocessing.encoding.encode_shard import load_dvae

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

Example = tuple[Image.Image, str]
SIDE = 128  # pixels of an example on the page
INK = "#3367a8"

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #202124; background: #f5f6f8 }
body { max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 24px } h2 { font-size: 18px; margin-top: 1.6em }
table { border-collapse: collapse; background: #fff } td { padding: 4px 14px; border: 1px solid #dfe1e5 }
td:last-child { text-align: right; font-variant-numeric: tabular-nums }
img.chart { width: 520px; max-width: 100%; background: #fff; border: 1px solid #dfe1e5 }
.charts, .examples { display: flex; flex-wrap: wrap; gap: 14px } figure { margin: 0; width: 128px }
figure img { width: 128px; height: 128px; object-fit: contain; background: #fff; border: 1px solid #dfe1e5 }
figcaption { font-size: 12px; overflow-wrap: anywhere; max-height: 6em; overflow: hidden }
"""


def page_of_tokens(summary: Mapping[str, object], manifest: DatasetManifest, examples: Sequence[Example]) -> str:
    """HTML page of a token data set. `examples` are images decoded from its tokens, with their captions."""
    charts = [_bars("Dropped, by reason", manifest.dropped)] if manifest.dropped else []
    if manifest.caption_lengths:
        charts.append(_lengths(manifest.caption_lengths))
    charts.append(_codes(manifest.code_histogram))
    return _page(summary, charts, examples, "decoded from their tokens")


def page_of_raw(summary: Mapping[str, object], dropped: Mapping[str, int], examples: Sequence[Example]) -> str:
    """HTML page of raw shards. `examples` are source images with their captions."""
    return _page(summary, [_bars("Dropped, by reason", dropped)] if dropped else [], examples, "as ingested")


def decoded_examples(root: str, n: int) -> list[Example]:
    """The first `n` samples of the training split, decoded by the data set's own dVAE.

    Samples are decoded one at a time, which takes seconds at full size.

    Raises:
        DataError: the dVAE or a part of the first shards is missing or damaged.
    """
    if n == 0:
        return []
    dvae = load_dvae(objects.join(root, DVAE_FILE))[0].eval()
    blocks = (read_block(root, part, block) for part in load_index(root)[1].parts("train") for block in part.blocks)
    samples = (sample for tokens_nN, _, captions in blocks for sample in zip(tokens_nN, captions, strict=True))
    examples = []
    with torch.inference_mode():
        for tokens_N, caption in islice(samples, n):
            image_CHW = dvae.decode_tokens(torch.from_numpy(tokens_N.astype(np.int64))[None])[0]
            image_HWC = image_CHW.expand(3, -1, -1).permute(1, 2, 0).contiguous()
            examples.append((Image.fromarray(image_HWC.numpy()), caption))
    return examples


def raw_examples(root: str, n: int) -> list[Example]:
    """The first `n` samples of raw shards, which need no more than their metadata and `n` ranged reads.

    Raises:
        DataError: metadata or a tar is missing or damaged.
    """
    shards = list_raw_shards(root)
    if not all(shard.metadata for shard in shards):
        log.warning("no images on the page: %s has no metadata; `dalle-ds data ingest` again adds it", root)
        return []
    columns = ["caption", "offset", "bytes", "crc32"]
    rows = ((shard, row) for shard in shards for row in sample_rows(shard, columns).slice(0, n).to_pylist())
    return [
        (decode_image(read_image(shard, row["offset"], row["bytes"], row["crc32"])), row["caption"])
        for shard, row in islice(rows, n)
    ]


def _page(summary: Mapping[str, object], charts: Sequence[str], examples: Sequence[Example], what: str) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{html.escape(text)}</td></tr>" for name, text in _flat(summary)
    )
    images = "".join(
        f'<figure><img src="{_data_uri(_small(image))}" alt=""><figcaption>{html.escape(caption)}</figcaption></figure>'
        for image, caption in examples
    )
    shown = f'<h2>Examples, {what}</h2><div class="examples">{images}</div>' if images else ""
    drawn = f'<h2>Charts</h2><div class="charts">{"".join(charts)}</div>' if charts else ""
    title = html.escape(str(summary["root"]))
    head = f'<meta charset="utf-8"><title>{title}</title><link rel="icon" href="data:,"><style>{STYLE}</style>'
    body = f"<h1>{title}</h1><table>{rows}</table>{drawn}{shown}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'


def _flat(values: Mapping[str, object], above: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{above}{name}: ")
        elif isinstance(value, float):
            rows.append((above + name, f"{value:,.2f}"))
        elif isinstance(value, int) and not isinstance(value, bool):
            rows.append((above + name, f"{value:,}"))
        else:
            rows.append((above + name, str(value)))
    return rows


def _bars(title: str, counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: item[1])
    figure = new_figure(6.5, 0.9 + 0.34 * len(ordered))
    axes = figure.add_subplot(title=title)
    bars = axes.barh([name for name, _ in ordered], [count for _, count in ordered], color=INK)
    axes.bar_label(bars, [f"{count:,}" for _, count in ordered], padding=3)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    return _chart(figure, title)


def _lengths(counts: Mapping[int, int]) -> str:
    title = "Captions of the training split, by BPE tokens"
    figure = new_figure(6.5, 3.2)
    axes = figure.add_subplot(title=title, xlabel="tokens", ylabel="captions")
    axes.bar(list(counts), list(counts.values()), width=1.0, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    return _chart(figure, title)


def _codes(histogram: Sequence[int]) -> str:
    title = "Codes by how often they are used"
    counts = np.sort(np.asarray(histogram))[::-1]
    figure = new_figure(6.5, 3.2)
    axes = figure.add_subplot(title=title, xlabel="code, the most used first", ylabel="times used", yscale="symlog")
    axes.fill_between(np.arange(len(counts)), counts, step="mid", color=INK)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    return _chart(figure, title)


def _chart(figure: "Figure", title: str) -> str:
    return f'<img class="chart" src="{_data_uri(drawn(figure, dpi=140))}" alt="{html.escape(title)}">'


def _small(image: Image.Image) -> Image.Image:
    factor = SIDE / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
