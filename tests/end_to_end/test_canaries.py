"""Secrets of all kinds are planted; an agent that looks for them finds its own only, and the server shows none."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from urllib.parse import quote

import psycopg

from taskyard.db.embedded import running_url
from tests.support.repositories import make_repository
from tests.support.site import Site, running_site, taskyard, until

SEARCH = r"""
import os, re
found = set()
def look(place, data):
    for name in re.findall(rb"CANARY[0-9]+[a-z]+", data):
        found.add((name.decode(), place))
for name, value in os.environ.items():
    look("environment", value.encode())
for pid in os.listdir("/proc"):
    for part in ("environ", "cmdline", "mountinfo", "maps"):
        try:
            look(f"/proc/{pid}/{part}", open(f"/proc/{pid}/{part}", "rb").read())
        except OSError:
            pass
files = 0
for top in sorted(os.listdir("/")):
    if top in ("proc", "sys", "usr", "lib", "lib64", "bin", "sbin"):
        continue
    for folder, _, names in os.walk("/" + top):
        for name in names:
            path = os.path.join(folder, name)
            try:
                if os.path.isfile(path) and os.path.getsize(path) < 2_000_000:
                    files += 1
                    look(path, open(path, "rb").read())
            except OSError:
                pass
places = [(place, re.sub("[a-z]", "", name)) for name, place in sorted(found)]
print("FOUND", len({name for name, _ in found}), "IN", files > 0, places)
"""
"""Says which numbers it found; prints no canary."""

SPELL = (
    "SHELL echo raw $MY_TOKEN; printf %s $MY_TOKEN | base64; printf 'x%s' $MY_TOKEN | base64;"
    ' python3 -c \'import os,json,urllib.parse as u; t=os.environ["MY_TOKEN"];'
    ' print(u.quote(t,safe=""), json.dumps({"t": t}), t.encode().hex())\'; echo err $MY_TOKEN >&2'
)


def canary(number: int) -> str:
    return f"CANARY{number}" + "xqzvk" + "abcdefghij"[number % 10] * 3


def forms(secret: str) -> list[str]:
    raw = secret.encode()
    return [
        secret,
        raw.hex(),
        quote(secret, safe=""),
        *(base64.b64encode(b"\0" * n + raw).decode()[4:-4] for n in range(3)),
    ]


def start(site: Site, text: str, **fields: object) -> str:
    task = site.call(
        "POST", "tasks/", json={"description": text, "title": "Look around", "repository": "local/shop"}
    )
    assert task.status_code == 201, task.text
    answer = site.call("POST", f"tasks/{task.json()['id']}/run/", json={"agent": "scripted", **fields})
    assert answer.status_code == 200, answer.text
    return f"tasks/{task.json()['id']}/runs/{answer.json()['latest_run']['id']}/"


def environment(site: Site, name: str, variables: dict[str, str]) -> str:
    made = site.call("POST", "sandbox_environments/", json={"name": name, "environment_variables": variables})
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


def dump(data: Path) -> str:
    """Every row of every table, as text."""
    url = running_url(data)
    assert url is not None
    with psycopg.connect(url) as connection:
        tables = connection.execute(
            "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables"
            " WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        ).fetchall()
        rows = []
        for (table,) in tables:
            rows += connection.execute(f"SELECT t::text FROM {table} t".encode()).fetchall()
    return "\n".join(row[0] for row in rows)


def test_canaries(tmp_path: Path) -> None:
    data, home = tmp_path / "data", tmp_path
    shop = make_repository(tmp_path / "shop")
    keys = base64.b64encode(b"CANARY6" + b"k" * 25).decode()
    (home / ".ssh").mkdir()
    (home / ".ssh" / "id_ed25519").write_text(canary(12))
    (home / ".git-credentials").write_text(f"https://me:{canary(13)}@github.com")
    (home / ".netrc").write_text(f"machine github.com password {canary(14)}")
    (home / "key").write_text(canary(3))
    planted = {
        "COMPANY_SECRET": canary(1),
        "ANTHROPIC_API_KEY": canary(2),
        "TASKYARD_MODELS__OPENAI__API_KEY_FILE": str(home / "key"),
        "TASKYARD_MODELS__ANTHROPIC__HEADERS": json.dumps({"x-gate": canary(4)}),
        "TASKYARD_GIT__TOKENS": json.dumps({"github.com": canary(5)}),
        "TASKYARD_SECRET_KEYS": json.dumps([keys]),
        "PGPASSWORD": canary(7),
        "AWS_SECRET_ACCESS_KEY": canary(8),
    }
    own, foreign, pasted = canary(9), canary(10), canary(11)
    with running_site(data, **planted) as site:
        registered = site.call("POST", "repositories/", json={"origin": str(shop), "name": "local/shop"})
        assert registered.status_code == 201, registered.text
        mine = environment(site, "Mine", {"MY_TOKEN": own})
        other = environment(site, "Other", {"THEIR_TOKEN": foreign})
        waiting = start(
            site, f"SHELL echo $THEIR_TOKEN > kept.txt\nSAY {pasted}\nSLEEP 600", sandbox_environment_id=other
        )
        until(lambda: site.call("GET", f"{waiting}logs/").text, lambda log: "kept.txt" in log, str)
        search = base64.b64encode(SEARCH.encode()).decode()
        path = start(
            site,
            f"SHELL echo {search} | base64 -d > /tmp/look.py; python3 /tmp/look.py\n{SPELL}\nCRASH 3",
            sandbox_environment_id=mine,
            github_user_token=canary(15),
        )
        body = site.wait(path, status="failed")
        log = site.call("GET", f"{path}logs/").text
        said = re.search(r"FOUND (\d+) IN (\w+) (\[.*?\])", log)
        assert said is not None, log[-3000:]
        assert said[1] == "1", said[0]
        assert said[2] == "True"
        assert set(re.findall(r"CANARY\d+", said[3])) == {"CANARY9"}, said[0]
        # What the agent said of its own is hidden, in each spelling.
        assert log.count("***") >= 6, log[-3000:]
        assert site.call("PATCH", waiting, json={"status": "cancelled"}).status_code == 200
        stream = site.call("GET", f"{path}stream/").text
        # Two are texts that people wrote into tasks, which is where they are to be.
        shown = {
            "log": log,
            "stream": stream,
            "run": json.dumps(body),
            "database": dump(data),
            "server": site.said(),
        }
        api_key = site.key
    shown["server"] = site.said().replace(api_key, "", 1)  # shown once, as it says
    for number, secret in {
        **{n: canary(n) for n in (*range(1, 6), *range(7, 11), *range(12, 16))},
        16: api_key,
        6: keys,
    }.items():
        for place, text in shown.items():
            for form in forms(secret):
                assert form not in text, f"canary {number} is in the {place} as {form!r}"
    assert pasted in shown["database"], "the dump reads what it has to"
    assert taskyard(data, "config", **planted).stdout.count("CANARY") == 0
