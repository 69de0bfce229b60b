"""git by the gateway: the real git against a real smart-HTTP server behind it."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from taskyard.drive.credentials import git_repository, git_variables
from taskyard.forge.git import check_origin
from taskyard.gateway.git import GitRequest, admit
from taskyard.gateway.policy import GitRepository
from tests.gateway.test_pkt_line import ZERO, command
from tests.support.door import Door, Exchange, open_door, open_upstream
from tests.support.git_http import GitServer, git_server
from tests.support.repositories import ENV, commit_file, heads, make_bare, make_repository, run_git

TOKEN = "ghs_the-token-of-the-site"
BASIC = base64.b64encode(f"x-access-token:{TOKEN}".encode()).decode()
BRANCH = "taskyard/t-1"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GitServer]:
    """A private server with acme/shop, and acme/shop-extras beside it."""
    source = make_repository(tmp_path / "source")
    (tmp_path / "served" / "acme").mkdir(parents=True)
    for name in ("shop", "shop-extras"):
        make_bare(tmp_path / "served" / "acme" / f"{name}.git", source)
    with git_server(tmp_path / "served") as server:
        server.authorization = f"Basic {BASIC}"
        yield server


@dataclass
class Done:
    code: int
    text: str
    """What git said, on both outputs."""


@dataclass
class Inside:
    """git as an agent has it: it knows the gateway, and no token."""

    door: Door
    url: str
    """The gateway's."""
    server: GitServer
    folder: Path
    env: dict[str, str]

    @property
    def bare(self) -> Path:
        return self.server.root / "acme" / "shop.git"

    async def git(self, *args: str, **env: str) -> Done:
        process = await asyncio.create_subprocess_exec(
            "git", *args, cwd=self.folder, env={**self.env, **env},
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(60):
            output, _ = await process.communicate()
        assert process.returncode is not None
        text = output.decode()
        assert TOKEN not in text and BASIC not in text  # noqa: PT018 - one thing: the secret
        return Done(process.returncode, text)

    async def clone(self) -> None:
        done = await self.git(
            "clone", "--quiet", f"{self.server.url}/acme/shop.git", str(self.folder / "clone")
        )
        assert done.code == 0, done.text
        self.folder = self.folder / "clone"
        run_git(self.folder, "switch", "--quiet", "--create", BRANCH)


@asynccontextmanager
async def inside(
    server: GitServer, folder: Path, token: str | None = TOKEN, **rules: Any
) -> AsyncIterator[Inside]:
    origin = check_origin(f"{server.url}/acme/shop.git")

    async def credentials(asked: object) -> str | None:
        assert asked == origin
        return token

    repository = git_repository("acme/shop", origin, BRANCH, credentials)
    assert repository is not None
    folder.mkdir()
    async with open_door(git=[repository], **rules) as door:
        # By another name than the server's, which git then reaches by the proxy only.
        url = f"http://localhost:{door.port}"
        proxy = {"http_proxy": url, "https_proxy": url, "no_proxy": "localhost", "GIT_TERMINAL_PROMPT": "0"}
        yield Inside(door, url, server, folder, ENV | git_variables(url, "acme/shop", origin) | proxy)


async def test_clone_fetch_and_push(server: GitServer, tmp_path: Path) -> None:
    async with inside(server, tmp_path / "agent") as agent:
        await agent.clone()
        assert run_git(agent.folder, "remote", "get-url", "origin") == f"{server.url}/acme/shop.git"
        commit = commit_file(agent.folder, "a.txt", "x" * 3_000_000)
        done = await agent.git("push", "origin", BRANCH)
        assert done.code == 0, done.text
        assert heads(agent.bare)[BRANCH] == commit
        other = make_repository(tmp_path / "other")
        run_git(other, "push", "--quiet", "--force", str(agent.bare), "HEAD:refs/heads/theirs")
        done = await agent.git("fetch", "origin")
        assert done.code == 0, done.text
        assert run_git(agent.folder, "rev-parse", "origin/theirs") == run_git(other, "rev-parse", "HEAD")
        # A rewritten history is the run's own affair, on its own branch.
        run_git(agent.folder, "commit", "--quiet", "--amend", "--message", "again")
        assert (await agent.git("push", "origin", BRANCH)).code == 1
        done = await agent.git("push", "--force", "origin", BRANCH)
        assert done.code == 0, done.text
        assert heads(agent.bare)[BRANCH] == run_git(agent.folder, "rev-parse", "HEAD")
    assert not agent.door.refusals
    assert {header for _, header in server.seen} == {f"Basic {BASIC}"}
    kept = [path for path in tmp_path.joinpath("agent").rglob("*") if path.is_file()]
    assert kept
    for path in kept:
        assert TOKEN.encode() not in path.read_bytes() and BASIC.encode() not in path.read_bytes()  # noqa: PT018


@pytest.mark.parametrize("object_format", ["sha1", "sha256"])
async def test_a_push_in_chunks(tmp_path: Path, object_format: str) -> None:
    source = make_repository(tmp_path / "source", object_format=object_format)
    (tmp_path / "served" / "acme").mkdir(parents=True)
    make_bare(tmp_path / "served" / "acme" / "shop.git", source)
    with git_server(tmp_path / "served") as server:
        async with inside(server, tmp_path / "agent", token=None) as agent:
            await agent.clone()
            commit_file(agent.folder, "noise", os.urandom(200_000).hex())
            done = await agent.git("-c", "http.postBuffer=65536", "push", "origin", BRANCH)
            assert done.code == 0, done.text
            assert heads(agent.bare)[BRANCH] == run_git(agent.folder, "rev-parse", "HEAD")
    assert {header for _, header in server.seen} == {None}


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["origin", "HEAD:refs/heads/main"], "may push to taskyard/t-1 only"),
        (["origin", "HEAD:refs/tags/v1"], "may push to taskyard/t-1 only"),
        (["origin", "HEAD:refs/heads/taskyard/t-12"], "may push to taskyard/t-1 only"),
        (["origin", "HEAD:refs/for/main"], "may push to taskyard/t-1 only"),
        (["--force", "origin", "HEAD:refs/heads/main"], "may push to taskyard/t-1 only"),
        (["origin", f"HEAD:refs/heads/{BRANCH}", "HEAD:refs/heads/main"], "may push to taskyard/t-1 only"),
        (["--delete", "origin", BRANCH], "may not delete its branch"),
        (["--delete", "origin", "main"], "may push to taskyard/t-1 only"),
        (["--mirror", "origin"], "may push to taskyard/t-1 only"),
    ],
    ids=range(9),
)
async def test_pushes_that_are_refused(
    server: GitServer, tmp_path: Path, args: list[str], reason: str
) -> None:
    async with inside(server, tmp_path / "agent") as agent:
        await agent.clone()
        assert (await agent.git("push", "--quiet", "origin", BRANCH)).code == 0
        commit_file(agent.folder, "a.txt", "1")
        before, seen = heads(agent.bare), len(server.seen)
        done = await agent.git("push", *args)
        assert done.code == 1, done.text
        assert reason in done.text
        assert heads(agent.bare) == before
        assert not [path for path, _ in server.seen[seen:] if path.endswith("/git-receive-pack")], (
            "the server hears nothing of it"
        )
    [told] = agent.door.refusals
    assert (told.method, told.target, told.status) == ("POST", "/git/acme/shop.git/git-receive-pack", 403)
    assert reason in told.reason


