"""Options that several commands share."""

from __future__ import annotations

import os
import tomllib
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
        return Settings()
    except ValidationError as error:
        raise SetupError(f"wrong settings: {_problems(error)}") from error
    except SettingsError as error:
        raise SetupError(f"wrong settings: {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise SetupError(f"cannot read {config_file()}: {error}") from error


def variable(path: tuple[str, ...]) -> str:
    """The environment variable of a setting."""
    return "TASKYARD_" + "__".join(path).upper()


def _problems(error: ValidationError) -> str:
    return "; ".join(
        f"{variable(tuple(map(str, item['loc'])))}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False)
    )
