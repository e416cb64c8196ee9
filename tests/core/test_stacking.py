"""Files of other trainers without ComfyUI, projections from weights, and low-rank forms."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from seqlora_core.adapter import (
    Adapter,
    LayerDelta,
    channel_rows,
    concatenate,
    kernel_rows,
    layer_delta,
    load_adapter,
    save_adapter,
)
from seqlora_core.composition import (
    Wishes,
    closed_form,
    compose,
    energy_kept,
    gram_schmidt,
    norm_controlled,
    project,
    symmetric,
    without_data,
)
from seqlora_core.errors import UserError
from seqlora_core.interference import overlaps, residual_energy
from seqlora_core.linalg import orthonormal_basis, project_out
from seqlora_core.low_rank import factorised, truncated
from seqlora_core.selection import selected
from seqlora_core.spelling import Factors, canonical
from seqlora_core.statistics import Moments

from .test_formulas import delta

IN, OUT, R = 24, 20, 3


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapter(seed, rank=R, scale=1.0, name="l"):
    return Adapter({name: LayerDelta(randn(seed, rank, IN), scale * randn(seed + 100, OUT, rank))})


def dense(a, name="l"):
    return a.layers[name].dense()


# --- projections from weights


def test_symmetric_rows_are_orthogonal_and_do_not_depend_on_the_order():
    adapters = [adapter(i) for i in range(5)]
    out = symmetric(adapters)
    for i in range(5):
        for j in range(i):
            assert (out[i].layers["l"].down @ out[j].layers["l"].down.mT).abs().max() < 1e-10
    backward = symmetric(adapters[::-1])[::-1]
    for one, other in zip(out, backward):
        assert torch.allclose(dense(one), dense(other), atol=1e-10)


def test_symmetric_moves_the_strong_one_least():
    weak, strong = adapter(0), adapter(1, scale=10.0)
    kept = [energy_kept(a, p) for a, p in zip([weak, strong], symmetric([weak, strong]))]
    assert kept[1] > 0.99 > kept[0] > 0.3
    alike = [energy_kept(a, p) for a, p in zip([weak, adapter(1)], symmetric([weak, adapter(1)]))]
    assert abs(alike[0] - alike[1]) < abs(kept[0] - kept[1])


def test_symmetric_is_the_nearest_orthonormal_frame():
    """No other orthonormal frame is nearer to the adapters' directions, weighted by energy: 50 random turns of it are farther."""
    one = [Adapter({"l": LayerDelta(torch.nn.functional.normalize(randn(i, 1, IN)), randn(i + 9, OUT, 1))}) for i in range(4)]
    directions = torch.cat([a.layers["l"].down.mT for a in one], 1)
    energy = torch.stack([a.layers["l"].energy() for a in one])
    out = symmetric(one)
    frame = torch.cat([torch.nn.functional.normalize(a.layers["l"].down).mT for a in out], 1)

    def distance(q):
        return (energy * (q - directions).square().sum(0)).sum()

    for seed in range(50):
        turned = orthonormal_basis(frame + 0.05 * randn(seed, IN, 4))
        assert distance(turned) > distance(frame)


def test_without_data_the_sum_has_about_one_adapters_energy():
    """Orthogonal changes add their energies: N of them over sqrt(N) have the mean of one"""
    adapters = [adapter(i) for i in range(5)]
    whole, parts = without_data(adapters), symmetric(adapters)
    total = concatenate(whole).layers["l"].energy()
    assert total == pytest.approx(sum(float(p.layers["l"].energy()) for p in parts) / 5)
    for w, p in zip(whole, parts):
        assert torch.allclose(dense(w), dense(p) / 5**0.5)
    assert torch.equal(dense(without_data([adapters[0]])[0]), dense(symmetric([adapters[0]])[0]))
    assert torch.equal(dense(without_data(adapters, {1})[1]), dense(adapters[1]))
    apart = [adapter(0), adapter(1, name="another")]
    for before, after, name in zip(apart, without_data(apart), ("l", "another")):
        assert torch.allclose(dense(after, name), dense(before, name))  # no layer that both change


def untrained(seed):
    """As trainers start them: lora_up is zero"""
    return adapter(seed, scale=0.0)


