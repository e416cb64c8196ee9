"""The benchmark of a training step runs in both hosts, and its shares and ratios are what they are called."""

import json
import sys

import pytest

from benchmarks import training
from tests.nodes.comfy_server import find_comfyui

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    output, patch = tmp_path_factory.mktemp("bench") / "training.json", pytest.MonkeyPatch()
    patch.setitem(training.MODELS, "demo", training.MODELS["demo"] | {"calibration": 8, "batch": 2, "replay_batch": 4})
    ways = ["ours:diffusers", "ours_no_replay:diffusers", "peft:diffusers", "ours:comfyui", "native:comfyui"]
    training.main(["--models", "demo", "--steps", "4", "--repeats", "1", "--output", str(output), "--ways", *ways])
    patch.undo()
    found = json.loads(output.read_text())
    assert found["meta"]["command"] and found["meta"]["device"]
    return {(r["row"], r["host"]): r for r in found["rows"]}


def test_every_way_was_measured(rows):
    wanted = {("ours", "diffusers"), ("ours_no_replay", "diffusers"), ("peft", "diffusers")}
    if not isinstance(find_comfyui(), str):
        wanted |= {("ours", "comfyui"), ("native", "comfyui")}
    assert set(rows) == wanted
    assert all(r["seconds"] > 0 and r["bytes"] > 50e6 for r in rows.values())


def test_ours_is_set_beside_the_best_of_the_others(rows):
    others = [r for (name, _), r in rows.items() if not name.startswith("ours")]
    for (name, host), r in rows.items():
        if name.startswith("ours"):
            assert r["time_ratio"] == pytest.approx(r["seconds"] / min(o["seconds"] for o in others))
            assert r["memory_ratio"] == pytest.approx(r["bytes"] / min(o["bytes"] for o in others))
            same = next(o for o in others if o["host"] == host)
            assert r["time_ratio_same_host"] == pytest.approx(r["seconds"] / same["seconds"])


def test_shares_make_a_whole_step(rows):
    with_replay, without = (rows[way, "diffusers"] for way in ("ours", "ours_no_replay"))
    for r in (with_replay, without):
        assert sum(r["shares"].values()) == pytest.approx(1) and min(r["shares"].values()) >= 0
        assert r["shares"]["projection"] > 0 and r["shares"]["retraction"] > 0
        assert r["start_up_share"] == pytest.approx((r["calibration"] + r["once"]) / (500 * r["seconds"]))
    parts = with_replay["shares"]
    assert 0 < parts["replay's targets"] < 0.1 < parts["replay, the rest"]  # the base model said them while it drew
    assert without["shares"]["replay's targets"] < 0.05 and without["shares"]["replay, the rest"] == 0
