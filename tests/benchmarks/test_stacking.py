"""The stacking and prediction benchmarks' own parts, against peft itself and against plain definitions."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from benchmarks.peft_lora import TARGETS, adapter_of, layer_paths, train_peft
from benchmarks.prediction import spearman, within
from benchmarks.rivals import svd
from benchmarks.stacking import won_back
from demo import make_loras
from seqlora_core.adapter import Adapter, LayerDelta
from seqlora_core.attach import Attachment, attached
from seqlora_core.demo import load_subject
from seqlora_core.demo_model import DemoModel
from seqlora_core.evaluation import held_out_loss


def predict(model, adapter=None):
    generator, attachment = torch.Generator().manual_seed(0), Attachment()
    x, sigma = torch.randn(2, 16, 8, 8, generator=generator), torch.tensor([0.3, 0.7])
    attachment.set_frozen(adapter)
    with torch.no_grad(), attached(model.sites(), attachment):
        return model.predict(x, sigma, model.encode_prompts(["a cat", "a castle"]))


def test_what_peft_trains_acts_the_same_as_our_adapter(model):
    theirs = DemoModel()
    places = layer_paths(theirs)
    torch.manual_seed(0)
    theirs.mmdit.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=TARGETS))
    adapter = adapter_of(theirs, places)
    theirs._sites = []  # peft's own layers act there
    wanted = predict(theirs)
    assert (wanted - predict(model)).abs().max() > 0.1
    assert torch.allclose(predict(model, adapter), wanted, atol=1e-4)


def test_a_few_steps_of_peft_learn(model):
    subject = load_subject(model, "octopus")
    adapter = train_peft(subject.references, 1e-3, steps=12)
    assert set(adapter.layers) == {s.name for s in model.sites()}
    assert held_out_loss(model, subject.held_out, adapter) < held_out_loss(model, subject.held_out)


def test_the_sample_loras_come_from_the_command(tmp_path):
    """Names, layout and type of the committed files are those that it writes today"""
    for name in make_loras.NAMES:
        kept = load_file(make_loras.FOLDER / f"seqlora_demo_{name}.safetensors")
        new = load_file(make_loras.make(name, tmp_path, steps=2))
        assert {k: (v.shape, v.dtype) for k, v in kept.items()} == {k: (v.shape, v.dtype) for k, v in new.items()}
        # the last block's text queries reach no output, so those of lora_B stay zero
        assert {k for k, v in kept.items() if not v.any()} == {k for k, v in new.items() if not v.any()}
        assert any(not torch.equal(new[k], kept[k]) for k in new)


def test_svd_is_pefts():
    torch.manual_seed(0)
    net = get_peft_model(
        nn.Sequential(nn.Linear(12, 10)), LoraConfig(r=3, lora_alpha=3, init_lora_weights=False, target_modules=["0"]), "a"
    )
    net.add_adapter("b", LoraConfig(r=3, lora_alpha=3, init_lora_weights=False, target_modules=["0"]))
    net.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", "svd")
    layer = net.base_model.model[0]
    ours = svd([Adapter({"l": LayerDelta(layer.lora_A[n].weight.detach(), layer.lora_B[n].weight.detach())}) for n in "ab"])
    assert torch.allclose(ours.layers["l"].dense(), layer.get_delta_weight("both"), atol=1e-5)


def test_rank_correlation():
    assert spearman([1, 2, 3], [10, 200, 3000]) == pytest.approx(1) and spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)  # 1 - 6 * 4 / (5 * 24)
    found = [{"stack": s, "predicted": p, "lost": p * (1 if s else -1)} for s in (0, 1) for p in (1, 2, 3, 4)]
    assert within(found, "stack") == pytest.approx(0)


def test_won_back():
    rows = [{"row": "ordinary_sum", "stack": 3.0, "alone": 1.0}, {"row": "closed_form", "stack": 1.5, "alone": 1.0}]
    assert [r["won_back"] for r in won_back(rows)] == [0.0, 0.75]
