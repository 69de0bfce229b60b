"""Options that several commands share."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from taskyard.errors import SetupError

if TYPE_CHECKING:
    from pydantic import ValidationError

    from taskyard.settings import Settings

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", help="Folder of all data; default: TASKYARD_DATA_DIR."),
]
_NO_SETTINGS = re.compile(
    r"TASKYARD_(URL|API_KEY|CONFIG|TEST_.*|(.*_)?SERVICE_(HOST|PORT)(_.*)?|(.*_)?PORT(_\d+_(TCP|UDP)(_.*)?)?)"
)
"""Variables of the clients and the tests; the last two kinds are what Kubernetes tells of a service of this name."""
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load_settings(data_dir: Path | None = None) -> Settings:
    """The settings, with --data-dir before everything else. SetupError names each wrong setting."""
    if data_dir is not None:
        # In the environment, because the folder also holds the settings file, and for child processes.
        os.environ["TASKYARD_DATA_DIR"] = str(data_dir.absolute())
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from taskyard.settings import Settings, config_file

    try:
        _check_config(config_file())
        settings = Settings()
    except ValidationError as error:
        raise SetupError(f"wrong settings: {_problems(error)}") from error
    except SettingsError as error:
        raise SetupError(f"wrong settings: {_not_json() or error}") from error
    except tomllib.TOMLDecodeError as error:
        raise SetupError(f"cannot read {config_file()}: {error}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise SetupError(f"cannot read {_unreadable()}: {error}") from error
    _tell_unknown(settings)
    return settings


def _check_config(path: Path) -> None:
    """A file that is named has to be there; /dev/null is how one names none."""
    if os.environ.get("TASKYARD_CONFIG") and path != Path(os.devnull) and not path.is_file():
        raise SetupError(f"TASKYARD_CONFIG: there is no file {path}.")


def variable(path: tuple[str, ...]) -> str:
    """The environment variable of a setting."""
    return "TASKYARD_" + "__".join(path).upper()


def _problems(error: ValidationError) -> str:
    return "; ".join(
        f"{variable(tuple(map(str, item['loc'])))}: "
        + ("there is no such setting" if item["type"] == "extra_forbidden" else item["msg"])
        for item in error.errors(include_url=False, include_input=False)
    )


def _not_json() -> str:
    """Which variables hold a list or a table that is not JSON; the library names their area only."""
    from pydantic_settings import DotEnvSettingsSource, EnvSettingsSource, SettingsError

    from taskyard.settings import Settings

    found = []
    for source in (EnvSettingsSource(Settings), DotEnvSettingsSource(Settings)):
        given = source.env_vars
        for name in given:
            source.env_vars = {name: given[name]}
            try:
                source()
            except SettingsError:
                found.append(f"""{name.upper()}: has to be JSON, such as ["a", "b"] or {{"name": "value"}}""")
    return "; ".join(dict.fromkeys(found))


def _unreadable() -> Path:
    """Which of the two files of settings it was."""
    from taskyard.settings import config_file

    try:
        Path(".env").read_text("utf-8")
    except FileNotFoundError:
        pass
    except (UnicodeDecodeError, OSError):
        return Path(".env")
    return config_file()


def _tell_unknown(settings: Settings) -> None:
    """A slip in the first part of a name would go unseen: say it of a variable, fail for it in our own file."""
    from pydantic_settings import DotEnvSettingsSource, EnvSettingsSource, TomlConfigSettingsSource

    from taskyard.settings import config_file

    areas = type(settings).model_fields
    toml = TomlConfigSettingsSource(type(settings), toml_file=config_file())()
    if wrong := [name for name in toml if name not in areas]:
        raise SetupError(f"wrong settings: {config_file()}: there is no {_and_similar(wrong[0], areas)}.")
    given = {**DotEnvSettingsSource(type(settings)).env_vars, **EnvSettingsSource(type(settings)).env_vars}
    names = [name.upper() for name in given if name.startswith("taskyard_")]
    unknown = [
        name
        for name in names
        if name.removeprefix("TASKYARD_").split("__")[0].lower() not in areas
        and not _NO_SETTINGS.fullmatch(name)
    ]
    if unknown:
        from taskyard.cli.config import explain

        known = [line.name for line in explain(settings)]
        for name in unknown:
            typer.echo(f"note: there is no setting {_and_similar(name, known)}; it does nothing", err=True)


def _and_similar(name: str, known: Iterable[str]) -> str:
    similar = difflib.get_close_matches(name, known, 1)
    return f"{name} (did you mean {similar[0]}?)" if similar else name
