"""Parameters in memory, from any checkpoint and to safetensors; what training and inference load through."""

import dataclasses
import gc
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mmx_jax.checkpoints import checksums, hf_mapping, manager
from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.export_hf import ExportOptions, ExportSource, conversion_destination, export_tensors
from mmx_jax.checkpoints.open import HuggingFaceTensors, WeightsSource, resolve
from mmx_jax.checkpoints.orbax_slices import ParamsReader, flatten, unflatten
from mmx_jax.checkpoints.safetensors import TensorSpec
from mmx_jax.config import ModelConfig
from mmx_jax.models.params import param_shardings

__all__ = ["WeightsSource", "load_params", "resolve", "save_huggingface"]

FLOAT32 = np.dtype(np.float32)


def load_params(
    path: str | os.PathLike,
    *,
    param_dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Any = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads the parameters of any checkpoint that `resolve` knows.

    Args:
      path: a Hugging Face folder, a weights folder, a training run or one of its steps.
      param_dtype: "float32" or "bfloat16" for all but the routers, which are float32. None: as on disk.
      mesh: where to; `mmx_jax.models.decoder.param_shardings` places it. Each process reads what its shards need.
      shardings: instead of a mesh, one sharding, or a tree like the parameters.

    Returns:
      The model's config, with `param_dtype` as loaded, and the parameter tree of jax.Arrays.

    Raises:
      ConversionError: the checkpoint does not match its config, or is damaged.
    """
    source = resolve(path)
    if param_dtype not in (None, *hf_mapping.WEIGHT_DTYPES):
        raise ConversionError(f"param_dtype={param_dtype!r} is not one of {', '.join(hf_mapping.WEIGHT_DTYPES)}")
    huggingface = source.kind == "huggingface"
    tensors = None
    if huggingface:
        tensors = HuggingFaceTensors(source)
        mappings = tensors.mappings
        stored = {mapping.leaf: tensors.specs[mapping.hf].dtype for mapping in mappings}
    else:
        reader = ParamsReader(source.params_dir)
        mappings = hf_mapping.match_parameters(source.config, reader.shapes)
        stored = reader.dtypes
    shapes = hf_mapping.leaf_shapes(source.config, mappings)
    dtypes = {path: np.dtype(jax.numpy.dtype(param_dtype)) if param_dtype else dtype for path, dtype in stored.items()}
    dtypes |= {mapping.leaf: FLOAT32 for mapping in mappings if mapping.float32}
    config = dataclasses.replace(source.config, param_dtype=dtypes[("embed", "embedding")].name)
    places = _placement(config, shapes, mesh, shardings)
    if not huggingface:
        abstract = {path: jax.ShapeDtypeStruct(shapes[path], stored[path], sharding=places[path]) for path in shapes}
        return config, unflatten(_restore_checked(source.params_dir, abstract, dtypes))
    slices: dict[tuple[str, ...], dict] = {}
    for mapping in mappings:
        slices.setdefault(mapping.leaf, {})[mapping.index] = mapping
    leaves = {}
    for leaf, shape in shapes.items():
        read: Any = _ShardReader(tensors, slices[leaf], shape, dtypes[leaf])
        leaves[leaf] = jax.make_array_from_callback(shape, places[leaf], read)
    return config, unflatten(leaves)


def _restore_checked(params_dir, abstract, dtypes):
    """Restores leaves (path -> leaf) in `dtypes`; those of a training step have the checksums that it holds.

    The sums are those of the values on disk. So a leaf that is to be cast is read by itself, and cast, before the next.
    """
    expected = checksums.stored_checksums(params_dir)
    if not expected:
        cast = {path: jax.ShapeDtypeStruct(x.shape, dtypes[path], sharding=x.sharding) for path, x in abstract.items()}
        return flatten(_restore(params_dir, unflatten(cast)))
    kept = [path for path, leaf in abstract.items() if leaf.dtype == dtypes[path]]
    leaves, sums = {}, {}
    for group in [kept, *([path] for path in abstract if path not in kept)]:
        if not group:
            continue
        read = flatten(_restore(params_dir, unflatten({path: abstract[path] for path in group})))
        sums |= flatten(jax.device_get(manager.array_checksums(unflatten(read))))
        leaves |= {path: _cast(leaf, dtypes[path]) for path, leaf in read.items()}
    checksums.check(params_dir, {path: int(value) for path, value in sums.items()}, expected)
    return leaves


def _cast(leaf, dtype):
    return leaf if leaf.dtype == dtype else jax.jit(lambda x: x.astype(dtype), out_shardings=leaf.sharding)(leaf)


def _restore(params_dir, abstract):
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
            return checkpointer.restore(
                params_dir.absolute(),
                ocp.args.PyTreeRestore(abstract, restore_args=arguments, partial_restore=True),
            )
    except Exception as error:  # orbax raises bare Exceptions
        # Its unfinished reads go down with the traceback, each with pages of complaint that nobody can act on.
        hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
        while error.__cause__ is not None:  # tensorstore's own message is at the root
            error = error.__cause__
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    gc.collect()
    sys.unraisablehook = hook
    raise ConversionError(f"{params_dir}: the parameters cannot be read: {reason}")


def _placement(config, shapes, mesh, shardings):
    if mesh is not None and shardings is not None:
        raise ConversionError("load_params takes a mesh or shardings, not both")
    if mesh is not None:
        shardings = param_shardings(config, mesh)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(shapes, shardings)
    places = flatten(shardings)
    if set(places) != set(shapes):
        differing = sorted("/".join(path) for path in set(places) ^ set(shapes))
        raise ConversionError(f"shardings and parameters differ in {hf_mapping.summarize(differing)}")
    return places


class _ShardReader:
    """Builds shards of one parameter from slices of memory maps; a shard that several devices hold is read once."""

    def __init__(self, tensors, mappings, shape, dtype):
        self._entries = tensors.folder.entries
        self._mappings, self._shape, self._dtype = mappings, shape, dtype
        self._cached: tuple[Any, Any] = None, None

    def __call__(self, region: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(size)[part] for part, size in zip(region, self._shape, strict=True)]
        if self._cached[0] == ranges:
            return self._cached[1]
        out = np.empty([len(part) for part in ranges], self._dtype)
        leading = len(next(iter(self._mappings)))
        for local in np.ndindex(*out.shape[:leading]):
            mapping = self._mappings[tuple(part[i] for part, i in zip(ranges[:leading], local, strict=True))]
            piece = mapping.to_mmx(self._entries[mapping.hf].map())[tuple(region[leading:])]
            if piece.dtype == self._dtype:
                hf_mapping.copy_strips(out[local], piece)
            else:
                out[local] = piece.astype(self._dtype)
        self._cached = ranges, out
        return out


class _ArrayTensors:
    """Parameters in memory as Hugging Face tensors."""

    checksums = None

    def __init__(self, params, config: ModelConfig):
        self.config = config
        self.mappings = hf_mapping.expand(config)
        self._leaves = flatten(params)
        hf_mapping.check_parameters(config, self.mappings, {path: leaf.shape for path, leaf in self._leaves.items()})
        for path, leaf in self._leaves.items():
            name = "/".join(path)
            if np.dtype(leaf.dtype).name not in hf_mapping.WEIGHT_DTYPES:
                raise ConversionError(
                    f"{name} has dtype {leaf.dtype}, expected {' or '.join(hf_mapping.WEIGHT_DTYPES)}"
                )
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                raise ConversionError(
                    f"{name} lies on several processes; save a checkpoint and export that (python -m mmx_jax.convert)"
                )
        self.specs = {m.hf: TensorSpec(m.hf, np.dtype(self._leaves[m.leaf].dtype), m.hf_shape) for m in self.mappings}

    def read(self, mapping: hf_mapping.Mapping) -> np.ndarray:
        return mapping.to_hf(np.asarray(self._leaves[mapping.leaf][mapping.index]))


def save_huggingface(
    params: dict[str, Any],
    config: ModelConfig,
    path: str | os.PathLike,
    naming: str = "original",
    *,
    tokenizer_dir: str | os.PathLike | None = None,
    **options,
) -> str:
    """Writes parameters in memory as a Hugging Face folder.

    Args:
      params: the parameter tree, float32 or bfloat16, all of it addressable by this process.
      naming: of config.json.
      tokenizer_dir: folder of the tokenizer files that go along.
      options: other fields of `export_hf.ExportOptions`.

    Returns:
      A report of a few lines.

    Raises:
      ConversionError: the tree does not fit `config`, `path` exists, or the disk is full.
    """
    source = ExportSource(
        tensors=_ArrayTensors(params, config),
        identity={"source": uuid.uuid4().hex},
        manifest={},
        carry_from=None if tokenizer_dir is None else Path(tokenizer_dir),
    )
    options = ExportOptions(naming=naming, resumable=False, **options)
    return export_tensors(source, conversion_destination(path), options)
