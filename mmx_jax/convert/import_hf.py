"""A Hugging Face folder to a folder of weights of this project."""

import dataclasses
import json
import math
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
from mmx_jax.checkpoints.progress import Progress
from mmx_jax.checkpoints.safetensors import (
    summarize,
    write_atomically,
)
from mmx_jax.config import Config, ModelConfig, TrainingConfig
from mmx_jax.config.io import config_to_json
from mmx_jax.models.params import abstract_params


def _add_stop_tokens(folder: Path, eos: tuple[int, ...]):
    """Keeps a list of config.json in generation_config.json, which stays as it is where it names them all."""
    generation = generation_config.read(folder)
    if not set(eos) <= set(generation_config.declared_eos(folder)):
        text = json.dumps(generation | {"eos_token_id": list(eos)}, indent=2)
        write_atomically(folder / generation_config.FILE, text + "\n")


def import_checkpoint(source_path, destination, *, overwrite: bool = False) -> str:
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
        return _import(source, HuggingFaceTensors(source), destination, overwrite)


def _import(source: WeightsSource, tensors: HuggingFaceTensors, destination: Path, overwrite: bool) -> str:
    folder = tensors.folder
    eos = generation_config.eos_ids(tensors.config, source.folder)
    dtypes = {
        mapping.leaf: np.dtype(np.float32) if mapping.float32 else folder.entries[mapping.hf].dtype
        for mapping in tensors.mappings
    }
    embedding = dtypes[("embed", "embedding")]
    config = dataclasses.replace(tensors.config, param_dtype=embedding.name)
    shapes = hf_mapping.leaf_shapes(config, tensors.mappings)
    hf_mapping.check_parameters(
        config, tensors.mappings, {path: leaf.shape for path, leaf in flatten(abstract_params(config)).items()}
    )
    leading = {mapping.leaf: len(mapping.index) for mapping in tensors.mappings}
    total = sum(entry.nbytes for entry in tensors.specs.values())
    plan = {"format": FORMAT, "command": "import", "source": str(source.params_dir.absolute()), **folder.fingerprint}
    job = Job(destination, plan, overwrite=overwrite)
    try:
        check_free_space(job.folder, _params_bytes(shapes, dtypes) - _finished_bytes(job, tensors.specs))
        writer = ParamsWriter(job.folder / "params", shapes, dtypes, leading, resume=job.resumed)
        reader = ParamsReader(job.folder / "params")
        job.begin()

        def convert(mapping):
            done = job.finished.get(mapping.hf)
            if done and writer.is_written(mapping.leaf, mapping.index, mapping.slice_shape):
                written = reader.read_hf(mapping)
                if sha256(written.astype(tensors.specs[mapping.hf].dtype, copy=False)) == done["sha256"]:
                    return done["sha256"], True
            tensor = tensors.read(mapping)
            digest = sha256(tensor)
            writer.write(mapping.leaf, mapping.index, mapping.to_mmx(tensor.astype(dtypes[mapping.leaf], copy=False)))
            return digest, False

        # Shard by shard, in file order: the source is read once, from front to back.
        def location(mapping):
            entry = folder.entries[mapping.hf]
            return entry.path.name, entry.offset

        order = sorted(tensors.mappings, key=location)
        skipped = 0
        budget = largest_tensor(tensors.specs.values())
        with (
            Progress("import", total) as progress,
            bounded_map(convert, order, lambda m: tensors.specs[m.hf].nbytes, budget) as results,
        ):
            for mapping, (digest, was_done) in results:
                if not was_done:
                    job.record(mapping.hf, sha256=digest)
                skipped += was_done
                progress.advance(tensors.specs[mapping.hf].nbytes, skipped=was_done)
        HuggingFaceTensors(source).folder.check_unchanged(folder.fingerprint, "the import began")
        manifest = {
            "format": FORMAT,
            "tensors": {
                name: {
                    "file": folder.entries[name].path.name, "dtype": spec.dtype.name, "shape": spec.shape,
                    "sha256": job.finished[name]["sha256"],
                }
                for name, spec in tensors.specs.items()
            },
            "dropped": sorted(tensors.dropped),
        }  # fmt: skip
        write_atomically(job.folder / "config.json", config_to_json(whole_config(source.params_dir.name, config)))
        carried = carry_files(source.params_dir, job.folder)
        if len(eos) > 1:  # config.json of ours has room for one
            _add_stop_tokens(job.folder, eos)
        write_atomically(job.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        job.commit()
    finally:
        job.close()
    widened = sum(m.float32 and tensors.specs[m.hf].dtype != np.float32 for m in tensors.mappings)
    ignored = f"{summarize(folder.ignored)} ignored, as the index takes them from another shard"
    lines = [
        f"{destination}: {describe(config)}, {sum(map(math.prod, shapes.values())):,} parameters",
        f"{len(tensors.mappings)} tensors, {total / 1e9:.3f} GB ({skipped} were finished before); "
        f"{len(tensors.dropped)} derived buffers dropped; {widened} gates widened to float32",
        *([ignored] if folder.ignored else []),
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
