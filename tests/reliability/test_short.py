"""The scripts of this folder in a shortened form; `make soak` runs the full one."""

import pytest

from . import fuzz, header, kill, server

SEED = 20261125


def test_kill(tmp_path):
    result = kill.run(10, SEED, tmp_path / "library")
    assert result["failures"] == [] and result["kills"] == 10


def test_fuzz(tmp_path):
    result = fuzz.run(400, SEED, tmp_path)
    assert result["failures"] == [] and result["files"] == 400 and result["read"] > 10 and result["bombs_over_size"] < 2


def test_header(tmp_path):
    result = header.run(1500, SEED, tmp_path)
    if "skipped" in result:
        pytest.skip(result["skipped"])
    assert result["failures"] == [] and result["inputs"] == 1500 and result["read"] > 3 and result["branches"] > 60


def test_server(tmp_path):
    result = server.run(9, SEED, tmp_path)
    if "skipped" in result:
        pytest.skip(result["skipped"])
    assert result["failures"] == [] and result["prompts"] == 9 and len(result["outcomes"]) > 1
