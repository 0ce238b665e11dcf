"""Errors that a rank or a process hands to others are the same there."""

import pickle

import pytest

from dalle_ds.errors import FingerprintMismatch, RankLost, StoreUnreachable, UserError, telling
from dalle_ds.recipes import Config, RequiredKeys
from dalle_ds.storage.record import OtherFormat


@pytest.mark.parametrize(
    "error",
    [
        FingerprintMismatch("dVAE of tokens", "aa", "bb", "Encode again."),
        RequiredKeys("data.raw is required", Config, {"seed": 1}),
        OtherFormat("engine.json is of an earlier version"),
        RankLost("rank 1 is lost"),
        StoreUnreachable("cannot read a", url="s3://bucket/a"),
    ],
)
def test_an_error_survives_pickle(error: UserError) -> None:
    error.is_said = True
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error) and str(found) == str(error)
    assert vars(found) == vars(error)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (StoreUnreachable("cannot read a", url="s3://bucket/a"), StoreUnreachable, 75),
        (FingerprintMismatch("dVAE", "aa", "bb"), FingerprintMismatch, 2),
        (FileNotFoundError("no such object"), UserError, 2),
    ],
)
def test_an_error_that_is_told_with_more_keeps_its_exit_code(error: Exception, kind: type[UserError], code: int) -> None:
    before = str(error)
    with pytest.raises(UserError) as caught, telling("tokens"):
        raise error
    assert type(caught.value) is kind and caught.value.exit_code == code
    assert str(caught.value) == f"tokens: {before}" and str(error) == before
    assert set(vars(error)) <= set(vars(caught.value))
