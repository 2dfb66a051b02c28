"""The order of rows that a grouped product takes: sorted by group."""

import jax
import jax.numpy as jnp

# Up to so many assignments are sorted by comparing all with all. On a GPU that is two kernels, where two sorts and the
# sizes of the groups are six; a decoding step is as long as its kernels are many.
FEW_ASSIGNMENTS = 256


def order_by_group(assignment: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The stable order of assignments by group.

    Args:
      assignment: int32 [n], groups; those from `num_groups` on come last and are not counted.

    Returns:
      (the permutation that sorts them int32 [n], its inverse int32 [n], how often each group occurs int32 [G]).
    """
    count = assignment.shape[0]
    if count > FEW_ASSIGNMENTS:
        order = jnp.argsort(assignment, stable=True)
        # Not `bincount`, whose scatter adds to few addresses from many threads.
        group_sizes = jnp.sum(assignment[:, None] == jnp.arange(num_groups), axis=0, dtype=jnp.int32)
        return order, jnp.argsort(order), group_sizes
    # No two keys are equal. The keys below a key are its place, those below the keys of a group where it begins.
    index = jnp.arange(count, dtype=jnp.int32)
    key = assignment * count + index
    bound = jnp.arange(num_groups + 1, dtype=jnp.int32) * count
    below = jnp.sum(key < jnp.concatenate([key, bound])[:, None], axis=1, dtype=jnp.int32)
    inverse, begins = below[:count], below[count:]
    order = jnp.sum(jnp.where(inverse == index[:, None], index, 0), axis=1)
    return order, inverse, begins[1:] - begins[:-1]
