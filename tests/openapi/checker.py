"""Holds real answers against the description."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
from jsonschema import Draft202012Validator

from taskyard.openapi.document import document

Json = dict[str, Any]


class Checker:
    """An httpx event hook: every answer has to be as described, with every key and no other."""

    def __init__(self) -> None:
        self.document = document(closed=True)
        self.seen: set[str] = set()
        """Ids of the operations that have succeeded."""
        self._operations: list[tuple[str, re.Pattern[str], Json]] = [
            (method.upper(), _pattern(path), operation)
            for path, operations in sorted(self.document["paths"].items(), key=_literal_first)
            for method, operation in operations.items()
        ]

    async def __call__(self, response: httpx.Response) -> None:
        request = response.request
        operation = self._find(request.method, request.url.path)
        await response.aread()
        self.check(operation, response)
        if response.is_success:
            self.seen.add(operation["operationId"])

    def check(self, operation: Json, response: httpx.Response) -> None:
        name = f"{operation['operationId']} {response.status_code}"
        described = operation["responses"].get(str(response.status_code))
        assert described is not None, f"{name} is not described: {response.text[:500]}"
        if "$ref" in described:
            described = self.document["components"]["responses"][described["$ref"].rpartition("/")[2]]
        missing = described.get("headers", {}).keys() - {header.title() for header in response.headers}
        assert not missing, f"{name} lacks the headers {missing}"
        content = described.get("content", {})
        media = response.headers.get("content-type", "").partition(";")[0]
        if not content:
            assert response.content == b"", name
            return
        assert {media, "*/*"} & content.keys(), f"{name} is {media!r}, not {list(content)}"
        if media == "application/json":
            schema = {"components": self.document["components"], **content[media]["schema"]}
            validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
            problems = [
                f"{error.json_path}: {error.message}" for error in validator.iter_errors(response.json())
            ]
            assert not problems, f"{name}: {problems} in {json.dumps(response.json())[:2000]}"

    def _find(self, method: str, path: str) -> Json:
        for known, pattern, operation in self._operations:
            if known == method and pattern.fullmatch(path):
                return operation
        raise AssertionError(f"{method} {path} is not described")


def _pattern(path: str) -> re.Pattern[str]:
    """What a path of the document matches, with and without a slash at its end."""
    places = path.rstrip("/").replace("{key}", ".+")
    return re.compile(re.sub(r"{\w+}", "[^/]+", places) + "/?")


def _literal_first(item: tuple[str, Json]) -> str:
    return item[0].replace("{", "~")
