"""`taskyard demo`: one whole task on a throw-away repository, with a server of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from taskyard.cli.options import load_settings
from taskyard.errors import SetupError

if TYPE_CHECKING:
    from taskyard.agents.adapters import Adapter
    from taskyard.settings import Settings

START_S = 120.0
STOP_S = 30.0

FILES = {
    ".gitignore": "__pycache__/\n",
    "README.md": "# Shop\n\nPrices in cents. Run the tests with `python3 -m unittest`.\n",
    "prices.py": (
        '"""Prices of the shop, in cents."""\n\n\n'
        "def total(prices, discount_percent=0):\n"
        '    """The sum of all prices with the discount taken off, rounded down."""\n'
        "    return sum(prices) - sum(prices) * discount_percent\n"
    ),
    "test_prices.py": (
        "import unittest\n\nfrom prices import total\n\n\n"
        "class TotalTest(unittest.TestCase):\n"
        "    def test_sum(self):\n"
        "        self.assertEqual(total([250, 199]), 449)\n\n"
        "    def test_discount(self):\n"
        "        self.assertEqual(total([1000, 500], discount_percent=10), 1350)\n"
    ),
}
REQUEST = "The tests of this repository fail. Find out why, fix the code and run the tests again."
TEST = "python3 -m unittest"
FIXED = FILES["prices.py"].replace("sum(prices) * discount_percent", "sum(prices) * discount_percent // 100")
SCRIPT = "\n".join(
    [
        REQUEST,
        "",
        "(The lines below are the script of the scripted agent; no model reads them.)",
        "THINK The discount is given in percent. I will see what the tests say.",
        "PLAN Run the tests|Fix the discount|Run the tests again",
        f"SHELL {TEST}",
        "SAY The discount is multiplied as if 10 percent were 10. It has to be divided by 100.",
        "WRITE prices.py " + FIXED.replace("\n", "\\n"),
        f"SHELL {TEST}",
        "COMMIT Fix the discount: it is given in percent",
        "SAY The tests pass now, and the fix is committed.",
    ]
)


SCRIPTED = "No model is used: the scripted agent plays a fixed script."


@dataclass(frozen=True)
class Agent:
    """Which agent the demo uses, and the settings that its server needs to find it."""

    name: str
    prompt: str
    remark: str
    env: dict[str, str]


def add_to(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server running afterwards.")] = False,
) -> None:
    """Run one task on a small repository, from nothing to a branch."""
    agent = choose_agent(load_settings())
    folder = Path(tempfile.mkdtemp(prefix="taskyard-demo-"))
    kept = False
    try:
        repository = make_repository(folder / "shop")
        typer.echo(f"A small repository is in {repository}; one of its tests fails.")
        typer.echo(agent.remark)
        typer.echo("Starting a server …")
        with server(folder, agent, keep=keep) as (url, key, pid):
            typer.echo(f"The server is ready at {url}\n")
            code = _run_task(url, key, repository, agent)
            if keep:
                kept = True
                typer.echo(f"\nThe server still runs at {url}\nAPI key: {key}")
                typer.echo(f"Stop it with: kill {pid}\nIts folder:   {folder}")
            elif code:
                typer.echo(f"\nThe end of the server's log:\n{_tail(folder / 'server.log')}", err=True)
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
    raise typer.Exit(code)


def choose_agent(settings: Settings) -> Agent:
    """A real agent when its key is set and it is installed, else the scripted one."""
    from taskyard.agents.adapters import adapters
    from taskyard.cli.config import VENDOR_KEYS

    known = adapters(settings)
    for name, vendor in (("claude", "anthropic"), ("codex", "openai")):
        adapter = known[name]
        if os.environ.get(VENDOR_KEYS[vendor]) and adapter.installed:
            # The demo's server has a data folder of its own, without the installed agents.
            env = {f"TASKYARD_AGENTS__{name.upper()}__COMMAND": json.dumps(adapter.argv())}
            return Agent(
                name, REQUEST, f"{adapter.title} will work on it, with your {VENDOR_KEYS[vendor]}.", env
            )
    return Agent("scripted", SCRIPT, f"{SCRIPTED}\n{_way_to_a_real_one(known)}", {})


def _way_to_a_real_one(known: Mapping[str, Adapter]) -> str:
    from taskyard.cli.config import VENDOR_KEYS

    steps = []
    if not any(os.environ.get(variable) for variable in VENDOR_KEYS.values()):
        steps.append("set ANTHROPIC_API_KEY")
    if not known["claude"].installed or not steps:
        steps.append("run `taskyard agents install claude`")
    return f"(For a real agent: {', '.join(steps)}.)"


def make_repository(folder: Path) -> Path:
    """A git repository with one commit on `main`, and a test that fails."""
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, "utf-8")
    _git(folder, "init", "--quiet", "--initial-branch=main")
    _git(folder, "add", "--all")
    identity = ("-c", "user.name=Taskyard demo", "-c", "user.email=demo@example.invalid")
    _git(folder, *identity, "-c", "commit.gpgSign=false", "commit", "--quiet", "--message", "A small shop")
    return folder


@contextmanager
def server(folder: Path, agent: Agent, *, keep: bool) -> Iterator[tuple[str, str, int]]:
    """A server with a data folder of its own: URL, key and process id. With `keep` only an error stops it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TASKYARD_")}
    env |= agent.env | {"TASKYARD_DATA_DIR": str(folder / "data")}
    command = [sys.executable, "-m", "taskyard.cli", "serve", "--port", "0"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=env,
            cwd=folder,  # no settings file of the current folder
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield (*_wait_ready(process, folder), process.pid)
    except BaseException:
        _stop(process)
        raise
    if not keep:
        _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], folder: Path) -> tuple[str, str]:
    from taskyard.cli.local import first_key, server_url

    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        url = server_url(folder / "data")
        if url is not None and _healthy(url):
            return url, first_key(folder / "data")
        time.sleep(0.05)
    what = "ended" if process.poll() is not None else f"was not ready within {START_S:g} s"
    raise SetupError(f"the server {what}:\n{_tail(folder / 'server.log')}\nTry `taskyard doctor`.")


