from __future__ import annotations

import os
from pathlib import Path

import pytest

from taskyard.forge.git import InvalidOriginError, Origin, check_origin
from tests.support.repositories import make_bare, make_repository, run_git


def test_path_of_a_working_tree_and_of_a_bare_repository(tmp_path: Path) -> None:
    tree = make_repository(tmp_path / "shop")
    bare = make_bare(tmp_path / "shop.git", tree)
    assert check_origin(f" {tree}/ ") == Origin("path", str(tree), str(tree))
    assert check_origin(str(bare)).location == str(bare)


def test_linked_worktree_is_a_repository(tmp_path: Path) -> None:
    tree = make_repository(tmp_path / "shop")
    run_git(tree, "worktree", "add", "--quiet", str(tmp_path / "linked"))
    assert check_origin(str(tmp_path / "linked")).location == str(tmp_path / "linked")


def test_symbolic_links_are_resolved(tmp_path: Path) -> None:
    tree = make_repository(tmp_path / "shop")
    (tmp_path / "link").symlink_to(tree)
    assert check_origin(str(tmp_path / "link")).location == str(tree)


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("https://github.com/acme/shop.git", "https://github.com/acme/shop.git"),
        ("HTTPS://GitHub.com/acme/shop/", "https://github.com/acme/shop"),
        ("http://forge.local:3000/acme/shop", "http://forge.local:3000/acme/shop"),
        ("http://[::1]:3000/acme/shop", "http://[::1]:3000/acme/shop"),
    ],
)
def test_urls(text: str, location: str) -> None:
    assert check_origin(text) == Origin("url", location, location)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no address"),
        ("https://token@github.com/acme/shop", "Leave user names, passwords and tokens out"),
        ("https://u:p@github.com/acme/shop", "Leave user names, passwords and tokens out"),
        ("https://@github.com/acme/shop", "Leave user names, passwords and tokens out"),
        ("https://github.com", "no repository on it"),
        ("https:///acme/shop", "no host name"),
        ("https://github.com/acme/shop?x=1", "no '\\?'"),
        ("https://github.com/a b", "space"),
        ("https://github.com:99999/a", "not a valid URL"),
        ("ext::sh -c true", "Protocol 'ext' is not supported"),
        ("ssh://git@github.com/acme/shop", "Protocol 'ssh' is not supported"),
        ("git://github.com/acme/shop", "Protocol 'git' is not supported"),
        ("git@github.com:acme/shop.git", "SSH addresses are not supported"),
        ("file:///srv/shop", "without 'file://'"),
        ("--upload-pack=touch /x", "cannot start with '-'"),
        ("https://github.com/acme/\nshop", "line breaks"),
        ("shop/dir", "absolute path"),
        ("~/shop", "absolute path"),
        ("/nonexistent/shop", "no folder /nonexistent/shop"),
        ("/usr", "not a git repository"),
    ],
)
def test_refusals_say_why(text: str, reason: str) -> None:
    with pytest.raises(InvalidOriginError, match=reason) as caught:
        check_origin(text)
    assert caught.value.status == 400


def test_a_token_in_a_refused_url_is_not_repeated() -> None:
    with pytest.raises(InvalidOriginError) as caught:
        check_origin("https://ghp_secret@github.com/acme/shop")
    assert "ghp_secret" not in caught.value.detail


def test_folders_of_agents_are_refused_also_through_links(tmp_path: Path) -> None:
    data = tmp_path / "data"
    tree = make_repository(data / "sandboxes" / "1" / "shop")
    disguised = tmp_path / "disguised"
    disguised.mkdir()
    (disguised / ".git").symlink_to(tree / ".git")
    filed = tmp_path / "filed"
    filed.mkdir()
    (filed / ".git").write_text(f"gitdir: {tree}/.git\n")
    (tmp_path / "link").symlink_to(tree)
    for path in (tree, tmp_path / "link", disguised, filed):
        with pytest.raises(InvalidOriginError, match="data folder"):
            check_origin(str(path), outside=[data])
    assert check_origin(str(tree), outside=[tmp_path / "other"])


def test_far_side_is_plain_for_our_own_repository_and_for_urls(tmp_path: Path) -> None:
    tree = make_repository(tmp_path / "shop")
    assert check_origin(str(tree)).far_side("upload-pack") == []
    assert check_origin("https://github.com/a/b").far_side("upload-pack") == []


def test_far_side_of_a_non_root_server_trusts_this_folder_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = make_repository(tmp_path / "my shop")
    monkeypatch.setattr(os, "geteuid", lambda: tree.stat().st_uid + 1)
    assert check_origin(str(tree)).far_side("receive-pack") == [
        f"--receive-pack=git -c 'safe.directory={tree}' -c 'safe.directory={tree}/.git' receive-pack"
    ]


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://github.com/a/b", True),
        ("http://github.com/a/b", False),
        ("http://127.0.0.1:80/a/b", True),
    ],
)
def test_tokens_go_over_tls_or_to_this_host(url: str, allowed: bool) -> None:
    assert check_origin(url).takes_credentials is allowed
