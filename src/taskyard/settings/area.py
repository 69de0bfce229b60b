"""What every group of settings is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Area(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
