"""Keys of stored secrets: made once, shared, replaced (real key files, real database)."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import SecretStr

from taskyard.db.engine import Database
from taskyard.environments import secrets, service, store
from taskyard.security import Box, SecretKeyError, secret_keys
from taskyard.settings import Settings
from tests.conftest import make_settings
from tests.support.command import taskyard
from tests.support.yard import Yard, ok

A, B = (base64.b64encode(bytes([n]) * 32).decode() for n in (1, 255))


@pytest.fixture
def other_machine(tmp_path: Path, database_url: str) -> Settings:
    """Another data folder on the same database."""
    folder = tmp_path / "other"
    folder.mkdir()
    return make_settings(folder, database_url)


def keyed(settings: Settings, *keys: str) -> Settings:
    return settings.model_copy(update={"secret_keys": [SecretStr(key) for key in keys]})


async def stored(yard: Yard, **variables: str) -> Any:
    body = {"name": "e", "environment_variables": variables}
    return ok(await yard.api().post("sandbox_environments/", body), 201)["id"]


async def sealed(database: Database, settings: Settings, text: str) -> bytes:
    async with database.transaction() as connection:
        return (await secrets.sealing_box(connection, settings)).seal(text)


async def test_a_key_file_is_made_when_it_is_needed(yard: Yard) -> None:
    path = yard.settings.data_dir / "secret-key"
    ok(await yard.api().post("sandbox_environments/", {"name": "no variables"}), 201)
    assert not path.exists()
    environment = await stored(yard, A="1")
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_text()
    await stored(yard, B="2")
    assert path.read_text() == before
    assert not list(path.parent.glob("*.part"))
    assert await service.variables_for(yard.database, yard.settings, environment) == {"A": "1"}


async def test_many_at_once_make_one_key(database: Database, settings: Settings) -> None:
    tokens = await asyncio.gather(*(sealed(database, settings, str(n)) for n in range(20)))
    box = await secrets.opening_box(settings)
    assert [box.open(token) for token in tokens] == [str(n) for n in range(20)]
    assert len(secret_keys(settings)) == 1


async def test_another_machine_without_the_key(
    yard: Yard, database: Database, other_machine: Settings
) -> None:
    environment = await stored(yard, A="1")
    with pytest.raises(SecretKeyError, match=r"no key for stored secrets.*TASKYARD_SECRET_KEYS"):
        await service.variables_for(database, other_machine, environment)
    with pytest.raises(SecretKeyError, match="TASKYARD_SECRET_KEYS"):
        await sealed(database, other_machine, "x")
    assert not (other_machine.data_dir / "secret-key").exists()
    with pytest.raises(SecretKeyError, match="not the one that the site's secrets are encrypted with"):
        await sealed(database, keyed(other_machine, A), "x")
    with pytest.raises(SecretKeyError, match="cannot be decrypted"):
        await service.variables_for(database, keyed(other_machine, A), environment)


async def test_request_on_a_machine_without_the_key(yard: Yard) -> None:
    await stored(yard, A="1")
    (yard.settings.data_dir / "secret-key").unlink()
    response = await yard.api().post(
        "sandbox_environments/", {"name": "x", "environment_variables": {"A": "1"}}
    )
    assert response.status_code == 503
    assert "TASKYARD_SECRET_KEYS" in response.json()["detail"]


async def test_keys_of_the_settings(database: Database, settings: Settings) -> None:
    token = await sealed(database, keyed(settings, A), "x")
    assert not (settings.data_dir / "secret-key").exists()
    # The new key comes in second place first, then in the first.
    assert (await secrets.opening_box(keyed(settings, B, A))).open(token) == "x"
    newer = await sealed(database, keyed(settings, B, A), "y")
    assert (await secrets.opening_box(keyed(settings, A, B))).open(newer) == "y"
    assert (await secrets.opening_box(keyed(settings, B))).open(newer) == "y"


@pytest.mark.parametrize("key", ["short", "A" * 43, "é" * 44, base64.b64encode(b"x" * 33).decode()])
def test_bad_keys(settings: Settings, key: str) -> None:
    with pytest.raises(SecretKeyError, match="entry 2 of TASKYARD_SECRET_KEYS is not a key") as caught:
        secret_keys(keyed(settings, A, key))
    assert key not in caught.value.detail


def test_both_alphabets(settings: Settings) -> None:
    assert "/" in B
    assert secret_keys(keyed(settings, B)) == secret_keys(keyed(settings, B.replace("/", "_")))


def test_bad_key_file(settings: Settings) -> None:
    path = settings.data_dir / "secret-key"
    path.write_text(f"{A}\nnonsense\n")
    with pytest.raises(SecretKeyError, match=f"line 2 of {path} is not a key"):
        secret_keys(settings)


def test_same_text_is_never_sealed_the_same() -> None:
    box = Box([b"k" * 32])
    assert box.seal("x") != box.seal("x")
    with pytest.raises(SecretKeyError):
        box.open(box.seal("x")[:-4] + b"AAA=")


async def test_rotation_of_the_key_file(yard: Yard) -> None:
    environments = [await stored(yard, A=str(n)) for n in range(3)]
    before = await yard.database.fetch("SELECT id, variables, updated_at FROM sandbox_environments")
    old = Box(secret_keys(yard.settings))
    answer = await secrets.rotate(yard.database, yard.settings)
    assert answer == {"rotated": 3, "dropped": []}
    assert len(secret_keys(yard.settings)) == 1
    after = {row["id"]: row for row in await yard.database.fetch("SELECT * FROM sandbox_environments")}
    for row in before:
        assert old.open(bytes(row["variables"]))
        assert after[row["id"]]["updated_at"] == row["updated_at"]
        with pytest.raises(SecretKeyError):
            old.open(bytes(after[row["id"]]["variables"]))
    # The running server goes on with the new key.
    for n, environment in enumerate(environments):
        assert await service.variables_for(yard.database, yard.settings, environment) == {"A": str(n)}
    await stored(yard, B="new")


async def test_rotation_while_a_secret_is_read(monkeypatch: pytest.MonkeyPatch, yard: Yard) -> None:
    """What was read before has a key that is gone afterwards."""
    environment = await stored(yard, A="1")
    read = store.variables

    async def variables(database: Database, environment_id: UUID) -> bytes | None:
        found = await read(database, environment_id)
        monkeypatch.undo()
        await secrets.rotate(yard.database, yard.settings)
        return found

    monkeypatch.setattr(store, "variables", variables)
    assert await service.variables_for(yard.database, yard.settings, environment) == {"A": "1"}


async def test_rotation_and_writers_at_once(yard: Yard) -> None:
    await stored(yard, A="0")

    async def write(n: int) -> Any:
        return await stored(yard, A=str(n))

    *written, _, _ = await asyncio.gather(
        *(write(n) for n in range(1, 20)),
        secrets.rotate(yard.database, yard.settings),
        secrets.rotate(yard.database, yard.settings),
    )
    for n, environment in enumerate(written, 1):
        assert await service.variables_for(yard.database, yard.settings, environment) == {"A": str(n)}
    assert len(secret_keys(yard.settings)) == 1


async def test_rotation_to_keys_of_the_settings(yard: Yard) -> None:
    environment = await stored(yard, A="1")
    # The key file still decrypts here, so the way to the setting needs no copying.
    assert await secrets.rotate(yard.database, keyed(yard.settings, A)) == {"rotated": 1, "dropped": []}
    (yard.settings.data_dir / "secret-key").unlink()
    found = await service.variables_for(yard.database, keyed(yard.settings, A), environment)
    assert found == {"A": "1"}


async def test_rotation_without_the_key(yard: Yard) -> None:
    environment = await stored(yard, A="1")
    (yard.settings.data_dir / "secret-key").unlink()
    with pytest.raises(
        SecretKeyError, match=f"variables of sandbox environment {environment} cannot be decrypted"
    ):
        await secrets.rotate(yard.database, yard.settings)
    answer = await secrets.rotate(yard.database, yard.settings, drop_unreadable=True)
    assert answer == {"rotated": 0, "dropped": [f"variables of sandbox environment {environment}"]}
    shown = ok(await yard.api().get(f"sandbox_environments/{environment}/"))
    assert shown["has_environment_variables"] is False
    await stored(yard, A="2")


async def test_the_command(yard: Yard, tmp_path: Path, database_url: str) -> None:
    environment = await stored(yard, A="1")

    def rotate(*words: str, **env: str) -> Any:
        return taskyard(
            "admin", "rotate-secrets", *words, cwd=tmp_path, TASKYARD_DATABASE_URL=database_url,
            TASKYARD_DATA_DIR=str(yard.settings.data_dir), **env,
        )  # fmt: skip

    done = await asyncio.to_thread(rotate)
    assert (done.returncode, done.stdout) == (0, "secrets encrypted anew: 1\n"), done.stderr
    done = await asyncio.to_thread(rotate, "--json", TASKYARD_SECRET_KEYS=json.dumps([A]))
    assert json.loads(done.stdout) == {"rotated": 1, "dropped": []}
    settings = keyed(yard.settings, A)
    assert await service.variables_for(yard.database, settings, environment) == {"A": "1"}
    done = await asyncio.to_thread(rotate, TASKYARD_SECRET_KEYS=json.dumps(["x"]))
    assert done.returncode == 1
    assert done.stderr.startswith("error: entry 1 of TASKYARD_SECRET_KEYS is not a key")


def test_config_hides_the_keys(tmp_path: Path) -> None:
    done = taskyard("config", cwd=tmp_path, TASKYARD_SECRET_KEYS=json.dumps([A]))
    assert done.returncode == 0, done.stderr
    assert A not in done.stdout
    assert any(line.split()[:2] == ["TASKYARD_SECRET_KEYS", "(hidden)"] for line in done.stdout.splitlines())
