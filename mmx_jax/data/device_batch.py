"""How the rows of a batch come to the devices of several processes.

A device holds a block of rows, and of each row the part for its place along mesh axis `seq`. Its process reads these
rows whole, for only whole rows can be packed, and hands over the parts that its devices hold. So processes whose
devices share rows, along `seq`, `tensor` or by how a mesh lies over hosts, read the same shards of the data, and each
packs what the others pack too.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from mmx_jax.config import Config
from mmx_jax.sharding import RULES, logical_to_spec

BATCH_KEYS = ("tokens", "targets", "segment_ids", "positions")


def batch_sharding(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> NamedSharding:
    """Sharding of an array [rows, T] of a batch."""
    return NamedSharding(mesh, logical_to_spec(("batch", "length")))


def batch_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Number of parts that the batch axis is divided into; 1 without a mesh."""
    return math.prod(mesh.shape[axis] for axis in jax.tree.leaves(RULES["batch"]) if not mesh.empty)


def rows_by_process(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, rows: int) -> dict[int, np.ndarray]:
    """The numbers of the rows of a batch of which the devices of each process hold parts, ascending."""
    blocks = {}
    for device, (block, _) in batch_sharding(mesh).devices_indices_map((rows, mesh.size)).items():
        blocks.setdefault(device.process_index, []).append(block)
    return {process: _numbers(own, rows) for process, own in blocks.items()}


def own_rows(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, rows: int) -> list[int]:
    """Numbers of the rows of a batch that this process reads."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((rows, mesh.size))
    return _numbers([index[0] for index in indices.values() if index], rows).tolist()


def _numbers(blocks, rows):
    return np.unique(np.concatenate([np.arange(rows)[block] for block in blocks]))


def join_parts(parts: list[np.ndarray]) -> np.ndarray:
    """The rows of several batches [R, T] in one: first the first of each, so that the processes, each with its rows of
    all parts, together join them as one process does."""
    return np.stack(parts, axis=1).reshape(-1, parts[0].shape[1])


def part_of(own: np.ndarray, numbers: Sequence[int] | np.ndarray, index: Any) -> np.ndarray:
    """The part `index` of a batch of which some rows are at hand.

    Args:
      own: [R, T], these rows, whole.
      numbers: [R], their numbers in the batch, ascending.
      index: slices of the batch's rows, all among `numbers`, and of their length; either may be slice(None).
    """
    rows, length = index
    begin, end = np.searchsorted(numbers, rows.indices(numbers[-1] + 1)[:2])
    return own[begin:end, length]


def to_devices(
    batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, rows: int
) -> dict[str, jax.Array]:
    """A batch on the devices of all processes, from what each has read of it.

    Args:
      batch: int32 [R, T] by name, the `own_rows` of this process.
      rows: of the whole batch.

    Returns:
      int32 [rows, T] by name, with `batch_sharding`.
    """
    sharding, numbers = batch_sharding(mesh), own_rows(mesh, rows)
    return {
        name: jax.make_array_from_callback(
            (rows, own.shape[1]), sharding, lambda index, own=own: part_of(own, numbers, index)
        )
        for name, own in batch.items()
    }


def reading_lines(config: Config, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> list[str]:
    """Lines that say what each process reads, one for every stage; none if there is one process."""
    lines = []
    for stage in config.training.resolved_stages:
        rows = config.training.row_unit(stage)
        held = rows_by_process(mesh, rows)
        if len(held) > 1:
            what = f"{len(held)} processes, rows of {stage.sequence_length} tokens: of every {rows} "
            lines.append(what + reading_of(list(held.values()), rows, config.data.shards))
    return lines


def reading_of(held: Sequence[np.ndarray], rows: int, shards: int) -> str:
    """How many rows a process reads, and the remedy where these are more than its devices hold.

    Args:
      held: `rows_by_process` of batches of `rows` rows.
      shards: `data.shards`, which give the rows in groups.
    """

    def packed(own, size):  # in groups of that size
        return len(np.unique(own // size)) * size

    size = rows // math.gcd(rows, shards)
    own = max(held, key=lambda own: packed(own, size) / len(own))
    text = f"each packs up to {packed(own, size)}, and its devices hold {len(own)} or parts of them"
    if packed(own, size) == len(own):
        return text
    exact = (n for n in range(rows, 0, -1) if rows % n == 0 and all(packed(own, n) == len(own) for own in held))
    return f"{text}; a new run with data.shards={rows // next(exact)} would pack no others"
