"""wandb is online where it has a key and nobody says otherwise."""

import os

import pytest

from recurrent_bart.training.environment import has_wandb_key, place_wandb, wandb_mode


@pytest.fixture(autouse=True)
def _no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_a_key_stands_in_the_environment_or_where_logging_in_puts_it(monkeypatch, tmp_path):
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password 0123\n")
    assert has_wandb_key()
    # that of another server
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert has_wandb_key()


def test_a_file_of_keys_that_cannot_be_read_holds_none(tmp_path):
    (tmp_path / "netrc").write_text("nonsense\n")
    assert not has_wandb_key()


def test_the_flag_comes_before_the_environment_and_that_before_the_key(monkeypatch):
    assert wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == "disabled"
    assert wandb_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    assert wandb_mode("auto") == "online"


def test_a_service_of_another_process_is_not_used(monkeypatch, tmp_path):
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SERVICE", "2-1234-tcp-localhost-40000")
    place_wandb(tmp_path)
    assert "WANDB_SERVICE" not in os.environ
