"""A folder of samples: drawn batch by batch, so that a stopped run goes on, with a record that repeats each picture."""

import io
import json
import logging
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_ds.console import progress
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.recipes import flatten
from dalle_ds.sampling.decode import decode_pictures, partial_pictures
from dalle_ds.sampling.export import Export
from dalle_ds.sampling.given import GivenPicture
from dalle_ds.sampling.grid import picture_grid
from dalle_ds.sampling.sampler import (
    Batch,
    Candidate,
    Kept,
    Request,
    Rows,
    Sampler,
    SampleSettings,
    Unit,
    best,
    candidates_of,
    seed_of,
)
from dalle_ds.sampling.scorer import Scorer
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import require_same

log = logging.getLogger(__name__)

RECORD, CODES, GRID, GIVEN = "samples.json", "codes.npy", "grid.png", "given.png"
PARTS, REQUEST = ".parts", "request.json"
SHEET_CAPTIONS, SHEET_PICTURES = 64, 32
"""What grid.png shows at most: it is there to look at."""


class SampleFolder:
    """Pictures for a request, on their way into a folder.

    Every batch is committed by one file below .parts: the codes of those of its pictures that may be kept, and all scores. Any
    process may draw any batch; where all are there, `finish` decodes what is kept, and writes the record last.
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
        """`real_codes_CN`, `about`: see `sample`. `repeated`: a record whose pictures are drawn again, without a scorer."""
        self.export, self.request, self.out, self.scorer = export, request, out, scorer
        self._real_codes_CN, self._about, self._repeated = real_codes_CN, about or {}, repeated
        self._sampler = Sampler(export, scorer)
        if repeated is None:
            self._sampler.check(request)
        self._chosen = None if repeated is None else {(image["row"], image["candidate"]): image for image in repeated["images"]}
        units = request.units()
        self.units = units if self._chosen is None else [unit for unit in units if any(map(self._chosen.get, _places(unit)))]

    def missing(self) -> list[Unit]:
        """The batches that nobody has drawn yet.

        Raises:
            ConfigError: the folder holds other pictures, or a part of them; the message says what differs.
        """
        file = self.out / PARTS / REQUEST
        for found in (self._read(self.out / RECORD), self._read(file)):
            if found is not None:
                self._require_same(found)
        objects.write_bytes(file, json.dumps(self._identity()).encode())
        return [unit for unit in self.units if self._part(unit) is None]

    def finished(self) -> dict[str, Any] | None:
        """The record, where all is done. Raises ConfigError as `missing`."""
        record = self._read(self.out / RECORD)
        if record is not None:
            self._require_same(record)
            shutil.rmtree(self.out / PARTS, ignore_errors=True)
            log.info("%s is finished: %d pictures; nothing to do", self.out / RECORD, len(record["images"]))
        return record

    def draw(self, units: Sequence[Unit], *, on_rows: Callable[[Rows], None] | None = None, shown: bool = True) -> None:
        """Draw and commit some batches. `on_rows` may raise to end it: what is committed by then stays."""
        grid = self.export.prior.config.grid
        first_row = 0 if self.request.given is None else self.request.given.rows
        total = sum(unit.n_pictures for unit in units) * (grid - first_row) * grid
        # a repeated record brings its scores, and its choice
        sampler, request = self._sampler, self.request
        if self._repeated is not None:
            settings = request.settings.model_copy(update={"keep": None})
            request = Request(request.captions, settings, request.given)
        with progress(total=total, what="sample", unit="token", enabled=shown) as bar:

            def show(rows: Rows) -> None:
                bar.update(len(rows.codes_BN) * grid)
                if on_rows is not None:
                    on_rows(rows)

            sampler.run(request, units, self._commit, show)

    def finish(self) -> dict[str, Any]:
        """Write the kept pictures, codes.npy, grid.png and, last, samples.json -> its content."""
        rows, scores = self._kept()
        sheet_rows: list[list[Candidate]] = []
        images = []
        for c, (caption, row) in enumerate(zip(self.request.captions, rows, strict=True)):
            shown: list[Candidate] = []
            for kept in row:
                (picture,) = decode_pictures(self.export.dvae, kept.codes_N[None].long())
                seed = seed_of(self.request.settings.seed, caption, kept.candidate)
                name = f"{c:03d}-{_slug(caption)}-{kept.candidate:03d}.png"
                picture.save(self.out / name)
                image = {"file": name, "caption": caption, "row": c, "candidate": kept.candidate, "seed": seed}
                images.append(image if kept.score is None else {**image, "score": kept.score})
                if c < SHEET_CAPTIONS and len(shown) < SHEET_PICTURES:
                    shown.append(Candidate(caption, kept.candidate, seed, kept.score, picture))
            if shown:
                sheet_rows.append(shown)
        self._sheet(sheet_rows).save(self.out / GRID)
        if self.request.given is not None:
            self.request.given.picture.save(self.out / GIVEN)
        np.save(self.out / CODES, np.stack([[kept.codes_N.numpy() for kept in row] for row in rows]))
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
        objects.write_bytes(self.out / RECORD, data.encode())
        shutil.rmtree(self.out / PARTS)
        return record

    # ---- what a folder is of ---------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        given, repeated = self.request.given, self._repeated
        scorer = self.scorer.fingerprint if self.scorer else None
        return {
            "export_fingerprint": self.export.fingerprint,
            "dvae": self.export.record.dvae,
            "tokenizer": self.export.record.tokenizer,
            "device": self.export.device.type,
            "settings": self.request.settings.model_dump(),
            "captions": list(self.request.captions),
            "scorer": scorer if repeated is None else repeated.get("scorer"),
            "picture": given and {"sha256": given.sha256, "rows": given.rows, "codes": given.codes_N.tolist()},
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
                f"{self.out} holds other samples: {'; '.join(differences)}. Choose another folder, or remove this one"
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
            raise DataError(f"{file} is damaged; remove {file.parent} to draw its pictures again")
        return found

    # ---- batches ---------------------------------------------------------------------------------------------------------

    def _commit(self, batch: Batch) -> None:
        places, kept = [], []
        for c, candidates in candidates_of(batch):
            if self._chosen is None:
                chosen = best(candidates, self.request.settings.n_kept)
            else:
                chosen = [candidate for candidate in candidates if (c, candidate.candidate) in self._chosen]
            places += [(c, candidate.candidate) for candidate in chosen]
            kept += [candidate.codes_N for candidate in chosen]
        data = io.BytesIO()
        scores = {} if batch.scores_CK is None else {"scores": batch.scores_CK}
        np.savez(data, places=np.array(places), codes=torch.stack(kept).numpy().astype(np.uint16), **scores)
        objects.write_bytes(self._part_file(batch.unit), data.getvalue())

    def _part(self, unit: Unit) -> dict[str, np.ndarray] | None:
        """None where it is not drawn yet, or the file is torn, as after a power cut."""
        try:
            with np.load(self._part_file(unit)) as part:
                return dict(part)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def _part_file(self, unit: Unit) -> Path:
        return self.out / PARTS / f"batch_{unit.number:06d}.npz"

    def _kept(self) -> tuple[list[list[Kept]], list[list[float]] | None]:
        """The kept candidates of each caption, best first, their codes as uint16; and the scores of all candidates."""
        settings = self.request.settings
        rows: list[list[Kept]] = [[] for _ in self.request.captions]
        scores_CK = np.full((len(rows), settings.n), np.nan, dtype=np.float32)
        for unit in self.units:
            part = self._part(unit)
            if part is None:
                raise DataError(f"{self._part_file(unit)} is gone or damaged; the same command draws it again")
            if "scores" in part:
                scores_CK[np.ix_(unit.captions, unit.candidates)] = part["scores"]
            for (c, k), codes_N in zip(part["places"].tolist(), part["codes"], strict=True):
                if self._chosen is not None:
                    score = self._chosen[c, k].get("score")
                else:
                    score = float(scores_CK[c, k]) if self.scorer else None
                rows[c].append(Kept(k, score, torch.from_numpy(codes_N)))
        rows = [best(row, settings.n_kept) for row in rows]
        if self._repeated is not None:
            return rows, self._repeated.get("scores")
        return rows, None if self.scorer is None else scores_CK.tolist()

    def _sheet(self, rows: Sequence[Sequence[Candidate]]) -> Image.Image:
        dvae, settings, given = self.export.dvae, self.request.settings, self.request.given
        leading: list[tuple[str, list[Image.Image]]] = []  # columns before the samples
        if self._real_codes_CN is not None:
            leading.append(("real, by its codes", decode_pictures(dvae, self._real_codes_CN[: len(rows)])))
        if given is not None:
            top = partial_pictures(dvae, given.codes_N[None], given.rows)
            leading += [("given", [given.picture] * len(rows)), (f"kept: {given.rows} rows", top * len(rows))]
        columns = [title for title, _ in leading] + [f"sample {k + 1}" for k in range(len(rows[0]))] if leading else []
        pictures = [
            [*(column[c] for _, column in leading), *(candidate.picture for candidate in row)] for c, row in enumerate(rows)
        ]
        labels = [
            [*([""] * len(leading)), *("" if candidate.score is None else f"{candidate.score:.3f}" for candidate in row)]
            for row in rows
        ]
        limits = [f"guidance {settings.guidance:g}"] * (settings.guidance != 1)
        limits += [f"top-k {settings.top_k}"] * (settings.top_k > 0) + [f"top-p {settings.top_p}"] * (settings.top_p < 1)
        limits += [f"best {settings.n_kept} of {settings.n} by score"] * any(any(row) for row in labels)
        title = ", ".join([f"Temperature {settings.temperature:g}", *limits, f"seed {settings.seed}"])
        captions = self.request.captions[: len(rows)]
        return picture_grid(pictures, captions, title=title, column_titles=columns, labels=labels)


def sample(
    export: Export,
    captions: Sequence[str],
    settings: SampleSettings,
    out: Path,
    *,
    scorer: Scorer | None = None,
    given: GivenPicture | None = None,
    real_codes_CN: Tensor | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Draw `settings.n` pictures for each caption, or go on with it; write PNGs of the kept ones, codes.npy, grid.png and
    samples.json into `out`. A finished folder is left alone.

    Args:
        scorer: what chooses the kept ones.
        given: a picture whose top rows all samples begin with.
        real_codes_CN: codes of the captions' real pictures; decoded as the first column of the grid.
        about: further entries for samples.json (where captions came from).

    Returns:
        The content of samples.json.

    Raises:
        ConfigError: settings that this export or scorer cannot follow, or `out` holds other samples.
        DataError: no captions, or damaged files in `out`.
    """
    request = Request(tuple(captions), settings, given)
    return _complete(SampleFolder(export, request, out, scorer, real_codes_CN=real_codes_CN, about=about))


