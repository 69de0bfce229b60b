"""`/api/schema/`: the document; `/api/docs/`: a page that shows it, with all its files on this server."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from litestar import Request, Response, get
from litestar.params import FromPath

from taskyard.errors import NotFoundError
from taskyard.openapi.document import document

YAML = "application/vnd.oai.openapi"
JSON = "application/vnd.oai.openapi+json"
FILES = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "start.js": "text/javascript",
}
PAGE_HEADERS = {
    # The viewer makes styles and small images of its own.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
FILE_HEADERS = {"Cache-Control": "public, max-age=3600", "X-Content-Type-Options": "nosniff"}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Taskyard API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/api/docs/swagger-ui.css">
</head>
<body>
<noscript>This page needs JavaScript. The description itself is at <a href="/api/schema/">/api/schema/</a>.</noscript>
<div id="viewer"></div>
<script src="/api/docs/swagger-ui-bundle.js"></script>
<script src="/api/docs/start.js"></script>
</body>
</html>
"""


@cache
def encoded(media: str) -> bytes:
    """The document as text, made once for each process."""
    if media == JSON:
        return json.dumps(document(), ensure_ascii=False, separators=(",", ":")).encode()
    made = yaml.dump(document(), Dumper=Plain, sort_keys=False, allow_unicode=True, width=110)
    return str(made).encode()


class Plain(yaml.CSafeDumper):
    """Without anchors: parts that are used twice are written twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


@get("/api/schema", sync_to_thread=True)
def schema(request: Request[Any, Any, Any]) -> Response[bytes]:
    """YAML, or JSON for `?format=json` or an `Accept` that asks for it."""
    wanted, accepted = request.query_params.get("format", ""), request.headers.get("accept", "")
    media = JSON if wanted == "json" or (not wanted and "json" in accepted.lower()) else YAML
    headers = {"Cache-Control": "public, max-age=300", "Vary": "Accept"}
    return Response(encoded(media), media_type=media, headers=headers)


@get("/api/docs", sync_to_thread=False)
def docs() -> Response[str]:
    return Response(PAGE, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)


@get("/api/docs/{name:str}", sync_to_thread=True)
def viewer(name: FromPath[str]) -> Response[bytes]:
    if name not in FILES:
        raise NotFoundError
    content = files("taskyard.openapi").joinpath("viewer", name).read_bytes()
    return Response(content, media_type=FILES[name], headers=FILE_HEADERS)


ROUTES = (schema, docs, viewer)
