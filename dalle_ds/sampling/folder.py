"""A folder of samples: sampled batch by batch, so that a stopped run can resume, with a record that reproduces each image."""

import io
import json
import logging
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_ds.console import progress
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.recipes import flatten
from dalle_ds.sampling.export import Export
from dalle_ds.sampling.image_prompt import ImagePrompt
from dalle_ds.sampling.request import Request, SampleIndex, WorkItem
from dalle_ds.sampling.sampler import Batch, Candidate, RowsDecoded, Sampler, best, candidates_of
from dalle_ds.sampling.scorer import Scorer
from dalle_ds.sampling.settings import SamplingConfig
from dalle_ds.sampling.sheet import SampleSheet
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.storage.names import SAMPLES_FILE

log = logging.getLogger(__name__)

CODES, GRID, IMAGE_PROMPT = "codes.npy", "grid.png", "image_prompt.png"
PARTS, REQUEST = ".parts", "request.json"


class SampleFolder:
    """Samples the images of a request into a folder.

    Each batch is committed as one file in .parts, which holds the codes of the candidates that may be kept and the scores of
    all candidates. Any process may sample any batch. When all batches are committed, one process decodes the kept images and
    writes the record last.
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
        repeated: dict[str, Any] | None = None,
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
        self._items = request.work_items()
        self._to_repeat: dict[SampleIndex, dict[str, Any]] | None = None  # kept samples and their entries in the record
        if repeated is None:
            self._sampler.check(request)
        else:
            entries = {SampleIndex(image["row"], image["candidate"]): image for image in repeated["images"]}
            self._items = [item for item in self._items if any(index in entries for index in item.indices())]
            self._to_repeat = entries

    @classmethod
    def repeating(cls, export: Export, record_file: Path, out: Path) -> "SampleFolder":
        """A folder that reproduces the images of a samples.json in `out`. No scorer is needed.

        Raises:
            DataError: `record_file` is not a samples.json.
            FingerprintMismatch: the record is of another export.
        """
        try:
            record = json.loads(record_file.read_text(encoding="utf-8"))
            settings, captions = SamplingConfig(**record["settings"]), tuple(record["captions"])
            expected, dvae, _ = record["export_fingerprint"], record["dvae"], record["images"]
            image_prompt = _image_prompt_again(record["image_prompt"], record_file) if record.get("image_prompt") else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{record_file} is not a record of samples ({error}); `dalle-ds sample` writes {SAMPLES_FILE}"
            ) from None
        require_same(f"prior of export {export.url}", expected, export.fingerprint, f"{record_file} is of another export.")
        require_same(f"dVAE of export {export.url}", dvae, export.record.dvae)
        about = {"repeats": str(record_file)}
        return cls(export, Request(captions, settings, image_prompt), out, about=about, repeated=record)

    def run(self, ranks: Ranks = ALONE, *, on_rows: Callable[[RowsDecoded], None] | None = None) -> dict[str, Any]:
        """Sample the images or resume, then write PNGs of the kept images, codes.npy, grid.png and samples.json into `out`.

        A finished folder is left unchanged. The batches are distributed over the ranks, which share only `out`. The images do
        not depend on the number of ranks.

        Args:
            on_rows: called after each finished row of a batch. It may raise to end the run; committed batches stay.

        Returns:
            The content of samples.json, on every rank.

        Raises:
            ConfigError: `out` contains other samples.
            DataError: damaged files in `out`.
        """
        # the main rank lists the missing batches before any rank commits one
        record, items = ranks.from_main(self._what_is_left() if ranks.is_main else None)
        if record is None:
            self.draw(items[ranks.rank :: ranks.world_size], on_rows=on_rows, shown=ranks.is_main)
            ranks.gather_objects(None)  # barrier: all batches are committed
            record = ranks.from_main(self._finish() if ranks.is_main else None)
        return record

    def _what_is_left(self) -> tuple[dict[str, Any] | None, list[WorkItem]]:
        record = self._finished()
        return record, [] if record else self.missing()

    def missing(self) -> list[WorkItem]:
        """Returns the batches that are not committed yet.

        Raises:
            ConfigError: the folder contains other samples, finished or unfinished. The message lists the differences.
        """
        file = self.out / PARTS / REQUEST
        for found in (self._read(self.out / SAMPLES_FILE), self._read(file)):
            if found is not None:
                self._require_same(found)
        objects.write_bytes(file, json.dumps(self._identity()).encode())
        return [item for item in self._items if self._part(item) is None]

    def _finished(self) -> dict[str, Any] | None:
        """Returns the record if the folder is finished, else None. Raises ConfigError as `missing`."""
        record = self._read(self.out / SAMPLES_FILE)
        if record is not None:
            self._require_same(record)
            shutil.rmtree(self.out / PARTS, ignore_errors=True)
            log.info("%s is finished with %d images: nothing to do", self.out / SAMPLES_FILE, len(record["images"]))
        return record

    def draw(
        self, items: Sequence[WorkItem], *, on_rows: Callable[[RowsDecoded], None] | None = None, shown: bool = True
    ) -> None:
        """Sample and commit some batches: the part of a `run` that belongs to this process."""
        grid = self.export.prior.config.grid
        first_row = 0 if self.request.image_prompt is None else self.request.image_prompt.rows
        total = sum(item.n_samples for item in items) * (grid - first_row) * grid
        request = self.request
        if self._to_repeat is not None:  # scores and kept candidates come from the record
            request = replace(request, settings=request.settings.model_copy(update={"keep": None}))
        with progress(total=total, what="sample", unit="token", enabled=shown) as bar:

            def show(rows: RowsDecoded) -> None:
                bar.update(len(rows.codes_BN) * grid)
                if on_rows is not None:
                    on_rows(rows)

            self._sampler.run(request, items, self._commit, show)

    def _finish(self) -> dict[str, Any]:
        rows, scores = self._chosen()
        sheet, images = SampleSheet(self.request), []
        for c, (caption, row) in enumerate(zip(self.request.captions, rows, strict=True)):
            for candidate in row:
                k = candidate.index.candidate
                (image,) = self._sampler.images([candidate])
                name = f"{c:03d}-{_slug(caption)}-{k:03d}.png"
                image.save(self.out / name)
                entry = {"file": name, "caption": caption, "row": c, "candidate": k, "seed": candidate.seed}
                images.append(entry if candidate.score is None else {**entry, "score": candidate.score})
                sheet.add(candidate, image)
        sheet.draw(self.export.dvae, self._real_codes_CN).save(self.out / GRID)
        if self.request.image_prompt is not None:
            self.request.image_prompt.image.save(self.out / IMAGE_PROMPT)
        np.save(self.out / CODES, np.stack([[candidate.codes_N.numpy() for candidate in row] for row in rows]))
        record = {
            "schema": 1,
            "export": self.export.url,
            **self._identity(),
            "scorer_name": self._repeated.get("scorer_name") if self._repeated else self.scorer.name if self.scorer else None,
            "codes": CODES,
            "grid": GRID,
            "torch": torch.__version__,
            **self._about,
            "images": images,
            "scores": scores,
        }
        data = json.dumps(record, indent=1, ensure_ascii=False)
        objects.write_bytes(self.out / SAMPLES_FILE, data.encode())
        shutil.rmtree(self.out / PARTS)
        return record

    # ---- identity of a folder --------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        image_prompt, repeated = self.request.image_prompt, self._repeated
        scorer = self.scorer.fingerprint if self.scorer else None
        return {
            "export_fingerprint": self.export.fingerprint,
            "dvae": self.export.record.dvae,
            "tokenizer": self.export.record.tokenizer,
            "device": self.export.device.type,
            "settings": self.request.settings.model_dump(),
            "captions": list(self.request.captions),
            "scorer": scorer if repeated is None else repeated.get("scorer"),
            "image_prompt": image_prompt
            and {"sha256": image_prompt.sha256, "rows": image_prompt.rows, "codes": image_prompt.codes_N.tolist()},
            "is_repeat": repeated is not None,
        }

    def _require_same(self, found: dict[str, Any]) -> None:
        wanted = flatten(self._identity())
        there = flatten({key: found.get(key) for key in self._identity()})
        differences = [
            f"{key} is {_short(there.get(key))} there, {_short(wanted.get(key))} here"
            for key in dict.fromkeys([*wanted, *there])
            if there.get(key) != wanted.get(key)
        ]
        if differences:
            raise ConfigError(
                f"{self.out} contains other samples: {'; '.join(differences)}. Choose another folder, or remove this one"
            )

    @staticmethod
    def _read(file: Path) -> dict[str, Any] | None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise DataError(f"{file} is damaged; remove {file.parent} to sample its images again")
        return found

    # ---- batches ---------------------------------------------------------------------------------------------------------

    def _commit(self, batch: Batch) -> None:
        kept: list[Candidate] = []
        for candidates in candidates_of(batch, self.request):
            if self._to_repeat is None:
                kept += best(candidates, self.request.settings.n_kept)
            else:
                kept += [candidate for candidate in candidates if candidate.index in self._to_repeat]
        indices = np.array([candidate.index for candidate in kept])
        codes = torch.stack([candidate.codes_N for candidate in kept]).numpy().astype(np.uint16)
        scores = {} if batch.scores_CK is None else {"scores": batch.scores_CK}
        data = io.BytesIO()
        np.savez(data, indices=indices, codes=codes, **scores)
        objects.write_bytes(self._part_file(batch.item), data.getvalue())

    def _part(self, item: WorkItem) -> dict[str, np.ndarray] | None:
        """Read the file of a batch. Returns None if the batch is not committed, or if its file is damaged by a power cut."""
        try:
            with np.load(self._part_file(item)) as part:
                return dict(part)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def _part_file(self, item: WorkItem) -> Path:
        return self.out / PARTS / f"batch_{item.number:06d}.npz"

    def _chosen(self) -> tuple[list[list[Candidate]], list[list[float]] | None]:
        """Returns the kept candidates of each caption (best first, codes as uint16), and the scores (C, K) of all candidates.

        Raises:
            DataError: a batch is missing or damaged.
        """
        request, settings = self.request, self.request.settings
        rows: list[list[Candidate]] = [[] for _ in request.captions]
        scores_CK = np.full((len(rows), settings.n), np.nan, dtype=np.float32)
        for item in self._items:
            part = self._part(item)
            if part is None:
                raise DataError(f"{self._part_file(item)} is missing or damaged; run the same command again to sample it again")
            if "scores" in part:
                scores_CK[np.ix_(item.captions, item.candidates)] = part["scores"]
            for entry, codes_N in zip(part["indices"].tolist(), part["codes"], strict=True):
                index = SampleIndex(*entry)
                if self._to_repeat is not None:
                    score = self._to_repeat[index].get("score")
                else:
                    score = float(scores_CK[index]) if self.scorer else None
                rows[index.caption].append(Candidate(index, request.seed_of(index), torch.from_numpy(codes_N), score))
        rows = [best(row, settings.n_kept) for row in rows]
        if self._repeated is not None:
            return rows, self._repeated.get("scores")
        return rows, None if self.scorer is None else scores_CK.tolist()


def _image_prompt_again(entry: dict[str, Any], record_file: Path) -> ImagePrompt:
    with Image.open(record_file.with_name(IMAGE_PROMPT)) as image:
        return ImagePrompt(image.convert("RGB"), torch.tensor(entry["codes"]), entry["rows"], entry["sha256"])


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 3:
        return f"a list of {len(value)}"
    return str(value)[:80]


def _slug(caption: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:40] or "caption"
