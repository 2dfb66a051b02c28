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

from pallas_kernels.lightning_attention import reference
from pallas_kernels.lightning_attention.mosaic_gpu.time_split import CHUNK

CONTINUES, STARTS, MIXED = range(3)  # kinds of chunks, see `Tables`
RUNS, EXPONENTS, SCALARS = range(3)  # rows of a chunk in a table
PADDING = 1 << 20  # in place of an exponent
KIND, TOKENS, ENTRY, EXIT, FRESH, DROPPED = range(6)  # its scalars
_UNROLLED = 8  # tokens of a step
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
        """The segment ids of `documents` in reference.py."""
        return reference.documents(self.ids, numbered=self.numbered)


class Tables(NamedTuple):
    """What the kernel reads about each chunk of C tokens, int32 [B, N, 3, 2 C], for scans in either direction.

    A chunk is MIXED if it has padding or several documents. One document fills the others, and it either CONTINUES
    from the left or STARTS with the chunk.

    RUNS: documents of the tokens, 0 at padding, then the same but -1 there. EXPONENTS: of the weights of v and then of
    the output over the slope, c_i - m and m - c_i (see api.py), or PADDING. SCALARS: the KIND, the real TOKENS,
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
    pair, far = (plgpu.Layout.WG_STRIDED((n,), vec_size=1) for n in (2 * CHUNK, _LOOK_BACK))

    def kernel(ids_ref, forward_ref, reverse_ref, forward_smem, reverse_smem):
        b, chunk = lax.axis_index("batch"), lax.axis_index("chunk")
        begin = chunk * CHUNK
        index = plgpu.broadcasted_iota(jnp.int32, (2 * CHUNK,), 0, layout=pair)

        def one_token(t, own, carry):
            first, last, started, tokens, runs, counts = carry
            real = own > 0
            started = started + jnp.where(real & (last > 0) & (own != last), 1, 0)
            tokens = tokens + jnp.where(real, 1, 0)
            here = lax.rem(index, CHUNK) == t
            runs = jnp.where(here, jnp.where(real, 1 + started, 0), runs)
            counts = jnp.where(here, tokens, counts)
            return jnp.where(first > 0, first, own), jnp.where(real, own, last), started, tokens, runs, counts

        def some_tokens(step, carry):
            at = [step * _UNROLLED + i for i in range(_UNROLLED)]
            for t, own in [(t, ids_ref[b, begin + t]) for t in at]:  # all are read before the first is used
                carry = one_token(t, own, carry)
            return carry

        def before():
            """The id of the last real token before the chunk; 0 if there is none."""
            places = plgpu.broadcasted_iota(jnp.int32, (_LOOK_BACK,), 0, layout=far)

            def look(carry):
                end, _ = carry
                start = jnp.maximum(end - _LOOK_BACK, 0)
                ids = plgpu.load(ids_ref.at[b, pl.ds(start, _LOOK_BACK)], layout=far, optimized=False)
                place = jnp.max(jnp.where((ids > 0) & (start + places < end), places, -1))
                return start, jnp.sum(jnp.where(places == place, ids, 0))

            # Behind a long stretch of padding only the first chunk with a token looks far.
            return lax.while_loop(lambda carry: (tokens > 0) & (carry[0] > 0) & (carry[1] == 0), look, (begin, 0))[1]

        nothing = jnp.zeros_like(index)
        carry = lax.fori_loop(0, CHUNK // _UNROLLED, some_tokens, (0, 0, 0, 0, nothing, nothing))
        first, last, started, tokens, runs, counts = carry
        entry_id = before()
        if documents.numbered:
            entry_id = jnp.where(entry_id == 0, 1, entry_id)
        first_starts = jnp.where((first > 0) & (entry_id > 0) & (first != entry_id), 1, 0)
        real = runs > 0
        runs = jnp.where(real, runs + first_starts, 0)
        started = started + first_starts

        fresh = jnp.where(ids_ref[b, begin] > 0, first_starts, 0)
        alone = (tokens == CHUNK) & (started == fresh)
        # A chunk of padding does not know that the state behind it ends: the next one, then, has to be MIXED.
        known = ids_ref[b, jnp.maximum(begin - 1, 0)] > 0
        kind = jnp.where(alone & ((fresh == 0) | known), jnp.where(fresh > 0, STARTS, CONTINUES), MIXED)
        followed = lax.rem(chunk + 1, chunks) > 0  # in its segment of time
        next_id = ids_ref[b, jnp.minimum(begin + CHUNK, length - 1)]
        next_starts = jnp.where(followed & (next_id > 0) & (last > 0) & (next_id != last), 1, 0)

        def write(table_smem, count, scalars):
            left = index < CHUNK
            table_smem[RUNS] = jnp.where(left | real, runs, -1)
            exponents = count - CHUNK // 2
            table_smem[EXPONENTS] = jnp.where(real, jnp.where(left, exponents, -exponents), PADDING)
            values = nothing
            for name, scalar in scalars.items():
                values = jnp.where(index == name, scalar, values)
            table_smem[SCALARS] = values

        common = {KIND: kind, TOKENS: tokens}
        exit_run = 1 + started
        write(forward_smem, counts, common | {ENTRY: 1, EXIT: exit_run, FRESH: fresh, DROPPED: next_starts})
        write(reverse_smem, tokens - counts + 1, common | {ENTRY: exit_run, EXIT: 1, FRESH: 0, DROPPED: fresh})
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(forward_smem, forward_ref.at[b, chunk])
        plgpu.copy_smem_to_gmem(reverse_smem, reverse_ref.at[b, chunk])
        plgpu.wait_smem_to_gmem(0)

    table = 3, 2 * CHUNK
    call = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((batch, length // CHUNK, *table), jnp.int32)] * 2,
        scratch_types=[plgpu.SMEM(table, jnp.int32)] * 2,
        grid=(batch, length // CHUNK), grid_names=("batch", "chunk"),
        **(dict(interpret=plgpu.InterpretGPUParams()) if interpreted else {}),
    )  # fmt: skip
    # Looking back takes whole pieces.
    return Tables(*call(jnp.pad(documents.ids, ((0, 0), (0, max(0, _LOOK_BACK - length))))))
