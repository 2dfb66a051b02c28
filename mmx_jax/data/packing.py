"""Documents to rows: pieces of bounded length, packed first-fit into rows of one length."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

IGNORED = -1  # target of a position that predicts nothing


def split_document(tokens: np.ndarray, length: int) -> list[dict[str, np.ndarray]]:
    """Cuts a document into pieces of at most `length` tokens, each to be a segment of its own.

    A piece does not see the one before it, and its positions start at 0. The last target of a piece is the first
    token of the next one, so every token of a document but its first is a target exactly once.

    Args:
      tokens: int32 [n], n >= 1.

    Returns:
      Pieces `{"tokens", "targets"}`, int32; the target after the document's last token is -1.
    """
    targets = np.append(tokens[1:], np.int32(IGNORED))
    starts = range(0, len(tokens), length)
    return [{"tokens": tokens[i : i + length], "targets": targets[i : i + length]} for i in starts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingSpec:
    """How pieces become rows.

    Attributes:
      length: T, tokens of a row.
      bins: rows that are filled at a time, until a piece fits in none of them.
      alignment: every segment starts at a multiple of it.
      pad_id: the token at padding.
    """

    length: int
    bins: int
    alignment: int
    pad_id: int


def pack(grain: Any, pieces: Any, spec: PackingSpec, *, seed: int, shuffle: bool) -> Any:
    """First-fit packing of the pieces of a grain `IterDataset`, as another of rows.

    Rows are `{tokens, targets, segment_ids, positions}`, int32 [T]: segments count from 1, 0 is padding; positions
    restart in every segment. The state of the iterator is that of its parent at the first of the rows that were filled
    together, and a count: restoring it packs these rows again.

    Args:
      grain: the module.
      pieces: dataset of `split_document`'s pieces.
      shuffle: give the rows that were filled together in random order; the first ones are the fullest.
    """
    packed = grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct={"tokens": spec.length, "targets": spec.length},
        num_packing_bins=spec.bins,
        seed=seed,
        shuffle_bins=shuffle,
        pack_alignment_struct={"tokens": spec.alignment, "targets": spec.alignment},
        padding_struct={"tokens": spec.pad_id, "targets": IGNORED},
    )
    return packed.map(_row)


def _row(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "tokens": packed["tokens"],
        "targets": packed["targets"],
        "segment_ids": packed["tokens_segment_ids"],
        "positions": packed["tokens_positions"],
    }


def batches_of(rows: list[dict[str, np.ndarray]], size: int, pad_id: int) -> Iterator[dict[str, np.ndarray]]:
    """Stacks rows to batches [size, T]; rows of padding fill the last batch."""
    fill = {"tokens": pad_id, "targets": IGNORED, "segment_ids": 0, "positions": 0}
    for begin in range(0, len(rows), size):
        group = rows[begin : begin + size]
        padding = {name: np.full_like(group[0][name], value) for name, value in fill.items()}
        group = group + [padding] * (size - len(group))
        yield {name: np.stack([row[name] for row in group]) for name in fill}
