"""Host names in their normal form, and the rules about them."""

from __future__ import annotations

import pytest

from taskyard.gateway.hosts import BadHostError, HostRules, parse_authority, parse_host


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("Example.ORG", "example.org"),
        ("example.org.", "example.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("example。org", "example.org"),
        ("my_bucket.s3.example", "my_bucket.s3.example"),
        ("a--b.example", "a--b.example"),
        ("1.example", "1.example"),
        ("192.0.2.1", "192.0.2.1"),
        ("[2001:DB8::1]", "2001:db8::1"),
        ("localhost", "localhost"),
    ],
)
def test_normal_form(text: str, host: str) -> None:
    assert parse_host(text).text == host


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "a..b",
        ".example.org",
        "example.org..",
        "-a.example",
        "a-.example",
        "exa mple.org",
        "ex%61mple.org",
        "example.org%00.evil.example",
        "example.org\\evil.example",
        "example.org/evil",
        "user@example.org",
        "a" * 64 + ".example",
        ".".join(["a" * 60] * 5),
        "127.1",
        "2130706433",
        "0x7f.1",
        "0x7f000001",
        "0177.0.0.1",
        "1.2.3",
        "1.2.3.4.5",
        "256.1.1.1",
        "example.0x1",
        "[127.0.0.1]",
        "[fe80::1%eth0]",
        "[::1",
        "::1",
        "[v1.x]",
        "*.example.org",
        "ＥＸＡＭＰＬＥ.org\u200d.",
    ],
)
def test_no_hosts(text: str) -> None:
    with pytest.raises(BadHostError):
        parse_host(text)


def test_full_width_letters_are_letters() -> None:
    assert parse_host("ｅｘａｍｐｌｅ.org").text == "example.org"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("example.org:443", "example.org", 443),
        ("[::1]:80", "::1", 80),
        ("example.org", "example.org", 80),
        ("[::1]", "::1", 80),
    ],
)
def test_authority(text: str, host: str, port: int) -> None:
    found, number = parse_authority(text, 80)
    assert (found.text, number) == (host, port)


@pytest.mark.parametrize(
    "text",
    [
        "example.org:",
        "example.org:0",
        "example.org:65536",
        "example.org:٤٤٣",
        "a:b:1",
        "a:-1",
        "a:1_0",
        ":80",
    ],
)
def test_bad_authority(text: str) -> None:
    with pytest.raises(BadHostError):
        parse_authority(text, 80)


def test_a_port_may_be_asked_for() -> None:
    with pytest.raises(BadHostError):
        parse_authority("example.org")


RULES = HostRules(
    [
        "Example.org",
        "*.deep.example.org",
        "bücher.example",
        "api.example.net:8443",
        "192.0.2.1",
        "[2001:db8::1]:8080",
    ]
)


@pytest.mark.parametrize(
    ("host", "port", "allowed"),
    [
        ("example.org", 443, True),
        ("example.org", 80, True),
        ("example.org", 22, True),
        ("example.org", 8080, False),
        ("EXAMPLE.ORG.", 443, True),
        ("www.example.org", 443, False),
        ("evil-example.org", 443, False),
        ("example.org.evil.net", 443, False),
        ("deep.example.org", 443, False),
        ("a.deep.example.org", 443, True),
        ("a.b.deep.example.org", 443, True),
        ("adeep.example.org", 443, False),
        ("xn--bcher-kva.example", 443, True),
        ("api.example.net", 8443, True),
        ("api.example.net", 443, False),
        ("192.0.2.1", 443, True),
        ("192.0.2.2", 443, False),
        ("[2001:db8::1]", 8080, True),
        ("[2001:0db8:0::1]", 8080, True),
        ("[2001:db8::1]", 443, False),
    ],
)
def test_rules(host: str, port: int, allowed: bool) -> None:
    assert RULES.allow(parse_host(host), port) is allowed


def test_rules_that_are_none() -> None:
    bad = [
        "*",
        "*.com",
        "https://example.org/",
        "*.*.example.org",
        "a*.example.org",
        "*.192.0.2.1",
        "exa mple.org",
        "",
    ]
    rules = HostRules([*bad, "good.example"])
    assert rules.ignored == bad
    assert rules.allow(parse_host("good.example"), 443)
    assert not rules.allow(parse_host("example.org"), 443)


def test_a_rule_with_a_port_adds_to_one_without() -> None:
    for names in (["a.example", "a.example:8080"], ["a.example:8080", "a.example"]):
        rules = HostRules(names)
        assert [rules.allow(parse_host("a.example"), port) for port in (443, 8080, 8081)] == [
            True,
            True,
            False,
        ]


def test_every_port() -> None:
    rules = HostRules(["a.example", "a.example:80"], None)
    assert rules.allow(parse_host("a.example"), 5432)
    assert rules
    assert not HostRules([])
