"""Bodies of the artifact endpoints (tasks-api §4.9, §4.10, §7)."""

from __future__ import annotations

import base64
import binascii
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, ValidationInfo
from pydantic_core import PydanticCustomError

from taskyard.artifacts.limits import size_problem
from taskyard.schemas import Body, Filled, Text

MAX_ITEMS = 1000


class ArtifactType(StrEnum):
    PLAN = "plan"
    CONTEXT = "context"
    REFERENCE = "reference"
    OUTPUT = "output"
    ARTIFACT = "artifact"
    TREE_SNAPSHOT = "tree_snapshot"
    USER_ATTACHMENT = "user_attachment"


class Encoding(StrEnum):
    UTF_8 = "utf-8"
    BASE64 = "base64"


def _some(items: list[Any]) -> list[Any]:
    if not items:
        raise PydanticCustomError("artifacts", "At least one artifact is required")
    return items


def _check_size(size: int, info: ValidationInfo) -> int:
    if size < 1:
        raise PydanticCustomError("greater_than_equal", "too small", {"ge": 1})
    _refuse_oversize(size, info)
    return size


def _refuse_oversize(size: int, info: ValidationInfo) -> None:
    item = info.data
    if {"name", "type", "content_type"} <= item.keys():
        problem = size_problem(item["name"], item["type"], item["content_type"], size)
        if problem is not None:
            raise PydanticCustomError("size", "{problem}", {"problem": problem})


def _content(value: Any, info: ValidationInfo) -> Any:
    """The bytes that a text stands for: its own, unless the item says base64."""
    if not isinstance(value, str):
        # Bytes cannot come from JSON: what is refused below is whatever else came.
        raise PydanticCustomError("string_type", "not a string")
    if info.data.get("content_encoding") != Encoding.BASE64:
        data = value.encode()
    else:
        try:
            data = base64.b64decode("".join(value.split()), validate=True)
        except (binascii.Error, ValueError):
            raise PydanticCustomError("base64", "Invalid base64 content") from None
    _refuse_oversize(len(data), info)
    return data


Name = Annotated[Filled, StringConstraints(max_length=255)]
Source = Annotated[Text, StringConstraints(max_length=64)]
ContentType = Annotated[Text, StringConstraints(max_length=255)]
StoragePath = Annotated[Filled, StringConstraints(max_length=500)]


class Item(Body):
    """What every artifact says of itself."""

    name: Name
    type: ArtifactType
    source: Source = ""
    content_type: ContentType = ""


class PrepareItem(Item):
    size: Annotated[int, AfterValidator(_check_size)]


class FinalizeItem(Item):
    id: Filled
    storage_path: StoragePath


class InlineItem(Item):
    content_encoding: Encoding = Encoding.UTF_8
    content: Annotated[bytes, BeforeValidator(_content)]


class Prepare(Body):
    """`prepare_upload/`."""

    artifacts: Annotated[list[PrepareItem], Field(max_length=MAX_ITEMS), AfterValidator(_some)]


class Finalize(Body):
    """`finalize_upload/`."""

    artifacts: Annotated[list[FinalizeItem], Field(max_length=MAX_ITEMS), AfterValidator(_some)]


class Inline(Body):
    """`POST R/artifacts/`."""

    artifacts: Annotated[list[InlineItem], Field(max_length=MAX_ITEMS), AfterValidator(_some)]


class ByPath(Body):
    """`presign/` and `download/`."""

    storage_path: StoragePath
