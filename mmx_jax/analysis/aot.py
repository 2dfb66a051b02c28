"""Compiles programs ahead of time, for devices that this host may lack, and reports their memory and collectives."""

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mmx_jax.analysis import hlo_collectives
from mmx_jax.config import ConfigError
from pallas_kernels import platform

EXAMPLE_TOPOLOGIES = "v5e:4x4, v5p:8x8x16, v6e:16x16, tpu7x:4x4x8"

# Memory of a device, as jax counts devices, that a program may use, in GiB by device kind: the limit that libtpu 0.0.52
# reports for a program that needs more. The data sheets have 16, 95, 32 and 96.
_DEVICE_GIB = {"TPU v5 lite": 15.75, "TPU v5": 95.73, "TPU v6 lite": 31.24, "TPU7x": 94.74}


def topology_devices(name: str) -> list[Any]:
    """The `jax.Device`s of a TPU topology; libtpu compiles programs for them but runs none.

    Args:
      name: such as v5p:8x8x16, or v5p:8x8x16:2 for two such slices, joined by the data center network.

    Raises:
      ConfigError: libtpu is not installed, or does not know the name.
    """
    # libtpu reads these when it is loaded: this host has no TPU, and other processes may have loaded libtpu too.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    one, slices = split_slices(name)
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=one, **options).devices
    except Exception as error:  # of several types, some of them jaxlib's own
        reason = (str(error).splitlines() or [""])[0][:200]
        if re.match(r"[ah]\d{3}\b|b[23]00\b", name):
            reason = "a GPU: compile for it on such a GPU without --topology, or estimate with --plan"
        raise ConfigError(
            f"--topology={name} cannot be compiled for ({reason}): it needs libtpu, `pip install -e '.[tpu]'`, and a "
            f"name such as {EXAMPLE_TOPOLOGIES}"
        ) from error


def split_slices(name: str) -> tuple[str, int]:
    """(name of one slice, number of slices) of a topology; v5p:8x8x16:2 is two of v5p:8x8x16."""
    match = re.fullmatch(r"(\w+:[\dx]+):(\d+)", name)
    return (match[1], int(match[2])) if match else (name, 1)


def device_kind_bytes(device_kind: str) -> int | None:
    """Memory of a device that a program may use, in bytes; None for an unknown kind."""
    size = _DEVICE_GIB.get(device_kind)
    return None if size is None else int(size * 2**30)


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of `jax.ShapeDtypeStruct` with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def gib(size: float) -> str:
    """A number of bytes, to print."""
    return f"{size / 2**30:.3f} GiB"


def fit_line(peak: int, bytes_limit: int) -> str:
    """One line to print: whether a program of `peak` bytes fits a device."""
    if peak > bytes_limit:
        return f"peak {gib(peak)} of {gib(bytes_limit)}: does not fit, {gib(peak - bytes_limit)} too much"
    return f"peak {gib(peak)} of {gib(bytes_limit)}: fits, {gib(bytes_limit - peak)} to spare"


def peak_bytes(memory: Any) -> int:
    """Peak memory of one device in bytes, from what `memory_analysis()` returns."""
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return peak + memory.output_size_in_bytes - memory.alias_size_in_bytes


@contextlib.contextmanager
def compiling_for(mesh: jax.sharding.Mesh, topology: str) -> Iterator[None]:
    """Traces and compiles programs inside for `mesh`: of a TPU topology, or of the devices at hand if that is ""."""
    if not topology:
        with jax.set_mesh(mesh):
            yield
    else:
        # The devices do not exist and cannot be set: the abstract mesh carries their shape.
        with platform.target("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield


def report(
    lower: Callable[[], jax.stages.Lowered],
    mesh: jax.sharding.Mesh,
    topology: str,
    *,
    unit: str,
    other_bytes: int = 0,
) -> list[str]:
    """Compiles a program and returns lines to print: time, memory of one device, whether it fits, collectives.

    Args:
      lower: called inside `compiling_for(mesh, topology)`.
      unit: what the program does once, such as "step".
      other_bytes: bytes of one device that other programs need while this one runs.
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
            return [f"does not fit: {_out_of_memory_reason(str(error))}"]
    compiled_at = time.monotonic()
    operations = sum(" = " in line for line in lowered.as_text().splitlines())
    memory: Any = compiled.memory_analysis()
    lines = [
        f"lowered in {lowered_at - began:.0f} s to {operations:,} HLO operations, "
        f"compiled in {compiled_at - lowered_at:.0f} s",
        f"memory of one device: arguments {gib(memory.argument_size_in_bytes)}, of which "
        f"{gib(memory.alias_size_in_bytes)} are updated in place; temporaries {gib(memory.temp_size_in_bytes)}; "
        f"outputs {gib(memory.output_size_in_bytes)}; code {gib(memory.generated_code_size_in_bytes)}",
    ]
    if topology:
        bytes_limit = device_kind_bytes(mesh.devices.flat[0].device_kind)
        if bytes_limit is not None:
            lines.append(fit_line(peak_bytes(memory) + other_bytes, bytes_limit))
        lines += _collective_lines(compiled, unit)
    return lines


_OUT_OF_MEMORY = (
    re.compile(r"Used [^.]*\..*? hbm\. Exceeded hbm capacity by [\d.]+\w"),
    re.compile(r"the total memory required for .*? exceeds available HBM \([\d.]+\w\)"),
)


def _out_of_memory_reason(message):
    """The sentence of libtpu's message with the memory that a program needs and a device has."""
    found = [match[0] for pattern in _OUT_OF_MEMORY if (match := pattern.search(message))]
    return found[0] if found else message.splitlines()[0]


def _collective_lines(compiled, unit):
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:  # an instruction of a newer libtpu that this jaxlib does not know
        return [f"collectives unknown, this jaxlib cannot read the program: {str(error).splitlines()[0][:160]}"]
    return [
        f"{kind}: {found.count:,} per device and {unit}, {gib(found.bytes)}"
        for kind, found in hlo_collectives.collectives(text).items()
    ]
