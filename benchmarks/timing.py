"""What the GPU benchmarks share: median times of launches, and the bandwidth of a copy."""

import contextlib
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
    """Bytes a second that copies of 2 GiB read and write: the best of XLA's, the driver's and, where it is, torch's."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(2**30, jnp.bfloat16)
    copies = [jax.jit(lambda x: x + 1), jnp.copy]
    times = [median_ms(copy, (x,), jax.block_until_ready, 20) for copy in copies]
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            theirs = torch.zeros(2**30, dtype=torch.bfloat16, device="cuda")
            target = torch.empty_like(theirs)
            times.append(median_ms(target.copy_, (theirs,), lambda _: torch.cuda.synchronize(), 20))
            del theirs, target
            torch.cuda.empty_cache()
    return 2 * x.nbytes / min(times) * 1e3
