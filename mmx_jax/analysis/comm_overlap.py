"""Which transfers of a compiled program hide behind matrix work, from the order in which its compiler put them."""

import re
from typing import NamedTuple

from mmx_jax.analysis import hlo_collectives

_START = re.compile(r"^\s*(?:ROOT )?(?P<name>%[\w.-]+) = (?P<shape>.*?) (?P<kind>[\w-]+)-start\(")
_DONE = re.compile(r" (?P<kind>[\w-]+)-done\((?P<start>%[\w.-]+)\)")
_CALLS = re.compile(r"calls=(%[\w.-]+)")
_PRODUCT = re.compile(r' (?:convolution|dot)\(|custom_call_target="tpu_custom_call"')


class Overlap(NamedTuple):
    """Transfers of some kinds in one run of a program on one device; those in loops count once."""

    count: int
    bytes: int  # of the results; of a ragged transfer, that of the smaller of what it takes from and what it fills
    exposed_bytes: int  # of those between whose start and end no matrix work is scheduled

    @property
    def exposed(self) -> float:
        return self.exposed_bytes / self.bytes if self.bytes else 0.0


def overlap(text: str, kinds=("all-to-all", "ragged-all-to-all")) -> Overlap:
    """What of the transfers of `kinds` hides behind products and Pallas kernels.

    Args:
      text: of `compiled.as_text()` for a TPU, whose instructions stand in the order of their schedule. A transfer that
        is not asynchronous is exposed.
    """
    computations, _ = hlo_collectives.computations_of(text)
    multiplying = {name for name, lines in computations.items() if any(map(_PRODUCT.search, lines))}
    found = []
    for lines in computations.values():
        works = [bool(_PRODUCT.search(line)) or not multiplying.isdisjoint(_CALLS.findall(line)) for line in lines]
        starts = {}
        for i, line in enumerate(lines):
            if (start := _START.search(line)) and start["kind"] in kinds:
                starts[start["name"]] = i, _carried_bytes(line, start)
            elif (done := _DONE.search(line)) and done["kind"] in kinds:
                begin, size = starts.pop(done["start"])
                found.append((size, any(works[begin:i])))
            elif any(f" {kind}(" in line for kind in kinds):
                found.append((hlo_collectives.collective_bytes(line), False))
    return Overlap(
        count=len(found),
        bytes=sum(size for size, _ in found),
        exposed_bytes=sum(s for s, hidden in found if not hidden),
    )


def _carried_bytes(line, start):
    if start["kind"] == "ragged-all-to-all":
        return min(hlo_collectives.array_bytes(start["shape"])[:2])  # the rows and the buffer; the rest are tables
    return hlo_collectives.collective_bytes(line)
