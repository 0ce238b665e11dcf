"""Parts of a folder of samples: few files, none with half a caption, and the same images however they are divided."""

import json
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.pretrained.clip import Clip
from dalle_ds.sampling import export, parts
from dalle_ds.sampling.export import load_export
from dalle_ds.sampling.folder import SampleFolder
from dalle_ds.sampling.parts import PartFiles, divide
from dalle_ds.sampling.request import Request
from dalle_ds.sampling.sampler import Sampler
from dalle_ds.sampling.scorer import load_scorer
from dalle_ds.sampling.settings import SamplingConfig
from tests.sampling.exports import draw_samples, make_export, repeat_samples
from tests.sampling.test_folder import CAPTIONS, RedScorer, files
from tests.support.clip_models import make_clip
from tests.support.thread_ranks import run_ranks


@pytest.fixture(scope="module")
def export_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize(
    ("n_captions", "n", "batch", "n_parts"),
    [(1000, 512, 32, 1000), (1000, 500, 32, 1000), (6000, 4, 1, 1500), (30_000, 1, 32, 938), (1, 512, 32, 16)],
)
def test_a_large_request_has_a_part_for_a_caption_and_a_small_one_for_a_batch(
    n_captions: int, n: int, batch: int, n_parts: int
) -> None:
    request = Request(tuple(f"number {i}" for i in range(n_captions)), SamplingConfig(n=n, batch=batch))
    items = request.work_items()
    found = divide(items)
    assert len(found) == n_parts and [part.number for part in found] == list(range(n_parts))
    assert [item for part in found for item in part.items] == items
    if len(items) > parts.SMALL_REQUEST:
        assert all(part.candidates == range(n) for part in found)
        assert sum(len(part.captions) for part in found) == n_captions
        assert min(len(part.items) for part in found[:-1]) >= parts.BATCHES


def test_requests_of_billions_are_refused() -> None:
    captions = tuple(f"number {i}" for i in range(100))
    request = Request(captions, SamplingConfig(n=65_536, batch=1))
    with pytest.raises(ConfigError, match="100 captions with n 65536 are 6553600 batches of 1, expected at most 2000000"):
        request.work_items()
    assert len(Request(captions, SamplingConfig(n=65_536, batch=8)).work_items()) == 819_200


