"""The experiments' numbers against closed forms; their command line."""
import csv
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import experiments
import model
from evaluate import plt


def gradients(truncation, steps):
    """The meta-gradient of the linear-quadratic problem in float64; its memory of theta is lost every `truncation` steps."""
    a, b = np.array([[0.9, 0.2], [-0.3, 0.8]]), np.array([[1.0, 0.5, 0.0], [0.0, -0.5, 1.0]])
    theta, found = np.array([0.4, -0.7, 0.5]), []
    s = theta[:2]
    for t in range(steps):
        if t % truncation == 0:
            ds = np.eye(3)[:2] if t == 0 else np.zeros((2, 3))
        s, ds = a @ s + b @ theta, a @ ds + b
        found.append(s @ ds)
    return np.mean(found, 0)


def test_the_crossover_of_bias_and_variance():
    rows = experiments.crossover(seed=0, count=1000, truncations=(4,))
    error = {(row["line"], row["x"]): row["y"] for row in rows}
    k = 4
    bias = np.sum((gradients(k, 16) - gradients(16, 16)) ** 2)
    # 16 pairs at staggered starts see each truncation equally often: what is left is the bias
    np.testing.assert_allclose(error["truncated_backprop, N = 16", k], bias, rtol=0.01)
    for n in (4, 64):
        assert error[f"combined, N = {n}", k] < error[f"pes, N = {n}", k]
    np.testing.assert_allclose(error["pes, N = 4", k], 16 * error["pes, N = 64", k], rtol=0.5)  # unbiased: it goes like 1 / N
    assert error["combined, N = 64", k] < bias


def test_the_variance_of_pes_follows_its_closed_form():
    found = {(row["line"], row["x"]): row["y"] for row in experiments.history_variance(seed=0, counts=(1, 2, 8))}
    assert len(found) == 12
    for (line, x), y in found.items():
        if not line.endswith("closed form"):
            np.testing.assert_allclose(y, found[f"{line}, closed form", x], rtol=0.15)  # +- 0.03 by chance


def test_a_picture_shows_medians_and_ranges_and_words_as_points():
    rows = [{"panel": "a", "line": "learned", "x": x, "y": y} for x, y in ((1, 3.0), (2, 5.0), (1, 9.0), (1, 4.0))]
    rows += [{"panel": "b", "line": "dots", "x": "word", "y": 2.0, "low": 1.0, "high": 4.0}]
    figure = experiments.picture(rows, {"a": dict(xlabel="steps", yscale="log"), "b": dict(title="named")})
    left, right = figure.axes
    line, = left.lines
    np.testing.assert_array_equal(line.get_xydata(), [[1, 4], [2, 5]])
    assert line.get_label() == "learned" and left.get_title() == "a" and left.get_yscale() == "log" and left.get_xlabel() == "steps"
    shade = left.collections[0].get_paths()[0].vertices
    assert {tuple(v) for v in shade} >= {(1, 3), (1, 9), (2, 5)}
    assert right.get_title() == "named" and right.lines[0].get_linestyle() == "None"
    np.testing.assert_array_equal(right.collections[0].get_segments(), [[[0, 1], [0, 4]]])
    plt.close(figure)


def test_smoothing_averages_gaussian_noise_on_theta():
    x = np.linspace(-2, 2, 2001)
    middle = slice(800, 1201)  # away from the ends
    np.testing.assert_allclose(experiments.smooth(x, x, 0.1)[middle], x[middle], atol=1e-6)
    np.testing.assert_allclose(experiments.smooth(x, x ** 2, 0.1)[middle], x[middle] ** 2 + 0.01, atol=1e-4)


def test_the_quartic_episode_against_a_plain_loop():
    problem = experiments.quartic(50)
    w, m, state = -1.2, 0.0, problem.reset(None, None)
    for t in range(50):
        m = 0.5 * m + (4 * w ** 3 - 21 * w ** 2 + 24 * w)
        w -= 0.01 * m
        state, loss = problem.step({"momentum": 0.5}, state, None)
    np.testing.assert_allclose(loss / 50, min((w - 4) * (w - 3) * w ** 2, 10), rtol=1e-3)


def test_the_command_writes_a_picture_and_a_table(tmp_path, monkeypatch):
    rows = [{"x": 1, "y": 2.5}, {"x": 2, "z": "a"}]
    monkeypatch.setitem(experiments.EXPERIMENTS, "landscape", lambda seed: (plt.figure(), rows))
    monkeypatch.setattr(sys, "argv", ["experiments.py", "landscape", "--out", str(tmp_path / "new")])
    experiments.main()
    assert (tmp_path / "new" / "landscape.csv").read_text().split() == ["x,y,z", "1,2.5,", "2,,a"]
    assert (tmp_path / "new" / "landscape.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_experiment_and_a_folder_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, words in ((["nothing"], "invalid choice"), (["landscape", "--out", str(tmp_path / "file" / "x")], "Not a directory")):
        program = os.path.join(os.path.dirname(experiments.__file__), "experiments.py")
        done = subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_sgd_goes_to_the_nearest_point_of_the_valley():
    """On (x - y)^2 / 2 the sum x + y stays as it is and the difference shrinks by 1 - 2 lr in each step."""
    paths = np.array(experiments.valley_paths(model.sgd(0.01), 100))
    assert paths.shape == (49, 101, 2)
    np.testing.assert_allclose(paths[:, -1].sum(1), paths[:, 0].sum(1), atol=1e-5)
    np.testing.assert_allclose(np.diff(paths[:, -1]), 0.98 ** 100 * np.diff(paths[:, 0]), atol=1e-5)


def test_the_greedy_order_is_best_on_average_first_and_then_what_helps_most():
    values = np.array([[0, 4, 9], [9, 4, 1]])  # means 4.5, 4, 5; with the second's: 2 with the first, 2.5 with the third
    assert experiments.greedy(values, 3) == [1, 0, 2] and experiments.greedy(values, 1) == [1]


def test_the_letters_of_a_small_data_set():
    data = experiments.letter_data(50, seed=0)
    assert data["x_train"].shape == (50, 16, 16) and (np.bincount(data["y_train"]) == 5).all()
    rows = {x.tobytes() for x in data["x_train"]}
    assert len(rows) == 50  # what came twice could be in training and in validation
    assert not rows & {x.tobytes() for x in data["x_test"]} and len(data["x_test"]) == len(data["y_test"])
    for label in range(10):  # an image is filed under its own letter
        own = {x.tobytes() for split in ("train", "inner_valid", "outer_valid") for x in experiments.tasks.letters()[f"held_out/{split}"][label]}
        assert all(x.tobytes() in own for x in data["x_train"][data["y_train"] == label])


def test_the_validation_loss_can_be_replaced():
    """The optimizer inside sees what `given` makes of the loss and of all validation losses so far, where there is one."""
    seen = []
    inner = model.Optimizer(lambda params: (), lambda grads, state, params, loss, valid_loss: (seen.append(float(valid_loss)) or grads, ()))
    replaced = experiments.with_valid_loss(inner, 4, lambda loss, past, t: 10 * loss + past[0] + past[t])
    state = replaced.init({"x": np.ones(2)})
    for t, valid_loss in enumerate((1.0, np.nan, 3.0)):
        _, state = replaced.update({}, state, {}, loss=t, valid_loss=valid_loss)
    np.testing.assert_allclose(seen, [0 + 1 + 1, np.nan, 20 + 1 + 3])


def test_a_behaviour_of_no_optimizer_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        experiments.main(["regularisation", "--theta", "missing.npz"])
    assert stopped.value.code == 2 and "There is no file missing.npz" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_damaged_shipped_optimizer_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "damaged.npz").write_bytes(b"no archive")
    monkeypatch.setattr(experiments.evaluate, "PRETRAINED_MLP", str(tmp_path / "damaged.npz"))
    with pytest.raises(SystemExit) as stopped:
        experiments.main(["wall-clock", "--out", str(tmp_path)])
    assert stopped.value.code == 2 and "damaged.npz is damaged or not an .npz file" in capsys.readouterr().err


def test_a_behaviour_from_the_command_line(tmp_path):
    theta = model.per_parameter_mlp(hidden=4).init(jax.random.key(0))
    model.save(tmp_path / "theta.npz", "per_parameter_mlp", theta, sizes={"hidden": 4})
    experiments.main(["regularisation", "--theta", str(tmp_path / "theta.npz"), "--out", str(tmp_path)])
    with open(tmp_path / "regularisation.csv") as file:
        found = {row["optimizer"]: row for row in csv.DictReader(file)}
    np.testing.assert_allclose(float(found["SGD"]["distance_along_the_diagonal"]), 1, rtol=1e-4)
    assert found["SGD"]["nearer"] == found["SGD"]["farther"] == "0"


def test_an_untrained_optimizer_goes_through_the_valley_as_adam_does():
    untrained = model.per_parameter_mlp(hidden=4)
    untrained = untrained.optimizer(untrained.init(jax.random.key(0)))
    np.testing.assert_allclose(experiments.valley_paths(untrained, 20), experiments.valley_paths(model.adam(0.01), 20), atol=1e-5)
