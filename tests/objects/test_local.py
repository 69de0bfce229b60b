"""What is the local store's own: files, pieces, broken uploads, damaged things."""

from __future__ import annotations

import asyncio
import errno
import os
import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from taskyard.objects.forms import FormSigner, RefusedError
from taskyard.objects.interface import Form, StorageError
from taskyard.objects.local import ABANDONED_S, LocalStore
from taskyard.objects.uploads import MAX_FIELD_BYTES, receive
from tests.objects.conftest import serving
from tests.support.yard import eventually

MIB = 1 << 20
TYPE = "multipart/form-data; boundary=xYx"


def files(local: LocalStore) -> list[Path]:
    return sorted(path for path in local._folder.rglob("*") if path.is_file())


def head(form: Form, name: str = "f") -> bytes:
    """A form up to the first byte of its file."""
    fields = "".join(
        f'--xYx\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
        for key, value in form.fields.items()
    )
    return (
        fields + f'--xYx\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    ).encode()


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def refusal(local: LocalStore, *parts: bytes, content_type: str = TYPE) -> str:
    """The code of the refusal; nothing may be left of the upload."""
    with pytest.raises(RefusedError) as caught:
        await receive(local, content_type, pieces(*parts))
    assert files(local) == []
    return caught.value.code


async def test_memory_does_not_grow_with_the_file(local: LocalStore) -> None:
    form, size = local.upload_form("", "big", 64 * MIB), 48 * MIB
    block = bytes(64 * 1024)

    async def body() -> AsyncIterator[bytes]:
        yield head(form)
        for _ in range(size // len(block)):
            yield block
        yield b"\r\n--xYx--\r\n"

    tracemalloc.start()
    try:
        await receive(local, TYPE, body())
        content = await local.open("big")
        assert content is not None
        length = 0
        async for chunk in content.chunks:
            length += len(chunk)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert length == size
    assert peak < 4 * MIB, f"{peak / MIB:.1f} MiB at the most"


async def test_too_much_stops_at_the_limit(local: LocalStore) -> None:
    form = local.upload_form("", "big", 100_000)
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        yield head(form)
        while True:
            sent += 50_000
            yield bytes(50_000)

    with pytest.raises(RefusedError, match="exceeds the maximum"):
        await receive(local, TYPE, body())
    assert sent == 150_000
    assert files(local) == []


async def test_any_cut_of_the_body_gives_the_same_file(local: LocalStore) -> None:
    form = local.upload_form("", "k", 1000)
    data = b"a\r\n--xYnot\r\n--xY\r\n\r\n --xYx\r\n-"
    whole = head(form) + data + b"\r\n--xYx--\r\n"
    for step in (1, 2, 7, 64, len(whole)):
        await receive(local, TYPE, pieces(*(whole[at : at + step] for at in range(0, len(whole), step))))
        content = await local.open("k")
        assert content is not None
        assert b"".join([chunk async for chunk in content.chunks]) == data


async def test_forms_that_are_none(local: LocalStore) -> None:
    form = local.upload_form("", "k", 1000)
    start, end = head(form), b"\r\n--xYx--\r\n"
    field = b'--xYx\r\nContent-Disposition: form-data; name="key"\r\n\r\nk\r\n'
    no_file = start[: start.rindex(b"--xYx")] + b"--xYx--\r\n"
    extra = b'--xYx\r\nContent-Disposition: form-data; name="acl"\r\n\r\npublic-read\r\n'
    long = (
        b'--xYx\r\nContent-Disposition: form-data; name="x"\r\n\r\n' + b"x" * (MAX_FIELD_BYTES + 1) + b"\r\n"
    )
    assert await refusal(local, start + b"x" + end, content_type="application/json") == "PreconditionFailed"
    assert (
        await refusal(local, start + b"x" + end, content_type="multipart/form-data") == "PreconditionFailed"
    )
    assert await refusal(local, b"no form at all") == "InvalidArgument"
    assert await refusal(local, b"--xYx\nbad\n") == "MalformedPOSTRequest"
    assert await refusal(local) == "InvalidArgument"
    assert await refusal(local, no_file) == "InvalidArgument"
    assert await refusal(local, start + b"half of it") == "IncompleteBody"
    assert await refusal(local, start, b"half of it", b"") == "IncompleteBody"
    assert await refusal(local, field + start + b"x" + end) == "InvalidArgument"
    assert await refusal(local, extra + start + b"x" + end) == "AccessDenied"
    assert await refusal(local, long + start + b"x" + end) == "MaxPostPreDataLengthExceeded"
    assert await refusal(local, *([field] * 200)) == "InvalidArgument"


async def test_parts_behind_the_file_are_ignored(local: LocalStore) -> None:
    form = local.upload_form("", "k", 1000)
    late = b'\r\n--xYx\r\nContent-Disposition: form-data; name="acl"\r\n\r\npublic-read\r\n--xYx--\r\n'
    await receive(local, TYPE, pieces(head(form) + b"x" + late))
    assert (await local.head("k")) is not None


async def test_policy_of_nobody(local: LocalStore) -> None:
    """A signature of another site is worth nothing here, whatever it signs."""
    other = FormSigner(b"o" * 32)
    with pytest.raises(RefusedError, match="signature"):
        local.signer.check(other.fields("k", 10, 60, None))
    with pytest.raises(RefusedError, match="signature"):
        local.signer.check_query("k", {"expires": "99999999999", "signature": ""})
    # Neither is the signature of a form worth anything for a URL.
    fields = local.signer.fields("k", 10, 60, None)
    query = {"expires": "99999999999", "signature": fields["x-amz-signature"]}
    with pytest.raises(RefusedError, match="signature"):
        local.signer.check_query("k", query)


async def test_client_that_leaves(local: LocalStore) -> None:
    async def listed() -> list[Path]:
        return files(local)

    async with serving(local) as origin:
        form = local.upload_form(origin, "k", 10 * MIB)
        host, port = origin.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        request = f"POST /api/objects HTTP/1.1\r\nHost: x\r\nContent-Type: {TYPE}\r\nContent-Length: 9000000\r\n\r\n"
        writer.write(request.encode() + head(form) + bytes(500_000))
        await writer.drain()
        await eventually(listed, bool, lambda _: "file of the upload")
        writer.close()
        await writer.wait_closed()
        await eventually(listed, lambda found: not found, lambda found: f"end of {found}")
        assert await local.head("k") is None


async def test_keys_do_not_lead_out(local: LocalStore, tmp_path: Path) -> None:
    keys = ["../../escape", "/etc/escape", "a/../../../escape", "x" * 3000, "a//b/", "a/b"]
    async with serving(local) as origin, httpx.AsyncClient(trust_env=False) as client:
        for key in keys:
            form = local.upload_form(origin, key, 10)
            response = await client.post(form.url, data=form.fields, files={"file": ("f", key.encode()[:9])})
            assert response.status_code == 204
    assert all(path.is_relative_to(tmp_path / "objects") for path in files(local))
    assert len(files(local)) == len(keys)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "objects"]
    for path in files(local):
        assert path.stat().st_mode & 0o077 == 0


async def test_full_disk(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk of the object storage is full"):
        await local.put("k", b"x", "text/plain")
    assert files(local) == []
    async with serving(local) as origin, httpx.AsyncClient(trust_env=False) as client:
        form = local.upload_form(origin, "k", 10)
        response = await client.post(form.url, data=form.fields, files={"file": ("f", b"x")})
    assert response.status_code == 503
    assert "disk" in response.text
    assert files(local) == []


async def test_damaged_file(local: LocalStore) -> None:
    await local.put("k", b"x", "text/plain")
    files(local)[0].write_bytes(b"\0\0\0")
    with pytest.raises(StorageError, match="damaged"):
        await local.head("k")


async def test_tidy_removes_old_leftovers_only(local: LocalStore) -> None:
    await local.tidy()
    await local.put("k", b"x", "text/plain")
    old, young = (local._folder / "incoming" / name for name in ("old.part", "young.part"))
    for part in (old, young):
        part.write_bytes(b"x")
    then = time.time() - ABANDONED_S - 60
    os.utime(old, (then, then))
    await local.tidy()
    assert not old.exists()
    assert young.exists()
    assert await local.head("k") is not None


async def test_objects_are_no_pages_of_the_server(local: LocalStore) -> None:
    await local.put("k", b"<script>alert(1)</script>", "text/html")
    async with serving(local) as origin, httpx.AsyncClient(trust_env=False) as client:
        response = await client.get(local.download_url(origin, "k"))
        again = await client.get(
            local.download_url(origin, "k"), headers={"Range": "bytes=0-0", "If-Range": '"other"'}
        )
        part = await client.get(
            local.download_url(origin, "k"),
            headers={"Range": "bytes=0-0", "If-Range": response.headers["etag"]},
        )
    assert response.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert (again.status_code, part.status_code) == (200, 206)
