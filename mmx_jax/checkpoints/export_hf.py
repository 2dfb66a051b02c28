"""Any checkpoint to a Hugging Face folder of safetensors."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

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
from mmx_jax.progress import ConversionProgress
from mmx_jax.storage import filesystem

DEFAULT_SHARD_SIZE = 5 * 10**9
WEIGHT_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
DTYPE_CHOICES = ("keep", *WEIGHT_DTYPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a Hugging Face folder is written.

    Attributes:
      naming: of config.json, and the base of shard names ("original" counts from 0, "transformers" from 1).
      shard_size: bytes of a shard at most. None: the shards that the checkpoint was imported from, where it was, so
        that the files come out byte-identical; else DEFAULT_SHARD_SIZE.
      dtype: "keep", or the dtype of all weights but the routers, which stay float32.
      overwrite: replace a destination that exists.
      resumable: False discards what an unfinished export left.
    """

    naming: str = "original"
    shard_size: int | None = None
    dtype: str = "keep"
    overwrite: bool = False
    resumable: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSource:
    """Tensors to export, and what is known about them.

    Attributes:
      tensors: anything with `config`, `mappings`, `specs`, `checksums` and `read(mapping)`.
      identity: JSON-able; an unfinished export is continued only if it was begun with the same.
      manifest: name -> {file, dtype, sha256} of the tensors at their import; empty where there is none.
      carry_from: folder of the tokenizer files, or None.
    """

    tensors: Any
    identity: dict
    manifest: dict
    carry_from: Path | None


def conversion_destination(path: str | os.PathLike, *, arrays: bool = False) -> Path:
    """A path to write to; raises ConversionError where that cannot be."""
    try:
        return filesystem.destination(path, arrays=arrays)
    except filesystem.PathError as error:
        raise ConversionError(str(error)) from None


def largest_tensor(specs: Any) -> int:
    """Bytes of the largest of the tensors."""
    return max(spec.nbytes for spec in specs)


def carry_files(folder: Path | None, destination: Path) -> list[str]:
    """Copies the tokenizer files of a folder; returns their names."""
    carried = carried_files(folder) if folder else []
    for file in carried:
        with atomic_file(destination / file.name) as out:
            out.write(file.read_bytes())
    return [file.name for file in carried]


def export_checkpoint(source_path: str | os.PathLike, destination: str | os.PathLike, **options) -> str:
    """Any checkpoint -> Hugging Face folder with the released tensor names.

    Args:
      options: fields of `ExportOptions`.

    Returns:
      A report of a few lines.

    Raises:
      ConversionError: the checkpoint and its config do not match, the disk is full, or `destination` exists.
    """
    source = resolve(source_path)
    tensors = open_tensors(source)
    export_source = ExportSource(
        tensors=tensors,
        identity={"source": str(source.params_dir.absolute()), **_identity(source, tensors)},
        manifest=read_manifest(source),
        carry_from=source.folder,
    )
    return export_tensors(export_source, conversion_destination(destination), ExportOptions(**options))


def export_tensors(source: ExportSource, destination: Path, options: ExportOptions) -> str:
    """`export_checkpoint` of any `ExportSource`."""
    with disk_errors(destination):
        return _Export(source, destination, options).run()


