"""`taskyard config`: each setting, its value and where it came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from taskyard.cli.options import AsJson, DataDir, load_settings, variable

if TYPE_CHECKING:
    from taskyard.settings import Settings

HIDDEN = "(hidden)"
VENDOR_KEYS = {"anthropic": "ANTHROPIC_API_KEY", "openai": "OPENAI_API_KEY"}


def add_to(app: typer.Typer) -> None:
    app.command()(config)


@dataclass(frozen=True)
class Line:
    """One setting: the environment variable that sets it, its value as text, its origin."""

    name: str
    value: str
    origin: str


def config(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show each setting, its value and where it came from. Secrets are hidden."""
    lines = list(explain(load_settings(data_dir)))
    if as_json:
        shown = [{"name": line.name, "value": line.value, "origin": line.origin} for line in lines]
        typer.echo(json.dumps(shown, indent=2))
        return
    width = max(len(line.name) for line in lines)
    for line in lines:
        typer.echo(f"{line.name:<{width}}  {line.value}  ({line.origin})")


def explain(settings: Settings) -> Iterator[Line]:
    """All settings in the order of their definition."""
    origins = list(_origins())
    for path, value in _leaves(settings):
        origin = next((name for name, given in origins if _given(given, path)), "default")
        if path[:1] == ("models",) and path[-1] == "api_key" and value is None:
            yield _vendor_key(settings, path, origin)
        else:
            yield Line(variable(path), _text(path, value), origin)


def _origins() -> Iterator[tuple[str, dict[str, Any]]]:
    """Where settings come from, first wins, and what each place gives."""
    from pydantic_settings import DotEnvSettingsSource, EnvSettingsSource, TomlConfigSettingsSource

    from taskyard.settings import Settings, config_file

    yield "environment", EnvSettingsSource(Settings)()
    yield ".env", DotEnvSettingsSource(Settings)()
    yield str(config_file()), TomlConfigSettingsSource(Settings, toml_file=config_file())()


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    from pydantic import BaseModel

    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _leaves(getattr(value, name), (*path, name))
    elif isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, (*path, str(name)))
    else:
        yield path, value


def _given(values: Any, path: tuple[str, ...]) -> bool:
    """Whether a place names a setting. A place may give a whole area as one JSON text."""
    for name in path:
        if isinstance(values, str):
            values = _parsed(values)
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _text(path: tuple[str, ...], value: Any) -> str:
    from pydantic import SecretStr

    # An agent's environment may hold anything.
    if isinstance(value, SecretStr) or (path[:1] == ("agents",) and "env" in path[2:-1]):
        return HIDDEN
    if isinstance(value, list) and any(isinstance(item, SecretStr) for item in value):
        return HIDDEN
    if value is None:
        return "not set"
    text = json.dumps(value) if isinstance(value, list | dict | bool) else str(value)
    return re.sub(r"(://)[^/@\s]+@", rf"\1{HIDDEN}@", text)  # a password in a URL


def _vendor_key(settings: Settings, path: tuple[str, ...], origin: str) -> Line:
    """A model key that is not in the settings may be in its file or in the vendor's usual variable."""
    import os

    name = path[1]
    if getattr(settings.models, name).api_key_file is not None:
        return Line(variable(path), HIDDEN, f"file named by {variable((*path[:-1], 'api_key_file'))}")
    if os.environ.get(VENDOR_KEYS[name]):
        return Line(variable(path), HIDDEN, VENDOR_KEYS[name])
    return Line(variable(path), "not set", origin)
