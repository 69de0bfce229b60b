"""What is particular about sandboxes of a container engine: locks, files, leftovers, and what can be missing."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import shutil
import ssl
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from taskyard.drive.workspace import MIRROR_INSIDE
from taskyard.errors import SetupError
from taskyard.sandbox.docker import DockerProvider, DockerSandbox
from taskyard.sandbox.docker_config import PLACE, SANDBOX, labels
from taskyard.sandbox.docker_engine import EngineError
from taskyard.sandbox.docker_files import plan
from taskyard.sandbox.provider import Mount, Problem, SandboxError, Spec
from taskyard.sandbox.selftest import selftest
from tests.support.desk import Desk
from tests.support.docker_keeper import IMAGE
from tests.support.sandboxes import LIMITS, AnyHut, docker_hut, first_line, gone, run, shell
from tests.support.served import FETCH, Served

Derive = Callable[..., Awaitable[str]]


@pytest.fixture
async def hut(docker_host: str, tmp_path: Path) -> AsyncIterator[AnyHut]:
    hut = docker_hut(tmp_path / "data", docker_host)
    yield hut
    await hut.close()


@pytest.fixture
def provider(hut: AnyHut) -> DockerProvider:
    assert isinstance(hut.provider, DockerProvider)
    return hut.provider


@pytest.fixture
async def sandbox(hut: AnyHut) -> DockerSandbox:
    sandbox = await hut.sandbox()
    assert isinstance(sandbox, DockerSandbox)
    return sandbox


@pytest.fixture
def nap() -> str:
    """Seconds that nobody else on this machine sleeps."""
    return f"8{os.getpid():07d}"


@pytest.fixture
async def derive(provider: DockerProvider) -> AsyncIterator[Derive]:
    """Make another image of the tests' one: by a shell command in it, and with changes as in a Dockerfile."""
    made: list[str] = []

    async def derive(command: str, *changes: str) -> str:
        name = f"taskyard-test-{os.getpid()}-{len(made)}"
        async with provider.engine.asked("make an image") as client:
            container = await client.containers.create(
                {"Image": IMAGE, "Cmd": ["/bin/sh", "-c", command], "HostConfig": {"NetworkMode": "none"}}
            )
            await container.start()
            assert (await container.wait())["StatusCode"] == 0
            # aiodocker knows one change only.
            params = {"container": container.id, "repo": name, "changes": "\n".join(changes or ("CMD []",))}
            await client._query_json("commit", "POST", params=params, data={})
            await container.delete()
        made.append(name)
        return name

    yield derive
    for name in made:
        async with provider.engine.asked("remove an image") as client:
            await client.images.delete(name, force=True)


async def test_how_a_container_is_locked(provider: DockerProvider, sandbox: DockerSandbox, nap: str) -> None:
    process = await sandbox.exec(["sh", "-c", f"echo ready; exec sleep {nap}"], env={"SECRET": "s3cr3t-7"})
    assert await first_line(process) == "ready"
    [found] = await provider.engine.containers(labels(provider.place, "one"))
    async with provider.engine.asked("show a container") as client:
        shown = await client.containers.container(found.id).show()
    host, config = shown["HostConfig"], shown["Config"]
    assert (host["NetworkMode"], host["IpcMode"], host["Privileged"]) == ("none", "private", False)
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["CapAdd"]) == (True, ["ALL"], None)
    memory = LIMITS.memory_mb * 2**20
    assert (host["Memory"], host["MemorySwap"], host["PidsLimit"]) == (memory, memory, LIMITS.pids)
    assert host["NanoCpus"] == LIMITS.cpus * 1_000_000_000
    assert host["LogConfig"]["Type"] == "none"
    assert host["SecurityOpt"][0] == "no-new-privileges"
    assert json.loads(host["SecurityOpt"][1].removeprefix("seccomp="))["defaultAction"] == "SCMP_ACT_ALLOW"
    assert {options.split(",")[1] for options in host["Tmpfs"].values()} == {"nosuid"}
    assert (config["User"], config["Hostname"], config["StdinOnce"]) == ("1000:1000", "sandbox", True)
    # Neither the command nor its environment is among what the engine keeps, or shows in lists of processes.
    text = json.dumps(shown)
    assert "s3cr3t-7" not in text
    assert nap not in text
    await process.kill()
    with pytest.raises(EngineError):
        async with provider.engine.asked("show a container") as client:
            await client.containers.container(found.id).show()


