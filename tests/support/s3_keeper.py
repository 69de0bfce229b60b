"""Hold a SeaweedFS server for one test process: `python s3_keeper.py FOLDER`.

Prints its S3 address once it answers, then waits for the end of its standard input: the system closes that pipe however
the test process ends, so a killed session leaves no server behind.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key-0123456789"
START_S = 60.0
PORTS = ("master", "volume", "filer", "s3")


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def start(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server that answers, and its address; somebody else may take a port first, then it is tried anew."""
    folder.mkdir(parents=True)
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    identity = {"name": "test", "credentials": credentials, "actions": actions}
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        ports = free_ports(2 * len(PORTS))
        options = [f"-{name}.port={port}" for name, port in zip(PORTS, ports, strict=False)]
        options += [f"-{name}.port.grpc={port}" for name, port in zip(PORTS, ports[4:], strict=True)]
        weed = Path(sysconfig.get_path("scripts")) / "weed"
        options += [
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=20",
        ]
        command = [
            str(weed),
            "server",
            f"-dir={folder}",
            "-ip=127.0.0.1",
            "-s3",
            f"-s3.config={config}",
            *options,
        ]
        with (folder / "log").open("ab") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{ports[3]}"
        while server.poll() is None and time.monotonic() < end:
            if answers(url):
                return server, url
            time.sleep(0.05)
        server.kill()
        server.wait()
    raise SystemExit(f"SeaweedFS did not start: {(folder / 'log').read_text(errors='replace')[-2000:]}")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return error.code == 403  # its way to say that nobody asked
    except OSError:
        return False


def main(folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    server, url = start(folder)
    try:
        print(url, flush=True)
        sys.stdin.read()
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
