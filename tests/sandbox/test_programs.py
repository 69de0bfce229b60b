"""Files named in a command, and what they need, seen inside; below a folder that others cannot enter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from taskyard.sandbox.bubblewrap import BubblewrapSandbox
from taskyard.sandbox.programs import program_mounts
from taskyard.sandbox.provider import Mount, SandboxError
from tests.support.sandboxes import Done, run


@pytest.fixture
def private(tmp_path: Path) -> Path:
    folder = tmp_path / "private" / "user"
    folder.mkdir(parents=True)
    folder.parent.chmod(0o700)
    return folder


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def targets(*argv: str) -> dict[str, str]:
    """Inside path to what is there: a host path, or `-> path` for a link."""
    _, mounts = program_mounts(argv)
    assert not any(mount.writable for mount in mounts)
    return {mount.target: ("-> " if mount.symlink else "") + str(mount.source) for mount in mounts}


async def run_command(sandbox: BubblewrapSandbox, *argv: str) -> Done:
    command, mounts = program_mounts(argv)
    return await run(sandbox, *command, mounts=mounts)


def test_programs_of_the_system_need_nothing() -> None:
    assert program_mounts(["sh", "-c", "echo /bin/cat", "/usr/bin/env", "/bin/sh", "relative/path"]) == (
        ["sh", "-c", "echo /bin/cat", "/usr/bin/env", "/bin/sh", "relative/path"],
        (),
    )


def test_a_bare_name_outside_the_system(private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = executable(private / "tools" / "mytool", "#!/bin/sh\necho mine\n")
    executable(private / "tools" / "sh", "#!/bin/sh\necho shadow\n")
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    assert program_mounts(["mytool", "x"]) == ([str(tool), "x"], (Mount(tool, str(tool)),))
    assert program_mounts(["sh"]) == (["sh"], ())
    with pytest.raises(SandboxError, match="'no-such-tool' is not installed"):
        program_mounts(["no-such-tool"])


async def test_a_chain_of_links_with_libraries(sandbox: BubblewrapSandbox, private: Path) -> None:
    release = private / "releases" / "1.2"
    real = executable(
        release / "bin" / "tool",
        '#!/bin/sh\nself=$(readlink -f "$0")\ncat "$(dirname "$self")/../lib/greeting" "$@"\n',
    )
    (release / "lib").mkdir()
    (release / "lib" / "greeting").write_text("hello ")
    (release / "secret").write_text("not yours")
    (private / "releases" / "current").symlink_to("1.2")
    (private / "bin").mkdir()
    (private / "bin" / "tool").symlink_to("../releases/current/bin/tool")
    (private / "bin" / "other").write_text("not yours")
    (private / "config").write_text("world")
    link = private / "bin" / "tool"
    assert targets(str(link), str(private / "config")) == {
        str(link): f"-> {real}",
        str(real): str(real),
        str(release / "lib"): str(release / "lib"),
        str(private / "config"): str(private / "config"),
    }
    done = await run_command(sandbox, str(link), str(private / "config"))
    assert done.output == "hello world", done.end.stderr_tail
    done = await run(sandbox, "find", str(private), "-type", "f", mounts=program_mounts([str(link)])[1])
    assert set(done.lines) == {str(real), str(release / "lib" / "greeting")}


async def test_a_node_package_outside_the_system(sandbox: BubblewrapSandbox, private: Path) -> None:
    modules = private / "node_modules"
    (modules / "agent" / "node_modules" / "inner").mkdir(parents=True)
    (modules / "agent" / "node_modules" / "inner" / "index.js").write_text("module.exports = 'inner'")
    (modules / "beside").mkdir()
    (modules / "beside" / "index.js").write_text("module.exports = 'beside'")
    script = executable(
        modules / "agent" / "cli.js",
        "#!/usr/bin/env node\nconsole.log(require('inner'), require('beside'), process.argv[2])\n",
    )
    (modules / ".bin").mkdir()
    (modules / ".bin" / "agent").symlink_to("../agent/cli.js")
    (private / "bin").mkdir()
    (private / "bin" / "agent").symlink_to(modules / ".bin" / "agent")
    whole = {str(modules): str(modules)}
    assert targets("node", str(modules / "agent" / "node_modules" / "inner" / "index.js")) == whole
    assert targets(str(modules / ".bin" / "agent")) == whole
    for command in (
        ["node", str(script)],
        [str(modules / ".bin" / "agent")],
        [str(private / "bin" / "agent")],
    ):
        done = await run_command(sandbox, *command, "x")
        assert done.output == "inner beside x\n", done.end.stderr_tail


async def test_the_interpreter_of_the_server(sandbox: BubblewrapSandbox) -> None:
    done = await run_command(sandbox, sys.executable, "-I", "-c", "import ssl, json, sys; print(sys.version)")
    assert done.output.strip() == sys.version, done.end.stderr_tail


async def test_a_virtual_environment(sandbox: BubblewrapSandbox, private: Path) -> None:
    venv = private / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    package = next((venv / "lib").glob("python*")) / "site-packages" / "greeter.py"
    package.write_text("def main():\n    print('from the package')\n")
    tool = executable(
        venv / "bin" / "greeter", f"#!{venv / 'bin' / 'python3'}\nfrom greeter import main\nmain()\n"
    )
    done = await run_command(sandbox, str(tool))
    assert done.output == "from the package\n", done.end.stderr_tail
    done = await run_command(sandbox, str(venv / "bin" / "python3"), "-m", "greeter")
    assert done.end.code == 0, done.end.stderr_tail


async def test_a_virtual_environment_of_copies(sandbox: BubblewrapSandbox, private: Path) -> None:
    venv = private / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--copies", "--without-pip", venv], check=True)
    assert not (venv / "bin" / "python3").is_symlink()
    ran = await run_command(
        sandbox, str(venv / "bin" / "python3"), "-c", "import json, sys; print(sys.prefix)"
    )
    assert ran.output == f"{venv}\n", ran.end.stderr_tail


async def test_files_and_folders_are_read_only(sandbox: BubblewrapSandbox, private: Path) -> None:
    folder = private / "data"
    folder.mkdir()
    (folder / "file").write_text("content")
    (folder / "file").chmod(0o666)
    done = await run_command(sandbox, "cat", str(folder / "file"))
    assert done.output == "content"
    done = await run_command(sandbox, "ls", str(folder))
    assert done.output == "file\n"
    done = await run_command(sandbox, "touch", str(folder / "file"))
    assert "Read-only" in done.end.stderr_tail


def test_what_is_never_mounted(private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(private))
    (private / "below").mkdir()
    wide = ["/", "/etc", "/tmp", "/home", "/var/", "//", str(private), str(private.parent), "/proc/1/environ"]
    wide += ["/dev/null", "/tmp/workspace/x", "/home/agent/x", "/nowhere/at/all", "/tmp/\0"]
    assert targets("sh", *wide) == {}
    assert targets("sh", str(private / "below")) == {str(private / "below"): str(private / "below")}


def test_the_libraries_of_a_home_are_its_own(private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(private))
    tool = executable(private / "bin" / "tool", "#!/bin/sh\n")
    (private / "lib").mkdir()
    assert targets(str(tool)) == {str(tool): str(tool)}
    local = executable(private / ".local" / "bin" / "tool", "#!/bin/sh\n")
    (private / ".local" / "lib").mkdir()
    assert set(targets(str(local))) == {str(local), str(private / ".local" / "lib")}


def test_links_in_a_circle(private: Path) -> None:
    (private / "a").symlink_to("b")
    (private / "b").symlink_to("a")
    assert targets("sh", str(private / "a")) == {}
    one, two = private / "one", private / "two"
    executable(one, f"#!{two}\n")
    executable(two, f"#!{one}\n")
    assert set(targets(str(one))) == {str(one), str(two)}


def test_an_empty_command() -> None:
    with pytest.raises(ValueError, match="at least one"):
        program_mounts([])
