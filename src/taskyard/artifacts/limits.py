"""How large an artifact may be (tasks-api §4.9)."""

from __future__ import annotations

MIB = 1 << 20
MAX_BYTES = 30 * MIB
MAX_PDF_BYTES = 10 * MIB
FORM_SLACK_BYTES = 64 * 1024
"""A form takes this much more than was announced."""


def limit_of(name: str, kind: str, content_type: str) -> int:
    """Bytes that an artifact may have: fewer when it is a PDF that an agent is to read."""
    is_pdf = _named_pdf(name) or content_type.partition(";")[0].strip().lower() == "application/pdf"
    return MAX_PDF_BYTES if kind == "user_attachment" and is_pdf else MAX_BYTES


def size_problem(name: str, kind: str, content_type: str, size: int) -> str | None:
    """What is wrong with an artifact of `size` bytes."""
    limit = limit_of(name, kind, content_type)
    if size <= limit:
        return None
    if limit == MAX_PDF_BYTES and _named_pdf(name):
        return f"{name} exceeds the 10MB attachment limit for PDFs in cloud runs"
    return f"{name} exceeds the 30MB attachment limit"


def _named_pdf(name: str) -> bool:
    return name.lower().endswith(".pdf")
