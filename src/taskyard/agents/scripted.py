#!/usr/bin/env python3
"""A scripted ACP agent: the stand-in for a real one in demos and tests. No model is behind it.

It speaks ACP over standard input and output. A line of the prompt that starts with one of these words is
a directive; a prompt without any gets a small edit (the request is appended to NOTES.md).

    SAY text             a message                     WRITE path text      write a file (backslash n = newline)
    THINK text           a thought                     SHELL command        run a command
    PLAN a|b|c           a plan                        COMMIT message       git add --all, git commit
    OUTPUT json          a message, the text as it is  ASK title            ask for permission, say the choice
    SLEEP seconds        wait                          USAGE in out         token counts
    FLOOD n size         a tool call with n updates    ERROR text           answer the prompt with an error
    CRASH code           exit at once                  HANG                 never answer anything again
    SUBMIT json          give it as the result, by the tool submit_result, and say what that answers
    IGNORE_SIGTERM       only SIGKILL ends it from now on

session/cancel ends a turn between directives and inside SLEEP, SHELL, COMMIT and ASK.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Json = dict[str, Any]

MODES = ("default", "acceptEdits", "plan", "bypassPermissions", "auto")
HOME = "TASKYARD_SCRIPTED_HOME"
"""Names the folder for its sessions; without it they last as long as the process."""
RESULT_TOOL = "submit_result"
MCP = "2025-11-25"
"""The revision of the protocol by which that tool is called."""
POLL_S = 0.02
PAUSE_S = 0.3
IDENTITY = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER")
            for what, value in (("NAME", "Scripted demo agent"), ("EMAIL", "scripted@example.invalid"))}  # fmt: skip


class Cancelled(Exception):  # noqa: N818 - not an error: session/cancel arrived
    pass


class RpcError(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Session:
    """One conversation. What of its script is left to do is kept on disk, so that a later process can go on."""

    def __init__(self, session_id: str, cwd: str, servers: list[Json]) -> None:
        self.id = session_id
        self.cwd = Path(cwd)
        self.servers = servers
        self.mode = MODES[0]
        self.cancelled = threading.Event()
        self.busy = False

    @property
    def path(self) -> Path | None:
        home = os.environ.get(HOME)
        return Path(home, "sessions", f"{self.id}.json") if home else None

    def keep(self, left: list[str]) -> None:
        """Remember the directives that are not done yet."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps({"left": left}), "utf-8")
            part.replace(self.path)

    def kept(self) -> list[str] | None:
        """The same, as an earlier process left them; None when the session is not known here."""
        if self.path is None:
            return []
        try:
            return list(json.loads(self.path.read_text("utf-8"))["left"])
        except FileNotFoundError:
            return None

    def describe(self) -> Json:
        modes = [{"id": mode, "name": mode} for mode in MODES]
        return {"modes": {"currentModeId": self.mode, "availableModes": modes}}


