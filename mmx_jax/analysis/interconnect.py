"""What the collectives of a compiled program put on the links of a torus of chips.

Chips lie on a torus; an axis of it is a ring of links in both directions, or a line where it is not closed. A
collective among all chips of some axes keeps the links of these axes busy. Here are the bytes that go over the busiest
link in one direction, by the algorithms that need the fewest: over a bandwidth they are the least time it can take.
Latency is not in it.
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mmx_jax.analysis.hlo_collectives import Operation


class Torus(NamedTuple):
    """Chips along each axis, and whether the axis is closed to a ring."""

    sizes: tuple[int, ...]
    closed: tuple[bool, ...]

    @classmethod
    def of_v5p(cls, sizes: Sequence[int]):
        """A slice of v5p: axes are rings in slices that are made of cubes of 4 x 4 x 4, and lines in smaller ones."""
        cubes = all(size % 4 == 0 for size in sizes)
        return cls(tuple(sizes), (cubes,) * len(sizes))

    def _incoming(self, axes) -> int:
        """Links that lead to every chip along some axes; to a chip at the end of a line leads one."""
        return sum(2 if self.closed[axis] else 1 for axis in axes)

    def gather(self, size, axes) -> float:
        """Bytes over a link when every chip comes to hold `size` bytes, of which it had its share.

        Each chip must be sent what it does not have, and at best by all of its links. A reduce-scatter is the reverse.
        """
        chips = math.prod(self.sizes[axis] for axis in axes)
        return size * (chips - 1) / chips / self._incoming(axes)

    def all_reduce(self, size, axes) -> float:
        """A reduce-scatter of `size` bytes and a gather of the sums."""
        return 2 * self.gather(size, axes)

    def all_to_all(self, size, axes) -> float:
        """Bytes over the busiest link when every chip has `size` bytes, an equal part for each chip and itself.

        They go along one axis after the other, by the shorter way round: n**2 // 4 / n links on average on a ring of
        n, and every chip has two of its links. On a line the link in the middle carries all from one half to the other.
        """
        loads = []
        for axis in axes:
            n = self.sizes[axis]
            loads.append(size * (n * n // 4) / n / (2 if self.closed[axis] else 1))
        return max(loads)

    def permute(self, size, pairs, places) -> float:
        """Bytes over the busiest link when `size` bytes go from the first to the second of each pair of devices.

        They go along one axis after the other by the shorter way round, and half each way where both are as long.

        Args:
          pairs: (source, target), places in `places`.
          places: [devices, axes], coordinates of each device.
        """
        loads = collections.Counter()
        for source, target in pairs:
            at = list(map(int, places[source]))
            for axis, end in enumerate(map(int, places[target])):
                for step, hops, share in self._ways(axis, at[axis], end):
                    for hop in range(hops):
                        chip = (*at[:axis], (at[axis] + step * hop) % self.sizes[axis], *at[axis + 1 :])
                        loads[chip, axis, step] += share * size
                at[axis] = end
        return max(loads.values(), default=0.0)

    def _ways(self, axis, begin, end):
        """(direction, links, share of the bytes) of each way from `begin` to `end`."""
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
      kind, dtype: of `compiled.Operation`.
      axes: of the mesh, those of several devices; () where the devices of a group are no box of the mesh.
      count: operations.
      bytes: of their results on one device.
      link_bytes: over the busiest link in one direction, the operations added up; between slices: what a chip sends.
      torus_axes: of the torus, whose links carry it.
    """

    kind: str
    dtype: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    link_bytes: float
    torus_axes: tuple[int, ...]


def loads(operations: Sequence[Operation], shape: Mapping[str, int], places, torus: Torus, slices: int = 1):
    """`Load`s of a program, those of operations of one kind, type and axes added up.

    Args:
      operations: of `compiled.operations`.
      shape: devices along each mesh axis; of one slice, if there are several.
      places: [devices, axes of the torus], coordinates of the devices in the order of the mesh.
      slices: of devices that are joined by the network of the data center.
    """
    total = {}
    for found in operations:
        if found.kind.startswith("slices-"):
            key, per_link = (found.kind, found.dtype, ("slices",), ()), between_slices(found, slices)
        else:
            axes, along, per_link = _on_torus(found, shape, places, torus)
            key = found.kind, found.dtype, axes, along
        count, size, links = total.get(key, (0, 0, 0.0))
        total[key] = count + found.count, size + found.count * found.bytes, links + found.count * per_link
    return [Load(kind, dtype, axes, *sums, along) for (kind, dtype, axes, along), sums in total.items()]


