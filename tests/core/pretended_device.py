"""A device that is not there: tensors on it keep their numbers in main memory, and what a GPU refuses is refused.

Refused are operations on tensors of both places (but for numbers, and indices from main memory), numpy, and random numbers from
main memory's generator.  A `small` one has no float64 and no factorisations either, as Apple's.  The device is called "meta",
the only one without hardware through which gradients pass.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
FACTORISATIONS = ("linalg_qr", "_linalg_svd", "_linalg_eigh", "linalg_cholesky_ex")
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)


class Away(Tensor):
    """On the device, by what it says; `near` holds its numbers"""

    @staticmethod
    def __new__(cls, near: Tensor):
        layout = dict(strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device=DEVICE)
        return Tensor._make_wrapper_subclass(cls, near.size(), **layout)

    def __init__(self, near: Tensor):
        self.near = near

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    # torch moves a number or an index to the device in a way that no mode sees

    def __getitem__(self, index):
        return super().__getitem__(_index(index))

    def __setitem__(self, index, value):
        index = _index(index)
        value = value if isinstance(value, Tensor) else _away(torch.tensor(value, dtype=self.dtype))
        if any(isinstance(i, Tensor) for i in index):
            self.index_put_(index, value)
        else:
            self[index].copy_(value)

    def tolist(self):
        return self.near.tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert a tensor of the device to numpy: use Tensor.cpu() first")

    __array__ = numpy


def _index(index) -> tuple:
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(_away(torch.tensor(i) if isinstance(i, list) else i) for i in parts)


def _near(value):
    return value.near if isinstance(value, Away) else value


def _away(value):
    return Away(value) if isinstance(value, Tensor) and not isinstance(value, Away) else value


def _run(function, args, kwargs):
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    assert not any(t.device == DEVICE and not isinstance(t, Away) for t in tensors), f"{function}: this is not pretended yet"
    if function is aten._has_compatible_shallow_copy_type.default:  # of a module that moves its weights
        return isinstance(args[0], Away) == isinstance(args[1], Away)
    wanted = kwargs.get("device")
    to_device = any(isinstance(t, Away) for t in tensors) if wanted is None else torch.device(wanted) == DEVICE
    if to_device and kwargs.get("generator") is not None:
        raise RuntimeError(f"{function}: expected a generator of the device, found one of the cpu")
    if any(isinstance(t, Away) for t in tensors) and function not in COPIES:
        looked_at = args[:1] if function in INDEXED else tensors
        left = [tuple(t.shape) for t in looked_at if not isinstance(t, Away) and (t.ndim or function in INDEXED)]
        if left:
            raise RuntimeError(f"{function}: expected all tensors on the same device, these are on the cpu: {left}")
    if wanted is not None and to_device:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = function(*tree_map(_near, args), **tree_map(_near, kwargs))
    if not to_device and not (function is aten.copy_.default and isinstance(args[0], Away)):
        return out
    if _Mode.small:
        found = [t.dtype for t in tree_leaves(out) if isinstance(t, Tensor)]
        if torch.float64 in found or function._schema.name.removeprefix("aten::") in FACTORISATIONS:
            raise RuntimeError(f"{function}: not implemented for {found} on this device")
    known = {id(t.near): t for t in tensors if isinstance(t, Away)}  # an operation in place gives back what it was given
    return tree_map(lambda t: known.get(id(t)) if id(t) in known else _away(t), out)


class _Mode(TorchDispatchMode):
    small = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


@contextlib.contextmanager
def pretended_device(small: bool = False):
    """For the length of a `with` block DEVICE has numbers"""
    plain, _Mode.small = torch.tensor, small

    def tensor(data, *, device=None, **options):
        return plain(data, **options) if device is None else plain(data, **options).to(device)

    torch.tensor = tensor
    try:
        with _Mode():
            yield DEVICE
    finally:
        torch.tensor, _Mode.small = plain, False
