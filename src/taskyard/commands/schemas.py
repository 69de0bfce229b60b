"""Body of `POST R/command/` (tasks-api §6.6)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from taskyard.errors import InvalidInputError
from taskyard.schemas import Body, NotNull, an_object


class Method(StrEnum):
    USER_MESSAGE = "user_message"
    CANCEL = "cancel"
    CLOSE = "close"
    PERMISSION_RESPONSE = "permission_response"
    SET_CONFIG_OPTION = "set_config_option"
    STEER = "steer"
    """An addition: a message that interrupts the turn and is next."""


MESSAGES = frozenset({Method.USER_MESSAGE, Method.STEER})
"""These are queued and answered at once; the agent answers the others."""


def _id(value: Any) -> Any:
    if value is None or (isinstance(value, (str, int, float)) and not isinstance(value, bool)):
        return value
    raise PydanticCustomError("id", "id must be a string or number")


class Command(Body):
    jsonrpc: Literal["2.0"]
    method: Method = Field(
        description="`user_message` comes after the turn that goes on. `steer` is a message, too: it interrupts that"
        " turn and comes before the messages that wait."
    )
    params: Annotated[dict[str, Any] | None, BeforeValidator(an_object), NotNull] = Field(
        default=None,
        description="For messages `content` (a text), `artifact_ids` (of the run), or both; for `permission_response`"
        " `requestId` and `optionId`; for `set_config_option` `configId` and `value`.",
    )
    id: Annotated[Any, AfterValidator(_id)] = None


def check_params(command: Command) -> dict[str, Any]:
    """The parameters of a command, trimmed and checked for its method; attr `params` when wrong."""
    params = dict(command.params or {})
    if command.method in MESSAGES:
        return _message(command.method, params)
    if command.method == Method.PERMISSION_RESPONSE:
        # Mobile clients name the tool call instead of the request.
        _require(params, "requestId" if "toolCallId" not in params else "toolCallId", "optionId")
    elif command.method == Method.SET_CONFIG_OPTION:
        _require(params, "configId", "value")
    return params


def _message(method: str, params: dict[str, Any]) -> dict[str, Any]:
    """What counts of a message's parameters; the driver trusts everything else that stands beside it."""
    content, ids = params.get("content"), params.get("artifact_ids")
    if content is not None and not isinstance(content, str):
        raise InvalidInputError("content must be a string when provided", attr="params")
    if ids is not None and not (
        isinstance(ids, list) and all(isinstance(item, str) and item.strip() for item in ids)
    ):
        raise InvalidInputError("artifact_ids must be a list of non-empty strings", attr="params")
    text = (content or "").strip()
    if not text and not ids:
        detail = f"{method} requires a non-empty content string, artifact_ids, or both"
        raise InvalidInputError(detail, attr="params")
    return {"content": text, "artifact_ids": ids or []}


def _require(params: dict[str, Any], *names: str) -> None:
    for name in names:
        value = params.get(name)
        if not isinstance(value, str) or not value.strip():
            raise InvalidInputError(f"{name} is required and must be a non-empty string", attr="params")
