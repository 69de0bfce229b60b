"""`/api/schema/` and `/api/docs/`."""

from __future__ import annotations

import re

import pytest
import yaml

from taskyard.openapi.document import document
from tests.support.yard import Yard, error


@pytest.mark.parametrize(
    ("path", "accept", "media"),
    [
        ("/api/schema/", "*/*", "application/vnd.oai.openapi"),
        ("/api/schema/", "application/json", "application/vnd.oai.openapi+json"),
        ("/api/schema/?format=json", "*/*", "application/vnd.oai.openapi+json"),
        ("/api/schema?format=yaml", "application/json", "application/vnd.oai.openapi"),
    ],
)
async def test_the_schema_needs_no_key_and_comes_in_two_forms(
    yard: Yard, path: str, accept: str, media: str
) -> None:
    response = await yard.api(None).get(path, headers={"Accept": accept})

    assert response.status_code == 200
    assert response.headers["content-type"] == media
    assert yaml.safe_load(response.text) == document()  # JSON is YAML
    assert response.text.startswith("{") == media.endswith("json")


async def test_the_page_and_its_files_come_from_this_server(yard: Yard) -> None:
    page = await yard.api(None).get("/api/docs/")

    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    files = re.findall(r'(?:src|href)="(/api/docs/[^"]+)"', page.text)
    assert len(files) == 3
    assert "http" not in page.text.replace("http-equiv", "")
    for name in files:
        response = await yard.api(None).get(name)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/")
        assert len(response.content) > 100


async def test_no_other_file_is_served(yard: Yard) -> None:
    for name in ("LICENSE", "..%2fapi.py", "nothing.js"):
        error(await yard.api(None).get(f"/api/docs/{name}"), 404, "not_found")
