"""Real git repositories for tests: made, changed and read with the git of this machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ENV = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.com",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.com",
}


def run_git(folder: Path, *args: str, data: bytes | None = None) -> str:
    """Standard output of git in `folder`, stripped; fails the test with git's message. data: standard input."""
    done = subprocess.run(["git", *args], cwd=folder, env=ENV, input=data, capture_output=True, check=False)
    assert done.returncode == 0, f"git {args}: {done.stderr.decode()}"
    return done.stdout.decode().strip()


def commit_file(folder: Path, name: str, text: str, message: str = "change") -> str:
    """Write one file, commit it, and return the commit id."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    run_git(folder, "add", "--all")
    run_git(folder, "commit", "--quiet", "--message", message)
    return run_git(folder, "rev-parse", "HEAD")


def make_repository(folder: Path, *, branch: str = "main", object_format: str = "sha1") -> Path:
    """A repository with a working tree and one commit on `branch`."""
    folder.mkdir(parents=True)
    run_git(folder, "init", "--quiet", f"--initial-branch={branch}", f"--object-format={object_format}")
    commit_file(folder, "README.md", "# Shop\n", "first")
    return folder


def make_bare(folder: Path, source: Path) -> Path:
    """A bare copy of `source`."""
    run_git(source, "clone", "--quiet", "--bare", str(source), str(folder))
    return folder


def heads(folder: Path) -> dict[str, str]:
    """Branches of a repository and their commits."""
    lines = run_git(
        folder, "for-each-ref", "--format=%(refname:lstrip=2) %(objectname)", "refs/heads"
    ).splitlines()
    return dict(line.split(" ", 1) for line in lines)