def _healthy(url: str) -> bool:
    import httpx

    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _run_task(url: str, key: str, repository: Path, agent: Agent) -> int:
    from taskyard.cli.runs import agent_options, show_until_end
    from taskyard.client import Taskyard

    with Taskyard(url, key) as yard:
        name = yard.register_repository(str(repository)).name
        task = yard.create_task(title="Fix the failing test", description=agent.prompt, repository=name)
        run = yard.run_task(task.id, **agent_options(agent.name, None)).latest_run
        if run is None:
            raise SetupError("the server started no run.")
        code = show_until_end(yard, task.id, run.id)
        branch = yard.get_run(task.id, run.id).branch
    if branch:
        _show_branch(repository, branch)
    elif code == 0:
        typer.echo("The agent changed nothing.")
    return code


def _show_branch(repository: Path, branch: str) -> None:
    """What is on the branch that the run left in the repository."""
    from rich.text import Text

    from taskyard.cli.show import terminal
    from taskyard.cli.text import clean

    console = terminal()
    console.print(Text(f"\nBranch {branch} in {repository}:\n", "bold"), soft_wrap=True)
    diff = _git(repository, "diff", "--no-color", "--no-ext-diff", "--no-textconv", f"main...{branch}")
    for line in clean(diff).splitlines():
        header = line.startswith(("diff ", "index ", "--- ", "+++ "))
        style = "bold" if header else {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
        console.print(Text(line, style), soft_wrap=True)


def _git(folder: Path, *words: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(folder), "-c", "core.hooksPath=/dev/null", *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
    except FileNotFoundError:
        raise SetupError("git is not installed.") from None
    except subprocess.CalledProcessError as error:
        raise SetupError(f"git {words[0]} failed: {error.stderr.strip()}") from None


def _tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text("utf-8", "replace").splitlines()[-lines:])
