"""manifest.json beside converted weights: file, dtype, shape and sha256 of every tensor."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from mmx_jax.checkpoints import json_files
from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.safetensors import (
    is_file_name,
    raw_bytes,
)

MANIFEST = "manifest.json"
FORMAT = 1  # of the journal and the manifest


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(raw_bytes(array)).hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(source: Any) -> Any:
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