@pytest.mark.parametrize("protected", [(), {1}, {0, 1}])
def test_nobody_gives_way_to_a_layer_that_was_never_trained(protected):
    stack, alone = [adapter(0), untrained(1), adapter(2)], [adapter(0), adapter(2)]
    less = {0} & set(protected)  # of the two that act
    for projection in (without_data, symmetric, lambda a, p: gram_schmidt(a, None, p)):
        found, wanted = projection(stack, protected), projection(alone, less)
        assert torch.allclose(dense(found[0]), dense(wanted[0])) and torch.allclose(dense(found[2]), dense(wanted[1]))
        assert not dense(found[1]).any() and found[1].layers["l"].down.any()
    whole = without_data([untrained(1), adapter(0)])
    assert torch.allclose(dense(whole[1]), dense(adapter(0))) and not dense(whole[0]).any()
    assert not any(dense(p).any() for p in without_data([untrained(1), untrained(2)]))


def test_a_convolution_is_projected_by_its_channels():
    """Against the unfolded inputs' moment, channels x unrelated places of the kernel"""
    down, up, width, places = randn(1, 2, 6 * 4), randn(2, 5, 2), 6, 4
    adapters = [Adapter({"l": LayerDelta(down * s, up, (2, 2))}) for s in (1.0, -0.5)]
    channels = [(lambda x: x.mT @ x / 99)(randn(50 + i, 99, width)) for i in range(3)]
    unfolded = [torch.kron(c, torch.eye(places, dtype=c.dtype)) for c in channels]
    small, whole = ([Moments({"l": m}) for m in kind] for kind in (channels, unfolded))
    for a, b in zip(closed_form(adapters, small[:2], small[2]), closed_form(adapters, whole[:2], whole[2])):
        assert torch.allclose(dense(a), dense(b), atol=1e-9) and a.layers["l"].kernel == (2, 2)
    delta = adapters[0].layers["l"]
    seen = delta.by_channel(width)
    assert residual_energy(seen.up, seen.down, channels[0]) == pytest.approx(
        float(residual_energy(delta.up, delta.down, unfolded[0]))
    )
    assert torch.equal(kernel_rows(channel_rows(delta.down, width), 2), delta.down)


def test_twins_share_what_they_have():
    a = adapter(0)
    halves = symmetric([a, a])
    assert torch.allclose(dense(halves[0]) + dense(halves[1]), dense(a), atol=1e-9)


def test_more_ranks_than_a_layer_has_are_shared():
    out = symmetric([adapter(i) for i in range(12)])
    assert all(p.layers["l"].down.isfinite().all() for p in out)
    assert all(0.05 < energy_kept(adapter(i), p) < 1 for i, p in enumerate(out))


@pytest.mark.parametrize(
    "mode, order", [("weights", "symmetric"), ("weights", "first"), ("weights", "strongest"), ("data", "")]
)
def test_a_protected_adapter_is_left_whole(mode, order):
    adapters = [adapter(i) for i in range(3)]
    moments = [Moments({"l": (lambda x: x.mT @ x / 99)(randn(50 + i, 99, IN))}) for i in range(3)]
    wishes = Wishes(order or "symmetric", frozenset([1]))
    out = project(adapters, mode, 1.0, moments, wishes=wishes)
    assert torch.equal(dense(out[1]), dense(adapters[1]))
    assert energy_kept(adapters[0], out[0]) < 0.999
    if mode == "weights":
        assert (out[0].layers["l"].down @ out[1].layers["l"].down.mT).abs().max() < 1e-10


def test_the_strongest_comes_first():
    adapters = [adapter(0), adapter(1, scale=3.0)]
    out = project(adapters, "weights", wishes=Wishes("strongest"))
    assert torch.equal(dense(out[1]), dense(adapters[1])) and energy_kept(adapters[0], out[0]) < 1
    with pytest.raises(UserError, match="unknown order"):
        project(adapters, "weights", wishes=Wishes("random"))


def test_a_convolution_over_videos_is_read_and_written(tmp_path):
    down, up = torch.randn(2, 3, 1, 3, 3), torch.randn(5, 2, 1, 1, 1)
    save_file({"l.lora_down.weight": down, "l.lora_up.weight": up}, tmp_path / "a.safetensors")
    delta = load_adapter(tmp_path / "a.safetensors").layers["l"]
    assert delta.kernel == (1, 3, 3) and torch.equal(delta.dense(), up.flatten(1) @ down.flatten(1))
    save_adapter(tmp_path / "b.safetensors", Adapter({"l": delta}))
    written = load_file(tmp_path / "b.safetensors")
    assert torch.equal(written["l.lora_down.weight"], down) and torch.equal(written["l.lora_up.weight"], up)


