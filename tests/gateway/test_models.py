"""Admission, headers in both directions, and the hiding of the key."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from taskyard.errors import SetupError
from taskyard.gateway.models import (
    Admitted,
    KeyMask,
    ModelRoute,
    Refused,
    admit,
    answer_headers,
    error_body,
    upstream_request,
)
from taskyard.gateway.origins import Origin
from taskyard.gateway.policy import Policy, shown_target
from tests.support.door import KEY

ROUTES = {
    "anthropic": ModelRoute("https://a.example", KEY),
    "openai": ModelRoute("https://o.example/corp/", KEY),
}


def admitted(method: str, target: str) -> Admitted:
    decision = admit(ROUTES, method, target)
    assert isinstance(decision, Admitted), decision
    return decision


def refused(method: str, target: str) -> Refused:
    decision = admit(ROUTES, method, target)
    assert isinstance(decision, Refused), decision
    return decision


@pytest.mark.parametrize(
    ("method", "target", "upstream", "costs"),
    [
        ("POST", "/anthropic/v1/messages?beta=true", "/v1/messages?beta=true", True),
        ("POST", "/anthropic/v1/messages/count_tokens", "/v1/messages/count_tokens", False),
        ("HEAD", "/anthropic/api/hello", "/api/hello", False),
        ("GET", "/anthropic/v1/models/claude-x.1@20250101", "/v1/models/claude-x.1@20250101", False),
        ("POST", "/openai/v1/responses", "/corp/v1/responses", True),
        ("POST", "/openai/v1/responses/compact", "/corp/v1/responses/compact", True),
        ("POST", "/openai/v1/chat/completions", "/corp/v1/chat/completions", True),
        ("GET", "/openai/v1/models?a=%2F..&b=/../x", "/corp/v1/models?a=%2F..&b=/../x", False),
    ],
)
def test_what_passes_and_where_it_goes(method: str, target: str, upstream: str, costs: bool) -> None:
    got = admitted(method, target)
    assert got.target == upstream.encode()
    assert got.costs is costs


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/anthropic",
        "/anthropicv1/messages",
        "//anthropic/v1/messages",
        "/v1/messages",
        "/anthropic/",
        "/anthropic//v1/messages",
        "/anthropic/v1/messages/",
        "/anthropic/v1/messages/../files",
        "/anthropic/v1/models/..",
        "/anthropic/v1/models/%2e%2e",
        "/anthropic/v1/models/a/b",
        "/anthropic/v1/models/",
        "/anthropic/v1/files",
        "/anthropic/v1/messages/batches",
        "/anthropic/v1/%6dessages",
        "/anthropic/v1/responses",
        "/openai/v1/files",
        "/openai/v1/batches",
        "/openai/v1/responses/resp_1",
        "/openai/v1/messages",
        "/OPENAI/v1/responses",
    ],
)
def test_what_is_not_open(target: str) -> None:
    assert refused("POST", target).status == 404
    assert refused("GET", target).status == 404


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "post"])
def test_other_methods(method: str) -> None:
    decision = refused(method, "/anthropic/v1/messages")
    assert (decision.status, decision.allow) == (405, ("POST",))


@pytest.mark.parametrize("routes", [{}, {"anthropic": ModelRoute("https://a.example")}])
def test_no_key(routes: dict[str, ModelRoute]) -> None:
    decision = admit(routes, "POST", "/anthropic/v1/messages")
    message = "no API key for anthropic is configured on this server: set ANTHROPIC_API_KEY"
    assert decision == Refused(403, message)


def test_headers_up() -> None:
    inside = [
        (b"host", b"127.0.0.1:3128"),
        (b"connection", b"keep-alive, X-Private"),
        (b"x-private", b"1"),
        (b"proxy-connection", b"keep-alive"),
        (b"te", b"trailers"),
        (b"upgrade", b"websocket"),
        (b"authorization", b"Bearer from-inside"),
        (b"x-api-key", b"from-inside"),
        (b"api-key", b"from-inside"),
        (b"proxy-authorization", b"Basic x"),
        (b"cookie", b"a=from-inside"),
        (b"accept-encoding", b"gzip, br"),
        (b"expect", b"100-continue"),
        (b"content-length", b"3"),
        (b"anthropic-version", b"2023-06-01"),
        (b"anthropic-beta", b"one"),
        (b"anthropic-beta", b"two"),
        (b"content-type", b"application/json"),
    ]

    async def body() -> AsyncIterator[bytes]:
        yield b"abc"

    request = upstream_request(admitted("POST", "/anthropic/v1/messages"), "POST", inside, body())
    assert request.head().split(b"\r\n")[1:] == [
        b"host: a.example",
        b"anthropic-version: 2023-06-01",
        b"anthropic-beta: one",
        b"anthropic-beta: two",
        b"content-type: application/json",
        b"accept-encoding: identity",
        b"x-api-key: " + KEY.encode(),
        b"content-length: 3",
        b"",
        b"",
    ]
    request = upstream_request(admitted("POST", "/openai/v1/responses"), "POST", inside, body())
    assert f"\r\nauthorization: Bearer {KEY}\r\n".encode() in request.head()
    assert b"x-api-key" not in request.head()


def test_a_chunked_body_goes_chunked_whatever_length_is_claimed() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"abc"

    inside = [(b"transfer-encoding", b"chunked"), (b"content-length", b"1")]
    request = upstream_request(admitted("POST", "/openai/v1/responses"), "POST", inside, body())
    assert b"\r\ntransfer-encoding: chunked\r\n" in request.head()
    assert b"content-length" not in request.head()


def test_headers_down() -> None:
    upstream = [
        (b"Content-Type", b"text/event-stream"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Connection", b"close, X-Hop"),
        (b"X-Hop", b"1"),
        (b"Set-Cookie", b"__cf=1"),
        (b"Alt-Svc", b'h3=":443"'),
        (b"Retry-After", b"3"),
        (b"X-Echo", f"key={KEY};".encode()),
    ]
    assert answer_headers(upstream, KEY) == [
        (b"content-type", b"text/event-stream"),
        (b"retry-after", b"3"),
        (b"x-echo", b"key=" + b"*" * len(KEY) + b";"),
    ]


def test_the_key_is_starred_out_wherever_it_is_cut() -> None:
    body = f"bad key {KEY}, I said {KEY}".encode()
    stars = body.replace(KEY.encode(), b"*" * len(KEY))
    for cut in range(len(body) + 1):
        mask = KeyMask(KEY)
        assert mask.feed(body[:cut]) + mask.feed(body[cut:]) + mask.finish() == stars
    mask = KeyMask(KEY)
    assert b"".join(mask.feed(body[i : i + 1]) for i in range(len(body))) + mask.finish() == stars
    mask = KeyMask()
    assert mask.feed(body) + mask.finish() == body


def test_no_repr_shows_the_key() -> None:
    policy = Policy("run-1", ROUTES)
    decision = admitted("POST", "/anthropic/v1/messages")
    for thing in (ROUTES["anthropic"], policy, decision):
        assert KEY not in repr(thing) + str(thing)
        assert "a.example" in repr(thing)


@pytest.mark.parametrize(
    "base_url",
    [
        "",
        "api.anthropic.com",
        "ftp://x",
        "https://",
        "https://u:p@h",
        "https://h?a=1",
        "https://h/#a",
        "http://[::",
    ],
)
def test_a_base_url_that_cannot_work(base_url: str) -> None:
    with pytest.raises(SetupError, match="https://host/path") as caught:
        ModelRoute(base_url, KEY)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", ["", "  ", f"{KEY}\n", f"{KEY} x", f"{KEY}é", f"{KEY}\x00"])
def test_a_key_that_cannot_work(key: str) -> None:
    with pytest.raises(SetupError, match="line break") as caught:
        ModelRoute("https://h", key)
    assert KEY not in str(caught.value)


def test_errors_have_the_shape_of_their_api() -> None:
    assert json.loads(error_body("anthropic", 403, "no.")) == {
        "type": "error",
        "error": {"type": "permission_error", "message": "Taskyard: no."},
    }
    assert json.loads(error_body("openai", 502, "no.")) == {
        "error": {"message": "Taskyard: no.", "type": "api_error", "param": None, "code": "api_error"}
    }


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("/a/b?key=1", "/a/b"),
        ("/a#b", "/a"),
        ("/me@here/x", "/me@here/x"),
        ("example.org:443", "example.org:443"),
        ("me:pw@example.org:443", "example.org:443"),
        ("http://me:pw@example.org/a/b@c?token=1", "http://example.org/a/b@c"),
        ("x" * 1000, "x" * 500),
        ("*", "*"),
    ],
)
def test_shown_target(target: str, shown: str) -> None:
    assert shown_target(target) == shown


def test_the_target_goes_out_as_it_came() -> None:
    request = upstream_request(admitted("GET", "/openai/v1/models?q=%7e'\"|"), "GET", [], None)
    assert request.target == b"/corp/v1/models?q=%7e'\"|"
    assert request.origin == Origin("https", "o.example", 443)
