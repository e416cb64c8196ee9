"""Diffusers' real image models, at tiny widths with random weights: each trains, and its pipeline's loader reads what it made."""

import pytest

from benchmarks.diffusers_families import FAMILIES
from benchmarks.diffusers_models import prove

# nothing reads the text that the last block makes; the others' last blocks make none
NOT_USED = {"SD3": 1, "SD3.5": 1, "Qwen-Image": 2}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_family_trains_and_its_pipeline_reads_it(family, tmp_path):
    row = prove(family, tmp_path)
    assert row["finite"] and row["loss_after"] < row["loss_before"]
    assert len(row["unused"]) == NOT_USED.get(family.name, 0)  # lora_up of every other layer moved from zero
    assert row["weights_kept"] and row["hooks_left"] == 0
    if family.pipeline:
        assert row["stock_layers"] == row["layers"] > 0 and row["stock_differs"] < 1e-3