@pytest.mark.parametrize("alpha", [2.0, 1e-4, 3.0])
def test_an_alpha_is_folded_when_lora_up_is_first_read_and_rounds_nothing(alpha):
    down, up = torch.randn(4, 6).half(), torch.randn(5, 4).half()
    found = layer_delta(Factors(down, up, None, alpha), "file", as_stored=True)
    assert found.acts and found.shape == [5, 6] and found.rank == 4
    stored_down, stored_up, scale = found.stored()
    assert stored_down is down and torch.equal(stored_up, up) and scale == alpha / 4
    whole = up.float() * (alpha / 4)
    assert torch.equal(found.dense(), whole @ down.float()) and found.stored()[2] == 1
    assert torch.equal(replace(found, kernel=()).up, whole) and torch.equal(found.float().down, down.float())


def test_a_share_of_factors_in_half_precision_rounds_nothing():
    half = Adapter({"l": LayerDelta(torch.randn(4, 6).bfloat16(), torch.randn(5, 4).bfloat16())})
    share = norm_controlled([half, half])[0].layers["l"]
    assert torch.equal(share.dense(), half.layers["l"].float().scaled(0.5**0.5).dense()) and share.rank == 4


def test_what_is_left_of_a_twin_is_not_blown_up():
    """Of two equal LoRAs the second has nothing of its own: rounding is not scaled back to its energy"""
    twins = [Adapter({"l": delta(1)}), Adapter({"l": delta(1)})]
    _, second = project(twins, "weights", wishes=Wishes("first", restore=True))
    assert second.layers["l"].energy() < 1e-6 * twins[0].layers["l"].energy()


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e39])
def test_strengths_that_are_no_numbers_are_refused(strength):
    with pytest.raises(UserError, match="the strength of adapter 1"):
        compose([Adapter({"l": delta(1)}), Adapter({"l": delta(2)})], [1.0, strength])


def test_what_is_scaled_back_has_no_jump():
    """A hair more or less than a hundredth of its energy left is no tenfold change"""
    first, energies = delta(1), []
    free = LayerDelta(project_out(delta(2).down.mT, orthonormal_basis(first.down.mT)).mT, first.up)
    length = (first.energy() / free.energy()) ** 0.5
    for share in (0.095, 0.106):
        near = LayerDelta(first.down + share * length * free.down, first.up)
        _, second = project([Adapter({"l": first}), Adapter({"l": near})], "weights", wishes=Wishes("first", restore=True))
        energies.append(float(second.layers["l"].energy() / first.energy()))
    assert energies == pytest.approx([0.9, 1.0], rel=0.03)


def test_magnitude_is_restored_on_request():
    adapters = [adapter(i) for i in range(4)]
    out = project(adapters, "weights", wishes=Wishes("first", restore=True))
    for a, p in zip(adapters, out):
        assert energy_kept(a, p) == pytest.approx(1.0)


@pytest.mark.parametrize("order", ["symmetric", "first"])
@pytest.mark.parametrize("rows", ["zero", "doubled", "unused"])
def test_directions_in_which_an_adapter_does_nothing_are_nobodys(order, rows):
    """As of files filled up to one rank, and of stacks that hold one LoRA twice"""
    down, up = adapter(0).layers["l"].down, adapter(0).layers["l"].up
    more = {"zero": (0 * down, 0 * up), "doubled": (down, up), "unused": (randn(7, *down.shape), 0 * up)}[rows]
    wide = LayerDelta(torch.cat([down, more[0]]), torch.cat([up, more[1]], 1))
    other, wishes = adapter(1), Wishes(order, frozenset([0]))
    left = [dense(project([Adapter({"l": d}), other], "weights", wishes=wishes)[1]) for d in (LayerDelta(down, up), wide)]
    assert torch.allclose(*left, atol=1e-10)
    shared = [overlaps([d, other.layers["l"]]) for d in (LayerDelta(down, up), wide)]
    assert torch.allclose(*shared)


