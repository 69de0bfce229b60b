"""Programs as another user, with single paths bound (root only)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from taskyard.confine import Identity, confined, staged

NOBODY = Identity(65534, 65534)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def run(paths: list[Path], *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        confined(NOBODY, paths, argv),
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
        cwd="/",
        check=False,
    )


@needs_root
def test_sees_the_bound_paths_of_a_private_folder_and_nothing_else(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    (private / "folder").mkdir()
    (private / "folder" / "file").write_text("in folder")
    (private / "single").write_text("alone")
    done = run([private / "folder", private / "single"], "cat", f"{staged(0)}/file", staged(1))
    assert (done.returncode, done.stdout) == (0, "in folderalone")
    refused = run([private / "folder"], "cat", str(private / "single"))
    assert "Permission denied" in refused.stderr
    assert private.stat().st_mode & 0o777 == 0o700
    assert not list(Path("/mnt").glob("[0-9]*"))


@needs_root
def test_has_no_privileges_left(tmp_path: Path) -> None:
    done = run([tmp_path], "cat", "/proc/self/status")
    fields = dict(line.split(":\t", 1) for line in done.stdout.splitlines())
    assert set(fields["Uid"].split()) == set(fields["Gid"].split()) == {"65534"}
    assert (fields["CapEff"], fields["CapBnd"], fields["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
    assert fields["Groups"].strip() == ""


@needs_root
def test_a_path_below_the_stage_itself(tmp_path: Path) -> None:
    # In a mount namespace of the test's own, so that nothing is put into the real /mnt.
    script = 'mount -t tmpfs test /mnt && mkdir /mnt/data && echo kept > /mnt/data/file && shift && exec "$@"'
    (tmp_path / "probe").mkdir()
    argv = confined(NOBODY, [tmp_path / "probe"], ["cat", f"{staged(0)}/file"])
    argv[argv.index(str(tmp_path / "probe"))] = "/mnt/data"
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", "x", *argv],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "kept\n"), done.stderr


@needs_root
def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        confined(NOBODY, [tmp_path / "gone"], ["true"])


@pytest.mark.skipif(os.geteuid() == 0, reason="for a server that is not root")
def test_only_for_root(tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        confined(NOBODY, [tmp_path], ["true"])
