"""Sign-in with a password: sessions, CSRF, one-time links, limits."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from urllib.parse import quote

import pytest
from argon2 import PasswordHasher

from taskyard.accounts import admin, passwords, sign_in, store
from taskyard.accounts import sign_in_store as sessions
from taskyard.accounts.pages import local_path
from taskyard.accounts.tokens import token_hash
from taskyard.db.engine import Database
from taskyard.errors import InvalidInputError, NotFoundError, ThrottledError
from tests.support.browser import PASSWORD, field, form_target, open_browser
from tests.support.yard import Yard, error, ok

ADA = "ada@example.org"


async def test_login_opens_a_session(yard: Yard) -> None:
    await admin.set_password(yard.database, ADA, PASSWORD)
    async with open_browser(yard) as browser:
        response = await browser.sign_in(" ADA@example.org ")
        assert ok(response) == {"success": True}
        cookies = {text.partition("=")[0]: text for text in response.headers.get_list("set-cookie")}
        assert set(cookies) == {"taskyard_session", "taskyard_csrf"}
        assert "httponly" in cookies["taskyard_session"].lower()
        assert "httponly" not in cookies["taskyard_csrf"].lower()
        for text in cookies.values():
            assert "samesite=lax" in text.lower()
            assert "secure" not in text.lower()  # this server speaks plain HTTP
        assert ok(await browser.get("/api/users/@me/"))["email"] == ADA
        assert ok(await browser.get("/api/projects/@current/tasks/"))["count"] == 0


async def test_cookies_are_secure_over_https(yard: Yard) -> None:
    await admin.set_password(yard.database, ADA, PASSWORD)
    body = {"email": ADA, "password": PASSWORD}
    response = await yard.client.post("/api/login", json=body, headers={"X-Forwarded-Proto": "https"})
    for text in response.headers.get_list("set-cookie"):
        assert "secure" in text.lower()


@pytest.mark.parametrize(
    ("email", "password"),
    [(ADA, "not the password"), ("nobody@example.org", PASSWORD), ("bob@example.org", PASSWORD)],
)
async def test_refusals_do_not_tell_why(yard: Yard, email: str, password: str) -> None:
    """Wrong password, no such user, a user without a password: one answer."""
    await admin.set_password(yard.database, ADA, PASSWORD)
    response = await yard.client.post("/api/login", json={"email": email, "password": password})
    assert error(response, 400, "invalid_credentials")["detail"] == "Invalid email or password."
    assert "set-cookie" not in response.headers


async def test_an_unknown_user_costs_a_whole_hash(monkeypatch: pytest.MonkeyPatch, yard: Yard) -> None:
    seen = []
    real = PasswordHasher.verify

    def verify(self: PasswordHasher, stored: str, password: str) -> bool:
        seen.append(stored.split("$")[:4])
        return bool(real(self, stored, password))

    await admin.set_password(yard.database, ADA, PASSWORD)
    monkeypatch.setattr(PasswordHasher, "verify", verify)
    for email in (ADA, "nobody@example.org"):
        await yard.client.post("/api/login", json={"email": email, "password": "wrong"})
    assert len(seen) == 2
    assert seen[0] == seen[1]  # the same algorithm and parameters


async def test_writes_need_the_csrf_token(yard: Yard) -> None:
    async with open_browser(yard, "ada") as browser:
        path = "/api/projects/@current/tasks/"
        refused = error(
            await browser.call("POST", path, csrf=False, json={"title": "x"}), 403, "permission_denied"
        )
        assert refused["detail"] == "CSRF Failed: CSRF token missing or incorrect."
        wrong = await browser.client.post(path, json={}, headers={"X-CSRFToken": "0" * 64})
        error(wrong, 403, "permission_denied")
        assert ok(await browser.call("POST", path, json={"title": "x"}), 201)["title"] == "x"


async def test_a_key_in_the_header_wins_over_the_cookie(yard: Yard) -> None:
    async with open_browser(yard, "ada") as browser:
        response = await browser.get(
            "/api/users/@me/", headers={"Authorization": f"Bearer {yard.keys['eve']}"}
        )
        assert ok(response)["email"] == "eve@example.org"
        bad = await browser.get("/api/users/@me/", headers={"Authorization": "Bearer phx_no"})
        error(bad, 401, "authentication_failed")


async def test_logout_ends_the_session(yard: Yard) -> None:
    async with open_browser(yard, "ada") as browser:
        kept = dict(browser.client.cookies)
        error(await browser.call("POST", "/api/logout", csrf=False), 403, "permission_denied")
        assert ok(await browser.call("POST", "/api/logout")) == {"success": True}
        assert not dict(browser.client.cookies)
        browser.client.cookies.update(kept)
        gone = error(await browser.get("/api/users/@me/"), 401, "authentication_failed")
        assert gone["detail"] == "Your session has ended. Sign in again."


async def test_expired_session(yard: Yard) -> None:
    async with open_browser(yard, "ada") as browser:
        await yard.database.execute("UPDATE sessions SET expires_at = now() - interval '1 s'")
        error(await browser.get("/api/users/@me/"), 401, "authentication_failed")


async def test_an_idle_session_ends(yard: Yard) -> None:
    """Pages and the API both count as use, noted once a minute; ended sessions of anybody go in time."""
    async with open_browser(yard, "ada") as browser:
        for path in ("/api/users/@me/", "/account"):
            await yard.database.execute(
                "UPDATE sessions SET last_used_at = now() - interval '6 days 23 hours'"
            )
            assert (await browser.get(path)).status_code == 200
            row = await yard.database.fetch_one("SELECT now() - last_used_at AS idle FROM sessions")
            assert row is not None
            assert row["idle"] < timedelta(minutes=1)
        await yard.database.execute("UPDATE sessions SET last_used_at = now() - interval '7 days 1 second'")
        error(await browser.get("/api/users/@me/"), 401, "authentication_failed")
        assert (await browser.get("/account")).status_code == 303
        await yard.database.execute("UPDATE sessions SET expires_at = now() - interval '1 s'")
        async with open_browser(yard, "bob"):
            assert len(await yard.database.fetch("SELECT 1 FROM sessions")) == 1


async def test_a_new_password_ends_sessions_and_links(yard: Yard) -> None:
    async with open_browser(yard, "ada") as browser:
        link = (await admin.password_link(yard.database, ADA))["path"]
        await admin.set_password(yard.database, ADA, "another password")
        error(await browser.get("/api/users/@me/"), 401, "authentication_failed")
        assert (await browser.get(link)).status_code == 404
        assert (await browser.sign_in(ADA)).status_code == 400
        assert (await browser.sign_in(ADA, "another password")).status_code == 200


async def test_a_password_that_is_replaced_while_it_is_checked(
    monkeypatch: pytest.MonkeyPatch, yard: Yard
) -> None:
    """Whoever knows the old one only is not signed in after the new one is set."""
    await admin.set_password(yard.database, ADA, PASSWORD)
    real = passwords.verify

    async def verify(stored: str | None, password: str) -> bool:
        right = await real(stored, password)
        await admin.set_password(yard.database, ADA, "another password")
        return right

    monkeypatch.setattr(passwords, "verify", verify)
    # With other parameters it would be hashed anew, over the new one.
    monkeypatch.setattr(passwords, "outdated", lambda _: True)
    async with open_browser(yard) as browser:
        error(await browser.sign_in(ADA), 400, "invalid_credentials")
        assert await yard.database.fetch("SELECT 1 FROM sessions") == []
        monkeypatch.undo()
        assert (await browser.sign_in(ADA, "another password")).status_code == 200


async def test_a_form_with_what_cannot_be_stored(yard: Yard) -> None:
    page = await yard.client.post("/login", data={"email": "a\0@b.c", "password": PASSWORD})
    assert page.status_code == 400
    assert "Null characters are not allowed." in page.text


async def test_no_secret_is_stored(yard: Yard) -> None:
    async with open_browser(yard, "ada") as browser:
        session = browser.client.cookies["taskyard_session"]
        link = (await admin.password_link(yard.database, ADA))["path"]
        for table in ("users", "sessions", "password_links"):
            rows = await yard.database.fetch("SELECT to_jsonb(t)::text AS text FROM " + table + " t")
            for row in rows:
                for secret in (session, link.partition("=")[2], PASSWORD):
                    assert secret not in row["text"]


async def test_login_from_another_site_is_refused(yard: Yard) -> None:
    """Otherwise a page could sign its visitor in as somebody else."""
    await admin.set_password(yard.database, ADA, PASSWORD)
    body = {"email": ADA, "password": PASSWORD}
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Origin": "http://[", "Host": "["},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        error(await yard.client.post("/api/login", json=body, headers=headers), 403, "permission_denied")
        assert (await yard.client.post("/login", data=body, headers=headers)).status_code == 403


# --- limits ----------------------------------------------------------------------------------------


async def test_attempts_from_one_address_at_one_account(yard: Yard) -> None:
    await admin.set_password(yard.database, ADA, PASSWORD)
    wrong = {"email": ADA, "password": "wrong"}
    for _ in range(10):
        error(await yard.client.post("/api/login", json=wrong), 400, "invalid_credentials")
    refused = await yard.client.post("/api/login", json={"email": ADA, "password": PASSWORD})
    body = error(refused, 429, "throttled")
    assert body["type"] == "throttled_error"
    wait = int(refused.headers["retry-after"])
    assert 800 < wait <= 900
    assert body["detail"] == f"Request was throttled. Expected available in {wait} seconds."
    page = await yard.client.post("/login", data=wrong)
    assert (page.status_code, page.headers["retry-after"].isdigit()) == (429, True)
    assert "throttled" in page.text
    # Somebody else signs in from there all the same.
    await admin.set_password(yard.database, "bob@example.org", PASSWORD)
    other = {"email": "bob@example.org", "password": PASSWORD}
    assert (await yard.client.post("/api/login", json=other)).status_code == 200


async def test_concurrent_guesses_are_all_counted(database: Database) -> None:
    async def guess() -> type[Exception]:
        with pytest.raises((InvalidInputError, ThrottledError)) as caught:
            await sign_in.sign_in(database, "x@example.org", "guess", "192.0.2.1")
        return caught.type

    outcomes = await asyncio.gather(*(guess() for _ in range(14)))
    assert outcomes.count(InvalidInputError) == 10
    assert outcomes.count(ThrottledError) == 4


async def test_success_forgets_the_failures_and_time_does(yard: Yard) -> None:
    database = yard.database
    await admin.set_password(database, ADA, PASSWORD)
    for _ in range(3):
        for _ in range(9):
            with pytest.raises(InvalidInputError):
                await sign_in.sign_in(database, ADA, "wrong", "192.0.2.1")
        await sign_in.sign_in(database, ADA, PASSWORD, "192.0.2.1")
    for _ in range(10):
        with pytest.raises(InvalidInputError):
            await sign_in.sign_in(database, ADA, "wrong", "192.0.2.1")
    with pytest.raises(ThrottledError):
        await sign_in.sign_in(database, ADA, PASSWORD, "192.0.2.1")
    await database.execute("UPDATE sign_in_attempts SET expires_at = now()")
    assert await sign_in.sign_in(database, ADA, PASSWORD, "192.0.2.1")


async def test_a_window_counts_and_ends(database: Database) -> None:
    assert (await sessions.count_attempt(database, b"s", timedelta(minutes=5)))[0] == 1
    count, seconds = await sessions.count_attempt(database, b"s", timedelta(minutes=5))
    assert count == 2
    assert 290 < seconds <= 300


@pytest.mark.parametrize(
    ("address", "counted_as"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:aaaa::1", "2001:db8:1:2::"),
        ("unix", "unix"),
    ],
)
def test_what_counts_as_one_address(address: str, counted_as: str) -> None:
    assert sign_in.network(address) == counted_as


# --- passwords and links ------------------------------------------------------------------------------


async def test_passwords_are_checked_and_normalised() -> None:
    for wrong, code in (("short", "password_too_short"), ("x" * 1001, "max_length")):
        with pytest.raises(InvalidInputError) as caught:
            passwords.check(wrong)
        assert (caught.value.code, caught.value.attr) == (code, "password")
    stored = await passwords.hash_password("caf\u00e9 caf\u00e9 caf\u00e9")
    assert stored.startswith("$argon2id$")
    assert await passwords.verify(stored, "cafe\u0301 cafe\u0301 cafe\u0301")
    assert not await passwords.verify(stored, "cafe cafe cafe")
    assert not await passwords.verify(None, "nobody has this password")


async def test_old_hashes_are_replaced_at_sign_in(yard: Yard) -> None:
    old = PasswordHasher(time_cost=1, memory_cost=8 * 1024).hash(PASSWORD)
    await yard.database.execute(
        "UPDATE users SET password_hash = %(old)s WHERE email = %(email)s", old=old, email=ADA
    )
    await sign_in.sign_in(yard.database, ADA, PASSWORD, "192.0.2.1")
    async with yard.database.connection() as connection:
        user = await store.user_by_email(connection, ADA)
    assert user is not None
    assert user["password_hash"] != old
    assert await passwords.verify(user["password_hash"], PASSWORD)


async def test_an_old_hash_at_two_sign_ins_at_once(monkeypatch: pytest.MonkeyPatch, yard: Yard) -> None:
    """The one that comes second finds the new hash of the same password."""
    old = PasswordHasher(time_cost=1, memory_cost=8 * 1024).hash(PASSWORD)
    await yard.database.execute(
        "UPDATE users SET password_hash = %(old)s WHERE email = %(email)s", old=old, email=ADA
    )
    real, both = passwords.hash_password, asyncio.Barrier(2)

    async def hash_password(password: str) -> str:
        await both.wait()
        return await real(password)

    monkeypatch.setattr(passwords, "hash_password", hash_password)
    async with asyncio.timeout(20):
        found = await asyncio.gather(
            *(sign_in.sign_in(yard.database, ADA, PASSWORD, "192.0.2.1") for _ in range(2))
        )
    assert len(set(found)) == 2


async def test_one_time_link(yard: Yard) -> None:
    link = (await admin.password_link(yard.database, ADA))["path"]
    async with open_browser(yard) as browser:
        page = (await browser.get(link)).text
        assert (field(page, "email"), form_target(page)) == (ADA, "/set-password")
        token = field(page, "token")
        again = await browser.submit("/set-password", token=token, email=ADA, password="short")
        assert again.status_code == 400
        assert "too short" in again.text
        done = await browser.submit("/set-password", token=token, password=PASSWORD)
        assert (done.status_code, done.headers["location"]) == (303, "/account")
        assert ADA in (await browser.get("/account")).text
        used = await browser.submit("/set-password", token=token, password="stolen link!!")
        assert used.status_code == 404
        assert "used already" in used.text
        assert (await browser.sign_in(ADA)).status_code == 200


async def test_a_link_works_once_even_at_the_same_time(yard: Yard) -> None:
    token = (await admin.password_link(yard.database, ADA))["path"].partition("=")[2]
    words = [f"password number {n}" for n in range(4)]
    done = await asyncio.gather(
        *(sign_in.set_password_by_link(yard.database, token, word) for word in words), return_exceptions=True
    )
    assert sum(isinstance(outcome, str) for outcome in done) == 1
    assert sum(isinstance(outcome, NotFoundError) for outcome in done) == 3


async def test_an_old_link_is_dead(yard: Yard) -> None:
    link = (await admin.password_link(yard.database, ADA))["path"]
    await yard.database.execute("UPDATE password_links SET expires_at = now() - interval '1 s'")
    assert (await yard.client.get(link)).status_code == 404
    assert (await yard.client.get("/set-password")).status_code == 404


async def test_first_user_gets_a_link_and_no_password(database: Database) -> None:
    first = await admin.bootstrap(database)
    assert first is not None
    row = await database.fetch_one("SELECT password_hash FROM users")
    assert row == {"password_hash": None}
    token = first.link.removeprefix("/set-password?token=")
    assert await sign_in.set_password_by_link(database, token, PASSWORD)
    assert await sign_in.sign_in(database, "admin@localhost", PASSWORD, "192.0.2.1")


# --- pages -----------------------------------------------------------------------------------------


async def test_pages_of_sign_in_and_out(yard: Yard) -> None:
    await admin.set_password(yard.database, ADA, PASSWORD)
    async with open_browser(yard) as browser:
        away = await browser.get("/account")
        assert (away.status_code, away.headers["location"]) == (303, "/login?next=%2Faccount")
        page = await browser.get(away.headers["location"])
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        assert page.headers["cache-control"] == "no-store"
        assert field(page.text, "next") == "/account"
        wrong = await browser.submit("/login", email=ADA, password="wrong", next="/account")
        assert wrong.status_code == 400
        assert "Invalid email or password." in wrong.text
        assert field(wrong.text, "email") == ADA
        done = await browser.submit("/login", email=ADA, password=PASSWORD, next="/account")
        assert (done.status_code, done.headers["location"]) == (303, "/account")
        account = await browser.get("/account")
        refused = await browser.submit("/logout", csrf_token="x")
        assert refused.status_code == 403
        out = await browser.submit("/logout", csrf_token=field(account.text, "csrf_token"))
        assert (out.status_code, out.headers["location"]) == (303, "/login")
        assert (await browser.get("/account")).status_code == 303


@pytest.mark.parametrize(
    "elsewhere", ["https://evil.example/", "//evil.example", "/\\evil.example", "evil", "", None, "/a\nb"]
)
async def test_next_leads_nowhere_else(elsewhere: str | None) -> None:
    assert local_path(elsewhere) == "/account"


async def test_pages_escape_what_they_show(yard: Yard) -> None:
    async with open_browser(yard) as browser:
        attack = '/"><script>alert(1)</script>'
        page = await browser.get("/login?next=" + quote(attack))
        assert "<script>" not in page.text
        assert field(page.text, "next") == attack


async def test_the_session_of_a_browser_is_its_own(yard: Yard) -> None:
    async with open_browser(yard, "ada") as one, open_browser(yard, "bob") as two:
        rows = await yard.database.fetch("SELECT hash FROM sessions")
        hashes = {bytes(row["hash"]) for row in rows}
        assert {token_hash(b.client.cookies["taskyard_session"]) for b in (one, two)} == hashes
        response = await two.client.get(
            "/api/users/@me/", headers={"X-CSRFToken": one.client.cookies["taskyard_csrf"]}
        )
        assert ok(response)["email"] == "bob@example.org"
        crossed = await two.client.post(
            "/api/logout", headers={"X-CSRFToken": one.client.cookies["taskyard_csrf"]}
        )
        error(crossed, 403, "permission_denied")
