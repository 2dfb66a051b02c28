"""Collectives of an optimized HLO program: kind, count, bytes, and groups of devices."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (8, 16, 32, 64)
}
_KINDS = "all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf" = (?P<shape>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\((?P<operand>%[\w.-]+)?")
_BETWEEN_SLICES = re.compile(r" = \((?P<shape>[^ ]+), .* send\(.*_xla_megascale_transfer_type=\"(?P<kind>\w+)\"")
_GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs)=(mesh\[.*?\] \{.*?\}|\[.*?\]<=\[.*?\](?:T\(.*?\))?|\{.*?\}\}|\{\})"
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?(%?[\w.-]+) \(.*\{$")
_WHILE = re.compile(r" while\((%[\w.-]+)\), condition=(%?[\w.-]+), body=(%?[\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=(%?[\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONSTANT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
_COUNTER = re.compile(r" = s32\[\]\S* get-tuple-element\(.*?\), index=(\d+)")
# XLA:TPU writes a reduce-scatter over some axes as a fusion: an all-reduce, and the slice of it that is kept.
_ALL_REDUCE_SCATTER = re.compile(r" = (?P<shape>.*?) fusion\(.*calls=%all-reduce-scatter")


class Collective(NamedTuple):
    """All collectives of one kind on one device, in one run of a program."""

    count: int
    bytes: int  # of the results


class Operation(NamedTuple):
    """A collective of an optimized program, as one device runs it.

    Attributes:
      kind: HLO's name; with the prefix "slices-" for transfers between slices, over the data center network.
      count: number of runs.
      bytes: of the results of one run.
      sent: bytes that this device contributes to one run: those of the first operand, or of everything that it sums.
      dtype: of the first result, such as "bf16".
      groups: the text of the groups of devices, or of pairs of source and target; "" if there are none.
    """

    kind: str
    count: int
    bytes: int
    sent: int
    dtype: str
    groups: str


def operations(text: str) -> list[Operation]:
    """The collectives of an optimized program, in the order of its computations.

    Args:
      text: of `compiled.as_text()`. Loops must be those of `lax.scan`: they count up to a constant in their condition,
        from 0, or from a larger number if the compiler peeled off the first iterations.
    """
    computations, entry = parse_computations(text)
    return list(_operations_of(computations, entry, 1))


def _operations_of(computations, name, times, kept_shape="") -> Iterator[Operation]:
    """Yields the operations of a computation that runs `times` times.

    Args:
      kept_shape: in a fusion of an all-reduce and a slice, the shape of the slice.
    """
    lines = computations.get(name, ())
    for line in lines:
        if match := _COLLECTIVE.search(line):
            yield _operation(match, line, lines, times, kept_shape)
        elif match := _BETWEEN_SLICES.search(line):
            size, kind = sum(array_bytes(match["shape"])), match["kind"].lower().replace("_", "-")
            yield Operation(f"slices-{kind}", times, size, size, _first_dtype(match["shape"]), "")
        if loop := _WHILE.search(line):
            operand, condition, body = loop.groups()
            iterations = _loop_iterations(computations[condition], lines, operand)
            yield from _operations_of(computations, body, times * iterations)
            continue
        called = _CALLED.findall(line)
        for group in _BRANCHES.findall(line):
            called += group.split(", ")
        fusion = _ALL_REDUCE_SCATTER.search(line)
        for other in called:
            yield from _operations_of(computations, other, times, fusion["shape"] if fusion else "")


def _operation(match, line, lines, times, kept_shape):
    kind, size, groups = match["kind"], _result_bytes(match), _GROUPS.search(line)
    if kind in ("all-reduce", "collective-permute"):
        sent = size
    else:
        definition = _definition(match["operand"], lines)
        sent = sum(array_bytes(definition.split(" = ")[1].split(" ")[0])) if definition else 0
    if kept_shape and kind == "all-reduce":
        kind, size = "reduce-scatter", sum(array_bytes(kept_shape))
    return Operation(kind, times, size, sent, _first_dtype(match["shape"]), groups[1] if groups else "")


def collectives(text: str) -> dict[str, Collective]:
    """The collectives of an optimized program by kind, each counted once per run of the loops around it.

    Args:
      text: as `operations` takes it.
    """
    total: dict[str, Collective] = {}
    for found in operations(text):
        before = total.get(found.kind, Collective(0, 0))
        total[found.kind] = Collective(before.count + found.count, before.bytes + found.count * found.bytes)
    return {kind: total[kind] for kind in sorted(total)}


def parse_computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({name: lines} of the computations, name of the entry) of an optimized program."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = computations[head[1]] = []
            if line.startswith("ENTRY"):
                entry = head[1]
        lines.append(line)
    return computations, entry


def collective_bytes(line: str) -> int:
    """Bytes of the results of the collective that an instruction runs or starts; 0 for other instructions."""
    found = _COLLECTIVE.search(line)
    return _result_bytes(found) if found else 0


def array_bytes(shape: str, *, scalars: bool = True) -> list[int]:
    """Bytes of each array in the text of a shape, in order; arrays of an unknown dtype are left out."""
    found = [(dtype, dims) for dtype, dims in _ARRAY.findall(shape) if dtype in _ITEM_BITS and (dims or scalars)]
    return [math.prod(int(n) for n in dims.split(",") if n) * _ITEM_BITS[dtype] // 8 for dtype, dims in found]


def _first_dtype(shape):
    return next(dtype for dtype, _ in _ARRAY.findall(shape) if dtype in _ITEM_BITS)


def _loop_iterations(condition, lines, operand):
    """Number of iterations of a loop that counts up by one, from the start value in its operand, defined in `lines`."""
    if any("ROOT" in line and " and(" in line for line in condition):
        return 1  # the decoding loop also ends by another condition; one step of it is counted
    end = max((int(n) for line in condition for n in _CONSTANT.findall(line)), default=1)
    counter = next((int(found[1]) for line in condition if (found := _COUNTER.search(line))), 0)
    return end - _loop_start(_definition(operand, lines), counter, lines)


def _loop_start(definition, counter, lines):
    """Start value of a loop's counter; 0 if the text does not show it. It is not 0 if iterations were peeled off."""
    elements = re.search(r" tuple\((.*?)\)", definition)
    if not elements:
        return 0
    name = re.sub(r"/\*.*?\*/", "", elements[1]).split(", ")[counter]
    definition = _definition(name, lines)
    while found := re.search(r" (?:copy|bitcast)\((%[\w.-]+)\)", definition):
        definition = _definition(found[1], lines)
    found = _CONSTANT.search(definition)
    return int(found[1]) if found else 0


def _definition(name, lines):
    """The instruction with that name; "" if it is not in `lines`."""
    return next((line for line in lines if line.lstrip().removeprefix("ROOT ").startswith(f"{name} = ")), "")


def _result_bytes(found):
    if not found["start"] or found["kind"] == "all-reduce":
        return sum(array_bytes(found["shape"]))
    # A start has operands, then as many results, then scalars that belong to the compiler.
    sizes = array_bytes(found["shape"], scalars=False)
    return sum(sizes[len(sizes) // 2 :])