class Agent:
    """Reads messages in one thread; each turn runs in a thread of its own."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sessions: dict[str, Session] = {}
        self.replies: dict[str, queue.Queue[Json]] = {}
        self.hung = threading.Event()
        self.methods: dict[str, Callable[[Json], Json]] = {
            "initialize": self.initialize,
            "authenticate": lambda _: {},
            "session/new": lambda params: self.open(str(uuid.uuid4()), params, with_id=True),
            "session/resume": lambda params: self.open(params["sessionId"], params),
            "session/close": self.close,
            "session/set_mode": self.set_mode,
        }

    def serve(self) -> None:
        for line in sys.stdin.buffer:
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if isinstance(message, dict) and not self.hung.is_set():
                self.receive(message)
        if self.hung.is_set():
            threading.Event().wait()

    def receive(self, message: Json) -> None:
        method, params = message.get("method"), message.get("params") or {}
        if method is None:
            waiting = self.replies.pop(str(message.get("id")), None)
            if waiting is not None:
                waiting.put(message)
        elif method == "session/cancel":
            if session := self.sessions.get(params.get("sessionId", "")):
                session.cancelled.set()
        elif method == "session/prompt":
            # The flag is cleared here, in order, so that a cancel right behind the prompt is not lost.
            session = self.sessions.get(params.get("sessionId", ""))
            if session is None or session.busy:
                text = "A prompt is already running in this session" if session else "Unknown session"
                self.send({"id": message.get("id"), "error": {"code": -32602, "message": text}})
                return
            session.busy = True
            session.cancelled.clear()
            turn = Turn(self, session)
            threading.Thread(target=self.answer, args=(message, turn.run), daemon=True).start()
        elif "id" in message:
            self.answer(message, self.methods.get(method, unknown))

    def answer(self, message: Json, handle: Callable[[Json], Json]) -> None:
        reply: Json = {"id": message["id"]}
        try:
            reply["result"] = handle(message.get("params") or {})
        except RpcError as error:
            reply["error"] = {"code": error.code, "message": str(error)}
        except Exception as error:  # told to the client, as any agent does
            reply["error"] = {"code": -32603, "message": f"{type(error).__name__}: {error}"}
        self.send(reply)

    def send(self, message: Json) -> None:
        text = json.dumps({"jsonrpc": "2.0", **message}, ensure_ascii=False)
        with self.lock:
            if not self.hung.is_set():
                sys.stdout.buffer.write(text.encode("utf-8", "replace") + b"\n")
                sys.stdout.buffer.flush()

    def request(self, method: str, params: Json, cancelled: threading.Event) -> Json:
        request_id = uuid.uuid4().hex
        waiting = self.replies[request_id] = queue.Queue()
        self.send({"id": request_id, "method": method, "params": params})
        while True:
            try:
                return waiting.get(timeout=POLL_S).get("result") or {}
            except queue.Empty:
                if cancelled.is_set():
                    raise Cancelled from None

    # --- methods ---

    def initialize(self, _: Json) -> Json:
        return {
            "protocolVersion": 1,
            "agentCapabilities": {
                "loadSession": False,
                "promptCapabilities": {"embeddedContext": True},
                "mcpCapabilities": {"http": True},
                "sessionCapabilities": {"resume": {}, "close": {}},
            },
            "authMethods": [],
            "agentInfo": {
                "name": "taskyard-scripted",
                "title": "Scripted demo agent (a stand-in, no model)",
                "version": "1.0.0",
            },
        }

    def open(self, session_id: str, params: Json, *, with_id: bool = False) -> Json:
        session = Session(session_id, params["cwd"], params.get("mcpServers") or [])
        if with_id:
            session.keep([])
        elif session.kept() is None:
            raise RpcError(-32002, f"Resource not found: session {session_id}")
        self.sessions[session_id] = session
        return {**({"sessionId": session_id} if with_id else {}), **session.describe()}

    def session(self, params: Json) -> Session:
        session = self.sessions.get(params.get("sessionId", ""))
        if session is None:
            raise RpcError(-32602, "Unknown session")
        return session

    def close(self, params: Json) -> Json:
        session = self.session(params)
        session.cancelled.set()
        del self.sessions[session.id]
        return {}

    def set_mode(self, params: Json) -> Json:
        session = self.session(params)
        if params.get("modeId") not in MODES:
            raise RpcError(-32602, f"Unknown mode: {params.get('modeId')}")
        session.mode = params["modeId"]
        return {}


class Turn:
    """One prompt: runs the directives in order."""

    def __init__(self, agent: Agent, session: Session) -> None:
        self.agent = agent
        self.session = session
        self.usage: Json | None = None
        self.directives: dict[str, Callable[[str], None]] = {
            "SAY": self.say,
            "OUTPUT": self.say,
            "THINK": lambda text: self.update("agent_thought_chunk", content=text_block(text)),
            "PLAN": self.plan,
            "WRITE": self.write,
            "SHELL": lambda command: self.shell(command, command),
            "COMMIT": self.commit,
            "ASK": self.ask,
            "SLEEP": lambda seconds: void(self.session.cancelled.wait(float(seconds))),
            "SUBMIT": self.submit,
            "USAGE": self.count,
            "FLOOD": self.flood,
            "ERROR": self.fail,
            "CRASH": lambda code: os._exit(int(code or "1")),
            "HANG": lambda _: self.hang(),
            "IGNORE_SIGTERM": lambda _: sigterm_ignored.set(),
        }

    def run(self, params: Json) -> Json:
        blocks = params.get("prompt") or []
        text = "\n".join(str(block.get("text", "")) for block in blocks if block.get("type") == "text")
        script = [line for line in text.split("\n") if line.partition(" ")[0] in self.directives]
        # A prompt without directives, after a turn that was broken off: it is told to go on.
        script = script or self.session.kept() or []
        result: Json = {"stopReason": "end_turn"}
        try:
            if not script:
                self.check()
                self.stand_in(text)
            for number, line in enumerate(script):
                self.check()
                self.session.keep(script[number:])
                word, _, rest = line.partition(" ")
                self.directives[word](rest.strip())
            self.check()
        except Cancelled:
            result["stopReason"] = "cancelled"
        finally:
            self.session.busy = False
        self.session.keep([])
        return result if self.usage is None else {**result, "usage": self.usage}

    def stand_in(self, text: str) -> None:
        """What a prompt without directives gets."""
        self.plan("Read NOTES.md | Note the request there")
        self.pause()
        path = self.session.cwd / "NOTES.md"
        old = path.read_text("utf-8", "replace") if path.is_file() else "# Notes\n"
        request = "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines())
        self.write_file("NOTES.md", f"{old.rstrip()}\n\n## Request\n\n{request}\n")
        self.pause()
        self.say(
            "I am Taskyard's scripted demo agent, a stand-in without a model: I cannot do what you asked. "
            "I have noted your request in NOTES.md, so that you can see how work becomes a branch."
        )

    def pause(self) -> None:
        """So that a person can follow."""
        self.session.cancelled.wait(PAUSE_S)
        self.check()

    def check(self) -> None:
        if self.session.cancelled.is_set():
            raise Cancelled

    def update(self, kind: str, /, **fields: Any) -> None:
        params = {"sessionId": self.session.id, "update": {"sessionUpdate": kind, **fields}}
        self.agent.send({"method": "session/update", "params": params})

    def say(self, text: str) -> None:
        self.update("agent_message_chunk", content=text_block(text), messageId=str(uuid.uuid4()))

    def plan(self, text: str) -> None:
        entries = [
            {"content": step.strip(), "priority": "medium", "status": "pending"} for step in text.split("|")
        ]
        self.update("plan", entries=entries)

    def start(self, title: str, kind: str, raw_input: Json, path: Path | None = None) -> str:
        call_id = f"call_{uuid.uuid4().hex[:12]}"
        locations = [{"path": str(path)}] if path else []
        self.update(
            "tool_call", toolCallId=call_id, title=title, kind=kind, status="pending",
            rawInput=raw_input, locations=locations,
        )  # fmt: skip
        return call_id

    def end(self, call_id: str, ok: bool, content: Json, raw_output: Json) -> None:
        status = "completed" if ok else "failed"
        self.update(
            "tool_call_update", toolCallId=call_id, status=status, content=[content], rawOutput=raw_output
        )

    def write(self, argument: str) -> None:
        name, _, text = argument.partition(" ")
        self.write_file(name, text.replace("\\n", "\n"))

    def write_file(self, name: str, text: str) -> None:
        path = self.session.cwd / name
        call_id = self.start(f"Write {name}", "edit", {"path": str(path), "content": text}, path)
        try:
            old = path.read_text("utf-8") if path.exists() else None
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        except (OSError, ValueError) as error:
            self.end(call_id, False, tool_text(str(error)), {"error": str(error)})
            return
        diff = {"type": "diff", "path": str(path), "oldText": old, "newText": text}
        self.end(call_id, True, diff, {"bytes": len(text.encode())})

    def commit(self, message: str) -> None:
        self.shell(f"git commit -m {message!r}", 'git add --all && git commit -m "$MESSAGE"', MESSAGE=message)

    def shell(self, title: str, command: str, **env: str) -> None:
        call_id = self.start(title, "execute", {"command": title})
        # A file, not a pipe: background children may keep it open.
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                cwd=self.session.cwd,
                env={**IDENTITY, **os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            while process.poll() is None:
                if self.session.cancelled.wait(POLL_S):
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            output.seek(0)
            text = output.read().decode("utf-8", "replace")
        raw_output = {"output": text, "exitCode": process.returncode}
        self.end(call_id, process.returncode == 0, tool_text(text), raw_output)

    def ask(self, title: str) -> None:
        call_id = self.start(title, "other", {"title": title})
        choices = (("allow", "Allow"), ("reject", "Reject"))
        params = {
            "sessionId": self.session.id,
            "toolCall": {"toolCallId": call_id, "title": title, "kind": "other", "status": "pending"},
            "options": [{"optionId": key, "name": name, "kind": f"{key}_once"} for key, name in choices],
        }
        answer = self.agent.request("session/request_permission", params, self.session.cancelled)
        outcome = answer.get("outcome") or {}
        if outcome.get("outcome") != "selected":
            raise Cancelled
        choice = outcome["optionId"]
        self.end(call_id, choice == "allow", tool_text(choice), {"choice": choice})
        self.say(f"{title}: {choice}")

    def submit(self, argument: str) -> None:
        arguments = json.loads(argument)
        call_id = self.start(RESULT_TOOL, "other", arguments)
        named = (server.get("url") for server in self.session.servers if server["name"] == "taskyard")
        url = next(named, None)
        if url is None:
            self.end(call_id, False, tool_text("no such tool"), {})
            return
        client = {"name": "taskyard-scripted", "version": "1.0.0"}
        call_mcp(url, "initialize", protocolVersion=MCP, capabilities={}, clientInfo=client)
        call_mcp(url, "notifications/initialized")
        result = call_mcp(url, "tools/call", name=RESULT_TOOL, arguments=arguments)
        text = result["content"][0]["text"]
        self.end(call_id, not result["isError"], tool_text(text), result)
        self.say(text)

    def count(self, argument: str) -> None:
        spent_in, spent_out = (int(number) for number in argument.split())
        total = spent_in + spent_out
        self.usage = {"inputTokens": spent_in, "outputTokens": spent_out, "totalTokens": total}
        self.update("usage_update", used=total, size=200_000)

    def flood(self, argument: str) -> None:
        count, size = (int(number) for number in argument.split())
        call_id = self.start(f"Flood {count} x {size}", "other", {"count": count, "size": size})
        for number in range(1, count + 1):
            self.check()
            content = [tool_text(f"flood {number} ".ljust(size, "x"))]
            self.update("tool_call_update", toolCallId=call_id, status="in_progress", content=content)
        self.end(call_id, True, tool_text("done"), {"count": count})

    def fail(self, text: str) -> None:
        raise RpcError(-32000, text or "scripted error")

    def hang(self) -> None:
        self.agent.hung.set()
        threading.Event().wait()


def call_mcp(url: str, method: str, **params: Any) -> Json:
    """The result of one request to an MCP server; {} of a notification. Its errors are raised."""
    message: Json = {"jsonrpc": "2.0", "method": method, "params": params}
    if not method.startswith("notifications/"):
        message["id"] = 1
    headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    if method != "initialize":
        headers["MCP-Protocol-Version"] = MCP
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.netloc)
    try:
        connection.request("POST", place.path, json.dumps(message), headers)
        answer = json.loads(connection.getresponse().read() or b"{}")
    finally:
        connection.close()
    if "error" in answer:
        raise RpcError(answer["error"]["code"], answer["error"]["message"])
    return dict(answer.get("result", {}))


def text_block(text: str) -> Json:
    return {"type": "text", "text": text}


def tool_text(text: str) -> Json:
    return {"type": "content", "content": text_block(text)}


def unknown(_: Json) -> Json:
    raise RpcError(-32601, "Method not found")


def void(_: object) -> None:
    """Drops a value, so that a call fits where nothing is returned."""


sigterm_ignored = threading.Event()


def on_sigterm(_number: int, _frame: object) -> None:
    if not sigterm_ignored.is_set():
        os._exit(128 + signal.SIGTERM)


def main() -> None:
    signal.signal(signal.SIGTERM, on_sigterm)
    Agent().serve()
    os._exit(0)


if __name__ == "__main__":
    main()