async def test_who_and_where_a_command_is(sandbox: DockerSandbox) -> None:
    done = await shell(
        sandbox,
        "id -u; id -G; pwd; cat /proc/sys/kernel/hostname; ulimit -c; ls /sys/class/net;"
        " python3 -c 'import socket; print(socket.gethostbyname(\"localhost\"))'",
    )
    assert done.lines == ["1000", "1000", "/tmp/workspace", "sandbox", "0", "lo", "127.0.0.1"]


async def test_the_self_test_holds(provider: DockerProvider) -> None:
    problems = await selftest(provider)
    assert [problem.ok for problem in problems] == [True, True, True], problems


async def test_all_is_well(provider: DockerProvider) -> None:
    problems = await provider.check()
    assert [problem.name for problem in problems if problem.ok] == [
        "container engine", "sandbox image", "sandbox start", "sandbox programs", "sandbox user", "sandbox limits",
    ], problems  # fmt: skip
    assert await provider.list() == []
    assert await provider.engine_has() == set()


# What an image can bring along


async def test_an_image_of_the_run(provider: DockerProvider, derive: Derive) -> None:
    """What it declares is not done: no volume without a limit, no program but ours."""
    image = await derive(
        "echo special > /etc/special; mkdir -m 0777 /data",
        "VOLUME /data",
        'ENTRYPOINT ["/bin/false"]',
        "HEALTHCHECK --interval=1s CMD touch /tmp/checked",
        "USER root",
        "ENV OF_IMAGE=1",
    )
    sandbox = await provider.create(Spec("one", LIMITS, image=image))
    try:
        done = await shell(
            sandbox,
            'cat /etc/special; id -u; echo "${OF_IMAGE-none}"; head -c 70000000 /dev/zero > /data/big;'
            " stat -c %s /data/big; sleep 1.5; ls /tmp",
        )
        assert done.lines == ["special", "1000", "none", str(64 * 2**20), "workspace"]
        await sandbox.detach()
        again = await provider.attach("one")
        assert again is not None
        assert (await shell(again, "cat /etc/special")).output == "special\n"
        await again.destroy()
    finally:
        await sandbox.destroy()


async def test_an_image_that_is_not_there(hut: AnyHut, provider: DockerProvider) -> None:
    with pytest.raises(SandboxError, match=r"no image 'no-such-image'.*docker build -t no-such-image"):
        await provider.create(Spec("one", LIMITS, image="no-such-image"))
    assert await provider.list() == []


async def test_the_checks_of_an_image(docker_host: str, tmp_path: Path, derive: Derive) -> None:
    async def failed(image: str) -> dict[str, Problem]:
        other = docker_hut(tmp_path / "other", docker_host, image=image)
        problems = await other.provider.check()
        await other.close()
        return {problem.name: problem for problem in problems if not problem.ok}

    missing = await failed("taskyard-none")
    assert "docker build -t taskyard-none deploy/agent-image" in missing["sandbox image"].remedy
    assert missing["sandbox image"].fatal
    poor = await failed(await derive("rm /usr/bin/git /usr/bin/find; sed -i /agent/d /etc/passwd"))
    assert poor["sandbox programs"].detail == "not in the image: git, find"
    assert (poor["sandbox programs"].fatal, poor["sandbox user"].fatal) == (True, False)
    without = await failed(await derive("rm /usr/bin/python3*"))
    assert "python3" in without["sandbox start"].detail
    assert without["sandbox start"].fatal


# What can be wrong with the engine


