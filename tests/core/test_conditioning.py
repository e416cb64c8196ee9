"""Prompts of unequal lengths in one batch."""

import torch
import torch.nn.functional as F

from seqlora_core.denoiser import Conditioning


def test_repeated_contexts_attend_the_same():
    g = torch.Generator().manual_seed(0)
    short, long = torch.randn(1, 4, 8, generator=g), torch.randn(1, 6, 8, generator=g)
    both = Conditioning.cat([Conditioning(short), Conditioning(long)])
    assert both.context.shape == (2, 12, 8)
    query = torch.randn(1, 3, 8, generator=g)
    for plain, repeated in ((short, both[:1].context), (long, both[1:].context)):
        one = F.scaled_dot_product_attention(query, plain, plain)
        many = F.scaled_dot_product_attention(query, repeated, repeated)
        assert torch.allclose(one, many, atol=1e-6)
