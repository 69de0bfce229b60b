"""Search (tasks-api §4.1): what it finds is what a plain comparison of texts finds, with and without the index."""

from __future__ import annotations

import random
from uuid import uuid4

import pytest

from taskyard.accounts.caller import Caller, Project
from taskyard.db.engine import Database
from taskyard.tasks import search, service
from taskyard.tasks.schemas import TaskQuery
from tests.support.yard import Api, Yard, ok

BLOCK = 1 << 14

Many = tuple[Database, Caller, dict[int, tuple[str, str]]]


@pytest.fixture(params=["read", "index"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Lists are read as a whole, or all but the two newest tasks come from the index."""
    if request.param == "index":
        monkeypatch.setattr(search, "READ", 2)
        monkeypatch.setattr(search, "SHORT", 0)
    return str(request.param)


async def titles(api: Api, term: str, **query: str) -> list[str]:
    found = ok(await api.get("tasks/", params={"search": term, **query}))
    assert found["count"] == len(found["results"])
    return [task["title"] for task in found["results"]]


TERMS = [
    ("importer", ["two", "Importer"]),
    ("MPORT", ["two", "Importer"]),
    ("  importer  ", ["two", "Importer"]),
    ("im", ["two", "Importer"]),
    ("w", ["WWW", "two"]),
    ("importer drops", ["two"]),
    ("importer  drops", []),
    ("nothing like it", []),
    ("100%", []),
    ("0%", ["percent"]),
    ("%", ["percent"]),
    ("_", ["percent"]),
    ("a_b", ["percent"]),
    ("aXb", []),
    ("\\", ["percent"]),
    ("c:\\tmp", ["percent"]),
    ("it's", ["percent"]),
    ("'", ["percent"]),
    ("ÄRGER", ["ärger"]),
    ("登录", ["ärger"]),
    ("录", ["ärger"]),
    ("ärgerthe", []),
    ("r the", []),
    ("two|", []),
    ("& !", []),
    ("1", ["Importer"]),
    ("TES-1", ["Importer"]),
    ("what ever-1", ["Importer"]),
    ("-1", ["Importer"]),
    ("01", ["Importer"]),
    ("1-", []),
    ("9" * 40, []),
]


async def test_terms(yard: Yard, way: str) -> None:
    api = yard.api()
    await api.create_task(title="first", description="nix")
    await api.create_task(title="Importer", description="nix")
    await api.create_task(title="two", description="The IMPORTER drops\nthe last line.")
    await api.create_task(title="ärger", description="the 登录 page")
    await api.create_task(title="percent", description="at 0%_, a_b in c:\\tmp, it's")
    await api.create_task(title="WWW")
    await api.create_task(title="gone importer", internal=True)
    await yard.api("eve", yard.other_project).create_task(title="foreign importer")
    for term, expected in TERMS:
        assert await titles(api, term) == expected, term


async def test_changes_are_found(yard: Yard, way: str) -> None:
    api = yard.api()
    task = await api.create_task(title="before", description="the text")
    for _ in range(3):
        await api.create_task(title="newer")
    path = f"tasks/{task['id']}/"
    ok(await api.patch(path, {"title": "after"}))
    assert (await titles(api, "before"), await titles(api, "after")) == ([], ["after"])
    ok(await api.patch(path, {"description": "other words"}))
    assert (await titles(api, "the text"), await titles(api, "other w")) == ([], ["after"])
    ok(await api.patch(path, {"archived": True}))
    assert (await titles(api, "after"), await titles(api, "after", archived="true")) == ([], ["after"])
    assert (await api.request("DELETE", path)).status_code == 204
    assert await titles(api, "after", archived="true") == []


async def test_long_texts(yard: Yard, way: str) -> None:
    """Longer than what is indexed, and with more different groups than a tsvector could hold."""
    api = yard.api()
    chars = random.Random(3)
    long = "".join(chr(chars.randrange(0x4E00, 0x9FFF)) for _ in range(200_000)) + "needle"
    await api.create_task(title="long", description=long)
    await api.create_task(title="at the limit", description=long[-32_000:])
    for _ in range(3):
        await api.create_task(title="newer")
    assert await titles(api, "needle") == ["at the limit", "long"]
    assert await titles(api, long[50_000:50_040]) == ["long"]
    assert await titles(api, long[-20_000:-19_800]) == ["at the limit", "long"]


@pytest.fixture
async def many(yard: Yard) -> Many:
    """Tasks with random texts, in several blocks of the index: number -> title, description."""
    chars = random.Random(11)
    alphabet = "aabbAB  é漢'\\%_:&|!()*\n"
    texts: dict[int, tuple[str, str]] = {}
    for block in range(4):
        for n in range(40):
            number = block * BLOCK + n * (BLOCK // 40)
            made = ["".join(chars.choices(alphabet, k=chars.randrange(30))).strip() for _ in range(2)]
            texts[number] = (made[0], made[1])
    async with yard.database.transaction() as connection:
        for number, (title, description) in texts.items():
            await connection.execute(
                "INSERT INTO tasks (project_id, task_number, title, description) VALUES (%s, %s, %s, %s)",
                [yard.project, number, title, description],
            )
        await connection.execute(
            "UPDATE projects SET next_task_number = %s WHERE id = %s", [4 * BLOCK, yard.project]
        )
    project = Project(yard.project, "Test Yard", uuid4())
    return yard.database, Caller(yard.users["ada"], "", False, frozenset("*"), None, project), texts


async def test_finds_what_comparing_finds(many: Many, way: str) -> None:
    database, caller, texts = many
    chars = random.Random(5)
    whole = [text for pair in texts.values() for text in pair if text]
    matched = 0
    async with database.connection() as connection:
        for _ in range(150):
            text = chars.choice(whole)
            start = chars.randrange(len(text))
            term = text[start : start + chars.choice((1, 2, 3, 4, 5, 8, 20))].swapcase().strip()
            if not term:
                continue
            query = TaskQuery(search=term)
            rows, count = await service.page(connection, caller, query, 1000, 0, count_limit=1000)
            wanted = [
                n for n in sorted(texts, reverse=True) if any(term.lower() in t.lower() for t in texts[n])
            ]
            assert [row["task_number"] for row in rows] == wanted, term
            assert count == len(wanted)
            matched += len(wanted)
    assert matched > 500


async def test_pages_and_the_limit_of_the_count(many: Many, way: str) -> None:
    database, caller, texts = many
    wanted = [n for n in sorted(texts, reverse=True) if any("a" in t.lower() for t in texts[n])]
    assert len(wanted) > 100
    query = TaskQuery(search="A")
    async with database.connection() as connection:
        for count_limit in (0, 10, len(wanted) - 1, len(wanted), 1000):
            seen: list[int] = []
            while True:
                rows, count = await service.page(
                    connection, caller, query, 7, len(seen), count_limit=count_limit
                )
                seen += [row["task_number"] for row in rows]
                exact = not count_limit or len(wanted) <= max(count_limit, len(seen))
                assert count == (len(wanted) if exact else max(count_limit, len(seen)) + 1)
                if count <= len(seen):
                    break
            assert seen == wanted
