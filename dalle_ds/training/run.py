"""What every training run has: an exclusive run folder, a stop request, MLflow tracking, a final status."""

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
    """State that the trainers share. `open_run` creates it, one on every rank.

    `tracker` discards everything until `start_tracking` is called. On ranks other than the main one it always does.
    """

    def __init__(self, folder: Path, ranks: Ranks, stop: StopFlag) -> None:
        self.folder, self.ranks = folder, ranks
        self.tracker = NullTracker()
        self._stop, self._status = stop, "FAILED"

    @property
    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop. Ranks have to agree before they act on it."""
        return self._stop.requested

    def start_tracking(
        self, recipe: Config, tracking: TrackingConfig, *, tags: Mapping[str, Any], params: Mapping[str, Any], text: str = ""
    ) -> None:
        """Write the recipe to the run folder, and create or resume the folder's MLflow run.

        Args:
            text: Markdown description of the MLflow run.
        """
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
        """Write a file of the run folder atomically. Returns its path. Raises UserError if it cannot be written."""
        path = self.folder / name
        try:
            with atomic_write(path, one_writer=True) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
        return path

    def leave_stopped(self, update: int, checkpoints: str) -> NoReturn:
        """End a run that was asked to stop and has saved its state. All ranks must call it together.

        Raises:
            SystemExit: with `EXIT_STOPPED`.
        """
        self._status = "KILLED"
        reason = self._stop.reason or "another rank"
        log.info("asked to stop (%s) at update %d: repeat the command to resume from %s", reason, update, checkpoints)
        self.end_tracking()
        self.ranks.barrier()  # a launcher kills the other ranks as soon as one exits
        raise SystemExit(EXIT_STOPPED)

    def finished(self) -> None:
        """Set the final status to FINISHED: the run has done all its updates and written its results."""
        self._status = "FINISHED"

    def end_tracking(self) -> None:
        """Send the pending tracking records and the final status to MLflow. May wait up to a minute for the server."""
        tracker, self.tracker = self.tracker, NullTracker()
        tracker.close(self._status)


@contextmanager
def open_run(folder: str | Path, ranks: Ranks = ALONE, collective_timeout: float = DAY) -> Iterator[TrainingRun]:
    """Open a run for these ranks alone, in exact fp32 (`exact_fp32`). A signal requests a stop. A lost rank ends the run.

    Args:
        collective_timeout: seconds that a collective may wait for a rank. Unused in a single process.

    Raises:
        UserError: another process works in the folder.
        RankLost: another rank died, failed or hangs.
    """
    folder = Path(folder)
    exact_fp32()
    # only the main rank takes the lock: the other ranks belong to the same run
    with StopFlag() as stop, RunLock(folder) if ranks.is_main else nullcontext():
        ranks.barrier()  # the lock is held before any rank reads the folder
        run = TrainingRun(folder, ranks, stop)
        try:
            with RankWatch(ranks, collective_timeout) as watch:
                watch.before_exit = run.end_tracking
                yield run
        finally:  # this may take a minute, so it comes after the watch has reported an error to the other ranks
            run.end_tracking()


class Stopwatch:
    """Training time of a run, summed over its restarts."""

    def __init__(self, before: float) -> None:
        """`before`: seconds that the run took before this start."""
        self._before, self._began = before, time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds over all starts."""
        return self._before + self.since_start

    @property
    def since_start(self) -> float:
        """Seconds since this start."""
        return time.monotonic() - self._began
