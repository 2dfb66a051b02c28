"""Collectives of an optimized HLO program: which, how often, how many bytes, among which devices."""

import math
import re
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
# XLA:TPU has no other form of a reduce-scatter over some axes: a fusion of the sum and of the slice that is kept of it.
_SUM_AND_SLICE = re.compile(r" = (?P<shape>.*?) fusion\(.*calls=%all-reduce-scatter")


class Collective(NamedTuple):
    """What one device does of a kind of collective in one run of a program."""

    count: int
    bytes: int  # of the results


class Operation(NamedTuple):
    """A collective of an optimized program, as one device runs it.

    Attributes:
      kind: of HLO's; "slices-" and a kind where it is between slices, over the network of the data center.
      count: how often it runs.
      bytes: of its results, once.
      sent: bytes of what this device has in it, once: of its first operand, or of all that it sums.
      dtype: of its first result, such as "bf16".
      groups: the text of its groups of devices, or pairs of source and target; "" where it has none.
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
      text: of `compiled.as_text()`. Loops are those of `lax.scan`: up to a constant in their condition, from 0 or what
        is left of it where the compiler took the first rounds out.
    """
    computations, entry = computations_of(text)
    found = []

    def visit(name, times, kept=None):
        """kept: the shape of the slice that is kept of a sum, in a fusion of both."""
        lines = computations.get(name, ())
        for line in lines:
            if match := _COLLECTIVE.search(line):
                found.append(_operation(match, line, lines, times, kept))
            elif match := _BETWEEN_SLICES.search(line):
                size, kind = sum(array_bytes(match["shape"])), match["kind"].lower().replace("_", "-")
                found.append(Operation(f"slices-{kind}", times, size, size, _ARRAY.search(match["shape"])[1], ""))
            if loop := _WHILE.search(line):
                operand, condition, body = loop.groups()
                visit(body, times * _trips(computations[condition], lines, operand))
                continue
            called = _CALLED.findall(line)
            for group in _BRANCHES.findall(line):
                called += group.split(", ")
            fused = _SUM_AND_SLICE.search(line)
            for other in called:
                visit(other, times, fused["shape"] if fused else None)

    visit(entry, 1)
    return found


def _operation(match, line, lines, times, kept):
    kind, size, groups = match["kind"], _result_bytes(match), _GROUPS.search(line)
    if kind in ("all-reduce", "collective-permute"):
        sent = size
    else:
        definition = _definition(match["operand"], lines)
        sent = sum(array_bytes(definition.split(" = ")[1].split(" ")[0])) if definition else 0
    if kept is not None and kind == "all-reduce":
        kind, size = "reduce-scatter", sum(array_bytes(kept))
    dtype = next(kind for kind, _ in _ARRAY.findall(match["shape"]) if kind in _ITEM_BITS)
    return Operation(kind, times, size, sent, dtype, groups[1] if groups else "")


def collectives(text: str) -> dict[str, Collective]:
    """The collectives of an optimized program, by kind; those in a loop count as often as it goes round.

    Args:
      text: as `operations` takes it.
    """
    total = {}
    for found in operations(text):
        count, size = total.get(found.kind, (0, 0))
        total[found.kind] = Collective(count + found.count, size + found.count * found.bytes)
    return {kind: total[kind] for kind in sorted(total)}


def computations_of(text):
    """({name: lines}, name of the entry) of an optimized program."""
    computations, entry, lines = {}, None, []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = computations[head[1]] = []
            if line.startswith("ENTRY"):
                entry = head[1]
        lines.append(line)
    return computations, entry


def collective_bytes(line: str) -> int:
    """Bytes of the results of the collective that an instruction is, or starts; 0 if it is none."""
    found = _COLLECTIVE.search(line)
    return _result_bytes(found) if found else 0


def array_bytes(shape: str, *, scalars: bool = True) -> list[int]:
    """Sizes of the arrays in the text of a shape, in their order, but for those of no known type."""
    found = [(kind, dims) for kind, dims in _ARRAY.findall(shape) if kind in _ITEM_BITS and (dims or scalars)]
    return [math.prod(int(n) for n in dims.split(",") if n) * _ITEM_BITS[kind] // 8 for kind, dims in found]


def _trips(condition, lines, operand):
    """How often a loop goes round, that counts up by one: from what its operand, defined among `lines`, begins with."""
    if any("ROOT" in line and " and(" in line for line in condition):
        return 1  # it ends by more than a count, as decoding does, of which one step is told
    end = max((int(n) for line in condition for n in _CONSTANT.findall(line)), default=1)
    counter = next((int(found[1]) for line in condition if (found := _COUNTER.search(line))), 0)
    return end - _begin(_definition(operand, lines), counter, lines)


def _begin(definition, counter, lines):
    """What a loop counts from: the compiler may have taken its first rounds out. 0 where that is not seen."""
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
    """The instruction of that name; "" if it is not among `lines`."""
    return next((line for line in lines if line.lstrip().removeprefix("ROOT ").startswith(f"{name} = ")), "")


def _result_bytes(found):
    if not found["start"] or found["kind"] == "all-reduce":
        return sum(array_bytes(found["shape"]))
    # Operands, then results; the numbers behind them are the compiler's own.
    sizes = array_bytes(found["shape"], scalars=False)
    return sum(sizes[len(sizes) // 2 :])
