"""The mesh, the table of logical axes, and the shardings that follow from them."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmx_jax.config import ConfigError, MeshConfig

MESH_AXES = ("data", "fsdp", "expert", "expert_tensor", "tensor", "seq")

# Logical axis -> mesh axes. Activations name batch, length and *_act axes; parameters the others.
RULES = {
    "batch": ("data", "fsdp", "expert", "expert_tensor"),
    "length": "seq",
    "tokens": ("data", "fsdp", "expert", "expert_tensor", "seq"),  # rows and their parts in one dimension
    "embed_act": None,
    "heads_act": "tensor",
    "block": None,  # the scanned axis
    "vocab": "tensor",
    "embed": ("fsdp", "seq"),  # devices that share rows divide their parameters, too
    "qkv": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "experts": ("expert", "tensor"),
    "router_experts": None,
    "mlp": "expert_tensor",
    "dense_mlp": "tensor",  # where there is but one expert
    "norm": None,
}


# A parameter of more bytes than this, all of it, is not to lie whole on each of several devices.
LARGEST_COPY = 64 * 10**6


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """The size of each of `MESH_AXES`; raises ConfigError if they do not make `num_devices`."""
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: max(num_devices // known, 1) if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        raise ConfigError(
            f"mesh {_shape(sizes)} does not make {num_devices} devices; set mesh.* so that the product does"
        )
    return sizes


def _shape(sizes):
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes `MESH_AXES` over `devices` (default: all).

    Of several slices of a TPU, which the network of the data center joins, each has an equal part of the axis "data":
    over that network go but the sums of gradients.

    Raises:
      ConfigError: the sizes do not make the number of devices, or cannot be laid over the torus that they are in, or
        the slices do not divide mesh.data.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    slices = _slices(devices)
    if sizes["data"] % slices:
        raise ConfigError(f"mesh.data={sizes['data']} does not divide over {slices} slices; make it a multiple of that")
    shape = tuple(sizes.values())
    auto = (AxisType.Auto,) * len(MESH_AXES)  # make_mesh defaults to Explicit: a constraint is an assertion there
    try:
        if slices == 1:
            return jax.make_mesh(shape, MESH_AXES, devices=devices, axis_types=auto)
        across = tuple(slices if axis == "data" else 1 for axis in MESH_AXES)
        inside = tuple(size // count for size, count in zip(shape, across, strict=True))
        return Mesh(mesh_utils.create_hybrid_device_mesh(inside, across, devices), MESH_AXES, axis_types=auto)
    except NotImplementedError:
        places = [(*device.coords, device.core_on_chip) for device in devices]
        torus = [size for size in np.max(places, axis=0) + 1 if size > 1]
        possible = {math.prod(some) for n in range(len(torus) + 1) for some in itertools.combinations(torus, n)}
        raise ConfigError(
            f"mesh {_shape(sizes)} cannot be laid over the torus of {' x '.join(map(str, torus))} devices: the size of "
            "an axis is a product of sizes of the torus, and each of these serves one axis; set mesh.* to sizes of "
            f"{', '.join(map(str, sorted(possible)))}"
        ) from None


def _slices(devices) -> int:
    """Slices of a TPU; elsewhere the number means something else."""
    return len({getattr(x, "slice_index", None) or 0 for x in devices}) if devices[0].platform == "tpu" else 1


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """The mesh of `make_mesh` without devices: it says what divides what."""
    return AbstractMesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_axes(axis: str | None) -> tuple[str, ...]:
    """The mesh axes that divide a logical axis."""
    return tuple(jax.tree.leaves(None if axis is None else RULES[axis]))


def axes_size(
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, names: Any, *, dividing: int | None = None, of: str = ""
) -> int:
    """Devices along mesh axes; raises ConfigError where they do not divide the size `dividing` of what `of` names."""
    count = math.prod(mesh.shape[name] for name in names)
    if dividing is not None and dividing % count:
        sizes = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in names)
        raise ConfigError(f"{of} of size {dividing} does not divide over the {count} devices of {sizes}")
    return count


def logical_to_spec(axes: Any, rules: Any = None) -> P:
    """Maps logical axis names (None: not sharded) to mesh axes; unknown names and double use of a mesh axis raise."""
    rules = RULES if rules is None else rules
    unknown = [axis for axis in axes if axis is not None and axis not in rules]
    if unknown:
        raise ValueError(f"logical axes {unknown} of {axes} have no rule; known: {', '.join(rules)}")
    spec = tuple(None if axis is None else rules[axis] for axis in axes)
    used = jax.tree.leaves(spec)
    if len(used) != len(set(used)):
        raise ValueError(f"{axes} puts one mesh axis on two dimensions: {spec}")
    return P(*spec)


def constrain(x: jax.Array, *axes) -> jax.Array:
    """Shards `x` by logical axes on the ambient mesh (`jax.set_mesh`); does nothing where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, logical_to_spec(axes))


