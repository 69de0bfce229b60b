"""A container image out of programs of this machine, as small as sandboxes can be: nothing is fetched.

What is on this machine a symbolic link stays one, so paths inside are those of here.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from fnmatch import fnmatch
from pathlib import Path

PROGRAMS = """
sh bash python3 git tar gzip find du env cat chmod chown cp cut cmp date dd diff dirname basename echo false grep
head id install kill ln ls mkdir mkfifo mknod mktemp mount mv nl printf pwd readlink realpath rm rmdir sed seq setsid
sha256sum sleep sort stat tail tee test timeout touch tr true uname uniq unshare wc which xargs yes
""".split()  # noqa: SIM905
_GIT = ("/usr/lib/git-core", "/usr/share/git-core/templates")
_LEFT_OUT = """
__pycache__ test idlelib tkinter ensurepip lib2to3 turtledemo pydoc_data config-* *.a
git-http-push git-imap-send git-http-backend git-http-fetch git-daemon git-shell scalar
""".split()  # noqa: SIM905
"""Names in folders that are packed whole."""
_FILES = {
    "etc/passwd": "root:x:0:0::/root:/bin/sh\nagent:x:1000:1000::/home/agent:/bin/sh\n",
    "etc/group": "root:x:0:\nagent:x:1000:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}
_FOLDERS = ("tmp", "var/tmp", "var", "home", "run", "proc", "sys", "dev", "mnt", "root", "etc")


def pack() -> bytes:
    """The image's root as a tar."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        packer = _Packer(tar)
        for folder in ("/bin", "/sbin", "/lib", "/lib64"):
            packer.link(Path(folder))
        for name in PROGRAMS:
            if found := shutil.which(name, path="/usr/local/bin:/usr/bin:/bin:/usr/sbin"):
                packer.file(Path(found))
        for folder in _GIT:
            packer.tree(Path(folder))
        packer.tree(_standard_library())
        for folder in _FOLDERS:
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o1777 if folder.endswith("tmp") else 0o755
            tar.addfile(info)
        for name, text in _FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return content.getvalue()


def _standard_library() -> Path:
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin") or "python3"
    script = "import sysconfig; print(sysconfig.get_path('stdlib'))"
    return Path(subprocess.check_output([python, "-I", "-c", script], text=True).strip())


def _left_out(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _LEFT_OUT)


class _Packer:
    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._done: set[str] = set()

    def link(self, path: Path) -> None:
        """A symbolic link, if it is one."""
        if path.is_symlink() and str(path) not in self._done:
            self._done.add(str(path))
            self._add(path)

    def file(self, path: Path) -> None:
        """A program or library, with the links on the way to it and the libraries that it needs."""
        path = path.parent.resolve() / path.name
        if str(path) in self._done:
            return
        self._done.add(str(path))
        self._add(path)
        if path.is_symlink():
            self.file(path.parent / path.readlink())
            return
        with path.open("rb") as file:
            if file.read(4) != b"\x7fELF":
                return
        needed = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False).stdout
        for word in needed.split():
            if word.startswith("/"):
                self.file(Path(word))

    def tree(self, top: Path) -> None:
        for folder, folders, names in os.walk(top):
            folders[:] = [name for name in folders if not _left_out(name)]
            for name in names:
                if not _left_out(name):
                    self.file(Path(folder, name))

    def _add(self, path: Path) -> None:
        info = self._tar.gettarinfo(str(path), str(path).lstrip("/"))
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        if info.isreg():
            with path.open("rb") as file:
                self._tar.addfile(info, file)
        else:
            self._tar.addfile(info)
