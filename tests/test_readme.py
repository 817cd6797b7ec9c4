"""The README's snippets run; the shipped files are of the commands that the results page names."""
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

import evaluate
import meta_train
import model
from test_meta_train import ROOT

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_use_it_on_your_own_loss_and_add_a_task(monkeypatch):
    monkeypatch.chdir(ROOT)
    own_loss, add_a_task = {}, {}
    with jax.numpy_rank_promotion("allow"):
        exec(SNIPPETS[0], own_loss)
        exec(SNIPPETS[1], add_a_task)
        curve = jax.jit(lambda key: evaluate.run(
            add_a_task["sinusoids"], model.adam(0.02), key, 300)["curves"])(random.key(0))
    assert jnp.sum((own_loss["params"]["w"] - 3.0) ** 2) < 1e-3 * 45  # 45 at the start
    assert np.isfinite(curve).all() and curve[-1, 1] < 0.5 * curve[0, 1]


def test_the_shipped_optimizers_are_of_the_commands_on_the_results_page():
    page, asked, flags = (ROOT / "figures" / "README.md").read_text(), [], {}
    for line in re.findall(r"^    python meta_train.py (.+)$", page, re.M):
        new = dict(re.findall(r"--(\S+) (\S+)", line))
        flags = flags | new if "resume" in new else new  # that goes on with the line above
        settings = {}
        for field in dataclasses.fields(meta_train.Settings):
            value = flags.get(field.name.replace("_", "-"), field.default)
            if isinstance(value, str) and callable(field.type):
                value = field.type(value)
            settings[field.name] = list(value) if isinstance(value, tuple) else value
        asked.append(settings)
    for name in ("pretrained", "pretrained_mlp"):
        facts = model.about(str(ROOT / f"{name}.npz"))
        assert sum(settings.items() <= facts.items() for settings in asked) == 1


def test_the_table_tells_how_long_each_file_is():
    told, readme = {}, (ROOT / "README.md").read_text()
    for names, lines in re.findall(r"^\| (`.+?) \| ([\d, ]+) \|", readme, re.M):
        told |= dict(zip(re.findall(r"`(\w+\.py)`", names), map(int, lines.split(","))))
    found = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    assert told.keys() == found.keys()
    assert all(abs(told[name] - lines) <= 0.1 * lines for name, lines in found.items())
