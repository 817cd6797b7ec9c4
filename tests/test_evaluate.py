"""The comparison's arithmetic by hand; the command line as a user meets it."""
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

import evaluate
import machine
import model
import objective
import tasks
from test_meta_train import bowl, one_baseline, theta  # noqa: F401
from test_model import adam


def plain_curve(key, rate, splits=("train", "test")):
    """Losses [3, 2] of 40 steps of Adam on a bowl, whose gradient is known."""
    family, curve, gs = bowl(), [], []
    task_key, init_key, step_key, measure_key = random.split(key, 4)
    task = family.sample(task_key)
    params = family.init(task, init_key)
    for segment in [[], *(random.split(k, 20) for k in random.split(step_key))]:
        for k in segment:
            batch = family.batch(task, random.split(k)[0], "train")
            gs.append(np.float64(2 * task * (params["x"] - batch)))
            params = {"x": params["x"] + adam(np.array(gs), None, rate)}
        curve.append([np.mean([family.loss(task, params, family.batch(task, k, split))
                               for k in random.split(measure_key, 8)]) for split in splits])
    return np.array(curve)


def test_learning_curves_shared_out_among_devices_are_those_of_a_plain_loop():
    keys = random.split(random.key(0), 6)
    curves = evaluate.runs(bowl(), model.adam, jnp.float32([0.01, 0.1]), keys, 40)["curves"]
    assert curves.shape == (6, 2, 3, 2) and jax.device_count() == 2
    np.testing.assert_allclose(curves[4, 1], plain_curve(keys[4], 0.1), rtol=1e-3)


def test_curves_are_kept_by_content(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CACHE", tmp_path)
    def kept(*how):
        return evaluate.kept_runs(bowl(), *how, horizon=20)["curves"]

    given = model.adam, jnp.float32([0.01, 0.1]), random.split(random.key(0), 2)
    curves, (path,) = kept(*given), tmp_path.iterdir()
    machine.write_npz(path, {"curves": curves + 1})
    np.testing.assert_array_equal(kept(*given), curves + 1)
    path.write_bytes(path.read_bytes()[:100])  # a damaged copy is made again
    np.testing.assert_array_equal(kept(*given), curves)
    monkeypatch.setattr(machine, "kept", lambda name, make: {"curves": name})
    for i, other in enumerate((model.rmsprop, 2 * given[1], given[2][::-1], model.adam)):
        same = kept(*given[:i % 3], other, *given[i % 3 + 1:]) == kept(*given)
        assert same == (i == 3)


def test_a_pool_holds_what_adam_reaches_at_its_best_rate_on_each_of_its_tasks():
    keys, best = objective.make_pool(bowl(), 3, 40, "valid")
    for i, key in enumerate(random.split(random.key(2 ** 31), 3)):
        assert (random.key_data(keys[i]) == random.key_data(random.split(key, 4)[0])).all()
        curves = np.array([plain_curve(key, rate, ["outer_valid"]) for rate in evaluate.RATES])
        lowest = np.min(curves[..., 0] / curves[:, :1, 0])
        np.testing.assert_allclose(best[i], min(lowest, 0.8), rtol=1e-3)


def test_a_table_may_go_into_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    machine.write_json(tmp_path / "pipe", {"x": [1.5]})
    assert json.loads(reader.communicate(timeout=600)[0]) == {"x": [1.5]}


def test_the_baselines_settings():
    np.testing.assert_allclose(evaluate.RATES, 10 ** np.linspace(-4.5, 0, 10), rtol=1e-5)
    first = [0.068182834, 0.37871215, 0.15732057, 1.8030471e-07, 0.096204616, 0.0036154795]
    np.testing.assert_allclose(evaluate.NADAMW_LIST[0], first, rtol=1e-5)
    assert len(evaluate.NADAMW_LIST) == 10


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
    """Of these test losses, all less than 9; training losses are what they lack of that."""
    curves = dict.fromkeys(evaluate.BASELINES, adam) | {"learned": learned}
    return {name: np.stack([9 - np.float64(c), c], -1) for name, c in curves.items()}


def test_a_summary_by_hand():
    learned = [[[4, 2, 2]], [[4, 3, 3]], [[4, 1, 5]], [[4, 1, np.nan]]]
    adam = [[[4, 3, 3]], [[4, 2, 2]], [[4, 4, 4]], [[4, 2, 2]]]
    result = evaluate.summary(curves_of(learned, adam))
    assert result["tasks"] == 4 and result["horizon"] == 40 and result["diverged"] == 2
    versus, tuned = result["versus"]["Adam"], result["tuned"]["Adam"]
    assert versus["win_mean"] == 2 / 4 and versus["win_final"] == 1 / 4  # tasks 0 and 2; 0
    assert tuned["test_final_loss_mean"] == (3 + 2 + 4 + 2) / 4 / 4
    assert tuned["test_mean_loss_median"] == 2.5 / 4 and tuned["train_mean_loss_median"] == 6.5 / 4
    np.testing.assert_allclose(versus["speedup"], 0.25 ** 0.25)  # of 2, 1/2, 1/2, 1/2
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


def test_the_command_writes_table_and_picture(theta, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(tasks.FAMILIES, "mlp", {"held_out": bowl()}.get)  # no other pool
    one_baseline(monkeypatch)
    more = "theta.npz --tasks 4 --horizon 20 --json table.json".split()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *more])
    seen, plain = {}, evaluate.summary
    monkeypatch.setattr(evaluate, "summary", lambda curves: seen.update(curves) or plain(curves))
    evaluate.main()
    for curves in seen.values():  # all begin alike
        start = np.broadcast_to(seen["learned"][:, :, 0], curves[:, :, 0].shape)
        np.testing.assert_allclose(curves[:, :, 0], start, rtol=1e-5)
    result, said = json.loads(Path("table.json").read_text()), capsys.readouterr().out
    assert result["tasks"] == 4 and result["horizon"] == 20
    names = {*evaluate.BASELINES, "NAdamW, list of 10"}
    assert set(result["versus"]) == names and set(result["tuned"]) == names | {"learned"}
    assert result["costs"]["Adam"][1] == 4 * (1 + 2 * 3) and result["costs"]["learned"][0] > 0
    assert "times as long as Adam's" in said and "trained with Muon + cosine" in said
    assert Path("comparison-mlp.png").read_bytes().startswith(b"\x89PNG")
