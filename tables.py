"""Tables of numbers, made up: columns of every kind, and classes or a target that what is behind
some of them tells. Rows are drawn once; what a task makes of them is its own."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

import data
from parts import (
    chance, choice, draw, first, log_uniform, masked, net_ranges, often_zero, size, uniform)

TRAIN = 3072  # the first rows: to train on and to validate with
ROWS = {"outer_valid": (TRAIN, 512), "test": (TRAIN + 512, 512)}  # first, how many
CLASSES, INPUTS, BATCH = 10, 256, 64  # at most
COLUMNS = (  # what is shown of a standard normal number, mostly at mean 0 and variance 1 again
    lambda x: x,
    lambda x: x ** 3 / np.sqrt(15),                                    # a few are huge
    lambda x: (jnp.exp(x) - np.exp(0.5)) / np.sqrt(np.exp(2) - np.e),  # amounts
    jnp.sign,                                                          # yes or no
    lambda x: jnp.where(x > 1.5, 3.74, -0.268),                        # rarely yes
    jnp.zeros_like)                                                    # always the same
RANGES = dict(
    inputs=size(4, INPUTS),
    examples=log_uniform(32.0, 2700.0),      # rows to train on; a tenth as many others to validate
    regression=chance(1 / 3),
    classes=choice(CLASSES - 1, lowest=2),
    apart=often_zero(log_uniform(1.0, 10.0)),  # centers of classes, in deviations, if any
    rare=often_zero(uniform(0.0, 2.0)),      # how much rarer the last class is than the first
    luck=often_zero(log_uniform(0.1, 2.0)),  # deviation of what no column tells
    common=often_zero(uniform(0.0, 0.9)),    # share of variance that columns have in common
    useful=uniform(0.1, 1.0),                # share of columns that tell something
    bend=log_uniform(0.3, 3.0),              # of the net that is to be found
    **net_ranges(2, 16, BATCH))


class Numbers(NamedTuple):
    """Of each row; standard normal but for the last."""
    own: jax.Array   # [rows, inputs]
    both: jax.Array  # [rows, 4], what columns have in common
    luck: jax.Array  # [rows, CLASSES]
    group: jax.Array  # [rows], uniform in [0, 1)


def numbers(pool):
    rng = np.random.default_rng(data.POOLS.index(pool))
    rows = TRAIN + 2 * 512
    normal = (rng.standard_normal((rows, n)) for n in (INPUTS, 4, CLASSES))
    return Numbers(*map(jnp.float32, normal), jnp.float32(rng.uniform(size=rows)))


def columns(made, task, row):
    """What is behind the numbers that are shown, [B, inputs]."""
    common = task["common"]
    both = made.both[row] @ task["loads"]
    x = jnp.sqrt(1 - common) * made.own[row] + jnp.sqrt(common) * both
    return (x + task["centers"][group(made, task, row)]) / task["spread"][None]


def group(made, task, row):
    """The classes of rows, where each class has a center of its own."""
    u = made.group[row] ** (1 + task["rare"])
    return (u * task["classes"]).astype(int)


def told(made, task, row):
    """What the net that is to be found says of each class, or first of the target: [B, CLASSES]."""
    x = columns(made, task, row) @ task["a"]
    return jnp.tanh(task["bend"] * x) @ task["b"]


def table_tasks(pool):
    """-> (sample, batch) of tables. A batch is numbers [B, inputs], classes [B], targets [B], of
    variance about 1, and a mask [B] as of letters."""
    made = numbers(pool)

    def sample(key):
        keys = random.split(key, 6)
        task = draw(keys[0], RANGES)
        u = random.uniform(keys[1], (3, INPUTS))
        loads = random.normal(keys[2], (4, INPUTS))
        useful = (u[0] < task["useful"]) | first(1, INPUTS)
        useful &= task["inputs"]
        a = random.normal(keys[3], (INPUTS, 16))
        a /= jnp.sqrt(jnp.sum(useful))
        apart = task["apart"] / jnp.sqrt(jnp.sum(useful)) * useful
        centers = random.normal(keys[5], (CLASSES, INPUTS))
        task |= dict(
            centers=apart[None] * centers,
            spread=jnp.sqrt(1 + apart ** 2),
            first=(u[1, 0] * TRAIN).astype(int),
            kinds=(u[2] * len(COLUMNS)).astype(int),
            loads=loads / jnp.linalg.norm(loads, axis=0, keepdims=True),
            a=masked(useful[:, None], a),
            b=random.normal(keys[4], (16, CLASSES)))
        says = told(made, task, jnp.arange(512))
        deviation = jnp.std(says, 0)
        b = task["b"] / deviation[None]
        return task | dict(b=b, middle=jnp.mean(says, 0) / deviation)

    def batch(task, key, split):
        row = picked(task, split, random.uniform(key, (BATCH,)))
        x = columns(made, task, row)
        kinds = jnp.broadcast_to(task["kinds"], x.shape)
        x = lax.select_n(kinds, *(f(x) for f in COLUMNS))
        x = jnp.clip(x, -10, 10)
        says = told(made, task, row) - task["middle"][None]
        says += task["luck"] * made.luck[row]
        target = says[:, 0] * lax.rsqrt(1 + task["luck"] ** 2)
        falling = task["rare"] * jnp.arange(CLASSES) / (task["classes"] - 1)
        there = first(task["classes"], CLASSES)[None]
        y = jnp.argmax(jnp.where(there, says - falling[None], -jnp.inf), 1)
        y = jnp.where(task["apart"] > 0, group(made, task, row), y)
        x = masked(task["inputs"][None], x)
        return x, y, target, task["batch_size"] | (split != "train")

    return sample, batch


def picked(task, split, u):
    """The rows that u, uniform in [0, 1), stands for."""
    if split in ROWS:
        begin, count = ROWS[split]
        return begin + (count * u).astype(int)
    n = jnp.floor(task["examples"])
    row = n + n / 10 * u if split == "inner_valid" else n * u
    return (task["first"] + row.astype(int)) % TRAIN
