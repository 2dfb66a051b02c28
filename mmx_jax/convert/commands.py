"""import, export and verify: what `python -m mmx_jax.convert` runs."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import logging

from mmx_jax.checkpoints import generation_config, hf_mapping, json_files, model_code
from mmx_jax.checkpoints.bounded_map import bounded_map
from mmx_jax.checkpoints.difference import difference
from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.hf_config import TOKEN_IDS, describe, model_config_to_hf
from mmx_jax.checkpoints.journal import Job, check_free_space, disk_errors
from mmx_jax.checkpoints.open import HuggingFaceTensors, WeightsSource, carried_files, open_tensors, resolve
from mmx_jax.checkpoints.orbax_slices import ParamsReader, ParamsWriter, flatten
from mmx_jax.checkpoints.progress import Progress
from mmx_jax.checkpoints.safetensors import (
    INDEX_NAME,
    SINGLE_NAME,
    TensorSpec,
    atomic_file,
    file_order,
    is_file_name,
    plan_shards,
    raw_bytes,
    summarize,
    write_atomically,
    write_index,
    write_shard,
)
from mmx_jax.config import Config, ModelConfig, TrainingConfig
from mmx_jax.config.io import config_to_json
from mmx_jax.models.params import abstract_params
from mmx_jax.storage import filesystem

MANIFEST = "manifest.json"
FORMAT = 1  # of the journal and the manifest
DEFAULT_SHARD_SIZE = 5 * 10**9
WEIGHT_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
DTYPE_CHOICES = ("keep", *WEIGHT_DTYPES)


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(raw_bytes(array)).hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _destination(path, *, arrays=False) -> Path:
    try:
        return filesystem.destination(path, arrays=arrays)
    except filesystem.PathError as error:
        raise ConversionError(str(error)) from None


def _budget(specs):
    return max(spec.nbytes for spec in specs)


def _carry(folder: Path | None, destination: Path) -> list[str]:
    carried = carried_files(folder) if folder else []
    for file in carried:
        with atomic_file(destination / file.name) as out:
            out.write(file.read_bytes())
    return [file.name for file in carried]


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
    destination = _destination(destination, arrays=True)
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
        budget = _budget(tensors.specs.values())
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
        carried = _carry(source.params_dir, job.folder)
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
        tensors, _destination(destination), naming=naming, shard_size=shard_size, dtype=dtype, overwrite=overwrite,
        identity={"source": str(source.params_dir.absolute()), **_identity(source, tensors)},
        manifest=_read_manifest(source), carry_from=source.folder,
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

                with bounded_map(read, file_order(names), lambda spec: spec.nbytes, _budget(specs)) as results:
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
        carried = _carry(carry_from, job.folder)
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


def _read_manifest(source):
    path = source.params_dir.parent / MANIFEST
    if source.kind != "weights" or not path.exists():
        return {}
    tensors = json_files.read_object(path).get("tensors")
    if not isinstance(tensors, dict) or not all(map(_is_manifest_row, tensors.values())):
        raise ConversionError(f"{path}: damaged; import the checkpoint again")
    return tensors


def _is_manifest_row(row):
    """Whether a row says where a tensor came from; `file` becomes the name of a shard, so must not be a path."""
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file", "dtype", "sha256")):
        return False
    return is_file_name(row["file"])


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


def verify_checkpoints(first, second, print_line=print, *, show_all: bool = False) -> bool:
    """Compares two checkpoints of any kind tensor by tensor, and returns whether all are equal.

    Derived buffers do not count. Tensors are equal when dtype, shape and every byte are. A row is printed for each
    tensor that differs, or for every one (`show_all`), and a summary at the end.
    """
    sides = [open_tensors(resolve(path)) for path in (first, second)]
    names = list(dict.fromkeys(name for side in sides for name in side.specs))
    by_name = [{mapping.hf: mapping for mapping in side.mappings} for side in sides]
    width = max(map(len, names))
    header = f"{'tensor':{width}}  {'shape':16} {'dtype':19} {'sha256 A':10} {'sha256 B':10} equal"

    def compare(name):
        specs = [side.specs.get(name) for side in sides]
        reads = [side.read if name in own else None for side, own in zip(sides, by_name, strict=True)]
        digests = [sha256(read(own[name])) if read else "-" for read, own in zip(reads, by_name, strict=True)]
        comparable = None not in specs and specs[0].shape == specs[1].shape
        if comparable and specs[0].dtype == specs[1].dtype and digests[0] == digests[1]:
            return digests, None
        if not comparable:
            return digests, "only in one" if None in specs else "shapes differ"
        return digests, difference(*(read(own[name]) for read, own in zip(reads, by_name, strict=True)))

    def size(name):
        return max(side.specs[name].nbytes for side in sides if name in side.specs)

    unequal = 0
    with (
        Progress("verify", sum(map(size, names))) as progress,
        bounded_map(compare, names, size, max(map(size, names))) as results,
    ):
        for name, (digests, differs) in results:
            if header and (show_all or differs):
                print_line(header)
                header = None
            if show_all or differs:
                specs = [side.specs.get(name) for side in sides]
                shape = _both(specs, lambda spec: "x".join(map(str, spec.shape)))
                dtype = _both(specs, lambda spec: spec.dtype.name)
                row = f"{name:{width}}  {shape:16} {dtype:19} {digests[0][:10]:10} {digests[1][:10]:10}"
                print_line(f"{row} NO: {differs}" if differs else f"{row} yes")
            unequal += differs is not None
            progress.advance(size(name))
    for side in sides:
        if side.checksums is not None:
            side.checksums.check(side.mappings)
    print_line(f"{len(names) - unequal} of {len(names)} tensors are equal" + (f"; {unequal} differ" if unequal else ""))
    return not unequal


def _both(specs, text):
    values = [text(spec) if spec else "-" for spec in specs]
    return values[0] if values[0] == values[1] else " / ".join(values)
