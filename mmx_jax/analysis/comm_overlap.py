"""Overlap of transfers with matrix products in a compiled program, read from the schedule of its compiler."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from mmx_jax.analysis import hlo_collectives

_START = re.compile(r"^\s*(?:ROOT )?(?P<name>%[\w.-]+) = (?P<shape>.*?) (?P<kind>[\w-]+)-start\(")
_DONE = re.compile(r" (?P<kind>[\w-]+)-done\((?P<start>%[\w.-]+)\)")
_CALLS = re.compile(r"calls=(%[\w.-]+)")
_PRODUCT = re.compile(r' (?:convolution|dot)\(|custom_call_target="tpu_custom_call"')


class Overlap(NamedTuple):
    """Transfers of some kinds in one run of a program on one device; those in loops count once."""

    count: int
    bytes: int  # of the results; of a ragged transfer, the smaller of its operand and its result
    exposed_bytes: int  # of transfers with no product scheduled between start and end

    @property
    def exposed_fraction(self) -> float:
        return self.exposed_bytes / self.bytes if self.bytes else 0.0


def overlap(text: str, kinds: Sequence[str] = ("all-to-all", "ragged-all-to-all")) -> Overlap:
    """How many bytes of the transfers of `kinds` overlap with products and Pallas kernels.

    Args:
      text: of `compiled.as_text()` for a TPU, whose instructions are in the order of their schedule. A synchronous
        transfer counts as exposed.
    """
    computations, _ = hlo_collectives.parse_computations(text)
    multiplying = {name for name, lines in computations.items() if any(map(_PRODUCT.search, lines))}
    transfers = [transfer for lines in computations.values() for transfer in _transfers(lines, kinds, multiplying)]
    return Overlap(
        count=len(transfers),
        bytes=sum(size for size, _ in transfers),
        exposed_bytes=sum(size for size, hidden in transfers if not hidden),
    )


def _transfers(lines, kinds, multiplying):
    """[(bytes, whether a product hides it)] of the transfers of one computation.

    Args:
      multiplying: names of the computations that hold a product.
    """
    multiplies = [bool(_PRODUCT.search(line)) or not multiplying.isdisjoint(_CALLS.findall(line)) for line in lines]
    found, starts = [], {}
    for i, line in enumerate(lines):
        if (start := _START.search(line)) and start["kind"] in kinds:
            starts[start["name"]] = i, _transfer_bytes(line, start)
        elif (done := _DONE.search(line)) and done["kind"] in kinds:
            begin, size = starts.pop(done["start"])
            found.append((size, any(multiplies[begin:i])))
        elif any(f" {kind}(" in line for kind in kinds):
            found.append((hlo_collectives.collective_bytes(line), False))
    return found


def _transfer_bytes(line, start):
    if start["kind"] == "ragged-all-to-all":
        return min(hlo_collectives.array_bytes(start["shape"])[:2])  # the rows and the buffer; the rest are tables
    return hlo_collectives.collective_bytes(line)
