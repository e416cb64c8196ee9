"""Files from anywhere: strictly safetensors, strictly a LoRA, one sentence for each way not to be."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as library_load

from seqlora_core.adapter import Adapter, LayerDelta, load_adapter
from seqlora_core.composition import Wishes, compose
from seqlora_core.errors import UserError
from seqlora_core.report import interference_report
from seqlora_core.spectrum import capped, largest_values, spikes
from seqlora_core.tensor_file import SMALL, read_safetensors, write_safetensors

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def built(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "it is empty"),
        (b"abc", "longer than the file"),
        (b"\x80\x02}q\x00." + b"\xff" * 20, "can run code"),
        (b"PK\x03\x04" + b"\xff" * 20, "can run code"),
        (built({"a": ENTRY}, length=2**63), "longer than the file"),
        (built(b"[1]"), "not a table"),
        (built(b'{"a"'), "its header"),
        (built(b"[" * 100_000), "more items|nested"),
        (built(b"[" * 5_000), "nested"),
        (built(b'{"a": NaN}'), "no number"),
        (built(b"\xff\xfe{}"), "its header"),
        (built(b'{"a":%b,"a":%b}' % ((json.dumps(ENTRY).encode(),) * 2)), "names 'a' twice"),
        (built({"a": ENTRY, "__metadata__": {"x": 1}}), "metadata is not text"),
        (built({"a": 5}), "not dtype, shape"),
        (built({"a": ENTRY | {"more": 1}}), "not dtype, shape"),
        (built({"a": ENTRY | {"dtype": "F4"}}), "which LoRAs have not"),
        (built({"a": ENTRY | {"dtype": ["F32"]}}), "which LoRAs have not"),
        (built({"a": ENTRY | {"shape": [-2]}}), "not whole numbers"),
        (built({"a": ENTRY | {"shape": [True]}}), "not whole numbers"),
        (built({"a": ENTRY | {"shape": [2.0]}}), "not whole numbers"),
        (built({"a": ENTRY | {"shape": [1] * 40}}), "not whole numbers"),
        (built({"a": ENTRY | {"data_offsets": [0]}}), "not whole numbers"),
        (built({"a": ENTRY | {"shape": [2**62]}}), "does not fit"),
        (built({"a": ENTRY | {"shape": [0, 2**62], "data_offsets": [0, 0]}}), "does not fit"),
        (built({"a": ENTRY | {"shape": [3]}}), "does not fit"),
        (built({"a": ENTRY | {"data_offsets": [8, 16]}}), "leave a gap|outside"),
        (built({"a": ENTRY, "b": ENTRY}), "overlap"),
        (built({"a": ENTRY}, b"\0" * 4), "outside"),
        (built({"a": ENTRY}, b"\0" * 12), "belong to no tensor"),
        (built(b'{"a":1}' + b" " * 2_000_000), "too much of it"),
        (built({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(12_000)}, b""), "more items"),
    ],
)  # fmt: skip
def test_what_is_not_strictly_safetensors_is_told(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as told:
        read_safetensors(path)
    assert "\n" not in str(told.value) and "x.safetensors" in str(told.value)


@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda n: n != "__metadata__" and n.isprintable()),
        st.tuples(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    metadata=st.dictionaries(st.text(max_size=10).filter(str.isprintable), st.text(max_size=30).filter(str.isprintable), max_size=4),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_whatever_is_written_is_read_back_by_us_and_by_the_library(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    made = {n: (torch.randn(s) * 9).to(d) for n, (d, s) in tensors.items()}
    write_safetensors(path, made, metadata)
    ours, said = read_safetensors(path)
    theirs = library_load(path.read_bytes())
    assert said == metadata and ours.keys() == theirs.keys() == made.keys()
    assert all(torch.equal(ours[n], t) and ours[n].dtype == t.dtype and torch.equal(theirs[n], t) for n, t in made.items())


def test_what_we_would_not_read_is_not_written(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.zeros(8)}, {"x": "y" * (SMALL - 200)})
    assert read_safetensors(path)
    with pytest.raises(UserError, match="cannot write .*a.safetensors: what it says of itself .*shorten"):
        write_safetensors(path, {"a": torch.zeros(8)}, {"x": "y" * (2 * SMALL)})
    assert len(read_safetensors(path)[1]["x"]) == SMALL - 200


def test_a_header_of_any_length_is_read(tmp_path):
    """A length may begin with the byte that files which run code begin with."""
    first = set()
    for extra in range(0, 800, 8):
        path = tmp_path / "x.safetensors"
        write_safetensors(path, {"a": torch.ones(1)}, {"m": "x" * extra})
        first.add(path.read_bytes()[0])
        assert torch.equal(read_safetensors(path)[0]["a"], torch.ones(1))
    assert 0x80 in first


def test_what_was_read_outlives_its_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(100_000)}, {})
    read = read_safetensors(path)[0]["a"]
    with open(path, "r+b") as f:
        f.truncate(10)
    assert read.sum() == 100_000


GOOD = {"l.lora_down.weight": torch.ones(2, 8), "l.lora_up.weight": torch.ones(6, 2)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"l.lora_up.weight": None}, "has lora_down.weight but no lora_up"),
        ({"l.lora_down.weight": None}, "has lora_up.weight but no lora_down"),
        ({"l.lora_down.weight": torch.ones(0, 8), "l.lora_up.weight": torch.ones(6, 0)}, "rank 0"),
        ({"l.lora_down.weight": torch.ones(8, 2), "l.lora_up.weight": torch.ones(2, 6)}, "both are transposed"),
        ({"l.lora_up.weight": torch.ones(6, 3)}, "do not multiply"),
        ({"l.lora_up.weight": torch.full((6, 2), math.nan)}, "not finite"),
        ({"l.lora_up.weight": torch.full((6, 2), -math.inf)}, "not finite"),
        ({"l.lora_up.weight": torch.full((6, 2), 1e30), "l.lora_down.weight": torch.full((2, 8), 1e30)}, "so large"),
        ({"l.lora_up.weight": torch.full((6, 2), 1e300, dtype=torch.float64)}, "not finite"),
        ({"l.lora_up.weight": torch.ones(6, 2, dtype=torch.int64)}, "is of int64"),
        ({"l.lora_up.weight": torch.ones(6, 2, dtype=torch.bool)}, "is of bool"),
        ({"l.lora_up.weight": torch.ones(6, 2).to(torch.int8)}, "is of int8"),
        ({"l.alpha": torch.tensor(1e9)}, "alpha 1e.09 at rank 2"),
        ({"l.alpha": torch.tensor(math.nan)}, "alpha nan"),
        ({"l.alpha": torch.ones(3)}, "not one number"),
        ({"lora_unet_down_blocks_0_x.lora_down.weight": torch.ones(2, 8), "lora_unet_down_blocks_0_x.lora_up.weight": torch.ones(6, 2),
          "unet.down_blocks.0.x.lora_A.weight": torch.ones(2, 8), "unet.down_blocks.0.x.lora_B.weight": torch.ones(6, 2)}, "twice"),
    ],
)  # fmt: skip
def test_each_broken_adapter_gets_its_sentence(tmp_path, change, message):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {k: v for k, v in (GOOD | change).items() if v is not None}, {})
    with pytest.raises(UserError, match=message) as told:
        load_adapter(path)
    assert "\n" not in str(told.value) and "x.safetensors" in str(told.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part, shape", [("lora_down", (2, 8, 1, 1)), ("lora_up", (6, 2, 1, 1)), ("lora_mid", (2, 2, 3, 3))])
def test_one_value_that_is_not_finite_is_found_wherever_it_stands(tmp_path, value, part, shape):
    """Also where what it is multiplied with is zero"""
    path = tmp_path / "x.safetensors"
    for place in range(math.prod(shape)):
        tensors = {"l.lora_down.weight": torch.zeros(2, 8, 1, 1), "l.lora_up.weight": torch.zeros(6, 2, 1, 1)}
        tensors |= {"l.lora_mid.weight": torch.zeros(2, 2, 3, 3)}
        tensors[f"l.{part}.weight"].view(-1)[place] = value
        write_safetensors(path, tensors, {})
        with pytest.raises(UserError, match="values that are not finite"):
            load_adapter(path)


def spiked(times):
    generator = torch.Generator().manual_seed(1)
    layers = {
        f"l{i}": LayerDelta(torch.randn(2, 8, generator=generator), torch.randn(6, 2, generator=generator)) for i in range(5)
    }
    layers["l3"] = LayerDelta(layers["l3"].down, layers["l3"].up * times)
    return Adapter(layers)


def formerly(delta):
    """The largest value by the nonsymmetric r x r product, in float64"""
    up, down = delta.up.double(), delta.down.double()
    return torch.linalg.eigvals((up.mT @ up) @ (down @ down.mT)).real.max().clamp_min(0).sqrt().item()


@pytest.mark.parametrize("rank, alike", [(1, 1), (16, 16), (128, 128), (128, 3), (200, 1)])
def test_largest_values_are_those_of_the_nonsymmetric_product(rank, alike):
    """Also of factors in which many directions are the same; of a layer that was never trained it is zero"""
    generator = torch.Generator().manual_seed(rank)
    up, down = torch.randn(160, alike, generator=generator), torch.randn(rank, 200, generator=generator)
    delta = LayerDelta(down, up[:, torch.arange(rank) % alike])
    untrained = LayerDelta(down, torch.zeros(160, rank))
    found = largest_values(Adapter({"l": delta, "strong": LayerDelta(down, 1e6 * delta.up), "untrained": untrained}))
    assert found["l"] == pytest.approx(formerly(delta), rel=1e-9) and found["untrained"] == 0
    assert found["strong"] == pytest.approx(1e6 * found["l"], rel=1e-6)
    assert largest_values(Adapter({"l": delta.float()}).to(torch.float16))["l"] == pytest.approx(found["l"], rel=1e-2)


def test_largest_values_take_no_nonsymmetric_eigenproblem(monkeypatch):
    """That of a LoRA of rank 128 took twenty times as long as the symmetric one"""
    monkeypatch.setattr(torch.linalg, "eigvals", None)
    assert len(largest_values(spiked(1))) == 5


def test_spectral_spikes_are_reported_and_can_be_cut():
    adapter = spiked(100)
    dense = {n: torch.linalg.matrix_norm(d.dense().double(), 2).item() for n, d in adapter.layers.items()}
    assert largest_values(adapter) == pytest.approx(dense, rel=1e-6)
    assert [s.layer for s in spikes(adapter)] == ["l3"] and spikes(spiked(1)) == []
    assert any("l3" in line and "ran away" in line for line in interference_report({"a": adapter}).advice)
    cut = capped(adapter)
    middle = sorted(dense.values())[2]
    assert largest_values(cut)["l3"] == pytest.approx(10 * middle, rel=1e-5) and spikes(cut, 10.001) == []
    assert all(torch.equal(cut.layers[n].up, d.up) for n, d in adapter.layers.items() if n != "l3")
    stacked = compose([adapter, spiked(1)], [0.5, 2.0], wishes=Wishes(cap=10))
    plain = compose([cut, spiked(1)], [0.5, 2.0])
    assert all(torch.equal(stacked.layers[n].dense(), d.dense()) for n, d in plain.layers.items())
    with pytest.raises(UserError, match="cap is nan: give a number of at least 1"):
        compose([adapter], wishes=Wishes(cap=math.nan))
