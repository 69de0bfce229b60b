"""The system-call filter of a sandbox, as the classic BPF program that the kernel takes.

Made here without libseccomp: a list of `struct sock_filter` (u16 code, u8 jt, u8 jf, u32 k). What is
refused: system calls that open kernel attack surface which no build or test needs, sockets of families
that are not tied to the network namespace (vsock leads to the host of a virtual machine), new namespaces,
and typing into the server's terminal. io_uring must be among them: it opens sockets without socket(2).
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from taskyard.errors import SetupError

# seccomp.h, bpf_common.h
_RET_KILL_PROCESS = 0x80000000
_RET_ERRNO = 0x00050000
_RET_ALLOW = 0x7FFF0000
_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K

# Offsets in struct seccomp_data. Arguments are 64 bits wide; the kernel looks at 32 of those that are
# compared here, and on these little-endian machines they come first.
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24

_X32 = 0x40000000
"""Bit of the x32 ABI in a system-call number of x86_64."""
_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
_FAMILIES = (1, 2, 10, 16)
"""AF_UNIX, AF_INET, AF_INET6, AF_NETLINK."""
_TERMINAL = (0x5412, 0x541C)
"""ioctls TIOCSTI and TIOCLINUX."""

# The same on every architecture.
_REFUSED_COMMON = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
    "quotactl_fd": 443, "open_tree_attr": 467,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Numbers of one architecture: AUDIT_ARCH, system calls looked into, system calls refused."""

    audit: int
    clone: int
    clone3: int
    ioctl: int
    socket: int
    socketpair: int
    refused: dict[str, int]


ARCHITECTURES = {
    "x86_64": Architecture(
        audit=0xC000003E, clone=56, clone3=435, ioctl=16, socket=41, socketpair=53,
        refused={
            "syslog": 103, "personality": 135, "pivot_root": 155, "adjtimex": 159, "acct": 163,
            "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169,
            "iopl": 172, "ioperm": 173, "create_module": 174, "init_module": 175, "delete_module": 176,
            "get_kernel_syms": 177, "query_module": 178, "quotactl": 179, "lookup_dcookie": 212,
            "clock_settime": 227, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250,
            "unshare": 272, "perf_event_open": 298, "open_by_handle_at": 304, "clock_adjtime": 305,
            "setns": 308, "finit_module": 313, "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323,
            **_REFUSED_COMMON,
        },
    ),
    "aarch64": Architecture(
        audit=0xC00000B7, clone=220, clone3=435, ioctl=29, socket=198, socketpair=199,
        refused={
            "lookup_dcookie": 18, "umount2": 39, "mount": 40, "pivot_root": 41, "quotactl": 60, "acct": 89,
            "personality": 92, "unshare": 97, "kexec_load": 104, "init_module": 105, "delete_module": 106,
            "clock_settime": 112, "syslog": 116, "reboot": 142, "settimeofday": 170, "adjtimex": 171,
            "add_key": 217, "request_key": 218, "keyctl": 219, "swapon": 224, "swapoff": 225,
            "perf_event_open": 241, "open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268,
            "finit_module": 273, "bpf": 280, "userfaultfd": 282, "kexec_file_load": 294,
            **_REFUSED_COMMON,
        },
    ),
}  # fmt: skip

_Instruction = tuple[int, int, int, int]


def program(machine: str | None = None) -> bytes:
    """The filter for a machine as `uname -m` names it (default: this one).

    Raises SetupError for a machine that there is no table for.
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise SetupError(
            f"sandboxes need a system-call filter, and there is none for {machine}, only for {known}"
        )
    return b"".join(
        struct.pack("<HBBI", *instruction) for instruction in _instructions(ARCHITECTURES[machine])
    )


def profile() -> dict[str, Any]:
    """The same filter as container engines take it (the OCI's `seccomp`, in Docker's form), for any architecture.

    They know system calls by name, leave out those that the machine does not have, and refuse other ABIs by
    themselves. Arguments are compared at their full width there, so the upper half is masked away as the kernel
    does.
    """
    word = 0xFFFFFFFF
    names = sorted({name for arch in ARCHITECTURES.values() for name in arch.refused})
    sockets = ["socket", "socketpair"]
    families = [family for family in range(max(_FAMILIES)) if family not in _FAMILIES]
    no_family = errno.EAFNOSUPPORT
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            _refuse(names, errno.EPERM),
            _refuse(["clone3"], errno.ENOSYS),
            # All conditions of one rule must hold: so one for each bit.
            *(
                _refuse(["clone"], errno.EPERM, 0, 1 << bit, 1 << bit)
                for bit in range(32)
                if _NAMESPACES & 1 << bit
            ),
            *(_refuse(sockets, no_family, 0, word, family) for family in families),
            _refuse(sockets, no_family, 0, max(_FAMILIES), op="SCMP_CMP_GT"),
            *(_refuse(["ioctl"], errno.EPERM, 1, word, request) for request in _TERMINAL),
        ],
    }


def _refuse(
    names: Sequence[str],
    error: int,
    index: int | None = None,
    value: int = 0,
    second: int = 0,
    op: str = "SCMP_CMP_MASKED_EQ",
) -> dict[str, Any]:
    """A rule; index: of the argument that has to fit. MASKED_EQ: `argument & value == second`."""
    rule: dict[str, Any] = {"names": list(names), "action": "SCMP_ACT_ERRNO", "errnoRet": error}
    if index is not None:
        rule["args"] = [{"index": index, "value": value, "valueTwo": second, "op": op}]
    return rule


def _instructions(arch: Architecture) -> list[_Instruction]:
    refuse = _RET_ERRNO | errno.EPERM
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, arch.audit),
        (_RETURN, 0, 0, _RET_KILL_PROCESS),
        (_LOAD, 0, 0, _NR),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, refuse),
        # glibc falls back to clone, whose flags can be seen from here.
        *_when([arch.clone3], [(_RETURN, 0, 0, _RET_ERRNO | errno.ENOSYS)]),
        *_when([arch.clone], [
            (_LOAD, 0, 0, _ARG0),
            (_ANY_BIT, 0, 1, _NAMESPACES),
            (_RETURN, 0, 0, refuse),
            (_RETURN, 0, 0, _RET_ALLOW),
        ]),
        *_when([arch.socket, arch.socketpair], [
            (_LOAD, 0, 0, _ARG0),
            *_when(_FAMILIES, [(_RETURN, 0, 0, _RET_ALLOW)]),
            (_RETURN, 0, 0, _RET_ERRNO | errno.EAFNOSUPPORT),
        ]),
        *_when([arch.ioctl], [
            (_LOAD, 0, 0, _ARG1),
            *_when(_TERMINAL, [(_RETURN, 0, 0, refuse)]),
            (_RETURN, 0, 0, _RET_ALLOW),
        ]),
        *_when(sorted(arch.refused.values()), [(_RETURN, 0, 0, refuse)]),
        (_RETURN, 0, 0, _RET_ALLOW),
    ]  # fmt: skip
    return program


def _when(values: Sequence[int], then: list[_Instruction]) -> list[_Instruction]:
    """Run `then`, which must end in returns, if the loaded word is one of the values; else go on after it."""
    last = len(values) - 1
    tests = [
        (_EQUAL, last - index, len(then) if index == last else 0, value) for index, value in enumerate(values)
    ]
    return [*tests, *then]
