"""Compare a learned optimizer, the shipped one or your own, with tuned hand-designed ones:
`python evaluate.py [theta.npz]`.

The tasks are held out (letters, and on the test split fonts, that meta-training never saw). Every
optimizer starts from the same parameters, sees the same batches and may know how many steps there
will be. Every baseline is tuned per task, with hindsight, anew for each figure: the best of ten
learning rates counts or, of NAdamW, of ten settings of all that it has. The learned optimizer runs
once, untuned.
"""
import argparse
import functools
import hashlib
import itertools
import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import random, tree
from matplotlib.figure import Figure

import kinds
import machine
import model
import own
import tasks

PRETRAINED = str(Path(__file__).with_name("pretrained.npz"))
EVERY = 20    # steps between two measurements
BATCHES = 8   # batches a measurement averages over, the same ones each time
RATES = np.float32(np.logspace(-4.5, 0, 10))


# ---------------------------------------------------------------- the baselines

# Learning rate, 1 - b1, 1 - b2, eps, weight decay, warm-up as a share of the horizon: ten of 200
# random settings, the best ones together on meta-training tasks of all families, best first.
LOWEST = np.array([1e-4, 1e-2, 1e-4, 1e-9, 1e-5, 1e-3])
HIGHEST = [1, 1, 1, 1e-2, 1, 0.3]
CHOSEN = [43, 174, 185, 113, 75, 117, 52, 194, 179, 162]
DRAWS = np.random.default_rng(0).uniform(size=(200, 6))[CHOSEN]
NADAMW_LIST = np.float32(LOWEST * (HIGHEST / LOWEST) ** DRAWS)


def nadamw(setting, horizon):
    """NAdamW at one of NADAMW_LIST."""
    rate, decay1, decay2, eps, weight_decay, warmup = setting
    return model.nadamw(rate, 1 - decay1, 1 - decay2, eps, weight_decay=weight_decay,
                        warmup=warmup * horizon, horizon=horizon)


BASELINES = {  # name: (optimizer(setting, horizon), settings)
    "SGD": (lambda rate, horizon: model.sgd(30 * rate), RATES),
    "momentum": (lambda rate, horizon: model.momentum(3 * rate), RATES),
    "RMSProp": (lambda rate, horizon: model.rmsprop(rate), RATES),
    "Adam": (lambda rate, horizon: model.adam(rate), RATES),
    "Adam + cosine": (lambda rate, horizon: model.adam(rate, horizon=horizon), RATES),
    "Muon + cosine": (lambda rate, horizon: model.muon(rate, 0.8, horizon), RATES),
}
LISTS = {  # not in every comparison: settings are no learning rates, and it takes long
    "NAdamW, list of 10": (nadamw, NADAMW_LIST)}


# ---------------------------------------------------------------- learning curves

def train(family, optimizer, task, inner, key, steps):
    """-> Inner after so many steps more."""
    def step(inner, key):
        return tasks.inner_step(family, optimizer, task, inner, key), None
    return jax.lax.scan(step, inner, random.split(key, steps))[0]