def repeat(export: Export, record_file: Path, out: Path) -> dict[str, Any]:
    """Draw the pictures of a samples.json again, into `out`; the scorer is not needed for that.

    Raises:
        DataError: not such a file. FingerprintMismatch: `export` is another model.
    """
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        settings, captions = SampleSettings(**record["settings"]), tuple(record["captions"])
        expected, dvae, _ = record["export_fingerprint"], record["dvae"], record["images"]
        given = _given_again(record["picture"], record_file) if record.get("picture") else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{record_file} is not a record of samples ({error}); `dalle-ds sample` writes samples.json") from None
    require_same(f"prior of export {export.url}", expected, export.fingerprint, f"{record_file} is another one's.")
    require_same(f"dVAE of export {export.url}", dvae, export.record.dvae)
    request, about = Request(captions, settings, given), {"repeats": str(record_file)}
    return _complete(SampleFolder(export, request, out, about=about, repeated=record))


def _complete(folder: SampleFolder) -> dict[str, Any]:
    finished = folder.finished()
    if finished is None:
        folder.draw(folder.missing())
        finished = folder.finish()
    return finished


def _given_again(entry: dict[str, Any], record_file: Path) -> GivenPicture:
    with Image.open(record_file.with_name(GIVEN)) as picture:
        return GivenPicture(picture.convert("RGB"), torch.tensor(entry["codes"]), entry["rows"], entry["sha256"])


def _places(unit: Unit) -> list[tuple[int, int]]:
    return [(c, k) for c in unit.captions for k in unit.candidates]


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 3:
        return f"a list of {len(value)}"
    return str(value)[:80]


def _slug(caption: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:40] or "caption"
