"""Host uids of sandboxes: never two with one."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from taskyard.errors import SetupError
from taskyard.sandbox import identities
from taskyard.sandbox.folder import Folder
from taskyard.sandbox.identities import UidRange, claim, release
from taskyard.sandbox.provider import SandboxError
from taskyard.settings.sandboxes import SandboxSettings
from tests.support.sandboxes import LIMITS

SMALL = UidRange(230000, 230004)


@pytest.fixture(autouse=True)
def claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "claims"
    monkeypatch.setattr(identities, "CLAIMS", folder)
    return folder


def folder(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    path.mkdir()
    return path


def test_the_default_range_is_one() -> None:
    assert UidRange.parse(SandboxSettings().uid_range) == UidRange(230000, 295535)


@pytest.mark.parametrize(
    "text", ["", "230000", "a-b", "230001-230000", "0-65535", "-1-5", "1000-4294967295", "1-2-3"]
)
def test_ranges_that_cannot_be(text: str) -> None:
    with pytest.raises(SetupError, match=r"uid_range.*TASKYARD_SANDBOX__UID_RANGE"):
        UidRange.parse(text)


def test_each_gets_another_until_none_is_left(tmp_path: Path) -> None:
    folders = [folder(tmp_path, str(number)) for number in range(5)]
    uids = [claim(SMALL, path) for path in folders]
    assert sorted(uids) == list(range(230000, 230005))
    with pytest.raises(SandboxError, match="all uids from 230000 to 230004 are in use"):
        claim(SMALL, folder(tmp_path, "more"))
    release(uids[2], folders[2])
    assert claim(SMALL, tmp_path / "more") == uids[2]
    release(uids[2], folders[2])  # not its own any more
    with pytest.raises(SandboxError):
        claim(SMALL, folder(tmp_path, "yet another"))


def test_claims_of_folders_that_are_gone_are_void(tmp_path: Path) -> None:
    for number in range(5):
        claim(SMALL, folder(tmp_path, str(number)))
    (tmp_path / "3").rmdir()
    assert claim(SMALL, folder(tmp_path, "new")) in range(230000, 230005)


def test_uids_that_records_name_are_skipped(tmp_path: Path) -> None:
    assert claim(SMALL, folder(tmp_path, "x"), taken=[230000, 230001, 230003, 230004]) == 230002


def test_users_of_the_host_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "_is_user", lambda uid: uid != 230003)
    assert claim(SMALL, folder(tmp_path, "x")) == 230003


def test_at_once(tmp_path: Path) -> None:
    uids = UidRange(230000, 230019)
    folders = [folder(tmp_path, str(number)) for number in range(20)]
    with ThreadPoolExecutor(20) as pool:
        assert len(set(pool.map(lambda path: claim(uids, path), folders))) == 20


@pytest.mark.skipif(os.geteuid() != 0, reason="gives folders away")
def test_a_restart_of_the_host_does_not_free_uids(tmp_path: Path, claims: Path) -> None:
    root = tmp_path / "sandboxes"
    made = [Folder.create(root / str(number), LIMITS, SMALL) for number in range(4)]
    for path in claims.iterdir():
        path.unlink()
    made.append(Folder.create(root / "last", LIMITS, SMALL))
    assert len({one.identity for one in made}) == 5
    with pytest.raises(SandboxError, match="in use"):
        Folder.create(root / "none", LIMITS, SMALL)
    assert not (root / "none").exists()
    for one in made:
        one.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives folders away")
def test_a_folder_claims_its_uid_again(tmp_path: Path, claims: Path) -> None:
    """Unless another data folder has got it since the restart: then it can be removed, but not used."""
    one = UidRange(230000, 230000)
    for root in ("a", "b"):
        Folder.create(tmp_path / root / "box", LIMITS, one).close()
        (claims / "230000").unlink()
    first = Folder.open(tmp_path / "a" / "box")
    assert first is not None
    assert first.limits == LIMITS
    assert identities.folders() == [first.path]
    second = Folder.open(tmp_path / "b" / "box")
    assert second is not None
    assert second.limits is None
    second.close()
    first.close()
    (tmp_path / "alias").symlink_to(tmp_path / "a")
    again = Folder.open(tmp_path / "alias" / "box")
    assert again is not None
    assert again.limits == LIMITS, "the same folder by another name"
    again.close()