async def test_push_options_are_refused(server: GitServer, tmp_path: Path) -> None:
    """They make repositories public, and merge branches."""
    run_git(server.root / "acme" / "shop.git", "config", "receive.advertisePushOptions", "true")
    async with inside(server, tmp_path / "agent") as agent:
        await agent.clone()
        commit_file(agent.folder, "a.txt", "1")
        done = await agent.git("push", "--push-option=repo.private=false", "origin", BRANCH)
        assert done.code != 0
        assert BRANCH not in heads(agent.bare)
    assert "push options are not taken here" in agent.door.refusals[0].reason


async def test_other_repositories(server: GitServer, tmp_path: Path) -> None:
    async with inside(server, tmp_path / "agent") as agent:
        for url in (f"{agent.url}/git/acme/other.git", f"{agent.url}/git/acme/shop/../other.git"):
            done = await agent.git("ls-remote", url)
            assert done.code == 128
            assert "none of the run's repositories (acme/shop)" in done.text
    assert not server.seen


async def test_a_neighbour_whose_name_begins_alike(server: GitServer, tmp_path: Path) -> None:
    """git's own replacement of addresses takes it for this repository: it is sent on, without the token."""
    async with inside(server, tmp_path / "agent") as agent:
        done = await agent.git("ls-remote", f"{server.url}/acme/shop-extras.git")
        assert done.code == 128, "the network of this run does not reach it"
        assert not server.seen
        [told] = agent.door.refusals
        assert told.target == f"{server.url}/acme/shop-extras.git/info/refs"
        server.authorization = None
        done = await agent.git(
            "ls-remote", f"{server.url}/acme/shop-extras.git", no_proxy="localhost,127.0.0.1"
        )
        assert done.code == 0, done.text
        assert "refs/heads/main" in done.text
    assert {header for _, header in server.seen} == {None}


