"""git over smart HTTP: a run's own repositories, pushes to its own branches, with the token added on the host."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import h11

from taskyard.errors import TaskyardError
from taskyard.gateway.exchange import Answer, Exchange, RefusedError, pieces
from taskyard.gateway.headers import NOT_DOWN, NOT_UP, Header, framing, passed
from taskyard.gateway.models import Refused
from taskyard.gateway.origins import parse_base_url
from taskyard.gateway.pkt_line import BadPushError, PushReader, RefUpdate, report
from taskyard.gateway.policy import GitRepository
from taskyard.gateway.upstream import Timeouts, UpstreamRequest, UpstreamResponse

PREFIX = "/git/"
MAX_PUSH = 1024 * 1024 * 1024
MAX_NEGOTIATION = 64 * 1024 * 1024
_TIMEOUTS = Timeouts(connect=20, read=900, write=60)
# Only what the protocol needs: nothing of the agent's may speak to the server in the token's name.
_SENT = frozenset({b"accept", b"content-type", b"content-encoding", b"git-protocol", b"user-agent"})
_NOT_DOWN = NOT_DOWN | {b"set-cookie", b"www-authenticate"}


@dataclass(frozen=True)
class GitRequest:
    """A request that may go out."""

    repository: GitRepository
    path: str
    """Below the repository's URL, with the query."""
    pushes: bool
    """It carries the push itself."""


@dataclass(frozen=True)
class Elsewhere:
    """A request that is meant for another place, where git is sent to."""

    url: str


def admit(
    repositories: Sequence[GitRepository], method: str, target: str
) -> GitRequest | Elsewhere | Refused:
    """Decide about one origin-form request below PREFIX by its head."""
    match = re.fullmatch(r"/git/([a-z0-9._-]+/[a-z0-9._-]+)/(.*)", target, re.IGNORECASE)
    name, rest = (match[1], match[2]) if match else ("", "")
    found = next((one for one in repositories if name.lower().removesuffix(".git") == one.name), None)
    begun = next((one for one in repositories if name.lower().startswith(one.name)), None)
    if found is None and begun is not None and method == "GET" and rest.startswith("info/refs?service=git-"):
        # git replaces the beginning of an address (see git_variables), so a neighbour whose name begins like this
        # repository's comes here, too. git follows, and the network's rules decide.
        return Elsewhere(f"{begun.url.removesuffix('.git')}{name[len(begun.name) :]}/{rest}")
    if found is None:
        known = ", ".join(one.name for one in repositories)
        return Refused(403, "this is none of the run's repositories" + (f" ({known})." if known else "."))
    wanted = {
        "info/refs?service=git-upload-pack": "GET",
        "info/refs?service=git-receive-pack": "GET",
        "git-upload-pack": "POST",
        "git-receive-pack": "POST",
    }.get(rest)
    if wanted is None:
        return Refused(404, "only fetch and push by git's smart HTTP are open to sandboxes.")
    if method != wanted:
        return Refused(405, f"this takes {wanted}, not {method}.", (wanted,))
    return GitRequest(found, rest, pushes=rest == "git-receive-pack")


class GitRedirect(Exchange):
    """Sends git elsewhere."""

    name = upstream = "another repository"

    def __init__(self, elsewhere: Elsewhere) -> None:
        self._location = elsewhere.url

    async def request(self, head: h11.Request, body: AsyncIterator[bytes] | None) -> UpstreamRequest | Answer:
        try:
            place, _, query = self._location.partition("?")
            url = parse_base_url(place)
        except ValueError:
            raise RefusedError(_no_host()) from None
        where = url.origin.scheme.encode() + b"://" + url.origin.authority + url.path + b"?" + query.encode()
        return Answer(302, b"", "text/plain", headers=((b"location", where),))

    def head(self, answer: UpstreamResponse) -> list[Header] | Answer:
        raise AssertionError("nothing was asked")


