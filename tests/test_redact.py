"""Secrets are found in every form in which programs pass them on."""

from __future__ import annotations

import base64
import json
import random
import re
import string
from urllib.parse import quote, quote_plus

import pytest
from pydantic import SecretStr

from taskyard.redact import MASK, Redactor, secret_values, secrets_of
from taskyard.settings import ModelSettings, Settings, Upstream

SECRETS = [
    "hunter2!",
    "sk-ant-0123456789abcdef",
    'p"a\\s/s w+ö=rd%',
    "https://x/?a=<1>&b=ö",
    "ghp_" + "Ab3" * 12,
]


@pytest.mark.parametrize("secret", SECRETS)
def test_all_forms(secret: str) -> None:
    redactor = Redactor([secret])
    raw = secret.encode()
    forms = [
        json.dumps({"a": f"x{secret}y"}),
        json.dumps({"a": json.dumps({"b": secret})}),
        json.dumps({"a": secret}, ensure_ascii=False),
        json.dumps({"a": secret}).replace("/", "\\/"),  # as PHP writes it
        re.sub(
            "[<>&]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps({"a": secret}, ensure_ascii=False)
        ),  # Go
        f"https://x/?k={quote(secret, safe='')}&",
        f"https://x/{quote(secret)}",
        f"k={quote_plus(secret)}",
        raw.hex(),
    ]
    for text in forms:
        shown = redactor.text(text)
        assert MASK in shown, text
        assert secret not in shown
        assert redactor.text(shown) == shown
    assert json.loads(redactor.text(forms[0])) == {"a": f"x{MASK}y"}


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_base64_at_every_offset(encode: object) -> None:
    assert callable(encode)
    chance = random.Random(7)
    for _ in range(200):
        secret = "".join(
            chance.choices(string.ascii_letters + string.digits + "/+-_", k=chance.randint(9, 40))
        )
        before, after = ("z" * chance.randint(0, 5) for _ in range(2))
        text = encode(f"{before}{secret}{after}".encode()).decode()
        shown = Redactor([secret]).text(text)
        assert MASK in shown
        left = [
            base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_") for part in shown.split(MASK)[:1]
        ]
        assert secret[3:-3].encode() not in left[0]


def test_lines_of_a_key() -> None:
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASC\nabcdefghij0123456789\n-----END KEY-----\n"
    shown = Redactor([key]).text("+MIIEvQIBADANBgkqhkiG9w0BAQEFAASC\n+abcdefghij0123456789")
    assert shown == f"+{MASK}\n+{MASK}"
    assert MASK in Redactor([key]).text(json.dumps(key))


def test_values_keep_their_shape() -> None:
    redactor = Redactor(["s3cret-value"])
    value = {"a": ["x s3cret-value", 1, None], "s3cret-value": {"b": True}}
    assert redactor.value(value) == {"a": [f"x {MASK}", 1, None], MASK: {"b": True}}
    same = "nothing in it"
    assert redactor.text(same) is same


def test_longer_secrets_come_first_and_each_is_counted() -> None:
    redactor = Redactor(["abcd1234", "abcd1234-5678"])
    assert redactor.text("abcd1234-5678 abcd1234") == f"{MASK} {MASK}"
    redactor.add(["abcd1234"])
    redactor.remove(["abcd1234"])
    assert redactor.text("abcd1234") == MASK
    redactor.remove(["abcd1234"])
    assert redactor.text("abcd1234") == "abcd1234"


def test_the_beginning_of_a_secret_at_the_end() -> None:
    redactor = Redactor(["s3cret-value"])
    assert redactor.unfinished("so s3cr") == (4, False)
    assert redactor.unfinished("so s3cret") == (6, True)
    assert redactor.unfinished("so s3cret-value") == (0, False)
    assert redactor.unfinished("nothing") == (0, False)
    assert Redactor().unfinished("s3cret") == (0, False)
    assert Redactor(["tiger"]).unfinished("ti") == (2, True)
    assert Redactor(["tiger", "tigers-are-striped"]).unfinished("ti") == (2, True)
    assert Redactor(["tiger", "tiger-stripes"]).unfinished("a tiger") == (5, False)


def test_short_values_are_no_secrets() -> None:
    assert Redactor(["", "a", "123"]).text("a 123") == "a 123"


def test_which_variables_are_secrets() -> None:
    variables = {
        "NODE_ENV": "production",
        "REPO": "acme/shop",
        "PORT": "8080",
        "GREETING": "good morning 2 you all",
        "API_KEY": "letmein",
        "DATABASE": "postgres://app:pw1@db.example/shop",
        "db_password": "tiger",
    }
    assert secret_values(variables) == ["letmein", "postgres://app:pw1@db.example/shop", "tiger"]


def test_secrets_of_settings() -> None:
    settings = Settings(
        _env_file=None,
        database_url="postgresql://me:db%20pass@db/taskyard",
        models=ModelSettings(
            anthropic=Upstream(base_url="https://a.example", api_key=SecretStr("model-key")),
            openai=Upstream(base_url="https://o.example", headers={"x-gate": SecretStr("gate-key")}),
        ),
    )
    assert {"db pass", "model-key", "gate-key"} <= set(secrets_of(settings))
