"""Tells whether weights are as they were when something was computed from them."""

from collections.abc import Sequence

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class WeightState:
    """Remembers the state of ``weights``: in-place changes move their versions; ``.data = ``, and moves to a device or
    dtype, give them another storage.

    Neither weights nor their memory are kept alive.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._key = _key(weights)
        # A storage's address is not given to another one while there are weak references.
        self._storages = [StorageWeakRef(weight.untyped_storage()) for weight in weights]

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        """Tells whether these tensors, which are the same ones, have not changed since."""
        return self._key == _key(weights)


def _key(weights: Sequence[Tensor]) -> list[tuple[object, ...]]:
    # Inference tensors have no versions.
    return [
        (None if w.is_inference() else w._version, w.untyped_storage()._cdata, w.data_ptr(), w.shape, w.stride())
        for w in weights
    ]
