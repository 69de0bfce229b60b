"""Logging: one structured line an event, on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog

from taskyard.redact import LOGS


def configure_logging(level: str, style: Literal["console", "json"]) -> None:
    """Set up structlog, and bring the libraries' loggers to the same output at `warning`."""
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if style == "json"
        # The plain form: the rich one prints the variables of every frame, and with them keys.
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )

    def redacted(logger: object, name: str, event: structlog.typing.EventDict) -> str:
        return LOGS.text(str(renderer(logger, name, event)))

    if style == "console":
        shared.pop()  # the console renderer prints exceptions itself
    structlog.configure(
        processors=[*shared, redacted],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=redacted, foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)
