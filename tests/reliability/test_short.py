"""The scripts of this folder in a shortened form; `make soak` runs the full one."""

import pytest

from . import fuzz, kill, server

SEED = 20261125


def test_kill(tmp_path):
    result = kill.run(10, SEED, tmp_path / "library")
    assert result["failures"] == [] and result["kills"] == 10


def test_fuzz(tmp_path):
    result = fuzz.run(400, SEED, tmp_path)
    assert result["failures"] == [] and result["files"] == 400 and result["read"] > 10 and result["bombs_over_size"] < 2


def test_server(tmp_path):
    result = server.run(6, SEED, tmp_path)
    if "skipped" in result:
        pytest.skip(result["skipped"])
    assert result["failures"] == [] and result["prompts"] == 6 and result["state"]["hooks"] == 0
