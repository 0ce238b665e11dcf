"""What every training run has: an exclusive run folder, a stop request, MLflow tracking, a final status."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dalle_ds.errors import UserError
from dalle_ds.ops.exactness import exact_fp32
from dalle_ds.parallel.failure_detection import RankWatch, limit_waiting
from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.recipes import Config, dump_recipe
from dalle_ds.storage import objects
from dalle_ds.storage.atomic import atomic_write
from dalle_ds.storage.leftovers import remove_old_leftovers
from dalle_ds.storage.record import seal
from dalle_ds.tracking.config import TrackingConfig
from dalle_ds.tracking.provenance import code_tags
from dalle_ds.tracking.tracker import NullTracker, Tracker, has_ended
from dalle_ds.training.folder_lock import Lease, RunLock, lock_folder
from dalle_ds.training.preemption import EXIT_STOPPED, StopFlag

log = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
MAX_LOCK_SECONDS = 300.0
"""Seconds that the main rank may wait for the locks of two folders, and that the other ranks wait for it."""
DAY = 86_400.0


class TrainingRun:
    """State that the trainers share. `open_run` creates it, one on every rank.

    `tracker` discards everything until `start_tracking` is called. On ranks other than the main one it always does.
    """

    def __init__(self, folder: Path, ranks: Ranks, stop: StopFlag) -> None:
        self.folder, self.ranks = folder, ranks
        self.tracker = NullTracker()
        self.locks: list[RunLock | Lease] = []
        """Locks of the folders, on the main rank."""
        self._stop, self._status = stop, "FAILED"

    @property
    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop. Ranks have to agree before they act on it."""
        return self._stop.requested

    def require_locks(self) -> None:
        """Raises UserError if another job has taken over one of the folders."""
        for lock in self.locks:
            lock.require()

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

    def write_results(self, name: str, results: Mapping[str, Any]) -> Path:
        """Write results as JSON with a digest, for `unseal`. Returns the path. Raises UserError as `write`."""
        return self.write(name, seal(dict(results)).decode())

    def end_again(self, tracking: TrackingConfig, artifacts: Iterable[str], tags: Mapping[str, Any] | None = None) -> None:
        """Call for a run whose results are all written. If it was killed before MLflow had them, send them now.

        Args:
            artifacts: names of the result files of the run folder.
        """
        self.finished()
        if not self.ranks.is_main or has_ended(self.folder, self._status):
            return
        self.tracker = Tracker.start(
            self.folder, uri=tracking.uri, experiment=tracking.experiment, run_name=tracking.run_name, tags=tags
        )
        for name in artifacts:
            self.tracker.artifact(self.folder / name)

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
def open_run(
    folder: str | Path, ranks: Ranks = ALONE, collective_timeout: float = DAY, checkpoints: str | Path | None = None
) -> Iterator[TrainingRun]:
    """Open a run for these ranks alone, in exact fp32 (`exact_fp32`). A signal requests a stop. A lost rank ends the run.

    Args:
        collective_timeout: seconds that a collective may wait for a rank. Unused in a single process.
        checkpoints: folder of the checkpoints, a path or s3:// url. None: CHECKPOINTS in the run folder.

    Raises:
        UserError: another job works in one of the folders.
        RankLost: another rank died, failed or hangs.
    """
    folder = Path(folder)
    exact_fp32()
    with StopFlag() as stop, ExitStack() as held:
        run = TrainingRun(folder, ranks, stop)
        try:
            with RankWatch(ranks, collective_timeout) as watch:
                watch.before_exit = run.end_tracking
                limit_waiting(collective_timeout + MAX_LOCK_SECONDS)
                if ranks.is_main:  # the other ranks belong to the same run
                    # the checkpoints have a lock of their own: another run folder may name them too
                    for place in dict.fromkeys(map(_place, (folder, checkpoints or folder / CHECKPOINTS))):
                        run.locks.append(held.enter_context(lock_folder(place, stop.request)))
                        remove_old_leftovers(place)
                ranks.barrier()  # the locks are held before any rank reads the folders
                limit_waiting(collective_timeout)
                yield run
        finally:  # this may take a minute, so it comes after the watch has reported an error to the other ranks
            run.end_tracking()


def _place(url: str | Path) -> str | Path:
    """The one name of a folder."""
    path = objects.local_path(url)
    return str(url).rstrip("/") if path is None else path.resolve()


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
