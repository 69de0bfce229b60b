"""Signing in and out: as JSON for scripts, and as the pages of a browser."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Request, Response, get, post

from taskyard.accounts import pages, passwords, sign_in
from taskyard.accounts.caller import SESSION_COOKIE, Identity
from taskyard.accounts.caller import signed_in as need_session
from taskyard.accounts.schemas import SignIn
from taskyard.errors import InvalidInputError, TaskyardError, ThrottledError
from taskyard.http import answer, body

Req = pages.Req


def address_of(request: Req) -> str:
    return "" if request.client is None else request.client.host


@post("/api/login", status_code=200)
async def login(request: Req) -> Response[bytes]:
    """Start a session: 200 `{"success": true}` with its cookies."""
    pages.check_origin(request)
    sent = await body(request, SignIn)
    session = await sign_in.sign_in(
        request.app.state.database, sent.email, sent.password, address_of(request)
    )
    response = answer({"success": True})
    pages.set_cookies(request, response, session)
    return response


@post("/api/logout", status_code=200, guards=[need_session])
async def logout(request: Request[Identity, Any, Any]) -> Response[bytes]:
    """End the session of the request."""
    async with request.app.state.database.transaction() as connection:
        await sign_in.sign_out(connection, request.cookies[SESSION_COOKIE])
    response = answer({"success": True})
    pages.clear_cookies(response)
    return response


class SignInPages(Controller):
    exception_handlers = {TaskyardError: pages.problem}  # noqa: RUF012 - the framework's way

    @get("/login")
    async def login_page(self, request: Req) -> Response[Any]:
        wanted = pages.local_path(request.query_params.get("next"))
        if await pages.signed_in(request) is not None:
            return pages.go_to(wanted)
        return pages.render("sign_in.html", next=wanted, email="")

    @post("/login", status_code=200)
    async def login(self, request: Req) -> Response[Any]:
        fields = await pages.form(request)
        wanted, email = pages.local_path(fields.get("next")), fields.get("email", "")
        try:
            session = await sign_in.sign_in(
                request.app.state.database, email, fields.get("password", ""), address_of(request)
            )
        except (InvalidInputError, ThrottledError) as error:
            page = pages.render("sign_in.html", error.status, next=wanted, email=email, problem=error.detail)
            page.headers.update(error.answer_headers())
            return page
        response = pages.go_to(wanted)
        pages.set_cookies(request, response, session)
        return response

    @post("/logout", status_code=200)
    async def logout(self, request: Req) -> Response[Any]:
        fields = await pages.form(request)
        person = await pages.signed_in(request)
        if person is not None:
            pages.check_csrf(person, fields)
            async with request.app.state.database.transaction() as connection:
                await sign_in.sign_out(connection, person.session)
        response = pages.go_to("/login")
        pages.clear_cookies(response)
        return response

    @get("/set-password")
    async def password_page(self, request: Req) -> Response[Any]:
        """The page of a one-time link; looking at it does not use it up."""
        token = request.query_params.get("token", "")
        async with request.app.state.database.transaction() as connection:
            user = await sign_in.user_of_link(connection, token)
        return _password_page(token, user["email"])

    @post("/set-password", status_code=200)
    async def set_password(self, request: Req) -> Response[Any]:
        fields = await pages.form(request)
        token = fields.get("token", "")
        try:
            session = await sign_in.set_password_by_link(
                request.app.state.database, token, fields.get("password", "")
            )
        except InvalidInputError as error:
            return _password_page(token, fields.get("email", ""), error)
        response = pages.go_to("/account")
        pages.set_cookies(request, response, session)
        return response


def _password_page(token: str, email: str, error: InvalidInputError | None = None) -> Response[str]:
    return pages.render(
        "set_password.html",
        200 if error is None else error.status,
        token=token,
        email=email,
        least=passwords.MIN_LENGTH,
        problem=None if error is None else error.detail,
    )
