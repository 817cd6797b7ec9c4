"""Your own data: every form of them is understood as the same, said, or refused in one sentence."""
import csv
import json
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random, tree

import evaluate
import machine
import model
import own
from test_meta_train import refused, theta  # noqa: F401


def my_data(shape=(28, 28), n=60, dtype=np.uint8, targets=np.int64, classes=3):
    """Images (or rows) whose brightness tells the class."""
    rng, arrays = np.random.default_rng(0), {}
    for part, size in (("train", n), ("test", 20)):
        y, noise = np.arange(size) % classes, rng.uniform(0, 20, (size, *shape))
        arrays[f"x_{part}"] = (50 * y.reshape(-1, *[1] * len(shape)) + noise).astype(dtype)
        arrays[f"y_{part}"] = y.astype(targets)
    return arrays


def changed(kind, f):
    """Those arrays with f of all x (or y)."""
    return lambda arrays: {name: f(a) if name[0] == kind else a for name, a in arrays.items()}


def renamed(**names):
    return lambda arrays: {names.get(name, name): a for name, a in arrays.items()}


def same(one, other):
    for k in "xy":
        np.testing.assert_array_equal(one.arrays[k], other.arrays[k])
    tree.map(np.testing.assert_array_equal, one.arrays["rows"], other.arrays["rows"])
    assert one.classes == other.classes and one.scores == other.scores


FORMS = {  # the same as my_data; what is said of it
    "one-hot": (changed("y", lambda y: np.eye(3)[y]), "3 classes (0 to 2, one-hot)"),
    "text": (changed("y", lambda y: np.array(["no", "yes", "z"])[y]), "3 classes (no to z)"),
    "bytes": (changed("y", lambda y: np.array([b"no", b"yes", b"z"])[y]), "3 classes (no to z)"),
    "from 1": (changed("y", lambda y: y + 1), "3 classes (1 to 3)"),
    "signed": (changed("y", lambda y: y - 1), "3 classes (-1 to 1)"),
    "gaps": (changed("y", lambda y: 7 * y ** 2), "3 classes (0 to 28)"),
    "large": (changed("y", lambda y: 2 ** 31 + 2 ** 32 * y), "classes (2147483648 to 10737418240)"),
    "floats": (changed("y", np.float64), "3 classes (0.0 to 2.0, whole numbers, few and repeated)"),
    "column": (changed("y", lambda y: y[:, None]), "3 classes (0 to 2)"),
    "capital": (renamed(x_train="X_train", x_test="X_test"), "48 rows"),
    "images": (renamed(x_train="train_images", y_train="train_labels", x_test="test_images",
                       y_test="test_labels"), "20 (given) to test"),
    "validation": (renamed(x_test="val_x", y_test="y_val"), "20 (given) to test"),
    "testing": (renamed(x_test="testX", y_test="testing_target"), "20 (given) to test"),
    "more": (lambda arrays: arrays | {"weights": np.ones(3), "x_mean": np.ones(1)},
             "ignored: weights, x_mean"),
    "order": (lambda arrays: dict(reversed(arrays.items())), "20 (given) to test")}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_understood_as_the_same_and_said(form):
    change, words = FORMS[form]
    found = own.understood(change(my_data()))
    same(found, own.understood(my_data()))
    assert words in found.sentence
    assert "12 (drawn from the training rows) to validate" in found.sentence
    assert "28 x 28 inputs" in found.sentence


def test_channels_may_come_first():
    last = my_data((12, 13, 3))
    first = changed("x", lambda x: np.moveaxis(x, 3, 1))(last)
    same(own.understood(first), own.understood(last))
    assert "12 x 13 x 3 inputs (channels came first)" in own.understood(first).sentence


