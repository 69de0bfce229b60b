"""What the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "README.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_promise_has_its_test() -> None:
    named = re.findall(r"`(tests/\S+?)::(\w+)`", (ROOT / "docs" / "security.md").read_text())
    assert len(named) > 20
    for path, name in named:
        file = ROOT / path
        assert file.exists(), path
        assert re.search(rf"^\s*(async )?def {name}\(", file.read_text(), re.MULTILINE), f"{path}::{name}"