def test_equal_adapters_take_nothing_from_a_third():
    """What is left of a twin is rounding, which must not count as a direction that is taken."""
    twin, other = adapter(0), adapter(1)
    assert torch.allclose(dense(gram_schmidt([twin, twin, other])[2]), dense(gram_schmidt([twin, other])[1]), atol=1e-10)


def test_layers_that_nobody_recorded_are_projected_from_their_weights():
    both = [Adapter({**adapter(i).layers, **adapter(i + 5, name="unseen").layers}) for i in range(2)]
    moments = [Moments({"l": (lambda x: x.mT @ x / 99)(randn(50 + i, 99, IN))}) for i in range(2)]
    out = closed_form(both, moments)
    seen = closed_form([adapter(0), adapter(1)], moments)
    apart = without_data([adapter(5, name="unseen"), adapter(6, name="unseen")])
    for i in range(2):
        assert torch.allclose(dense(out[i]), dense(seen[i])) and torch.allclose(
            dense(out[i], "unseen"), dense(apart[i], "unseen")
        )


# --- filters and ranks


def test_filters():
    names = [
        "diffusion_model.double_blocks.1.img_attn.qkv",
        "lora_unet_up_blocks_1_attentions_0_attn2_to_q",
        "lora_unet_mid_block_x",
        "lora_unet_down_blocks_1_attentions_0_attn2_to_k",
        "diffusion_model.joint_blocks.3.context_block.attn.qkv",
    ]
    whole = Adapter({n: adapter(0).layers["l"] for n in names})
    for words, left in (
        ("", [0, 1, 2, 3, 4]), ("up_blocks", [1]), ("attn2, double_blocks.1", [0, 1, 3]), ("-mid_block", [0, 1, 3, 4]),
        ("attn, -img_attn", [1, 3, 4]), ("up_blocks*to_q", [1]), ("attn;-up_blocks", [0, 3, 4]), ("nothing", []), ("@text", [3, 4]), ("-@text", [0, 1, 2]), ("@text, up_blocks", [1, 3, 4]), ("@text, -context_block", [3]),
    ):  # fmt: skip
        assert list(selected(whole, words).layers) == [names[i] for i in left], words


def test_truncation_is_exact_where_it_can_be_and_tells_its_error_otherwise():
    stack = concatenate([adapter(i) for i in range(10)])
    exact, lost = truncated(stack)
    assert exact.layers["l"].rank == OUT and lost < 1e-20 and torch.allclose(dense(exact), dense(stack), atol=1e-9)
    less, lost = truncated(stack, 5)
    values = torch.linalg.svdvals(dense(stack)).square()
    assert less.layers["l"].rank == 5 and lost == pytest.approx(float(values[5:].sum() / values.sum()))
    assert (dense(less) - dense(stack)).square().sum() / values.sum() == pytest.approx(lost)


def test_low_rank_or_not():
    flat = randn(0, 40, 2) @ randn(1, 2, 30)
    delta = factorised(flat + 1e-3 * randn(2, 40, 30))
    assert delta.rank == 2 and (delta.dense() - flat).square().sum() < 0.01 * flat.square().sum()
    assert factorised(randn(3, 40, 30)) is None
    for rows, columns in ((40, 30), (30, 40)):  # 17 directions take less room than the matrix itself, 18 more
        left, right = torch.linalg.qr(randn(7, rows, 30))[0], torch.linalg.qr(randn(8, columns, 30))[0]
        assert factorised(left[:, :17] @ right[:, :17].mT).rank == 17
        assert factorised(left[:, :18] @ right[:, :18].mT) is None
    wide = (randn(4, 600, 12) * 0.8 ** torch.arange(12)) @ randn(5, 12, 560) + 1e-3 * randn(6, 600, 560)
    energy = torch.linalg.svdvals(wide).square()
    missed = 1 - energy.cumsum(0) / energy.sum()
    found = factorised(wide)
    assert found.rank == int((missed > 0.01).sum()) + 1
    assert (found.dense() - wide).square().sum() / wide.square().sum() == pytest.approx(float(missed[found.rank - 1]), rel=1e-3)
    assert factorised(wide, 1e-12, always=True).rank > 500
    assert torch.allclose(factorised(randn(3, 40, 30), 0.0, always=True).dense(), randn(3, 40, 30).float(), atol=1e-4)
    assert factorised(torch.einsum("oi,ihw->oihw", randn(0, 40, 1), randn(1, 1, 3, 3)[0:1])).kernel == (3, 3)


