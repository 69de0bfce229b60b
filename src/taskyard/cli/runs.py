"""`taskyard run`, `follow`, `cancel`: runs on a server."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from taskyard.cli.options import AsJson, DataDir
from taskyard.errors import SetupError

if TYPE_CHECKING:
    from taskyard.client import Run, Task, Taskyard

DEFAULT_MODELS = {"claude": "claude-opus-4-7", "codex": "gpt-5.5"}
"""For the two agents whose API field `runtime_adapter` cannot be sent without a model (tasks-api §4.8.1)."""

FIRST_LOOK_S = 0.1
QUEUE_LOOK_S = 3.0
"""How often a run that waits is looked at, in the end."""


def _named(value: str | None) -> str | None:
    """An empty variable of a script names no task, and not the newest run either."""
    if value is not None and not value.strip():
        raise typer.BadParameter("it is empty")
    return value


TaskId = Annotated[str, typer.Argument(metavar="TASK_ID", callback=_named)]
RunId = Annotated[
    str | None, typer.Argument(metavar="[RUN_ID]", help="Default: the task's newest run.", callback=_named)
]


def add_to(app: typer.Typer) -> None:
    app.command()(run)
    app.command()(follow)
    app.command()(cancel)


def run(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to do; - reads it from standard input.")
    ],
    repo: Annotated[
        str | None,
        typer.Option(
            "--repo", metavar="PATH_OR_URL", help="Git repository; or an org/name the server knows."
        ),
    ] = None,
    branch: Annotated[
        str | None, typer.Option("--branch", help="Branch to start from; default: the repository's own.")
    ] = None,
    agent: Annotated[str | None, typer.Option("--agent", help="claude, codex or another one.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Model of claude or codex.")] = None,
    follow_it: Annotated[bool, typer.Option("--follow", "-f", help="Show the run until it ends.")] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Let an agent work on a prompt."""
    if follow_it and as_json:
        raise typer.BadParameter("--follow and --json exclude each other")
    if model and agent not in DEFAULT_MODELS:
        raise typer.BadParameter("--model needs --agent claude or --agent codex")
    text = (_standard_input() if prompt == "-" else prompt).strip()
    if not text:
        raise typer.BadParameter("the prompt is empty")
    from taskyard.cli.local import connect
    from taskyard.cli.repository import repository_name

    with connect(data_dir) as yard:
        name = repository_name(yard, repo) if repo else None
        task = yard.create_task(title=text.splitlines()[0].strip()[:255], description=text, repository=name)
        task = yard.run_task(task.id, branch=branch, **agent_options(agent, model))
        started = _newest_run(task)
        if follow_it:
            raise typer.Exit(show_until_end(yard, task.id, started.id))
        url = f"{yard.endpoint.url}/api/projects/{yard.endpoint.project}/tasks/{task.id}/runs/{started.id}/"
    if as_json:
        typer.echo(json.dumps({"task": task.id, "slug": task.slug, "run": started.id, "url": url}))
        return
    typer.echo(f"task    {task.id}  {task.slug}")
    typer.echo(f"run     {started.id}")
    typer.echo(f"url     {url}")
    typer.echo(f"follow  taskyard follow {task.id}")


def _standard_input() -> str:
    if sys.stdin is None:
        raise typer.BadParameter("there is no standard input to read the prompt from")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise typer.BadParameter("the standard input is not UTF-8 text") from None


def follow(task_id: TaskId, run_id: RunId = None, data_dir: DataDir = None) -> None:
    """Show a run from its beginning until it ends."""
    from taskyard.cli.local import connect

    with connect(data_dir) as yard:
        raise typer.Exit(show_until_end(yard, task_id, run_id or _newest_run(yard.get_task(task_id)).id))


def cancel(task_id: TaskId, run_id: RunId = None, data_dir: DataDir = None) -> None:
    """End a run."""
    from taskyard.cli.local import connect

    with connect(data_dir) as yard:
        chosen = yard.get_run(task_id, run_id) if run_id else _newest_run(yard.get_task(task_id))
        if chosen.is_terminal:
            typer.echo(f"run {chosen.id} has ended already: {chosen.status}")
            return
        ended = yard.cancel(task_id, chosen.id)
    typer.echo(f"run {ended.id}: {ended.status}")


def agent_options(agent: str | None, model: str | None) -> dict[str, str]:
    """The fields of `POST T/run/` that choose an agent."""
    if agent in DEFAULT_MODELS:
        return {"runtime_adapter": agent, "model": model or DEFAULT_MODELS[agent]}
    return {"agent": agent} if agent else {}


def show_until_end(yard: Taskyard, task_id: str, run_id: str) -> int:
    """Show a run until it ends; the exit code: 0 when it completed. Ctrl-C leaves the run alone."""
    from taskyard.cli.show import Renderer, terminal

    renderer = Renderer(terminal())
    lost = False

    def on_retry(reason: str, delay: float) -> None:
        nonlocal lost
        if not lost:
            renderer.note(f"Trying again: {reason}.")
        lost = True

    try:
        _wait_for_worker(yard, task_id, run_id, renderer.note)
        for event in yard.stream(task_id, run_id, on_retry=on_retry):
            lost = False
            renderer.event(event)
        ended = yard.get_run(task_id, run_id)
    except KeyboardInterrupt:
        renderer.note("The run goes on.")
        renderer.note(f"See it again: taskyard follow {task_id} {run_id}")
        renderer.note(f"End it:       taskyard cancel {task_id} {run_id}")
        return 130
    renderer.finish(ended)
    return 0 if ended.status == "completed" else 1


def _wait_for_worker(yard: Taskyard, task_id: str, run_id: str, note: Callable[[str], None]) -> None:
    """Say what a run waits for, and that again when it changes, until a worker has it."""
    from taskyard.client import ClientError

    said, delay = "", FIRST_LOOK_S
    while True:
        try:
            place = yard.get_run(task_id, run_id).state.get("queue")
        except ClientError:  # whoever follows the stream waits that out, or says what it is
            return
        if not isinstance(place, dict):
            return
        text = f"Waiting, number {place.get('position')} in the queue: {place.get('reason')}."
        # A worker that is there takes it at once: nothing to tell.
        if text != said and "about to" not in text:
            note(text)
            said = text
        time.sleep(delay)
        delay = min(delay * 2, QUEUE_LOOK_S)


def _newest_run(task: Task) -> Run:
    if task.latest_run is None:
        raise SetupError(f"task {task.id} has no run yet.")
    return task.latest_run
