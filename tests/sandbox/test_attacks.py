"""What an agent may try against the machine, run for real. The commands are harmless where they succeed."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from taskyard.sandbox import cgroups
from taskyard.sandbox.docker import DockerProvider
from taskyard.sandbox.docker_config import labels
from taskyard.sandbox.provider import Limits, Sandbox
from tests.support.sandboxes import BOMB, AnyHut, Done, first_line, open_hut, run, shell

CANARY = "c4n4ry-5ea1ed-8b1d"

ON_THIS_HOST = ("bubblewrap", "docker")
"""Providers that share the kernel of this host, and are seen from here."""

only_bubblewrap = pytest.mark.parametrize("hut", ["bubblewrap"], indirect=True)
needs_limits = pytest.mark.skipif(os.geteuid() != 0, reason="control groups need root here")


@pytest.fixture(params=ON_THIS_HOST)
async def hut(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AnyHut]:
    async with open_hut(request.param, tmp_path / "data", request) as hut:
        yield hut


@pytest.fixture
async def sandbox(hut: AnyHut) -> Sandbox:
    return await hut.sandbox()


async def attack(sandbox: Sandbox, code: str) -> Done:
    """Run Python inside, with `call(number, …)` for raw system calls: prints "name: error" or "name: ok"."""
    prelude = """
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, function):
    try:
        result = function()
    except OSError as error:
        print(f"{name}: {errno.errorcode[error.errno]}")
    else:
        print(f"{name}: ok {result}")
def call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if result == -1:
        raise OSError(ctypes.get_errno(), "")
    return result
"""
    done = await run(sandbox, "python3", "-c", prelude + code)
    assert done.end.code == 0, done.end.stderr_tail
    return done


# 1: settings of the kernel


async def test_kernel_settings(sandbox: Sandbox) -> None:
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    done = await shell(
        sandbox,
        "v=$(cat /proc/sys/kernel/core_pattern) && test -n \"$v\" && echo read;"
        " (printf %s \"$v\" > /proc/sys/kernel/core_pattern) && echo wrote;"
        " find /proc/sys -type f -writable;"
        " for f in /proc/sysrq-trigger /proc/kcore /proc/kmsg /proc/acpi /sys/kernel; do"
        "   (echo > $f) 2>/dev/null && echo wrote $f; done; exit 0",
    )  # fmt: skip
    assert done.lines == ["read"]
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before


# 2: the server's environment and arguments


@pytest.fixture
async def canary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_SECRET", CANARY)


SEARCH = """
import glob, os
found = []
for pattern in ("/proc/[0-9]*/environ", "/proc/[0-9]*/cmdline", "/proc/[0-9]*/task/*/environ", "/etc/*", "/run/*"):
    for path in glob.glob(pattern):
        try:
            data = open(path, "rb").read()
        except OSError as error:
            continue
        if CANARY in data:
            found.append(path)
print(found, os.environ.get("SERVER_SECRET"))
print(open("/proc/1/environ", "rb").read() if os.access("/proc/1/environ", os.R_OK) else "closed")
print(open("/proc/1/cmdline", "rb").read().split(b"\\0")[:4])
"""


@pytest.mark.usefixtures("canary")
async def test_environment_of_the_server(hut: AnyHut, sandbox: Sandbox) -> None:
    code = f"CANARY = b'{CANARY[:6]}' + b'{CANARY[6:]}'\n{SEARCH}"
    done = await run(sandbox, "python3", "-c", code, env={"TOKEN": "for-the-agent"})
    found, environ, line = done.lines
    assert found == "[] None"
    assert "for-the-agent" not in done.output
    if isinstance(hut.provider, DockerProvider):
        assert environ == "closed"
        assert "python3" in line
    else:
        # The shell on the way to bwrap sets PWD, to a folder that says nothing.
        assert environ in {"b'PWD=/\\x00'", "b''"}
        assert "--args" in line


# 3: descriptors


@pytest.fixture
def open_descriptors() -> Iterator[None]:
    """Low and high ones, all inheritable: a file, a pipe, a socket."""
    made = [os.open("/etc/hostname", os.O_RDONLY), *os.pipe()]
    connection = socket.socket()
    made.append(connection.detach())
    for fd in list(made):
        os.set_inheritable(fd, True)
        made.append(os.dup2(fd, 200 + fd))
    yield
    for fd in made:
        os.close(fd)


LISTING = """
import os
for fd in range(4096):
    try:
        print(fd, os.readlink(f"/proc/self/fd/{fd}").split(":")[0])
    except FileNotFoundError:
        pass
