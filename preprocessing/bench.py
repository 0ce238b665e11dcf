"""`dalle-ds bench encode`: the encode stage versus the encoder alone, and image decoding versus img2dataset.

Both sides of a comparison run in alternation.
"""

import io
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dalle_ds.bench.harness.machine import machine_for
from dalle_ds.bench.harness.report import Report
from dalle_ds.bench.harness.settings import EncodeBenchConfig
from dalle_ds.bench.harness.timing import Comparison, take_turns
from dalle_ds.console import progress
from dalle_ds.data.images import CROP_RULE, ImageProblem
from dalle_ds.data.manifest import DatasetInfo
from dalle_ds.data.raw.shards import RawSample, list_raw_shards, read_raw_shard
from dalle_ds.data.tokenizer import CaptionTokenizer, train_tokenizer
from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.storage.names import TOKENIZER_FILE
from preprocessing.encoding.encode_shard import EncodeJob, crop_of, encode_shard, load_dvae
from preprocessing.encoding.encoder import Encode, encoder_of
from preprocessing.executors.local import n_cores

SMALL = {"image_size": 32, "n_groups": 3, "n_blk_per_group": 1, "n_hid": 32, "n_init": 64, "n_codes": 512}  # as in the demo


def run(options: EncodeBenchConfig) -> Report:
    """Compare the encode stage on one shard, after loading the models, with the encoder alone on the same images.

    Also measures the images/s of decoding and resizing.
    """
    with machine_for(options) as machine:
        return _measure(options, machine.device.type, Report("encode", machine.name))


def _measure(options: EncodeBenchConfig, device: str, report: Report) -> Report:
    torch.manual_seed(0)
    dvae = load_dvae(options.dvae)[0] if options.dvae else DVAE(DVAEConfig(**(SMALL if options.small else {})))
    size = dvae.config.image_size
    batch = options.batch or (64 if options.small else 2)
    with tempfile.TemporaryDirectory(prefix="dalle-ds-bench-") as folder:
        raw = options.raw
        if raw is None:
            raw = f"{folder}/raw"
            write_images(raw, options.images or (4096 if options.small else 8), options.side or size * 3 // 2)
        shard = list_raw_shards(raw)[0]
        samples, crops = [], []
        for sample in read_raw_shard(shard):
            if isinstance(sample, RawSample):
                try:
                    crops.append(crop_of(sample, size))
                    samples.append(sample)
                except ImageProblem:
                    continue
        batches = [np.stack(crops[start : start + batch]) for start in range(0, len(crops), batch)]
        tokenizer = _tokenizer(folder, [sample.caption for sample in samples])
        info = DatasetInfo(
            image_size=size,
            grid=dvae.config.grid,
            n_codes=dvae.config.n_codes,
            dvae="",
            tokenizer="",
            crop=CROP_RULE,
            validation_fraction=0.05,
        ).sealed()
        job = EncodeJob("", info, batch, 256, 1.0, device, options.precision)
        encode = encoder_of(dvae, options.precision, device)
        n_threads = max(1, n_cores() - options.threads) if device == "cpu" else n_cores()

        def stage(encode: Encode = encode) -> None:
            out = tempfile.mkdtemp(dir=folder)
            n_samples = encode_shard(shard, replace(job, out=out), encode, tokenizer, n_threads)
            assert n_samples == len(samples)
            shutil.rmtree(out)

        def bare() -> None:
            for images_BHWC in batches:
                encode(images_BHWC)

        def free(batch: np.ndarray) -> np.ndarray:
            return np.zeros((len(batch), info.n_tokens), dtype=np.int64)

        n_runs = 3 + 2 * options.rounds
        with progress(total=n_runs * len(crops), what="bench encode", unit="image") as bar:
            sides = {name: _counted(side, len(crops), bar) for name, side in (("bare", bare), ("ours", stage))}
            turns = take_turns(sides, "bare", options.rounds, time.perf_counter)
        _add(report, "stage", "bare", turns)
        started = time.process_time()
        stage(free)
        rest, encoder = time.process_time() - started, turns.seconds("bare")
        # CPU time of one pass. Divided by the number of cores, it is the time of a pass that keeps every core busy; the best
        # possible ratio is the encoder's time divided by the larger of that time and the encoder's own.
        on_cores = rest + (encoder * options.threads if device == "cpu" else 0.0)
        resize = _resize_turns(samples, size, options.rounds)
        notes = {
            "images": len(crops),
            "source_kilobytes": sum(len(s.image) for s in samples) / len(samples) / 1e3,
            "encoder_threads": options.threads,
            "decode_threads": n_threads,
            "cores": n_cores(),
            "precision": options.precision,
            "encoder_ms_per_image": 1e3 * encoder / len(crops),
            "other_cpu_ms_per_image": 1e3 * rest / len(crops),
            "best_possible_ratio": encoder / max(encoder, on_cores / n_cores()),
            "images_per_second_ours": len(crops) / turns.seconds("ours"),
            "images_per_second_bare": len(crops) / turns.seconds("bare"),
            "images_per_second_core_decode_resize": len(samples) / resize.seconds("ours"),
        }
        if "img2dataset" in resize.runs:
            _add(report, "decode_resize", "img2dataset", resize)
            notes["images_per_second_core_img2dataset"] = len(samples) / resize.seconds("img2dataset")
    return report.note(**notes)


def write_images(root: str, n_images: int, side: int) -> None:
    """Write a tar of JPEGs of multi-scale noise, with about as much detail as photographs."""
    Path(root).mkdir(parents=True)
    rng = np.random.default_rng(0)
    with tarfile.open(f"{root}/00000.tar", "w") as tar:
        for number in range(n_images):
            layers = [
                Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize((side, side))
                for cells in (3, 9, 27, 81)
            ]
            pixels = np.average([np.asarray(layer) for layer in layers], axis=0, weights=(8, 4, 2, 1)).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=90)
            for extension, data in (("jpg", file.getvalue()), ("txt", f"noise number {number}".encode())):
                member = tarfile.TarInfo(f"{number:06d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _counted(side: Callable[[], None], n_images: int, bar: Any) -> Callable[[], None]:
    def run() -> None:
        side()
        bar.update(n_images)

    return run


def _resize_turns(samples: list[RawSample], size: int, rounds: int) -> Comparison:
    sides: dict[str, Callable[[], object]] = {"ours": lambda: [crop_of(sample, size) for sample in samples]}
    try:
        from img2dataset.resizer import Resizer
    except ImportError:
        start = time.process_time()
        sides["ours"]()
        return Comparison("ours", {"ours": [time.process_time() - start]}, {})
    resizer = Resizer(image_size=size, resize_mode="center_crop", resize_only_if_bigger=False)

    def theirs() -> None:
        for sample in samples:
            resizer(io.BytesIO(sample.image))  # img2dataset also encodes the result as a JPEG

    return take_turns({"img2dataset": theirs, **sides}, "img2dataset", rounds, time.process_time)


def _tokenizer(folder: str, captions: list[str]) -> CaptionTokenizer:
    file = f"{folder}/{TOKENIZER_FILE}"
    train_tokenizer(captions, 384, file)  # the vocabulary size hardly matters: the stage only counts the captions' tokens
    return CaptionTokenizer(file)


def _add(report: Report, what: str, other: str, turns: Comparison) -> None:
    report.add(what, other, turns.seconds("ours"), turns.seconds(other), turns.ratio("ours", other))
