"""wandb mode: online only with an API key, unless the user's wandb settings say otherwise."""

import os

import pytest

from recurrent_bart.training.environment import has_wandb_key, set_wandb_environment, wandb_mode, wandb_settings


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    """Remove wandb's variables and keys, and put settings files into folders of the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def mode(asked="auto"):
    return wandb_mode(asked, wandb_settings())


def write_settings(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings").write_text(f"[default]\n{text}\n")


def test_a_key_stands_in_the_environment_or_where_logging_in_puts_it(monkeypatch, tmp_path):
    assert not has_wandb_key(wandb_settings())
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password 0123\n")
    assert has_wandb_key(wandb_settings())
    # this variable names another server, for which there is no key
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_wandb_key(wandb_settings())
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert has_wandb_key(wandb_settings())


def test_a_file_of_keys_that_cannot_be_read_holds_none(tmp_path):
    (tmp_path / "netrc").write_text("nonsense\n")
    assert not has_wandb_key(wandb_settings())


def test_the_flag_comes_before_the_environment_and_that_before_the_key(monkeypatch):
    assert mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode() == "disabled"
    assert mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "")
    assert mode() == "online"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dryrun", "offline"),
        ("Offline", "offline"),
        ("OFFLINE", "offline"),
        (" offline ", "offline"),
        ("DISABLED", "disabled"),
        ("run", "online"),
        ("shared", "online"),
        ("Online", "online"),
    ],
)
def test_every_mode_of_wandb_is_understood_with_a_key_there(monkeypatch, text, expected):
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    monkeypatch.setenv("WANDB_MODE", text)
    assert mode() == expected


@pytest.mark.parametrize("text", ["off line", "no", "false", "none", "0"])
def test_a_mode_that_wandb_does_not_have_is_refused(monkeypatch, text):
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    monkeypatch.setenv("WANDB_MODE", text)
    with pytest.raises(ValueError, match=rf"WANDB_MODE {text} .*: allowed are online, offline, disabled, dryrun"):
        mode()
    assert mode("online") == "online"


@pytest.mark.parametrize(("text", "expected"), [("true", "disabled"), ("1", "disabled"), ("false", "online")])
def test_the_older_variable_disables_too(monkeypatch, text, expected):
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    monkeypatch.setenv("WANDB_DISABLED", text)
    assert mode() == expected


def test_what_the_commands_of_wandb_have_set_holds(monkeypatch, tmp_path):
    """Read what `wandb offline` and `wandb login --host` write to the working folder or the user's folder."""
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    write_settings(tmp_path / ".config" / "wandb", "base_url = http://wandb.example.org\nmode = disabled")
    assert mode() == "disabled"
    write_settings(tmp_path / "wandb", "mode = offline")
    assert mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert mode() == "online"
    given = wandb_settings()
    assert given["base_url"] == "http://wandb.example.org"
    # wandb no longer finds its settings files, but it reads this variable
    set_wandb_environment(tmp_path / "run", given, is_online=False)
    assert os.environ["WANDB_BASE_URL"] == "http://wandb.example.org"


def test_a_damaged_settings_file_says_nothing(tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_bytes(b"mode = \xff")
    assert wandb_settings() == {}


def test_a_service_of_another_process_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_SERVICE", "2-1234-tcp-localhost-40000")
    set_wandb_environment(tmp_path, wandb_settings(), is_online=False)
    assert "WANDB_SERVICE" not in os.environ


@pytest.mark.parametrize(("is_online", "expected"), [(True, "online"), (False, "offline")])
def test_wandb_is_told_the_resolved_mode(monkeypatch, tmp_path, is_online, expected):
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    set_wandb_environment(tmp_path, wandb_settings(), is_online)
    assert os.environ["WANDB_MODE"] == expected
