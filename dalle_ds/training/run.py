"""A training run, whatever it trains: one process in its folder, asked to stop, tracked, ended with a status."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from dalle_ds.errors import UserError
from dalle_ds.ops.exactness import exact_fp32
from dalle_ds.parallel.failure_detection import RankWatch
from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.recipes import Config, dump_recipe
from dalle_ds.storage.atomic import atomic_write
from dalle_ds.tracking.config import TrackingConfig
from dalle_ds.tracking.provenance import code_tags
from dalle_ds.tracking.tracker import NullTracker, Tracker
from dalle_ds.training.preemption import EXIT_STOPPED, RunLock, StopFlag

log = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
DAY = 86_400.0


class TrainingRun:
    """What the trainers share. `open_run` makes it; every rank has one.

    `tracker` keeps nothing until `start_tracking`, and on ranks other than the main one.
    """

    def __init__(self, folder: Path, ranks: Ranks, stop: StopFlag) -> None:
        self.folder, self.ranks = folder, ranks
        self.tracker = NullTracker()
        self._stop, self._status = stop, "FAILED"

    @property
    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop: ranks have to agree before they act on it."""
        return self._stop.requested

    def start_tracking(
        self, recipe: Config, tracking: TrackingConfig, *, tags: Mapping[str, Any], params: Mapping[str, Any], text: str = ""
    ) -> None:
        """Keep the recipe in the folder, and begin or continue the folder's MLflow run; `text` describes it, in Markdown."""
        if not self.ranks.is_main:
            return
        self.write(RECIPE_FILE, dump_recipe(recipe))
        self.tracker = Tracker.start(
            self.folder,
            uri=tracking.uri,
            experiment=tracking.experiment,
            run_name=tracking.run_name,
            tags={**code_tags(), **tags},
            params=params,
            description=text,
        )
        self.tracker.artifact(self.folder / RECIPE_FILE)

    def write(self, name: str, text: str) -> Path:
        """A file of the folder, atomically. Raises UserError where it can't be written."""
        path = self.folder / name
        try:
            with atomic_write(path, one_writer=True) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
        return path

    def leave_stopped(self, update: int, checkpoints: str) -> NoReturn:
        """End a run that was asked to stop and has saved its state. All ranks call it together.

        Raises:
            SystemExit: with `EXIT_STOPPED`.
        """
        self._status = "KILLED"
        reason = self._stop.reason or "another rank"
        log.info("asked to stop (%s) at update %d: the same command goes on from %s", reason, update, checkpoints)
        self.end_tracking()
        self.ranks.barrier()  # launchers end the other ranks once one has left
        raise SystemExit(EXIT_STOPPED)

    def finished(self) -> None:
        """The run has done all its updates and written its results."""
        self._status = "FINISHED"

    def end_tracking(self) -> None:
        """Deliver what waits for MLflow, and the run's status. May wait for the server, up to a minute."""
        tracker, self.tracker = self.tracker, NullTracker()
        tracker.close(self._status)


@contextmanager
def open_run(folder: str | Path, ranks: Ranks = ALONE, collective_timeout: float = DAY) -> Iterator[TrainingRun]:
    """A run that only these ranks work on, with exact fp32. A signal asks it to stop; the loss of a rank ends it.

    Args:
        collective_timeout: seconds that ranks wait for one of them; a process alone waits for nobody.

    Raises:
        UserError: another process works in the folder. RankLost: another rank died, failed or hangs.
    """
    folder = Path(folder)
    exact_fp32()
    # only the main rank holds the lock: the others are its own
    with StopFlag() as stop, RunLock(folder) if ranks.is_main else nullcontext():
        ranks.barrier()  # the lock is held before any rank reads the folder
        run = TrainingRun(folder, ranks, stop)
        try:
            with RankWatch(ranks, collective_timeout) as watch:
                watch.before_exit = run.end_tracking
                yield run
        finally:  # after the watch has told the other ranks of an error: this may take a minute
            run.end_tracking()


class Stopwatch:
    """Seconds of work over all starts of a run."""

    def __init__(self, before: float) -> None:
        """`before`: seconds of the earlier starts."""
        self._before, self._began = before, time.monotonic()

    @property
    def seconds(self) -> float:
        """In all."""
        return self._before + self.since_start

    @property
    def since_start(self) -> float:
        """Of this start."""
        return time.monotonic() - self._began
