"""What the GPU benchmarks share: median times of launches, and the bandwidth of a copy."""

import statistics
import time

ROUNDS = 5


def median_ms(run, arguments, wait, launches):
    """Milliseconds a launch: the median of `ROUNDS` rounds of `launches`, each round waited for as a whole."""
    wait(run(*arguments))
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(launches):
            last = run(*arguments)
        wait(last)
        seconds.append((time.perf_counter() - start) / launches)
    return 1e3 * statistics.median(seconds)


def copy_bandwidth():
    """Bytes a second that a copy of 2 GiB reads and writes."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(2**30, jnp.bfloat16)
    return 2 * x.nbytes / median_ms(jax.jit(lambda x: x + 1), (x,), jax.block_until_ready, 20) * 1e3
