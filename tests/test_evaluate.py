"""The comparison's arithmetic by hand; what is fitted; the command line as a user meets it."""
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random, tree

import data
import evaluate
import machine
import model
import tasks
from test_meta_train import ROOT, bowl, rates, refused


def plain_curve(key, rate, splits=("train", "test")):
    """Losses [3, 2] of 40 steps of Adam on a bowl, whose gradient is known."""
    family, adam, curve = bowl(), model.adam(rate), []
    task_key, init_key, step_key, measure_key = random.split(key, 4)
    task = family.sample(task_key)
    params = family.init(task, init_key)
    state, update = adam.init(params), jax.jit(adam.update)
    for segment in [[], *(random.split(k, 20) for k in random.split(step_key))]:
        for k in segment:
            batch = family.batch(task, random.split(k)[0], "train")
            updates, state = update({"x": 2 * task * (params["x"] - batch)}, state)
            params = {"x": params["x"] + updates["x"]}
        curve.append([np.mean([family.loss(task, params, family.batch(task, k, split))
                               for k in random.split(measure_key, 8)]) for split in splits])
    return np.array(curve)


def test_learning_curves_shared_out_among_devices_are_those_of_a_plain_loop():
    keys = random.split(random.key(0), 6)
    curves = evaluate.learning_curves(bowl(), model.adam, jnp.float32([0.01, 0.1]), keys, 40)
    assert curves.shape == (6, 2, 3, 2) and jax.device_count() == 2
    np.testing.assert_allclose(curves[4, 1], plain_curve(keys[4], 0.1), rtol=1e-3)


