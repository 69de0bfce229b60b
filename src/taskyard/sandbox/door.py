"""The first program inside a sandbox that has a way out: python3 -I -S door.py FD COMMAND [ARGUMENT…].

Binds 127.0.0.1:3128, sends the listening descriptor to the server through the Unix socket FD, waits for one
byte, and becomes the command. So the server accepts connections that are made inside, without a program
of ours, or the path of a socket, in there. Standard library only: the interpreter is the host's.
"""

from __future__ import annotations

import os
import socket
import sys


def main(arguments: list[str]) -> int:
    """Returns only if it fails, with the exit status; the reason goes to standard error."""
    with socket.socket(fileno=int(arguments[0])) as server:
        server.set_inheritable(False)
        with socket.create_server(("127.0.0.1", 3128), backlog=128) as listener:
            socket.send_fds(server, [b"L"], [listener.fileno()])
        if server.recv(1) != b"G":
            return 125  # the server is gone, or has changed its mind
    command = arguments[1:]
    try:
        os.execvp(command[0], command)  # noqa: S606 - the command is a list, no shell is wanted
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201 - a program of its own
        return 127 if isinstance(error, FileNotFoundError) else 126


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
