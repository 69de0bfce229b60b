"""Installing, against a small script that plays npm: no network. Node is played too where its age matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from taskyard.agents import install as module
from taskyard.agents.adapters import Adapter, adapters
from taskyard.agents.install import check_node, describe, install
from taskyard.errors import SetupError
from taskyard.settings import AgentSettings, Settings

# Puts a package into node_modules for each argument like NAME@VERSION.
NPM = """#!/bin/sh
echo "$@" > "$LOG"
umask >> "$LOG"
for item in "$@"; do
  case "$item" in
    install|--*) continue ;;
  esac
  name=${item%@*} version=${item##*@}
  mkdir -p "node_modules/$name/dist"
  echo "{\\"version\\": \\"${FAKE_VERSION:-$version}\\"}" > "node_modules/$name/package.json"
  echo "// $name" > "node_modules/$name/dist/index.js"
done
"""


class Machine:
    """A PATH with a node and an npm of ours."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin = root / "bin"
        self.bin.mkdir()
        self.log = root / "npm.log"
        self.settings = Settings(data_dir=root / "data")
        self.program("node", "#!/bin/sh\necho v20.1.0\n")
        self.program("npm", NPM)
        monkeypatch.setenv("PATH", f"{self.bin}:/usr/bin:/bin")
        monkeypatch.setenv("LOG", str(self.log))

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def adapter(self, name: str) -> Adapter:
        return adapters(self.settings)[name]

    @property
    def left_behind(self) -> list[str]:
        agents = self.settings.data_dir / "agents"
        return sorted(path.name for path in agents.iterdir()) if agents.is_dir() else []


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_describe(machine: Machine) -> None:
    info = describe(machine.adapter("codex"))
    assert (info.package, info.version) == ("@agentclientprotocol/codex-acp", "2.6.0")
    assert info.pins == ("@openai/codex@0.166.0",)
    assert not info.installed
    assert info.size_mb > 100
    assert info.licence == "Apache-2.0"
    scripted = describe(machine.adapter("scripted"))
    assert scripted.installed
    assert scripted.package is None


def test_install_pins_and_moves_into_place(machine: Machine) -> None:
    info = install(machine.adapter("codex"))
    assert info.installed
    assert machine.left_behind == ["codex-2.6.0"]
    arguments, umask = machine.log.read_text().splitlines()
    assert arguments.endswith("@agentclientprotocol/codex-acp@2.6.0 @openai/codex@0.166.0")
    assert "--save-exact" in arguments
    assert umask == "0022"
    folder = info.folder
    assert folder is not None
    assert folder.stat().st_mode & 0o777 == 0o755
    assert json.loads((folder / "package.json").read_text()) == {"private": True}
    entry = folder / "node_modules/@agentclientprotocol/codex-acp/dist/index.js"
    assert machine.adapter("codex").argv() == [str(machine.bin / "node"), str(entry)]


def test_a_second_install_does_nothing(machine: Machine) -> None:
    install(machine.adapter("claude"))
    machine.log.unlink()
    assert install(machine.adapter("claude")).installed
    assert not machine.log.exists()


def test_a_broken_earlier_folder_is_replaced(machine: Machine) -> None:
    adapter = machine.adapter("claude")
    assert adapter.folder is not None
    (adapter.folder / "node_modules").mkdir(parents=True)
    (adapter.folder / "old").touch()
    assert install(adapter).installed
    assert not (adapter.folder / "old").exists()


def test_a_failure_leaves_nothing(machine: Machine) -> None:
    machine.program("npm", "#!/bin/sh\nmkdir node_modules\necho 'E404 no such package' >&2\nexit 1\n")
    with pytest.raises(
        SetupError, match=r"(?s)could not install .*claude-agent-acp@0\.101\.0.*E404"
    ) as caught:
        install(machine.adapter("claude"))
    assert "exit 1" in str(caught.value)
    assert machine.left_behind == []


def test_another_version_than_asked_is_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VERSION", "0.49.0")
    with pytest.raises(SetupError, match=r"0\.101\.0 and installed 0\.49\.0"):
        install(machine.adapter("claude"))
    assert machine.left_behind == []


def test_a_package_without_its_program_is_refused(machine: Machine) -> None:
    machine.program("npm", NPM.replace('echo "// $name"', "true #"))
    with pytest.raises(SetupError, match=r"has no dist/index\.js"):
        install(machine.adapter("claude"))


def test_npm_that_does_not_end(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INSTALL_S", 0.2)
    machine.program("npm", "#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(SetupError, match="did not finish"):
        install(machine.adapter("claude"))
    assert machine.left_behind == []


@pytest.mark.parametrize("missing", ["node", "npm"])
def test_missing_programs(machine: Machine, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    (machine.bin / missing).unlink()
    monkeypatch.setenv("PATH", str(machine.bin))
    with pytest.raises(SetupError, match=f"'{missing}' was not found on PATH"):
        check_node()


@pytest.mark.parametrize("version", ["v18.19.0", "nonsense"])
def test_old_node(machine: Machine, version: str) -> None:
    machine.program("node", f"#!/bin/sh\necho {version}\n")
    with pytest.raises(SetupError, match=f"Node.js {version}; the agents need 20"):
        install(machine.adapter("codex"))
    assert machine.left_behind == []


def test_no_space(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 5_000_000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(SetupError, match="has 5 MB left"):
        install(machine.adapter("codex"))


def test_nothing_to_install(machine: Machine) -> None:
    changed: dict[str, Any] = {"claude": AgentSettings(command=["my-agent"])}
    settings = Settings(data_dir=machine.settings.data_dir, agents=changed)
    for name, text in (("claude", "it runs my-agent"), ("scripted", "it runs")):
        with pytest.raises(SetupError, match=text):
            install(adapters(settings)[name])
