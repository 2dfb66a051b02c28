"""The devices that a plan is made for: a TPU topology or GPUs by name, or the devices at hand."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence

import jax

from mmx_jax.analysis import aot
from mmx_jax.config import ConfigError

# Devices of a chip, and the device kind, by the first part of the name of a TPU topology.
_CHIPS = {"v5e": (1, "TPU v5 lite"), "v5p": (1, "TPU v5"), "v6e": (1, "TPU v6 lite"), "tpu7x": (2, "TPU7x")}

# Memory of a GPU in bytes: `bytes_limit` of `memory_stats()`, divided by the memory fraction that was set.
_GPU_BYTES = {"h100": 85_018_542_080, "h200": 150_109_880_320}

_NOT_INCLUDED = (
    "Not included: the compiler's schedule, the size of the code (a constant per layer), a collective that the "
    "compiler replaces by another kind or splits, and the buffers of ring attention"
)
_ACCURACY = {
    "tpu": "estimated from formulas, fitted to --dry_run on TPU topologies: peak memory within 15 % of the programs "
    f"tried (BUILD.md). {_NOT_INCLUDED}",
    "gpu": "estimated from formulas, fitted to 18 programs (configs/small_1b.py and variants) compiled on one H100 and "
    "one H200 (benchmarks/gpu_memory.py): peak memory within 6 % in training and 8 % in inference. Other GPUs, and "
    "several GPUs together, were not measured. Not included: what XLA recomputes on its own to stay within the memory, "
    "which is not always enough",
    "cpu": "no accelerator was found, and the formulas are not fitted to a CPU: this is the estimate for a TPU; name a "
    "target with --topology=h100, h200:2, v5p:2x2x1 or similar",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a plan is for.

    Attributes:
      platform: "tpu", "gpu" or "cpu".
      name: for messages.
      count: number of devices.
      bytes_limit: memory of one device that a program may use, in bytes; None if it is not known.
      gpu_bytes: memory of one GPU, in bytes, of which a process takes a fraction; None on other platforms.
    """

    platform: str
    name: str
    count: int
    bytes_limit: int | None
    gpu_bytes: int | None = None

    def notes(self, peaks: Sequence[int]) -> list[str]:
        """Lines to print after a plan: the memory fraction of a GPU, and the accuracy of the formulas.

        Args:
          peaks: peak memory of each program, in bytes.
        """
        lines = []
        if self.gpu_bytes is not None and self.bytes_limit is not None:
            fraction, percent_needed = self.bytes_limit / self.gpu_bytes, math.ceil(100 * max(peaks) / self.gpu_bytes)
            line = (
                f"a process takes {fraction:.0%} of the {aot.gib(self.gpu_bytes)} of {self.name}, see "
                "XLA_PYTHON_CLIENT_MEM_FRACTION"
            )
            if percent_needed > 95:
                line += "; no fraction of one GPU is enough: see runtime.remat, training.microbatch_rows and mesh"
            elif max(peaks) > self.bytes_limit:
                line += f"; a fraction of {percent_needed / 100:.2f} is enough"
            lines.append(line)
        return [*lines, _ACCURACY[self.platform]]


def gpu_memory_fraction() -> float:
    """Fraction of a GPU's memory that jax allocates for itself."""
    names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    return float(next((os.environ[name] for name in names if name in os.environ), 0.75))


def find(topology: str) -> Target:
    """The devices of a TPU topology or a number of GPUs, by name; the devices at hand for "".

    Args:
      topology: such as v5p:8x8x16, h100, or h200:2 for two of them in one host.

    Raises:
      ConfigError: the name is not known.
    """
    if match := re.fullmatch(rf"({'|'.join(_GPU_BYTES)})(?::([1-9]\d*))?", topology):
        gpu_bytes = _GPU_BYTES[match[1]]
        bytes_limit = int(gpu_bytes * gpu_memory_fraction())
        return Target("gpu", match[1].upper(), int(match[2] or 1), bytes_limit, gpu_bytes)
    if topology:
        return Target("tpu", topology, *tpu_topology(topology))
    devices = jax.devices()
    bytes_limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    gpu_bytes = None
    if devices[0].platform == "gpu" and bytes_limit:
        gpu_bytes = int(bytes_limit / gpu_memory_fraction())
    return Target(devices[0].platform, devices[0].device_kind, len(devices), bytes_limit, gpu_bytes)


def tpu_topology(name: str) -> tuple[int, int | None]:
    """(number of devices, memory of each in bytes) of a TPU topology, from its name alone.

    Raises:
      ConfigError: the name is not known.
    """
    one, slices = aot.split_slices(name)
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", one)
    if match is None or match[1] not in _CHIPS:
        raise ConfigError(
            f"--topology={name} cannot be planned for: give a name such as {aot.EXAMPLE_TOPOLOGIES}, or "
            f"{', '.join(_GPU_BYTES)}, with a number after it for several GPUs (h100:2)"
        )
    devices, kind = _CHIPS[match[1]]
    return slices * devices * math.prod(map(int, match[2].split("x"))), aot.device_kind_bytes(kind)
