"""`accelerate launch` with two processes on a CPU gives what one process gives."""

import json
import os
import subprocess
import sys

import pytest
import torch

from seqlora_core.adapter import load_adapter
from seqlora_core.cli import main
from seqlora_core.config import TrainingConfig
from seqlora_core.demo_model import DEMO_FOLDER
from seqlora_core.errors import UserError
from seqlora_core.library import Library
from seqlora_core.parallel import Workers
from seqlora_core.teach import train_concept

from ..reliability.toy import CHANNELS, ToyDenoiser, start

# of three replayed pictures one process has two.  SGD first: Adam divides its first steps by next to nothing and so enlarges
# rounding, with seed 0 to 2.5 % of one layer, with 1, 2 and 3 to 0.5 % or less
RECIPE = """
library = {library}
steps = 5
batch = 4
replay_batch = 3
use_decoys = false

[[concept]]
images = {octopus}
trigger = "octzu"
class_noun = "animal"
optimiser = "sgd"
learning_rate = 0.1

[[concept]]
images = {penguin}
trigger = "pengvo"
class_noun = "animal"
seed = 2
"""
BOUNDS = {"octopus": 0.004, "penguin": 0.02}


def test_two_processes_make_the_adapters_of_one(model, calibration, tmp_path):
    pytest.importorskip("accelerate")
    for name in ("one", "two"):
        Library(tmp_path / name, model.fingerprint(), create=True).keep_calibration(calibration)
        folders = {"library": tmp_path / name} | {n: DEMO_FOLDER / "concepts" / n for n in BOUNDS}
        (tmp_path / f"{name}.toml").write_text(RECIPE.format(**{k: json.dumps(str(v)) for k, v in folders.items()}))
    assert main(["train", "--recipe", str(tmp_path / "one.toml")]) == 0
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "seqlora_core", "train",
        "--device", "cpu", "--recipe", str(tmp_path / "two.toml"),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=DEMO_FOLDER.parent, capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("written to") == 2 and done.stdout.count("2 processes share each batch") == 1
    for concept, bound in BOUNDS.items():
        one, two = (load_adapter(tmp_path / name / f"{concept}.safetensors") for name in ("one", "two"))
        for name, delta in one.layers.items():
            a, b = delta.dense(), two.layers[name].dense()
            assert torch.linalg.norm(a - b) < bound * torch.linalg.norm(a), (concept, name)
    assert Library(tmp_path / "two").verify() == []


class Two(Workers):
    def __init__(self, index):
        super().__init__()
        self.count, self.index = 2, index


class OfSizes(ToyDenoiser):
    """Latents of an eighth of the picture's side; as most models it cannot be given none"""

    def latent_shape(self, size):
        return CHANNELS, size[0] // 8, size[1] // 8

    def encode_images(self, images):
        return torch.nn.functional.interpolate(super().encode_images(images), self.latent_shape(images.shape[1:3])[1:])

    def predict(self, noised, sigma, conditioning):
        assert len(noised)
        return super().predict(noised, sigma, conditioning)


def test_a_process_may_have_no_row_of_a_replayed_batch_of_another_size(tmp_path, monkeypatch):
    monkeypatch.setattr(Two, "average", lambda self, tensors: None)
    monkeypatch.setattr(Two, "any", lambda self, here: here)
    monkeypatch.setattr(Two, "wait", lambda self: None)
    model = OfSizes()
    library, images = start(tmp_path / "l", model), torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    config = TrainingConfig(steps=2, batch=2, replay_batch=2)
    _, fit = train_concept(model, library, images, "fox", "foxzx", config=config, workers=Two(1))
    assert len(fit.losses) == 2


def test_each_takes_its_rows_and_what_cannot_be_shared_is_told():
    rows = torch.arange(6)
    assert rows[Two(0).rows(6)].tolist() == [0, 2, 4] and rows[Two(1).rows(6)].tolist() == [1, 3, 5]
    with pytest.raises(UserError, match="batch of 5 cannot be shared by 2 processes"):
        Two(0).check(TrainingConfig(batch=5))
    with pytest.raises(UserError, match="in one process only"):
        Two(0).check(TrainingConfig(hypergradient="cg:2", lower_steps=1))
