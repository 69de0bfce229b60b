"""Whether the disk of this worker is full: then it is not the run that has failed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_SAID = (os.strerror(28), "failed to write new configuration file", "unable to write new index file")
"""How programs say it, git above all."""
_NOTHING = 2**20


def no_space(data_dir: Path, said: str) -> bool:
    """Whether something failed for want of space: by its words, or because there is none left."""
    return any(words in said for words in _SAID) or free_bytes(data_dir) < _NOTHING


def free_bytes(folder: Path) -> int:
    """Bytes that are free where a folder is."""
    return shutil.disk_usage(folder).free
