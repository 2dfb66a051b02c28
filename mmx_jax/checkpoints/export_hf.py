"""Any checkpoint to a Hugging Face folder of safetensors."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import logging

from mmx_jax.checkpoints import generation_config, hf_mapping, model_code
from mmx_jax.checkpoints.bounded_map import bounded_map
from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.hf_config import TOKEN_IDS, describe, model_config_to_hf
from mmx_jax.checkpoints.journal import Job, check_free_space, disk_errors
from mmx_jax.checkpoints.manifest import FORMAT, MANIFEST, read_manifest, sha256, sha256_file
from mmx_jax.checkpoints.open import HuggingFaceTensors, carried_files, open_tensors, resolve
from mmx_jax.checkpoints.progress import Progress
from mmx_jax.checkpoints.safetensors import (
    INDEX_NAME,
    SINGLE_NAME,
    TensorSpec,
    atomic_file,
    file_order,
    plan_shards,
    write_atomically,
    write_index,
    write_shard,
)
from mmx_jax.storage import filesystem

DEFAULT_SHARD_SIZE = 5 * 10**9
WEIGHT_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
DTYPE_CHOICES = ("keep", *WEIGHT_DTYPES)


def conversion_destination(path, *, arrays=False) -> Path:
    try:
        return filesystem.destination(path, arrays=arrays)
    except filesystem.PathError as error:
        raise ConversionError(str(error)) from None


def largest_tensor(specs):
    return max(spec.nbytes for spec in specs)


def carry_files(folder: Path | None, destination: Path) -> list[str]:
    carried = carried_files(folder) if folder else []
    for file in carried:
        with atomic_file(destination / file.name) as out:
            out.write(file.read_bytes())
    return [file.name for file in carried]


def export_checkpoint(
    source_path, destination, *, naming: str = "original", shard_size: int | None = None, dtype: str = "keep",
    overwrite: bool = False,
) -> str:  # fmt: skip
    """Any checkpoint -> Hugging Face folder with the released tensor names.

    Args:
      naming: of config.json, and the base of shard names ("original" counts from 0, "transformers" from 1).
      shard_size: bytes of a shard at most. None: the shards that the checkpoint was imported from, where it was, so
        that the files come out byte-identical; else DEFAULT_SHARD_SIZE.
      dtype: "keep", or the dtype of all weights but the routers, which stay float32.

    Returns:
      A report of a few lines.

    Raises:
      ConversionError: the checkpoint and its config do not match, the disk is full, or `destination` exists.
    """
    source = resolve(source_path)
    tensors = open_tensors(source)
    return export_tensors(
        tensors, conversion_destination(destination), naming=naming, shard_size=shard_size, dtype=dtype,
        overwrite=overwrite,
        identity={"source": str(source.params_dir.absolute()), **_identity(source, tensors)},
        manifest=read_manifest(source), carry_from=source.folder,
    )  # fmt: skip


def export_tensors(
    tensors, destination: Path, *, naming, shard_size, dtype, overwrite, identity, manifest, carry_from,
    resumable: bool = True,
) -> str:  # fmt: skip
    """`export_checkpoint` of anything with `config`, `mappings`, `specs` and `read(mapping)`.

    Args:
      identity: JSON-able; an unfinished export is continued only if it was begun with the same.
      manifest: name -> {file, dtype, sha256} of the tensors at their import; empty where there is none.
      carry_from: folder of the tokenizer files, or None.
      resumable: False discards what an unfinished export left.
    """
    with disk_errors(destination):
        return _export(
            tensors, destination, naming, shard_size, dtype, overwrite, identity, manifest, carry_from, resumable
        )


def _export(tensors, destination, naming, shard_size, dtype, overwrite, identity, manifest, carry_from, resumable):
    hf_config = model_config_to_hf(tensors.config, naming)
    ids = generation_config.token_ids(tensors.config, carry_from)
    for key, value in zip(TOKEN_IDS, (ids.bos, next(iter(ids.eos), None), ids.pad), strict=True):
        hf_config[key] = value if hf_config[key] is None else hf_config[key]
    by_name = {mapping.hf: mapping for mapping in tensors.mappings}
    specs = [export_spec(mapping, tensors.specs[mapping.hf].dtype, dtype) for mapping in tensors.mappings]
    shards = _shards(specs, shard_size, naming, manifest)
    carried_names = {file.name for file in carried_files(carry_from)} if carry_from else set()
    code = model_code.choose(tensors.config, naming, specs[0].dtype.name, carried_names)
    total = sum(spec.nbytes for spec in specs)
    plan = {
        "format": FORMAT, "command": "export", "naming": naming, "dtype": dtype, **identity,
        "shards": {file: [spec.name for spec in names] for file, names in shards.items()},
    }  # fmt: skip
    job = Job(destination, plan, overwrite=overwrite, resumable=resumable)
    try:
        job.begin()
        finished = {file for file in shards if _is_finished(job, file, tensors.checksums)}
        missing = [spec.nbytes for file in shards if file not in finished for spec in shards[file]]
        check_free_space(job.folder, sum(missing))

        def read(spec):
            tensor = tensors.read(by_name[spec.name])
            digest = sha256(tensor)
            expected = manifest.get(spec.name, {}).get("sha256")
            unchanged = manifest.get(spec.name, {}).get("dtype") == tensor.dtype.name
            if expected and unchanged and digest != expected:
                raise ConversionError(
                    f"{identity['source']}: {spec.name!r} is damaged, its sha256 differs from {MANIFEST}; import again"
                )
            if tensor.dtype == spec.dtype:
                return tensor, digest
            tensor = tensor.astype(spec.dtype)
            return tensor, sha256(tensor)

        with Progress("export", total) as progress:
            for file, names in shards.items():
                size = sum(spec.nbytes for spec in names)
                if file in finished:
                    progress.advance(size, skipped=True)
                    continue
                digests = {}

                def stream(results, digests=digests):
                    for spec, (tensor, digest) in results:
                        digests[spec.name] = digest
                        yield tensor
                        del tensor  # before the next one is asked for

                with bounded_map(read, file_order(names), lambda spec: spec.nbytes, largest_tensor(specs)) as results:
                    digest = write_shard(job.folder / file, names, stream(results), progress.advance)
                sums = {} if tensors.checksums is None else tensors.checksums.parts(list(digests))
                job.record(file, sha256=digest, tensors=digests, sums=sums)
        _check_saved(tensors, job)
        if list(shards) != [SINGLE_NAME]:
            write_index(job.folder / INDEX_NAME, shards)
        hf_config = dict(sorted((hf_config | code.keys).items()))
        write_atomically(job.folder / "config.json", json.dumps(hf_config, indent=2) + "\n")
        for file in code.files:
            write_atomically(job.folder / file.name, file.read_text())
        carried = carry_files(carry_from, job.folder)
        if ids.eos and generation_config.FILE not in carried:
            text = json.dumps(ids.as_json(), indent=2) + "\n"
            write_atomically(job.folder / generation_config.FILE, text)
        out = {
            "format": FORMAT,
            "files": {file: job.finished[file]["sha256"] for file in shards},
            "tensors": {name: digest for file in shards for name, digest in job.finished[file]["tensors"].items()},
        }
        write_atomically(job.folder / MANIFEST, json.dumps(out, indent=1) + "\n")
        job.commit()
    finally:
        job.close()
    lines = [
        f"{destination}: {describe(tensors.config)}, {naming} naming",
        f"{len(specs)} tensors, {total / 1e9:.3f} GB in {len(shards)} files ({len(finished)} were finished before)",
        f"carried along: {', '.join(carried) or 'nothing'}",
        *([f"ids of special tokens are those of the config alone: {ids.problem}"] if ids.problem else []),
        *code.notes,
    ]
    if code.warning:
        logging.warning("%s", code.warning)
        lines.insert(0, f"WARNING: {code.warning}")
    return "\n".join(lines)


def export_spec(mapping: hf_mapping.Mapping, stored: np.dtype, dtype: str) -> TensorSpec:
    """What a parameter slice becomes on disk."""
    if dtype not in DTYPE_CHOICES:
        raise ConversionError(f"dtype {dtype!r} is not one of {', '.join(DTYPE_CHOICES)}")
    name = "float32" if mapping.float32 else stored.name if dtype == "keep" else dtype
    return TensorSpec(mapping.hf, WEIGHT_DTYPES[name], mapping.hf_shape)


def _shards(specs, shard_size, naming, manifest):
    if shard_size is None and manifest:
        if set(manifest) != {spec.name for spec in specs}:
            raise ConversionError(f"{MANIFEST} lists other tensors than config.json; give --shard_size to ignore it")
        shards = {}
        for spec in specs:
            shards.setdefault(manifest[spec.name]["file"], []).append(spec)
        return dict(sorted(shards.items()))
    return plan_shards(specs, shard_size or DEFAULT_SHARD_SIZE, naming)


def _identity(source, tensors):
    """What tells that a checkpoint is not the one that an interrupted export began with."""
    if isinstance(tensors, HuggingFaceTensors):
        return tensors.folder.fingerprint
    marks = [source.params_dir / name for name in ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")]
    return {mark.name: [mark.stat().st_size, mark.stat().st_mtime_ns] for mark in marks if mark.exists()}


def _is_finished(job, file, checksums):
    path, known = job.folder / file, job.finished.get(file)
    if known is None or not path.is_file() or sha256_file(path) != known["sha256"]:
        return False
    if checksums is not None:
        if "sums" not in known:
            return False
        checksums.restore(known["sums"])
    return True


def _check_saved(tensors, job):
    """Raises ConversionError where the parameters of a training step are not those that were saved."""
    try:
        if tensors.checksums is not None:
            tensors.checksums.check(tensors.mappings)
    except ConversionError:
        job.discard()
        raise