@pytest.mark.parametrize("ending", ["", ".git", ".git/", "/"])
async def test_ways_to_write_the_address(server: GitServer, tmp_path: Path, ending: str) -> None:
    async with inside(server, tmp_path / "agent") as agent:
        done = await agent.git("ls-remote", f"{server.url}/acme/shop{ending}")
        assert done.code == 0, done.text
    assert {header for _, header in server.seen} == {f"Basic {BASIC}"}


async def test_a_token_that_does_not_open(server: GitServer, tmp_path: Path) -> None:
    async with inside(server, tmp_path / "agent", token="another") as agent:
        done = await agent.git("ls-remote", f"{server.url}/acme/shop.git")
    assert done.code == 128
    assert "acme/shop does not let this server in: it needs a token that opens it" in done.text
    assert "Username" not in done.text, "git must not ask anybody for a password"


async def test_a_redirect_is_not_followed_with_the_token(server: GitServer, tmp_path: Path) -> None:
    with git_server(server.root) as thief:
        server.redirect = thief.url
        async with inside(server, tmp_path / "agent") as agent:
            done = await agent.git("ls-remote", f"{server.url}/acme/shop.git")
        assert done.code == 128
        assert "acme/shop has moved: register its new address" in done.text
        assert not thief.seen


async def test_a_large_negotiation_is_compressed(server: GitServer, tmp_path: Path) -> None:
    """git compresses long lists of what it has; the body passes as it is."""
    async with inside(server, tmp_path / "agent") as agent:
        await agent.clone()
        # Each a second later than the one before: git offers the newest first, and ends when one is known.
        begun = int(run_git(agent.folder, "log", "-1", "--format=%ct")) + 1
        commits = "".join(
            f"commit refs/heads/main\ncommitter Me <me@example.org> {begun + number} +0000\ndata 1\nx\n"
            + ("from refs/heads/main^0\n" if number == 0 else "")
            for number in range(60)
        )
        run_git(agent.folder, "fast-import", "--quiet", data=commits.encode())
        other = tmp_path / "other"
        run_git(tmp_path, "clone", "--quiet", str(agent.bare), str(other))
        commit = commit_file(other, "new", "1")
        run_git(other, "push", "--quiet", "origin", "HEAD:main")
        done = await agent.git("fetch", "origin", GIT_TRACE_CURL="1", GIT_TRACE_CURL_NO_DATA="1")
        assert done.code == 0, done.text[-1000:]
        assert "content-encoding: gzip" in done.text.lower()
        assert run_git(agent.folder, "rev-parse", "origin/main") == commit


async def raw(door: Door, request: str, body: bytes = b"") -> httpx.Response:
    method, target = request.split()
    async with httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False) as client:
        return await client.request(method, target, content=body, headers={"Content-Type": "x/y"})


