"""Programs compiled for devices that are not there: by which devices, what they hold, and what they send."""

import contextlib
import math
import os
import re
import time

import jax

from mmx_jax.analysis import hlo_collectives
from mmx_jax.config import ConfigError
from pallas_kernels import platform

# What a program may use of the memory of one device as jax counts them, GiB, by the device kinds of libtpu: what libtpu
# 0.0.52 says when a program needs more. The data sheets have 16, 95, 32 and 96.
_DEVICE_GIB = {"TPU v5 lite": 15.75, "TPU v5": 95.73, "TPU v6 lite": 31.24, "TPU7x": 94.74}
NAMES = "v5e:4x4, v5p:8x8x16, v6e:16x16, tpu7x:4x4x8"


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
        f"{kind}: {found.count:,} a {of} and device, {gib(found.bytes)}"
        for kind, found in hlo_collectives.collectives(text).items()
    ]
