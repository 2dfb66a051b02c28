"""Sources of documents, their tokenizer, and how they are packed."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from mmx_jax.config.base import (
    Section,
    added,
    require,
    require_choice,
    require_not_negative,
    require_positive,
    require_sizes,
)

ON_BAD_ROW = ("error", "skip")
SOURCE_FORMATS = ("auto", "text", "jsonl", "parquet", "arrayrecord", "tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig(Section):
    """One source of documents: a file, or a folder searched for files of its format."""

    path: str
    format: str = "auto"
    weight: float = 1.0
    text_field: str = "text"  # of jsonl, Parquet and ArrayRecord rows
    tokens_field: str = "tokens"  # of pre-tokenised rows

    def check(self) -> None:
        require(bool(self.path), "path of a data source is empty")
        require_choice(self, format=SOURCE_FORMATS)
        require_positive(self, "weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingConfig(Section):
    """How data are read; which batches a run sees does not depend on it."""

    prefetch: int = 2  # batches read ahead
    on_bad_row: str = "error"  # or "skip": rows that cannot be read are skipped and counted
    cache_dir: str = ""  # of decompressed copies of compressed JSON lines; empty: ~/.cache/mmx_jax/decompressed

    def check(self) -> None:
        require_choice(self, on_bad_row=ON_BAD_ROW)
        require_not_negative(self, "prefetch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Sources and packing of documents. Without a source, the standard library's own `.py` files are read."""

    sources: tuple[SourceConfig, ...] = ()
    tokenizer: str = ""  # folder or tokenizer.json; empty: train a byte-level BPE on the sources
    tokenizer_vocab_size: int = 0  # of a trained tokenizer; 0: the model's vocab_size
    shards: int = 8  # parts of the data, each packed on its own; a process reads some of them, see BUILD.md
    eval_fraction: float = 0.02  # of the documents, chosen by a hash of their content
    packing_bins: int = 32  # rows kept open by first-fit packing
    packing_alignment: int = 1  # documents start at multiples of this (the lightning chunk, for aligned kernels)
    shuffle_buffer: int = 0  # 0: a global shuffle by index, every epoch anew
    seed: int = 0
    reading: ReadingConfig = added(ReadingConfig())

    MOVED: ClassVar[Mapping[str, str]] = {
        "prefetch": "data.reading.prefetch",
        "on_bad_row": "data.reading.on_bad_row",
        "cache_dir": "data.reading.cache_dir",
    }

    def check(self) -> None:
        require(0 <= self.eval_fraction < 1, f"eval_fraction={self.eval_fraction} must lie in [0, 1)")
        require_sizes(self, "shards", "packing_bins", "packing_alignment")
        require_not_negative(self, "tokenizer_vocab_size", "shuffle_buffer")