def between_slices(found: Operation, slices: int) -> float:
    """Bytes that a chip sends to other slices: around a ring of them."""
    share = (slices - 1) / slices
    factors = {"slices-all-reduce": 2 * share, "slices-reduce-scatter": share, "slices-all-gather": slices - 1}
    factors["slices-all-to-all"] = share
    if found.kind not in factors:
        raise ValueError(f"{found.kind} is not known between slices")
    return found.sent * factors[found.kind]


def _on_torus(found, shape, places, torus):
    """(mesh axes, torus axes, bytes over the busiest link) of one run of an operation."""
    groups = devices_of(found.groups, math.prod(shape.values()))
    if found.kind == "collective-permute":
        axes = tuple(dict.fromkeys(axis for pair in groups for axis in mesh_axes(pair, shape, whole=False)))
        along = sorted({axis for a, b in groups for axis in np.flatnonzero(places[a] != places[b]).tolist()})
        return axes, tuple(along), torus.permute(found.bytes, groups, places)
    axes, along = mesh_axes(groups[0], shape), torus_axes(places[list(groups[0])], torus)
    if not along:
        return axes, along, 0.0
    if found.kind == "all-gather":
        return axes, along, torus.gather(found.bytes, along)
    if found.kind == "reduce-scatter":
        return axes, along, torus.gather(found.sent, along)
    if found.kind == "all-reduce":
        return axes, along, torus.all_reduce(found.bytes, along)
    if found.kind == "all-to-all":
        return axes, along, torus.all_to_all(found.bytes, along)
    if found.kind == "ragged-all-to-all":  # the larger of both sides is a buffer with room to spare
        return axes, along, torus.all_to_all(min(found.bytes, found.sent), along)
    raise ValueError(f"{found.kind} is not known on a torus")


_MESH = re.compile(r"mesh\[(?P<sizes>.*?)\] \{(?P<names>.*?)\}")
_IOTA = re.compile(r"\[(?P<result>[\d,]+)\]<=\[(?P<sizes>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?")


def devices_of(groups: str, num_devices: int) -> list[tuple[int, ...]]:
    """The groups of devices, or pairs, that HLO writes as lists, as axes of a mesh, or as a transposed count."""
    if match := _MESH.fullmatch(groups):
        shape = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match["sizes"])}
        names = re.findall(r"'(\w+)'", match["names"])
        if ":" in match["names"] or math.prod(shape.values()) != num_devices:
            raise ValueError(f"groups {groups!r} of {num_devices} devices are in a form that is not known")
        ids = np.arange(num_devices).reshape(tuple(shape.values()))
        order = [i for i, name in enumerate(shape) if name not in names] + [list(shape).index(name) for name in names]
        rows = ids.transpose(order).reshape(-1, math.prod(shape[name] for name in names))
    elif match := _IOTA.fullmatch(groups):
        numbers = {key: tuple(map(int, value.split(","))) for key, value in match.groupdict().items() if value}
        ids = np.arange(math.prod(numbers["sizes"])).reshape(numbers["sizes"])
        rows = ids.transpose(numbers.get("order", range(ids.ndim))).reshape(numbers["result"])
    elif not groups.strip("{}"):
        return [tuple(range(num_devices))]
    else:
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", groups)]
    return [tuple(row) for row in rows.tolist()]


def mesh_axes(group: Sequence[int], shape: Mapping[str, int], *, whole: bool = True) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ.

    Args:
      group: positions in the mesh.
      whole: () for a group that is not all devices along these axes.
    """
    places = np.stack(np.unravel_index(np.asarray(group), tuple(shape.values())))
    axes = tuple(name for name, along in zip(shape, places, strict=True) if len(set(along.tolist())) > 1)
    return axes if not whole or math.prod(shape[name] for name in axes) == len(group) else ()


def torus_axes(places, torus: Torus) -> tuple[int, ...]:
    """The axes of the torus that the chips at `places` fill; raises ValueError where they are a part of an axis."""
    along = tuple(axis for axis in range(len(torus.sizes)) if len(set(places[:, axis].tolist())) > 1)
    if math.prod(torus.sizes[axis] for axis in along) != len(places):
        raise ValueError(f"a group of {len(places)} chips is no product of axes of the torus {torus.sizes}")
    return along
