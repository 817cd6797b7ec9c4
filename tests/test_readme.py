"""The README's snippets run, and what it says of the shipped optimizers is what they say of themselves."""
import csv
import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import numpy as np

import evaluate
import meta_train
import model
import tasks

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(ROOT, "README.md")) as file:
    README = file.read()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_use_it_on_your_own_loss(monkeypatch):
    monkeypatch.chdir(ROOT)
    with jax.numpy_rank_promotion("allow"):
        scope = {}
        exec(SNIPPETS[0], scope)
    assert float(jnp.sum((scope["params"]["w"] - 3.0) ** 2)) < 0.5 * 45  # 45 at the start


def test_add_a_task():
    with jax.numpy_rank_promotion("allow"):
        scope = {}
        exec(SNIPPETS[1], scope)
        family, adam = scope["sinusoids"], model.adam(0.02)
        task = family.sample(jax.random.key(0))
        inner = tasks.init_inner(family, adam, task, jax.random.key(1))
        measure = lambda inner: family.loss(task, inner.params, family.batch(task, jax.random.key(2), "test"))
        before = measure(inner)
        step = jax.jit(lambda inner, key: tasks.inner_step(family, adam, task, inner, key))
        for key in jax.random.split(jax.random.key(3), 300):
            inner = step(inner, key)
        after = measure(inner)
    assert jnp.ndim(before) == 0 and np.isfinite(before)
    assert after < 0.5 * before


def test_the_shipped_optimizers_are_of_the_commands_that_stand_there():
    commands = []
    for line in re.findall(r"^    python meta_train.py (.+)$", README, re.M):
        flags = dict(re.findall(r"--(\S+) (\S+)", line))
        commands.append((commands[-1] if "resume" in flags else {}) | flags)  # a run goes on with what the line above began
    asked = [{field.name: field.type(flags.get(field.name.replace("_", "-"), field.default)) for field in dataclasses.fields(meta_train.Settings)}
             for flags in commands]
    for path in (evaluate.PRETRAINED, evaluate.PRETRAINED_MLP):
        facts = model.about(path)
        assert sum(settings.items() <= facts.items() for settings in asked) == 1


def test_the_numbers_for_held_out_kinds_are_those_of_the_table():
    with open(os.path.join(ROOT, "figures", "generalisation.csv")) as file:
        rows = list(csv.DictReader(file))
    kinds = {row["x"]: float(row["y"]) for row in rows if row["line"] == "held-out kinds"}
    assert set(kinds) == set(evaluate.KINDS)
    assert {row["x"]: row["diverged"] for row in rows if row["diverged"] != "0"} == {x: n for n, x in re.findall(r"(\d+) of `(\w+)` diverged", README)}
    for name, value in kinds.items():
        stated = re.search(rf"([\d.]+) \(`{name}`", README)[1]
        assert stated == f"{value:.{len(stated.split('.')[1])}f}"
