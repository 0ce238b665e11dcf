"""Records: a changed bit of a sealed one is noticed; earlier ones without a digest are still read."""

import json
from typing import ClassVar

import pytest

from dalle_ds.errors import DataError
from dalle_ds.storage.record import OtherFormat, SealedRecord, parse


class Note(SealedRecord):
    n_samples: int
    share: float
    reasons: dict[str, int] = {}
    hint: str | None = None


class Strict(Note):
    needs_digest: ClassVar[bool] = True


NOTE = Note(n_samples=16, share=0.1, reasons={"too small": 2}, hint="caf\u00e9")


@pytest.mark.parametrize("record_class", [Note, Strict])
def test_no_changed_bit_gives_another_record(record_class: type[Note]) -> None:
    data = NOTE.to_json()
    assert parse(record_class, data, "note.json") == record_class(**NOTE.model_dump())
    n_refused = 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert parse(record_class, bytes(damaged), "note.json") == record_class(**NOTE.model_dump()), bytes(damaged)
        except DataError as error:
            assert "note.json" in str(error) and not isinstance(error, OtherFormat)
            n_refused += 1
    assert n_refused > 6 * len(data), "only white space may change, or the name of the digest"


def test_a_digest_is_compared_whatever_the_layout_of_the_text() -> None:
    tree = json.loads(NOTE.to_json())
    assert parse(Strict, json.dumps(dict(sorted(tree.items()))).encode(), "note.json").n_samples == 16
    edited = json.dumps({**tree, "n_samples": 17}).encode()
    with pytest.raises(DataError, match="note.json has changed since it was written"):
        parse(Note, edited, "note.json")


def test_records_of_earlier_versions_have_no_digest() -> None:
    tree = {key: value for key, value in json.loads(NOTE.to_json()).items() if key != "digest"}
    assert parse(Note, json.dumps(tree).encode(), "note.json") == NOTE
    with pytest.raises(DataError, match="note.json: not a valid Strict: it lacks digest"):
        parse(Strict, json.dumps(tree).encode(), "note.json")


@pytest.mark.parametrize("data", [b"", b"[1, 2]", b"null", b'"text"', b"{", b"[" * 100_000, b'{"n_samples": "x"}', b"\xff\xfe"])
def test_what_is_no_record_is_named(data: bytes) -> None:
    with pytest.raises(DataError, match="note.json: not a valid Note"):
        parse(Note, data, "note.json")
