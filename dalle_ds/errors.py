"""Errors that a user can fix: printed as one message without a traceback, exit code 2 unless the class defines another."""

import os


class UserError(Exception):
    """Invalid input. The message contains the value found and the value expected."""

    exit_code = 2
    is_said = False
    """Whether the message has already been printed. Ranks of one job print an error only once."""


class ConfigError(UserError):
    """An invalid recipe, override or DeepSpeed JSON."""


class DataError(UserError):
    """Data that is missing, damaged or too small for the request."""


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
