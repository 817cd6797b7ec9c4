"""Your own arrays or table: what they hold is read off them and said, or refused in one sentence.

`family(understood(read(path)))` is all of it.
"""
import csv
import re
from typing import Callable, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax, nn, random, tree

import machine
import parts
import tasks


class Understood(NamedTuple):
    sentence: str   # what was understood, for people
    arrays: dict    # x [n, ...], bytes stay bytes; y [n] int labels from 0, or [n, T] float32
                    # targets, standardised; rows: {split: [m] indices}, for data.SPLITS
    scale: Callable       # scale(x[rows]) -> float32, standardised by the training rows
    classes: int          # 0: targets
    constant: np.ndarray  # outputs [classes or T] of a net that is best among those always the same
    scores: dict          # {what is measured on the test set: its unit}


def require(fine, sentence):
    if not fine:
        raise ValueError(sentence)


# ---------------------------------------------------------------- files

MISSING = "", "?", "na", "nan", "n/a", "#n/a", "<na>", "null"
WORDS = {"true": 1, "false": 0} | dict.fromkeys([*MISSING, "none"], np.nan)


def column(cells):
    """Float64 where all are numbers (or missing: NaN), else text as it is."""
    try:
        plain = (cell.replace("_", "x") for cell in cells)  # Python takes 1_1 for 11
        told = (WORDS.get(cell.strip().lower(), cell) for cell in plain)
        return np.array([float(cell) for cell in told])
    except ValueError:
        return np.array(cells)


