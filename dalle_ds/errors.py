"""Errors that a user can mend: shown as one message without a traceback, exit code 2."""

import os


class UserError(Exception):
    """Wrong input; the message carries the value found and the value expected."""

    exit_code = 2
    is_said = False
    """Whether a job of several ranks has shown it already."""


class ConfigError(UserError):
    """A recipe, an override or a DeepSpeed JSON that cannot be used."""


class DataError(UserError):
    """Data that is missing, damaged or too small for what is asked of it."""


class FingerprintMismatch(UserError):
    """Two things that must stem from the same dVAE, tokenizer or schema do not."""

    def __init__(self, what: str, expected: str, found: str, hint: str = "") -> None:
        """`what` names the thing compared, e.g. "dVAE of data set s3://bucket/tokens"."""
        super().__init__(f"{what}: expected fingerprint {expected}, found {found}. {hint}".rstrip())
        self.expected, self.found = expected, found


class TrainingDiverged(UserError):
    """Updates bring nothing any more: losses or gradients stay non-finite."""


class RankLost(UserError):
    """Another rank of the job died, failed or hangs. There may be nothing to mend: the same command goes on."""

    exit_code = os.EX_TEMPFAIL
    """75, which means: try again later."""