"""


@pytest.mark.usefixtures("open_descriptors")
@pytest.mark.parametrize("door", [False, True])
async def test_descriptors_of_the_server(sandbox: Sandbox, door: bool) -> None:
    async def handler(listener: socket.socket) -> None:
        listener.close()

    process = await sandbox.exec(
        ["python3", "-c", LISTING], stdin=True, on_listener=handler if door else None
    )
    async with asyncio.timeout(60):
        output = await process.stdout.read()
    await process.kill()
    assert output.decode().splitlines() == ["0 pipe", "1 pipe", "2 pipe"]


async def test_descriptors_of_the_first_process(hut: AnyHut, sandbox: Sandbox) -> None:
    done = await shell(sandbox, "for f in /proc/1/fd/*; do readlink $f; done")
    kinds = {line.split(":")[0] for line in done.lines}
    # In a container it is the carrier, whose event loop wakes itself over a pair of sockets.
    own = {"socket"} if isinstance(hut.provider, DockerProvider) else set()
    assert kinds <= {"pipe", "/dev/null", "anon_inode"} | own, done.output


# 4: sockets that are not tied to the network namespace


async def test_sockets(sandbox: Sandbox) -> None:
    done = await attack(
        sandbox,
        """
attempt("vsock", lambda: socket.socket(40, 1))
attempt("packet", lambda: socket.socket(socket.AF_PACKET, 3, 0))
attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
attempt("bluetooth", lambda: socket.socket(31, 3, 1))
attempt("alg", lambda: socket.socket(38, 5))
attempt("tipc pair", lambda: call(SOCKETPAIR, 30, 1, 0, ctypes.create_string_buffer(8)))
for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
    socket.socket(family).close()
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()
""".replace("SOCKETPAIR", "53 if os.uname().machine == 'x86_64' else 199"),
    )
    assert dict(line.split(": ") for line in done.lines) == {
        "vsock": "EAFNOSUPPORT",
        "packet": "EAFNOSUPPORT",
        "raw": "EPERM",
        "bluetooth": "EAFNOSUPPORT",
        "alg": "EAFNOSUPPORT",
        "tipc pair": "EAFNOSUPPORT",
    }


async def test_no_way_to_the_host_by_network(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        name = f"taskyard-test-{os.getpid()}-{time.monotonic_ns()}"
        abstract.bind("\0" + name)
        abstract.listen()
        port = server.getsockname()[1]
        done = await attack(
            sandbox,
            f"""
attempt("server", lambda: socket.create_connection(("127.0.0.1", {port}), 2))
attempt("metadata", lambda: socket.create_connection(("169.254.169.254", 80), 2))
attempt("public", lambda: socket.create_connection(("1.1.1.1", 53), 2))
attempt("abstract", lambda: socket.socket(socket.AF_UNIX).connect("\\0{name}"))
print(sorted(os.listdir("/proc/sys/net/ipv4/conf")) if os.path.exists("/proc/sys/net/ipv4/conf") else [])
try:
    socket.getaddrinfo("example.com", 80)
except socket.gaierror:
    print("name: none")
""",
        )
    assert [line for line in done.lines if ": " in line] == [
        "server: ECONNREFUSED",
        "metadata: ENETUNREACH",
        "public: ENETUNREACH",
        "abstract: ECONNREFUSED",
        "name: none",
    ]


# 5: namespaces, mounts, devices, and the kernel's larger interfaces


async def test_kernel_interfaces(sandbox: Sandbox) -> None:
    arm = os.uname().machine == "aarch64"
    numbers = {
        "mount": 40 if arm else 165, "unshare": 97 if arm else 272, "setns": 268 if arm else 308,
        "bpf": 280 if arm else 321, "keyctl": 219 if arm else 250, "add_key": 217 if arm else 248,
        "perf_event_open": 241 if arm else 298, "userfaultfd": 282 if arm else 323,
        "personality": 92 if arm else 135, "io_uring_setup": 425, "fsopen": 430, "open_tree": 428,
        "open_by_handle_at": 265 if arm else 304,
    }  # fmt: skip
    code = "".join(
        f'attempt("{name}", lambda: call({number}, 0, 0, 0, 0, 0))\n' for name, number in numbers.items()
    )
    code += f"""