def run(family, optimizer, key, horizon, shared=()):
    """Train one sampled task -> mean losses on train and test batches; what the family measures."""
    task_key, init_key, step_key, measure_key = random.split(key, 4)
    task = family.sample(task_key, *shared)

    def measure(inner):
        def losses(key):
            batches = family.batch(task, key, "train"), family.batch(task, key, "test")
            return jnp.stack([family.loss(task, inner.params, batch) for batch in batches])
        return jnp.mean(jax.vmap(losses)(random.split(measure_key, BATCHES)), 0)

    def segment(inner, key):
        inner = train(family, optimizer, task, inner, key, EVERY)
        return inner, measure(inner)

    start = tasks.init_inner(family, optimizer, task, init_key)
    end, losses = jax.lax.scan(segment, start, random.split(step_key, horizon // EVERY))
    return {"curves": jnp.vstack([measure(start), losses]),  # [1 + horizon / EVERY, 2]
            "measured": family.measure(task, end.params)}


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def runs(family, make_optimizer, settings, keys, horizon, shared=()):
    """`run` of every task (keys [n]) at each of h settings, stacked -> [n, h, ...].

    settings: a pytree of arrays [h, ...]; make_optimizer(one of them) -> Optimizer.
    """
    def at_each(given, key):
        settings, shared = given

        def at(setting):
            return run(family, make_optimizer(setting), key, horizon, shared)

        return machine.over_rows(at, settings)

    return machine.over_devices(at_each, len(keys), alone=True)((settings, shared), keys)


def kept_runs(family, make_optimizer, settings, keys, horizon):
    """`runs`, kept on disk for when the same program meets the same numbers again."""
    shared = family.shared()
    program = runs.lower(family, make_optimizer, settings, keys, horizon, shared)
    content = hashlib.sha256(program.as_text().encode())
    for numbers in tree.leaves((settings, random.key_data(keys), shared)):
        content.update(np.ascontiguousarray(numbers))

    return machine.kept(f"curves_{content.hexdigest()}", lambda: tree.map(
        np.asarray, program.compile()(settings, keys, shared)))


def compared(family, learned, theta, num_tasks, horizon, seed=0, baselines=BASELINES):
    """All on the same tasks -> {name: curves}, {name: what is measured}, as of `runs`; "learned",
    the last, has one setting."""
    keys, found = random.split(random.key(seed), num_tasks), {}
    for name, (make, settings) in baselines.items():
        make = functools.partial(make, horizon=horizon)
        found[name] = kept_runs(family, make, settings, keys, horizon)
        print(f"{time.strftime('%X')} {family.name}: trained with {name}", flush=True)
    one = tree.map(lambda x: x[None], theta)
    found["learned"] = runs(family, learned.optimizer, one, keys, horizon, family.shared())
    return [{name: np.asarray(run[kind]) for name, run in found.items()}
            for kind in ("curves", "measured")]


def compare(*how):
    """-> {name: [tasks, settings, points, 2]} of `compared`."""
    return compared(*how)[0]


# ---------------------------------------------------------------- what they amount to

def mean_loss(losses):
    return losses[..., 1:].mean(-1)


def final_loss(losses):
    return losses[..., -1]


VALUES = {"mean": mean_loss, "final": final_loss}


def figures(curves, value):
    """value(losses [..., points]) of every run; infinite if one of its losses is not finite."""
    return np.where(np.isfinite(curves).all(-1), value(curves), np.inf)


def best(curves, value):
    """value(losses) of each task at its best setting: [n, h, points] -> [n]."""
    return figures(curves, value).min(1)


def tuned(curves, value):
    """The losses of each task at its best setting: [n, h, points] -> [n, points]."""
    return curves[np.arange(len(curves)), figures(curves, value).argmin(1)]


def steps_to(curves, losses):
    """The first measurement, after the start, where a curve is down to its loss, or inf: [n]."""
    reached = curves <= losses[:, None]
    first = np.maximum(reached.argmax(1), 1)
    return np.where(reached.any(1), first, np.inf)


def speedups(learned, adam):
    """How many times fewer steps the learned optimizer needs than tuned Adam (or another): [n].

    learned [n, points], adam [n, h, points], test losses. If Adam gets down to the loss the learned
    one ends at, in s of the T steps, the task counts s / T; if it never does, the learned one
    needed s' steps to Adam's final loss: T / s'. A learned run that is not finite ends at infinity:
    s is EVERY.
    """
    end = learned.shape[1] - 1
    adam = tuned(adam, final_loss)
    theirs = steps_to(adam, figures(learned, final_loss))
    mine = steps_to(learned, adam[:, -1])
    return np.where(theirs <= end, theirs / end, end / np.minimum(mine, end))


def bootstrap(x):
    """The central 95% of the mean of x [n], if n of its entries are drawn anew -> [low, high]."""
    rng = np.random.default_rng(0)
    means = rng.choice(x, (2000, len(x))).mean(1)
    return np.quantile(means, (0.025, 0.975)).tolist()


def losses_of(curves, pick):
    """A row of `summary`; pick(figures [n, h]) takes one setting's for each task."""
    row = {}
    for i, split in enumerate(("train", "test")):
        for name, value in VALUES.items():
            x = pick(figures(curves[..., i], value))
            row[f"{split}_{name}_loss_mean"] = float(x.mean())
            row[f"{split}_{name}_loss_median"] = float(np.median(x))
    return row


def versus(learned, other):
    """Another row of `summary`; test losses [n, 1, points] and [n, h, points]."""
    row = {}
    for name, value in VALUES.items():
        wins = best(learned, value) < best(other, value)
        row |= {f"win_{name}": wins.mean(), f"win_{name}_95": bootstrap(wins)}
    logs = np.log(speedups(learned[:, 0], other))
    interval = np.exp(bootstrap(logs))
    return row | {"speedup": np.exp(logs.mean()), "speedup_95": interval.tolist()}


def summary(curves):
    """The comparison as a dict for JSON (what diverged is Infinity there).

    tuned, off_the_shelf: each optimizer's losses, relative to the test loss at the start; of the
    whole training (mean_loss) or its end (final_loss); mean or median over tasks; at the best
    setting for each task and figure, or at the one that is best in the mean over tasks.
    versus: against each baseline, tuned, the share of tasks where the learned optimizer's test loss
    is lower, and the geometric mean of `speedups`; with _95, what holds 95% of what other tasks
    might give (`bootstrap`).
    diverged: runs of the learned optimizer with a loss that is not finite, or a test loss that ends
    above its start.
    """
    learned = curves["learned"]
    test, start = learned[..., 1], learned[:, :, :1, 1:]
    finite = np.isfinite(learned).all((1, 2, 3))
    fine = finite & (test[:, 0, -1] <= test[:, 0, 0])
    at_best, off_the_shelf, against = {}, {}, {}
    for name, c in curves.items():
        losses = c / start
        at_best[name] = losses_of(losses, lambda x: x.min(1))
        off_the_shelf[name] = losses_of(losses, lambda x: x[:, x.mean(0).argmin()])
        if name != "learned":
            against[name] = versus(test, c[..., 1])
    return {
        "tasks": len(fine),
        "horizon": (test.shape[2] - 1) * EVERY,
        "diverged": int((~fine).sum()),
        "tuned": at_best,
        "off_the_shelf": off_the_shelf,
        "versus": against}


def scores(family, mine, measured):
    """{name: [starts, settings, S]} -> {name: {score: (mean, lowest, highest) over the starts}}, on
    your own data, at the setting with the lowest mean test loss."""
    task = family.sample(random.key(0))
    params = tree.map(jnp.zeros_like, family.init(task, random.key(0)))
    params["out/b"] = jnp.float32(mine.constant)
    constant = jax.jit(family.measure)(task, params)
    units, table = list(mine.scores.values()), {}
    for name, x in {"best constant": constant[None, None], **measured}.items():
        losses = np.nan_to_num(x[..., 0], nan=np.inf).mean(0)
        x = np.float64(x[:, losses.argmin()]).round(6) * units
        ranges = zip(x.mean(0), x.min(0), x.max(0))
        table[name] = dict(zip(mine.scores, ranges))
    return table


def print_scores(table):
    """The table of `scores`."""
    print("\nall test data: mean over starts (lowest to highest); one setting, the best, for all")
    print(f"{'':20}" + "".join(f"{score:>28}" for score in table["learned"]))
    for name, row in table.items():
        cells = ("{:.4g} ({:.4g} to {:.4g})".format(*values) for values in row.values())
        print(f"{name:20}" + "".join(f"{cell:>28}" for cell in cells))


def costs(family, optimizers, steps=50):
    """{name: (seconds of an inner step, bytes of the state)}: medians of runs taken in turn."""
    key = random.key(0)
    task, runs, sizes = family.sample(key), [], []
    for optimizer in optimizers.values():
        inner = tasks.init_inner(family, optimizer, task, key)
        many = jax.jit(functools.partial(train, family, optimizer, steps=steps))
        runs.append(functools.partial(many, task, inner, key))
        sizes.append(sum(x.nbytes for x in tree.leaves(inner.opt_state)))

    def seconds(run):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - begin

    times = [[seconds(run) for run in runs] for _ in range(10)]
    medians = np.median(times[1:], 0) / steps  # the first runs compiled
    return dict(zip(optimizers, zip(medians, sizes)))


def print_summary(name, result):
    """The tables of `summary`."""
    print(f"\n{name}: {result['tasks']} tasks, {result['horizon']} steps; "
          "losses relative to the start")
    print(f"{'train: mean loss':>38}{'final loss':>18}{'test: mean loss':>18}{'final loss':>18}")
    regimes = {"off_the_shelf": "one setting for all", "tuned": "best for each task"}
    for regime, label in regimes.items():
        print(f"{label:20}" + f"{'mean':>9}{'median':>9}" * 4)
        for name, row in result[regime].items():
            print(f"{name:20}", *(f"{x:8.3f}" for x in row.values()))
    print(f"{'learned, against':20}{'lower mean test loss':>24}{'lower final test loss':>24}"
          f"{'times as fast':>24}")
    for name, row in result["versus"].items():
        line = f"{name:20}"
        for key, form in {"win_mean": ".0%", "win_final": ".0%", "speedup": ".2f"}.items():
            low, high = row[f"{key}_95"]
            cell = f"{row[key]:{form}} ({low:{form}} to {high:{form}})"
            line += f"{cell:>24}"
        print(line)
    print(f"diverged runs of the learned optimizer (not finite, or ending above the start): "
          f"{result['diverged']}")


# ---------------------------------------------------------------- pictures

def picture(path, rows, looks, special={}):
    """The only plotter of the program: rows (panel, line, x, y) as a picture in the file `path`.

    A line goes through the medians of the rows that share an x, their range is shaded; where x is a
    word, a marker takes the line's place. looks: what axis.set is told of all panels; special:
    of the panel of that name instead. ValueError for a kind of file that matplotlib can't write.
    """
    panels = {}
    for panel, line, x, y in rows:
        points = panels.setdefault(panel, {}).setdefault(line, {})
        points.setdefault(x, []).append(y)
    n = len(panels) or 1
    columns = {1: 1, 2: 2, 4: 2, 5: 5}.get(n, 3)
    down = -(-n // columns)
    figure = Figure((4.5 * columns, 3.6 * down), layout="constrained")
    colors = {"learned": "C3"}
    unused = itertools.cycle("C0 C1 C2 C4 C5 C6 C7 C8 C9 k".split())
    for i, panel in enumerate(panels):
        axis = figure.add_subplot(down, columns, 1 + i)
        for line, points in panels[panel].items():
            color = colors[line] = colors.get(line) or next(unused)
            middle, low, high = (
                [f(ys) for ys in points.values()]
                for f in (np.median, min, max))
            xs, mark, span = list(points), "-", axis.fill_between
            if isinstance(xs[0], str):
                mark, span = "o", axis.vlines
                axis.tick_params(axis="x", labelrotation=90)
            span(xs, low, high, color=color, alpha=0.3)
            width = 2.5 if line == "learned" else 1.2
            axis.plot(xs, middle, mark, color=color, lw=width, label=line)
        axis.set(**{"title": panel} | looks | special.get(panel, {}))
        axis.legend(fontsize="small", framealpha=0.4)
    with machine.whole(path) as partial:
        figure.savefig(partial, format=Path(path).suffix[1:] or "png")


def compare_picture(path, curves):
    """Test losses on four tasks; on all, how far the learned optimizer's are from tuned Adam's."""
    rows = []
    for name in ("Adam", "Adam + cosine", "Muon + cosine", "learned"):
        tests = tuned(curves[name][:4, ..., 1], mean_loss)
        rows += [(f"task {i}", name, EVERY * t, y) for (i, t), y in np.ndenumerate(tests)]
    for name, value in VALUES.items():
        learned, adam = (best(curves[k][..., 1], value) + 1e-30 for k in ("learned", "Adam"))
        ratios = np.sort(np.log2(learned / adam).clip(-1, 1))
        line, shares = f"{name} test loss", np.linspace(0, 1, len(ratios))
        rows += [("all tasks", line, x, y) for x, y in zip(shares, ratios)]
    looks = dict(xlabel="step", ylabel="test loss")
    compared = dict(xlabel="share of tasks", ylabel="log2(learned / tuned Adam)", ylim=(-1, 1))
    picture(path, rows, looks, {"all tasks": compared})


# ---------------------------------------------------------------- the command line

def number(kind, low, high=np.inf):
    """An argparse type: a number of that kind from `low` to `high`."""
    def parse(text):
        value = kind(text)
        if low <= value <= high:  # NaN is not
            return value
        raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
    parse.__name__ = kind.__name__  # argparse names it where that says no
    return parse


SEED = number(int, 1 - 2 ** 31, 2 ** 31 - 1)


def command_line():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".")
    add = parser.add_argument
    add("theta", nargs="?", default=PRETRAINED,
        help="meta-parameters written by meta_train.py (default: the shipped ones)")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--family", choices=[*tasks.FAMILIES, *kinds.KINDS], default="mlp",
           help="of the tasks (default: mlp)")
    either("--data", help="your own data instead: an .npz file or a .csv table (see README.md)")
    add("--target", action="append", help="the column of it to predict (default: the last)")
    add("--net", choices=("mlp", "conv"), help="what is trained on your data (default: mlp)")
    add("--tasks", type=number(int, 4, 10 ** 5),
        help="how many (default: 128; 8 starts on your data)")
    add("--horizon", type=number(int, EVERY, 10 ** 7), default=model.HORIZON,
        help=f"inner steps, a multiple of {EVERY} (default: {model.HORIZON})")
    add("--seed", type=SEED, default=0, help="of the tasks, initialisations and batches")
    add("--json", help="also write the table to this file")
    add("--picture",
        help="where to draw (default: comparison-<family or data>.png beside theta)")
    return parser


def check_files(read, written):
    taken = {os.path.realpath(file) for file in read if file}
    for file in filter(None, written):
        if not Path(file).parent.is_dir() or Path(file).is_dir():
            raise ValueError(f"{file} must be a file in a folder that is there.")
        if os.path.realpath(file) in taken:
            raise ValueError(f"{file} is read or written already: choose another file to write to.")
        taken.add(os.path.realpath(file))


def main():
    begin, parser = time.time(), command_line()
    o = parser.parse_args()
    name, count = (o.family, 128) if o.data is None else ("data", 8)
    try:
        learned, theta = model.load(o.theta, o.horizon)
        target = o.picture or Path(o.theta).with_name(f"comparison-{name}.png")
        check_files((o.theta, o.data), (target, o.json))
        if o.horizon % EVERY:
            raise ValueError(f"--horizon must be a multiple of {EVERY}, not {o.horizon}.")
        if name == "data":
            mine = own.understood(own.read(o.data, o.target))
            print(f"{o.data}: {mine.sentence}", flush=True)
            family = own.family(mine, o.net or "mlp")
            mine.arrays.clear()  # the family has its own: half of the memory
        elif o.target or o.net:
            raise ValueError("--target or --net needs --data.")
        elif name in kinds.KINDS:
            family = kinds.KINDS[name]()
        else:
            family = tasks.FAMILIES[name]("held_out")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{o.theta}: {model.about(o.theta)}")
    curves, measured = compared(
        family, learned, theta, o.tasks or count, o.horizon, o.seed, BASELINES | LISTS)
    step = costs(family, {"Adam": model.adam(0.01), "learned": learned.optimizer(theta)})
    result = summary(curves) | {"costs": step}
    if name == "data":
        result["scores"] = scores(family, mine, measured)
        print_scores(result["scores"])
    print_summary(name, result)
    slower, larger = np.divide(step["learned"], step["Adam"])
    faster = result["versus"]["Adam"]["speedup"] / slower
    print(f"a step takes {slower:.2f} times as long as Adam's ({1e6 * step['learned'][0]:.0f} us), "
          f"so in seconds it is {faster:.2f} times as fast; its state is {larger:.1f} times Adam's")
    try:
        if o.json:
            machine.write_json(o.json, result)
        compare_picture(target, curves)
    except (OSError, ValueError) as error:  # a ValueError is matplotlib's
        parser.error(f"The comparison is done, but could not be written: {error}.")
    print(f"{time.time() - begin:.0f} s; picture: {target}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    machine.configure_jax()
    main()