# --- spellings


def spelled(folder, stem, down=".lora_down.weight", up=".lora_up.weight", alpha=None, shape=(6, 8), kernel=()):
    path = folder / "x.safetensors"
    tensors = {stem + down: torch.ones(2, shape[1], *kernel), stem + up: torch.ones(shape[0], 2, *[1] * len(kernel))}
    if alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "stem, down, up",
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", ".lora_down.weight", ".lora_up.weight"),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", ".lora_down.weight", ".lora_up.weight"),
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", ".lora_A.weight", ".lora_B.weight"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", ".lora_A.weight", ".lora_B.weight"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", ".lora.down.weight", ".lora.up.weight"),
        ("base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", ".lora_A.weight", ".lora_B.weight"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q", "_lora.down.weight", "_lora.up.weight"),
    ],
)
def test_one_name_for_a_layer(tmp_path, stem, down, up):
    read = load_adapter(spelled(tmp_path, stem, down, up))
    assert list(read.layers) == ["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"]
    assert torch.equal(dense(read, list(read.layers)[0]), torch.full((6, 8), 2.0))


def test_text_encoders_are_told_apart():
    assert canonical("text_encoder.text_model.encoder.layers.0.mlp.fc1") == "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert canonical("text_encoder.text_model.x", True) == "lora_te1_text_model_x"
    assert canonical("text_encoder_2.text_model.x", True) == "lora_te2_text_model_x"
    assert canonical("base_model.model.text_model.x") == "lora_te_text_model_x"


def test_convolutions_and_their_round_trip(tmp_path):
    read = load_adapter(spelled(tmp_path, "lora_unet_conv_in", alpha=1.0, kernel=(3, 3)))
    delta = read.layers["lora_unet_conv_in"]
    assert delta.kernel == (3, 3) and torch.equal(delta.dense(), torch.ones(6, 72))
    save_adapter(tmp_path / "y.safetensors", concatenate([read, read]))
    again = load_adapter(tmp_path / "y.safetensors").layers["lora_unet_conv_in"]
    assert again.kernel == (3, 3) and torch.equal(again.dense(), torch.full((6, 72), 2.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_precisions(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    save_file({"a.lora_down.weight": torch.ones(2, 8).to(dtype), "a.lora_up.weight": torch.ones(6, 2).to(dtype)}, path)
    assert torch.equal(dense(load_adapter(path), "a"), torch.full((6, 8), 2.0))


@pytest.mark.parametrize("key, kind", [("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("oft_blocks", "OFT"), ("diff", "full-difference"), ("dora_scale", "DoRA")])  # fmt: skip
def test_kinds_that_only_the_nodes_read_are_named(tmp_path, key, kind):
    path = tmp_path / "x.safetensors"
    save_file({f"lora_unet_x.{key}": torch.ones(2, 2)}, path)
    with pytest.raises(UserError, match=f"x.safetensors is an? .*{kind}.*nodes"):
        load_adapter(path)


@pytest.mark.parametrize("content", [b"\x80\x02}q\x00.", b"PK\x03\x04" + b"\0" * 50])
def test_files_that_could_run_code_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="can run code"):
        load_adapter(path)


def test_sum_of_files_that_spell_one_layer_differently(tmp_path):
    from seqlora_core.cli import main

    first = spelled(tmp_path, "diffusion_model.joint_blocks.0.x_block.attn.proj").rename(tmp_path / "a.safetensors")
    second = spelled(tmp_path, "lora_unet_joint_blocks_0_x_block_attn_proj").rename(tmp_path / "b.safetensors")
    output = tmp_path / "sum.safetensors"
    assert main(["stack", str(first), f"{second}:0.5", "--output", str(output)]) == 0
    total = load_adapter(output)
    assert torch.allclose(dense(total, "diffusion_model.joint_blocks.0.x_block.attn.proj"), torch.full((6, 8), 3.0))


def test_compose_with_wishes_is_the_sum_of_the_projected():
    adapters = [adapter(i) for i in range(3)]
    parts = project(adapters, "weights", 0.5, wishes=Wishes("first"))
    total = compose(adapters, [1.0, 2.0, -1.0], "weights", 0.5, wishes=Wishes("first"))
    assert torch.allclose(dense(total), dense(parts[0]) + 2 * dense(parts[1]) - dense(parts[2]))
