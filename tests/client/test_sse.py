"""The parser of server-sent events."""

from __future__ import annotations

import json

import pytest

from taskyard.client.sse import Frame, Lines, Parser

# U+2028, U+0085 and a vertical tab are no line ends here; a carriage return alone is none either.
TEXT = json.dumps({"text": "a\u2028b\u0085c\x0bd é 漢 🙂"}, ensure_ascii=False)
STREAM = (
    f": a comment\nid: 1-1\ndata: {TEXT}\n\n"
    'event: keepalive\ndata: {"type":"keepalive"}\n\n'
    "id: 1-2\r\ndata: one\r\ndata: two\r\n\r\n"
    "retry: 10\nid: 1-3\n\n"
    "data:no blank\nunknown: x\n\n"
    "data: has a \r inside\n\n"
    "id: 1-9\ndata: cut short by the en"
).encode()
FRAMES = [
    Frame("message", TEXT, "1-1"),
    Frame("keepalive", '{"type":"keepalive"}', None),
    Frame("message", "one\ntwo", "1-2"),
    Frame("message", "no blank", None),
    Frame("message", "has a \r inside", None),
]


def test_frames() -> None:
    assert list(Parser().feed(STREAM)) == FRAMES


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pieces_of_any_size(size: int) -> None:
    parser = Parser()
    pieces = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
    assert [frame for piece in pieces for frame in parser.feed(piece)] == FRAMES


def test_one_cut_anywhere() -> None:
    for cut in range(len(STREAM) + 1):
        parser = Parser()
        assert [*parser.feed(STREAM[:cut]), *parser.feed(STREAM[cut:])] == FRAMES


def test_byte_order_mark_is_skipped() -> None:
    assert list(Parser().feed("\ufeffdata: x\n\n".encode())) == [Frame("message", "x", None)]


def test_lines_keep_what_has_no_end_yet() -> None:
    lines = Lines()
    assert list(lines.feed(b"one\r\ntw")) == ["one"]
    assert list(lines.feed(b"o")) == []
    assert lines.rest() == "two"


def test_tells_a_frame_that_is_not_complete() -> None:
    parser = Parser()
    for piece, partial in (
        (b"d", True),
        (b"ata: x\n", True),
        (b"\n", False),
        (b"id: 1\n", True),
        (b"\r\n", False),
    ):
        list(parser.feed(piece))
        assert parser.partial is partial, piece