def test_what_is_not_given_is_drawn_from_the_training_rows_and_no_row_has_two_uses():
    arrays = my_data((1,), 200, np.float64)
    arrays["x_train"][:, 0] = np.arange(200)
    both = {name: a for name, a in arrays.items() if "train" in name}
    more = arrays | {"x_val": arrays["x_test"], "y_val": arrays["y_test"]}
    for given, sizes, words in (
            (both, (144, 36, 20), "20 (drawn from the training rows) to test"),
            (renamed(x_train="X", y_train="labels")(both), (144, 36, 20), "144 rows"),
            (arrays, (160, 40, 20), "20 (given) to test"),
            (more, (200, 20, 20), "20 (given) to validate")):
        found = own.understood(given)
        rows = [found.arrays["rows"][split] for split in ("train", "inner_valid", "test")]
        assert tuple(map(len, rows)) == sizes and words in found.sentence
        assert (found.arrays["rows"]["outer_valid"] == rows[1]).all()
        assert sorted(np.concatenate(rows)) == list(range(sum(sizes)))
        seen = found.arrays["x"][rows[0]]
        np.testing.assert_allclose([seen.mean(), seen.std()], [0, 1], atol=1e-5)


@pytest.mark.parametrize("center, scale, dtype", [
    (1e12, 1e9, np.int64), (0, 1e39, np.float64), (0, 1e300, np.float64),
    (1.6e9, 100, np.float64), (0, 5, ">f4")])
