"""The scripts of this folder in a shortened form; `make soak` runs the full one."""

from . import fuzz, kill

SEED = 20261125


def test_kill(tmp_path):
    result = kill.run(10, SEED, tmp_path / "library")
    assert result["failures"] == [] and result["kills"] == 10


def test_fuzz(tmp_path):
    result = fuzz.run(400, SEED, tmp_path)
    assert result["failures"] == [] and result["files"] == 400 and result["read"] > 10 and result["bombs_over_size"] < 2
