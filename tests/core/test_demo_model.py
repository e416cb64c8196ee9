"""The committed demo model's file, and what its training reads back from it."""

import torch
from safetensors.torch import load_file

from demo import autoencoder
from seqlora_core.demo_model import DEMO_MODEL


def test_the_autoencoder_of_a_finished_model_is_read_back(model):
    stock = load_file(DEMO_MODEL)
    pca, trained = autoencoder.from_stock(stock)
    pictures = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    latents = autoencoder.encode(pca, pictures.permute(0, 3, 1, 2) * 2 - 1)
    assert torch.allclose(latents, model.encode_images(pictures), atol=1e-4)
    again = autoencoder.stock_weights(pca, trained)
    for key, value in again.items():
        assert torch.allclose(value, stock[key].float(), rtol=1e-3, atol=2e-3), key
    decoder = [k for k in again if ".taesd_decoder." in k]
    assert decoder and all(torch.equal(again[k], stock[k].float()) for k in decoder)
