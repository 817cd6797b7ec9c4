"""Strict mode: no silent broadcasting between ranks, and no random key used twice."""
import os

# Compiling is most of the time, here and in the processes that tests start.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # or a GPU rounds factors to 11 bits


@pytest.fixture(autouse=True)
def no_key_used_twice(request):
    """Only where most is drawn: it costs a quarter of the time, and where unrolls are vmapped, jax
    0.10 mistakes a scan over split keys, vmapped over keys, for reuse."""
    with jax.debug_key_reuse(request.module.__name__.split(".")[-1] == "test_tasks"):
        yield
