"""Secrets of our own: API keys and their hashes, signed URLs, and the encryption of secrets that people store."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from taskyard.errors import ServiceUnavailableError
from taskyard.settings import Settings

KEY_PREFIX = "phx_"


def new_api_key() -> str:
    """A personal API key: 256 random bits behind the prefix that clients expect."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_api_key(key: str) -> bytes:
    """What is stored of a key. A plain digest suffices: the key is random, not chosen by a person."""
    return hashlib.sha256(key.encode()).digest()


def mask_api_key(key: str) -> str:
    """How a key is shown in lists."""
    return f"{key[:8]}…{key[-4:]}"


URL_REUSE_S = 3300
"""The same signed URL is given out for 55 minutes (tasks-api §3)."""
URL_VALID_S = 3600
"""A signed URL is valid for at least this long."""


class Signer:
    """Signs URLs that work without credentials, with a key that all processes of a site share."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def query(self, subject: str) -> str:
        """`expires=…&signature=…` for a subject such as a path; stable for URL_REUSE_S seconds."""
        now = int(time.time())
        expires = now - now % URL_REUSE_S + URL_REUSE_S + URL_VALID_S
        return f"expires={expires}&signature={self._sign(subject, expires)}"

    def valid(self, subject: str, expires: str, signature: str) -> bool:
        """Whether the query of a URL was made by `query` and has not expired."""
        if not (expires.isascii() and expires.isdigit() and len(expires) <= 12):
            return False
        made = self._sign(subject, int(expires))
        return hmac.compare_digest(made.encode(), signature.encode()) and int(expires) >= time.time()

    def _sign(self, subject: str, expires: int) -> str:
        return hmac.digest(self._key, f"{subject}\n{expires}".encode(), "sha256").hex()


# --- encryption of stored secrets --------------------------------------------------------------------

KEY_FILE = "secret-key"
"""In the data folder: the keys of a site whose settings name none, one a line, the first encrypts."""


class SecretKeyError(ServiceUnavailableError):
    """A stored secret cannot be decrypted with the keys of this machine."""


class Box:
    """Encrypts small texts (Fernet: AES-128-CBC with HMAC-SHA256). The first key encrypts, every key decrypts.

    A key is 32 bytes.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self.fingerprints = tuple(_fingerprint(key) for key in keys)
        """Names the keys without giving them away, in their order."""
        self._fernet = MultiFernet([Fernet(base64.urlsafe_b64encode(key)) for key in keys])

    def seal(self, text: str) -> bytes:
        return self._fernet.encrypt(text.encode())

    def open(self, sealed: bytes) -> str:
        """What was sealed. Raises SecretKeyError when none of the keys fits."""
        try:
            return self._fernet.decrypt(sealed).decode()
        except InvalidToken:
            raise SecretKeyError(
                "A stored secret cannot be decrypted with the keys of this machine. Every machine of a site needs "
                "the same TASKYARD_SECRET_KEYS, and a replaced key has to stay in it until "
                "`taskyard admin rotate-secrets` has run."
            ) from None


def secret_keys(settings: Settings, *, create: bool = False) -> list[bytes]:
    """The keys of this machine: those of the settings, then those of the key file.

    Without any, a new key file is made when `create` allows it. Raises SecretKeyError.
    """
    path = settings.data_dir / KEY_FILE
    given = [key.get_secret_value() for key in settings.secret_keys]
    keys = [_parse_key(text, f"entry {n} of TASKYARD_SECRET_KEYS") for n, text in enumerate(given, 1)]
    keys += _key_file(path)
    if not keys and create:
        _link_new(path, _encode_key(secrets.token_bytes(32)))
        keys = _key_file(path)
    if not keys:
        raise SecretKeyError(
            f"This machine has no key for stored secrets: neither TASKYARD_SECRET_KEYS nor {path} is there. "
            "Every machine of a site needs the same TASKYARD_SECRET_KEYS."
        )
    return keys


def add_file_key(settings: Settings) -> None:
    """Put a new key before those in the key file, so that it encrypts from now on."""
    path = settings.data_dir / KEY_FILE
    _replace(path, [secrets.token_bytes(32), *_key_file(path)])


def keep_file_key(settings: Settings, fingerprint: str) -> None:
    """Remove all keys from the key file but the one of this fingerprint; nothing when it is not there."""
    path = settings.data_dir / KEY_FILE
    keys = [key for key in _key_file(path) if _fingerprint(key) == fingerprint]
    if keys:
        _replace(path, keys)


def _fingerprint(key: bytes) -> str:
    return hmac.new(key, b"fingerprint", hashlib.sha256).hexdigest()[:32]


def _parse_key(text: str, where: str) -> bytes:
    """A key from its text: 32 bytes in base64 of either alphabet."""
    with suppress(ValueError, binascii.Error):
        key = base64.b64decode(text.strip().replace("-", "+").replace("_", "/"), validate=True)
        if len(key) == 32:
            return key
    raise SecretKeyError(f"{where} is not a key: 32 bytes in base64. `openssl rand -base64 32` makes one.")


def _encode_key(key: bytes) -> str:
    return base64.b64encode(key).decode() + "\n"


def _key_file(path: Path) -> list[bytes]:
    try:
        lines = path.read_text("ascii").split()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise SecretKeyError(f"The key file {path} cannot be read: {error}") from error
    return [_parse_key(line, f"line {n} of {path}") for n, line in enumerate(lines, 1)]


def _link_new(path: Path, text: str) -> None:
    """Make a file that only this user can read, unless it is there already: the first of several processes wins."""
    part = _write_part(path, text)
    try:
        with suppress(FileExistsError):
            os.link(part, path)
    finally:
        part.unlink()


def _replace(path: Path, keys: Sequence[bytes]) -> None:
    _write_part(path, "".join(map(_encode_key, keys))).rename(path)


def _write_part(path: Path, text: str) -> Path:
    part = path.with_name(f"{path.name}.{secrets.token_hex(6)}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise SecretKeyError(f"The key file {path} cannot be written: {error.strerror}.") from error
    return part
