"""A typed client of the Tasks API, blocking and asynchronous.

    from taskyard.client import Taskyard

    with Taskyard("http://127.0.0.1:8000", "phx_…") as yard:
        task = yard.create_task(description="Fix the flaky test", repository="acme/shop")
        run = yard.run_task(task.id).latest_run
        for event in yard.stream(task.id, run.id):
            print(event.data)

`AsyncTaskyard` has the same methods as coroutines. Nothing of the server is imported.
"""

from taskyard.client.asynchronous import AsyncTaskyard
from taskyard.client.blocking import Taskyard
from taskyard.client.errors import ClientError, StreamLostError, UnreachableError
from taskyard.client.models import TERMINAL, Artifact, Event, Repository, Run, Task, User

__all__ = [
    "TERMINAL",
    "Artifact",
    "AsyncTaskyard",
    "ClientError",
    "Event",
    "Repository",
    "Run",
    "StreamLostError",
    "Task",
    "Taskyard",
    "UnreachableError",
    "User",
]
