"""What is said about a machine that cannot run sandboxes, and the self-test."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from taskyard.errors import SetupError
from taskyard.sandbox import image_checks, launch, policy, selftest
from taskyard.sandbox.bubblewrap import BubblewrapProvider
from taskyard.sandbox.provider import Limits, SandboxError, Spec
from taskyard.settings import Settings
from taskyard.settings.sandboxes import SandboxSettings
from tests.support.sandboxes import Hut

SPEC = Spec("one", Limits(1, 64, 16, 16))


@pytest.fixture
def fake_bwrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a bwrap of one's own in front of the real one."""

    def put(script: str) -> None:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / "bwrap").chmod(0o755)
        tmp_path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    return put


async def test_all_is_well(hut: Hut) -> None:
    problems = await hut.provider.check()
    assert [problem for problem in problems if problem.fatal] == []
    assert [problem.name for problem in problems] == [
        "bubblewrap", "sandbox programs", "sandbox users", "sandbox limits", "sandbox start",
    ]  # fmt: skip
    assert await hut.provider.list() == []


async def test_no_bwrap(hut: Hut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    problems = await hut.provider.check()
    fatal = {problem.name: problem for problem in problems if problem.fatal}
    assert "apt-get install bubblewrap" in fatal["bubblewrap"].remedy
    assert "util-linux" in fatal["sandbox programs"].remedy
    assert "sandbox start" not in {problem.name for problem in problems}
    with pytest.raises(SetupError, match="apt-get install bubblewrap"):
        await hut.provider.create(SPEC)


@pytest.mark.parametrize("version", ["bubblewrap 0.11.0", "bubblewrap 0.9.12", "something"])
async def test_old_bwrap(hut: Hut, fake_bwrap: Callable[[str], None], version: str) -> None:
    fake_bwrap(f"echo {version}")
    with pytest.raises(SetupError, match=r"Install bubblewrap 0\.12\.0 or newer"):
        await hut.provider.create(SPEC)


async def test_newer_bwrap_that_cannot_start(hut: Hut, fake_bwrap: Callable[[str], None]) -> None:
    fake_bwrap(
        'if [ "$1" = --version ]; then echo bubblewrap 1.0.0; else echo "no namespaces" >&2; exit 1; fi'
    )
    problem = (await hut.provider.check())[-1]
    assert (problem.name, problem.ok, problem.fatal) == ("sandbox start", False, True)
    assert "no namespaces" in problem.detail
    assert problem.remedy
    assert await hut.provider.list() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root needs uids")
@pytest.mark.parametrize("uid_range", ["", "0-10", "nonsense"])
async def test_root_without_uids(tmp_path: Path, uid_range: str) -> None:
    settings = Settings(_env_file=None, data_dir=tmp_path, sandbox=SandboxSettings(uid_range=uid_range))
    provider = BubblewrapProvider(settings)
    with pytest.raises(SetupError, match="TASKYARD_SANDBOX__UID_RANGE"):
        await provider.create(SPEC)
    problems = {problem.name: problem for problem in await provider.check()}
    assert problems["sandbox users"].fatal
    assert not (tmp_path / "sandboxes").exists()


async def test_selftest(hut: Hut) -> None:
    problems = await selftest.selftest(hut.provider)
    assert [(problem.name, problem.ok) for problem in problems] == [
        ("sandbox: kernel settings", True),
        ("sandbox: server environment", True),
        ("sandbox: open descriptors", True),
    ], problems
    assert await hut.provider.list() == []
    assert not any(name.startswith("TASKYARD_SELFTEST") for name in os.environ)


async def test_selftest_takes_no_flood(hut: Hut, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "KERNEL_SETTINGS", "head -c 10000000 /dev/zero")
    [problem] = await selftest.selftest(hut.provider)
    assert problem.fatal
    assert "says more than 65536 bytes" in problem.detail


async def test_what_an_image_says(hut: Hut, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = await hut.sandbox()
    assert await image_checks.said(sandbox, "echo", "fine") == "fine\n"
    with pytest.raises(SandboxError, match="says more than 65536 bytes"):
        await image_checks.said(sandbox, "head", "-c", "10000000", "/dev/zero")
    monkeypatch.setattr(image_checks, "DEADLINE_S", 0.2)
    with pytest.raises(SandboxError, match="a command in a sandbox"):
        await image_checks.said(sandbox, "sleep", "600")


async def test_selftest_notices_a_leaking_environment(hut: Hut, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        policy,
        "_environment",
        lambda env: [w for n, v in {**os.environ, **env}.items() for w in ("--setenv", n, v)],
    )
    problems = {problem.name: problem for problem in await selftest.selftest(hut.provider)}
    assert problems["sandbox: server environment"].fatal
    assert "TASKYARD_SELFTEST_" in problems["sandbox: server environment"].detail
    assert problems["sandbox: kernel settings"].ok


async def test_selftest_notices_an_open_descriptor(hut: Hut, monkeypatch: pytest.MonkeyPatch) -> None:
    original = launch.command_line

    def leaking(*arguments: object) -> list[str]:
        handed = next(one for one in arguments if isinstance(one, policy.Handed))
        handed.add(os.dup(0))
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("taskyard.sandbox.bubblewrap.command_line", leaking)
    problems = {problem.name: problem for problem in await selftest.selftest(hut.provider)}
    assert problems["sandbox: open descriptors"].fatal
