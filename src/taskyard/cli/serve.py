"""`taskyard serve`, `api`, `worker`: the server's processes."""

from __future__ import annotations

from typing import Annotated

import typer

from taskyard.cli.options import DataDir, load_settings

Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")]


def add_to(app: typer.Typer) -> None:
    app.command()(serve)
    app.command()(api)
    app.command()(worker)


def serve(data_dir: DataDir = None, host: Host = "127.0.0.1", port: Port = 8000) -> None:
    """Start the server: API, worker and its own PostgreSQL in one."""
    settings = load_settings(data_dir)
    from taskyard.serve import serve as start

    start(settings, host, port)


def api(data_dir: DataDir = None, host: Host = "127.0.0.1", port: Port = 8000) -> None:
    """Start the API alone (needs TASKYARD_DATABASE_URL)."""
    settings = load_settings(data_dir)
    from taskyard.serve import serve_api

    serve_api(settings, host, port)


def worker(data_dir: DataDir = None) -> None:
    """Start a worker alone (needs TASKYARD_DATABASE_URL)."""
    settings = load_settings(data_dir)
    from taskyard.serve import run_worker

    run_worker(settings)