async def test_what_reaches_the_server(tmp_path: Path) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"0000", headers="Content-Type: application/x-git-x\r\nSet-Cookie: a=b\r\n")

    async with AsyncExitStack() as stack:
        url, seen = await stack.enter_async_context(open_upstream(handler))
        repository = GitRepository("acme/shop", f"{url}/acme/shop.git", (BRANCH,), token)
        door = await stack.enter_async_context(open_door(git=[repository]))
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=door.url, trust_env=False))
        answer = await client.get(
            "/git/acme/shop.git/info/refs?service=git-upload-pack",
            headers={
                "Authorization": "Basic x", "Cookie": "x", "X-GitHub-Api": "x", "Git-Protocol": "version=2",
                "User-Agent": "git/2", "Accept": "*/*", "Private-Token": "x",
            },
        )  # fmt: skip
        assert "set-cookie" not in answer.headers
    [request] = seen
    assert request.target == "/acme/shop.git/info/refs?service=git-upload-pack"
    assert request.headers["authorization"] == [f"Basic {BASIC}"]
    assert request.headers["git-protocol"] == ["version=2"]
    assert set(request.headers) <= {
        "host",
        "accept",
        "user-agent",
        "git-protocol",
        "authorization",
        "connection",
    }


async def token() -> str | None:
    return TOKEN


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("POST /git/acme/shop.git/info/refs?service=git-upload-pack", 405),
        ("GET /git/acme/shop.git/git-upload-pack", 405),
        ("GET /git/acme/shop.git/info/refs", 404),
        ("GET /git/acme/shop.git/info/refs?service=git-upload-archive", 404),
        ("GET /git/acme/shop.git/info/refs?service=git-upload-pack&x=1", 404),
        ("GET /git/acme/shop.git/HEAD", 404),
        ("GET /git/acme/shop.git/objects/info/packs", 404),
        ("POST /git/acme/shop.git/info/lfs/objects/batch", 404),
        ("GET /git/acme/shop.git/../../other/info/refs?service=git-upload-pack", 404),
        ("GET /git/acme/other.git/info/refs?service=git-upload-pack", 403),
        ("GET /git/acme%2fshop.git/info/refs?service=git-upload-pack", 403),
        ("GET /git/", 403),
        ("POST /git/acme/shop-extras.git/git-receive-pack", 403),
    ],
)
def test_what_is_not_open(request_line: str, status: int) -> None:
    method, target = request_line.split()
    decision = admit([GitRepository("acme/shop", "https://git.example/acme/shop.git")], method, target)
    assert getattr(decision, "status", None) == status


def test_names_without_case() -> None:
    repository = GitRepository("acme/shop", "https://git.example/Acme/Shop")
    decision = admit([repository], "POST", "/git/ACME/Shop/git-receive-pack")
    assert decision == GitRequest(repository, "git-receive-pack", pushes=True)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "ends before its commands do"),
        (b"0099aaaa", 400, "ends before its commands do"),
        (b"nonsense", 400, "cannot be checked"),
        (command("refs/heads/main") + b"0000PACK", 403, "may push to"),
        (command(f"refs/heads/{BRANCH}\n") + b"0000PACK", 403, "may push to"),
        (command(f"refs/heads/{BRANCH}", new=ZERO) + b"0000", 403, "may not delete"),
        (command(f"refs/heads/{BRANCH}") + command("refs/heads/main") + b"0000PACK", 403, "may push to"),
        (command(f"refs/heads/{BRANCH}") * 2 + b"0000PACK", 403, "changes a branch once"),
    ],
    ids=range(8),
)
async def test_pushes_by_hand(body: bytes, status: int, reason: str) -> None:
    async def handler(exchange: Exchange) -> None:
        raise AssertionError("the server must not hear of it")

    async with open_upstream(handler) as (url, seen):
        repository = GitRepository("acme/shop", f"{url}/acme/shop.git", (BRANCH,), token)
        async with open_door(git=[repository]) as door:
            answer = await raw(door, "POST /git/acme/shop.git/git-receive-pack", body)
    assert (answer.status_code, seen) == (status, [])
    assert answer.text.startswith("Taskyard: ")
    assert reason in answer.text
    assert [told.status for told in door.refusals] == [status]