async def test_no_engine(tmp_path: Path) -> None:
    hut = docker_hut(tmp_path / "data", f"unix://{tmp_path}/no.sock")
    with pytest.raises(SetupError, match=r"does not answer.*TASKYARD_SANDBOX__DOCKER__HOST"):
        await hut.provider.capabilities()
    [problem] = await hut.provider.check()
    assert (problem.fatal, problem.ok) == (True, False)

    async def kept(_: object) -> set[str]:
        return set()

    assert (await hut.provider.sweep(kept)).sandboxes == []
    await hut.close()


@pytest.mark.parametrize("host", ["/var/run/docker.sock", "ssh://a@b"])
async def test_hosts_that_cannot_be(tmp_path: Path, host: str) -> None:
    hut = docker_hut(tmp_path / "data", host)
    with pytest.raises(SetupError, match="begins with unix://"):
        await hut.provider.capabilities()
    await hut.close()


async def test_runtimes(docker_host: str, tmp_path: Path) -> None:
    hut = docker_hut(tmp_path / "data", docker_host, runtime="runsc")
    with pytest.raises(SetupError, match=r"no runtime 'runsc', only: .*runc"):
        await hut.provider.capabilities()
    await hut.close()
    hut = docker_hut(tmp_path / "data", docker_host, runtime="runc")
    assert "kernel" not in await hut.provider.capabilities()
    await hut.close()


# Files of this host


@pytest.mark.parametrize("files", ["mount", "copy"])
async def test_files_of_this_host(docker_host: str, tmp_path: Path, files: str) -> None:
    hut = docker_hut(tmp_path / "data", docker_host, files=files)
    private = tmp_path / "private"
    (private / "tree" / "deep").mkdir(parents=True)
    (private / "tree" / "deep" / "file").write_text("one")
    (private / "tree" / "link").symlink_to("deep/file")
    (private / "program").write_text("#!/bin/sh\necho two\n")
    (private / "program").chmod(0o755)
    private.chmod(0o700)
    mounts = (Mount(private / "tree", "/run/taskyard/tree"), Mount(private / "program", "/far/away/program"))
    try:
        sandbox = await hut.sandbox()
        script = "cat /run/taskyard/tree/link; /far/away/program"
        script += (
            "; touch /run/taskyard/tree/x /far/away/x || echo refused; rm -f /far/away/program; ls /far/away"
        )
        done = await run(sandbox, "sh", "-c", script, mounts=mounts)
        assert done.lines == ["onetwo", "refused", "program"], done.end.stderr_tail
        assert (await shell(sandbox, "ls /run/taskyard /far 2>/dev/null | wc -l")).output == "0\n"
    finally:
        await hut.close()
    assert sorted(path.name for path in (private / "tree").iterdir()) == ["deep", "link"]


@pytest.mark.parametrize("files", ["mount", "copy"])
async def test_a_clone_of_a_mirror(docker_host: str, tmp_path: Path, files: str) -> None:
    hut = docker_hut(tmp_path / "data", docker_host, files=files)
    try:
        desk = Desk(tmp_path, await hut.sandbox())
        await desk.clone()
        assert (
            await desk.agent("echo x > new; git add new; git commit -qm New; git log --format=%s -1") == "New"
        )
        assert await desk.bundle() is not None
        assert (
            f"fatal: '{MIRROR_INSIDE}'"
            in (await run(desk.sandbox, "git", "ls-remote", MIRROR_INSIDE)).end.stderr_tail
        )
    finally:
        await hut.close()


@pytest.mark.parametrize(
    ("mount", "copies", "text"),
    [
        (Mount(Path("/etc"), "/tmp/workspace/.git"), False, "nothing can be mounted"),
        (Mount(Path("/etc"), "/opt/x", symlink=True), False, "no symbolic link"),
        (Mount(Path("/no/such/file"), "/opt/x"), False, "does not exist"),
        (Mount(Path("/etc"), "/opt/x", writable=True), True, "a copy on an engine of another host"),
        (Mount(Path("/etc/passwd"), "/opt/x"), True, "put it into the image"),
        (Mount(Path("/etc/passwd"), "/usr/local/lib/x"), True, "put it into the image"),
        (Mount(Path("/etc"), "/etc"), True, "put it into the image"),
    ],
)
def test_files_that_are_refused(mount: Mount, copies: bool, text: str) -> None:
    with pytest.raises(SandboxError, match=text):
        plan([mount], copies=copies)


