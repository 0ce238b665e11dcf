"""Errors that a user can fix: printed as one message without a traceback, exit code 2 unless the class defines another."""

import copy
import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dalle_ds.redaction import redacted_message


class UserError(Exception):
    """Invalid input. The message contains the value found and the value expected."""

    exit_code = 2
    is_said = False
    """Whether the message has already been printed. Ranks of one job print an error only once."""

    def __str__(self) -> str:
        return redacted_message(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        """Other ranks and processes get the error by pickle, which would call a subclass with the message alone."""
        return _without_init, (type(self), self.args), self.__dict__

    def told_as(self, message: str) -> "UserError":
        """The same error, with its class and exit code, and another message."""
        told = copy.copy(self)
        told.args = (message,)
        return told


def _without_init(of: type[UserError], arguments: tuple[Any, ...]) -> UserError:
    return of.__new__(of, *arguments)


MISTAKEN_PATHS = (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
"""Errors of a wrong path, such as a file where a folder is expected."""
FAILING_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE}
"""Numbers of errors of a full or broken disk, or of a path that the file system cannot hold."""


def as_user_error(error: UserError | OSError) -> UserError | None:
    """The error whose message says all that a user needs: `error` itself, or one about the path or the disk of an OSError.

    Returns None if the traceback is needed, as for a file that a bug of ours expects.
    """
    if isinstance(error, UserError):
        return error
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:  # write(2) names no file
        where = f"expected room for the output, and for temporary files in {tempfile.gettempdir()} (TMPDIR)"
        return UserError(f"{error.strerror}: {where}")
    return UserError(str(error)) if isinstance(error, MISTAKEN_PATHS) or error.errno in FAILING_DISKS else None


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Begin the message of an error with `what`. The error keeps its class and exit code; an OSError becomes a UserError."""
    try:
        yield
    except UserError as error:
        raise error.told_as(f"{what}: {error}") from None
    except OSError as error:
        raise UserError(f"{what}: {error}") from None


class ConfigError(UserError):
    """An invalid recipe, override or DeepSpeed JSON."""


class DataError(UserError):
    """Data that is missing, damaged or too small for the request."""


class Damaged(DataError):
    """A file is not the one that was written, or its content makes no sense. Storage that can't be reached is no damage."""


class FingerprintMismatch(UserError):
    """Two artifacts that must come from the same dVAE, tokenizer or schema do not."""

    def __init__(self, what: str, expected: str, found: str, hint: str = "") -> None:
        """`what` names what is compared, e.g. "dVAE of data set s3://bucket/tokens"."""
        super().__init__(f"{what}: expected fingerprint {expected}, found {found}. {hint}".rstrip())
        self.expected, self.found = expected, found


class TrainingDiverged(UserError):
    """Training diverged: losses or gradients stay non-finite, so updates make no progress."""


class RankLost(UserError):
    """Another rank of the job died, failed or hangs. There may be nothing to fix: the same command resumes the job."""

    exit_code = os.EX_TEMPFAIL
    """75 (EX_TEMPFAIL): a temporary failure, try again."""


class WorkersLost(UserError):
    """Workers died or fail whatever they are given, on this machine. What is done stays: the same command goes on."""

    exit_code = os.EX_TEMPFAIL


class ClusterUnreachable(UserError):
    """A Ray cluster could not be joined or started. What is done stays: the same command goes on."""

    exit_code = os.EX_TEMPFAIL


class StoreUnreachable(DataError):
    """Object storage did not answer. What is done stays: the same command goes on."""

    exit_code = os.EX_TEMPFAIL

    def __init__(self, message: str, url: str = "") -> None:
        """`url` is the object of the request."""
        super().__init__(message)
        self.url = url
