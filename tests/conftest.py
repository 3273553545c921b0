"""Eight fake CPU devices, so that sharding is tested on any machine; programs are compiled fast and kept for later tests and runs."""

import gc
import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests compile far more than they compute: without LLVM's optimisations a tiny update compiles three times faster. What depends on
# the compiler's rounding is tested once more with its defaults (marked slow).
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / f"opsa_jax-test-programs-{os.getuid()}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="module")
def programs_do_not_pile_up():
    """Compiled programs of a file's tests are dropped after it: they would take gigabytes by the end, and are kept on disk anyway."""
    yield
    jax.clear_caches()
    gc.collect()