def test_numbers_may_be_of_any_size(center, scale, dtype):
    arrays, x = my_data((3,), 60, targets=np.float32), np.random.default_rng(0).normal(size=(60, 4))
    x = (center + scale * x).astype(dtype)
    arrays |= {"x_train": x[:, :3], "y_train": x[:, 3] + 0.5, "y_test": x[:20, 3] + 0.5}
    mine = own.understood(arrays)
    family, key = own.family(mine, max_batch=2000), random.key(0)
    rows = np.unique(np.column_stack(family.batch(family.sample(key), key, "train")), axis=0)
    assert rows.shape == (48, 4)
    np.testing.assert_allclose(rows.mean(0), [0] * 4, atol=1e-4)
    np.testing.assert_allclose(rows.std(0), [1] * 4, atol=1e-3)
    spread = np.std(arrays["y_train"][mine.arrays["rows"]["train"]] / scale)
    np.testing.assert_allclose(mine.scores["RMSE"] / scale, spread, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_columns_that_never_vary_count_for_nothing_what_is_missing_is_the_mean(dtype):
    arrays = my_data((4,), 60, dtype)
    arrays["x_train"][:, 1], arrays["x_test"][:, 1] = 7, 64
    arrays["x_test"][0, 2] = 255  # 4 standard deviations
    arrays["x_train"][:, 3], arrays["x_test"][0, 3] = np.arange(60) == 5, 200  # 100 of them
    if dtype == np.float32:
        arrays["x_train"][3:6, 0] = arrays["x_test"][1, 2] = np.nan
    mine = own.understood(arrays)
    assert mine.arrays["x"].dtype == dtype
    train = np.float64(arrays["x_train"])[mine.arrays["rows"]["train"]]
    centers, spreads = np.nanmean(train, 0), np.nanstd(train, 0).clip(1e-9)
    expected = (arrays["x_test"] - centers) / spreads
    expected[:, 1] = 0
    found = jax.jit(mine.scale)(jnp.asarray(mine.arrays["x"]))[60:]
    np.testing.assert_allclose(found, np.nan_to_num(expected.clip(-10, 10)), rtol=1e-4, atol=1e-5)
    assert ("of which 4 missing numbers take the mean" in mine.sentence) == (dtype == np.float32)


# ---------------------------------------------------------------- tables

def write(path, arrays, columns, separator=","):
    """The arrays as a table with a column `split`, y last."""
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        out = csv.writer(file, delimiter=separator)
        out.writerow(columns)
        for part in ("train", "test"):
            for x, y in zip(arrays[f"x_{part}"], arrays[f"y_{part}"]):
                cells = ["NA" if np.isnan(value) else value for value in x.ravel()]
                out.writerow([part, *cells, *np.atleast_1d(y)])


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("targets", [np.int64, np.float32, np.str_])
def test_a_table_is_understood_as_its_arrays(targets, separator, tmp_path):
    arrays, path = my_data((3,), dtype=np.float64, targets=targets), str(tmp_path / "my.csv")
    if targets == np.float32:
        arrays = changed("y", lambda y: y + np.float32(0.25))(arrays)
    arrays["x_train"][5, 1] = np.nan
    write(path, arrays, ["split", "one", "two, or 2", "three", "y"], separator)
    same(own.understood(own.read(path)), own.understood(arrays))


def test_any_columns_of_a_table_may_be_the_targets_and_an_index_is_ignored(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "my.csv"
    values = rng.normal(size=(40, 4)).round(3)
    rows = [f"{i},{','.join(map(str, row))},{'TRUE' if i % 2 else 'false'}\n\n"
            for i, row in enumerate(values)]
    path.write_text('"",a,b,c,d,on\n' + "".join(rows))
    found = own.understood(own.read(str(path), ["c", "a"]))
    x = np.column_stack([values[:, [1, 3]], np.arange(40) % 2])
    same(found, own.understood({"x": x, "y": values[:, [2, 0]]}))
    assert "2 targets; ignored: a column without a name" in found.sentence
    assert list(found.scores) == ["test loss", "R^2", "RMSE 1", "RMSE 2"]
    last = own.understood(own.read(str(path)))
    same(last, own.understood({"x": values, "y": np.arange(40) % 2 == 1.0}))


# ---------------------------------------------------------------- what is trained, and its scores

@pytest.mark.parametrize("shape, net, dtype, targets", [
    ((28, 28), "mlp", np.uint8, np.uint8), ((13, 22, 3), "conv", np.uint8, np.int64),
    ((13, 22), "conv", np.float64, np.int64), ((5,), "mlp", np.float32, np.float32)])
def test_adam_learns_your_own_data(shape, net, dtype, targets):
    arrays = my_data(shape, 60, dtype, targets)
    if len(shape) == 3:  # as Keras has cifar10
        arrays |= {name: y[:, None] for name, y in arrays.items() if name[0] == "y"}
    if targets == np.float32:  # several
        arrays |= {name: np.stack([y, 0.5 - y], 1) for name, y in arrays.items() if name[0] == "y"}
    family = own.family(own.understood(arrays), net, max_batch=16)
    curve = jax.jit(lambda key: evaluate.run(family, model.adam(0.003), key, 40)["curves"])
    losses = curve(random.key(0))[:, 1]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("targets", [0, 2])
def test_scores_are_those_of_the_whole_test_set(targets):
    """Of two starts and settings, the chosen and the constant; against numpy, in plain units."""
    rng, n = np.random.default_rng(0), 300  # more than are taken at once
    x, y = rng.normal(size=(2 * n, 5)), rng.choice([2, 5, 6], 2 * n, p=[0.6, 0.3, 0.1])
    if targets:
        y = x[:, :2] * [10, 1e39] + rng.normal(size=(2 * n, 2)) + 3
    mine = own.understood(dict(x_train=x[:n], y_train=y[:n], x_test=x[n:], y_test=y[n:]))
    family, found = own.family(mine), np.zeros((2, 2, 2 + max(targets, 1)))
    task, seen = family.sample(random.key(0)), mine.arrays["rows"]["train"]
    inputs = (x[n:] - x[seen].mean(0)) / x[seen].std(0)
    expected = np.zeros((2, 2 + max(targets, 1)))
    for start, key in enumerate(random.split(random.key(1))):
        params = family.init(task, key)
        found[start] = [np.full(found.shape[2], np.nan), jax.jit(family.measure)(task, params)]
        p = {k: np.float64(v) for k, v in params.items()}
        h = inputs
        for name in ("w0", "w1"):
            h = np.maximum(h @ p[name] + p[f"{name}/b"], 0)
        expected[start] = plain_scores(h @ p["out"] + p["out/b"], y[n:], y[seen])
    table = evaluate.scores(family, mine, {"learned": found[:, 1:], "Adam": found})
    assert table["Adam"] == table["learned"]
    for i, values in enumerate(table["Adam"].values()):
        x = expected[:, i]
        np.testing.assert_allclose(values, [x.mean(), x.min(), x.max()], rtol=1e-4)
    constant = [mean for mean, low, high in table["best constant"].values()]
    if targets:
        spread = y[n:].std(0)
        half = 0.5 * np.mean((spread / y[seen].std(0)) ** 2)
        np.testing.assert_allclose(constant, [half, 0, *spread], rtol=1e-4, atol=1e-6)
    else:
        share = np.unique(y[n:], return_counts=True)[1] / n
        np.testing.assert_allclose(constant, [-share @ np.log(share), share.max(), 1 / 3], 1e-4)


def plain_scores(out, y, seen):
    if y.ndim > 1:
        out = out * seen.std(0) + seen.mean(0)
        squares = ((out - y) ** 2).mean(0)
        loss = 0.5 * (squares / seen.var(0)).mean()
        return loss, 1 - (squares / y.var(0)).mean(), *np.sqrt(squares)
    names, i = np.unique(y, return_inverse=True)
    logs = out - np.log(np.exp(out).sum(1, keepdims=True))
    hits = out.argmax(1) == i
    recalls = [hits[i == c].mean() for c in range(len(names))]
    return -logs[np.arange(len(y)), i].mean(), hits.mean(), np.mean(recalls)


def test_data_are_no_part_of_programs_but_of_the_names_of_what_is_kept(monkeypatch):
    monkeypatch.setattr(machine, "kept", lambda name, make: name)
    arrays, names = my_data((40,), 400), []
    for given in (arrays, changed("x", lambda x: x[:, ::-1])(arrays), arrays):
        family = own.family(own.understood(given), width=4)
        how = family, model.sgd, jnp.float32([0.1]), random.split(random.key(0), 2), 20
        names.append(evaluate.kept_runs(*how))
    assert names[0] == names[2] != names[1]
    text = evaluate.runs.lower(*how, family.shared()).as_text()
    assert "420x40xui8>" in text and "dense<\"0x" not in text


@pytest.mark.parametrize("shape", [(28, 28), (3, 32, 32), (784,)])
def test_to_understand_bytes_takes_little_memory(shape):
    tracemalloc.start()
    arrays = {"x_train": np.zeros((16000, *shape), np.uint8), "y_train": np.arange(16000) % 7}
    arrays["x_train"][::2] = 1
    size = sum(a.nbytes for a in arrays.values())
    assert own.understood(arrays).arrays["x"].dtype == np.uint8
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * size + 2 ** 25  # a thousand rows at a time as float64


# ---------------------------------------------------------------- the command line

UNUSABLE = [
    ({"x_train": None}, "x_train and y_train"), ({"y_test": None}, "x_test and y_test or neither"),
    ({"x_train": np.full((60, 28, 28), "a")}, "x must hold finite numbers"),
    ({"x_test": np.full((20, 28, 28), np.inf)}, "finite numbers"),
    ({"x_test": np.zeros((20, 28, 28), "M8[s]")}, "x must hold finite numbers"),
    ({"y_test": np.zeros(20, "M8[s]")}, "y must hold finite numbers"),
    ({"x_train": np.zeros(60)}, "reshape"), ({"x_test": np.zeros((20, 27, 28))}, "reshape"),
    ({"x_train": np.zeros((60, 28, 0)), "x_test": np.zeros((20, 28, 0))}, "reshape"),
    ({"x_train": np.zeros((60, 4, 4, 4)), "x_test": np.zeros((20, 4, 4, 4))}, "fewer channels"),
    ({"X_Train": np.zeros((60, 28, 28))}, "rename"),
    ({"y_train": np.zeros(59, int)}, "one label or target"), ({"y_test": np.zeros(19)}, "two rows"),
    ({"x_test": np.zeros((1, 28, 28)), "y_test": np.zeros(1, int)}, "two rows or more"),
    ({"x_train": np.zeros((5, 28, 28)), "y_train": np.arange(5)}, "at least 20"),
    ({"y_train": np.full(60, np.nan)}, "leave out rows"), ({"y_train": np.eye(60)}, "alike"),
    ({"y_train": np.array(["", "a", "b"] * 20), "y_test": np.array(["a"] * 20)}, "leave out rows"),
    ({"y_train": np.array(["a", "b"] * 30)}, "alike"), ({"y_test": np.full(20, 3)}, "lack [3]"),
    ({"y_train": np.zeros(60, int), "y_test": np.zeros(20, int)}, "two classes"),
    ({"y_train": np.full(60, 0.5), "y_test": np.full(20, 0.5)}, "the same in all"),
    ({"y_test": np.ones(20), "y_train": np.linspace(0, 1, 60)}, "the same in all"),
    ("a,y\n" + "".join(f'1,"{i},000"\n' for i in range(40)), "hardly ever repeats"),
    ("a,y\n" + "1,no\n2,NA\n" * 20, "leave out rows"), ("5.1,no\n" * 30, "names its columns"),
    ({"y_train": np.array([0, "a", None] * 20)}, "unpickled"), ("a,b\n1,2,3\n", "Row 1"),
    ("a,y\n" + "1,j\xe4\n2,j\xf6\n" * 20, "UTF-8"),
    ("1,2\n3,4\n", "names its columns"), ("", "names its columns"), ("a,b\n", "have rows"),
    ("a,a,b\n" + "1,2,3\n" * 20, "no two alike"), ("a,b,split\n" + "1,2,3\n" * 20, "x_train"),
    ("a,b\n" + "1,2\n5%,3\n" * 10, "a holds text (5%)"), ("a\n1\n", "none beside it"),
    ("a,b\n" + "1,2\n1_1,3\n" * 10, "a holds text (1_1)"),
    ("split\n" + "train\n" * 20, "none beside")]


def test_unusable_data_end_in_one_sentence(theta, tmp_path, monkeypatch, capsys):  # noqa: F811
    for change, words in UNUSABLE:
        if isinstance(change, str):
            (tmp_path / "my.csv").write_text(change, "latin-1")
        else:
            arrays = {k: x for k, x in (my_data() | change).items() if x is not None}
            np.savez("my.npz", **arrays)
        arguments = "theta.npz", "--data", "my.csv" if isinstance(change, str) else "my.npz"
        assert words in refused("evaluate", arguments, monkeypatch, capsys), change
    write("my.csv", my_data((3,)), ["split", "a", "b", "c", "y"])
    np.savez("my.npz", **my_data((3,)))
    for arguments, words in (
            ("--data my.csv --target z", "no column z"), ("--data my.npz --target y", "a .csv"),
            ("--target y", "needs --data"), ("--data no.csv", "can't be read"),
            ("--data my.npz --net conv", "use --net mlp"), ("--data .", "damaged")):
        assert words in refused("evaluate", ["theta.npz", *arguments.split()], monkeypatch, capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"theta.npz", "my.npz", "my.csv"}


def test_the_command_says_what_it_understood_its_progress_and_first_the_scores(
        theta, tmp_path, monkeypatch, capsys):  # noqa: F811
    def lost(*_):
        raise ValueError("no such kind of picture")
    baseline = lambda rate, horizon: model.sgd(rate), np.float32([0.01, 1])
    for name, value in dict(BASELINES={"Adam": baseline}, LISTS={}, compare_picture=lost,
                            costs=lambda *_: {"Adam": (1, 1), "learned": (1, 1)}).items():
        monkeypatch.setattr(evaluate, name, value)
    write("my.csv", my_data((3,)), ["split", "a", "b", "c", "y"])
    arguments = "theta.npz --data my.csv --horizon 20 --tasks 4 --json table.json"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments.split()])
    with pytest.raises(SystemExit):  # only the picture is lost
        evaluate.main()
    said = capsys.readouterr()
    assert "The comparison is done, but could not be written: " in said.err
    lines = said.out.splitlines()
    assert lines[0].startswith("my.csv: 48 rows to train on") and "3 inputs" in lines[0]
    assert lines[2].endswith("data: trained with Adam")
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["tasks"] == 4 and set(table["scores"]) == {"best constant", "Adam", "learned"}
    assert lines[5].split() == ["test", "loss", "accuracy", "balanced", "accuracy"]
    assert "0.35 (0.35 to 0.35)" in lines[6] and lines[6].startswith("best constant")
    mean, low, high = table["scores"]["Adam"]["accuracy"]
    assert f"{mean:.4g} ({low:.4g} to {high:.4g})" in lines[7] and low <= mean <= high
    assert said.out.index("balanced accuracy") < said.out.index("data: 4 tasks")
