"""Bodies of requests: parsed by Pydantic, refused in the words of the contract (tasks-api §1.2, §1.4)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from taskyard.errors import InvalidInputError, UnsupportedMediaTypeError

M = TypeVar("M", bound="Body")


class Body(BaseModel):
    """A JSON object: unknown fields are ignored, strings are trimmed at both ends.

    A field that is not `| None`, or has `NotNull`, refuses an explicit null.
    """

    model_config = ConfigDict(extra="ignore", str_strip_whitespace=True, frozen=True, use_enum_values=True)
    opaque: ClassVar[bool] = False
    """The values are kept as JSON text, so they may hold what the database's own types cannot."""

    def sent(self) -> dict[str, Any]:
        """The fields that the request named."""
        return {name: getattr(self, name) for name in self.model_fields_set}


def _text(value: Any) -> Any:
    """Numbers count as text, as the original's serializers have it; booleans do not."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value


def an_object(value: Any) -> Any:
    """A validator: anything but an object is refused."""
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "not an object")
    return value


def _not_blank(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise PydanticCustomError("blank", "This field may not be blank.")
    return value


def _not_null(value: Any) -> Any:
    if value is None:
        raise PydanticCustomError("null", "This field may not be null.")
    return value


NotNull = BeforeValidator(_not_null)
"""For a field whose None means "not sent": an explicit null is refused (tasks-api §4.8)."""
Text = Annotated[str, BeforeValidator(_text)]
"""A string that may be blank."""
Filled = Annotated[str, BeforeValidator(_not_blank), BeforeValidator(_text)]
"""A string that may not be blank."""
Title = Annotated[Text, StringConstraints(max_length=255)]
REPOSITORY_LENGTH = 255


def repository_name(value: str | None) -> str | None:
    """`organization/repository` in lower case; null and "" stay as they are (tasks-api §2.4)."""
    if not value:
        return value
    parts = value.split("/")
    if len(parts) != 2 or not all(parts):
        raise PydanticCustomError("repository", "Repository must be in the format organization/repository")
    lower = value.lower()
    if len(lower) > REPOSITORY_LENGTH:  # a few letters become two
        raise PydanticCustomError(
            "string_too_long", "too long in lower case", {"max_length": REPOSITORY_LENGTH}
        )
    return lower


def parse(model: type[M], content_type: str, raw: bytes) -> M:
    """The body of a request; an empty one counts as `{}`, whatever its content type says.

    Raises InvalidInputError with the first error, or UnsupportedMediaTypeError.
    """
    if not raw.strip():
        value: Any = {}
    else:
        kind = content_type.partition(";")[0].strip().lower()
        if kind and kind != "application/json" and not kind.endswith("+json"):
            raise UnsupportedMediaTypeError(f'Unsupported media type "{content_type}" in request.')
        try:
            value = DECODER.decode(raw.decode())
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(f"JSON parse error - {error}", code="parse_error") from error
    if not isinstance(value, dict):
        name = type(value).__name__
        raise InvalidInputError(f"Invalid data. Expected a dictionary, but got {name}.")
    if not model.opaque and _UNSTORABLE.search(raw):
        known = {name: value[name] for name in model.model_fields if name in value}
        try:
            check_storable(known)
        except (
            RecursionError
        ):  # Python 3.12 and later read what is nested deeper than their own functions reach
            raise InvalidInputError("JSON parse error - nested too deeply", code="parse_error") from None
    return _validated(model, value)


def parse_query(model: type[M], params: Mapping[str, str]) -> M:
    """The query parameters that a model knows; others are ignored. Raises InvalidInputError with the first error."""
    known = {name: params[name] for name in model.model_fields if name in params}
    check_storable(known)
    return _validated(model, known)


def _validated(model: type[M], value: dict[str, Any]) -> M:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise translate(error.errors(include_url=False)[0]) from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_no_constant)
"""Reads JSON as others send it: without NaN and Infinity, which Python would take."""
_UNSTORABLE = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")


def check_storable(value: Any, path: tuple[str, ...] = ()) -> None:
    """Refuse texts that PostgreSQL cannot hold: those with NUL, or with half of a surrogate pair."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_storable(key, path)
            check_storable(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            check_storable(item, (*path, str(number)))
    elif isinstance(value, str):
        if "\0" in value:
            detail = "Null characters are not allowed."
            raise InvalidInputError(detail, code="null_characters_not_allowed", attr="__".join(path) or None)
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise InvalidInputError("Not a valid string.", attr="__".join(path) or None)


_LENGTH = "Ensure this field has no more than {max_length} characters."
_SIMPLE = {
    "missing": ("required", "This field is required."),
    "string_too_long": ("max_length", _LENGTH),
    "bool_type": ("invalid_input", "Must be a valid boolean."),
    "bool_parsing": ("invalid_input", "Must be a valid boolean."),
    "int_type": ("invalid_input", "A valid integer is required."),
    "int_parsing": ("invalid_input", "A valid integer is required."),
    "int_from_float": ("invalid_input", "A valid integer is required."),
    "float_type": ("invalid_input", "A valid number is required."),
    "float_parsing": ("invalid_input", "A valid number is required."),
    "finite_number": ("invalid_input", "A valid number is required."),
    "uuid_type": ("invalid_input", "Must be a valid UUID."),
    "uuid_parsing": ("invalid_input", "Must be a valid UUID."),
    "string_type": ("invalid_input", "Not a valid string."),
    "greater_than": ("min_value", "Ensure this value is greater than {gt:g}."),
    "greater_than_equal": ("min_value", "Ensure this value is greater than or equal to {ge:g}."),
    "less_than_equal": ("max_value", "Ensure this value is less than or equal to {le:.15g}."),
    "too_short": ("empty", "This list may not be empty."),
    "too_long": ("max_length", "Ensure this field has no more than {max_length} elements."),
}


def translate(error: ErrorDetails) -> InvalidInputError:
    """One of Pydantic's errors as the contract says it; nested paths are joined by `__`."""
    attr = "__".join(str(part) for part in error["loc"]) or None
    kind, value = error["type"], error.get("input")
    got = type(value).__name__
    if value is None and kind != "missing":
        code, detail = "null", "This field may not be null."
    elif kind in ("enum", "literal_error"):
        code, detail = "invalid_choice", f'"{value}" is not a valid choice.'
    elif kind == "list_type":
        code, detail = "not_a_list", f'Expected a list of items but got type "{got}".'
    elif kind in ("dict_type", "model_type", "model_attributes_type"):
        code, detail = "not_a_dict", f'Expected a dictionary of items but got type "{got}".'
    elif kind in _SIMPLE:
        # A limit behind a validator of ours is reported in the general form, also for text and what counts as text.
        text = kind == "too_long" and isinstance(value, (str, int, float))
        code, detail = _SIMPLE["string_too_long" if text else kind]
        detail = detail.format(**error.get("ctx", {}))
    elif kind == "blank":
        code, detail = "blank", error["msg"]
    else:
        code, detail = "invalid_input", error["msg"].removeprefix("Value error, ")
    return InvalidInputError(detail, code=code, attr=attr)
