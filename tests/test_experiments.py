"""The experiments' numbers against closed forms; the command."""
import csv
import sys

import numpy as np
import pytest

import experiments


def test_the_variance_of_pes_follows_its_closed_form():
    found = {(line, s): y for _, line, s, y in experiments.history_variance(0, counts=(1, 2, 8))}
    for s in (1, 2, 8):
        closed_form = sum((t * 64 + 1) / s for t in range(1, s + 1))
        assert found["closed form", s] == closed_form
        np.testing.assert_allclose(found["measured", s], closed_form, rtol=0.15)  # +- 0.03


def test_the_command_writes_a_picture_and_a_table(tmp_path, monkeypatch):
    def rows(seed):
        yield "a panel", "a line", np.arange(2), np.array([2.5, 3.5])
        yield "a panel", "another", "word", seed
    monkeypatch.setitem(experiments.EXPERIMENTS, "landscape", rows)
    out = tmp_path / "new"
    monkeypatch.setattr(sys, "argv", ["", "landscape", "--seed", "7", "--out", str(out)])
    experiments.main()
    with open(out / "landscape.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["panel", "line", "x", "y"], ["a panel", "a line", "0", "2.5"],
            ["a panel", "a line", "1", "3.5"], ["a panel", "another", "word", "7"]]
    assert (out / "landscape.png").read_bytes().startswith(b"\x89PNG")


def test_own_files_are_judged_by_their_ends(monkeypatch):
    def curves(*ends):  # [2 starts, rates, 2 points, 2 splits], from each start's ends per rate
        start = np.float32([[2], [4]])
        losses = np.stack([start + np.zeros_like(ends), start * np.float32(ends)], 2)
        return losses[..., None] * np.float32([np.nan, 1])

    found = {"Adam + cosine": curves((0.4, np.nan, 2.8), (0.2, 0.1, 0.1)),
             "learned": curves([0.1], [0.001])}
    monkeypatch.setattr(experiments, "compare", lambda *how: found)
    monkeypatch.setattr(experiments.model, "load", lambda *how: (None, None))
    rows = experiments.own_data(0, "", {"mine": None})
    tuned = 0.4 * 0.1
    expected = {"Adam + cosine": 1, "Adam + cosine, one rate": (0.4 * 0.2 / tuned) ** 0.5,
                "learned": (0.1 * 0.02 / tuned) ** 0.5}
    assert {line: y for _, line, x, y in rows if isinstance(x, str)} == pytest.approx(expected)
