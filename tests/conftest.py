"""Strict mode: no silent broadcasting between ranks, and no random key used twice."""
import os

# Compiling is most of the time, here and in the processes that tests start.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax
import pytest

if jax.__version_info__ < (0, 11):  # a flag that later ones don't know
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # or a GPU rounds factors to 11 bits


@pytest.fixture(autouse=True)
def no_key_used_twice(request):
    """Only where most is drawn: it costs a quarter of the time, and where unrolls are vmapped, jax
    0.10 mistakes a scan over split keys, vmapped over keys, for reuse."""
    with jax.debug_key_reuse(request.module.__name__.split(".")[-1] == "test_tasks"):
        yield


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error::DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:matplotlib.*")  # its own
