"""The token that opens a run's repository, on the host: asked each time it is needed, handed to nobody inside."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from taskyard.db.engine import Database, Row
from taskyard.environments.secrets import opened
from taskyard.forge.git import Credentials, Origin
from taskyard.gateway.server import GitRepository
from taskyard.runs import store as runs
from taskyard.settings import GitSettings, Settings

USER_TOKEN_HOSTS = frozenset({"github.com"})
"""Where a `github_user_token` may be sent."""


def run_credentials(settings: Settings, database: Database, row: Row) -> Credentials:
    """The tokens of a run (run-lifecycle §4): its user's own while it lasts, else the site's for that address."""

    async def token(origin: Origin) -> str | None:
        if not origin.takes_credentials:
            return None
        if urlsplit(origin.location).hostname in USER_TOKEN_HOSTS:
            own = await opened(settings, lambda: runs.user_token(database, row["id"]))
            if own is not None:
                return own
        return site_token(settings.git, origin.location)

    return token


def site_token(git: GitSettings, url: str) -> str | None:
    """The token of the settings for a URL: the longest key that is its host and the beginning of its path."""
    parts = urlsplit(url)
    where = f"{parts.netloc}{parts.path}".lower().removesuffix(".git").rstrip("/")
    found = [
        key for key in git.tokens if where == key.lower() or where.startswith(f"{key.lower().rstrip('/')}/")
    ]
    return git.tokens[max(found, key=len)].get_secret_value() if found else None


def git_repository(
    name: str,
    origin: Origin,
    branch: str,
    credentials: Credentials,
    on_push: Callable[[str], Awaitable[bool]] | None = None,
) -> GitRepository | None:
    """A repository as the gateway serves it; None for a folder of this host, which no protocol of it reaches."""
    if origin.kind != "url":
        return None
    return GitRepository(name.lower(), origin.location, (branch,), lambda: credentials(origin), on_push)


def git_variables(gateway: str, name: str, origin: Origin) -> dict[str, str]:
    """What makes git inside the sandbox go to the gateway for this repository, whatever its configuration says.

    git replaces the beginning of addresses, so it works with and without `.git` at the end.
    """
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{gateway}/git/{name.lower()}.insteadOf",
        "GIT_CONFIG_VALUE_0": origin.location.removesuffix(".git"),
    }
