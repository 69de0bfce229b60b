"""Installing the agents that come from npm, at the exact versions this release was tested with.

Each version has a folder of its own, `agents/<name>-<version>` in the data folder, made beside it and
renamed into place, so that it is there whole or not at all and running agents keep the old one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from taskyard.agents.adapters import Adapter, Package
from taskyard.errors import SetupError

NODE_MAJOR = 20
INSTALL_S = 1800.0


@dataclass(frozen=True)
class InstallInfo:
    """What `taskyard agents list` shows. Without a package the command is the whole program."""

    name: str
    title: str
    package: str | None
    version: str | None
    size_mb: int
    licence: str
    installed: bool
    folder: Path | None
    pins: tuple[str, ...]
    floating: str
    """Dependencies that npm resolves anew at each install."""


def describe(adapter: Adapter) -> InstallInfo:
    """What would be, or is, installed for an adapter. Sizes in MB on disk."""
    package = adapter.package
    return InstallInfo(
        name=adapter.name,
        title=adapter.title,
        package=package.npm if package else None,
        version=package.version if package else None,
        size_mb=package.size_mb if package else 0,
        licence=package.licence if package else "",
        installed=adapter.installed,
        folder=adapter.folder,
        pins=package.pins if package else (),
        floating=package.floating if package else "",
    )


def install(adapter: Adapter) -> InstallInfo:
    """Install an adapter's package; returns at once if it is there. Blocks for seconds to minutes.

    Uses the user's npm and its configuration. Raises SetupError: nothing to install, no node or npm, node
    too old, npm failed (with what it said).
    """
    package, folder = adapter.package, adapter.folder
    if package is None or folder is None:
        raise SetupError(
            f"There is nothing to install for the agent '{adapter.name}': it runs {' '.join(adapter.command)}"
        )
    if adapter.installed:
        return describe(adapter)
    npm = check_node()
    folder.parent.mkdir(parents=True, exist_ok=True)
    free_mb = shutil.disk_usage(folder.parent).free // 1_000_000
    if free_mb < 2 * package.size_mb:
        raise SetupError(
            f"Installing '{adapter.name}' takes up to {2 * package.size_mb} MB while it runs, and {folder.parent} "
            f"has {free_mb} MB left. Free some space or set TASKYARD_DATA_DIR to a larger disk."
        )
    with tempfile.TemporaryDirectory(prefix=f".{adapter.name}-", dir=folder.parent) as scratch:
        place = Path(scratch) / "new"
        place.mkdir()
        _npm_install(npm, package, place)
        shutil.rmtree(folder, ignore_errors=True)  # a broken earlier one, else `installed` were true
        place.rename(folder)
    return describe(adapter)


def check_node() -> str:
    """The path of npm. Raises SetupError when node or npm is missing or node is too old."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        missing = "node" if node is None else "npm"
        raise SetupError(
            f"'{missing}' was not found on PATH. Claude Code and Codex need Node.js {NODE_MAJOR} or newer with npm "
            "(Debian, Ubuntu: apt install nodejs npm; macOS: brew install node)."
        )
    answer = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=60, check=False)
    version = answer.stdout.strip()
    major = re.match(r"v(\d+)\.", version)
    if major is None or int(major[1]) < NODE_MAJOR:
        raise SetupError(
            f"{node} is Node.js {version or '(it does not say which version)'}; the agents need {NODE_MAJOR} or newer."
        )
    return npm


def _npm_install(npm: str, package: Package, place: Path) -> None:
    (place / "package.json").write_text(json.dumps({"private": True}), "utf-8")
    wanted = [f"{package.npm}@{package.version}", *package.pins]
    flags = ["--no-audit", "--no-fund", "--save-exact", "--engine-strict=false", "--loglevel=error"]
    try:
        answer = subprocess.run(
            [npm, "install", *flags, *wanted],
            cwd=place,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=INSTALL_S,
            umask=0o022,  # agents run as other users
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SetupError(f"npm did not finish installing {wanted[0]} within {INSTALL_S:g} s.") from None
    if answer.returncode != 0:
        said = "\n".join((answer.stderr or answer.stdout).strip().splitlines()[-15:])
        raise SetupError(f"npm could not install {' '.join(wanted)} (exit {answer.returncode}):\n{said}")
    _check_versions(wanted, package, place)
    place.chmod(0o755)


def _check_versions(wanted: list[str], package: Package, place: Path) -> None:
    """npm is known to pick other versions silently; what was tested is what must be there."""
    for name, _, version in (item.rpartition("@") for item in wanted):
        manifest = place / "node_modules" / name / "package.json"
        found = json.loads(manifest.read_text("utf-8"))["version"] if manifest.is_file() else "nothing"
        if found != version:
            raise SetupError(f"npm was asked for {name} {version} and installed {found}.")
    entry = place / "node_modules" / package.npm / package.entry
    if not os.access(entry, os.R_OK):
        raise SetupError(f"{package.npm} {package.version} has no {package.entry}: the download is broken.")


def remove_unfinished(data_dir: Path) -> None:
    """Remove what installations left that were killed; none takes longer than twice INSTALL_S."""
    for scratch in (data_dir / "agents").glob(".*-*"):
        with suppress(FileNotFoundError):
            if scratch.stat().st_mtime < time.time() - 2 * INSTALL_S:
                shutil.rmtree(scratch, ignore_errors=True)
