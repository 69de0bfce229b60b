"""What a hostile agent tries: this file itself runs inside a sandbox, with the Python that is there.

`python3 attacks.py JSON`: the facts of the test. Prints one JSON object, attack -> what came of it; HELD where nothing
did. The commands are harmless where they succeed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

HELD = "held"
ATTACKS: dict[str, Callable[[dict[str, Any]], Any]] = {}
ARM = os.uname().machine == "aarch64"


def attack(function: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    ATTACKS[function.__name__] = function
    return function


def refused(*attempts: tuple[str, Callable[[], Any]]) -> str:
    """HELD if each of these fails."""
    succeeded = []
    for name, function in attempts:
        with suppress(OSError):
            function()
            succeeded.append(name)
    return ", ".join(succeeded) or HELD


def call(number: int, *arguments: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def shell(script: str) -> str:
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip()


@attack
def kernel_settings(_: dict[str, Any]) -> str:
    path = "/proc/sys/kernel/core_pattern"
    value = open(path).read()

    def write() -> None:
        with open(path, "w") as file:
            file.write(value)

    found = refused((path, write))
    return shell("find /proc/sys -type f -writable") or found


@attack
def environment_of_the_server(facts: dict[str, Any]) -> str:
    secret = "".join(facts["canary"]).encode()
    found = []
    for path in [
        *glob.glob("/proc/[0-9]*/environ"),
        *glob.glob("/proc/[0-9]*/cmdline"),
        *glob.glob("/etc/*"),
        *glob.glob("/run/**", recursive=True),
    ]:
        with suppress(OSError), open(path, "rb") as file:
            if secret in file.read(1_000_000):
                found.append(path)
    found += [name for name, value in os.environ.items() if secret.decode() in value]
    return ", ".join(found) or HELD


@attack
def descriptors(_: dict[str, Any]) -> str:
    odd = []
    for number in range(4096):
        with suppress(OSError):
            kind = os.readlink(f"/proc/self/fd/{number}").split(":")[0]
            # What a command of the agent writes goes into a file of the agent's.
            if number > 2 or not kind.startswith(("pipe", "/dev/null", "socket", "/tmp/")):
                odd.append(f"{number}: {kind}")
    return ", ".join(odd) or HELD


@attack
def sockets(_: dict[str, Any]) -> str:
    return refused(
        ("vsock", lambda: socket.socket(40, 1)),
        ("packet", lambda: socket.socket(17, 3, 0)),
        ("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)),
        ("alg", lambda: socket.socket(38, 5)),
    )


@attack
def namespaces_mounts_devices(facts: dict[str, Any]) -> str:
    return refused(
        ("unshare", lambda: call(97 if ARM else 272, 0x10000000)),
        ("mount", lambda: call(40 if ARM else 165, 0, 0, 0, 0, 0)),
        ("mknod", lambda: os.mknod("/tmp/disk", 0o60600, os.makedev(254, 0))),
        ("chroot", lambda: os.chroot("/tmp")),
        ("io_uring", lambda: call(425, 8, 0)),
        ("bpf", lambda: call(280 if ARM else 321, 0, 0, 0)),
        ("keyctl", lambda: call(219 if ARM else 250, 0, -3, 0)),
        ("userfaultfd", lambda: call(282 if ARM else 323, 0)),
        ("setuid", lambda: os.setuid(0)),
        ("type into the terminal", lambda: fcntl.ioctl(0, 0x5412, b"x")),
        ("root of the first process", lambda: os.listdir("/proc/1/root" + facts["host_files"][0])),
    )


@attack
def the_first_process(_: dict[str, Any]) -> str:
    """It is the agent's own kind: whoever writes into its memory has won nothing."""
    with open("/proc/1/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    wanted = {"CapEff": "0" * 16, "CapPrm": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}
    odd = {name: status.get(name, "").strip() for name in wanted} | {"Uid": status["Uid"].split()[0]}
    return HELD if odd == {**wanted, "Uid": "1000"} else str(odd)


@attack
def a_program_that_sets_its_user(_: dict[str, Any]) -> str:
    found = shell("cp /bin/sh /tmp/own && chmod 4755 /tmp/own && /tmp/own -c 'id -u'")
    return HELD if found != "0" else "root"


@attack
def network(facts: dict[str, Any]) -> str:
    def connect(host: str, port: int) -> Callable[[], None]:
        return lambda: socket.create_connection((host, port), 2).close()

    def abstract() -> None:
        with socket.socket(socket.AF_UNIX) as one:
            one.connect("\0" + facts["abstract"])

    return refused(
        ("the server", connect("127.0.0.1", facts["port"])),
        ("a bridge", connect("172.17.0.1", facts["port"])),
        ("metadata", connect("169.254.169.254", 80)),
        ("the internet", connect("1.1.1.1", 53)),
        ("a name", lambda: socket.getaddrinfo("example.com", 80)),
        ("an abstract socket of the host", abstract),
    )


@attack
def through_the_proxy(facts: dict[str, Any]) -> Any:
    """What the gateway answers to CONNECT: the status, for each target."""
    found = {}
    for target in facts["targets"]:
        with socket.create_connection(("127.0.0.1", 3128), 10) as one:
            one.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
            found[target] = one.recv(4096).split()[1].decode()
    return found


@attack
def memory_file_systems(_: dict[str, Any]) -> str:
    """Filled until they are full, which has to come."""
    found = []
    for folder in ("/tmp", "/dev/shm"):
        path, size = f"{folder}/fill", 0
        try:
            with open(path, "wb") as file:
                while size < 400 * 2**20:
                    size += file.write(bytes(2**20))
            found.append(f"{folder} takes more than {size}")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                found.append(f"{folder}: {error}")
        finally:
            os.unlink(path)
    return ", ".join(found) or HELD


@attack
def read_only_system(_: dict[str, Any]) -> str:
    def touch(path: str) -> Callable[[], None]:
        return lambda: os.close(os.open(path, os.O_CREAT | os.O_WRONLY))

    folders = ("/", "/usr", "/usr/bin", "/etc", "/run", "/var", "/home", "/opt", "/root", "/dev")
    return refused(*((folder, touch(f"{folder}/x")) for folder in folders))


@attack
def files_of_the_host(facts: dict[str, Any]) -> str:
    def read(path: str) -> Callable[[], object]:
        return lambda: os.listdir(path) if os.path.isdir(path) else os.open(path, os.O_RDONLY)

    return refused(*((path, read(path)) for path in ["/etc/shadow", *facts["host_files"]]))


@attack
def other_runs(facts: dict[str, Any]) -> str:
    """Another run sleeps for as many seconds as nobody else, and has a file of a name of its own."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with suppress(OSError), open(path, "rb") as file:
            if facts["nap"].encode() in file.read().split(b"\0"):
                found.append(path)
    for top in ("/tmp", "/home", "/var/tmp", "/dev/shm"):
        for folder, _folders, names in os.walk(top):
            if facts["neighbour_file"] in names:
                found.append(folder)
    return ", ".join(found) or HELD


@attack
def credentials(_: dict[str, Any]) -> str:
    pattern = r"x-access-token|gh[pousr]_[A-Za-z0-9]{20}|sk-of-the-[a-z]*"
    here = os.path.basename(__file__)
    return (
        shell(
            f"grep -rlE '{pattern}' / --exclude={here} --exclude-dir=proc --exclude-dir=sys --exclude-dir=usr"
            " --exclude-dir=lib --exclude-dir=lib64 2>/dev/null; cat ~/.git-credentials 2>/dev/null"
        )
        or HELD
    )


if __name__ == "__main__":
    facts = json.loads(sys.argv[1])
    print(json.dumps({name: function(facts) for name, function in ATTACKS.items()}))
