"""Before jax is imported: compiled programs are shared by the test processes, and kept between sessions."""

import os
import pathlib

import hypothesis

_CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"

# By environment, so that the programs that tests start find it too. Compiling is what the suite's time goes into.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Most programs here run once or twice: what the compiler would spend on fast machine code is not paid back.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

# Time decides nothing here: a busy machine may need any for an example, and for the first import of a program.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")