def cells_of(path):
    """-> the names of a table's columns, its rows of cells; both without what is blank."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [line for line in file if line.strip()]
        separator = max(",;\t", key="".join(lines[:1]).count)
        rows = list(csv.reader(lines, delimiter=separator, skipinitialspace=True))
    except UnicodeError:
        raise ValueError(f"{path} is not text in UTF-8: save it as such.") from None
    except (OSError, csv.Error) as error:
        raise ValueError(f"{path} can't be read as a table ({error}).") from None
    names, *rows = [[cell.strip() for cell in row] for row in rows if any(row)] or [[]]
    words = column(names).dtype.kind == "U"
    numbers = any(column([name]).dtype.kind == "f" and "." in name for name in names)
    require(rows and words and not numbers and len(set(names)) == len(names),
            f"{path} must begin with a line that names its columns, no two alike, then have rows.")
    for i, row in enumerate(rows):
        require(len(row) == len(names), f"Row {i + 1} of {path} has {len(row)} cells for "
                f"{len(names)} columns: fill it up, or put quotes around its separators.")
    return names, rows


def table(path, targets):
    """A .csv file whose first line names the columns -> {"x_<part>": ..., "y_<part>": ...}.

    The part is what a column `split` says, else "". Columns may be parted by ; or tabs, too.
    """
    names, rows = cells_of(path)
    columns = {name: column(cells) for name, cells in zip(names, zip(*rows))}
    arrays = {"a column without a name": columns.pop("")} if "" in columns else {}  # an index
    parts = columns.pop("split", np.array([""] * len(rows)))
    y = []
    for name in targets or list(columns)[-1:] or ["y"]:
        require(name in columns and len(columns) > 1, f"{path} has no column {name} to predict, or "
                f"none beside it: there are {', '.join(columns)}.")
        y.append(columns.pop(name))
    for name, cells in columns.items():
        if cells.dtype.kind == "U":
            text = next(cell for cell in cells if column([cell]).dtype.kind == "U")
            raise ValueError(f"Column {name} holds text ({text}): write numbers with a point and "
                             "without units; leave words out, or give each a column of 0 and 1.")
    x, y = np.stack(list(columns.values()), 1), np.stack(y, 1)
    for part in np.unique(parts):
        arrays |= {f"x_{part}": x[parts == part], f"y_{part}": y[parts == part]}
    return arrays


def read(path, targets=()):
    """-> {name: array} of an .npz file or a .csv table (of that, these columns are the targets).

    Nothing is ever unpickled. ValueError, one sentence, for what can't be read.
    """
    if path.lower().endswith(".csv"):
        return table(path, targets)
    require(not targets, "--target is for the columns of a .csv table.")
    try:
        return machine.read_npz(path)
    except ValueError as error:
        require("Object arrays" not in str(error), f"{path} holds Python objects, which would have "
                "to be unpickled: save labels as np.array(labels, str), numbers as floats.")
        raise


# ---------------------------------------------------------------- what an array is

PART = r"(train|test|val)?(?:ing|id|idation)?"
NAME = re.compile(fr"{PART}[_-]?(?:(x|images?|inputs?|features?|data)|y|labels?|targets?)"
                  fr"[_-]?{PART}")


def named(arrays):
    """-> {part: x}, {part: y}, names of the others: `X`, `train_images` are the x of "train".

    Of the parts "train" comes first; "val", where it comes alone, is the test set.
    """
    found, others = {}, []
    for name, array in arrays.items():
        match = NAME.fullmatch(name.lower())
        if not match:
            others.append(name)
            continue
        role = "x" if match[2] else "y", match[1] or match[3] or "train"
        require(role not in found, f"Another array means the same as {name}: rename the one that "
                "is not meant.")
        found[role] = array
    x, y = (
        {part: found[kind, part] for part in ("train", "val", "test") if (kind, part) in found}
        for kind in "xy")
    require("train" in x and x.keys() == y.keys(), "There must be x_train and y_train, and x_test "
            f"and y_test or neither; there are {', '.join(arrays) or 'no arrays'}.")
    if "test" not in x and "val" in x:
        x["test"], y["test"] = x.pop("val"), y.pop("val")
    for part in x:
        shapes = x[part].shape, y[part].shape
        require(shapes[0][:1] == shapes[1][:1] > (1,), f"x and y to {part} have shapes {shapes}: "
                "each row needs one label or target, and there must be two rows or more.")
    return x, y, others


def inputs(x):
    """-> all x together, channels last; what to say of it."""
    shape = x["train"].shape
    require(len(shape) in (2, 3, 4) and 0 not in shape
            and all(a.shape[1:] == shape[1:] for a in x.values()),
            f"x has shape {', '.join(str(a.shape) for a in x.values())}, but must be rows [n, F] or"
            " images [n, H, W] or [n, H, W, C], all of one size: reshape it.")
    require(len(x["train"]) >= 20, "There must be at least 20 rows to train on.")
    wanted = ("x must hold finite numbers: give each word a column of 0 and 1, and write NaN for "
              "what is missing.")
    require(all(a.dtype.kind in "buif" for a in x.values()), wanted)
    x, said = np.concatenate(list(x.values())), ""
    require(x.dtype.kind != "f" or not np.isinf(x).any(), wanted)
    if x.dtype.kind == "f" and np.isnan(x).any():
        said = f", of which {np.isnan(x).sum()} missing numbers take the mean"
    if x.ndim == 4:
        channels = [i for i in (1, 3) if shape[i] < min(shape[2], shape[4 - i])]
        require(channels, f"Images {shape} must have fewer channels than pixels a side, to tell "
                "them apart: reshape them to rows [n, F].")
        if channels == [1]:
            x, said = np.moveaxis(x, 1, 3), " (channels came first)" + said
    return x, " x ".join(map(str, x.shape[1:])) + " inputs" + said


def outputs(y):
    """-> all y together: [n] labels from 0 or [n, T] float64 targets; classes; what to say."""
    seen = len(y["train"])
    y = [a.reshape(len(a), -1) for a in y.values()]
    require(len({(a.shape[1], a.dtype.kind in "US") for a in y}) == 1,
            "All y must be alike: labels, or as many targets.")
    wanted = "y must hold finite numbers, or one word for each row: leave out rows without."
    require(all(a.dtype.kind in "buifUS" for a in y), wanted)
    y = np.concatenate(y)
    (n, columns), kind, how = y.shape, y.dtype.kind, ""
    text = kind in "US"
    y = y.astype(str) if text else y
    require(kind in "bui" or kind == "f" and np.isfinite(y).all()
            or text and columns == 1 and not np.isin(np.char.lower(y), MISSING).any(), wanted)
    if columns > 1 and np.isin(y, (0, 1)).all() and (y.sum(1) == 1).all():
        y, columns, kind, how = y.argmax(1), 1, "i", ", one-hot"
    names, labels = np.unique(y, return_inverse=True)
    most = n / 2  # whole numbers that hardly ever repeat are a target
    require(not text or len(names) <= most, "y is text that hardly ever repeats: write numbers "
            "with a point, and without thousands separators.")
    if kind == "f":
        most, how = min(30, n / 10) * (y == y.round()).all(), ", whole numbers, few and repeated"
    if columns > 1 or len(names) > most:
        return np.float64(y), 0, f"{columns} target{'s' * (columns > 1)}"
    labels = labels.ravel()
    lacking = np.setdiff1d(labels, labels[:seen])
    require(len(names) > 1, "There must be two classes or more in y.")
    require(not lacking.size, "All classes must be in the training data, which lack "
            f"{names[lacking[:5]]}: leave out those rows.")
    return labels, len(names), f"{len(names)} classes ({names[0]} to {names[-1]}{how})"


# ---------------------------------------------------------------- what is made of it

def split(sizes):
    """{part: n} -> {split: rows of all parts together}, what to say.

    What is not given is drawn from the training rows: a tenth of them for the test, of the others
    two tenths to validate. The optimizer is told of all those: nothing is meta-trained here.
    """
    *ends, total = np.cumsum(list(sizes.values()))
    rows = dict(zip(sizes, np.split(np.arange(total), ends)))
    train = np.random.default_rng(0).permutation(rows["train"])
    for part, tenths in {"test": 1, "val": 2}.items():
        if part not in rows:
            rows[part], train = np.split(train, [tenths * (len(train) // 10)])
    said = [f"{len(rows[part])} ({'given' if part in sizes else 'drawn from the training rows'})"
            for part in ("val", "test")]
    valid = rows["val"]
    rows = dict(train=train, inner_valid=valid, outer_valid=valid, test=rows["test"])
    return rows, f"{len(train)} rows to train on, {said[0]} to validate, {said[1]} to test"


def moments(x, rows, axis):
    """Mean and 1 / standard deviation, over that axis, of what is not NaN; 0 if it never varies.

    A few rows at a time, since float64 takes eight times the memory of bytes; and relative to the
    greatest, since the squares of some numbers would overflow.
    """
    def over(f, of=np.positive):
        chunks = np.array_split(rows, -(-len(rows) // 256))
        found = (of(np.float64(x[chunk])) for chunk in chunks)
        return f.reduce([f.reduce(chunk, axis, keepdims=True) for chunk in found])

    high, low = over(np.fmax), over(np.fmin)
    peak = np.fmax(abs(high), abs(low))
    peak = np.where(peak > 0, peak, 1)
    count = np.maximum(over(np.add, np.isfinite), 1)
    center = over(np.add, lambda x: np.nan_to_num(x / peak)) / count
    squares = over(np.add, lambda x: np.nan_to_num(x / peak - center) ** 2)
    spread = np.sqrt(squares / count)
    inverse = np.divide(1, spread, where=high > low, out=np.zeros_like(spread))
    return center * peak, inverse / peak


def understood(arrays):
    """{name: array} -> Understood; ValueError, with one sentence, for what can't be.

    Inputs are standardised, column by column or, of images, all pixels together; what is missing
    becomes the mean, what is beyond ten standard deviations counts as ten.
    """
    x, y, others = named(arrays)
    rows, counts = split({part: len(a) for part, a in x.items()})
    del arrays  # the memory
    x, size = inputs(x)
    y, classes, kinds = outputs(y)
    center, factor = moments(x, rows["train"], None if x.ndim > 2 else 0)
    scale = lambda x: ((x - center) * factor).clip(-10, 10)
    if x.dtype != np.uint8:
        x, scale = np.float32(np.nan_to_num(scale(x))), lambda x: x
    if classes:
        share = np.bincount(y[rows["test"]], minlength=classes) / len(rows["test"])
        y, constant = np.int32(y), np.log(share + 1e-30)
        scores = dict.fromkeys(("test loss", "accuracy", "balanced accuracy"), 1)
    else:
        middle, inverse = moments(y, rows["train"], 0)
        y = np.float32((y - middle) * inverse)
        varies = [np.ptp(y[rows[part]], 0).all() for part in ("train", "test")]
        require(all(varies), "A target is the same in all training or test rows: leave it out.")
        constant, scores = y[rows["test"]].mean(0), {"test loss": 1, "R^2": 1}
        for i, unit in enumerate(1 / inverse[0]):
            scores[f"RMSE {i + 1}" if len(constant) > 1 else "RMSE"] = unit
    said = f"{counts}; {size}; {kinds}" + f"; ignored: {', '.join(others)}" * bool(others)
    return Understood(said, dict(x=x, y=y, rows=rows), scale, classes, constant, scores)


# ---------------------------------------------------------------- a family of tasks

def small_net(net, shape, width, outputs):
    """An mlp or a conv net (strides of 2) of two ReLU layers, for inputs of that shape.

    -> init(task, key), forward(params, x [B, ...]) -> [B, outputs]; a ValueError if it can't be.
    """
    if net == "conv":
        if len(shape) < 2:
            raise ValueError("A conv net needs images, not rows of features: use --net mlp.")
        high, wide, channels = shape = (*shape, 1)[:3]
        width //= 2
        positions = -(-high // 4) * -(-wide // 4)  # halved twice, rounded up
        rows = 9 * channels, 9 * width, positions * width
    else:
        rows = int(np.prod(shape)), width, width
        shape = (-1,)
    layers = dict(zip(("w0", "w1", "out"), zip(rows, (width, width, outputs))))

    def init(task, key):
        params = parts.padded(key, np.sqrt(2), layers)
        params["out"] /= np.sqrt(2)
        return params

    def forward(params, x):
        x = x.reshape(len(x), *shape)
        for name in ("w0", "w1"):
            x = parts.patches(x, 2) if net == "conv" else x
            x = nn.relu(parts.dense(params, name, x))
        return parts.dense(params, "out", x.reshape(len(x), -1))

    return init, forward


def family(mine, net="mlp", width=32, max_batch=64):
    """A `small_net` on your own data, as `understood` gives them.

    Every task is another start and another order of the batches, x [B, ...] and y [B] or [B, T].
    Loss: mean cross-entropy of labels in nats, or half the squared error of targets over their
    variance. Measured are mine.scores, in units of theirs.
    """
    arrays = tree.map(jnp.asarray, mine.arrays)
    shape, outputs = arrays["x"].shape[1:], len(mine.constant)
    init, forward = small_net(net, shape, width, outputs)

    def batch(task, key, split):
        rows = task["rows"][split]
        rows = rows[random.randint(key, (max_batch,), 0, len(rows))]
        return mine.scale(task["x"][rows]), task["y"][rows]

    def loss_of(found, y):
        if mine.classes:
            return parts.cross_entropy(found, y)
        return 0.5 * jnp.mean((found - y) ** 2)

    def loss(task, params, batch):
        x, y = batch
        return loss_of(forward(params, x), y)

    def measure(task, params):
        def outputs_of(row):
            return forward(params, mine.scale(task["x"][row[None]]))[0]

        rows = task["rows"]["test"]
        found, y = lax.map(outputs_of, rows, batch_size=256), task["y"][rows]
        if mine.classes:
            hits, labels = y == jnp.argmax(found, 1), nn.one_hot(y, outputs)
            recalls = jnp.sum(labels * hits[:, None], 0) / jnp.sum(labels, 0)
            figures = jnp.mean(hits), jnp.nanmean(recalls)
        else:
            errors = jnp.mean((found - y) ** 2, 0)
            figures = 1 - jnp.mean(errors / jnp.var(y, 0)), *jnp.sqrt(errors)
        return jnp.stack([loss_of(found, y), *figures])

    def sample(key, shared=arrays):
        return shared

    return tasks.TaskFamily("data", sample, init, batch, loss, measure, lambda: (arrays,))
