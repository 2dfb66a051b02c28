"""Several mesh axes as one group of devices, and the collectives over it, inside `jax.shard_map`."""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax

from mmx_jax.sharding import axes_size


@dataclasses.dataclass(frozen=True)
class MeshGroup:
    """The devices along mesh axes, the first axis the slowest. Collectives over one device do nothing."""

    names: tuple[str, ...]
    size: int
    mesh_size: int  # devices of the whole mesh

    @classmethod
    def of(cls, mesh: jax.sharding.Mesh, names: tuple[str, ...]) -> "MeshGroup":
        return cls(names, axes_size(mesh, names), mesh.size)

    def __add__(self, other: "MeshGroup") -> "MeshGroup":
        return MeshGroup(self.names + other.names, self.size * other.size, self.mesh_size)

    def index(self) -> jax.Array | int:
        """Index of this device in the group, int32 ()."""
        return lax.axis_index(self.names) if self.size > 1 else 0

    def stack(self, x: jax.Array) -> jax.Array:
        """[n, ...]: the arrays of all devices."""
        return lax.all_gather(x, self.names) if self.size > 1 else x[None]

    def gather(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """The arrays of all devices, one after the other along `axis`."""
        return lax.all_gather(x, self.names, axis=axis, tiled=True) if self.size > 1 else x

    def reduce_scatter(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """This device's slice along `axis` of the sum over all devices."""
        if self.size == 1:
            return x
        for groups in self._reduce_scatter_steps():
            x = lax.psum_scatter(x, self.names, scatter_dimension=axis, tiled=True, axis_index_groups=groups)
        return x

    def psum(self, tree: Any) -> Any:
        return lax.psum(tree, self.names) if self.size > 1 else tree

    def _reduce_scatter_steps(self):
        """Groups of devices for each step of a reduce-scatter; None is all of them."""
        factors = reduce_scatter_factors(self.size, self.mesh_size)
        if len(factors) == 1:
            return [None]
        rows, columns = factors
        grid = [list(range(i * columns, (i + 1) * columns)) for i in range(rows)]
        return [list(map(list, zip(*grid, strict=True))), grid]


def reduce_scatter_factors(size: int, mesh_size: int) -> list[int]:
    """Number of devices in each step of a reduce-scatter over `size` of `mesh_size` devices.

    XLA:TPU turns one step over all devices of a mesh of 8 or more into an all-reduce, whose whole result lies on every
    device until it is sliced. Two steps, over the columns and the rows of a grid of devices, send as many bytes and
    stay reduce-scatters.
    """
    columns = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    if size < mesh_size or size < 8 or columns == 1:
        return [size]
    return [size // columns, columns]


def gather_weight(group: MeshGroup, axis: int, dtype: jax.typing.DTypeLike, w: jax.Array) -> jax.Array:
    """The whole of a weight that `group` divides along `axis`, in `dtype`.

    It travels in `dtype`; its gradient is summed over the devices in the dtype of `w`.
    """
    return _gather_cast(group, axis, dtype, w.dtype, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _gather_cast(group, axis, dtype, own_dtype, w):
    del own_dtype  # of the gradient
    return group.gather(w.astype(dtype), axis)


_gather_cast.defvjp(
    lambda group, axis, dtype, own_dtype, w: (_gather_cast(group, axis, dtype, own_dtype, w), None),
    lambda group, axis, dtype, own_dtype, _, g: (group.reduce_scatter(g.astype(own_dtype), axis),),
)
