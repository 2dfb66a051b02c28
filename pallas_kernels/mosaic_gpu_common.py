"""What the Mosaic GPU kernels share: which devices they are for, and the sizes of a Hopper multiprocessor."""

import os

import jax
import jax.numpy as jnp

from pallas_kernels.platform import platform

MULTIPROCESSORS = 132  # of an H100 or H200 SXM
SHARED_MEMORY = 232_448  # bytes that a program can have
LOADER_REGISTERS = 40  # of a thread that only starts copies
INTERPRETER_THREADS = 8  # a program has groups of threads that wait for each other, and all have to make progress


def check(op, dtype, *, fallback):
    """Raises NotImplementedError where no Mosaic GPU kernel can run, naming `fallback`, which can."""
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"mosaic_gpu needs jax 0.11 or later, this is {jax.__version__}; '{fallback}' runs on it"
        )
    if platform() == "cpu" and int(os.environ.get("NPROC", os.cpu_count())) < INTERPRETER_THREADS:
        raise NotImplementedError(
            f"the interpreter of mosaic_gpu waits for ever on fewer than {INTERPRETER_THREADS} threads; start the "
            f"process with NPROC={INTERPRETER_THREADS}, or use '{fallback}'"
        )
    if platform() == "tpu":
        raise NotImplementedError(f"mosaic_gpu is for Hopper, this is a TPU; '{fallback}' runs on it")
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")  # none where only the target is a GPU
    if capability != "9.0":
        raise NotImplementedError(
            f"mosaic_gpu is for Hopper, compute capability 9.0, this is {capability}; '{fallback}' runs on every GPU"
        )
    if dtype != jnp.bfloat16:
        raise NotImplementedError(f"mosaic_gpu of {op} serves bfloat16, got {dtype}; '{fallback}' serves every dtype")


def worker_registers(workers) -> int:
    """Registers of a thread in each of the groups that compute, beside one group that loads."""
    return min(256, (512 - LOADER_REGISTERS) // workers) // 8 * 8


def swizzled():
    """The layout in shared memory that TMA writes and wgmma reads, for rows of whole 128 bytes of 2-byte numbers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)


def fetch_and_add_one(counter_ref, fetched_ref):
    """One thread of the group adds 1 to `counter_ref` in global memory, and puts what it was in `fetched_ref`, shared.

    Both are int32 [1]. The other threads see it behind a barrier.
    """
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def inlined(_, counter_ref, fetched_ref):
        with utils.single_thread(utils.ThreadSubset.WARPGROUP):
            utils.inline_ptx(
                "{ .reg .b32 was; atom.relaxed.gpu.add.u32 was, [$0], 1; st.shared.b32 [$1], was; }",
                utils.memref_ptr(counter_ref),
                utils.memref_ptr(fetched_ref),
                has_side_effects=True,
            )

    inlined(counter_ref, fetched_ref)
