"""What every object store does, over HTTP and for the server itself. Runs against each of them."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.objects.conftest import Site
from tests.support.yard import eventually

KIB = 1024


def new_key(name: str = "notes.txt") -> str:
    return f"tasks/artifacts/team_1/{uuid.uuid4()}/{name}"


async def refused(site: Site, response: httpx.Response, key: str, *statuses: int) -> None:
    """The upload was refused with an XML error, and nothing is there."""
    assert response.status_code in (statuses or (403,)), response.text
    assert "<Code>" in response.text
    assert await site.store.head(key) is None


# --- forms -------------------------------------------------------------------------------------------


async def test_form_stores_the_file(site: Site) -> None:
    key, data = new_key(), bytes(range(256)) * 300
    form = site.store.upload_form(site.origin, key, 100 * KIB)
    response = await site.send(form, data)
    assert (response.status_code, response.content) == (204, b"")
    assert form.fields["key"] == key
    assert await site.read(key) == data
    stored = await site.store.head(key)
    assert stored is not None
    assert stored.size == len(data)


async def test_form_takes_an_empty_file_and_the_largest(site: Site) -> None:
    for size in (0, 5000):
        key = new_key()
        response = await site.send(site.store.upload_form(site.origin, key, 5000), b"x" * size)
        assert response.status_code == 204
        assert await site.read(key) == b"x" * size


async def test_form_refuses_more_than_its_size(site: Site) -> None:
    key = new_key()
    response = await site.send(site.store.upload_form(site.origin, key, 5000), b"x" * 5001)
    await refused(site, response, key, 400)
    assert "EntityTooLarge" in response.text


async def test_refused_file_leaves_the_old_one(site: Site) -> None:
    key = new_key()
    form = site.store.upload_form(site.origin, key, 5000)
    assert (await site.send(form, b"old")).status_code == 204
    assert (await site.send(form, b"x" * 6000)).status_code == 400
    assert await site.read(key) == b"old"
    assert (await site.send(form, b"new")).status_code == 204
    assert await site.read(key) == b"new"


async def test_form_refuses_a_wrong_signature(site: Site) -> None:
    key = new_key()
    form = site.store.upload_form(site.origin, key, 5000)
    wrong = form.fields["x-amz-signature"][:-1] + ("0" if form.fields["x-amz-signature"][-1] != "0" else "1")
    await refused(site, await site.send(form, b"x", fields={**form.fields, "x-amz-signature": wrong}), key)


async def test_form_refuses_a_changed_policy(site: Site) -> None:
    key = new_key()
    form = site.store.upload_form(site.origin, key, 10)
    policy = json.loads(base64.b64decode(form.fields["policy"]))
    policy["conditions"] = [
        ["content-length-range", 0, 10_000] if isinstance(one, list) else one for one in policy["conditions"]
    ]
    changed = base64.b64encode(json.dumps(policy).encode()).decode()
    response = await site.send(form, b"x" * 100, fields={**form.fields, "policy": changed})
    await refused(site, response, key)


async def test_form_expires(site: Site) -> None:
    key = new_key()
    form = site.store.upload_form(site.origin, key, 5000, valid_s=-5)
    await refused(site, await site.send(form, b"x"), key)


async def test_form_is_for_one_key(site: Site) -> None:
    key, other = new_key(), new_key()
    form = site.store.upload_form(site.origin, key, 5000)
    response = await site.send(form, b"x", fields={**form.fields, "key": other})
    await refused(site, response, other)
    assert await site.store.head(key) is None


async def test_form_with_a_type_takes_no_other(site: Site) -> None:
    key = new_key()
    form = site.store.upload_form(site.origin, key, 5000, content_type="text/markdown")
    assert form.fields["Content-Type"] == "text/markdown"
    other = {**form.fields, "Content-Type": "text/html"}
    await refused(site, await site.send(form, b"x", fields=other), key)
    assert (await site.send(form, b"x")).status_code == 204
    stored = await site.store.head(key)
    assert stored is not None
    assert stored.content_type == "text/markdown"


async def test_form_without_a_policy(site: Site) -> None:
    key = new_key()
    form = site.store.upload_form(site.origin, key, 5000)
    # The S3 server of these tests calls it a bad request.
    await refused(site, await site.send(form, b"x", fields={"key": key}), key, 400, 403)


async def test_file_before_the_fields(site: Site) -> None:
    key = new_key()
    form = site.store.upload_form(site.origin, key, 5000)
    parts: list[Any] = [
        ("file", ("a", b"x")),
        *((name, (None, value)) for name, value in form.fields.items()),
    ]
    response = await site.client.post(form.url, files=parts)
    if site.kind == "local":  # the other one reads the whole form first
        await refused(site, response, key)


@pytest.mark.parametrize(
    "name", ["ü ñ 名.txt", "a+b&c=d?e#f%20.txt", "q\"uo;te's.txt", "  .. .txt", "n" * 250]
)
async def test_names(site: Site, name: str) -> None:
    key = new_key(name)
    assert (
        await site.send(site.store.upload_form(site.origin, key, 5000), b"x", name=name)
    ).status_code == 204
    assert await site.read(key) == b"x"
    url = site.store.download_url(site.origin, key)
    assert (await site.client.get(url)).content == b"x"


async def test_uploads_at_once_are_whole(site: Site) -> None:
    key = new_key()
    form = site.store.upload_form(site.origin, key, 500 * KIB)
    files = [bytes([number]) * (200 * KIB) for number in range(8)]
    responses = await asyncio.gather(*(site.send(form, data) for data in files))
    assert {response.status_code for response in responses} == {204}
    assert await site.read(key) in files


# --- URLs --------------------------------------------------------------------------------------------


async def stored(site: Site, data: bytes = b"0123456789", content_type: str = "text/plain") -> str:
    key = new_key()
    await site.store.put(key, data, content_type)
    return key


async def test_url_gives_the_object(site: Site) -> None:
    key = await stored(site, bytes(range(256)) * 5000, "image/png")
    response = await site.client.get(site.store.download_url(site.origin, key))
    assert response.status_code == 200
    assert response.content == bytes(range(256)) * 5000
    assert response.headers["content-type"] == "image/png"
    assert response.headers["content-length"] == str(256 * 5000)


@pytest.mark.parametrize(
    ("asked", "content", "part"),
    [
        ("bytes=0-3", b"0123", "bytes 0-3/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=-2", b"89", "bytes 8-9/10"),
        ("bytes=8-100", b"89", "bytes 8-9/10"),
    ],
)
async def test_url_with_a_range(site: Site, asked: str, content: bytes, part: str) -> None:
    url = site.store.download_url(site.origin, await stored(site))
    response = await site.client.get(url, headers={"Range": asked})
    assert (response.status_code, response.content) == (206, content)
    assert response.headers["content-range"] == part
    assert response.headers["content-length"] == str(len(content))


async def test_url_with_a_range_outside(site: Site) -> None:
    url = site.store.download_url(site.origin, await stored(site))
    response = await site.client.get(url, headers={"Range": "bytes=10-"})
    assert response.status_code == 416


async def test_url_sets_headers(site: Site) -> None:
    disposition = "attachment; filename=\"a b.md\"; filename*=UTF-8''a%20b.md"
    url = site.store.download_url(
        site.origin, await stored(site), disposition=disposition, content_type="text/markdown"
    )
    response = await site.client.get(url)
    assert response.headers["content-disposition"] == disposition
    assert response.headers["content-type"] == "text/markdown"


async def test_url_refuses_changes(site: Site) -> None:
    key, other = await stored(site), await stored(site)
    url = site.store.download_url(site.origin, key, disposition="attachment")
    signature = "ignature="
    at = url.index(signature) + len(signature)
    flipped = url[:at] + ("0" if url[at] != "0" else "1") + url[at + 1 :]
    for changed in (
        flipped,
        url.replace("attachment", "inline"),
        url.replace(key, other),
        url + "&response-content-type=text/html",
        url.partition("?")[0],
    ):
        response = await site.client.get(changed)
        assert response.status_code == 403, changed
        assert b"0123456789" not in response.content
    assert (await site.client.get(url)).status_code == 200


async def test_url_expires(site: Site) -> None:
    url = site.store.download_url(site.origin, await stored(site), valid_s=1)
    response = await eventually(
        lambda: site.client.get(url), lambda found: found.status_code != 200, lambda _: "expiry"
    )
    assert response.status_code == 403
    assert "<Code>AccessDenied</Code>" in response.text


async def test_url_of_nothing(site: Site) -> None:
    response = await site.client.get(site.store.download_url(site.origin, new_key()))
    assert response.status_code == 404
    assert "<Code>NoSuchKey</Code>" in response.text


# --- the server itself -------------------------------------------------------------------------------


async def test_put_head_open(site: Site, tmp_path: Path) -> None:
    key = await stored(site, b"abc" * 200_000, "text/x-thing")
    found = await site.store.head(key)
    assert found is not None
    assert (found.size, found.content_type) == (600_000, "text/x-thing")
    content = await site.store.open(key)
    assert content is not None
    assert content.size == 600_000
    assert len(await anext(content.chunks)) < 600_000
    await content.chunks.aclose()
    file = tmp_path / "file"
    file.write_bytes(b"xyz" * 200_000)
    await site.store.put_file(key, file, "text/y")
    again = await site.store.open(key)
    assert again is not None
    assert b"".join([chunk async for chunk in again.chunks]) == b"xyz" * 200_000
    await site.store.put(key, b"", "text/plain")
    assert await site.read(key) == b""


async def test_missing(site: Site) -> None:
    key = new_key()
    assert await site.store.head(key) is None
    assert await site.store.open(key) is None


async def test_delete(site: Site) -> None:
    gone, kept = await stored(site), await stored(site)
    await site.store.delete([gone, new_key()])
    await site.store.delete([])
    assert await site.store.head(gone) is None
    assert await site.store.head(kept) is not None
    await site.store.delete([gone])


async def test_an_object_is_read_from_a_byte_on(site: Site) -> None:
    key, data = new_key(), bytes(range(256)) * 4096
    await site.store.put(key, data, "text/plain")
    for start in (0, 1, 300_000, len(data) - 1):
        content = await site.store.open(key, start=start)
        assert content is not None
        assert content.size == len(data) - start
        assert b"".join([chunk async for chunk in content.chunks]) == data[start:]
    assert await site.store.open(new_key(), start=1) is None
