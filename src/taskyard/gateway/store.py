"""SQL of the calls of models."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from taskyard.db.engine import Database
from taskyard.gateway.usage import ModelCall, Usage


async def add(database: Database, run_id: UUID, project_id: int, calls: Sequence[ModelCall]) -> None:
    """Keep calls that have ended, oldest first."""
    async with database.transaction() as connection, connection.cursor() as cursor:
        await cursor.executemany(
            "INSERT INTO model_calls (run_id, project_id, provider, endpoint, model, status, complete, metered,"
            " input_tokens, output_tokens, cached_read_tokens, cached_write_tokens, cost, milliseconds)"
            " VALUES (%(run)s, %(project)s, %(provider)s, %(endpoint)s, %(model)s, %(status)s, %(complete)s,"
            " %(metered)s, %(input)s, %(output)s, %(read)s, %(write)s, %(cost)s, %(milliseconds)s)",
            [
                {
                    "run": run_id,
                    "project": project_id,
                    "provider": call.provider,
                    "endpoint": call.endpoint,
                    "model": None if call.model is None else call.model.replace("\0", "\ufffd")[:200],
                    "status": call.status,
                    "complete": call.complete,
                    "metered": call.metered,
                    "input": min(call.input_tokens, _MOST),
                    "output": min(call.output_tokens, _MOST),
                    "read": min(call.cached_read_tokens, _MOST),
                    "write": min(call.cached_write_tokens, _MOST),
                    "cost": None if call.cost is None else min(call.cost, 1e9),
                    "milliseconds": min(int(call.seconds * 1000), 2**31 - 1),
                }
                for call in calls
            ],
        )


_MOST = 10**15
"""Numbers come from an upstream, which may say anything."""


async def usage_of(database: Database, run_id: UUID) -> Usage:
    """What the calls of a run have used, in all and by model."""
    rows = await database.fetch(
        "SELECT model, count(*)::int AS calls, sum(input_tokens)::bigint AS input_tokens,"
        " sum(output_tokens)::bigint AS output_tokens, sum(cached_read_tokens)::bigint AS cached_read_tokens,"
        " sum(cached_write_tokens)::bigint AS cached_write_tokens, coalesce(sum(cost), 0)::float AS cost,"
        " count(*) FILTER (WHERE cost IS NULL AND input_tokens + output_tokens + cached_read_tokens"
        " + cached_write_tokens > 0)::int AS unpriced_calls"
        " FROM model_calls WHERE run_id = %(run)s GROUP BY model ORDER BY min(id)",
        run=run_id,
    )
    usage = Usage()
    for row in rows:
        model, part = row.pop("model"), Usage(**row)
        usage.merge(part)
        usage.add_model(model, part)
    return usage


async def project_cost_this_month(database: Database, project_id: int) -> float:
    """US dollars, since the first of the month (UTC)."""
    row = await database.fetch_one(
        "SELECT coalesce(sum(cost), 0)::float AS cost FROM model_calls WHERE project_id = %(project)s"
        " AND ended_at >= date_trunc('month', clock_timestamp(), 'UTC')",
        project=project_id,
    )
    assert row is not None
    return float(row["cost"])
