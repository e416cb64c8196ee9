"""SD3, SD3.5 and Flux.1 are the same model to the command line (diffusers) and to ComfyUI: layers, predictions, adapters."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.tiny import make_pipeline
from seqlora_core.adapter import Adapter, LayerDelta, load_adapter, save_adapter
from seqlora_core.attach import Attachment, attached
from seqlora_core.denoiser import Conditioning
from seqlora_core.transformer_model import TransformerModel

from .comfy_server import PACK, run_in_comfyui

KINDS = ("sd3", "sd35", "flux")


def inputs(kind):
    generator, width = torch.Generator().manual_seed(3), 32 if kind == "flux" else 64
    random = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return {
        "noised": random(2, 16, 8, 8), "sigma": torch.tensor([0.25, 0.75]), "context": random(2, 7, width), "pooled": random(2, width),
    }  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder, ours = tmp_path_factory.mktemp("transformers"), {}
    for kind in KINDS:
        model = ours[kind] = TransformerModel(make_pipeline(kind))
        with torch.no_grad():  # norms and zero-initialised layers too
            for value in model.transformer.parameters():
                value += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        model.transformer.save_pretrained(folder / kind)
        save_file(inputs(kind), folder / f"{kind}.inputs.safetensors")
        generator = torch.Generator().manual_seed(2)
        layers = {
            s.name: LayerDelta(*(0.2 * torch.randn(*n, generator=generator) for n in ((2, s.in_features), (s.out_features, 2))))
            for s in model.sites()
        }
        save_adapter(folder / f"{kind}.adapter.safetensors", Adapter(layers))
    output = folder / "out.safetensors"
    run_in_comfyui(Path(__file__).with_name("transformers_in_process.py"), PACK, folder, output)
    with safe_open(output, "pt") as file:
        said = {kind: json.loads(text) for kind, text in file.metadata().items()}
    adapters = {kind: load_adapter(folder / f"{kind}.adapter.safetensors") for kind in KINDS}
    return ours, load_file(output), said, adapters


@pytest.mark.parametrize("kind", KINDS)
def test_both_know_the_same_layers_and_the_same_base_model(both, kind):
    ours, _, said, _ = both
    assert not said[kind]["unexpected"] and not said[kind]["missing"]
    assert {s.name: [s.in_features, s.out_features] for s in ours[kind].sites()} == said[kind]["sites"]
    assert ours[kind].fingerprint() == said[kind]["fingerprint"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["plain", "adapted"])
def test_both_predict_the_same(both, kind, what):
    ours, theirs, _, adapters = both
    model, given, attachment = ours[kind], inputs(kind), Attachment()
    attachment.set_frozen(adapters[kind] if what == "adapted" else None)
    with torch.no_grad(), attached(model.sites(), attachment):
        found = model.predict(given["noised"], given["sigma"], Conditioning(given["context"], given["pooled"]))
    assert found.std() > 0.05
    assert torch.allclose(found, theirs[f"{kind}.{what}"], atol=1e-3 * found.std().item(), rtol=1e-3)
    if what == "adapted":
        assert (found - theirs[f"{kind}.plain"]).std() > 0.05 * found.std()


@pytest.mark.parametrize("kind", KINDS)
def test_both_train_at_the_same_noise_levels(both, kind):
    ours, _, said, _ = both
    assert ours[kind].even_sigmas(9).sort().values.tolist() == pytest.approx(sorted(said[kind]["sigmas"]), abs=0.01)
