"""The beginning of a push, read as git reads it."""

from __future__ import annotations

import pytest

from taskyard.gateway.pkt_line import MAX_COMMANDS, BadPushError, PushReader, RefUpdate, report

OLD, NEW, ZERO = "a" * 40, "b" * 40, "0" * 40


def pkt(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return b"%04x" % (len(data) + 4) + data


def command(ref: str, old: str = OLD, new: str = NEW, capabilities: str = "") -> bytes:
    return pkt(f"{old} {new} {ref}" + (f"\0 {capabilities}" if capabilities else "") + "\n")


def read(data: bytes) -> PushReader:
    reader = PushReader()
    reader.feed(data)
    return reader


def test_commands_and_capabilities() -> None:
    first = command("refs/heads/a", ZERO, NEW, "report-status-v2 side-band-64k agent=git/2.47")
    reader = read(first + command("refs/heads/b", OLD, ZERO) + b"0000PACK...")
    assert reader.complete
    assert reader.updates == [
        RefUpdate("refs/heads/a", deletes=False),
        RefUpdate("refs/heads/b", deletes=True),
    ]
    assert reader.capabilities == {"report-status-v2", "side-band-64k", "agent=git/2.47"}
    assert reader.seen.endswith(b"0000PACK...")


def test_cut_at_every_byte() -> None:
    data = pkt(f"shallow {OLD}") + command("refs/heads/a", capabilities="report-status") + b"0000"
    for cut in range(len(data)):
        reader = read(data[:cut])
        assert not reader.complete
        reader.feed(data[cut:])
        assert (reader.complete, reader.updates) == (True, [RefUpdate("refs/heads/a", deletes=False)])


def test_the_longer_hash() -> None:
    reader = read(command("refs/heads/a", "1" * 64, "0" * 64) + b"0000")
    assert reader.updates == [RefUpdate("refs/heads/a", deletes=True)]


@pytest.mark.parametrize(
    "ref", ["refs/heads/a ", "refs/heads/a\nx", "refs/heads/a\n", " refs/heads/a", "refs/heads/ä"]
)
def test_names_are_taken_as_they_are(ref: str) -> None:
    assert [update.ref for update in read(command(ref) + b"0000").updates] == [ref]


def test_a_nul_ends_the_name() -> None:
    data = pkt(f"{OLD} {NEW} refs/heads/main\0x") + pkt(f"{OLD} {NEW} refs/heads/b\0refs/heads/own") + b"0000"
    assert [update.ref for update in read(data).updates] == ["refs/heads/main", "refs/heads/b"]


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense",
        b"-001",
        b" 004",
        b"0x10",
        b"0004",
        b"0001",
        b"0002",
        b"0003",
        pkt("push-cert\0 report-status\n"),
        pkt("certificate version 0.1\n"),
        pkt(f"{OLD} {NEW}"),
        pkt(f"{OLD} {NEW} "),
        pkt(f"{OLD} {NEW[1:]} refs/heads/a"),
        pkt(f"{OLD}  {NEW} refs/heads/a"),
        pkt(f"{OLD.upper()} {NEW} refs/heads/a"),
        pkt(f"{OLD} {NEW} ".encode() + b"refs/heads/\xff"),
        command("refs/heads/a") + pkt(f"shallow {OLD}"),
        command("refs/heads/a", capabilities="report-status push-options"),
        command("refs/heads/a", capabilities="push-options=x"),
        command("refs/heads/a") + command("refs/heads/b", capabilities="push-options"),
        pkt("x" * 100 + "\n"),
        command("refs/heads/" + "a" * 60_000) + command("refs/heads/" + "b" * 60_000)[:8],
    ],
    ids=range(22),
)
def test_what_cannot_be_checked(data: bytes) -> None:
    with pytest.raises(BadPushError):
        read(data)


def test_many_commands() -> None:
    line = command("refs/heads/own")
    reader = read(line * (MAX_COMMANDS // len(line)))
    with pytest.raises(BadPushError, match=str(MAX_COMMANDS)):
        reader.feed(line)


def test_a_report() -> None:
    reader = read(command("refs/heads/a", capabilities="report-status") + command("refs/heads/b") + b"0000")
    text = pkt("unpack ok\n") + pkt("ng refs/heads/a no\n") + pkt("ng refs/heads/b no\n") + b"0000"
    assert report(reader, "no") == text
    reader = read(command("refs/heads/a", capabilities="report-status-v2 side-band-64k") + b"0000")
    inner = pkt("unpack ok\n") + pkt("ng refs/heads/a no\n") + b"0000"
    assert report(reader, "no") == pkt(b"\1" + inner) + b"0000"
    assert report(read(command("refs/heads/a", capabilities="atomic") + b"0000"), "no") is None
    assert report(read(b"0000"), "no") is None
