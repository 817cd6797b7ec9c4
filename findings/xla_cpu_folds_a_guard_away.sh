#!/bin/sh
# jax 0.10.2 on a CPU (Python 3.11 to 3.14): inside jit, (1 - x) + 1e-8 is 0 where x is 1, though it is
# 1e-8 outside of jit, in numpy and, since jax 0.11, in jit, too. XLA adds up the constants first, and
# 1 + 1e-8 is 1 in float32. So a small number after a difference does not guard the division of a bias
# correction, mean / (1 - decay ** count + 1e-8), at count 0: jit gives NaN. Bound the count instead.
# Seen: "outside of jit 1e-08 in jit 0.0" and "0.0 nan".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy
cat > "$folder/see.py" <<'P'
import jax
import jax.numpy as jnp

guard = lambda x: (1 - x) + 1e-8
correct = lambda mean, count: mean / (1 - 0.9 ** count + 1e-8)
one, zero = jnp.float32(1), jnp.float32(0)
print("outside of jit", guard(one), "in jit", jax.jit(guard)(one))
print(correct(zero, zero), jax.jit(correct)(zero, zero))
assert guard(one) > 0 == jax.jit(guard)(one)
assert correct(zero, zero) == 0 and jnp.isnan(jax.jit(correct)(zero, zero))
P
JAX_PLATFORMS=cpu "$folder/env/bin/python" "$folder/see.py"
