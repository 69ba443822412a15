"""Which values are secrets, and where they are found: one rule for all that is printed or written down."""

import pytest

from examples.tcod.model.client import without_login
from examples.tcod.settings.secrets import is_secret, text_without, without_secrets

NUM_GPUS = 0
SECRET = "api_key WANDB_API_KEY --wandb-key HF_TOKEN apiKey OPENAI_KEY token ssl_keyfile_password Authorization"
PUBLIC = "--input-key label_key --eval-reward-key multimodal_keys --max-total-tokens tokenizer_path monkey KEYBOARD"


@pytest.mark.parametrize("names, secret", [(SECRET, True), (PUBLIC, False)])
def test_a_secret_is_known_by_its_name(names, secret):
    assert {name: is_secret(name) for name in names.split()} == dict.fromkeys(names.split(), secret)


def test_secrets_are_left_out_however_deep():
    command = ["--wandb-key", "abcd", "--api-key=x y", "--flag", "http://me:w@rd@h:1", '{"api_key": "k"}']
    shown = ["--wandb-key", "SECRET", "--api-key=SECRET", "--flag", "http://SECRET@h:1", '{"api_key": "SECRET"}']
    assert without_secrets(command) == shown
    settings = {"tcod_env_args": {"size": 9, "shops": [{"password": "abcd"}]}, "tcod_horizon": 3, "no_key": ""}
    assert without_secrets(settings) == {**settings, "tcod_env_args": {"size": 9, "shops": [{"password": "SECRET"}]}}
    log = "args: {'password': 'abcd'} me:w@rd, x y and key k"
    assert text_without("abcdefg", {"api_key": "abcd"}, {"password": "abcdef"}) == "SECRETg"
    assert text_without(log, command, settings) == "args: {'password': 'SECRET'} SECRET, x y and key k"


def test_an_address_is_shown_without_its_login():
    assert without_login("http://me:w@rd@[::1]:3/generate") == "http://[::1]:3/generate"
    assert without_login("http://h:1/a@b") == "http://h:1/a@b"
