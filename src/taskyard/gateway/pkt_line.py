"""The beginning of a push: pkt-lines that say which refs are to change (gitprotocol-pack(5))."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MAX_COMMANDS = 64 * 1024
"""Bytes."""
_LENGTH = re.compile(rb"[0-9a-fA-F]{4}")
_COMMAND = re.compile(rb"([0-9a-f]{40}|[0-9a-f]{64}) ([0-9a-f]{40}|[0-9a-f]{64}) (.+)", re.DOTALL)


class BadPushError(ValueError):
    """Not the beginning of a push, or not one that can be checked; the text is for people."""


@dataclass(frozen=True)
class RefUpdate:
    ref: str
    deletes: bool
    commit: str = field(default="", compare=False)
    """What it is to stand at."""


@dataclass
class PushReader:
    """Fed the bytes of a push until its commands are complete."""

    updates: list[RefUpdate] = field(default_factory=list)
    capabilities: frozenset[str] = frozenset()
    """Of all lines: git takes them from each."""
    seen: bytearray = field(default_factory=bytearray)
    """Everything fed so far."""
    complete: bool = False
    _at: int = 0

    def feed(self, data: bytes) -> None:
        """Raises BadPushError. What comes after the commands is not looked at."""
        self.seen += data
        while not self.complete:
            head = self.seen[self._at : self._at + 4]
            if len(head) < 4:
                break
            if not _LENGTH.fullmatch(head):
                raise BadPushError("it has a line without a length")
            length = int(head, 16)
            if length == 0:
                self._at += 4
                self.complete = True
                return
            if length < 5:
                raise BadPushError("it has an empty or special line among its commands")
            if self._at + length > MAX_COMMANDS:
                raise BadPushError(f"its commands exceed {MAX_COMMANDS} bytes")
            if len(self.seen) < self._at + length:
                break
            self._line(bytes(self.seen[self._at + 4 : self._at + length]))
            self._at += length

    def _line(self, line: bytes) -> None:
        # As git reads it: one line break at the end goes, and a NUL ends the name.
        text, nul, capabilities = line.removesuffix(b"\n").partition(b"\0")
        if nul:
            # What comes after the commands then tells the server things that have nothing to do with refs: make this
            # repository public (Gitea), merge this into another branch (GitLab).
            if b"push-options" in capabilities:
                raise BadPushError("push options are not taken here")
            self.capabilities |= frozenset(capabilities.decode("utf-8", "replace").split())
        if text.startswith(b"shallow ") and not self.updates:
            return
        match = _COMMAND.fullmatch(text)
        if match is None:
            raise BadPushError("signed pushes and other commands are not taken here")
        try:
            ref = match[3].decode("utf-8")
        except UnicodeDecodeError:
            raise BadPushError("the name of a ref is no UTF-8") from None
        self.updates.append(RefUpdate(ref, deletes=not match[2].strip(b"0"), commit=match[2].decode()))


def report(reader: PushReader, message: str) -> bytes | None:
    """What a client is told when none of its refs were changed; None when it did not ask for a report."""
    known = {"report-status", "report-status-v2"} & reader.capabilities
    if not known or not reader.updates:
        return None
    lines = b"".join(_pkt(f"ng {update.ref} {message}\n".encode()) for update in reader.updates)
    text = _pkt(b"unpack ok\n") + lines + b"0000"
    if "side-band-64k" not in reader.capabilities:
        return text
    pieces = [text[at : at + 60000] for at in range(0, len(text), 60000)]
    return b"".join(_pkt(b"\1" + piece) for piece in pieces) + b"0000"


def _pkt(data: bytes) -> bytes:
    return b"%04x" % (len(data) + 4) + data