# Leftovers

DIES = """
    import asyncio, sys
    from pathlib import Path
    from tests.support.sandboxes import docker_hut

    async def main():
        folder, host, nap = sys.argv[1:]
        sandbox = await docker_hut(Path(folder), host).sandbox()
        script = f"trap '' TERM HUP; touch f; setsid sleep {nap} & echo on; sleep {nap}"
        process = await sandbox.exec(["sh", "-c", script])
        print((await process.stdout.readline()).decode().strip(), flush=True)
        await asyncio.sleep(600)

    asyncio.run(main())
"""


async def test_a_killed_server_leaves_no_process_and_its_sandbox_can_be_taken_over(
    provider: DockerProvider, hut: AnyHut, docker_host: str, nap: str
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(DIES), str(hut.folder), docker_host, nap]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    with server:
        assert server.stdout is not None
        assert (await asyncio.to_thread(server.stdout.readline)).strip() == "on"
        with pytest.raises(SandboxError, match="in use by another process"):
            await provider.attach("one")
        server.kill()
    await gone(nap)
    sandbox = await provider.attach("one")
    assert sandbox is not None
    assert await provider.engine.containers({PLACE: provider.place}) == []
    assert (await shell(sandbox, "ls")).output == "f\n"
    await sandbox.destroy()
    assert await provider.engine_has() == set()


async def test_what_has_no_folder_is_swept(provider: DockerProvider, hut: AnyHut, nap: str) -> None:
    held, lost = await hut.sandbox("held"), await provider.create(Spec("lost", LIMITS))
    process = await lost.exec(["sleep", nap])
    shutil.rmtree(hut.folder / "sandboxes" / "lost")
    async with provider.engine.asked("make a volume") as client:
        others = {"Name": f"other-{os.getpid()}", "Labels": {PLACE: "elsewhere", SANDBOX: "lost"}}
        other = await client.volumes.create(others)

    async def kept(_: object) -> set[str]:
        return set()

    assert await provider.engine_has() == {"held", "lost"}
    assert (await provider.sweep(kept)).sandboxes == ["lost"]
    assert (await process.wait()).reason == "killed"
    await gone(nap)
    assert await provider.engine_has() == {"held"}
    assert (await shell(held, "echo fine")).output == "fine\n"
    async with provider.engine.asked("remove a volume"):
        await other.show()  # of another data folder
        await other.delete()


async def test_one_that_is_made_while_others_are_swept(
    provider: DockerProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine was asked before it was there; no container is needed for that."""
    removed = []

    async def there() -> set[str]:
        return {"a", "b"}

    async def remove(name: str) -> None:
        removed.append(name)
        (provider.root / "b").mkdir(parents=True)

    async def kept(names: object) -> set[str]:
        return {"b"}

    with monkeypatch.context() as patch:
        patch.setattr(provider, "engine_has", there)
        patch.setattr(provider, "remove_rest", remove)
        assert (await provider.sweep(kept)).sandboxes == ["a"]
    assert removed == ["a"]


async def test_a_new_one_has_nothing_of_an_old_one(hut: AnyHut, sandbox: DockerSandbox) -> None:
    """Whose folder is gone, and of which the engine still has the volumes."""
    await shell(sandbox, "echo old > file; echo old > ~/file")
    await sandbox.detach()
    shutil.rmtree(hut.folder / "sandboxes" / "one")
    assert (await shell(await hut.sandbox("one"), "ls -A . ~")).output == ".:\n\n/home/agent:\n"


async def test_a_sandbox_without_its_volumes_can_only_be_destroyed(
    provider: DockerProvider, sandbox: DockerSandbox
) -> None:
    await sandbox.detach()
    for volume in await provider.engine.volumes(labels(provider.place, "one")):
        await provider.engine.remove_volume(volume.id)
    again = await provider.attach("one")
    assert again is not None
    with pytest.raises(SandboxError, match="damaged"):
        await run(again, "true")
    await again.destroy()
    assert await provider.list() == []


async def test_a_removal_that_failed_is_done_by_the_next(
    provider: DockerProvider, sandbox: DockerSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(_: str) -> None:
        raise EngineError("the container engine does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(provider.engine, "remove_volume", away)
        with pytest.raises(SandboxError, match="does not answer"):
            await sandbox.destroy()
    # Nobody holds it any more: whoever sweeps may take it.
    again = await provider.attach("one")
    assert again is not None
    await again.detach()
    await sandbox.destroy()
    assert (await provider.list(), await provider.engine_has()) == ([], set())


async def test_many_commands_at_once(provider: DockerProvider, sandbox: DockerSandbox) -> None:
    """Each holds a connection, and the client's usual hundred would be the end of a large worker."""
    assert provider.engine.client.connector.limit == 0
    processes = await asyncio.gather(*(sandbox.exec(["cat"], stdin=True) for _ in range(6)))
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"here\n")
        assert await first_line(process) == "here"
    await asyncio.gather(*(process.kill() for process in processes))


