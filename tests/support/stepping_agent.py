#!/usr/bin/env python3
"""An ACP agent for storms: it works in small steps, keeps its session on disk, and can be killed at any moment.

A prompt's last `MSG name STEPS count PAUSE seconds` says what to do. Each step adds a line to `work/NAME.txt` and
commits it. What is done already is known from that file alone, as a real agent looks at its repository, so a step that
was saved is never done twice. For those who look at the record later, it says `GOT name PID n` for each prompt that it
receives, `STEP name number`, and `DONE name`. Sessions are loaded, and replayed as REPLAYED, which nobody may see.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]
ORDER = re.compile(r"MSG (\S+) STEPS (\d+) PAUSE ([\d.]+)")
PATIENCE_S = 90.0
"""A full disk is waited for this long."""


class Agent:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.cwd: dict[str, Path] = {}
        self.cancelled = threading.Event()

    def serve(self) -> None:
        for line in sys.stdin.buffer:
            message = json.loads(line)
            method = message.get("method")
            if method == "session/cancel":
                self.cancelled.set()
            elif method == "session/prompt":
                self.cancelled.clear()
                threading.Thread(target=self.answer, args=(message, self.prompt), daemon=True).start()
            elif method is not None and "id" in message:
                methods: dict[str, Callable[[Json], Json]] = {
                    "initialize": initialize,
                    "session/new": self.new,
                    "session/load": self.load,
                }
                self.answer(message, methods.get(method, lambda _: {}))

    def answer(self, message: Json, handle: Callable[[Json], Json]) -> None:
        try:
            reply: Json = {"result": handle(message.get("params") or {})}
        except Exception as error:  # told to the client, as any agent does
            reply = {"error": {"code": -32603, "message": f"{type(error).__name__}: {error}"}}
        self.send({"id": message["id"], **reply})

    def send(self, message: Json) -> None:
        with self.lock:
            sys.stdout.buffer.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
            sys.stdout.buffer.flush()

    def update(self, session: str, update: str, /, **fields: Any) -> None:
        params = {"sessionId": session, "update": {"sessionUpdate": update, **fields}}
        self.send({"method": "session/update", "params": params})

    def say(self, session: str, text: str) -> None:
        content = {"type": "text", "text": text}
        self.update(session, "agent_message_chunk", content=content, messageId=str(uuid.uuid4()))

    # --- sessions ---

    def new(self, params: Json) -> Json:
        session = str(uuid.uuid4())
        self.cwd[session] = Path(params["cwd"])
        patiently(lambda: remember(session, {"new": True}))
        return {"sessionId": session}

    def load(self, params: Json) -> Json:
        session = params["sessionId"]
        for line in session_file(session).read_text().splitlines():
            if "prompt" in line:
                self.say(session, f"REPLAYED {line}")
        self.cwd[session] = Path(params["cwd"])
        return {}

    # --- a turn ---

    def prompt(self, params: Json) -> Json:
        session = params["sessionId"]
        text = "\n".join(block.get("text", "") for block in params["prompt"] if block.get("type") == "text")
        orders = ORDER.findall(text)
        if not orders:
            raise ValueError(f"no order in {text[-300:]!r}")
        name, steps, pause = orders[-1]
        patiently(lambda: remember(session, {"prompt": name, "pid": os.getpid()}))
        self.say(session, f"GOT {name} PID {os.getpid()}")
        for number in range(1, int(steps) + 1):
            if self.cancelled.wait(float(pause)):
                return {"stopReason": "cancelled"}
            call = f"{name}-{number}-{uuid.uuid4().hex[:8]}"
            self.update(
                session, "tool_call", toolCallId=call, title=f"Step {number}", kind="edit", status="pending"
            )
            step(self.cwd[session], name, number)
            self.update(session, "tool_call_update", toolCallId=call, status="completed")
            self.say(session, f"STEP {name} {number}")
        self.say(session, f"DONE {name}")
        return {"stopReason": "end_turn"}


def initialize(_: Json) -> Json:
    return {
        "protocolVersion": 1,
        "agentCapabilities": {"loadSession": True, "promptCapabilities": {"embeddedContext": True}},
        "authMethods": [],
        "agentInfo": {"name": "stepping", "title": "Stepping agent", "version": "1"},
    }


def session_file(session: str) -> Path:
    return Path(os.environ["CLAUDE_CONFIG_DIR"]) / "projects" / f"{session}.jsonl"


def remember(session: str, what: Json) -> None:
    path = session_file(session)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(what) + "\n")
        file.flush()
        os.fsync(file.fileno())


def step(cwd: Path, name: str, number: int) -> None:
    path = cwd / "work" / f"{name}.txt"

    def write() -> None:
        path.parent.mkdir(exist_ok=True)
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # without a line that was cut off
        if f"{number}\n" not in whole.splitlines(keepends=True):
            new = path.with_suffix(".new")
            new.write_text(f"{whole}{number}\n")
            new.replace(path)

    def commit() -> None:
        git(cwd, "add", "--all")
        if git(cwd, "status", "--porcelain"):
            git(cwd, "commit", "--quiet", "--message", f"{name} {number}")

    patiently(write)
    patiently(commit)


def git(cwd: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"git {words[0]}: {done.stderr.strip()}")
    return done.stdout


def patiently(work: Callable[[], None]) -> None:
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return work()
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.2)


if __name__ == "__main__":
    Agent().serve()