def row_axis(length: int) -> str | None:
    """The mesh axis over whose devices rows of `length` tokens are divided; None where they are whole.

    Rows of fewer tokens than there are devices stay whole: in decoding, say. Others must divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axis = RULES["length"]
    devices = 1 if mesh.empty else mesh.shape[axis]
    if devices == 1 or length < devices:
        return None
    if length % devices:
        raise ConfigError(
            f"rows of {length} tokens do not divide over mesh.{axis}={devices}: make training.sequence_length, or the "
            "length of a prompt's pieces, a multiple of it"
        )
    return axis


def over_mesh(f: Callable, in_axes: Any, out_axes: Any) -> Callable:
    """`f` on every device of the ambient mesh with its own part of the arguments: `jax.shard_map` by logical axes.

    For what XLA cannot partition: kernels, and functions that depend on where in a row a device is. Without a mesh, or
    with one device, it is `f` itself.

    Args:
      f: of arrays, or None in place of one.
      in_axes: for each argument, the logical axes of its dimensions. A batch that the devices do not divide is divided
        over those that do, and the others repeat the work.
      out_axes: those of the result, or a list if there are several.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return f

    def call(*args):
        rules = RULES | {"batch": _batch_axes(mesh, args, in_axes)}
        in_specs = tuple(logical_to_spec(axes, rules) for axes in in_axes)
        if isinstance(out_axes, list):
            out_specs = tuple(logical_to_spec(axes, rules) for axes in out_axes)
        else:
            out_specs = logical_to_spec(out_axes, rules)
        return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)

    return call


def _batch_axes(mesh, args, in_axes):
    """The leading mesh axes of "batch" whose devices divide that dimension."""
    batch = next(x.shape[axes.index("batch")] for x, axes in zip(args, in_axes, strict=True) if "batch" in axes)
    taken, count = [], 1
    for axis in RULES["batch"]:
        count *= mesh.shape[axis]
        if batch % count:
            break
        taken.append(axis)
    return tuple(taken)


def shardings_of(logical_axes: Any, abstract: Any, mesh: Mesh | AbstractMesh) -> Any:
    """NamedShardings for a tree of logical axes; raises where a mesh axis does not divide its dimension.

    Args:
      logical_axes: tree of tuples of logical names.
      abstract: tree of arrays or `jax.ShapeDtypeStruct` of the same structure.
    """

    def sharding(path, leaf, axes):
        spec = logical_to_spec(axes)
        for size, axis, parts in zip(leaf.shape, axes, spec, strict=True):
            name = f"{jax.tree_util.keystr(path, simple=True, separator='/')} {leaf.shape}: axis {axis!r}"
            axes_size(mesh, jax.tree.leaves(parts), dividing=size, of=name)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, abstract, logical_axes)


def check_sharded(logical_axes: Any, abstract: Any, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError for a parameter above `LARGEST_COPY` that each of several devices would hold whole.

    Args:
      logical_axes, abstract: as `shardings_of` takes them.
      sizes: devices along each of `MESH_AXES`.
    """
    if math.prod(sizes.values()) == 1:
        return

    def check(path, leaf, axes):
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        dividing = [name for name in MESH_AXES if any(name in mesh_axes(axis) for axis in axes)]
        if size > LARGEST_COPY and all(sizes[name] == 1 for name in dividing):
            raise ConfigError(
                f"the parameter {jax.tree_util.keystr(path, simple=True, separator='/')} of {size / 1e6:,.0f} MB would "
                f"lie whole on each of the {math.prod(sizes.values())} devices of mesh {_shape(sizes)}; above "
                f"{LARGEST_COPY / 1e6:.0f} MB it must be divided: make "
                f"{' or '.join(f'mesh.{name}' for name in dividing)} larger than 1"
            )

    jax.tree_util.tree_map_with_path(check, abstract, logical_axes)
