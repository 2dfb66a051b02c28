"""Arrays of an orbax item on disk, opened one by one without orbax, and checksums that can be added up in slices."""

import math
import pathlib

import numpy as np
import tensorstore as ts

from mmx_jax.storage import json_io

_SLICE_ELEMENTS = 1 << 22  # that the sum of a region holds at a time
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


class ArrayFolder:
    """The arrays below `folder`, by name: the keys of the leaf, joined by dots.

    Args:
      cache_bytes: of decoded chunks, where a chunk holds more than is read at a time.

    Raises:
      OSError, json_io.JsonError: the folder has no layout that can be read.
    """

    def __init__(self, folder: pathlib.Path, cache_bytes: int = 0):
        self.folder = folder.absolute()
        self._zarr3 = bool(json_io.read_object(folder / "_METADATA").get("use_zarr3"))
        self._ocdbt = (folder / "manifest.ocdbt").exists()
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes if self._ocdbt else 0}})
        self._stores = {}

    def open(self, name: str) -> ts.TensorStore:
        """The array of that name; ValueError where it is missing or damaged."""
        if name not in self._stores:
            if self._ocdbt:
                base = {"driver": "file", "path": f"{self.folder}/"}
                kvstore = {"driver": "ocdbt", "base": base, "path": name}
            else:
                kvstore = {"driver": "file", "path": str(self.folder / name)}
            # A chunk that is not there must be an error, not zeros.
            spec = {"driver": "zarr3" if self._zarr3 else "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
            self._stores[name] = ts.open(spec, read=True, context=self._context).result()
        return self._stores[name]


def region_checksum(values: np.ndarray, origin: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Contribution of a region to the checksum of its array; the sums over all regions, modulo 2^32, are that checksum.

    It is the sum of the bits of each element times an odd number for its position, as
    `mmx_jax.checkpoints.manager.array_checksums` computes it on devices.

    Args:
      values: the region, of any strides.
      origin: where it begins in the array of `shape`.
    """
    pad = 2 - len(shape)
    if pad > 0:
        values, origin, shape = values.reshape((1,) * pad + values.shape), (0,) * pad + origin, (1,) * pad + shape
    if values.size == 0:
        return 0
    weights = (2 * np.arange(values.shape[-1], dtype=np.uint64) + 1).astype(np.uint32)  # within a row
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    step = max(1, _SLICE_ELEMENTS * len(values) // values.size)
    total = 0
    for start in range(0, len(values), step):
        part = np.ascontiguousarray(values[start : start + step])
        bits = part.view(_UNSIGNED[part.dtype.itemsize]).astype(np.uint32, copy=False)
        begins: np.ndarray = np.zeros([1] * bits.ndim, np.uint64)  # of the rows
        for axis, size in enumerate(bits.shape[:-1] + (1,)):
            first = origin[axis] + (start if axis == 0 else 0)
            index = np.arange(first, first + size, dtype=np.uint64) * np.uint64(strides[axis] % 2**32)
            begins = begins + index.reshape([-1 if i == axis else 1 for i in range(bits.ndim)])
        begins = 2 * begins[..., 0].astype(np.uint32)
        rows = np.einsum("...j,j->...", bits, weights) + begins * bits.sum(-1, dtype=np.uint32)
        total += int(rows.sum(dtype=np.uint32))
    return total % 2**32
