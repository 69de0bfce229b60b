"""A person at a browser: cookies, forms, and the headers that browsers add."""

from __future__ import annotations

import html
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode

import httpx

from taskyard.accounts import admin
from tests.support.yard import DEADLINE_S, Yard

PASSWORD = "correct horse battery"


class Browser:
    """Keeps cookies, follows nothing by itself."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.origin = str(client.base_url).rstrip("/")

    async def get(self, path: str, **options: Any) -> httpx.Response:
        return await self.client.get(path, **options)

    async def submit(self, path: str, /, **fields: str) -> httpx.Response:
        """Send a form as a browser does from a page of the same site."""
        headers = {
            "Content-Type": "application/x-www-form-urlencoded",
            "Origin": self.origin,
            "Sec-Fetch-Site": "same-origin",
        }
        return await self.client.post(path, content=urlencode(fields), headers=headers)

    async def call(self, method: str, path: str, *, csrf: bool = True, **options: Any) -> httpx.Response:
        """Call the API as a script of a page does."""
        headers = {"X-CSRFToken": self.client.cookies["taskyard_csrf"]} if csrf else {}
        return await self.client.request(method, path, headers=headers, **options)

    async def sign_in(self, email: str, password: str = PASSWORD) -> httpx.Response:
        return await self.client.post("/api/login", json={"email": email, "password": password})


@asynccontextmanager
async def open_browser(yard: Yard, signed_in_as: str | None = None) -> AsyncIterator[Browser]:
    """A fresh browser; with a name, that person has a password and is signed in."""
    async with httpx.AsyncClient(base_url=yard.url, timeout=DEADLINE_S, trust_env=False) as client:
        browser = Browser(client)
        if signed_in_as is not None:
            email = f"{signed_in_as}@example.org"
            await admin.set_password(yard.database, email, PASSWORD)
            response = await browser.sign_in(email)
            assert response.status_code == 200, response.text
        yield browser


def field(page: str, name: str) -> str:
    """The value of a form's field in a page."""
    found = re.search(rf'name="{name}"[^>]*\bvalue="([^"]*)"', page)
    assert found, f"no field {name} in {page}"
    return html.unescape(found[1])


def form_target(page: str) -> str:
    """Where a page's form is sent."""
    found = re.search(r'<form method="post" action="([^"]*)"', page)
    assert found, page
    return html.unescape(found[1])
