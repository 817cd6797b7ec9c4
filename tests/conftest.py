"""Strict mode for every test: no silent broadcasting between ranks, no random key used twice."""
import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
