"""How much memory a computation holds, counted from its tensors, on any device."""

from __future__ import annotations

import weakref
from functools import partial

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Bytes of the tensor storages that operations made and that are still in use, and their maximum.

    The count is the same on every device. It does not include memory inside an operation, or that of other threads.

    Attributes:
        now, peak: bytes in use now, and the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {id(a.untyped_storage()) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                name, size = id(storage), storage.nbytes()
                if name not in self.known and name not in old:
                    self.known[name] = weakref.ref(storage, partial(self._gone, name, size))
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return out

    def _gone(self, name: int, size: int, _: object) -> None:
        del self.known[name]
        self.now -= size
