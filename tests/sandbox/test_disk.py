"""The watch over the disk limit, where it cannot measure; that it does what it should is in test_contract.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from taskyard.sandbox import disk
from taskyard.sandbox.disk import DiskWatch
from taskyard.sandbox.provider import AwayError, LostError, SandboxError
from tests.support.sandboxes import LIMITS, Hut, first_line

SMALL = replace(LIMITS, disk_mb=64)
LASTING = ["sh", "-c", "echo on; exec sleep 600"]


@pytest.fixture
def impatient(hut: Hut, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks all the time."""
    monkeypatch.setattr(disk, "LOOK_S", 0.01)
    monkeypatch.setattr(disk, "RETRY_S", 0.01)
    hut.provider._disk = DiskWatch(hut.provider.root, rest_s=0.01)


@pytest.mark.usefixtures("impatient")
async def test_one_that_cannot_be_measured_is_ended(hut: Hut, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_MEASURE", "echo no number")
    sandbox = await hut.sandbox(limits=SMALL)
    process = await sandbox.exec(LASTING)
    async with asyncio.timeout(60):
        end = await process.wait()
    assert end.reason == "disk"
    assert "could not be measured 3 times in a row" in end.stderr_tail


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "failure",
    [
        lambda count: AwayError("the engine is away"),
        lambda count: LostError("the pod is gone"),
        lambda count: None if count % 3 == 0 else SandboxError("a busy machine"),
    ],
    ids=["no engine", "no sandbox", "now and then"],
)
async def test_failures_that_are_not_its_own(
    hut: Hut, monkeypatch: pytest.MonkeyPatch, failure: Callable[[int], Exception | None]
) -> None:
    count = 0
    enough = asyncio.Event()

    async def measure(_: object) -> int:
        nonlocal count
        count += 1
        if count > 10:
            enough.set()
        if (error := failure(count)) is not None:
            raise error
        return 0

    monkeypatch.setattr(disk, "measure", measure)
    sandbox = await hut.sandbox(limits=SMALL)
    process = await sandbox.exec(["cat"], stdin=True)
    async with asyncio.timeout(60):
        await enough.wait()
    assert process.stdin is not None
    process.stdin.write(b"alive\n")
    assert await first_line(process) == "alive"


@pytest.mark.usefixtures("impatient")
async def test_one_that_holds_its_measurement_up_delays_no_other(
    hut: Hut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_MEASURE", '[ ! -e "$1/slow" ] || exec sleep 600; echo 90000; echo 1')
    slow = await hut.sandbox("slow", SMALL)
    going = await slow.exec(["sh", "-c", "touch slow; echo on; exec sleep 600"])
    assert await first_line(going) == "on"
    full = await hut.sandbox("full", SMALL)
    process = await full.exec(LASTING)
    async with asyncio.timeout(disk.MEASURE_S / 2):
        end = await process.wait()
    assert end.reason == "disk"
    assert "it holds 87 MB of 64 MB" in end.stderr_tail


async def test_a_measurement_that_says_too_much(hut: Hut, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_MEASURE", "head -c 10000000 /dev/zero")
    sandbox = await hut.sandbox()
    with pytest.raises(SandboxError, match="says more than 4096 bytes"):
        await disk.measure(sandbox)
