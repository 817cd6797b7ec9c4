#!/bin/sh
# jax 0.5.0 made jax_threefry_partitionable the default (jax PR 13341: split and fold_in symmetric):
# fold_in(key, i) is split(key, n)[i], bit for bit, and fewer numbers drawn from a key are the first of
# more. So a key that is split for some things and folded with a small number for another draws the same
# numbers twice: in a sampler of tasks two hyperparameters were one. jax_debug_key_reuse says nothing,
# and neither function's documentation does. Fold with numbers that no split is as long as.
# Seen, with jax 0.10.2 and 0.4.38: the numbers that both draw, printed; in 0.4.38 they differ.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/draw.py" <<'P'
import sys

import jax
import numpy as np
from jax import random

with jax.debug_key_reuse(True):
    key = random.key(0)
    folded = random.uniform(random.fold_in(key, 1), (2,))
    _, other = random.split(key)
    drawn = random.uniform(other, (5,))
same = np.array_equal(drawn[:2], folded)
far = random.uniform(random.fold_in(random.key(0), 2 ** 31), (2,))
print(jax.__version__, "split, then drawn:", drawn, "folded, then drawn:", folded, "far:", far)
assert same == (sys.argv[1] == "same") and not np.array_equal(drawn[:2], far)
P
for case in "0.4.38 other" "0.10.2 same"; do
    set -- $case
    python3 -m venv "$folder/$1"
    "$folder/$1/bin/pip" install -q "jax==$1" "jaxlib==$1" numpy==2.2.6
    "$folder/$1/bin/python" "$folder/draw.py" "$2"
done
