"""A folder of samples: sampled batch by batch, so that a stopped run can resume, with a record that reproduces each image."""

import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_ds.console import progress
from dalle_ds.data.images import ImageProblem, decode_image
from dalle_ds.errors import ConfigError, Damaged, DataError
from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.recipes import differing, flatten, from_values
from dalle_ds.sampling.export import Export, told_of_cut
from dalle_ds.sampling.image_prompt import repeat_image_prompt
from dalle_ds.sampling.parts import Collector, Part, PartFiles, divide
from dalle_ds.sampling.request import Request, SampleIndex
from dalle_ds.sampling.sampler import Batch, Candidate, RowsDecoded, Sampler, best, candidates_of
from dalle_ds.sampling.scorer import Scorer
from dalle_ds.sampling.settings import SamplingConfig
from dalle_ds.sampling.sheet import MAX_CAPTIONS, MAX_IMAGES, SampleSheet
from dalle_ds.storage import objects
from dalle_ds.storage.arrays import read_npy
from dalle_ds.storage.atomic import atomic_write
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.storage.names import SAMPLES_FILE
from dalle_ds.storage.samples_record import SampledImage, SamplesRecord, read_samples_record
from dalle_ds.storage.text import parse_json

log = logging.getLogger(__name__)

CODES, GRID, IMAGE_PROMPT = "codes.npy", "grid.png", "image_prompt.png"
PARTS, REQUEST = ".parts", "request.json"
PNG_END = b"IEND\xaeB`\x82"


