"""The scripts of this folder in a shortened form; `make soak` runs the full one."""

from . import kill

SEED = 20261125


def test_kill(tmp_path):
    result = kill.run(10, SEED, tmp_path / "library")
    assert result["failures"] == [] and result["kills"] == 10