class GitExchange(Exchange):
    """One request of git."""

    def __init__(self, asked: GitRequest) -> None:
        self.name = f"the repository {asked.repository.name}"
        self.upstream = asked.repository.url
        self.max_body = MAX_PUSH if asked.pushes else MAX_NEGOTIATION
        self._asked = asked
        self._secrets: list[str] = []

    async def request(self, head: h11.Request, body: AsyncIterator[bytes] | None) -> UpstreamRequest | Answer:
        headers = list(head.headers)
        if self._asked.pushes:
            if any(name == b"content-encoding" for name, _ in headers):
                raise RefusedError(Refused(415, "a compressed push cannot be checked."))
            checked = await self._check_push(body)
            if isinstance(checked, Answer):
                return checked
            body = checked
        names = {name.lower() for name, _ in headers}
        sent = passed(headers, NOT_UP | (names - _SENT))
        if body is not None:
            sent += framing(headers)
        if token := await self._token():
            basic = base64.b64encode(f"x-access-token:{token}".encode()).decode("ascii")
            self._secrets = [token, basic]
            sent.append((b"authorization", b"Basic " + basic.encode("ascii")))
        try:
            url = parse_base_url(self._asked.repository.url)
        except ValueError:
            raise RefusedError(_no_host()) from None
        target = url.path + b"/" + self._asked.path.encode("ascii")
        return UpstreamRequest(head.method.decode("ascii"), url.origin, target, sent, body, _TIMEOUTS)

    async def _token(self) -> str | None:
        credentials = self._asked.repository.credentials
        try:
            return None if credentials is None else await credentials()
        except TaskyardError as error:
            reason = (
                "the token of this repository cannot be read on this server; an administrator has to look."
            )
            raise RefusedError(Refused(502, reason)) from error

    async def _check_push(self, body: AsyncIterator[bytes] | None) -> AsyncIterator[bytes] | Answer:
        """The body again, when the refs that it changes are the run's own; else the answer."""
        reader, rest = PushReader(), pieces(body)
        try:
            async for chunk in rest:
                reader.feed(chunk)
                if reader.complete:
                    break
        except BadPushError as error:
            raise RefusedError(Refused(400, f"the push cannot be checked: {error}.")) from None
        if not reader.complete:
            raise RefusedError(Refused(400, "the push ends before its commands do."))
        reason = self._problem(reader.updates)
        if reason is None:
            if (on_push := self._asked.repository.on_push) is not None:
                for update in reader.updates:
                    if not await on_push(update.commit):
                        raise RefusedError(Refused(403, "this run is driven elsewhere by now."))
            return _joined(bytes(reader.seen), rest)
        refused = Refused(403, f"{reason}.")
        told = report(reader, reason)
        if told is None:
            raise RefusedError(refused)
        async for _ in rest:
            pass  # git reads the answer when it has sent everything
        return Answer(200, told, "application/x-git-receive-pack-result", refused)

    def _problem(self, updates: Sequence[RefUpdate]) -> str | None:
        own = [f"refs/heads/{branch}" for branch in self._asked.repository.branches]
        names = " or ".join(self._asked.repository.branches) or "nothing"
        seen = set()
        for update in updates:
            if update.ref not in own:
                return f"this run may push to {names} only"
            if update.ref in seen:
                return "a push changes a branch once"
            seen.add(update.ref)
            if update.deletes:
                return "this run may not delete its branch"
        return None

    def head(self, answer: UpstreamResponse) -> list[Header] | Answer:
        if answer.status == 200:
            if answer.header(b"content-type").startswith("application/x-git-"):
                return passed(answer.headers, _NOT_DOWN)
            return text_answer(502, f"{self._asked.repository.name} is not served by git's smart HTTP.")
        # No word of the server's: it may quote the token, and git would follow a redirect without it.
        if 300 <= answer.status < 400:
            said = "has moved: register its new address"
        elif answer.status in (401, 403):
            said = "does not let this server in: it needs a token that opens it"
        elif answer.status == 404:
            said = "does not exist, or the token of this server does not open it"
        else:
            said = f"answered with status {answer.status}"
        status = 502 if answer.status >= 500 else 403
        return text_answer(status, f"{self._asked.repository.name} {said}.")

    def masked(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _no_host() -> Refused:
    return Refused(502, "the address of this repository names no host; register it with another one.")


def text_answer(status: int, message: str) -> Answer:
    """An error as git shows it."""
    return Answer(status, f"Taskyard: {message}\n".encode(), "text/plain; charset=utf-8")


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk
