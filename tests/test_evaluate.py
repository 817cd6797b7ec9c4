"""The comparison's arithmetic by hand, and its command line as a user meets it."""
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evaluate
import model
import tasks

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def command(*arguments, cwd):
    return subprocess.run([sys.executable, os.path.join(ROOT, "evaluate.py"), *map(str, arguments)],
                          cwd=cwd, capture_output=True, text=True, timeout=200)


def test_a_learning_curve_is_that_of_a_plain_loop():
    family, optimizer, key = tasks.mlp("held_out"), model.adam(0.01), jax.random.key(3)
    curve = jax.jit(lambda key: evaluate.learning_curve(family, optimizer, key, 40))(key)
    assert curve.shape == (3, 2)
    task_key, init_key, step_key, measure_key = jax.random.split(key, 4)
    task = family.sample(task_key)
    params = family.init(task, init_key)
    state = optimizer.init(params)

    @jax.jit
    def plain_step(params, state, key):
        batch = family.batch(task, jax.random.split(key)[0], "train")
        updates, state = optimizer.update(jax.grad(family.loss, argnums=1)(task, params, batch), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for segment in jax.random.split(step_key, 2):
        for k in jax.random.split(segment, 20):
            params, state = plain_step(params, state, k)
    measure = jax.jit(lambda k: family.loss(task, params, family.batch(task, k, "test")))
    losses = [measure(k) for k in jax.random.split(measure_key, 8)]
    np.testing.assert_allclose(curve[-1, 1], np.mean(losses), rtol=1e-3)


def test_tasks_shared_out_among_devices_match_one_at_a_time():
    family, keys = tasks.mlp("held_out"), jax.random.split(jax.random.key(0), 6)
    curves = evaluate.learning_curves(family, model.adam, jnp.float32([0.001, 0.01]), keys, 40)
    assert curves.shape == (6, 2, 3, 2) and jax.device_count() == 2
    alone = jax.jit(lambda key: evaluate.learning_curve(family, model.adam(0.01), key, 40))(keys[4])
    np.testing.assert_allclose(curves[4, 1], alone, rtol=1e-3)


def test_curves_are_kept_by_content(tmp_path, monkeypatch):
    """The same program on the same numbers is read back; other rates, tasks or steps are not; a damaged copy is made again."""
    monkeypatch.setattr(evaluate.matplotlib, "get_cachedir", lambda: str(tmp_path))
    rates, keys = jnp.float32([0.01, 0.1]), jax.random.split(jax.random.key(0), 2)
    family = tasks.TaskFamily("bowl", lambda key: jax.random.normal(key, (3,)), lambda task, key: {"x": task},
                              lambda task, key, split: jax.random.normal(key, (3,)), lambda task, p, b: jnp.sum((p["x"] - 0.1 * b) ** 2))
    curves = evaluate.kept_curves(family, model.adam, rates, keys, 20)
    np.testing.assert_array_equal(curves, evaluate.learning_curves(family, model.adam, rates, keys, 20))
    (path,) = tmp_path.iterdir()
    model.write_npz(path, {"curves": curves + 1})
    np.testing.assert_array_equal(evaluate.kept_curves(family, model.adam, rates, keys, 20), curves + 1)
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(evaluate.kept_curves(family, model.adam, rates, keys, 20), curves)
    for others in ((model.adam, 2 * rates, keys, 20), (model.adam, rates, keys[::-1], 20), (model.rmsprop, rates, keys, 20),
                   (model.adam, rates, keys, 40)):
        found = evaluate.kept_curves(family, *others)
        assert found.shape != curves.shape or (found != curves).any()
    assert len(list(tmp_path.iterdir())) == 5


def test_best_is_per_task_and_ignores_broken_runs():
    curves = np.float64([[[9, 3, 1], [9, 2, 2], [9, 0, np.nan]], [[9, 5, 4], [9, np.inf, 0], [9, 8, 8]]])  # [2, 3, 3]
    np.testing.assert_array_equal(evaluate.best(curves, evaluate.final_loss), [1, 4])
    np.testing.assert_array_equal(evaluate.best(curves, evaluate.mean_loss), [2, 4.5])


def test_speedup_by_hand():
    # Task 0: tuned Adam (ends at 2) reaches the learned one's final 4 after 20 of 80 steps: 1/4 as fast.
    # Task 1: Adam never reaches 1; the learned one reaches Adam's final 2 after 40 steps: 2 times as fast.
    learned = np.float64([[9, 8, 7, 6, 4], [9, 3, 2, 1.5, 1]])
    adam = np.float64([[[9, 4, 3, 2, 2], [9, 9, 9, 9, 9]], [[9, 8, 8, 8, 8], [9, 5, 4, 3, 2]]])
    np.testing.assert_allclose(evaluate.speedups(learned, adam), [1 / 4, 2])
    np.testing.assert_allclose(evaluate.speedups(adam[:, 1], adam[:, 1:]), [1 / 4, 1])
    for last in (np.nan, np.inf):  # Adam is down to that at the first look
        assert evaluate.speedups(np.float64([[9, 2, 7, last, last]]), adam[:1]) == [1 / 4]


def curves_of(learned, adam):
    both = lambda c: np.stack([np.float64(c)] * 2, -1)
    return {name: both(adam) for name in evaluate.BASELINES} | {"learned": both(learned)}


def test_summary_counts_wins_and_divergence():
    learned = [[[4, 2, 2]], [[4, 3, 3]], [[4, 1, 5]], [[4, 1, np.nan]]]
    adam = [[[4, 3, 3]], [[4, 2, 2]], [[4, 4, 4]], [[4, 2, 2]]]
    result = evaluate.summary(curves_of(learned, adam))
    assert result["tasks"] == 4 and result["horizon"] == 40 and result["diverged"] == 2
    assert result["versus"]["Adam"]["win_mean"] == 2 / 4   # tasks 0 and 2
    assert result["versus"]["Adam"]["win_final"] == 1 / 4  # task 0
    np.testing.assert_allclose(result["tuned"]["Adam"]["test_final_loss_mean"], (3 + 2 + 4 + 2) / 4 / 4)
    np.testing.assert_allclose(result["tuned"]["Adam"]["test_mean_loss_median"], 2.5 / 4)


def test_off_the_shelf_is_one_setting_for_all_tasks():
    """Of two settings each is best on one task; the first is better in the mean; a third breaks on one and is never taken."""
    adam = [[[4, 1, 1], [4, 3, 3], [4, 0, 0]], [[4, 2, 2], [4, 1, 1], [4, np.nan, 0]]]
    result = evaluate.summary(curves_of([[[4, 2, 2]]] * 2, adam))
    np.testing.assert_allclose(result["off_the_shelf"]["Adam"]["test_final_loss_mean"], 1.5 / 4)
    np.testing.assert_allclose(result["tuned"]["Adam"]["test_final_loss_mean"], 0.5 / 4)
    np.testing.assert_allclose(result["off_the_shelf"]["learned"]["test_final_loss_mean"], 2 / 4)


def test_the_bootstrap_against_the_binomial_distribution():
    """Of 400 coins, 300 heads: 0.75 +- 1.96 sqrt(0.75 * 0.25 / 400)."""
    low, high = evaluate.bootstrap(np.arange(400) < 300)
    np.testing.assert_allclose([low, high], 0.75 + 1.96 * np.sqrt(0.75 * 0.25 / 400) * np.array([-1, 1]), atol=0.006)


def test_costs_tell_a_dear_optimizer_from_a_cheap_one():
    """One that does SGD's work 200 times over, and one whose state is three times the parameters."""
    def update(grads, state, params, **extra):
        turn = lambda i, g: jax.tree.map(lambda x: jnp.sin(x) + 0.5, g)
        return jax.lax.fori_loop(0, 2000, turn, grads), state
    dear = model.Optimizer(lambda params: jnp.zeros((3, sum(x.size for x in jax.tree.leaves(params)))), update)
    found = evaluate.costs(tasks.function(), {"SGD": model.sgd(0.0), "dear": dear}, steps=20, turns=3)
    assert found["dear"][0] > 5 * found["SGD"][0] > 0
    assert found["SGD"][1] == 0 and found["dear"][1] == 3 * 4 * 64


def test_the_searches_are_inside_their_ranges_and_nadamw_reads_them():
    """The NAdamW of a list is the one of model.py, and its rate ends at zero."""
    settings = evaluate.NADAMW_DRAWS
    assert all(0 < x.min() and x.max() <= 1 for x in settings.values()) and (settings["b1"] < 0.1).any()
    one = {name: x[7] for name, x in settings.items()}
    params, grads = {"x": jnp.ones(3)}, {"x": jnp.float32([1, -2, 3])}
    listed = evaluate.nadamw(one, horizon=10)
    plain = model.nadamw(float(one["learning_rate"]), 1 - float(one["b1"]), 1 - float(one["b2"]), float(one["eps"]),
                         weight_decay=float(one["weight_decay"]), warmup=10 * float(one["warmup"]), horizon=10)
    mine, theirs = listed.init(params), plain.init(params)
    for _ in range(11):
        (update, mine), (other, theirs) = listed.update(grads, mine, params), plain.update(grads, theirs, params)
        np.testing.assert_allclose(update["x"], other["x"], rtol=1e-3)
    np.testing.assert_allclose(update["x"], 0, atol=1e-7)


@pytest.fixture(scope="module")
def theta(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "theta.npz"
    sizes = {"hidden": 4}
    model.save(path, "per_parameter_mlp", model.per_parameter_mlp(**sizes).init(jax.random.key(0)), sizes=sizes)
    return path


def test_the_command_writes_table_and_picture(theta, tmp_path):
    done = command(theta, "--family", "one_example", "--tasks", 4, "--horizon", 20, "--json", tmp_path / "table.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "table.json").read_text())
    assert result["tasks"] == 4 and result["horizon"] == 20 and result["diverged"] == 0
    assert {"win_mean", "win_final", "speedup"} <= set(result["versus"]["Adam"])
    assert set(result["tuned"]) == set(result["versus"]) | {"learned"} == {
        "SGD", "momentum", "RMSProp", "Adam", "Adam + cosine", "Muon + cosine", "NAdamW, list of 10", "Adam8p, 10 draws", "learned"}
    assert "times as long as Adam's" in done.stdout
    assert "learned" in done.stdout and (theta.parent / "comparison-one_example.png").read_bytes()[:4] == b"\x89PNG"


def my_data(shape=(28, 28), n=60, dtype=np.uint8, targets=np.int64):
    """Images (or rows) whose brightness tells the class."""
    rng = np.random.default_rng(0)
    y = {"train": np.arange(n) % 3, "test": np.arange(20) % 3}
    bright = {part: v.reshape(-1, *[1] * len(shape)) * np.ones(shape) for part, v in y.items()}
    return ({f"x_{part}": (50 * b + rng.uniform(0, 20, b.shape)).astype(dtype) for part, b in bright.items()}
            | {f"y_{part}": v.astype(targets) for part, v in y.items()})


@pytest.mark.parametrize("shape, net, dtype, targets", [
    ((64,), "mlp", np.float64, np.int64),          # scikit-learn's digits
    ((28, 28), "mlp", np.uint8, np.uint8), ((28, 28), "conv", np.uint8, np.uint8),
    ((32, 32, 3), "conv", np.uint8, np.int64), ((13, 22), "conv", np.uint8, np.int64), ((5,), "mlp", np.float32, np.float32)])
def test_adam_learns_your_own_data(shape, net, dtype, targets):
    arrays = my_data(shape, 60, dtype, targets)
    if shape == (32, 32, 3):
        arrays |= {name: y[:, None] for name, y in arrays.items() if name[0] == "y"}  # as Keras has cifar10
    family, adam = tasks.dataset(arrays, net, max_batch=16), model.adam(0.003)
    keys = jax.random.split(jax.random.key(0), 40)
    inner = tasks.init_inner(family, adam, (), keys[0])
    batch = family.batch((), keys[0], "test")
    begin = family.loss((), inner.params, batch)
    if targets == np.float32:
        y = np.float64(arrays["y_train"])
        assert abs(family.batch((), keys[0], "train")[1].mean()) < 1 and abs(batch[1].max() - (2 - y.mean()) / y.std()) < 0.1
    step = jax.jit(lambda inner, key: tasks.inner_step(family, adam, (), inner, key))
    for key in keys:
        inner = step(inner, key)
    assert family.loss((), inner.params, batch) < 0.3 * begin


@pytest.mark.parametrize("center, scale, dtype", [(1e12, 1e9, np.int64), (0, 1e39, np.float64), (1.6e9, 100, np.float64), (0, 5, ">f4")])
def test_your_own_numbers_may_be_of_any_size(center, scale, dtype):
    x = (center + scale * np.random.default_rng(0).normal(size=(400, 3))).astype(dtype)
    family = tasks.dataset(my_data((3,), 400) | {"x_train": x, "x_test": x[:20]}, max_batch=4000)
    inputs = np.array(family.batch((), jax.random.key(0), "train")[0])
    np.testing.assert_allclose([inputs.mean(), inputs.std()], [0, 1], atol=0.05)


def test_the_splits_of_your_own_data_share_no_row():
    arrays = my_data((2,), 60)
    arrays["x_train"] = np.float32(np.arange(60)[:, None] * [1, 0])
    family = tasks.dataset(arrays, max_batch=2000)
    rows = {split: set(np.array(family.batch((), jax.random.key(0), split)[0][:, 0]).round(4).tolist()) for split in tasks.SPLITS[:3]}
    assert [len(rows[split]) for split in tasks.SPLITS[:3]] == [48, 6, 6] and len(set.union(*rows.values())) == 60


def test_the_command_takes_your_own_data_and_keeps_the_table_where_the_picture_fails(theta, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "my.npz", **my_data((8, 8)))
    arguments = theta, "--data", "my.npz", "--tasks", 4, "--horizon", 20, "--json", "table.json", "--picture", "my.xyz"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    assert stopped.value.code == 2 and json.loads((tmp_path / "table.json").read_text())["tasks"] == 4
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("evaluate.py: error: The comparison is done, but could not be written: ")


@pytest.mark.parametrize("change, words", [
    ({"x_train": None}, "lack x_train"), ({"x_train": np.array(["a"] * 60)}, "finite numbers"),
    ({"x_test": np.full((20, 28, 28), np.nan)}, "NaN"), ({"x_test": np.zeros((20, 27, 28))}, "shape"), ({"x_train": np.zeros(60)}, "shape"),
    ({"x_train": np.zeros((60, 28, 0)), "x_test": np.zeros((20, 28, 0))}, "shape"),
    ({"y_train": np.zeros(59, int)}, "one target"), ({"y_test": np.zeros(20)}, "both"),
    ({"x_train": np.zeros((5, 28, 28)), "y_train": np.arange(5)}, "at least 20"),
    ({"y_train": 1 + np.arange(60) % 3}, "from 0"), ({"y_test": np.full(20, 3)}, "from 0"), ({"y_train": np.zeros(60, int)}, "from 0")])
def test_unusable_data_end_in_one_sentence(change, words):
    arrays = {name: a for name, a in (my_data() | change).items() if a is not None}
    with pytest.raises(ValueError, match=words) as error:
        tasks.dataset(arrays)
    assert "\n" not in str(error.value)


def test_user_errors_end_in_one_sentence(theta, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign.npz").write_bytes(b"PK not really")
    np.savez(tmp_path / "other.npz", x=np.ones(2))
    for arguments in (["--tasks", 3], ["missing.npz"], ["foreign.npz"], ["other.npz"], [theta, "--tasks", 0], [theta, "--horizon", 30],
                      [theta, "--nonsense"], [theta, "--tasks", "many"], [theta, "--family", "chess"], [theta, "--data", "missing.npz"],
                      [theta, "--data", "other.npz"], [theta, "--seed", 2 ** 31],
                      [theta, "--picture", "no/such/folder/picture.png"], [theta, "--json", "no/such/folder/table.json"]):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            evaluate.main()
        sentence = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and sentence.startswith("evaluate.py: error: "), (arguments, sentence)


def begin(kind):
    """A task of that kind, its parameters (biases shaken), and a training batch."""
    family = evaluate.KINDS[kind]()
    task = family.sample(jax.random.key(1))
    params = family.init(task, jax.random.key(2))
    params = {k: p + 0.1 if k.endswith("/b") else p for k, p in params.items()}
    return family, task, params, family.batch(task, jax.random.key(3), "train")


def as_float64(tree):
    return jax.tree.map(lambda x: np.float64(x) if x.dtype == jnp.float32 else np.array(x), tree)


def test_the_mlp_beyond_its_training():
    family, task, params, _ = begin("wide_and_deep")
    assert task.depth == 4 and all((params[f"w{i}"] != 0).all() for i in range(5)) and params["w3"].shape == (128, 128)
    family, task, _, (_, _, weight) = begin("one_example")
    assert weight.sum() == 1
    family, task, _, (x, y, weight) = begin("full_batch")
    again = family.batch(task, jax.random.key(4), "train")
    assert weight.sum() == len(x) == 256 and jnp.array_equal(x, again[0]) and jnp.array_equal(y, again[1])
    assert not jnp.array_equal(*(family.batch(task, jax.random.key(i), "test")[0] for i in (3, 4)))


def test_the_residual_net_against_xla_s_convolution():
    family, task, params, batch = begin("residual")
    p, (x, y, weight) = as_float64(params), as_float64(batch)

    def conv(name, x, stride):
        pad = ((1, 0), (1, 0)) if stride == 2 else ((1, 1), (1, 1))
        return np.float64(jax.lax.conv_general_dilated(np.float32(x), np.float32(p[name]).reshape(3, 3, -1, 12), (stride, stride), pad,
                                                       dimension_numbers=("NHWC", "HWIO", "NHWC"))) + p[name + "/b"]

    h = conv("in", x.reshape(-1, 8, 8, 1), 2)
    for i in range(2):
        h = h + conv(f"block{i}/1", np.maximum(conv(f"block{i}/0", np.maximum(h, 0), 1), 0), 1)
    logits = np.maximum(h, 0).mean((1, 2)) @ p["out"] + p["out/b"]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]
    np.testing.assert_allclose(jax.jit(family.loss)(task, params, batch), np.average(losses, weights=weight), rtol=1e-4)


def test_the_transformer_against_a_plain_computation():
    family, task, params, batch = begin("transformer")
    p, characters = as_float64(params), np.array(batch)
    normal = lambda h: (h - h.mean()) / np.sqrt(h.var() + 1e-5)
    losses = []
    for line in characters:
        h = [p["embed"][c] + p["place"][t] for t, c in enumerate(line[:-1])]
        q, k, v = (np.stack([normal(x) @ p[name] for x in h]).reshape(16, 2, 12) for name in ("query", "key", "value"))
        for t in range(16):
            heads = []
            for i in range(2):
                score = np.exp(k[:t + 1, i] @ q[t, i] / np.sqrt(12))
                heads.append(score / score.sum() @ v[:t + 1, i])
            x = h[t] + np.concatenate(heads) @ p["mix"]
            x = x + np.maximum(normal(x) @ p["up"], 0) @ p["down"]
            logits = normal(x) @ p["out"]
            losses.append(np.log(np.exp(logits).sum()) - logits[line[t + 1]])
    np.testing.assert_allclose(jax.jit(family.loss)(task, params, batch), np.mean(losses), rtol=1e-4)


def test_a_learned_optimizers_own_training_against_a_loop():
    family, task, theta, keys = begin("own_training")
    functions, optimizer, losses = tasks.function("held_out"), model.per_parameter_mlp(hidden=8).optimizer(theta), []
    value = jax.jit(lambda task, inner: functions.loss(task, inner.params, functions.batch(task, jax.random.key(0), "test")))
    step = jax.jit(lambda task, inner, key: tasks.inner_step(functions, optimizer, task, inner, key))
    for key in keys:
        task_key, init_key, key = jax.random.split(key, 3)
        inner_task = functions.sample(task_key)
        inner = tasks.init_inner(functions, optimizer, inner_task, init_key)
        start = value(inner_task, inner)
        for k in jax.random.split(key, 20):
            inner = step(inner_task, inner, k)
            losses.append(np.sqrt(min(value(inner_task, inner) / start, 10) + 1e-6))
    np.testing.assert_allclose(jax.jit(family.loss)(task, theta, keys), np.mean(losses), rtol=1e-3)
