"""Models whose weights are fp8, or stay offloaded: what is trained on them, and what is stacked onto them."""

import json
from pathlib import Path

import pytest

from .comfy_server import PACK, run_in_comfyui


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    script = Path(__file__).with_name("quantised_in_process.py")
    run_in_comfyui(script, PACK, folder, folder / "out.json")
    return json.loads((folder / "out.json").read_text())


def test_adapters_in_float32_are_trained_on_fp8_weights_that_stay_as_they_are(found):
    whole, *quantised = found["float32"], found["fp8"], found["scaled_fp8"]
    assert whole["types"] == ["torch.float32"] and all(run["types"] == ["torch.float8_e4m3fn"] for run in quantised)
    for run in (whole, *quantised):
        assert run["trained"] and run["untouched"] and run["read"] < 0.05
        assert run["last"] < 0.8 * run["first"]
        assert run["last"] == pytest.approx(whole["last"], rel=0.15)


def test_weights_that_stay_offloaded_are_trained_on_as_they_are(found):
    """The same steps as with all of them loaded, blocks computed twice"""
    whole, offloaded, asked = found["float32"], found["offloaded"], found["asked"]
    assert offloaded["offloaded"] > 0 == whole["offloaded"]
    assert offloaded["trained"] and offloaded["untouched"]
    assert offloaded["first"] == pytest.approx(whole["first"], rel=1e-4)
    assert offloaded["last"] == pytest.approx(whole["last"], rel=1e-2)
    assert not any(asked["full"]) and max(asked["rooms"]) >= 2 * asked["drawing"] > 0


@pytest.mark.parametrize(
    "where", ["stack" + kind + offloaded for kind in ("", "_fp8", "_scaled_fp8") for offloaded in ("", "_offloaded")]
)
def test_a_stack_does_what_chained_stock_loaders_do(found, where):
    """Rounding to fp8 is random in the last bit: its seed is the weight's name, so both round alike"""
    run = found[where]
    assert run["difference"] < 1e-6 * run["effect"]
    assert (run["offloaded"] > 0) == where.endswith("offloaded")
