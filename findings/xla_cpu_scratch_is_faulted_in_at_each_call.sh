#!/bin/sh
# jax 0.10.2 on a CPU (Linux, glibc, huge pages for those who ask): a compiled program asks for its
# scratch memory at each call and gives it back. From 32 MiB on that is a mapping of its own, so
# that at each call every page of it is faulted in and zeroed anew; below, hardly any is. Ten steps
# in one lax.scan pay once. To time one step of an optimizer of many features a parameter, call by
# call, is to time that, too.
# Seen: "8 MiB: 530 page faults a call; 70 MiB: 18327, of 18164 pages; ten in a scan: 1840 a step"
# (and 0, 18255, 1845).
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy
cat > "$folder/see.py" <<'P'
import resource

import jax
import jax.numpy as jnp


def step(x, _):  # what is between the products is scratch
    return jnp.tanh(jnp.cumsum(x @ x.T, 0)) @ x / len(x), None


def ten(x, _):
    return jax.lax.scan(step, x, length=10)


def measured(f, n):
    """Scratch in bytes, page faults of a call."""
    x, calls = jnp.ones((n, 16)) / n, 10
    program = jax.jit(f).lower(x, None).compile()
    faults = []
    for _ in range(2 * calls):
        jax.block_until_ready(program(x, None))
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return program.memory_analysis().temp_size_in_bytes, (faults[-1] - faults[calls - 1]) // calls


(small, few), (large, many), (_, scanned) = measured(step, 1024), measured(step, 3000), measured(ten, 3000)
pages = large // resource.getpagesize()
print(f"{small >> 20} MiB: {few} page faults a call; {large >> 20} MiB: {many}, of {pages} pages;",
      f"ten in a scan: {scanned // 10} a step")
assert few < 2000 < 0.9 * pages < many and scanned < 2 * many
P
JAX_PLATFORMS=cpu "$folder/env/bin/python" "$folder/see.py"
