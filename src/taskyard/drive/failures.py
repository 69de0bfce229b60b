"""How a run can fail: one stable `error_type` each, and a message for a person."""

from __future__ import annotations

import re
from typing import Any, Literal

ErrorType = Literal[
    "sandbox_failed",  # no sandbox could be made
    "environment_failed",  # its sandbox environment is gone, or cannot be decrypted here
    "clone_failed",  # the repository or the asked branch could not be copied into it
    "setup_failed",  # the set-up script of its environment failed, or took too long
    "agent_unknown",  # no adapter of that name
    "agent_not_installed",
    "agent_start_failed",  # the process ended before it was ready
    "agent_start_timeout",  # it never became ready
    "agent_refused",  # it answered the handshake with an error
    "agent_error",  # it reported that a turn failed
    "agent_crashed",  # the process ended in the middle
    "agent_silent",  # a turn without any message for too long
    "agent_unresponsive",  # it did not stop a turn that was cancelled
    "publish_failed",  # the work could not be brought to the repository
    "deadline",  # the run's wall clock ran out
    "oom",  # its programs needed more memory than they may use
    "disk",  # its files take more of the disk than they may
    "output",  # its agent wrote more than it may
    "budget_exceeded",  # it has spent on models what it may
    "follow_up_failed",  # a message could not be delivered
    "worker_lost",  # the workers that drove the run died, again and again
    "agent_lost",  # the agent was killed from outside, again and again
    "resume_failed",  # what was kept of the run could not be brought back
    "internal_error",  # a bug of ours
]

LIMITS: dict[str, tuple[ErrorType, str]] = {
    "oom": ("oom", "it ran out of the sandbox's memory (TASKYARD_SANDBOX__MEMORY_MB)"),
    "disk": ("disk", "the run's files take more disk than they may (TASKYARD_SANDBOX__DISK_MB)"),
    "output": ("output", "it wrote more than it may (TASKYARD_SANDBOX__OUTPUT_MB)"),
    "timeout": ("deadline", "its time was up"),
}
"""How a process ends that breaks a limit of its sandbox (provider.Reason): the failure, and half a sentence."""

INACTIVE = "Run timed out due to inactivity"
"""The contract's words (run-lifecycle §1.4)."""
TAIL = 1500
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class RunFailure(Exception):  # noqa: N818 - it is a run that fails, the program is fine
    """Ends the run as failed."""

    def __init__(self, error_type: ErrorType, message: str) -> None:
        super().__init__(message)
        self.error_type: ErrorType = error_type
        self.message = message


class AgentLost(Exception):  # noqa: N818 - the run goes on
    """The agent's process was killed from outside, or its sandbox is gone.

    counts: the run itself may be why, so it may happen `runs.max_attempts` times in a row only.
    """

    def __init__(self, message: str, *, counts: bool = True) -> None:
        super().__init__(message)
        self.message = message
        self.counts = counts


class Leave(Exception):  # noqa: N818 - the run goes on
    """The worker has to let go of the run for now: nothing is to do, or the worker stops."""


class Ended(Exception):  # noqa: N818 - not an error
    """A client ended the run; what is left is to clean up."""


class OutputGiven(Exception):  # noqa: N818 - not an error
    """A client gave the structured output: the run is to be completed."""


class BudgetSpent(Exception):  # noqa: N818 - an end as good as another
    """The run may make no more model calls."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def too_long(wall_clock_s: float) -> str:
    """The message of `deadline`."""
    return f"The run took longer than {wall_clock_s:g} seconds."


def with_tail(message: str, tail: str) -> str:
    """A message with the end of what a program wrote: the end is where the cause stands."""
    tail = tail.strip()
    if not tail:
        return message
    return f"{message}\n{tail if len(tail) <= TAIL else '…' + tail[-TAIL:]}"


def storable(value: Any) -> Any:
    """A JSON value without what PostgreSQL takes in no text: NUL and lone surrogates become U+FFFD."""
    match value:
        case str():
            return _UNSTORABLE.sub("\ufffd", value)
        case list() | tuple():
            return [storable(item) for item in value]
        case dict():
            return {storable(key): storable(item) for key, item in value.items()}
    return value