def test_images_do_not_depend_on_the_parts(export_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export, settings = load_export(export_folder), SamplingConfig(n=7, keep=2, batch=3)
    captions = (*CAPTIONS, "A green dot.", "Two rings.", "A line.")
    fine = draw_samples(export, captions, settings, tmp_path / "fine", scorer=RedScorer())
    monkeypatch.setattr(parts, "SMALL_REQUEST", 1)
    monkeypatch.setattr(parts, "BATCHES", 4)
    coarse = SampleFolder(export, Request(captions, settings), tmp_path / "coarse", RedScorer())
    missing = coarse.missing()
    assert [part.captions for part in missing] == [range(2), range(2, 4), range(4, 5)]
    coarse.draw(missing[1:2])
    (file,) = (tmp_path / "coarse" / ".parts").glob("*.npz")
    with np.load(file) as content:
        assert content["codes"].shape == (2 * 2, 16) and content["scores"].shape == (2, 7), "only what may be kept"
    assert coarse.run() == fine and files(tmp_path / "coarse") == files(tmp_path / "fine")
    repeat_samples(export, tmp_path / "coarse" / "samples.json", tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "fine")


@pytest.mark.parametrize(
    "damage", [(b"scores.npy", b"scoreS.npy"), (b"PK\x01\x02", b"PK\x01\x03"), (b"\x93NUMPY", b"\x92NUMPY")]
)
def test_a_damaged_part_is_sampled_again(export_folder: Path, tmp_path: Path, damage: tuple[bytes, bytes]) -> None:
    """Changed bits, also of a name, without which the part would have no scores."""
    export, settings = load_export(export_folder), SamplingConfig(n=4, keep=1, batch=4)
    whole = draw_samples(export, CAPTIONS, settings, tmp_path / "whole", scorer=RedScorer())
    again = SampleFolder(export, Request(tuple(CAPTIONS), settings), tmp_path / "again", RedScorer())
    again.draw(again.missing())
    first = min((tmp_path / "again" / ".parts").glob("*.npz"))
    head, found, tail = first.read_bytes().rpartition(damage[0])
    assert found
    first.write_bytes(head + damage[1] + tail)
    assert [part.number for part in again.missing()] == [0]
    record = again.run()
    assert record is not None and record["images"] == whole["images"] and record["scores"] == whole["scores"]


def test_a_record_with_fewer_images_of_some_captions_is_refused(export_folder: Path, tmp_path: Path) -> None:
    export, file = load_export(export_folder), tmp_path / "all" / "samples.json"
    record = draw_samples(export, CAPTIONS, SamplingConfig(n=2), tmp_path / "all")
    file.write_text(json.dumps({**record, "images": record["images"][:3]}))
    with pytest.raises(DataError, match="more images of some captions"):
        repeat_samples(export, file, tmp_path / "again")


def test_every_rank_decodes_its_own_images_and_reads_its_share_of_the_parts(
    export_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, captions = SamplingConfig(n=4, batch=2), tuple(f"Number {i}." for i in range(7))
    alone = draw_samples(load_export(export_folder), captions, settings, tmp_path / "alone")
    started = SampleFolder(load_export(export_folder), Request(captions, settings), tmp_path / "ranks")
    started.draw(started.missing()[:10])
    torn = tmp_path / "ranks" / ".parts" / "batch_000004.npz"
    torn.write_bytes(torn.read_bytes()[:50])

    decoded, read, drawn = Counter[str](), Counter[tuple[str, int]](), Counter[int]()
    images, read_part = Sampler.images, PartFiles.read

    def count_images(sampler: Sampler, candidates: Any) -> Any:
        decoded[threading.current_thread().name] += len(candidates)
        return images(sampler, candidates)

    def count_reads(store: PartFiles, part: parts.Part) -> Any:
        read[threading.current_thread().name, part.number] += 1
        return read_part(store, part)

    monkeypatch.setattr(Sampler, "images", count_images)
    monkeypatch.setattr(PartFiles, "read", count_reads)

    def work(ranks: Ranks) -> Any:
        folder = SampleFolder(load_export(export_folder), Request(captions, settings), tmp_path / "ranks")
        return folder.run(ranks, on_rows=lambda rows: drawn.update([rows.item.number]))

    assert run_ranks(3, work) == [{**alone, "export": str(export_folder)}, None, None]
    assert files(tmp_path / "ranks") == files(tmp_path / "alone")
    assert set(drawn) == {4, *range(10, 14)}, "the torn part is drawn again, the others are not"
    assert decoded == {"0": 12, "1": 8, "2": 8}, "7 captions of 4 images"
    reads_of_part = Counter(number for _, number in read.elements())
    assert all(reads_of_part[number] == 2 + (number < 10) for number in range(14)), "to check, to decode, to record"
    assert sum(n for (rank, _), n in read.items() if rank != "0") == 6 + 8, "two thirds of the first two"


def test_one_rank_reads_the_small_files_for_all(export_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = str(make_clip(tmp_path / "clip"))
    readers: list[tuple[str, str]] = []

    def recording(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            readers.append((name if name != "weights" else args[1], threading.current_thread().name))
            return read(*args, **options)

        return call

    monkeypatch.setattr(export, "read_export_record", recording("record", export.read_export_record))
    monkeypatch.setattr(export, "read_weights", recording("weights", export.read_weights))
    monkeypatch.setattr(Clip, "load", recording("clip", Clip.load))

    def work(ranks: Ranks) -> tuple[str, str, int]:
        found, scorer = load_export(export_folder, ranks=ranks), load_scorer(clip, ranks=ranks)
        return found.record.dvae, scorer.fingerprint, found.tokenizer.vocab_size

    assert len(set(run_ranks(3, work))) == 1
    assert sorted(readers) == [("clip", "0"), ("dvae", "0"), *(("prior", str(rank)) for rank in range(3)), ("record", "0")]
    # they are sent to processes
    small, scorer = export._SmallFiles.read(export_folder), Clip.load(clip)
    for one in (small, scorer):
        again = pickle.loads(pickle.dumps(one))
        assert type(again) is type(one)
    assert torch.equal(again.text_features(["a red bar"]), scorer.text_features(["a red bar"]))