async def test_a_push_that_is_not_remembered_does_not_go_out() -> None:
    """Who drives the run is asked first: another worker may have it by now."""
    told: list[str] = []

    async def on_push(commit: str) -> bool:
        told.append(commit)
        return False

    async def handler(exchange: Exchange) -> None:
        raise AssertionError("the server must not hear of it")

    async with open_upstream(handler) as (url, seen):
        repository = GitRepository("acme/shop", f"{url}/acme/shop.git", (BRANCH,), token, on_push)
        async with open_door(git=[repository]) as door:
            body = command(f"refs/heads/{BRANCH}") + b"0000PACK"
            answer = await raw(door, "POST /git/acme/shop.git/git-receive-pack", body)
    assert (answer.status_code, len(told), seen) == (403, 1, [])
    assert "driven elsewhere" in answer.text


async def test_a_neighbour_at_an_international_host() -> None:
    repository = GitRepository("acme/shop", "https://m\u00fcnchen.example/acme/shop", (), token)
    async with open_door(git=[repository]) as door:
        answer = await raw(door, "GET /git/acme/shop-x/info/refs?service=git-upload-pack")
    assert answer.status_code == 302
    expected = "https://xn--mnchen-3ya.example/acme/shop-x/info/refs?service=git-upload-pack"
    assert answer.headers["location"] == expected


async def test_a_compressed_push_is_refused() -> None:
    repository = GitRepository("acme/shop", "http://127.0.0.1:9/acme/shop.git", (BRANCH,), token)
    async with open_door(git=[repository]) as door, httpx.AsyncClient(base_url=door.url) as client:
        target = "/git/acme/shop.git/git-receive-pack"
        answer = await client.post(target, content=b"x", headers={"Content-Encoding": "gzip"})
    assert (answer.status_code, answer.text) == (415, "Taskyard: a compressed push cannot be checked.\n")


async def test_answers_that_are_no_git() -> None:
    """A server may answer anything: nothing that quotes the token or is no git comes in."""
    answers = [(200, "text/html"), (404, "text/plain"), (500, "text/plain"), (401, "text/plain")]

    async def handler(exchange: Exchange) -> None:
        status, kind = answers[len(seen) - 1]
        await exchange.answer(
            f"you sent {BASIC}".encode(), status, f"Content-Type: {kind}\r\nX-Echo: {BASIC}\r\n"
        )

    said = []
    async with open_upstream(handler) as (url, seen):
        repository = GitRepository("acme/shop", f"{url}/acme/shop.git", (), token)
        async with open_door(git=[repository]) as door:
            for _ in answers:
                answer = await raw(door, "GET /git/acme/shop/info/refs?service=git-upload-pack")
                assert BASIC not in answer.text + str(answer.headers)
                said.append((answer.status_code, answer.text.partition("acme/shop ")[2]))
    assert said == [
        (502, "is not served by git's smart HTTP.\n"),
        (403, "does not exist, or the token of this server does not open it.\n"),
        (502, "answered with status 500.\n"),
        (403, "does not let this server in: it needs a token that opens it.\n"),
    ]


async def test_an_address_that_names_no_host() -> None:
    repository = GitRepository("acme/shop", "https://a..b/acme/shop.git", (), token)
    async with open_door(git=[repository]) as door:
        answer = await raw(door, "GET /git/acme/shop/info/refs?service=git-upload-pack")
    assert (answer.status_code, len(door.refusals)) == (502, 1)
    assert "names no host" in answer.text


async def test_a_server_that_is_away() -> None:
    repository = GitRepository("acme/shop", "http://127.0.0.1:9/acme/shop.git", (), token)
    async with open_door(git=[repository]) as door:
        with capture_logs() as logs:
            answer = await raw(door, "GET /git/acme/shop/info/refs?service=git-upload-pack")
    assert answer.status_code == 502
    assert answer.text.startswith("Taskyard: the repository acme/shop could not be reached (ConnectError)")
    assert TOKEN not in str(logs) and BASIC not in str(logs)  # noqa: PT018