class SampleFolder:
    """Samples the images of a request into a folder.

    Parts (`parts.py`) are committed as files in .parts, which hold the codes of the candidates that may be kept and the scores
    of all candidates. Any process may sample any part. When all parts are committed, each rank decodes the kept images of its
    captions, and the main rank writes the record last.
    """

    def __init__(
        self,
        export: Export,
        request: Request,
        out: Path,
        scorer: Scorer | None = None,
        *,
        real_codes_CN: Tensor | None = None,
        about: dict[str, Any] | None = None,
        repeated: SamplesRecord | None = None,
    ) -> None:
        """
        Args:
            scorer: ranks the candidates, of which the best are kept.
            real_codes_CN: codes of the captions' real images, shown as the first column of the grid.
            about: further entries for samples.json, such as the source of the captions.
            repeated: record whose images are reproduced without a scorer, see `repeating`.

        Raises:
            ConfigError: the export or the scorer does not support the settings.
        """
        self.export, self.request, self.out, self.scorer = export, request, out, scorer
        self._real_codes_CN, self._about, self._repeated = real_codes_CN, about or {}, repeated
        self._sampler = Sampler(export, scorer)
        self._parts, self._files = divide(request.work_items()), PartFiles(out / PARTS, has_scores=scorer is not None)
        self._cut = export.cut_captions(request.captions)
        self._to_repeat: dict[SampleIndex, SampledImage] | None = None  # kept samples and their entries in the record
        if repeated is None:
            self._sampler.check(request)
        else:
            entries = {SampleIndex(image.row, image.candidate): image for image in repeated.images}
            wanted = [
                (part.number, tuple(item for item in part.items if any(index in entries for index in item.indices())))
                for part in self._parts
            ]
            self._parts = [Part(number, items) for number, items in wanted if items]
            self._to_repeat = entries

    @classmethod
    def repeating(cls, export: Export, record_file: Path, out: Path) -> "SampleFolder":
        """A folder that reproduces the images of a samples.json in `out`. No scorer is needed.

        Raises:
            DataError: `record_file` is not a samples.json, or has not equally many images of each caption.
            FingerprintMismatch: the record is of another export.
            ConfigError: the export is loaded in another number format.
        """
        record = read_samples_record(record_file)
        counts = Counter(image.row for image in record.images)
        if len({counts[row] for row in range(len(record.captions))}) > 1:
            raise DataError(f"{record_file} has more images of some captions than of others; expected equally many of each")
        settings = from_values(SamplingConfig, record.settings, f"settings of {record_file}")
        prior = f"prior of export {export.url}"
        require_same(prior, record.export_fingerprint, export.fingerprint, f"{record_file} is of another export.")
        require_same(f"dVAE of export {export.url}", record.dvae, export.record.dvae)
        if record.dtype != export.dtype:
            found, here = (dtype or "fp32" for dtype in (record.dtype, export.dtype))
            raise ConfigError(f"{record_file} was sampled in {found}, expected {here} as the export is loaded")
        image_prompt = record.image_prompt and repeat_image_prompt(
            export, record.image_prompt, record_file.with_name(IMAGE_PROMPT)
        )
        about = {"repeats": str(record_file)}
        return cls(export, Request(record.captions, settings, image_prompt), out, about=about, repeated=record)

    def run(self, ranks: Ranks = ALONE, *, on_rows: Callable[[RowsDecoded], None] | None = None) -> dict[str, Any] | None:
        """Sample the images or resume, then write PNGs of the kept images, codes.npy, grid.png and samples.json into `out`.

        A finished folder is left unchanged. The parts are distributed over the ranks, which share only `out`. The images do
        not depend on the number of ranks.

        Args:
            on_rows: called after each finished row of a batch. It may raise to end the run; committed parts stay.

        Returns:
            The content of samples.json, on the main rank. None on the others.

        Raises:
            ConfigError: `out` contains other samples.
            DataError: damaged files in `out`.
        """
        if self._cut and ranks.is_main:
            log.warning("%s", told_of_cut(self._cut))
        if ranks.once(self._is_finished):
            return self._read(self.out / SAMPLES_FILE) if ranks.is_main else None
        missing = self.missing(ranks)
        self.draw(missing[ranks.rank :: ranks.world_size], on_rows=on_rows, shown=ranks.is_main)
        ranks.gather_objects(None)  # barrier: all parts are committed
        groups = self._groups()[ranks.rank :: ranks.world_size]
        self._write_images(chain.from_iterable(map(self._rows_of, groups)))
        ranks.gather_objects(None)  # barrier: all images are written
        return self._finish() if ranks.is_main else None

    def missing(self, ranks: Ranks = ALONE) -> list[Part]:
        """Returns the parts that are not committed yet. All ranks must call it together; each reads a share of the others.

        Raises:
            ConfigError: the folder contains other samples, finished or unfinished. The message lists the differences.
        """
        existing = ranks.once(self._begin)
        there = [part for part in self._parts if self._files.path(part).name in existing]
        own = there[ranks.rank :: ranks.world_size]
        damaged = set().union(*ranks.each(lambda: {part.number for part in own if self._files.read(part) is None}))
        whole = {part.number for part in there} - damaged
        return [part for part in self._parts if part.number not in whole]

    def _begin(self) -> set[str]:
        """Write the request, unless it is there. Returns the names of the committed parts. Raises ConfigError as `missing`."""
        file = self.out / PARTS / REQUEST
        for found in (self._read(self.out / SAMPLES_FILE), self._read(file)):
            if found is not None:
                self._require_same(found)
        objects.write_bytes(file, json.dumps(self._identity()).encode())
        return self._files.existing()

    def _is_finished(self) -> bool:
        """Whether the folder is finished. Files that it lacks are made again. Raises ConfigError as `missing`."""
        record = self._read(self.out / SAMPLES_FILE)
        if record is None:
            return False
        self._require_same(record)
        images = read_samples_record(self.out / SAMPLES_FILE).images
        lacking = self._lacking([image.file for image in images])
        if lacking:
            log.warning("%s lacks %s: they are made again", self.out, _listed(lacking))
            return self._restore(images)
        shutil.rmtree(self.out / PARTS, ignore_errors=True)
        log.info("%s is finished with %d images: nothing to do", self.out / SAMPLES_FILE, len(images))
        return True

    def _lacking(self, images: Sequence[str]) -> list[str]:
        """Returns the names of the files of a finished folder that are missing or not whole."""
        prompt = [] if self.request.image_prompt is None else [IMAGE_PROMPT]
        lacking = [name for name in (*images, GRID, *prompt) if not _is_whole_png(self.out / name)]
        return lacking if self._codes_again(len(images)) is not None else [*lacking, CODES]

    def _codes_again(self, n_images: int) -> np.ndarray | None:
        """The content of codes.npy as (n_images, N). None if the file is missing or damaged."""
        grid, n_codes = self.export.prior.config.grid, self.export.prior.config.n_codes
        try:
            codes = read_npy(self.out / CODES)
        except (FileNotFoundError, Damaged):
            return None
        fits = codes.dtype.kind == "u" and codes.size == n_images * grid**2 and (codes < n_codes).all()
        return codes.reshape(n_images, grid**2) if fits else None

    def _restore(self, images: Sequence[SampledImage]) -> bool:
        """Write the files that a finished folder lacks again from its codes. Returns False if the codes are lost too."""
        codes_BN = self._codes_again(len(images))
        if codes_BN is None:
            return False
        rows: list[list[Candidate]] = [[] for _ in self.request.captions]
        for image, codes_N in zip(images, codes_BN, strict=True):
            index = SampleIndex(image.row, image.candidate)
            candidate = Candidate(index, self.request.seed_of(index), torch.from_numpy(codes_N), image.score)
            rows[image.row].append(candidate)
        self._write_images(rows, only_lacking=True)
        self._write_grid(rows)
        return True

    def draw(self, parts: Sequence[Part], *, on_rows: Callable[[RowsDecoded], None] | None = None, shown: bool = True) -> None:
        """Sample and commit some parts: the share of a `run` that belongs to this process."""
        grid = self.export.prior.config.grid
        first_row = 0 if self.request.image_prompt is None else self.request.image_prompt.rows
        total = sum(part.n_samples for part in parts) * (grid - first_row) * grid
        request = self.request
        if self._to_repeat is not None:  # scores and kept candidates come from the record
            request = replace(request, settings=request.settings.model_copy(update={"keep": None}))
        with progress(total=total, what="sample", unit="token", enabled=shown) as bar:

            def show(rows: RowsDecoded) -> None:
                bar.update(len(rows.codes_BN) * grid)
                if on_rows is not None:
                    on_rows(rows)

            collector = Collector(parts, self._files, self._kept)
            self._sampler.run(request, [item for part in parts for item in part.items], collector.take, show)

    def _finish(self) -> dict[str, Any]:
        """Write codes.npy, the grid and the record from the parts. Returns the record."""
        settings, n_tokens = self.request.settings, self.export.prior.config.grid**2
        scores_CK = np.full((len(self.request.captions), settings.n), np.nan, dtype=np.float32) if self.scorer else None
        n_captions = len(self.request.captions)
        n_kept = settings.n_kept if self._to_repeat is None else len(self._to_repeat) // n_captions
        images: list[dict[str, Any]] = []
        shown: list[list[Candidate]] = []
        with atomic_write(self.out / CODES) as temporary:
            # mapped: the codes of 30,000 captions with 8 images each are 0.5 GB
            codes = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint16, shape=(n_captions, n_kept, n_tokens))
            codes_MN = codes.reshape(-1, n_tokens)
            for group in self._groups():
                for row in self._rows_of(group, scores_CK):
                    for candidate in row:
                        codes_MN[len(images)] = candidate.codes_N.numpy()
                        images.append(self._entry(candidate))
                    if len(shown) < MAX_CAPTIONS:
                        shown.append(row)
            codes.flush()
        self._write_grid(shown)
        if self._repeated:
            scores = self._repeated.scores and [list(row) for row in self._repeated.scores]
        else:
            scores = None if scores_CK is None else scores_CK.tolist()
        record = {
            "schema": 1,
            "export": self.export.url,
            **self._identity(),
            "scorer_name": self._repeated.scorer_name if self._repeated else self.scorer.name if self.scorer else None,
            "codes": CODES,
            "grid": GRID,
            "torch": torch.__version__,
            **self._about,
            "cut_captions": [cut._asdict() for cut in self._cut],
            "images": images,
            "scores": scores,
        }
        data = json.dumps(record, indent=1, ensure_ascii=False)
        objects.write_bytes(self.out / SAMPLES_FILE, data.encode())
        shutil.rmtree(self.out / PARTS)
        return record

    def _entry(self, candidate: Candidate) -> dict[str, Any]:
        """The record's entry of an image."""
        c, k = candidate.index
        caption = self.request.captions[c]
        name = f"{c:03d}-{_slug(caption)}-{k:03d}.png"
        entry = {"file": name, "caption": caption, "row": c, "candidate": k, "seed": candidate.seed}
        return entry if candidate.score is None else {**entry, "score": candidate.score}

    def _write_images(self, rows: Iterable[Sequence[Candidate]], *, only_lacking: bool = False) -> None:
        """Decode images and write them. In an unfinished folder, images may be of other samples, so all are written."""
        for row in rows:
            for candidate in row:
                file = self.out / self._entry(candidate)["file"]
                if not (only_lacking and _is_whole_png(file)):
                    (image,) = self._sampler.images([candidate])
                    with atomic_write(file) as temporary:
                        image.save(temporary, "png")

    def _write_grid(self, rows: Sequence[Sequence[Candidate]]) -> None:
        """Write the grid of the first images, which are there, and the image prompt."""
        sheet = SampleSheet(self.request)
        for row in rows[:MAX_CAPTIONS]:
            for candidate in row[:MAX_IMAGES]:
                sheet.add(candidate, _open(self.out / self._entry(candidate)["file"]))
        sheet.draw(self.export.dvae, self._real_codes_CN).save(self.out / GRID)
        if self.request.image_prompt is not None:
            self.request.image_prompt.image.save(self.out / IMAGE_PROMPT)

    # ---- identity of a folder --------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        image_prompt, repeated = self.request.image_prompt, self._repeated
        scorer = self.scorer.fingerprint if self.scorer else None
        return {
            "export_fingerprint": self.export.fingerprint,
            "dvae": self.export.record.dvae,
            "tokenizer": self.export.record.tokenizer,
            "device": self.export.device.type,
            "dtype": self.export.dtype,
            "settings": self.request.settings.model_dump(),
            "captions": list(self.request.captions),
            "scorer": scorer if repeated is None else repeated.scorer,
            "image_prompt": image_prompt
            and {"sha256": image_prompt.sha256, "rows": image_prompt.rows, "codes": image_prompt.codes_N.tolist()},
            "is_repeat": repeated is not None,
        }

    def _require_same(self, found: dict[str, Any]) -> None:
        wanted = flatten(self._identity())
        there = flatten({key: found.get(key) for key in self._identity()})
        differences = [f"{key} is {_short(old)} there, {_short(new)} here" for key, old, new in differing(there, wanted)]
        if differences:
            raise ConfigError(
                f"{self.out} contains other samples: {'; '.join(differences)}. Choose another folder, or remove this one"
            )

    @staticmethod
    def _read(file: Path) -> dict[str, Any] | None:
        try:
            found = parse_json(file.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise DataError(f"{file} is damaged; remove {file.parent} to sample its images again")
        return found

    # ---- batches ---------------------------------------------------------------------------------------------------------

    def _kept(self, kept: list[Candidate], batch: Batch) -> list[Candidate]:
        """What may still be kept of earlier batches of a part and of this one."""
        found = [candidate for candidates in candidates_of(batch, self.request) for candidate in candidates]
        if self._to_repeat is not None:
            return kept + [candidate for candidate in found if candidate.index in self._to_repeat]
        n = self.request.settings.n_kept
        of_captions = groupby(sorted([*kept, *found], key=_caption_of), _caption_of)
        return [candidate for _, candidates in of_captions for candidate in best(candidates, n)]

    def _groups(self) -> list[list[Part]]:
        """The parts that share captions, caption by caption. A rank can finish the images of a group alone."""
        return [list(parts) for _, parts in groupby(self._parts, lambda part: part.captions)]

    def _rows_of(self, group: Sequence[Part], scores_CK: np.ndarray | None = None) -> list[list[Candidate]]:
        """Returns the kept candidates of each caption of a group: best first, codes as uint16.

        Args:
            scores_CK: gets the scores of all candidates of the captions.

        Raises:
            DataError: a part is missing or damaged.
        """
        rows: dict[int, list[Candidate]] = {c: [] for c in group[0].captions}
        for part in group:
            content = self._files.read(part)
            if content is None:
                raise DataError(
                    f"{self._files.path(part)} is missing or damaged; run the same command again to sample it again"
                )
            if content.scores is not None and scores_CK is not None:
                scores_CK[np.ix_(part.captions, part.candidates)] = content.scores
            for index, codes_N in content.samples():
                score = None
                if self._to_repeat is not None:
                    score = self._to_repeat[index].score
                elif content.scores is not None:
                    place = index.caption - part.captions.start, index.candidate - part.candidates.start
                    score = float(content.scores[place])
                rows[index.caption].append(Candidate(index, self.request.seed_of(index), codes_N, score))
        return [best(row, self.request.settings.n_kept) for row in rows.values()]


def _caption_of(candidate: Candidate) -> int:
    return candidate.index.caption


def _open(file: Path) -> Image.Image:
    try:
        return decode_image(file.read_bytes())
    except ImageProblem as problem:
        raise DataError(f"{file} is damaged ({problem.reason}); remove it, and run the same command again") from None


def _is_whole_png(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            opened.seek(-len(PNG_END), os.SEEK_END)  # not the whole file: there may be 240,000 of them
            return opened.read() == PNG_END
    except OSError:
        return False


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} files ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 3:
        return f"a list of {len(value)}"
    return str(value)[:80]


def _slug(caption: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:40] or "caption"
