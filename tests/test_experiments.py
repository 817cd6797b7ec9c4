"""The experiments' numbers against closed forms; their command line."""
import os
import subprocess
import sys

import numpy as np
import pytest

import experiments
from evaluate import plt


@pytest.fixture
def axis():
    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


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


def test_the_crossover_of_bias_and_variance(axis):
    rows = experiments.crossover(axis, seed=0, count=1000)
    error = {(row["estimator"], row["pairs"], row["x"]): row["value"] for row in rows}
    for k in (1, 2, 4, 8):
        bias = np.sum((gradients(k, 16) - gradients(16, 16)) ** 2)
        # 16 pairs at staggered starts see each truncation equally often: what is left is the bias
        np.testing.assert_allclose(error["truncated_backprop", 16, k], bias, rtol=0.01)
        for n in (4, 64):
            assert error["combined", n, k] < error["pes", n, k]
        np.testing.assert_allclose(error["pes", 4, k], 16 * error["pes", 64, k], rtol=0.5)  # unbiased: it goes like 1 / N
        assert error["combined", 64, k] < bias


def test_the_variance_of_pes_follows_its_closed_form(axis):
    for row in experiments.history_variance(axis, seed=0, counts=(1, 2, 8)):
        np.testing.assert_allclose(row["value"], row["closed_form"], rtol=0.15)  # +- 0.03 by chance


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