attempt("clone3", lambda: call(435, 0, 0))
attempt("clone new user", lambda: call({220 if arm else 56}, 0x10000000 | 17, 0, 0, 0, 0))
attempt("clone new net", lambda: call({220 if arm else 56}, 0x40000000 | 17, 0, 0, 0, 0))
import fcntl
attempt("type into terminal", lambda: fcntl.ioctl(0, 0x5412, b"x"))
attempt("mknod", lambda: os.mknod("/tmp/disk", 0o60600, os.makedev(254, 0)))
attempt("chroot", lambda: os.chroot("/tmp"))
attempt("setuid", lambda: os.setuid(0))
attempt("reboot", lambda: call({142 if arm else 169}, 0, 0, 0, 0))
"""
    done = await attack(sandbox, code)
    found = dict(line.split(": ") for line in done.lines)
    assert found.pop("clone3") == "ENOSYS"
    assert found.pop("setuid") in {"EPERM", "EINVAL"}
    assert set(found.values()) == {"EPERM"}, found
    assert len(found) == len(numbers) + 6


async def test_programs_that_would_open_namespaces(sandbox: Sandbox) -> None:
    done = await shell(
        sandbox,
        "unshare -Ur id && echo unshared; mount -t tmpfs x /mnt && echo mounted;"
        " bwrap --ro-bind / / true && echo nested; mknod b b 254 0 && echo made;"
        " cp /bin/sh own && chmod 4755 own && ./own -c 'id -u'; exit 0",
    )
    assert done.lines == ["1000"]


@pytest.mark.parametrize("hut", ["docker"], indirect=True)
async def test_the_streams_of_the_carrier(sandbox: Sandbox) -> None:
    """Who writes there tells the server whatever it likes, and who keeps them keeps the container."""
    done = await attack(
        sandbox,
        """
for number in range(3):
    attempt(str(number), lambda: os.close(os.open(f"/proc/1/fd/{number}", os.O_RDWR | os.O_NONBLOCK)))
    attempt(str(number), lambda: os.close(call(438, call(434, 1, 0), number, 0)))
""",
    )
    assert len(done.lines) == 6
    assert not [line for line in done.lines if ": ok" in line]


async def test_the_first_process_is_out_of_reach(sandbox: Sandbox) -> None:
    done = await attack(
        sandbox,
        """
attempt("memory", lambda: open("/proc/1/mem", "r+b").close())
attempt("ids", lambda: open("/proc/1/uid_map", "w").write("0 0 1"))
print("root of 1:", os.path.samefile("/", "/proc/1/root") if os.access("/proc/1/root", os.X_OK) else True)
print(open("/proc/self/status").read())
""",
    )
    assert "root of 1: True" in done.lines
    status = dict(line.split(":\t", 1) for line in done.lines if ":\t" in line)
    assert {status[key].strip() for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"


# Limits


@needs_limits
async def test_a_fork_bomb_is_held(hut: AnyHut) -> None:
    bombed = await hut.sandbox(f"bombed-{os.getpid()}", Limits(cpus=1, memory_mb=256, pids=64, tmp_mb=16))
    neighbour = await hut.sandbox("neighbour")
    process = await bombed.exec(["python3", "-c", BOMB])
    assert await first_line(process) == "ready"
    group = f"{bombed.id}.*"
    if isinstance(hut.provider, DockerProvider):
        [container] = await hut.provider.engine.containers(labels(hut.provider.place, bombed.id))
        group = f"*{container.id}*"
    counts = list(Path("/sys/fs/cgroup").rglob(f"{group}/pids.current"))
    deadline = time.monotonic() + 60
    while max(int(path.read_text()) for path in counts) < 50:
        assert time.monotonic() < deadline, "the bomb does not go off"
        await asyncio.sleep(0.01)
    assert (await shell(neighbour, "echo fine")).output == "fine\n"
    assert max(int(path.read_text()) for path in counts) <= 64
    async with asyncio.timeout(60):
        await process.kill()
        await bombed.destroy()
    assert not any(path.exists() for path in counts)


# What is killed makes room for no other.
HOARDER = """
import os, time
def crowd():
    try:
        while os.fork():
            pass
    except OSError:
        return
    time.sleep(600)
    os._exit(0)
