"""Programs compiled for devices that are not there: by which devices, what they hold, and what they send."""

import contextlib
import math
import os
import re
import time
from typing import NamedTuple

import jax

from mmx_jax.config import ConfigError
from pallas_kernels import platform

# What a program may use of the memory of one device as jax counts them, GiB, by the device kinds of libtpu: what libtpu
# 0.0.52 says when a program needs more. The data sheets have 16, 95, 32 and 96.
_DEVICE_GIB = {"TPU v5 lite": 15.75, "TPU v5": 95.73, "TPU v6 lite": 31.24, "TPU7x": 94.74}
NAMES = "v5e:4x4, v5p:8x8x16, v6e:16x16, tpu7x:4x4x8"
_ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (8, 16, 32, 64)
}


class Collective(NamedTuple):
    """What one device does of a kind of collective in one run of a program."""

    count: int
    bytes: int  # of the results


def topology_devices(name: str):
    """The devices of a TPU topology, of which libtpu compiles programs but runs none.

    Args:
      name: such as v5p:8x8x16, or v5p:8x8x16:2 for two such slices, joined by the network of the data center.

    Raises:
      ConfigError: libtpu is not installed, or does not know the name.
    """
    # Read when libtpu is loaded: it is not on a TPU, and other processes may have it loaded too.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    one, slices = slices_of(name)
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=one, **several).devices
    except Exception as error:  # of several types, some of them jaxlib's own
        reason = (str(error).splitlines() or [""])[0][:200]
        if re.match(r"[ah]\d{3}\b|b[23]00\b", name):
            reason = "a GPU: its programs are compiled on one, without --topology, and planned with --plan"
        raise ConfigError(
            f"--topology={name} cannot be compiled for ({reason}): it needs libtpu, `pip install -e '.[tpu]'`, and a "
            f"name such as {NAMES}"
        ) from error


def slices_of(name: str) -> tuple[str, int]:
    """(name of one slice, how many there are) of a topology; v5p:8x8x16:2 is two of v5p:8x8x16."""
    match = re.fullmatch(r"(\w+:[\dx]+):(\d+)", name)
    return (match[1], int(match[2])) if match else (name, 1)


def kind_bytes(device_kind: str) -> int | None:
    """Memory of a device; None for a kind that is not in the table."""
    size = _DEVICE_GIB.get(device_kind)
    return None if size is None else int(size * 2**30)


def bytes_per_device(tree) -> int:
    """What one device holds of a tree of `jax.ShapeDtypeStruct` with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def gib(size) -> str:
    return f"{size / 2**30:.3f} GiB"


@contextlib.contextmanager
def compiling_for(mesh, topology: str):
    """Inside, programs are traced and compiled for `mesh`: of a TPU topology, or, where that is "", of the devices at
    hand."""
    if not topology:
        with jax.set_mesh(mesh):
            yield
    else:
        # The devices are not there to be set: their mesh is known by its shape.
        with platform.target("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield


def report(lower, mesh, topology: str, *, of: str, beside: int = 0) -> list[str]:
    """Compiles a program and tells of it, in lines to print: time, memory of one device, whether it fits, collectives.

    Args:
      lower: () -> `jax.stages.Lowered`; it is called inside `compiling_for(mesh, topology)`.
      of: what the program does once, such as "step".
      beside: bytes of one device that the program has no use for, and others do.
    """
    began = time.monotonic()
    with compiling_for(mesh, topology):
        lowered = lower()
        lowered_at = time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not topology or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return [f"does not fit: {_out_of_memory(str(error))}"]
    compiled_at = time.monotonic()
    operations = sum(" = " in line for line in lowered.as_text().splitlines())
    memory = compiled.memory_analysis()
    lines = [
        f"lowered in {lowered_at - began:.0f} s to {operations:,} HLO operations, "
        f"compiled in {compiled_at - lowered_at:.0f} s",
        f"memory of one device: arguments {gib(memory.argument_size_in_bytes)}, of which "
        f"{gib(memory.alias_size_in_bytes)} are updated in place; temporaries {gib(memory.temp_size_in_bytes)}; "
        f"outputs {gib(memory.output_size_in_bytes)}; code {gib(memory.generated_code_size_in_bytes)}",
    ]
    if topology:
        room = kind_bytes(mesh.devices.flat[0].device_kind)
        if room is not None:
            lines.append(fits(peak_bytes(memory) + beside, room))
        lines += _collective_lines(compiled, of)
    return lines


_OUT_OF_MEMORY = (
    re.compile(r"Used [^.]*\..*? hbm\. Exceeded hbm capacity by [\d.]+\w"),
    re.compile(r"the total memory required for .*? exceeds available HBM \([\d.]+\w\)"),
)


def _out_of_memory(message):
    """What libtpu says of the memory that a program needs and a device has."""
    found = [match[0] for pattern in _OUT_OF_MEMORY if (match := pattern.search(message))]
    return found[0] if found else message.splitlines()[0]


def peak_bytes(memory) -> int:
    """The most that one device holds, of what `memory_analysis()` returns."""
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return peak + memory.output_size_in_bytes - memory.alias_size_in_bytes


def fits(peak: int, room: int) -> str:
    if peak > room:
        return f"peak {gib(peak)} of {gib(room)}: does not fit, {gib(peak - room)} too much"
    return f"peak {gib(peak)} of {gib(room)}: fits, {gib(room - peak)} to spare"


def _collective_lines(compiled, of):
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:  # an instruction of libtpu's that this jaxlib does not know
        return [f"collectives unknown, this jaxlib cannot read the program: {str(error).splitlines()[0][:160]}"]
    return [
        f"{kind}: {found.count:,} a {of} and device, {gib(found.bytes)}" for kind, found in collectives(text).items()
    ]


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
