"""What the few pages of sign-in share: templates, forms, cookies, and the checks of requests from browsers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from jinja2 import Environment, PackageLoader
from litestar import Request, Response

from taskyard.accounts import credentials_store
from taskyard.accounts.caller import CSRF_COOKIE, SESSION_COOKIE
from taskyard.accounts.sign_in import SESSION_LIFE
from taskyard.accounts.tokens import csrf_matches, csrf_token, token_hash
from taskyard.db.engine import Row
from taskyard.errors import PermissionDeniedError, TaskyardError
from taskyard.http import origin_of
from taskyard.schemas import check_storable

Req = Request[Any, Any, Any]

_templates = Environment(loader=PackageLoader("taskyard.accounts"), autoescape=True)

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
    # Not `no-referrer`: with that, browsers send the origin `null` along with our own forms.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class SignedIn:
    """The person at the browser: the value of the session's cookie, and their row."""

    session: str
    row: Row

    @property
    def csrf(self) -> str:
        return csrf_token(self.session)


async def signed_in(request: Req) -> SignedIn | None:
    """Who is signed in at this browser."""
    session = request.cookies.get(SESSION_COOKIE)
    if not session:
        return None
    database, idle_s = request.app.state.database, request.app.state.settings.sessions.idle_s
    row = await credentials_store.find_session(database, token_hash(session), None, idle_s)
    if row is None:
        return None
    if row["stale"]:
        await credentials_store.touch_session(database, row["credential_id"])
    return SignedIn(session, row)


def render(name: str, status: int = 200, **values: Any) -> Response[str]:
    """A page; whatever is put into it is escaped."""
    text = _templates.get_template(name).render(**values)
    return Response(text, status_code=status, media_type="text/html", headers=HEADERS)


def problem(_: Req, error: TaskyardError) -> Response[str]:
    """A refusal as a page."""
    page = render("problem.html", error.status, problem=error.detail)
    page.headers.update(error.answer_headers())
    return page


def go_to(location: str) -> Response[bytes]:
    """Send the browser on with a GET."""
    return Response(b"", status_code=303, headers={**HEADERS, "Location": location})


async def form(request: Req) -> dict[str, str]:
    """The fields of a form. One that another site sent is refused: PermissionDeniedError."""
    check_origin(request)
    fields = dict(parse_qsl((await request.body()).decode("utf-8", "replace"), keep_blank_values=True))
    check_storable(fields)
    return fields


def check_origin(request: Req) -> None:
    """Refuse what a page of another site makes a browser send: PermissionDeniedError.

    Browsers say where a request comes from; programs that are none say nothing and have no cookies to abuse.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    own = {request.headers.get("host"), _netloc(origin_of(request))}
    if site not in (None, "same-origin", "none") or (origin and (_netloc(origin) or "null") not in own):
        raise PermissionDeniedError("This request came from another site.")


def _netloc(origin: str) -> str:
    """The host and port of an origin, "" if it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def check_csrf(person: SignedIn, fields: dict[str, str]) -> None:
    if not csrf_matches(person.session, fields.get("csrf_token", "")):
        raise PermissionDeniedError("This page is too old. Load it again.")


def set_cookies(request: Req, response: Response[Any], session: str) -> None:
    """Sign a browser in. The second cookie is for scripts of our own pages, which send it back as X-CSRFToken."""
    secure = origin_of(request).startswith("https:")
    for name, value, hidden in ((SESSION_COOKIE, session, True), (CSRF_COOKIE, csrf_token(session), False)):
        response.set_cookie(
            name,
            value,
            max_age=int(SESSION_LIFE.total_seconds()),
            path="/",
            httponly=hidden,
            secure=secure,
            samesite="lax",
        )


def clear_cookies(response: Response[Any]) -> None:
    for name in (SESSION_COOKIE, CSRF_COOKIE):
        response.delete_cookie(name, path="/")


def local_path(text: str | None) -> str:
    """Where to go after signing in: a path of this server, whatever the request says."""
    text = text or ""
    inside = text.startswith("/") and not text.startswith("//") and text.isprintable() and "\\" not in text
    return text if inside else "/account"