crowd()
with open("big", "wb") as file:
    file.write(bytes(60_000_000))
print("written", flush=True)
while True:
    crowd()
    time.sleep(0.05)
"""


@needs_limits
async def test_a_crowd_does_not_hold_off_the_disk_limit(hut: AnyHut) -> None:
    limits = Limits(cpus=1, memory_mb=256, pids=64, tmp_mb=16, disk_mb=32)
    sandbox = await hut.sandbox("hoarder", limits)
    process = await sandbox.exec(["python3", "-c", HOARDER])
    assert await first_line(process) == "written"
    async with asyncio.timeout(60):
        end = await process.wait()
    assert end.reason == "disk"
    assert "it holds" in end.stderr_tail, "it is measured all the same"


@needs_limits
async def test_memory_is_limited(hut: AnyHut) -> None:
    sandbox = await hut.sandbox("eater", Limits(cpus=1, memory_mb=64, pids=64, tmp_mb=256))
    done = await run(sandbox, "python3", "-c", "x = bytearray(300_000_000)")
    assert (done.end.code, done.end.reason) == (137, "oom")
    done = await shell(sandbox, "head -c 150000000 /dev/zero > /tmp/x; echo $?")
    assert done.output == "" or done.lines[-1] != "0", "the temporary folder does not count"
    assert (await shell(sandbox, "kill -KILL $$")).end.reason == "killed"


@needs_limits
async def test_cpu_is_limited(hut: AnyHut) -> None:
    sandbox = await hut.sandbox("spinner", Limits(cpus=0.2, memory_mb=64, pids=64, tmp_mb=16))
    code = "import time\ns = time.monotonic()\nwhile time.monotonic() - s < 1.5: pass\nprint(time.process_time())"
    done = await run(sandbox, "python3", "-c", code)
    assert 0.05 < float(done.output) < 0.6


@only_bubblewrap
async def test_limits_without_control_groups(hut: AnyHut, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise cgroups.UnavailableError("there are none")

    monkeypatch.setattr(cgroups, "find", none)
    sandbox = await hut.sandbox("bombed", Limits(cpus=1, memory_mb=256, pids=40, tmp_mb=16))
    code = """
import os, resource, time
children = 0
try:
    for _ in range(100_000):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        children += 1
except BlockingIOError:
    pass
limits = (resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_NOFILE)
print(children, *(size for limit in limits for size in resource.getrlimit(limit)))
"""
    if os.geteuid() != 0 and resource.getrlimit(resource.RLIMIT_NPROC)[1] == resource.RLIM_INFINITY:
        pytest.skip("the count of processes of this user is not limited")
    done = await run(sandbox, "python3", "-c", code)
    children, *sizes = (int(word) for word in done.output.split())
    assert 10 < children <= 40
    most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 65_536)
    assert sizes == [16 * 1024**3, 16 * 1024**3, -1, -1, most, most]
    problem = next(found for found in await hut.provider.check() if found.name == "sandbox limits")
    assert (problem.ok, problem.fatal) == (False, False)
    assert "Delegate=" in problem.remedy


async def test_kill_all_reaches_only_itself(hut: AnyHut) -> None:
    crowd = [await hut.sandbox(f"s{number}") for number in range(3)]
    waiting = [await sandbox.exec(["sh", "-c", "echo ready; exec cat"], stdin=True) for sandbox in crowd[:2]]
    for process in waiting:
        assert await first_line(process) == "ready"
    done = await shell(crowd[2], "kill -9 -1; echo on")
    assert done.output == "on\n"
    for process in waiting:
        assert process.stdin is not None
        process.stdin.write(b"alive\n")
        assert await first_line(process) == "alive"
        await process.kill()
