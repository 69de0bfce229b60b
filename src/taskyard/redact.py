"""Takes secrets out of what the server writes: events, logs, errors, answers.

It is the last line of defence, not the first: credentials of the server never enter a sandbox, so only an agent that
was given a secret (as a variable of its environment) can say it. It is known here in the forms in which programs pass
text on: as it is, in JSON, in URLs, in base64, in hexadecimal. An agent that wants to can still spell it differently.
"""

from __future__ import annotations

import base64
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlsplit

from pydantic import BaseModel, SecretStr

MASK = "***"
MIN_CHARS = 4
"""Shorter values stand in too many texts by chance."""
MANY = 6
"""Of a secret, so many characters at its beginning are not shown."""
MIN_LINE = 16
"""Lines of a longer secret, such as a private key, count by themselves from this length on."""
_NAMED = re.compile(
    r"KEY|TOKEN|SECRET|PASS|PWD|CREDENTIAL|AUTH|PRIVATE|CERT|COOKIE|SIGN|DSN|WEBHOOK|SALT", re.IGNORECASE
)


def secret_values(variables: Mapping[str, str]) -> list[str]:
    """Those values among variables that are secrets: by their names, or because they look random.

    All variables of an environment are kept as secrets, but a log without the word `production` helps nobody.
    """
    return [value for name, value in variables.items() if _NAMED.search(name) or _looks_random(value)]


def _looks_random(value: str) -> bool:
    text = value.strip()
    return (
        len(text) >= MIN_LINE
        and not re.search(r"\s", text)
        and re.search(r"\d", text) is not None
        and re.search(r"[A-Za-z]", text) is not None
    )


def secrets_of(settings: BaseModel) -> Iterator[str]:
    """Every secret in settings, and the passwords in their URLs."""
    for name in type(settings).model_fields:
        yield from _secrets_in(getattr(settings, name))


def _secrets_in(value: Any) -> Iterator[str]:
    if isinstance(value, SecretStr):
        yield value.get_secret_value()
        yield from _secrets_in(value.get_secret_value())
    elif isinstance(value, BaseModel):
        yield from secrets_of(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _secrets_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _secrets_in(item)
    elif isinstance(value, str) and "://" in value:
        try:
            password = urlsplit(value).password
        except ValueError:
            return
        if password:
            yield unquote(password)


class Redactor:
    """Replaces known secrets by `***`. Without secrets it costs nothing."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._known: Counter[str] = Counter()
        self._forms: list[str] = []
        self._sorted: list[str] = []
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        """Know further secrets; the same one may be added several times."""
        self._known.update(_parts(secrets))
        self._know()

    def remove(self, secrets: Iterable[str]) -> None:
        """Forget secrets that were added as often as they are removed."""
        self._known -= Counter(_parts(secrets))
        self._know()

    def _know(self) -> None:
        self._forms = _all_forms(self._known)
        self._sorted = sorted(self._forms)

    def text(self, text: str) -> str:
        """A text, also one that is JSON, without the secrets; the same object when there are none in it."""
        for form in self._forms:
            if form in text:
                text = text.replace(form, MASK)
        return text

    def value(self, value: Any) -> Any:
        """A JSON value without the secrets in its texts and keys."""
        if not self._forms:
            return value
        match value:
            case str():
                return self.text(value)
            case list() | tuple():
                return [self.value(item) for item in value]
            case dict():
                return {self.value(key): self.value(item) for key, item in value.items()}
        return value

    def unfinished(self, text: str) -> tuple[int, bool]:
        """How many characters at the end of a text may be the beginning of a secret that goes on in the next piece.

        And whether they are so many that they must not be shown before it is known; a few tell nobody anything.
        """
        longest = max((len(form) for form in self._forms), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            end = text[-size:]
            at = first = bisect_right(self._sorted, end)  # what begins so, and is longer, stands from here on
            shortest = 0
            while at < len(self._sorted) and self._sorted[at].startswith(end):
                shortest = min(shortest or MANY, len(self._sorted[at]) // 2)
                at += 1
            if at > first:
                return size, size >= shortest
        return 0, False


def _parts(secrets: Iterable[str]) -> list[str]:
    parts = []
    for secret in secrets:
        lines = [secret.strip()]
        if "\n" in lines[0]:
            lines += [line.strip() for line in secret.splitlines() if len(line.strip()) >= MIN_LINE]
        parts += [line for line in lines if len(line) >= MIN_CHARS]
    return parts


def _all_forms(secrets: Iterable[str]) -> list[str]:
    """Longest first: a short secret may be a part of a longer one."""
    return sorted(
        {form for secret in secrets for form in _forms(secret)}, key=lambda form: (-len(form), form)
    )


def _forms(secret: str) -> Iterator[str]:
    raw = secret.encode("utf-8", "surrogatepass")
    plain = {secret, quote(raw, safe=""), quote(raw), quote_plus(raw), raw.hex(), raw.hex().upper()}
    for form in plain:
        # In JSON, and in JSON that is a text of JSON, as the output of a tool often is. Never as it is: a raw quote
        # or line break would match across JSON's own syntax.
        for once in _in_json(form):
            yield from (once, json.dumps(once)[1:-1])
    yield from _base64(raw)


def _in_json(text: str) -> set[str]:
    """A text as encoders of JSON write it: in ASCII or not; PHP escapes slashes, Go what HTML knows."""
    ascii_only, short = json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]
    return {ascii_only, short, ascii_only.replace("/", "\\/"), short.translate(_HTML)}


_HTML = {ord(char): f"\\u{ord(char):04x}" for char in "<>&"}


def _base64(raw: bytes) -> Iterator[str]:
    """What of a text's base64 is the same whatever stands before and behind it, at each of the three offsets."""
    for offset in range(3):
        encoded = base64.b64encode(b"\0" * offset + raw).decode("ascii").rstrip("=")
        end = len(encoded) - (1 if (offset + len(raw)) % 3 else 0)
        core = encoded[(0, 2, 3)[offset] : end]
        if len(core) >= 8:
            yield core
            yield core.replace("+", "-").replace("/", "_")


LOGS = Redactor()
"""For the log of this process, which is about everything."""