class _Export:
    """One export: planned when it is built, written by `run`."""

    def __init__(self, source: ExportSource, destination: Path, options: ExportOptions):
        self._source, self._destination, self._options = source, destination, options
        tensors, carry_from = source.tensors, source.carry_from
        self._tensors = tensors
        self._hf_config = model_config_to_hf(tensors.config, options.naming)
        self._ids = ids = generation_config.token_ids(tensors.config, carry_from)
        for key, value in zip(TOKEN_IDS, (ids.bos, next(iter(ids.eos), None), ids.pad), strict=True):
            self._hf_config[key] = value if self._hf_config[key] is None else self._hf_config[key]
        self._by_name = {mapping.hf: mapping for mapping in tensors.mappings}
        self._specs = [
            export_spec(mapping, tensors.specs[mapping.hf].dtype, options.dtype) for mapping in tensors.mappings
        ]
        self._shards = _shards(self._specs, options.shard_size, options.naming, source.manifest)
        carried = {file.name for file in carried_files(carry_from)} if carry_from else set()
        self._code = model_code.choose(tensors.config, options.naming, self._specs[0].dtype.name, carried)
        self._total = sum(spec.nbytes for spec in self._specs)

    def run(self) -> str:
        """Writes the folder, or what is missing of it, and returns the report."""
        plan = {
            "format": FORMAT,
            "command": "export",
            "naming": self._options.naming,
            "dtype": self._options.dtype,
            **self._source.identity,
            "shards": {file: [spec.name for spec in specs] for file, specs in self._shards.items()},
        }
        job = Job(self._destination, plan, overwrite=self._options.overwrite, resumable=self._options.resumable)
        try:
            job.begin()
            finished = {file for file in self._shards if _is_finished(job, file, self._tensors.checksums)}
            missing = [spec.nbytes for file in self._shards if file not in finished for spec in self._shards[file]]
            check_free_space(job.folder, sum(missing))
            self._write_shards(job, finished)
            _check_saved(self._tensors, job)
            carried = self._write_other_files(job)
            job.commit()
        finally:
            job.close()
        return self._report(finished, carried)

    def _write_shards(self, job, finished):
        with ConversionProgress("export", self._total) as progress:
            for file, specs in self._shards.items():
                if file in finished:
                    progress.advance(sum(spec.nbytes for spec in specs), skipped=True)
                else:
                    self._write_shard(job, file, specs, progress)

    def _write_shard(self, job, file, specs, progress):
        digests = {}

        def stream(results):
            for spec, (tensor, digest) in results:
                digests[spec.name] = digest
                yield tensor
                del tensor  # before the next one is asked for

        budget = largest_tensor(self._specs)
        with bounded_map(self._read, file_order(specs), lambda spec: spec.nbytes, budget) as results:
            digest = write_shard(job.folder / file, specs, stream(results), progress.advance)
        checksums = self._tensors.checksums
        sums = {} if checksums is None else checksums.parts(list(digests))
        job.record(file, sha256=digest, tensors=digests, sums=sums)

    def _read(self, spec):
        """(tensor in the dtype of the export, its sha256), checked against the manifest of the import."""
        tensor = self._tensors.read(self._by_name[spec.name])
        digest = sha256(tensor)
        imported = self._source.manifest.get(spec.name, {})
        if imported.get("sha256") and imported.get("dtype") == tensor.dtype.name and digest != imported["sha256"]:
            raise ConversionError(
                f"{self._source.identity['source']}: {spec.name!r} is damaged, its sha256 differs from {MANIFEST}; "
                "import again"
            )
        if tensor.dtype == spec.dtype:
            return tensor, digest
        tensor = tensor.astype(spec.dtype)
        return tensor, sha256(tensor)

    def _write_other_files(self, job) -> list[str]:
        """Writes index, config, code, tokenizer files and manifest; returns the names of what was carried along."""
        if list(self._shards) != [SINGLE_NAME]:
            write_index(job.folder / INDEX_NAME, self._shards)
        hf_config = dict(sorted((self._hf_config | self._code.keys).items()))
        write_atomically(job.folder / "config.json", json.dumps(hf_config, indent=2) + "\n")
        for file in self._code.files:
            write_atomically(job.folder / file.name, file.read_text())
        carried = carry_files(self._source.carry_from, job.folder)
        if self._ids.eos and generation_config.FILE not in carried:
            text = json.dumps(self._ids.as_json(), indent=2) + "\n"
            write_atomically(job.folder / generation_config.FILE, text)
        manifest = {
            "format": FORMAT,
            "files": {file: job.finished[file]["sha256"] for file in self._shards},
            "tensors": {
                name: digest for file in self._shards for name, digest in job.finished[file]["tensors"].items()
            },
        }
        write_atomically(job.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        return carried

    def _report(self, finished, carried) -> str:
        ids, code = self._ids, self._code
        lines = [
            f"{self._destination}: {describe(self._tensors.config)}, {self._options.naming} naming",
            f"{len(self._specs)} tensors, {self._total / 1e9:.3f} GB in {len(self._shards)} files "
            f"({len(finished)} were finished before)",
            f"carried along: {', '.join(carried) or 'nothing'}",
            *([f"ids of special tokens are those of the config alone: {ids.problem}"] if ids.problem else []),
            *code.notes,
        ]
        if code.warning:
            logging.warning("%s", code.warning)
            lines.insert(0, f"WARNING: {code.warning}")
        return "\n".join(lines)


def export_spec(mapping: hf_mapping.Mapping, stored: np.dtype, dtype: str) -> TensorSpec:
    """Name, dtype and shape on disk of a parameter slice."""
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
    """Marks by which an interrupted export recognises the checkpoint that it began with."""
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
