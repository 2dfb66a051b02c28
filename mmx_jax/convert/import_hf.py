"""A Hugging Face folder to a folder of weights of this project."""

import dataclasses
import functools
import json
import math
import os
from pathlib import Path

import numpy as np

from mmx_jax.checkpoints import generation_config, hf_mapping
from mmx_jax.checkpoints.bounded_map import bounded_map
from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.export_hf import carry_files, conversion_destination, largest_tensor
from mmx_jax.checkpoints.hf_config import describe
from mmx_jax.checkpoints.journal import Job, check_free_space, disk_errors
from mmx_jax.checkpoints.manifest import FORMAT, MANIFEST, sha256
from mmx_jax.checkpoints.open import HuggingFaceTensors, WeightsSource, resolve
from mmx_jax.checkpoints.orbax_slices import ParamsReader, ParamsWriter, flatten
from mmx_jax.checkpoints.safetensors import (
    summarize,
    write_atomically,
)
from mmx_jax.config import Config, ModelConfig, TrainingConfig
from mmx_jax.config.io import config_to_json
from mmx_jax.models.params import abstract_params
from mmx_jax.progress import ConversionProgress


def _add_stop_tokens(folder: Path, eos: tuple[int, ...]):
    """Keeps a list of config.json in generation_config.json, which stays as it is where it names them all."""
    generation = generation_config.read(folder)
    if not set(eos) <= set(generation_config.declared_eos(folder)):
        text = json.dumps(generation | {"eos_token_id": list(eos)}, indent=2)
        write_atomically(folder / generation_config.FILE, text + "\n")


def import_checkpoint(
    source_path: str | os.PathLike, destination: str | os.PathLike, *, overwrite: bool = False
) -> str:
    """Hugging Face folder -> weights folder (config.json, params/, tokenizer files, manifest.json).

    Weights keep the dtype that they have on disk; the router is float32 (a bfloat16 one is widened, which is exact).
    Continues a conversion that was interrupted; `destination` appears when it is whole.

    Returns:
      A report of a few lines.

    Raises:
      ConversionError: source and rules do not match, source or disk is damaged or full, or `destination` exists.
    """
    destination = conversion_destination(destination, arrays=True)
    source = resolve(source_path)
    if source.kind != "huggingface":
        raise ConversionError(f"{source_path}: already a checkpoint of ours ({source.kind}); nothing to import")
    with disk_errors(destination):
        return _Import(source, HuggingFaceTensors(source), destination).run(overwrite)


