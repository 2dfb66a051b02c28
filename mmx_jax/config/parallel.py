"""The mesh of devices."""

import dataclasses

from mmx_jax.config.base import (
    MAX_SIZE,
    Section,
    require,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left.

    The dense part and the experts lay themselves out apart over the same devices: what `expert` and `expert_tensor`
    divide for experts is more data parallelism for the dense part, and what `tensor` divides for the dense part holds
    different experts.
    """

    data: int = -1  # copies
    fsdp: int = 1  # parameters and optimizer state in slices, gathered where they are used
    expert: int = 1  # different experts
    expert_tensor: int = 1  # slices of the width of each expert
    tensor: int = 1  # heads and vocabulary; different experts
    seq: int = 1  # tokens of a row

    def check(self) -> None:
        sizes = dataclasses.astuple(self)
        require(
            all(size == -1 or 0 < size <= MAX_SIZE for size in sizes) and sizes.count(-1) <= 1,
            f"mesh sizes {dataclasses.asdict(self)} must be positive, at most one of them -1",
        )
