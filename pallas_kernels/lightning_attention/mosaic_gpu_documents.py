"""What the Mosaic GPU kernel of lightning attention is told about documents: a table, by a kernel of its own.

A program makes the entries of one chunk. Documents are numbered chunk by chunk, for nothing but the border between two
chunks has to be known beyond them: 1 is the document that comes in from the left. So no scan runs along the row.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lightning_attention import segments
from pallas_kernels.lightning_attention.mosaic_gpu_rows import CHUNK

CONTINUES, STARTS, MIXED = range(3)  # kinds of chunks, see `Tables`
RUNS, EXPONENTS, SCALARS = range(3)  # rows of a chunk in a table
PADDING = 1 << 20  # in place of an exponent
KIND, TOKENS, ENTRY, EXIT, FRESH, DROPPED = range(6)  # its scalars
_LOOK_BACK = 1024  # tokens that are searched at once for the last real one


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ids"], meta_fields=["numbered"])
@dataclasses.dataclass(frozen=True)
class Documents:
    """Ids int32 [B, T] of the documents of rows: 0 is padding, and a maximal run of one positive id is a document.

    The entry state of a row belongs to a document of id 1 if they are `numbered`, and else to the first of the row.
    """

    ids: jax.Array
    numbered: bool

    def runs(self):
        """See segments.py."""
        return segments.documents(self.ids, numbered=self.numbered)


class Tables(NamedTuple):
    """What the kernel reads about each chunk of C tokens, int32 [B, N, 3, 2 C], for scans in either direction.

    A chunk is MIXED if it has padding or several documents. One document fills the others, and it either CONTINUES
    from the left or STARTS with the chunk.

    RUNS: documents of the tokens, 0 at padding, then the same but -1 there. EXPONENTS: of the weights of v and then of
    the output over the slope, c_i - m and m - c_i (see mosaic_gpu.py), or PADDING. SCALARS: the KIND, the real TOKENS,
    the documents of the ENTRY and EXIT states, FRESH where a scan that begins here drops its entry state, and DROPPED
    where the exit state ends with its document.
    """

    forward: jax.Array
    reverse: jax.Array

    def tokens_and_starts(self):
        """The real tokens of each chunk, and how many documents start in it, int32 [B, N]."""
        return self.forward[:, :, SCALARS, TOKENS], self.forward[:, :, SCALARS, EXIT] - 1


def tables(documents, chunks, *, interpreted) -> Tables:
    """The tables of rows of whole chunks.

    Args:
      documents: `Documents` of [B, N * C].
      chunks: of a segment of time; the exit state of its last chunk is kept.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, length = documents.ids.shape
    wgmma = plgpu.Layout.WGMMA
    along_rows, along_columns = wgmma.reduce(1), wgmma.reduce(0)  # of vectors
    pair, far = (plgpu.Layout.WG_STRIDED((n,), vec_size=1) for n in (2 * CHUNK, _LOOK_BACK))

    def kernel(ids_ref, forward_ref, reverse_ref, forward_smem, reverse_smem, starts_smem, known_smem):
        b, chunk = lax.axis_index("batch"), lax.axis_index("chunk")
        begin = pl.multiple_of(chunk * CHUNK, CHUNK)

        def vector(ref, layout):
            return plgpu.load(ref, layout=layout, optimized=False)

        def spread(x, axis):
            """A vector along one axis of a square, alike along the other."""
            return plgpu.layout_cast(lax.broadcast_in_dim(x, (CHUNK, CHUNK), (axis,)), wgmma)

        def last_before():
            """The id of the last real token before the chunk; 0 if there is none."""
            index = plgpu.broadcasted_iota(jnp.int32, (_LOOK_BACK,), 0, layout=far)

            def look(carry):
                end, _ = carry
                start = jnp.maximum(end - _LOOK_BACK, 0)
                there = vector(ids_ref.at[b, pl.ds(start, _LOOK_BACK)], far)
                at = jnp.max(jnp.where((there > 0) & (start + index < end), index, -1))
                return start, jnp.sum(jnp.where(index == at, there, 0))

            # Behind a long stretch of padding only the first chunk with a token looks far.
            return lax.while_loop(lambda carry: (tokens > 0) & (carry[0] > 0) & (carry[1] == 0), look, (begin, 0))[1]

        # What is known about each token, from those before it.
        own = ids_ref.at[b, pl.ds(begin, CHUNK)]
        ids, sources = vector(own, along_rows), spread(vector(own, along_columns), 1)
        i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=wgmma) for axis in (0, 1))
        real = ids > 0
        count = jnp.sum(jnp.where((j <= i) & (sources > 0), 1, 0), axis=1)
        known_smem[0] = count
        tokens = known_smem[0, CHUNK - 1]
        before = last_before()
        if documents.numbered:
            before = jnp.where(before == 0, 1, before)
        previous = jnp.max(jnp.where((j < i) & (sources > 0), j, -1), axis=1)
        previous_ids = jnp.sum(jnp.where(j == spread(previous, 0), sources, 0), axis=1)
        previous_ids = jnp.where(previous < 0, before, previous_ids)
        starts_smem[...] = (real & (previous_ids > 0) & (ids != previous_ids)).astype(jnp.int32)
        starts = spread(vector(starts_smem, along_columns), 1)
        runs = 1 + jnp.sum(jnp.where(j <= i, starts, 0), axis=1)

        # And about the chunk.
        known_smem[1], known_smem[2] = runs, previous_ids
        exit_run, fresh = known_smem[1, CHUNK - 1], starts_smem[0]
        alone = (tokens == CHUNK) & (exit_run == 1 + fresh)
        # A chunk of padding does not know that the state behind it ends: the next one, then, has to be MIXED.
        known = ids_ref[b, jnp.maximum(begin - 1, 0)] > 0
        kind = jnp.where(alone & ((fresh == 0) | known), jnp.where(fresh > 0, STARTS, CONTINUES), MIXED)
        last_id = ids_ref[b, begin + CHUNK - 1]
        last_id = jnp.where(last_id > 0, last_id, known_smem[2, CHUNK - 1])
        next_id = ids_ref[b, jnp.minimum(begin + CHUNK, length - 1)]
        followed = lax.rem(chunk + 1, chunks) > 0  # in its segment of time
        next_starts = jnp.where(followed & (next_id > 0) & (last_id > 0) & (next_id != last_id), 1, 0)

        def write(table_smem, count, scalars):
            left, right = pl.ds(0, CHUNK), pl.ds(CHUNK, CHUNK)
            table_smem[RUNS, left] = jnp.where(real, runs, 0)
            table_smem[RUNS, right] = jnp.where(real, runs, -1)
            for part, exponents in ((left, count - CHUNK // 2), (right, CHUNK // 2 - count)):
                table_smem[EXPONENTS, part] = jnp.where(real, exponents, PADDING)
            index = plgpu.broadcasted_iota(jnp.int32, (2 * CHUNK,), 0, layout=pair)
            values = jnp.zeros_like(index)
            for name, scalar in scalars.items():
                values = jnp.where(index == name, scalar, values)
            table_smem[SCALARS] = values

        common = {KIND: kind, TOKENS: tokens}
        write(forward_smem, count, common | {ENTRY: 1, EXIT: exit_run, FRESH: fresh, DROPPED: next_starts})
        write(reverse_smem, tokens - count + 1, common | {ENTRY: exit_run, EXIT: 1, FRESH: 0, DROPPED: fresh})
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(forward_smem, forward_ref.at[b, chunk])
        plgpu.copy_smem_to_gmem(reverse_smem, reverse_ref.at[b, chunk])
        plgpu.wait_smem_to_gmem(0)

    table = 3, 2 * CHUNK
    call = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((batch, length // CHUNK, *table), jnp.int32)] * 2,
        scratch_types=[
            plgpu.SMEM(table, jnp.int32), plgpu.SMEM(table, jnp.int32),
            plgpu.SMEM((CHUNK,), jnp.int32), plgpu.SMEM((3, CHUNK), jnp.int32),
        ],
        grid=(batch, length // CHUNK), grid_names=("batch", "chunk"),
        **(dict(interpret=plgpu.InterpretGPUParams()) if interpreted else {}),
    )  # fmt: skip
    # Looking back takes whole pieces.
    return Tables(*call(jnp.pad(documents.ids, ((0, 0), (0, max(0, _LOOK_BACK - length))))))