class _Import:
    """One import: planned when it is built, written by `run`."""

    def __init__(self, source: WeightsSource, tensors: HuggingFaceTensors, destination: Path):
        self._source, self._tensors, self._destination = source, tensors, destination
        self._folder = folder = tensors.folder
        self._eos = generation_config.eos_ids(tensors.config, source.folder)
        self._dtypes = {
            mapping.leaf: np.dtype(np.float32) if mapping.float32 else folder.entries[mapping.hf].dtype
            for mapping in tensors.mappings
        }
        embedding = self._dtypes[("embed", "embedding")]
        self._config = dataclasses.replace(tensors.config, param_dtype=embedding.name)
        self._shapes = hf_mapping.leaf_shapes(self._config, tensors.mappings)
        shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(self._config)).items()}
        hf_mapping.check_parameters(self._config, tensors.mappings, shapes)
        self._total = sum(entry.nbytes for entry in tensors.specs.values())

    def run(self, overwrite: bool) -> str:
        """Writes the folder, or what is missing of it, and returns the report."""
        fingerprint = self._folder.fingerprint
        source = str(self._source.params_dir.absolute())
        plan = {"format": FORMAT, "command": "import", "source": source, **fingerprint}
        job = Job(self._destination, plan, overwrite=overwrite)
        try:
            needed = _params_bytes(self._shapes, self._dtypes) - _finished_bytes(job, self._tensors.specs)
            check_free_space(job.folder, needed)
            skipped = self._write_params(job)
            HuggingFaceTensors(self._source).folder.check_unchanged(fingerprint, "the import began")
            carried = self._write_other_files(job)
            job.commit()
        finally:
            job.close()
        return self._report(skipped, carried)

    def _write_params(self, job) -> int:
        """Writes all tensors; returns how many were finished before."""
        tensors, specs = self._tensors, self._tensors.specs
        leading = {mapping.leaf: len(mapping.index) for mapping in tensors.mappings}
        writer = ParamsWriter(job.folder / "params", self._shapes, self._dtypes, leading, resume=job.resumed)
        reader = ParamsReader(job.folder / "params")
        job.begin()

        def location(mapping):
            entry = self._folder.entries[mapping.hf]
            return entry.path.name, entry.offset

        # Shard by shard, in file order: the source is read once, from front to back.
        order = sorted(tensors.mappings, key=location)
        convert = functools.partial(self._convert, job, writer, reader)
        skipped = 0
        with (
            ConversionProgress("import", self._total) as progress,
            bounded_map(convert, order, lambda m: specs[m.hf].nbytes, largest_tensor(specs.values())) as results,
        ):
            for mapping, (digest, was_done) in results:
                if not was_done:
                    job.record(mapping.hf, sha256=digest)
                skipped += was_done
                progress.advance(specs[mapping.hf].nbytes, skipped=was_done)
        return skipped

    def _convert(self, job, writer, reader, mapping):
        """(sha256 of a tensor, whether it was written before)."""
        done = job.finished.get(mapping.hf)
        if done and writer.is_written(mapping.leaf, mapping.index, mapping.slice_shape):
            written = reader.read_hf(mapping)
            if sha256(written.astype(self._tensors.specs[mapping.hf].dtype, copy=False)) == done["sha256"]:
                return done["sha256"], True
        tensor = self._tensors.read(mapping)
        digest = sha256(tensor)
        piece = mapping.to_mmx(tensor.astype(self._dtypes[mapping.leaf], copy=False))
        writer.write(mapping.leaf, mapping.index, piece)
        return digest, False

    def _write_other_files(self, job) -> list[str]:
        """Writes config, tokenizer files and manifest; returns the names of what was carried along."""
        manifest = {
            "format": FORMAT,
            "tensors": {
                name: {
                    "file": self._folder.entries[name].path.name,
                    "dtype": spec.dtype.name,
                    "shape": spec.shape,
                    "sha256": job.finished[name]["sha256"],
                }
                for name, spec in self._tensors.specs.items()
            },
            "dropped": sorted(self._tensors.dropped),
        }
        config = whole_config(self._source.params_dir.name, self._config)
        write_atomically(job.folder / "config.json", config_to_json(config))
        carried = carry_files(self._source.params_dir, job.folder)
        if len(self._eos) > 1:  # config.json of ours has room for one
            _add_stop_tokens(job.folder, self._eos)
        write_atomically(job.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        return carried

    def _report(self, skipped, carried) -> str:
        tensors = self._tensors
        widened = sum(m.float32 and tensors.specs[m.hf].dtype != np.float32 for m in tensors.mappings)
        ignored = f"{summarize(self._folder.ignored)} ignored, as the index takes them from another shard"
        parameters = sum(map(math.prod, self._shapes.values()))
        lines = [
            f"{self._destination}: {describe(self._config)}, {parameters:,} parameters",
            f"{len(tensors.mappings)} tensors, {self._total / 1e9:.3f} GB ({skipped} were finished before); "
            f"{len(tensors.dropped)} derived buffers dropped; {widened} gates widened to float32",
            *([ignored] if self._folder.ignored else []),
            f"carried along: {', '.join(carried) or 'nothing'}",
        ]
        return "\n".join(lines)


def whole_config(name: str, config: ModelConfig) -> Config:
    """The Config stored beside converted weights; its training section only has to fit the model."""
    length = min(TrainingConfig.sequence_length, config.max_position_embeddings)
    return Config(name=name, model=config, training=TrainingConfig(sequence_length=length, batch_tokens=length))


def _params_bytes(shapes, dtypes):
    return sum(math.prod(shape) * dtypes[path].itemsize for path, shape in shapes.items())


def _finished_bytes(job, specs):
    return sum(specs[name].nbytes for name in job.finished if name in specs)
