"""Bytes that the collectives of a compiled program put on the links of a torus of chips.

Chips lie on a torus. An axis of it is a ring with links in both directions, or a line if it is not closed. A collective
among all chips of some axes uses the links of these axes. The functions return the bytes over the busiest link in one
direction, with the algorithms that need the fewest. Divided by the bandwidth this is a lower bound on the time; it
leaves out latency.
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mmx_jax.analysis.hlo_collectives import Operation


class Torus(NamedTuple):
    """Number of chips along each axis, and whether the axis is closed to a ring."""

    sizes: tuple[int, ...]
    closed: tuple[bool, ...]

    @classmethod
    def of_v5p(cls, sizes: Sequence[int]) -> "Torus":
        """A slice of v5p: axes are rings if the slice consists of cubes of 4 x 4 x 4, and lines otherwise."""
        cubes = all(size % 4 == 0 for size in sizes)
        return cls(tuple(sizes), (cubes,) * len(sizes))

    def _incoming_links(self, axes) -> int:
        """Links along `axes` that lead to every chip; a chip at the end of a line has one."""
        return sum(2 if self.closed[axis] else 1 for axis in axes)

    def all_gather(self, size: float, axes: Sequence[int]) -> float:
        """Bytes over a link when every chip receives an array of `size` bytes, of which it holds its part.

        Each chip must receive what it does not hold, at best over all of its links. A reduce-scatter is the reverse.
        """
        chips = math.prod(self.sizes[axis] for axis in axes)
        return size * (chips - 1) / chips / self._incoming_links(axes)

    def all_reduce(self, size: float, axes: Sequence[int]) -> float:
        """Bytes over a link of a reduce-scatter of `size` bytes and an all-gather of the sums."""
        return 2 * self.all_gather(size, axes)

    def all_to_all(self, size: float, axes: Sequence[int]) -> float:
        """Bytes over the busiest link when every chip has `size` bytes, in equal parts for every chip and itself.

        Messages go along one axis after the other, the shorter way round: on a ring of n they take n**2 // 4 / n links
        on average, and every chip has two links. On a line the middle link carries all messages between the halves.
        """
        axis_loads = []
        for axis in axes:
            n = self.sizes[axis]
            axis_loads.append(size * (n * n // 4) / n / (2 if self.closed[axis] else 1))
        return max(axis_loads)

    def permute(self, size: float, pairs: Sequence[tuple[int, ...]], coords: np.ndarray) -> float:
        """Bytes over the busiest link when `size` bytes go from the first to the second device of each pair.

        Messages go along one axis after the other, the shorter way round, and half each way if both are as long.

        Args:
          pairs: (source, target), indices into `coords`.
          coords: [devices, axes], coordinates of each device.
        """
        link_loads = collections.defaultdict(float)
        for source, target in pairs:
            at = list(map(int, coords[source]))
            for axis, end in enumerate(map(int, coords[target])):
                for step, hops, part in self._routes(axis, at[axis], end):
                    for hop in range(hops):
                        chip = (*at[:axis], (at[axis] + step * hop) % self.sizes[axis], *at[axis + 1 :])
                        link_loads[chip, axis, step] += part * size
                at[axis] = end
        return max(link_loads.values(), default=0.0)

    def _routes(self, axis, begin, end) -> list[tuple[int, int, float]]:
        """(direction, number of links, part of the bytes) of each route from `begin` to `end`."""
        n = self.sizes[axis]
        if not self.closed[axis]:
            return [(1 if end > begin else -1, abs(end - begin), 1.0)]
        up = (end - begin) % n
        if 2 * up == n:
            return [(1, up, 0.5), (-1, up, 0.5)]
        return [(1, up, 1.0)] if 2 * up < n else [(-1, n - up, 1.0)]


class Load(NamedTuple):
    """A kind of collective over some axes of the mesh, in one run of a program.

    Attributes:
      kind, dtype: as in `hlo_collectives.Operation`.
      axes: the mesh axes that have several devices; () if the devices of a group are not a box of the mesh.
      count: number of operations.
      bytes: of their results on one device.
      link_bytes: over the busiest link in one direction, summed over the operations; between slices: what a chip sends.
      torus_axes: the axes of the torus whose links carry it.
    """

    kind: str
    dtype: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    link_bytes: float
    torus_axes: tuple[int, ...]


def loads(
    operations: Sequence[Operation], mesh_sizes: Mapping[str, int], coords: np.ndarray, torus: Torus, slices: int = 1
) -> list[Load]:
    """The loads of a program; operations of the same kind, dtype and axes are summed.

    Args:
      operations: of `hlo_collectives.operations`.
      mesh_sizes: number of devices along each mesh axis, within one slice.
      coords: [devices, axes of the torus], coordinates of the devices in the order of the mesh.
      slices: number of slices that the data center network joins.
    """
    total = {}
    for found in operations:
        if found.kind.startswith("slices-"):
            key, link_bytes = (found.kind, found.dtype, ("slices",), ()), dcn_bytes(found, slices)
        else:
            axes, along, link_bytes = _on_torus(found, mesh_sizes, coords, torus)
            key = found.kind, found.dtype, axes, along
        count, size, before = total.get(key, (0, 0, 0.0))
        total[key] = count + found.count, size + found.count * found.bytes, before + found.count * link_bytes
    return [
        Load(kind, dtype, axes, count, size, link_bytes, along)
        for (kind, dtype, axes, along), (count, size, link_bytes) in total.items()
    ]


def dcn_bytes(found: Operation, slices: int) -> float:
    """Bytes that a chip sends to other slices over the data center network, around a ring of slices."""
    part = (slices - 1) / slices
    factors = {
        "slices-all-reduce": 2 * part,
        "slices-reduce-scatter": part,
        "slices-all-gather": slices - 1,
        "slices-all-to-all": part,
    }
    if found.kind not in factors:
        raise ValueError(f"there is no formula for {found.kind} between slices")
    return found.sent * factors[found.kind]


def _on_torus(found, mesh_sizes, coords, torus):
    """(mesh axes, torus axes, bytes over the busiest link) of one run of an operation."""
    groups = parse_groups(found.groups, math.prod(mesh_sizes.values()))
    if found.kind == "collective-permute":
        axes = tuple(dict.fromkeys(axis for pair in groups for axis in mesh_axes(pair, mesh_sizes, whole=False)))
        along = sorted({axis for a, b in groups for axis in np.flatnonzero(coords[a] != coords[b]).tolist()})
        return axes, tuple(along), torus.permute(found.bytes, groups, coords)
    axes, along = mesh_axes(groups[0], mesh_sizes), torus_axes(coords[list(groups[0])], torus)
    if not along:
        return axes, along, 0.0
    if found.kind == "all-gather":
        return axes, along, torus.all_gather(found.bytes, along)
    if found.kind == "reduce-scatter":
        return axes, along, torus.all_gather(found.sent, along)
    if found.kind == "all-reduce":
        return axes, along, torus.all_reduce(found.bytes, along)
    if found.kind == "all-to-all":
        return axes, along, torus.all_to_all(found.bytes, along)
    if found.kind == "ragged-all-to-all":  # the larger of operand and result is a buffer that is not full
        return axes, along, torus.all_to_all(min(found.bytes, found.sent), along)
    raise ValueError(f"there is no formula for {found.kind} on a torus")


_MESH = re.compile(r"mesh\[(?P<sizes>.*?)\] \{(?P<names>.*?)\}")
_IOTA = re.compile(r"\[(?P<result>[\d,]+)\]<=\[(?P<sizes>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?")


def parse_groups(groups: str, num_devices: int) -> list[tuple[int, ...]]:
    """The groups of devices, or pairs, that HLO writes as lists, as axes of a mesh, or as a transposed iota."""
    if match := _MESH.fullmatch(groups):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match["sizes"])}
        names = re.findall(r"'(\w+)'", match["names"])
        if ":" in match["names"] or math.prod(sizes.values()) != num_devices:
            raise ValueError(f"groups {groups!r} of {num_devices} devices have an unknown form")
        ids = np.arange(num_devices).reshape(tuple(sizes.values()))
        order = [i for i, name in enumerate(sizes) if name not in names] + [list(sizes).index(name) for name in names]
        rows = ids.transpose(order).reshape(-1, math.prod(sizes[name] for name in names))
    elif match := _IOTA.fullmatch(groups):
        numbers = {key: tuple(map(int, value.split(","))) for key, value in match.groupdict().items() if value}
        ids = np.arange(math.prod(numbers["sizes"])).reshape(numbers["sizes"])
        rows = ids.transpose(numbers.get("order", range(ids.ndim))).reshape(numbers["result"])
    elif not groups.strip("{}"):
        return [tuple(range(num_devices))]
    else:
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", groups)]
    return [tuple(row) for row in rows.tolist()]


def mesh_axes(group: Sequence[int], mesh_sizes: Mapping[str, int], *, whole: bool = True) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ.

    Args:
      group: positions in the mesh.
      whole: return () for a group that lacks some devices along these axes.
    """
    positions = np.stack(np.unravel_index(np.asarray(group), tuple(mesh_sizes.values())))
    axes = tuple(name for name, along in zip(mesh_sizes, positions, strict=True) if len(set(along.tolist())) > 1)
    return axes if not whole or math.prod(mesh_sizes[name] for name in axes) == len(group) else ()


def torus_axes(coords: np.ndarray, torus: Torus) -> tuple[int, ...]:
    """The axes of the torus that the chips at `coords` fill; raises ValueError if they fill an axis only in part."""
    along = tuple(axis for axis in range(len(torus.sizes)) if len(set(coords[:, axis].tolist())) > 1)
    if math.prod(torus.sizes[axis] for axis in along) != len(coords):
        raise ValueError(f"a group of {len(coords)} chips is not a product of axes of the torus {torus.sizes}")
    return along
