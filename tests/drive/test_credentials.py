"""Which token opens a run's repository, and where it may go."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from pydantic import SecretStr

from taskyard.db.engine import Database, Row
from taskyard.drive.credentials import git_repository, git_variables, run_credentials, site_token
from taskyard.environments.secrets import sealing_box
from taskyard.forge.git import check_origin
from taskyard.runs import store as runs
from taskyard.settings import GitSettings, Settings
from tests.conftest import make_settings
from tests.support.repositories import ENV
from tests.support.rows import make_run

TOKENS = {
    "github.com": "host",
    "github.com/acme": "owner",
    "github.com/acme/shop": "repository",
    "Git.Example:8443/Team/": "other",
}


@pytest.mark.parametrize(
    ("url", "token"),
    [
        ("https://github.com/acme/shop", "repository"),
        ("https://github.com/Acme/Shop.git", "repository"),
        ("https://github.com/acme/shop-extras", "owner"),
        ("https://github.com/acme-evil/shop", "host"),
        ("https://github.com/other/thing", "host"),
        ("https://github.com.evil.example/acme/shop", None),
        ("https://evil.example/github.com/acme/shop", None),
        ("https://github.com:8443/acme/shop", None),
        ("https://git.example:8443/team/x", "other"),
        ("https://git.example:8443/teams/x", None),
        ("https://git.example/team/x", None),
    ],
)
def test_the_longest_that_fits(url: str, token: str | None) -> None:
    settings = GitSettings(tokens={where: SecretStr(text) for where, text in TOKENS.items()})
    assert site_token(settings, url) == token
    assert "repository" not in repr(settings)


@pytest.fixture
async def row(database: Database) -> Row:
    return {"id": await make_run(database)}


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    tokens = {"github.com": "of-the-site", "127.0.0.1:8080": "local", "git.example": "of-the-site"}
    return make_settings(
        tmp_path, database_url, git=GitSettings(tokens={k: SecretStr(v) for k, v in tokens.items()})
    )


@pytest.mark.parametrize(
    ("origin", "token"),
    [
        ("https://github.com/acme/shop", "of-the-user"),
        ("https://github.com.evil.example/acme/shop", None),
        ("https://git.example/acme/shop", "of-the-site"),
        ("http://127.0.0.1:8080/shop", "local"),
        ("http://git.example/acme/shop", None),
        ("http://github.com/acme/shop", None),
    ],
)
async def test_a_token_of_the_user_goes_first_and_to_its_host_only(
    settings: Settings, database: Database, row: Row, origin: str, token: str | None
) -> None:
    async with database.transaction() as connection:
        box = await sealing_box(connection, settings)
        await runs.keep_user_token(connection, row["id"], box.seal("of-the-user"), 6)
    assert await run_credentials(settings, database, row)(check_origin(origin)) == token


async def test_a_token_of_the_user_that_has_expired(settings: Settings, database: Database, row: Row) -> None:
    async with database.transaction() as connection:
        box = await sealing_box(connection, settings)
        await runs.keep_user_token(connection, row["id"], box.seal("of-the-user"), 6)
    credentials, origin = (
        run_credentials(settings, database, row),
        check_origin("https://github.com/acme/shop"),
    )
    assert await credentials(origin) == "of-the-user"
    await database.execute("UPDATE run_user_tokens SET expires_at = clock_timestamp()")
    assert await credentials(origin) == "of-the-site"


async def test_a_folder_of_this_host_is_not_served(tmp_path: Path) -> None:
    async def credentials(origin: object) -> str | None:
        raise AssertionError("nobody asked for a token")

    folder = tmp_path / "r"
    subprocess.run(["git", "init", "--quiet", str(folder)], env=ENV, check=True)
    assert git_repository("acme/shop", check_origin(str(folder)), "b", credentials) is None
    served = git_repository("Acme/Shop", check_origin("https://github.com/Acme/Shop.git"), "b", credentials)
    assert served is not None
    assert (served.name, served.url, served.branches) == (
        "acme/shop",
        "https://github.com/Acme/Shop.git",
        ("b",),
    )


@pytest.mark.parametrize("origin", ["https://git.example/acme/shop", "https://git.example/acme/shop.git"])
def test_git_inside_goes_to_the_gateway(origin: str, tmp_path: Path) -> None:
    """As git itself says, whatever the repository and the home say."""
    variables = git_variables("http://127.0.0.1:3128", "Acme/Shop", check_origin(origin))
    assert json.dumps(variables).count("git.example") == 1
    (tmp_path / ".gitconfig").write_text('[url "https://elsewhere/"]\n insteadOf = https://git.example/\n')

    def where(url: str) -> str:
        done = subprocess.run(
            ["git", "ls-remote", "--get-url", url],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **variables}, cwd=tmp_path, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    assert where("https://git.example/acme/shop") == "http://127.0.0.1:3128/git/acme/shop"
    assert where("https://git.example/acme/shop.git") == "http://127.0.0.1:3128/git/acme/shop.git"
    assert where("https://git.example/acme/else") == "https://elsewhere/acme/else"
