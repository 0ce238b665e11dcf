"""Tests of reading text that people or other programs wrote."""

import pytest

from dalle_ds.storage.text import decode_text, lines_of


def test_a_byte_order_mark_is_no_part_of_the_text():
    assert decode_text("\ufeffa cat".encode()) == decode_text(b"a cat") == "a cat"
    assert decode_text("a\ufeffcat".encode()) == "a\ufeffcat", "only at the start"
    with pytest.raises(UnicodeDecodeError):
        decode_text(b"caf\xe9")
    assert decode_text(b"caf\xe9", "replace") == "caf\ufffd"


def test_lines_end_at_line_feeds_alone():
    assert lines_of("a\u2028b\x85c\x0bd\r\ne\n") == ["a\u2028b\x85c\x0bd", "e"]
    assert lines_of("") == [] and lines_of("a\n\nb") == ["a", "", "b"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_byte_order_marks_tell_the_encoding_and_are_no_part_of_the_text(encoding: str) -> None:
    mark = "\ufeff" if encoding.startswith("utf-16-") else ""
    assert decode_text((mark + "ein B\u00e4r\n").encode(encoding)) == "ein B\u00e4r\n"
