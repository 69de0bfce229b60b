"""Attacks that a sandbox must hold off, tried for real; for `taskyard doctor` and the server's start.

Whether a sandbox holds depends on the machine's kernel, bwrap and configuration as much as on this code,
so a test suite that passed elsewhere does not answer for this machine. Nothing is harmed where one succeeds:
the one file that they try to write gets its own content.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from taskyard.errors import TaskyardError
from taskyard.sandbox.provider import Limits, Problem, Provider, Sandbox, SandboxError, Spec
from taskyard.sandbox.streams import read_all

DEADLINE_S = 60.0
MOST = 64 * 1024
"""Bytes that a command may say."""
_LIMITS = Limits(cpus=1, memory_mb=256, pids=64, tmp_mb=16)
_REMEDY = "Do not run agents here: update the kernel and bubblewrap, and report it if that does not help."
_HELD = "held"

# Each prints what it got hold of, and _HELD alone if it got nothing.

KERNEL_SETTINGS = """
f=/proc/sys/kernel/core_pattern
v=$(cat $f) && (printf %s "$v" > $f) 2>/dev/null && echo "wrote $f"
find /proc/sys -type f -writable 2>/dev/null | head -n 3
echo held
"""
# What is looked for comes by standard input, since arguments are among what is searched.
ENVIRONMENT = """
read -r name; read -r value
for file in /proc/[0-9]*/environ /proc/[0-9]*/cmdline; do
  case $(tr '\\0' '\\n' < "$file" 2>/dev/null) in *"$name"*|*"$value"*) echo "read $name in $file" ;; esac
done
case $(env) in *"$name"*|*"$value"*) echo "has $name" ;; esac
echo held
"""
# Only what is built into the shell, and no listing of the folder, since those open descriptors themselves.
# `host:` is how gVisor calls a pipe that its container was given.
DESCRIPTORS = """
for number in 0 1 2; do
  case $(readlink /proc/$$/fd/$number) in pipe:*|host:*) ;; *) echo "descriptor $number is no pipe" ;; esac
done
number=3
while [ $number -lt 4096 ]; do
  if [ -e /proc/$$/fd/$number ] || [ -L /proc/$$/fd/$number ]; then echo "descriptor $number is open"; fi
  number=$((number+1))
done
echo held
"""


async def selftest(provider: Provider) -> list[Problem]:
    """Try the attacks in a new sandbox; one Problem each, all fatal if not ok."""
    name, value = f"TASKYARD_SELFTEST_{secrets.token_hex(4).upper()}", secrets.token_hex(16)
    attacks = {
        "kernel settings": (KERNEL_SETTINGS, "the kernel's settings cannot be changed"),
        "server environment": (ENVIRONMENT, "the server's environment cannot be read"),
        "open descriptors": (DESCRIPTORS, "no descriptor of the server is open"),
    }
    try:
        async with asyncio.timeout(DEADLINE_S):
            sandbox = await provider.create(Spec(f"selftest-{secrets.token_hex(8)}", _LIMITS))
            try:
                with _bait(name, value):
                    found = {
                        attack: await _attack(sandbox, script, f"{name}\n{value}\n")
                        for attack, (script, _) in attacks.items()
                    }
            finally:
                await sandbox.destroy()
    except TimeoutError:
        return [
            Problem("sandbox self-test", False, f"no result for {DEADLINE_S:g} seconds", _REMEDY, fatal=True)
        ]
    except TaskyardError as error:
        return [Problem("sandbox self-test", False, error.detail, _REMEDY, fatal=True)]
    return [
        Problem(f"sandbox: {attack}", True, attacks[attack][1])
        if said == _HELD
        else Problem(f"sandbox: {attack}", False, f"an agent can get through: {said}", _REMEDY, fatal=True)
        for attack, said in found.items()
    ]


async def missing_programs(provider: Provider, names: Iterable[str]) -> set[str]:
    """Which of these programs a sandbox does not have. Raises TaskyardError."""
    script = 'for name; do command -v -- "$name" >/dev/null || echo "$name"; done; echo held'
    sandbox = await provider.create(Spec(f"programs-{secrets.token_hex(8)}", _LIMITS))
    try:
        async with asyncio.timeout(DEADLINE_S):
            said = await _said(sandbox, ["/bin/sh", "-c", script, "sh", *names], "")
    except TimeoutError:
        raise SandboxError(f"a sandbox has not said for {DEADLINE_S:g} seconds what it has") from None
    finally:
        await sandbox.destroy()
    *missing, last = said.splitlines()
    if last != _HELD:
        raise SandboxError(f"a sandbox does not say what it has: {said}")
    return set(missing)


async def _attack(sandbox: Sandbox, script: str, text: str) -> str:
    return await _said(sandbox, ["/bin/sh", "-c", script], text)


async def _said(sandbox: Sandbox, argv: Sequence[str], text: str) -> str:
    """What a command says that gets a text as its standard input."""
    process = await sandbox.exec(argv, stdin=True, max_output=MOST, seconds=DEADLINE_S)
    try:
        assert process.stdin is not None
        process.stdin.write(text.encode())
        output = await read_all(process, MOST)
        end = await process.wait()
    finally:
        await process.kill()
    return (
        output.decode("utf-8", "replace").strip()
        or f"no result ({end.code}) {end.stderr_tail.strip()}".strip()
    )


@contextmanager
def _bait(name: str, value: str) -> Iterator[None]:
    """For a moment, a variable in the server's environment and an open descriptor that children inherit."""
    read, write = os.pipe()
    os.set_inheritable(write, True)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        os.close(read)
        os.close(write)
