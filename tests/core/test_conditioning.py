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


def test_prompts_with_lengths_are_padded_and_keep_what_goes_with_them():
    parts = [Conditioning(torch.ones(1, n, 8), None, [n], [{"mask": torch.ones(1, n)}]) for n in (4, 6)]
    both = Conditioning.cat(parts)
    assert both.context.shape == (2, 6, 8) and not both.context[0, 4:].any() and both.lengths == [4, 6]
    turned = both[torch.tensor([1, 0])]
    assert turned.lengths == [6, 4] and turned.more[1]["mask"].shape == (1, 4)
    assert both[1:].lengths == [6] and both[:0].more == []
