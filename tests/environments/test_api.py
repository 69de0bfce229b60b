"""Sandbox environment endpoints over HTTP (tasks-api §9)."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from taskyard.db.engine import Database
from taskyard.environments import service
from taskyard.environments.domains import built_in
from taskyard.settings import Settings
from taskyard.settings.sandboxes import SandboxSettings
from tests.support.yard import Api, Yard, error, ok, open_yard

KEYS = [
    "id", "name", "network_access_level", "allowed_domains", "include_default_domains", "repositories",
    "has_environment_variables", "private", "setup_script", "mcp_servers", "worker_pool", "image",
    "internal",    "effective_domains", "created_by", "created_at", "updated_at",
]  # fmt: skip


async def create(api: Api, **fields: Any) -> Any:
    return ok(await api.post("sandbox_environments/", {"name": "An environment", **fields}), 201)


async def variables(yard: Yard, environment: Any) -> dict[str, str]:
    """What an agent would get."""
    return await service.variables_for(yard.database, yard.settings, uuid.UUID(environment["id"]))


async def test_create_and_retrieve(yard: Yard) -> None:
    api = yard.api()
    made = await create(api, name="  Build  ")
    assert list(made) == KEYS
    assert (made["name"], made["network_access_level"], made["private"]) == ("Build", "full", True)
    assert (made["allowed_domains"], made["repositories"], made["effective_domains"]) == ([], [], [])
    assert (made["include_default_domains"], made["internal"]) == (False, False)
    assert made["has_environment_variables"] is False
    assert made["created_by"]["id"] == yard.users["ada"]
    assert made["created_at"].endswith("Z")
    assert ok(await api.get(f"sandbox_environments/{made['id']}/")) == made
    assert ok(await api.get(f"sandbox_environments/{made['id']}")) == made


async def test_effective_domains(yard: Yard) -> None:
    api = yard.api()
    own = ["a.example.org", "pypi.org", "a.example.org", "*.b.example.org"]
    full = await create(api, allowed_domains=own)
    trusted = await create(api, network_access_level="trusted", allowed_domains=own)
    custom = await create(api, network_access_level="custom", allowed_domains=own)
    both = await create(api, network_access_level="custom", allowed_domains=own, include_default_domains=True)
    nothing = await create(api, network_access_level="custom")
    assert full["effective_domains"] == []
    assert trusted["effective_domains"] == list(built_in())
    assert custom["effective_domains"] == ["a.example.org", "pypi.org", "*.b.example.org"]
    rest = [name for name in built_in() if name != "pypi.org"]
    assert both["effective_domains"] == [*custom["effective_domains"], *rest]
    assert nothing["effective_domains"] == []
    assert both["allowed_domains"] == own


def test_built_in_domains() -> None:
    assert 150 < len(built_in()) == len(set(built_in()))
    assert all(name == name.strip().lower() and "." in name and "/" not in name for name in built_in())


async def test_update_changes_what_was_sent(yard: Yard) -> None:
    api = yard.api()
    made = await create(api, repositories=["a/b"], environment_variables={"A": "1", "B": "2"})
    path = f"sandbox_environments/{made['id']}/"
    changed = ok(await api.patch(path, {"name": "New", "private": False}))
    assert changed["updated_at"] > made["updated_at"]
    kept = {key: value for key, value in made.items() if key not in ("name", "private", "updated_at")}
    assert {key: changed[key] for key in kept} == kept
    assert (changed["name"], changed["private"]) == ("New", False)
    assert await variables(yard, made) == {"A": "1", "B": "2"}
    assert ok(await api.patch(path, {}))["name"] == "New"


async def test_variables_are_replaced_whole(yard: Yard) -> None:
    api = yard.api()
    made = await create(api, environment_variables={"A": "1", "B": "2"})
    path = f"sandbox_environments/{made['id']}/"
    assert made["has_environment_variables"] is True
    ok(await api.patch(path, {"environment_variables": {"C": "3"}}))
    assert await variables(yard, made) == {"C": "3"}
    assert ok(await api.patch(path, {"environment_variables": {}}))["has_environment_variables"] is False
    assert await variables(yard, made) == {}


async def test_variables_are_write_only_and_encrypted(yard: Yard) -> None:
    api = yard.api()
    secret = "hunter2-hunter2"
    made = await create(api, environment_variables={"TOKEN": secret})
    for path in ("sandbox_environments/", f"sandbox_environments/{made['id']}/"):
        text = (await api.get(path)).text
        assert secret not in text
        assert '"environment_variables"' not in text
    row = await yard.database.fetch_one(
        "SELECT e::text AS whole, e.variables FROM sandbox_environments e WHERE id = %(id)s", id=made["id"]
    )
    assert row is not None
    assert secret.encode() not in bytes(row["variables"])
    assert secret not in row["whole"]


async def test_values_are_kept_as_they_are(yard: Yard) -> None:
    sent = {"KEY": "-----BEGIN\n line \n", "_empty9": "", "UNICODE": "é\N{SNOWMAN}", "NUMBER": 7}
    made = await create(yard.api(), environment_variables=sent)
    assert await variables(yard, made) == {**sent, "NUMBER": "7"}


async def test_reserved_names_are_dropped_at_use(yard: Yard) -> None:
    dropped = [
        "PATH", "HOME", "LD_PRELOAD", "DYLD_INSERT_LIBRARIES", "GIT_SSH_COMMAND", "NODE_OPTIONS", "BASH_ENV",
        "PROMPT_COMMAND", "PYTHONSTARTUP", "PERL5OPT", "RUBYOPT", "GITHUB_TOKEN", "LLM_GATEWAY_URL",
        "POSTHOG_PERSONAL_API_KEY", "POSTHOG_CODE_MODEL", "JWT_PUBLIC_KEY",
    ]  # fmt: skip
    kept = ["DATABASE_URL", "MY_LD_PATH", "POSTHOG_API_KEY", "GITHUB", "git_x", "PATHS"]
    made = await create(yard.api(), environment_variables=dict.fromkeys([*dropped, *kept], "x"))
    assert made["has_environment_variables"] is True
    assert await variables(yard, made) == dict.fromkeys(kept, "x")


KEY_TEXT = "Invalid environment variable key: '{}'. Must match [A-Za-z_][A-Za-z0-9_]*"


@pytest.mark.parametrize(
    ("body", "code", "attr", "detail"),
    [
        ({}, "required", "name", "This field is required."),
        ({"name": None}, "null", "name", "This field may not be null."),
        ({"name": " "}, "blank", "name", "This field may not be blank."),
        ({"name": "n" * 256}, "max_length", "name", "Ensure this field has no more than 255 characters."),
        ({"network_access_level": "open"}, "invalid_choice", "network_access_level",
         '"open" is not a valid choice.'),
        ({"allowed_domains": "x"}, "not_a_list", "allowed_domains",
         'Expected a list of items but got type "str".'),
        ({"allowed_domains": ["a.org", None]}, "null", "allowed_domains__1", "This field may not be null."),
        ({"private": "perhaps"}, "invalid_input", "private", "Must be a valid boolean."),
        ({"environment_variables": None}, "null", "environment_variables", "This field may not be null."),
        ({"environment_variables": ["A"]}, "not_a_dict", "environment_variables",
         'Expected a dictionary of items but got type "list".'),
        ({"environment_variables": {"A": ["x"]}}, "invalid_input", "environment_variables__A",
         "Not a valid string."),
        *(({"environment_variables": {"GOOD": "x", key: "x"}}, "invalid_input", "environment_variables",
           KEY_TEXT.format(key)) for key in ("1BAD", "", "A-B", "A ", "A\n", "é", "{x}")),
        ({"environment_variables": {"A": "x\0"}}, "null_characters_not_allowed", "environment_variables__A",
         "Null characters are not allowed."),
        ({"environment_variables": {"A": "é" * 50_001}}, "invalid_input", "environment_variables",
         "The value of 'A' has more than 100000 bytes."),
        ({"environment_variables": {f"A{n}": "x" * 90_000 for n in range(6)}}, "invalid_input",
         "environment_variables", "The environment variables have more than 500000 bytes together."),
    ],
)  # fmt: skip
async def test_bad_fields(yard: Yard, body: dict[str, Any], code: str, attr: str, detail: str) -> None:
    api = yard.api()
    named = body if code == "required" or attr == "name" else {"name": "x", **body}
    refused = error(await api.post("sandbox_environments/", named), 400, code, attr)
    assert (refused["detail"], refused["type"]) == (detail, "validation_error")
    if code != "required":
        made = await create(api, environment_variables={"A": "1"})
        # The same on update, and before the environment is looked for.
        for one in (made["id"], uuid.uuid4()):
            refused = error(await api.patch(f"sandbox_environments/{one}/", body), 400, code, attr)
            assert refused["detail"] == detail
        assert await variables(yard, made) == {"A": "1"}


async def test_list(yard: Yard) -> None:
    api = yard.api()
    made = [await create(api, name=str(n)) for n in range(3)]
    await yard.database.execute(
        "UPDATE sandbox_environments SET internal = true WHERE id = %(id)s", id=made[1]["id"]
    )
    body = ok(await api.get("sandbox_environments/"))
    assert body["count"] == 2
    assert [item["name"] for item in body["results"]] == ["2", "0"]
    left_out = {
        "effective_domains", "include_default_domains", "has_environment_variables", "setup_script", "mcp_servers",
        "image",
    }  # fmt: skip
    assert list(body["results"][0]) == [key for key in KEYS if key not in left_out]
    first = ok(await api.get("sandbox_environments/?limit=1"))
    assert ok(await api.get(first["next"]))["results"] == body["results"][1:]
    # A hidden one can still be read.
    assert ok(await api.get(f"sandbox_environments/{made[1]['id']}/"))["internal"] is True


async def test_who_sees_what(yard: Yard) -> None:
    ada, bob = yard.api(), yard.api("bob")
    private, public = await create(ada), await create(ada, private=False)
    assert [item["id"] for item in ok(await bob.get("sandbox_environments/"))["results"]] == [public["id"]]
    hidden = f"sandbox_environments/{private['id']}/"
    for method, body in (("GET", None), ("PATCH", {"name": "x"}), ("DELETE", None)):
        error(await bob.request(method, hidden, json=body), 404, "not_found")
    path = f"sandbox_environments/{public['id']}/"
    assert ok(await bob.patch(path, {"name": "Bob's"}))["created_by"]["id"] == yard.users["ada"]
    # Making it private takes it away from whoever did so, who still learns what came of it.
    assert ok(await bob.patch(path, {"private": True}))["private"] is True
    error(await bob.get(path), 404, "not_found")
    assert ok(await ada.get(path))["name"] == "Bob's"


async def test_other_keys(yard: Yard) -> None:
    made = await create(yard.api(), private=False)
    path = f"sandbox_environments/{made['id']}/"
    eve = yard.api("eve", yard.other_project)
    for method in ("GET", "DELETE"):
        error(await eve.request(method, path), 404, "not_found")
    error(await yard.api("eve").get(path), 403, "permission_denied")
    error(await yard.api(None).get(path), 401, "not_authenticated")
    reader = yard.api("task:read")
    assert ok(await reader.get(path)) == made
    ok(await reader.get("sandbox_environments/"))
    for method, where in (("POST", "sandbox_environments/"), ("PATCH", path), ("DELETE", path)):
        refused = error(await reader.request(method, where, json={"name": "x"}), 403, "permission_denied")
        assert refused["detail"] == "API key missing required scope 'task:write'"
    assert ok(await yard.api("task:write").get(path)) == made


async def test_delete_is_hard(yard: Yard) -> None:
    api = yard.api()
    path = f"sandbox_environments/{(await create(api))['id']}/"
    response = await api.request("DELETE", path)
    assert (response.status_code, response.content) == (204, b"")
    error(await api.get(path), 404, "not_found")
    error(await api.request("DELETE", path), 404, "not_found")
    assert await yard.database.fetch("SELECT 1 FROM sandbox_environments") == []


async def test_paths_and_methods(yard: Yard) -> None:
    api = yard.api()
    made = await create(api)
    refused = error(
        await api.request("PUT", f"sandbox_environments/{made['id']}/", json={"name": "x"}),
        405,
        "method_not_allowed",
    )
    assert refused["detail"] == 'Method "PUT" not allowed.'
    for bad in ("x", uuid.uuid4(), uuid.uuid4().hex):
        error(await api.get(f"sandbox_environments/{bad}/"), 404, "not_found")


async def test_accessible_goes_by_the_creator_of_the_task(yard: Yard) -> None:
    private = uuid.UUID((await create(yard.api()))["id"])
    public = uuid.UUID((await create(yard.api(), private=False))["id"])
    ada, bob = yard.users["ada"], yard.users["bob"]

    async def may(project: int, one: uuid.UUID, creator: int | None) -> bool:
        return await service.accessible(yard.database, project, one, creator) is not None

    assert [await may(yard.project, private, who) for who in (ada, bob, None)] == [True, False, False]
    assert [await may(yard.project, public, who) for who in (ada, bob, None)] == [True, True, True]
    assert not await may(yard.other_project, public, ada)
    await yard.database.execute("UPDATE sandbox_environments SET created_by_id = NULL")
    assert not await may(yard.project, private, None)


async def test_configured_domains(settings: Settings, database: Database) -> None:
    own = settings.model_copy(update={"trusted_domains": ["only.example.org"]})
    async with open_yard(own, database) as yard:
        made = await create(yard.api(), network_access_level="trusted")
    assert made["effective_domains"] == ["only.example.org"]


async def test_an_image(yard: Yard) -> None:
    api = yard.api()
    image = "registry.example.org:5000/team/agent:1.2@sha256:" + "0" * 64
    made = await create(api, image=image)
    path = f"sandbox_environments/{made['id']}/"
    assert (made["image"], ok(await api.get(path))["image"]) == (image, image)
    assert ok(await api.patch(path, {"name": "Other"}))["image"] == image
    assert ok(await api.patch(path, {"image": None}))["image"] is None
    assert (await create(api))["image"] is None
    for bad in ("", "a b", "-v/etc:/etc", "x\u0000", "é", "a" * 256):
        answer = await api.post("sandbox_environments/", {"name": "e", "image": bad})
        error(answer, 400, answer.json()["code"], "image")


async def test_images_that_the_site_allows(settings: Settings, database: Database) -> None:
    allowed = SandboxSettings(images=["agents:1", "registry.example.org/agents/*"])
    own = settings.model_copy(update={"sandbox": allowed})
    async with open_yard(own, database) as yard:
        api = yard.api()
        for image in ("agents:1", "registry.example.org/agents/big:2", None):
            made = await create(api, image=image)
            assert made["image"] == image
        path = f"sandbox_environments/{made['id']}/"
        for image in (
            "agents:12",
            "agents",
            "registry.example.org/agents",
            "x/registry.example.org/agents/big",
        ):
            for refused in (
                await api.post("sandbox_environments/", {"name": "e", "image": image}),
                await api.patch(path, {"image": image}),
            ):
                detail = error(refused, 400, "invalid_input", "image")["detail"]
                assert detail.endswith("allows for sandboxes: agents:1, registry.example.org/agents/*.")
        assert ok(await api.get(path))["image"] is None
