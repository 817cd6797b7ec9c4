"""The experiments' numbers against closed forms; their command line."""
import csv
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data
import experiments
import model


def meta_gradient(truncation, steps):
    """Of the linear-quadratic problem, in float64; theta is forgotten every `truncation` steps."""
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
    error = {line: float(y) for _, line, _, y in rows}
    bias = np.sum((meta_gradient(4, 16) - meta_gradient(16, 16)) ** 2)
    # starts are staggered, so each truncation is seen equally often: what is left is the bias
    np.testing.assert_allclose(error["truncated_backprop, N = 64"], bias, rtol=0.01)
    for n in (4, 64):
        assert error[f"combined, N = {n}"] < error[f"pes, N = {n}"]
    np.testing.assert_allclose(error["pes, N = 4"], 16 * error["pes, N = 64"], rtol=0.5)  # 1 / N
    assert error["combined, N = 64"] < bias


def test_the_variance_of_pes_follows_its_closed_form():
    found = {(line, s): y for _, line, s, y in experiments.history_variance(0, counts=(1, 2, 8))}
    for s in (1, 2, 8):
        closed_form = sum((t * 64 + 1) / s for t in range(1, s + 1))
        assert found["closed form", s] == closed_form
        np.testing.assert_allclose(found["measured", s], closed_form, rtol=0.15)  # +- 0.03


def test_the_quartic_is_that_of_automatic_derivatives():
    w, m = -1.2, 0.0
    for _ in range(50):
        m = 0.5 * m + jax.grad(lambda w: (w - 4) * (w - 3) * w ** 2)(w)
        w -= 0.01 * m
    np.testing.assert_allclose(
        experiments.quartic(50, 0.5), min((w - 4) * (w - 3) * w ** 2, 10), rtol=1e-3)


def test_letters_are_different_images_under_their_own_names(monkeypatch):
    monkeypatch.setattr(experiments.tasks, "own", lambda arrays, **sizes: arrays)
    arrays, drawn = experiments.letters(seed=0, images=50), data.letters()
    x, y = arrays["x_train"], arrays["y_train"]
    assert x.shape == (50, 16, 16) and (np.bincount(y) == 5).all()
    rows = {image.tobytes() for image in x}
    assert len(rows) == 50  # what came twice could be in training and in validation
    assert not rows & {image.tobytes() for image in arrays["x_test"]}
    for part, splits in (("train", data.SPLITS[:3]), ("test", data.SPLITS[3:])):
        for image, label in zip(arrays[f"x_{part}"], arrays[f"y_{part}"]):
            own = np.concatenate([drawn[f"held_out/{split}"][label] for split in splits])
            assert (own == image).all((1, 2)).any()


def test_the_command_writes_a_picture_and_a_table(tmp_path, monkeypatch, capsys):
    def rows(seed):
        yield "a panel", "a line", np.arange(2), np.array([2.5, 3.5])
        yield "a panel", "another", "word", seed

    monkeypatch.setitem(experiments.EXPERIMENTS, "landscape", rows)
    monkeypatch.setattr(sys, "argv", ["", "landscape", "--seed", "7", "--out", str(tmp_path / "new")])
    experiments.main()
    with open(tmp_path / "new" / "landscape.csv", newline="") as file:
        found = [tuple(row.values()) for row in csv.DictReader(file)]
    assert found == [("a panel", "a line", "0", "2.5"), ("a panel", "a line", "1", "3.5"),
                     ("a panel", "another", "word", "7")]
    assert (tmp_path / "new" / "landscape.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments, words", [
    (["nothing"], "invalid choice"), (["landscape", "--seed", "x"], "invalid int value"),
    (["landscape", "--theta", "any.npz"], "is not about a learned optimizer"),
    (["regularisation", "--theta", "missing.npz"], "There is no file missing.npz"),
    (["wall-clock", "--theta", "damaged.npz"], "damaged.npz is damaged or not an .npz file"),
    (["landscape", "--out", "damaged.npz/x"], "Not a directory")])
def test_wrong_uses_end_in_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.npz").write_bytes(b"no archive")
    monkeypatch.setattr(sys, "argv", ["experiments.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        experiments.main()
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and sentence.startswith("experiments.py: error: ")
    assert words in sentence and [path.name for path in tmp_path.iterdir()] == ["damaged.npz"]


def test_an_untrained_optimizer_drifts_as_adam_does(tmp_path):
    """On (x - y)^2 / 2 the distance along the valley stays as it is for SGD and for both of these."""
    path, untrained = tmp_path / "theta.npz", model.per_parameter_mlp(units=4)
    model.save(path, "per_parameter_mlp", untrained.init(jax.random.key(0)), sizes={"units": 4})
    rows = {line: y for _, line, _, y in experiments.regularisation(0, path)}
    np.testing.assert_allclose(rows["SGD"], 1, atol=1e-4)
    np.testing.assert_allclose(rows["learned"], rows["Adam"], atol=0.02)
