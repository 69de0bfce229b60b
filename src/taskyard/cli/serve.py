"""`taskyard serve`, `api`, `worker`: the server's processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from taskyard.cli.options import DataDir, load_settings

if TYPE_CHECKING:
    from taskyard.settings import Settings

Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
Drain = Annotated[
    float | None,
    typer.Option(
        "--drain",
        min=0,
        metavar="SECONDS",
        help="How long turns may go on after SIGTERM or Ctrl-C before their runs are handed over; a second signal "
        "hands them over at once.",
        show_default="the setting worker.drain_s, 10",
    ),
]


def add_to(app: typer.Typer) -> None:
    app.command()(serve)
    app.command()(api)
    app.command()(worker)


def serve(data_dir: DataDir = None, host: Host = "127.0.0.1", port: Port = 8000, drain: Drain = None) -> None:
    """Start the server: API, worker and its own PostgreSQL in one."""
    settings = _with_drain(load_settings(data_dir), drain)
    from taskyard.serve import serve as start

    start(settings, host, port)


def api(data_dir: DataDir = None, host: Host = "127.0.0.1", port: Port = 8000) -> None:
    """Start the API alone (needs TASKYARD_DATABASE_URL)."""
    settings = load_settings(data_dir)
    from taskyard.serve import serve_api

    serve_api(settings, host, port)


def worker(data_dir: DataDir = None, drain: Drain = None) -> None:
    """Start a worker alone (needs TASKYARD_DATABASE_URL)."""
    settings = _with_drain(load_settings(data_dir), drain)
    from taskyard.serve import run_worker

    run_worker(settings)


def _with_drain(settings: Settings, drain_s: float | None) -> Settings:
    if drain_s is None:
        return settings
    return settings.model_copy(update={"worker": settings.worker.model_copy(update={"drain_s": drain_s})})
