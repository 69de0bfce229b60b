"""The first start of a server: a key and a one-time link, and no default password."""

from __future__ import annotations

import re
from pathlib import Path

import httpx

from taskyard.accounts.sign_in import link_path
from tests.support.browser import PASSWORD
from tests.support.site import DEADLINE_S, running_site, taskyard

LINK = re.compile(re.escape(link_path("")) + r"([\w-]+)")


def test_first_user_sets_a_password_in_the_browser(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with running_site(data_dir) as site:
        found = LINK.search(site.said())
        assert found, site.said()
        with httpx.Client(base_url=site.url, timeout=DEADLINE_S, trust_env=False) as client:
            form = {"token": found[1], "password": PASSWORD}
            assert client.post("/set-password", data=form).status_code == 303
            assert client.get("/api/users/@me/").json()["email"] == "admin@localhost"
            client.cookies.clear()
            body = {"email": "admin@localhost", "password": PASSWORD}
            assert client.post("/api/login", json=body).status_code == 200
        # Beside the running server: a link with its address.
        made = taskyard(data_dir, "admin", "set-password", "admin@localhost", "--link")
        assert made.stdout.startswith(site.url + link_path("")), made.stderr
    with running_site(data_dir) as site:
        assert LINK.search(site.said()) is None
        assert "API key" not in site.said()
