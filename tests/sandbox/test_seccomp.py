"""The filter, run by a small interpreter of classic BPF, for both architectures."""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Callable
from typing import Any

import pytest

from taskyard.errors import SetupError
from taskyard.sandbox.seccomp import ARCHITECTURES, profile, program

ALLOW, KILL = 0x7FFF0000, 0x80000000
MACHINES = sorted(ARCHITECTURES)


def errno_of(number: int) -> int:
    return 0x00050000 | number


def decide(code: bytes, arch: int, number: int, *arguments: int) -> int:
    """What the kernel would answer to a system call."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *[*arguments, 0, 0, 0, 0, 0, 0][:6])
    instructions = list(struct.iter_unpack("<HBBI", code))
    loaded, at = 0, 0
    while True:
        operation, if_true, if_false, value = instructions[at]
        at += 1
        if operation == 0x20:
            loaded = struct.unpack_from("<I", data, value)[0]
        elif operation == 0x06:
            return int(value)
        else:
            holds = {0x15: loaded == value, 0x35: loaded >= value, 0x45: bool(loaded & value)}[operation]
            at += if_true if holds else if_false


@pytest.mark.parametrize("machine", MACHINES)
def test_shape(machine: str) -> None:
    code = program(machine)
    assert len(code) % 8 == 0
    assert len(code) // 8 <= 4096  # BPF_MAXINSNS
    for at, (operation, if_true, if_false, _) in enumerate(struct.iter_unpack("<HBBI", code)):
        if operation in {0x15, 0x35, 0x45}:
            assert at + 1 + max(if_true, if_false) < len(code) // 8


@pytest.mark.parametrize("machine", MACHINES)
def test_decisions(machine: str) -> None:
    code, arch = program(machine), ARCHITECTURES[machine]

    def ask(number: int, *arguments: int) -> int:
        return decide(code, arch.audit, number, *arguments)

    for name, number in arch.refused.items():
        assert ask(number) == errno_of(errno.EPERM), name
    assert ask(arch.clone3) == errno_of(errno.ENOSYS)
    # A thread and a process as glibc makes them.
    assert ask(arch.clone, 0x3D0F00) == ALLOW
    assert ask(arch.clone, 0x1200011) == ALLOW
    for namespace in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert ask(arch.clone, namespace | 17) == errno_of(errno.EPERM)
    for call in (arch.socket, arch.socketpair):
        allowed = {family for family in range(64) if ask(call, family, 1) == ALLOW}
        assert allowed == {1, 2, 10, 16}
        assert ask(call, 40, 1) == errno_of(errno.EAFNOSUPPORT)
        assert ask(call, (7 << 32) | 40) == errno_of(errno.EAFNOSUPPORT)  # the kernel takes an int
    assert ask(arch.ioctl, 0, 0x5412) == errno_of(errno.EPERM)
    assert ask(arch.ioctl, 0, 0x541C) == errno_of(errno.EPERM)
    assert ask(arch.ioctl, 0, (1 << 32) | 0x5412) == errno_of(errno.EPERM)
    assert ask(arch.ioctl, 0, 0x5401) == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_other_calls_pass(machine: str) -> None:
    code, arch = program(machine), ARCHITECTURES[machine]
    special = {arch.clone3, arch.socket, arch.socketpair, *arch.refused.values()}
    for number in set(range(500)) - special:
        assert decide(code, arch.audit, number) == ALLOW, number


def test_other_architectures_are_killed() -> None:
    i386, x86_64, aarch64 = 0x40000003, 0xC000003E, 0xC00000B7
    assert decide(program("x86_64"), i386, 1) == KILL
    assert decide(program("x86_64"), aarch64, 1) == KILL
    assert decide(program("aarch64"), x86_64, 1) == KILL
    assert decide(program("x86_64"), x86_64, 0x40000000 | 41, 40) == errno_of(errno.EPERM)  # x32


def test_unknown_machine() -> None:
    with pytest.raises(SetupError, match="riscv64"):
        program("riscv64")


@pytest.mark.parametrize("machine", MACHINES)
def test_numbers_are_those_of_libseccomp(machine: str) -> None:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("libseccomp is not installed")
    arch = ARCHITECTURES[machine]
    numbers = {
        "clone": arch.clone, "clone3": arch.clone3, "ioctl": arch.ioctl, "socket": arch.socket,
        "socketpair": arch.socketpair, **arch.refused,
    }  # fmt: skip
    resolve = library.seccomp_syscall_resolve_name_arch
    known = {name: resolve(ctypes.c_uint32(arch.audit), name.encode()) for name in numbers}
    newer = {name for name, number in known.items() if number == -1}
    assert newer <= {"open_tree_attr"}
    assert {name: known[name] for name in numbers if name not in newer} == {
        name: number for name, number in numbers.items() if name not in newer
    }


def decide_by_name(rules: dict[str, Any], name: str, *arguments: int) -> int:
    """What a container engine would have the kernel answer."""
    holds: dict[str, Callable[[int, int, int], bool]] = {
        "SCMP_CMP_MASKED_EQ": lambda found, value, second: found & value == second,
        "SCMP_CMP_GT": lambda found, value, _: found > value,
    }
    for rule in rules["syscalls"]:
        conditions = rule.get("args", [])
        if name in rule["names"] and all(
            holds[each["op"]](arguments[each["index"]], each["value"], each["valueTwo"])
            for each in conditions
        ):
            assert rule["action"] == "SCMP_ACT_ERRNO"
            return errno_of(rule["errnoRet"])
    assert rules["defaultAction"] == "SCMP_ACT_ALLOW"
    return ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_the_profile_decides_as_the_program(machine: str) -> None:
    code, arch, rules = program(machine), ARCHITECTURES[machine], profile()
    names = {"clone": arch.clone, "clone3": arch.clone3, "ioctl": arch.ioctl}
    names |= {"socket": arch.socket, "socketpair": arch.socketpair, **arch.refused}
    names["read"] = 63 if machine == "aarch64" else 0
    flags = [0, 17, 0x3D0F00, 0x1200011, *(1 << bit for bit in range(32))]
    firsts = [*flags, *range(64), 0xFFFFFFFF, (7 << 32) | 40, *((3 << 32) | flag for flag in flags)]
    seconds = [0, 0x5401, 0x5412, 0x541C, (1 << 32) | 0x5412]
    for name, number in names.items():
        for first in firsts:
            for second in seconds:
                wanted = decide(code, arch.audit, number, first, second)
                found = decide_by_name(rules, name, first, second)
                # A family with more than 32 bits is no family: refused there, cut off here.
                strict = name in {"socket", "socketpair"} and first >> 32
                assert found == (errno_of(errno.EAFNOSUPPORT) if strict else wanted), (name, first, second)


def test_a_profile_says_each_thing_once() -> None:
    rules = profile()["syscalls"]
    assert all(names == sorted(set(names)) for names in (rule["names"] for rule in rules[:1]))
    conditions = [(tuple(rule["names"]), str(rule.get("args"))) for rule in rules]
    assert len(conditions) == len(set(conditions))
    # Engines take conditions on one argument in one rule as either of them.
    assert all(len(rule.get("args", [])) <= 1 for rule in rules)
