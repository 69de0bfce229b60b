"""How users, projects, organizations and keys look on the wire (tasks-api §12, real-clients §6, §8)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from taskyard.db.engine import Row

Json = dict[str, Any]

LEVELS = {"member": 1, "admin": 8}
"""Roles as clients know them: numbers that can be compared."""


def timestamp(value: datetime | str | None) -> str | None:
    """ISO 8601 in UTC with microseconds and `Z` (tasks-api §1.2). Text comes from rows that were made JSON."""
    if value is None:
        return None
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    if moment.utcoffset():  # connections ask for UTC, so this is rare
        moment = moment.astimezone(UTC)
    return moment.isoformat(timespec="microseconds")[:26] + "Z"


def moment(value: datetime | str | None) -> datetime | str | None:
    """The same for the encoder of answers, which writes most times itself, at a tenth of the cost."""
    if isinstance(value, datetime) and value.microsecond and value.tzinfo is UTC:
        return value
    return timestamp(value)


def project(row: Row) -> Json:
    """A project; clients of the old days call it a team."""
    return {
        "id": row["id"],
        "uuid": str(row["uuid"]),
        "organization": str(row["organization_id"]),
        "project_id": row["id"],
        "name": row["name"],
        "created_at": timestamp(row["created_at"]),
        "timezone": "UTC",
        "is_demo": False,
        "effective_membership_level": LEVELS[row["role"]],
    }


def organizations(projects: Sequence[Row]) -> list[Json]:
    """The organizations of these projects, oldest first, each with its projects."""
    found: dict[str, list[Row]] = {}
    for row in sorted(projects, key=lambda row: row["organization_created_at"]):
        found.setdefault(str(row["organization_id"]), []).append(row)
    return [_organization(rows) for rows in found.values()]


def _organization(rows: Sequence[Row]) -> Json:
    shown = [project(row) for row in rows]
    first = rows[0]
    return {
        **brief(first),
        "created_at": timestamp(first["organization_created_at"]),
        "membership_level": max(LEVELS[row["role"]] for row in rows),
        "teams": shown,
        "projects": shown,
    }


def brief(row: Row) -> Json:
    name = row["organization_name"]
    return {
        "id": str(row["organization_id"]),
        "name": name,
        "slug": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "logo_media_id": None,
    }


def me(user: Row, projects: Sequence[Row], current: int | None) -> Json:
    """The caller with the current project (`team`) and its organization, each null when there is none."""
    row = next((row for row in projects if row["id"] == current), None)
    all_of_them = organizations(projects)
    own = None if row is None else str(row["organization_id"])
    basic = user_basic({**user, "user_id": user["id"], "user_uuid": user["uuid"]})
    assert basic is not None
    return {
        **basic,
        "is_staff": user["is_staff"],
        "date_joined": timestamp(user["created_at"]),
        "has_password": user["password_hash"] is not None,
        "team": None if row is None else project(row),
        "organization": next((entry for entry in all_of_them if entry["id"] == own), None),
        "organizations": [
            {key: entry[key] for key in ("id", "name", "slug", "logo_media_id", "membership_level")}
            for entry in all_of_them
        ],
    }


def user_basic(row: Row) -> Json | None:
    """A UserBasic, of a row with `user_id`, `user_uuid` and the columns of users; None without a user."""
    if row["user_id"] is None:
        return None
    return {
        "id": row["user_id"],
        "uuid": str(row["user_uuid"]),
        "distinct_id": row["distinct_id"],
        "first_name": row["first_name"],
        "last_name": row["last_name"],
        "email": row["email"],
        "is_email_verified": None,
        "hedgehog_config": None,
        "role_at_organization": None,
    }


def member(row: Row) -> Json:
    """Somebody who belongs to a project or an organization; clients know the level."""
    user = user_basic(row)
    assert user is not None
    return {
        "id": user["uuid"],
        "user": user,
        "role": row["role"],
        "level": LEVELS[row["role"]],
        "joined_at": timestamp(row["joined_at"]),
        "updated_at": timestamp(row["updated_at"]),
    }


def api_key(row: Row, value: str | None = None) -> Json:
    """A personal API key; `value` is there only when it was just made."""
    shown = {
        "id": str(row["id"]),
        "label": row["label"],
        "value": value,
        "mask_value": row["mask"],
        "user_id": row["user_id"],
        "scopes": row["scopes"],
        "scoped_teams": row["project_ids"],
        "scoped_organizations": None
        if row["organization_ids"] is None
        else [str(entry) for entry in row["organization_ids"]],
        "created_at": timestamp(row["created_at"]),
        "last_used_at": timestamp(row["last_used_at"]),
        "last_rolled_at": None,
        "expires_at": timestamp(row["expires_at"]),
    }
    if value is None:
        del shown["value"]
    return shown