def test_curves_are_kept_by_content(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CACHE", tmp_path)
    kept = functools.partial(evaluate.kept_curves, bowl(), horizon=20)
    given = model.adam, jnp.float32([0.01, 0.1]), random.split(random.key(0), 2)
    curves, (path,) = kept(*given), tmp_path.iterdir()
    machine.write_npz(path, {"curves": curves + 1})
    np.testing.assert_array_equal(kept(*given), curves + 1)
    path.write_bytes(path.read_bytes()[:100])  # a damaged copy is made again
    for i, other in enumerate((model.rmsprop, 2 * given[1], given[2][::-1], model.adam)):
        assert (kept(*given[:i % 3], other, *given[i % 3 + 1:]) != curves).any() == (i < 3)


def test_a_pool_holds_what_adam_reaches_at_its_best_rate_on_each_of_its_tasks():
    keys, baselines = evaluate.make_pool(bowl(), 3, 40, "valid")
    weights = np.array([0.5, 1.0]) ** 4
    for i, key in enumerate(random.split(random.key(2 ** 31), 3)):
        assert (random.key_data(keys[i]) == random.key_data(random.split(key, 4)[0])).all()
        curves = np.array([plain_curve(key, rate, ["outer_valid"]) for rate in evaluate.RATES])
        shares = np.sqrt(curves[:, 1:, 0] / curves[:, :1, 0]) @ weights / weights.sum()
        np.testing.assert_allclose(baselines[i], min(shares.min(), 0.9), rtol=1e-3)


def test_speedup_by_hand():
    """Task 0: tuned Adam, which ends at 2, reaches the learned one's final 4 after 20 of 80 steps.
    Task 1: Adam never reaches 1; the learned one reaches Adam's final 2 after 40 steps."""
    learned = np.float64([[9, 8, 7, 6, 4], [9, 3, 2, 1.5, 1]])
    adam = np.float64([[[9, 4, 3, 2, 2], [9, 9, 9, 9, 9]], [[9, 8, 8, 8, 8], [9, 5, 4, 3, 2]]])
    np.testing.assert_allclose(evaluate.speedups(learned, adam), [1 / 4, 2])
    np.testing.assert_allclose(evaluate.speedups(adam[:, 1], adam[:, 1:]), [1 / 4, 1])
    for last in (np.nan, np.inf):  # Adam is down to that at the first look
        assert evaluate.speedups(np.float64([[9, 2, 7, last, last]]), adam[:1]) == [1 / 4]


def curves_of(learned, adam):
    curves = dict.fromkeys(evaluate.BASELINES, adam) | {"learned": learned}
    return {name: np.stack([np.float64(c)] * 2, -1) for name, c in curves.items()}


def test_a_summary_by_hand():
    learned = [[[4, 2, 2]], [[4, 3, 3]], [[4, 1, 5]], [[4, 1, np.nan]]]
    adam = [[[4, 3, 3]], [[4, 2, 2]], [[4, 4, 4]], [[4, 2, 2]]]
    result = evaluate.summary(curves_of(learned, adam))
    assert result["tasks"] == 4 and result["horizon"] == 40 and result["diverged"] == 2
    versus, tuned = result["versus"]["Adam"], result["tuned"]["Adam"]
    assert versus["win_mean"] == 2 / 4 and versus["win_final"] == 1 / 4  # tasks 0 and 2; 0
    assert tuned["test_final_loss_mean"] == (3 + 2 + 4 + 2) / 4 / 4
    assert tuned["test_mean_loss_median"] == 2.5 / 4
    # of two settings each is best on one task, the first in the mean; a third breaks on one
    adam = [[[4, 1, 1], [4, 3, 3], [4, 0, 0]], [[4, 2, 2], [4, 1, 1], [4, np.nan, 0]]]
    result = evaluate.summary(curves_of([[[4, 2, 2]]] * 2, adam))
    found = [result[regime][name]["test_final_loss_mean"] * 4
             for name in ("Adam", "learned") for regime in ("off_the_shelf", "tuned")]
    assert found == [1.5, 0.5, 2, 2]


def test_the_bootstrap_against_the_binomial_distribution():
    """Of 400 coins, 300 heads: 0.75 +- 1.96 sqrt(0.75 * 0.25 / 400)."""
    interval = 0.75 + 1.96 * np.sqrt(0.75 * 0.25 / 400) * np.array([-1, 1])
    np.testing.assert_allclose(evaluate.bootstrap(np.arange(400) < 300), interval, atol=0.006)


def test_the_fit_is_the_lowest_point_of_a_parabola_less_two_standard_errors():
    multiples, fit = evaluate.MULTIPLES, evaluate.cautious_minimum
    x = np.log(multiples)
    agreed = np.stack([3 + 0.2 * (x - np.log(0.6)) ** 2, 1 + 0.4 * (x - np.log(0.6)) ** 2])
    np.testing.assert_allclose(fit(multiples, agreed), 0.6)
    differing = np.stack([0.2 * (x - 0.1) ** 2, 0.2 * (x + 0.3) ** 2])  # -0.1 +- 0.2 / sqrt(2)
    np.testing.assert_allclose(np.log(fit(multiples, differing)), -0.1 - 2 * 0.2 / np.sqrt(2))
    assert fit(multiples, (x - 5)[None] ** 2) == multiples[-1]
    assert fit(multiples, -(x - 0.1)[None] ** 2) == multiples[0]


@pytest.mark.parametrize("target, split", [("valid", "outer_valid"), ("train", "train")])
def test_the_fit_tries_multiples_and_never_looks_at_the_test_split(target, split, monkeypatch):
    tried, key, theta = [], random.key(1), rates().init(random.key(0))
    def curves(family, make_optimizer, variants, keys, horizon):
        seen, wanted = family.batch((), key, "test"), bowl().batch((), key, split)
        np.testing.assert_array_equal(seen, wanted)
        tried.append([np.asarray(variants[name] - theta[name]) for name in ("log_bias", "log_lr")])
        later = 1 + (tried[-1][0] + 1.5) ** 2 + (tried[-1][1] + 0.2) ** 2
        losses = np.stack([np.ones(5), later, later], -1)
        return np.broadcast_to(losses[None, :, :, None], (len(keys), 5, 3, 2))
    monkeypatch.setattr(evaluate, "learning_curves", curves)
    fitted = evaluate.fit_step_size(rates(), theta, [bowl()] * 2, random.split(key, 4), 40, target)
    quarter = np.log(0.25)  # the nearest to -1.5 of the five
    np.testing.assert_allclose(tried[0], [-np.log(2) * np.arange(5), np.zeros(5)], atol=1e-5)
    np.testing.assert_allclose(tried[2], [[quarter] * 5, np.log(evaluate.MULTIPLES)], atol=1e-5)
    found = [fitted[name] - theta[name] for name in ("log_bias", "log_lr")]
    np.testing.assert_allclose(found, [quarter, -0.2], atol=0.02)


def test_the_command_writes_table_and_picture(tmp_path):
    theta = model.per_parameter_mlp(units=4).init(random.key(0))
    model.save(tmp_path / "theta.npz", "per_parameter_mlp", theta, sizes={"units": 4})
    more = "theta.npz --family function --tasks 4 --horizon 20 --json table.json".split()
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", *more], cwd=tmp_path,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "table.json").read_text())
    assert result["tasks"] == 4 and result["horizon"] == 20
    names = {*evaluate.BASELINES, "NAdamW, list of 10"}
    assert set(result["versus"]) == names and set(result["tuned"]) == names | {"learned"}
    assert result["costs"]["Adam"][1] == 4 * (1 + 2 * 64) and result["costs"]["learned"][0] > 0
    assert "times as long as Adam's" in done.stdout
    assert (tmp_path / "comparison-function.png").read_bytes().startswith(b"\x89PNG")


def my_data(shape=(28, 28), n=60, dtype=np.uint8, targets=np.int64):
    """Images (or rows) whose brightness tells the class."""
    rng, arrays = np.random.default_rng(0), {}
    for part, size in (("train", n), ("test", 20)):
        y, noise = np.arange(size) % 3, rng.uniform(0, 20, (size, *shape))
        arrays[f"x_{part}"] = (50 * y.reshape(-1, *[1] * len(shape)) + noise).astype(dtype)
        arrays[f"y_{part}"] = y.astype(targets)
    return arrays


@pytest.mark.parametrize("shape, net, dtype, targets", [
    ((64,), "mlp", np.float64, np.int64), ((28, 28), "conv", np.uint8, np.uint8),
    ((32, 32, 3), "conv", np.uint8, np.int64), ((13, 22), "conv", np.uint8, np.int64),
    ((5,), "mlp", np.float32, np.float32)])
def test_adam_learns_your_own_data(shape, net, dtype, targets):
    arrays = my_data(shape, 60, dtype, targets)
    if shape == (32, 32, 3):  # as Keras has cifar10
        arrays |= {name: y[:, None] for name, y in arrays.items() if name[0] == "y"}
    family = tasks.own(arrays, net, max_batch=16)
    curve = jax.jit(lambda key: evaluate.learning_curve(family, model.adam(0.003), key, 40))
    losses = curve(random.key(0))[:, 1]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("center, scale, dtype", [
    (1e12, 1e9, np.int64), (0, 1e39, np.float64), (1.6e9, 100, np.float64), (0, 5, ">f4")])
def test_your_own_numbers_may_be_of_any_size_and_no_row_is_in_two_splits(center, scale, dtype):
    arrays, x = my_data((3,), 60, targets=np.float32), np.random.default_rng(0).normal(size=(60, 3))
    arrays["x_train"] = (center + scale * x).astype(dtype)
    family, keys = tasks.own(arrays, max_batch=2000), random.split(random.key(0), 3)
    batches = [family.batch((), key, split) for key, split in zip(keys, data.SPLITS)]
    rows = [np.unique(np.column_stack(batch), axis=0) for batch in batches]
    assert [len(part) for part in rows] == [48, 6, 6]
    assert len(np.unique(np.concatenate(rows), axis=0)) == 60
    np.testing.assert_allclose(rows[0].mean(0), [0] * 4, atol=1e-4)
    np.testing.assert_allclose(rows[0].std(0), [1] * 4, atol=1e-3)


UNUSABLE = [
    ({"x_train": None}, "named x_train"), ({"x_train": np.array(["a"] * 60)}, "finite numbers"),
    ({"x_test": np.full((20, 28, 28), np.nan)}, "NaN"), ({"x_train": np.zeros(60)}, "shape"),
    ({"x_test": np.zeros((20, 27, 28))}, "shape"),
    ({"x_train": np.zeros((60, 28, 0)), "x_test": np.zeros((20, 28, 0))}, "shape"),
    ({"y_train": np.zeros(59, int)}, "one label or target"), ({"y_test": np.zeros(20)}, "both"),
    ({"x_train": np.zeros((5, 28, 28)), "y_train": np.arange(5)}, "at least 20"),
    ({"y_train": 1 + np.arange(60) % 3}, "from 0"), ({"y_test": np.full(20, 3)}, "from 0"),
    ({"y_train": np.zeros(60, int)}, "from 0")]


def test_unusable_data_end_in_one_sentence_and_a_picture_that_fails_leaves_the_table(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(model.LEARNED, "per_parameter_mlp", rates)
    model.save("theta.npz", "per_parameter_mlp", rates().init(random.key(0)))
    arguments = "theta.npz", "--data", "my.npz", "--json", "table.json", "--picture", "my.xyz"
    for change, words in UNUSABLE:
        np.savez("my.npz", **{k: x for k, x in (my_data() | change).items() if x is not None})
        assert words in refused("evaluate", arguments, monkeypatch, capsys)
    assert len(list(tmp_path.iterdir())) == 2
    np.savez("my.npz", **my_data())
    curves = curves_of([[[4, 2, 2]]] * 4, [[[4, 3, 3]]] * 4)
    monkeypatch.setattr(evaluate, "compare", lambda family, *_: family.name == "data" and curves)
    sentence = refused("evaluate", arguments, monkeypatch, capsys)  # only the picture is lost
    assert "The comparison is done, but could not be written: " in sentence
    assert json.loads((tmp_path / "table.json").read_text())["tasks"] == 4