# An engine of another host


class Relay:
    """Passes connections on to the engine's socket, over TLS with certificates of both sides."""

    def __init__(self, socket: str, folder: Path) -> None:
        self._socket = socket
        self._folder = folder
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> str:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self._folder / "ca.pem")
        context.load_cert_chain(self._folder / "cert.pem", self._folder / "key.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=context)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def cut(self) -> None:
        """Break all connections off."""
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine_reader, engine_writer = await asyncio.open_unix_connection(self._socket)
        self._writers |= {writer, engine_writer}
        for task in (self._pass(reader, engine_writer), self._pass(engine_reader, writer)):
            self._tasks.add(asyncio.create_task(task))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A folder as DOCKER_CERT_PATH names one; the one certificate is that of server, client and authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "engine")])
    now = datetime.now(UTC)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign",
         "encipher_only", "decipher_only"), False
    )  # fmt: skip
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=True, **usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path / "certificates"
    folder.mkdir()
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "ca.pem").write_bytes(pem)
    (folder / "cert.pem").write_bytes(pem)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    return folder


async def test_an_engine_of_another_host(
    docker_host: str, tmp_path: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch, nap: str
) -> None:
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(certificates))
    relay = Relay(docker_host.removeprefix("unix://"), certificates)
    async with relay as host:
        hut = docker_hut(tmp_path / "data", host)
        try:
            problems = await hut.provider.check()
            assert [problem for problem in problems if not problem.ok] == []
            assert "files of this host are copied in" in problems[0].detail
            desk = Desk(tmp_path, await hut.sandbox())
            await desk.clone()
            served = Served()
            done = await run(desk.sandbox, "python3", "-c", FETCH, on_listener=served.serve)
            await served.close()
            assert done.output == "/hello\n"
            # A connection that breaks ends the command, wherever it breaks.
            process = await desk.sandbox.exec(["sh", "-c", f"echo ready; exec sleep {nap}"], stdin=True)
            assert await first_line(process) == "ready"
            relay.cut()
            async with asyncio.timeout(60):
                assert (await process.wait()).reason == "killed"
            await process.kill()
            await gone(nap)
            assert (await shell(desk.sandbox, "echo on")).output == "on\n"
        finally:
            await hut.close()


async def test_an_engine_that_does_not_know_us(
    docker_host: str, tmp_path: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(certificates))
    async with Relay(docker_host.removeprefix("unix://"), certificates) as host:
        (certificates / "cert.pem").unlink()
        hut = docker_hut(tmp_path / "data", host)
        with pytest.raises(SetupError, match="DOCKER__HOST"):
            await hut.provider.capabilities()
        await hut.close()
    monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path / "nowhere"))
    hut = docker_hut(tmp_path / "data", "tcp://127.0.0.1:1")
    with pytest.raises(SetupError, match="cannot be used"):
        await hut.provider.capabilities()
    await hut.close()
