#!/bin/sh
# Backprop through lax.scan keeps one copy of what is the same in all steps (jax PR 1664 hoists it). A
# lax.cond around the step's work undoes that: its branches hand such constants out as results, so the
# scan stacks a copy for each step. To skip the last steps of an unroll by a cond, in place of masking
# them by jnp.where, then takes more memory by the number of steps times the weights. jax.checkpoint of
# the work in the branch doesn't help, of the cond as a whole it does. The documentation of cond, scan
# and checkpoint says nothing of it.
# Seen, with jax 0.10.2 on a CPU: scratch memory of the gradient of 200 products with a matrix of 4 MB:
# 1.6 MB with where, 805.6 with cond, 804.8 with checkpoint in the branch, 4.8 with it around the cond.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.2.6
cat > "$folder/memory.py" <<'P'
import jax
import jax.numpy as jnp
from jax import lax

SIZE, STEPS = 1000, 200


def product(w, x):
    return jnp.tanh(w @ x)


def by_where(w, x, there):
    return jnp.where(there, product(w, x), x)


def by_cond(w, x, there, work=product):
    return lax.cond(there, lambda: work(w, x), lambda: x)


def checkpoint_inside(w, x, there):
    return by_cond(w, x, there, jax.checkpoint(product))


def megabytes(step):
    def loss(x, w, count):
        def body(x, i):
            return step(w, x, i < count), None
        return jnp.sum(lax.scan(body, x, jnp.arange(STEPS))[0])

    given = jnp.ones(SIZE), jnp.ones((SIZE, SIZE)), 150
    compiled = jax.jit(jax.grad(loss)).lower(*given).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


ways = by_where, by_cond, checkpoint_inside, jax.checkpoint(by_cond)
where, cond, inside, outside = map(megabytes, ways)
print(f"jax {jax.__version__}: where {where:.1f} MB, cond {cond:.1f}, checkpoint inside {inside:.1f}, "
      f"outside {outside:.1f}")
assert max(where, outside) < 10 and min(cond, inside) > 4 * STEPS
P
"$folder/venv/bin/python" "$folder/memory.py"
