"""The papers' experiments on estimators and on learned optimizers, a function each: `python experiments.py NAME`.

Each returns a figure, most of them drawn by `picture`, and the rows (dicts) of its table.
"""
import argparse
import csv
import functools
import itertools
import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import estimators
import evaluate
import meta_train
import model
import tasks
from estimators import InnerProblem
from evaluate import plt

ESTIMATORS = ("truncated_backprop", "es", "merged", "pes", "combined")


def picture(rows, panels):
    """A panel for each name in `panels`, with what axis.set is to be told there.

    A row belongs to a `panel` and a `line`, and has x and y. A line goes through the medians of the rows that share an x; their
    range, or what they give as `low` and `high`, is shaded. Where x is a word, a point takes the place of the line.
    """
    columns = min(3, len(panels))
    down = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(down, columns, figsize=(5 * columns + 1, 4 * down), layout="constrained", squeeze=False)
    dashes = itertools.cycle(("-", (0, (6, 1)), (0, (2, 1))))  # a line below another shows
    styles, unused = {"learned": ("C3", "-")}, zip(itertools.cycle(f"C{i}" for i in range(10) if i != 3), dashes)
    for axis, (panel, looks) in zip(axes.flat, panels.items()):
        found = {}
        for row in rows:
            if row["panel"] == panel:
                found.setdefault(row["line"], {}).setdefault(row["x"], []).append(row)
        for line, points in found.items():
            color, dash = styles.get(line) or styles.setdefault(line, next(unused))
            words = isinstance(next(iter(points)), str)
            middle, low, high = ([value(row.get(name, row["y"]) for row in same) for same in points.values()]
                                 for value, name in ((lambda ys: np.median(list(ys)), "y"), (min, "low"), (max, "high")))
            axis.plot(list(points), middle, color=color, label=line, ls="" if words else dash, lw=2 if line == "learned" else 1.2,
                      marker="o" if words or 2 < len(points) < 20 else "", ms=4)
            (axis.vlines if words else axis.fill_between)(list(points), low, high, color=color, alpha=0.3)
            if words:
                plt.setp(axis.get_xticklabels(), rotation=60, ha="right", rotation_mode="anchor")
        axis.set(**{"title": panel} | looks)
        axis.legend(fontsize="small")
    return figure


def make(name, problem, sigma, **options):
    """The estimator of that name; truncated_backprop goes without noise."""
    sigma = 0.0 if name == "truncated_backprop" else sigma
    return getattr(estimators, name)(problem, sigma=sigma, **options)


def outer_step(estimator, optimizer):
    """-> step((theta, state of the optimizer, particles), key) -> (the three, theta as a vector [P])."""
    def step(carry, key):
        theta, state, particles = carry
        gradient, particles, _ = estimator.estimate(theta, particles, key)
        updates, state = optimizer.update(gradient, state)
        theta = jax.tree.map(jnp.add, theta, updates)
        return (theta, state, particles), ravel_pytree(theta)[0]
    return step


def descend(estimator, optimizer, count, theta, key):
    """theta after each of `count` outer steps -> [count, P]."""
    start_key, key = jax.random.split(key)
    start = theta, optimizer.init(theta), estimator.init(theta, start_key)
    return jax.lax.scan(outer_step(estimator, optimizer), start, jax.random.split(key, count))[1]


def episode_loss(problem, horizon, theta, key, cap=10.0):
    """The mean loss of one episode at theta; what is above the cap counts as the cap."""
    start_key, key = jax.random.split(key)
    unroll = estimators.make_unroll(problem, horizon, horizon, cap)
    return unroll(theta, problem.reset(theta, start_key), jnp.int32(horizon), key)[0]


def seconds(program, *arguments):
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


def measured(calls, repeats):
    """(function, arguments) each, compiled and run in turn -> seconds [repeats, calls], megabytes of scratch memory [calls]."""
    programs = [(jax.jit(f).lower(*arguments).compile(), arguments) for f, arguments in calls]
    times = [[seconds(f, *arguments) for f, arguments in programs] for _ in range(1 + repeats)]
    return np.array(times[1:]), [f.memory_analysis().temp_size_in_bytes / 1e6 for f, _ in programs]


# ---------------------------------------------------------------- what there is to learn from

def gallery(seed, count=6, horizon=200):
    """Every family of tasks: its size and speed, what its data look like, and Adam, tuned per task, on a few of its tasks."""
    figure, axes = plt.subplots(2, len(tasks.FAMILIES), figsize=(18, 7), layout="constrained")
    keys, rows = jax.random.split(jax.random.key(seed), count), []
    for (name, make_family), (top, bottom) in zip(tasks.FAMILIES.items(), axes.T):
        family = make_family()
        task = family.sample(keys[0])
        examples = np.array(family.batch(task, keys[0], "train")[0])
        top.axis("off")
        if name == "rnn":
            lines = ["".join(tasks.SYMBOLS[i] for i in row).replace("\n", " ") for row in examples]
            top.text(0, 1, "\n".join(lines), family="monospace", size=12, va="top")
        elif name == "function":
            x = jnp.linspace(-4, 4, 401)
            for kind, label in enumerate([f.__name__ for f in tasks.FUNCTIONS] + ["quadratic", "norm"]):
                shown = task._replace(kind=jnp.int32(kind), log=jnp.bool(False))
                along = lambda a: family.loss(shown, {"x": a * jnp.ones(64)}, family.batch(shown, keys[0], "test"))
                y = np.array(jax.vmap(along)(x))
                top.plot(x, y / y.max(), lw=1, label=label)
            top.legend(fontsize="x-small")
        elif examples.shape[-1] == 64:  # letters
            top.imshow(examples[:24].reshape(4, 6, 8, 8).swapaxes(1, 2).reshape(32, 48), cmap="gray_r")
        train = lambda: np.array(evaluate.learning_curves(family, model.adam, jnp.float32(evaluate.RATES), keys, horizon))[..., 1]
        curves = train()
        pace = count * len(evaluate.RATES) * horizon / seconds(train)
        for curve in curves:  # [rates, points]
            best = curve[evaluate.figures(curve, evaluate.final_loss).argmin()]
            bottom.semilogy(np.arange(len(best)) * evaluate.EVERY, best / best[0])
        parameters = sum(x.size for x in jax.tree.leaves(family.init(task, keys[0])))
        top.set_title(f"{name}: {parameters} parameters,\n{pace:.0f} steps a second")
        bottom.set(xlabel="step", ylabel="test loss / start" if name == "mlp" else None)
        fields = [f for f in task._fields if f != "letters"] + list(tasks.Letters._fields if hasattr(task, "letters") else ())
        rows.append({"family": name, "parameters": parameters, "steps_per_second": pace, "sampled": " ".join(fields)})
        print(f"{name:12} {parameters:5} parameters {pace:7.0f} steps/s  sampled: {', '.join(fields)}")
    return figure, rows


# ---------------------------------------------------------------- how the outer loss looks

def quartic(horizon):
    """(w - 4)(w - 3) w^2 after T steps of SGD with momentum theta from w = -1.2 (P1 figure 2), as the mean over the episode."""
    loss = lambda w: (w - 4) * (w - 3) * w ** 2

    def step(theta, state, key):
        w, m, t = state
        m = theta["momentum"] * m + jax.grad(loss)(w)
        w, t = w - 0.01 * m, t + 1
        return (w, m, t), jnp.where(t == horizon, horizon * jnp.minimum(loss(w), 10.0), 0.0)

    return InnerProblem(lambda theta, key: (jnp.float32(-1.2), jnp.float32(0), jnp.int32(0)), step)


def smooth(x, y, sigma):
    """y over evenly spaced x, with Gaussian noise on x averaged out."""
    weights = np.exp(-0.5 * ((x[:, None] - x[None]) / sigma) ** 2)
    return weights @ y / weights.sum(1)


def landscape(seed):
    """The longer the unroll, the more jagged the loss as a function of theta; noise on theta smooths it (P1 figure 2)."""
    rows, panels = [], {}

    def draw(panel, label, x, y, sigma):
        panels[panel] = dict(xlabel=label)
        for line, values in (("outer loss", y), ("smoothed", smooth(x, y, sigma))):
            rows.extend({"panel": panel, "line": line, "x": a, "y": b} for a, b in zip(x, values))

    momenta = np.linspace(0, 0.99, 4000)
    for horizon in (10, 50, 200):
        unroll = estimators.make_unroll(quartic(horizon), horizon, horizon, jnp.inf)
        final = lambda m: unroll({"momentum": m}, quartic(horizon).reset(None, None), jnp.int32(0), jax.random.key(0))[0]
        draw(f"quartic, {horizon} steps", "momentum (sigma = 0.01)", momenta, np.array(jax.jit(jax.vmap(final))(jnp.float32(momenta))), 0.01)
    learned = model.per_parameter_mlp()
    theta_key, direction_key, key = jax.random.split(jax.random.key(seed), 3)
    theta, unravel = ravel_pytree(learned.init(theta_key))
    direction = jax.random.normal(direction_key, theta.shape)
    offsets = np.linspace(-0.5, 0.5, 600)
    for horizon in (10, 50, 200):
        problem = meta_train.inner_problem(tasks.mlp(), learned, "train", horizon)
        at = lambda key, x: episode_loss(problem, horizon, unravel(theta + x * direction), key)
        losses = jax.jit(lambda key, x: estimators.over_devices(at, len(offsets))(key, x))(key, jnp.float32(offsets))
        draw(f"per-parameter MLP, {horizon} steps", "theta along a random direction (sigma = 0.02)", offsets, np.array(losses), 0.02)
    return picture(rows, panels), rows


# ---------------------------------------------------------------- where truncation leads

def noisy_quadratic():
    """Adam on 20 dimensions of curvature 0.01 to 1 under gradient noise; theta is the logarithm of its learning rate."""
    curvature = jnp.logspace(-2, 0, 20)

    def reset(theta, key):
        return jnp.ones(20), model.adam(0.0).init(jnp.ones(20))

    def step(theta, state, key):
        x, adam_state = state
        gradient = curvature * x + 0.3 * jax.random.normal(key, x.shape)
        updates, adam_state = model.adam(jnp.exp(theta["log_lr"])).update(gradient, adam_state)
        x = x + updates
        return (x, adam_state), 0.5 * jnp.sum(curvature * x * x)

    return InnerProblem(reset, step)


def influence_balancing():
    """The drive theta reaches the loss with the wrong sign first, and with the right one, stronger, later (P3). Best: -1/6."""
    a = 0.5 * (jnp.eye(23) + jnp.eye(23, k=1))
    drive = jnp.where(jnp.arange(23) < 10, 1.0, -1.0)

    def step(theta, state, key):
        state = a @ state + theta["x"] * drive
        return state, 0.5 * (state[0] - 1) ** 2

    return InnerProblem(lambda theta, key: jnp.ones(23), step)


def truncation_bias(seed, horizon=200, episodes=100):
    """Learning Adam's log learning rate from unrolls of K of the T steps (P1 figure 3; three seeds), and influence balancing (P3)."""
    problem, rows, truncations = noisy_quadratic(), [], (5, 20, 50, horizon)
    grid = np.linspace(-6, 0, 121)
    keys = jax.random.split(jax.random.key(seed), 64)
    loss = lambda x: jnp.mean(jax.vmap(lambda key: episode_loss(problem, horizon, {"log_lr": x}, key))(keys))
    best = float(np.exp(grid[np.argmin(jax.jit(lambda x: jax.lax.map(loss, x))(jnp.float32(grid)))]))
    learning, balancing = f"Adam's learning rate, learned with K of T = {horizon}", "influence balancing, K = 1"
    for name in ESTIMATORS:
        for truncation in truncations:
            estimator = make(name, problem, 0.1, num_pairs=8, truncation=truncation, horizon=horizon, cap=1e6)
            count = episodes * horizon // truncation
            run = jax.jit(functools.partial(descend, estimator, model.nadamw(0.03, nesterov=False, horizon=count), count))
            ends = [run({"log_lr": jnp.float32(np.log(best))}, jax.random.key(seed + i))[-1, 0] for i in range(3)]
            rows += [{"panel": learning, "line": name, "x": truncation, "y": float(np.exp(end))} for end in ends]
        estimator = make(name, influence_balancing(), 0.1, num_pairs=500, truncation=1, horizon=10 ** 7, cap=1e6)
        run = jax.jit(functools.partial(descend, estimator, model.sgd(1e-4), 3000))
        path = np.array(run({"x": jnp.float32(0.5)}, jax.random.key(seed)))[:, 0]
        rows += [{"panel": balancing, "line": name, "x": i, "y": path[i]} for i in range(0, len(path), 100)]
    for panel, ends, value in ((learning, truncations[::3], best), (balancing, (0, 3000), -1 / 6)):
        rows += [{"panel": panel, "line": "best", "x": x, "y": value} for x in ends]
    return picture(rows, {learning: dict(xscale="log", yscale="log", xlabel="truncation K", ylabel="learning rate in the end"),
                          balancing: dict(xlabel="outer step", ylabel="theta")}), rows


# ---------------------------------------------------------------- how noisy the estimates are

def estimates(estimator, count, theta, key):
    """`count` estimates at one theta, after one that is thrown away -> gradients [count, P], metrics [count] each."""
    def body(particles, key):
        gradient, particles, metrics = estimator.estimate(theta, particles, key)
        return particles, (ravel_pytree(gradient)[0], metrics)

    start_key, key = jax.random.split(key)
    found = jax.lax.scan(body, estimator.init(theta, start_key), jax.random.split(key, 1 + count))[1]
    return jax.tree.map(lambda x: x[1:], found)


def straight(gradients):
    """The loss of step t is gradients[t] . theta, whatever came before: gradients [T, P]."""
    return InnerProblem(lambda theta, key: jnp.int32(0), lambda theta, t, key: (t + 1, jnp.vecdot(gradients[t], theta["x"])))


def linear_quadratic():
    """A linear state under a quadratic loss, with the start learned, too: the meta-gradient has a closed form."""
    a, b = jnp.array([[0.9, 0.2], [-0.3, 0.8]]), jnp.array([[1.0, 0.5, 0.0], [0.0, -0.5, 1.0]])

    def step(theta, state, key):
        state = a @ state + b @ theta["x"]
        return state, 0.5 * jnp.sum(state ** 2)

    return InnerProblem(lambda theta, key: theta["x"][:2], step)


def unroll_variance(seed, pairs=16):
    """P1's optimizer, untrained, on the mlp family: variance of one pair's estimate, summed over theta, against the unroll's
    length; at a step size that suits the tasks, and at one that is far too large."""
    learned, rows = model.per_parameter_mlp(), []
    theta = learned.init(jax.random.key(seed))
    for length in (1, 10, 50, 200):
        problem = meta_train.inner_problem(tasks.mlp(), learned, "valid", length)
        estimator = estimators.merged(problem, num_pairs=pairs, truncation=length, horizon=length, sigma=0.01, cap=meta_train.CAP)
        run = jax.jit(functools.partial(estimates, estimator, 6))
        for rate in (0.01, 0.3):
            gradients, metrics = run(theta | {"log_lr": jnp.float32(np.log(rate))}, jax.random.key(seed))
            found = {"smoothed backprop": jnp.mean(metrics["variance_rp"]), "es": jnp.mean(metrics["variance_es"]),
                     "merged": pairs * jnp.sum(jnp.var(gradients, 0, ddof=1))}
            rows += [{"panel": "per-parameter MLP", "line": f"{name}, lr {rate}", "x": length, "y": float(v)} for name, v in found.items()]
    return rows


def history_variance(seed, counts=(1, 2, 4, 8, 16, 32, 64), size=50):
    """PES against the number of truncations S of an episode, and its closed form: sum over t of (t P + 1) |g_t|^2."""
    rows = []
    draw = jax.random.normal(jax.random.key(seed), (max(counts), size))
    for line, at in (("the same gradient in all", lambda s: jnp.tile(draw[:1] / s / jnp.linalg.norm(draw[0]), (s, 1))),
                     ("independent gradients", lambda s: draw[:s] / jnp.linalg.norm(draw[:s]))):
        for s in counts:
            g = at(s)
            estimator = estimators.pes(straight(g), num_pairs=1, truncation=1, horizon=s, sigma=0.1, cap=1e6)
            run = jax.jit(functools.partial(estimates, estimator, 2000 * s + s - 1))
            episodes = run({"x": jnp.zeros(size)}, jax.random.key(seed))[0][s - 1:].reshape(2000, s, size).sum(1)  # whole ones
            found = {line: jnp.sum(jnp.var(episodes, 0, ddof=1)),
                     f"{line}, closed form": jnp.sum((jnp.arange(1, s + 1) * size + 1) * jnp.sum(g ** 2, 1))}
            rows += [{"panel": "PES against its closed form (P3)", "line": name, "x": s, "y": float(v)} for name, v in found.items()]
    return rows


def crossover(seed, count=2000, horizon=16, truncations=(1, 2, 4, 8)):
    """Mean squared error against K and N on the linear-quadratic problem: truncated backprop errs by its bias alone."""
    problem, theta, rows = linear_quadratic(), {"x": jnp.array([0.4, -0.7, 0.5])}, []
    truth = jax.grad(lambda theta: episode_loss(problem, horizon, theta, jax.random.key(0), cap=jnp.inf))(theta)["x"]
    for name, pairs in (("truncated_backprop", 16), ("pes", 4), ("pes", 64), ("combined", 4), ("combined", 64)):
        for truncation in truncations:
            estimator = make(name, problem, 0.1, num_pairs=pairs, truncation=truncation, horizon=horizon, cap=1e6)
            gradients, _ = jax.jit(functools.partial(estimates, estimator, count))(theta, jax.random.key(seed))
            error = jnp.mean(jnp.sum((gradients[200:] - truth[None]) ** 2, 1))
            rows.append({"panel": f"linear-quadratic problem, T = {horizon}", "line": f"{name}, N = {pairs}", "x": truncation, "y": float(error)})
    return rows


def variance(seed):
    """Variance against the unroll's length (P1 figure 4) and the number of truncations (P3), and where bias outweighs it."""
    log = dict(xscale="log", yscale="log")
    labels = (dict(xlabel="unrolled steps", ylabel="variance of a pair's estimate"),
              dict(xlabel="truncations per episode", ylabel="variance of an episode's estimate"),
              dict(xlabel="truncation K", ylabel="mean squared error", ylim=(0.02, None)))  # room for the legend
    found = [draw(seed) for draw in (unroll_variance, history_variance, crossover)]
    return picture(sum(found, []), {rows[0]["panel"]: log | label for rows, label in zip(found, labels)}), sum(found, [])


# ---------------------------------------------------------------- what they cost, and which to use

def backprop(family, learned, pairs, length, key):
    """-> (problem, function, arguments) of an estimate such as meta-training makes, by backprop through `length` steps."""
    problem = meta_train.inner_problem(family, learned, "valid", length, adjoint=1.0)
    estimator = estimators.truncated_backprop(problem, num_pairs=pairs, truncation=length, horizon=length, cap=meta_train.CAP)
    theta = learned.init(key)
    return problem, estimator.estimate, (theta, estimator.init(theta, key), key)


def cost(seed, pairs=2):
    """Seconds and memory of backprop through K steps of the default optimizer, beside those of the unroll alone."""
    rows, key = [], jax.random.key(seed)
    for length in (25, 50, 100, 200, 400):
        problem, estimate, arguments = backprop(tasks.mlp(), model.hierarchical(), pairs, length, key)
        forward = estimators.over_devices(functools.partial(episode_loss, problem, length), pairs)
        times, memory = measured([(forward, (arguments[0], jax.random.split(key, pairs))), (estimate, arguments)], 11)
        found = {"forward": np.median(times[:, 0]), "backprop": np.median(times[:, 1])}
        rows += [{"panel": "seconds", "line": "backprop / forward", "x": length, "y": np.median(times[:, 1] / times[:, 0]), **found}]
        rows += [{"panel": "megabytes of scratch memory", "line": line, "x": length, "y": y} for line, y in zip(found, memory)]
    looks = dict(xlabel="unrolled steps K", ylim=(0, None))
    return picture(rows, {"seconds": looks | dict(title="seconds, relative to the unroll alone", ylim=(0, 5)), rows[1]["panel"]: looks}), rows


def scaling(seed, repeats=6):
    """Seconds and scratch memory of one estimate as one thing after another grows, each relative to its smallest; slopes of log to log."""
    def sums(n):
        """Tasks of n parameters that cost next to nothing but the optimizer's step."""
        return tasks.TaskFamily("sums", sample=lambda key: jax.random.normal(key, (n,)), init=lambda task, key: {"x": jnp.zeros(n)},
                                batch=lambda task, key, split: (), loss=lambda task, params, batch: jnp.mean((params["x"] - task) ** 2))

    mlp, default = tasks.mlp(), model.hierarchical()
    cases = {"pairs N, K = 20": [(n, default, mlp, n, 20) for n in (2, 4, 8, 16)],
             "steps K, N = 2": [(k, default, mlp, 2, k) for k in (10, 20, 40, 80)],
             "size of theta": [(None, model.hierarchical(lstm=2 * size, hidden=size), mlp, 2, 20) for size in (8, 16, 32, 64)],
             "size of a task": [(n, default, sums(n), 2, 20) for n in (1000, 10000, 100000)],
             "devices, a pair on each": [(n, default, mlp, n, 20) for n in range(1, jax.local_device_count() + 1)]}
    rows = []
    for grows, points in cases.items():
        found = []
        for x, learned, family, pairs, length in points:
            _, estimate, arguments = backprop(family, learned, pairs, length, jax.random.key(seed))
            times, memory = measured([(estimate, arguments)], repeats)
            found.append((x or ravel_pytree(arguments[0])[0].size, np.median(times), memory[0]))
        x, *columns = np.array(found).T
        for panel, y in zip(("seconds", "megabytes"), columns):
            slope = np.polyfit(np.log(x), np.log(y), 1)[0] if len(x) > 1 else np.nan
            rows += [{"panel": panel, "line": f"{grows}: slope {slope:.2f}", "x": a / x[0], "y": b / y[0], "size": a, panel: b}
                     for a, b in zip(x, y)]
        print(grows, found, flush=True)
    return picture(rows, {panel: dict(xscale="log", yscale="log", xlabel="growth") for panel in ("seconds", "megabytes")}), rows


RACE = {"truncated_backprop": dict(truncation=100, num_pairs=2), "es": dict(truncation=20, num_pairs=8),
        "merged": dict(truncation=100, num_pairs=2), "pes": dict(truncation=20, num_pairs=8),
        "combined": dict(truncation=50, num_pairs=2)}


def race(seed, limit=5.0, points=4, horizon=100):
    """The outer loss of P1's optimizer on unseen draws of meta-training tasks against seconds, for all five estimators; three seeds."""
    learned, adam, rows = model.per_parameter_mlp(), model.adam(3e-3), []
    problem = meta_train.inner_problem(tasks.mlp(), learned, "valid", horizon, adjoint=1.0)
    keys = jax.random.split(jax.random.key(seed + 1000), 32)
    losses = estimators.over_devices(functools.partial(episode_loss, problem, horizon), len(keys))
    test = jax.jit(lambda theta: jnp.mean(losses(theta, keys)))
    for name in ESTIMATORS:
        estimator, step = make(name, problem, 0.01, horizon=horizon, cap=meta_train.CAP, **RACE[name]), None
        for run in range(3):
            key = jax.random.key(seed + run)
            theta = learned.init(key)
            carry, spent, done = (theta, adam.init(theta), estimator.init(theta, key)), 0.0, 0
            step = step or jax.jit(outer_step(estimator, adam)).lower(carry, key).compile()
            for point in range(points + 1):
                while spent < limit * point / points:
                    before, done = time.time(), done + 1
                    carry, _ = jax.block_until_ready(step(carry, jax.random.fold_in(key, done)))
                    spent += time.time() - before
                rows.append({"panel": "race", "line": name, "x": limit * point / points, "y": float(test(carry[0])),
                             "seed": seed + run, "outer_steps": done})
    return picture(rows, {"race": dict(xlabel="seconds of meta-training", ylabel="outer loss", title="median and range of 3 seeds")}), rows


# ---------------------------------------------------------------- how a learned optimizer behaves: f(seed, path of its theta)

def learned_curves(family, make_optimizer, theta, keys, horizon):
    """Test losses of every task under one learned optimizer -> [tasks, 1, points]."""
    one = jax.tree.map(lambda x: jnp.asarray(x)[None], theta)
    return np.asarray(evaluate.learning_curves(family, make_optimizer, one, keys, horizon))[..., 1]


def tuned_adam(family, keys, horizon, rates=evaluate.RATES):
    """Test losses of every task under Adam at each rate -> [tasks, rates, points]."""
    return evaluate.kept_curves(family, model.adam, jnp.asarray(rates), keys, horizon)[..., 1]


def generalisation(seed, path, count=16, horizon=400, longer=2000):
    """The optimizer against tuned Adam on every family, on kinds of task that nothing is ever meta-trained on, and on longer runs."""
    families = {name: make("held_out") for name, make in tasks.FAMILIES.items()}
    cases = [("learned from", name, family, horizon) for name, family in families.items()]
    cases += [("held-out kinds", name, make(), horizon) for name, make in evaluate.KINDS.items()]
    cases += [(f"{longer} steps", f"{name}, {longer} steps", family, longer) for name, family in families.items()]
    adam, rows = {"Adam": evaluate.BASELINES["Adam"]}, []
    for line, name, family, steps in cases:
        found = evaluate.summary(evaluate.compare(family, *model.load(path, steps), count, steps, seed, adam))
        versus, (low, high) = found["versus"]["Adam"], found["versus"]["Adam"]["speedup_95"]
        rows.append({"panel": "generalisation", "line": line, "x": name, "y": versus["speedup"], "low": low, "high": high,
                     "mean": versus["win_mean"], "final": versus["win_final"], "diverged": found["diverged"]})
        print(rows[-1], flush=True)
    figure = picture(rows, {"generalisation": dict(yscale="log", ylim=(0.15, 40), ylabel="times as fast as tuned Adam")})
    figure.set_size_inches(9, 4.5)
    figure.axes[0].axhline(1, color="black", lw=1)
    return figure, rows


def valley_paths(optimizer, steps):
    """Where 7x7 starts in [-2, 2]^2 lead on (x - y)^2 / 2 -> [49, steps + 1, 2]."""
    loss = lambda p: 0.5 * (p["w"][0] - p["w"][1]) ** 2

    def path(start):
        def body(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params, loss=value, valid_loss=value)
            params = jax.tree.map(jnp.add, params, updates)
            return (params, state), params["w"]

        params = {"w": start}
        return jnp.concatenate([start[None], jax.lax.scan(body, (params, optimizer.init(params)), None, length=steps)[1]])

    grid = jnp.linspace(-2, 2, 7)
    return jax.jit(jax.vmap(path))(jnp.stack(jnp.meshgrid(grid, grid), -1).reshape(49, 2))


def regularisation(seed, path, steps=1000):
    """On (x - y)^2 / 2 all points of the diagonal are as good: who goes to the nearest, and who to the origin? (P2 figure 4)"""
    learned, theta = model.load(path, steps)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    rows = []
    for axis, (name, optimizer) in zip(axes, {"SGD": model.sgd(0.01), "Adam": model.adam(0.01), "learned": learned.optimizer(theta)}.items()):
        paths = np.array(valley_paths(optimizer, steps))
        start, end = (np.abs(paths[:, i].sum(1)) / np.sqrt(2) for i in (0, -1))  # [49], distances from the origin along the diagonal
        left = end.mean() / start.mean()
        rows.append({"optimizer": name, "distance_along_the_diagonal": left, "nearer": np.sum(end < start - 1e-3),
                     "farther": np.sum(end > start + 1e-3), "distance_from_it": np.abs(np.diff(paths[:, -1])).mean() / np.sqrt(2)})
        axis.plot(*paths.transpose(2, 1, 0), color="C0", lw=0.8)
        axis.plot(*paths[:, -1].T, "o", color="C3", ms=3)
        axis.set(title=f"{name}: {left:.0%} of the way to the origin left", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    return figure, rows


def letter_data(rows, seed):
    """Ten held-out letters as `tasks.dataset` wants them: `rows` different training images (a multiple of 10, at most 1,040) of all
    fonts but the test's, and all test images. An image that came twice could be in training and in validation."""
    rng, data = np.random.default_rng(seed), tasks.letters()
    *train, test = (data[f"held_out/{split}"][:10] for split in tasks.SPLITS)
    train, labels = np.concatenate(train, 1), np.arange(rows) % 10
    chosen = np.stack([rng.permutation(train.shape[1])[:rows // 10] for _ in range(10)], 1).ravel()
    return {"x_train": train[labels, chosen], "y_train": labels,
            "x_test": test.reshape(-1, *test.shape[2:]), "y_test": np.repeat(np.arange(10), test.shape[1])}


def adaptation(seed, path, count=4, horizon=400):
    """Width, batch size and size of the data set, against Adam at eight fixed learning rates (P2 figure 5)."""
    (learned, theta), rates, rows = model.load(path, horizon), np.float32(10.0 ** np.linspace(-4, -0.5, 8)), []
    keys = jax.random.split(jax.random.key(seed), count)
    sweeps = {"width": ((4, 8, 16, 32, 64, 128), (8, 32)), "batch size": ((2, 8, 32, 64, 256), (8, 64)),
              "training images": ((50, 100, 200, 500, 1000), (560, 1040))}
    for panel, (values, _) in sweeps.items():
        for value in values:
            data = letter_data(value if panel == "training images" else 500, seed)
            family = tasks.dataset(data, **{"width": dict(width=value), "batch size": dict(max_batch=value)}.get(panel, {}))
            curves = np.concatenate([learned_curves(family, learned.optimizer, theta, keys, horizon), tuned_adam(family, keys, horizon, rates)], 1)
            rows += [{"panel": panel, "line": line, "x": value, "y": y} for line, ys in
                     zip(("learned", *(f"Adam {rate:.0e}" for rate in rates)), curves[:, :, -1].T) for y in ys]
    figure = picture(rows, {panel: dict(xscale="log", yscale="log", ylabel="final test loss", ylim=(0.4, 5)) for panel in sweeps})
    for axis, (_, learned_from) in zip(figure.axes, sweeps.values()):
        axis.axvspan(*learned_from, color="gray", alpha=0.2)
    return figure, rows


def with_valid_loss(optimizer, horizon, given):
    """The optimizer, told given(loss, past validation losses [horizon], t) where it would be told a validation loss."""
    def update(grads, state, params, *, loss=None, valid_loss=None):
        state, past, t = state
        past = past.at[t].set(valid_loss)
        told = given(loss, past, t)
        told = None if told is None else jnp.where(jnp.isnan(valid_loss), valid_loss, told)
        updates, state = optimizer.update(grads, state, params, loss=loss, valid_loss=told)
        return updates, (state, past, t + 1)

    return model.Optimizer(lambda params: (optimizer.init(params), jnp.zeros(horizon), jnp.int32(0)), update)


def validation_feature(seed, path, count=64, horizon=400):
    """The same optimizer with its validation input as it is, cut, taken at a random earlier step, or replaced by the training loss."""
    (learned, theta), finals, rows = model.load(path, horizon), {}, []
    keys, family = jax.random.split(jax.random.key(seed), count), tasks.mlp("held_out")

    def earlier(loss, past, t):
        key = jax.random.fold_in(jax.random.key(seed), t)
        return past[tasks.VALID_EVERY * jax.random.randint(key, (), 0, t // tasks.VALID_EVERY + 1)]

    variants = {"as it is": lambda loss, past, t: past[t], "cut": lambda loss, past, t: None, "of an earlier step": earlier,
                "the training loss": lambda loss, past, t: loss}
    for name, given in variants.items():
        make_optimizer = lambda theta, given=given: with_valid_loss(learned.optimizer(theta), horizon, given)
        finals[name] = np.log(learned_curves(family, make_optimizer, theta, keys, horizon)[:, 0, -1])
        change = finals[name] - finals["as it is"]
        low, high = np.exp(evaluate.bootstrap(change))
        rows.append({"panel": "validation loss", "line": "learned", "x": name, "y": np.exp(change.mean()), "low": low, "high": high})
    return picture(rows, {"validation loss": dict(ylabel="final test loss, relative to 'as it is'")}), rows


def wall_clock(seed, path, count=4, horizon=400, width=128):
    """A conv net of some 50,000 parameters: test loss against seconds (P1's headline), baselines at the rate that ends lowest. Beside
    `path` it tries the shipped per-parameter MLP, too."""
    family, rows = tasks.dataset(letter_data(1000, seed), "conv", width), []
    chosen = {name: evaluate.BASELINES[name] for name in ("momentum", "RMSProp", "Adam", "Adam + cosine", "Muon + cosine")}
    (learned, theta), (smaller, its_theta) = model.load(path, horizon), model.load(evaluate.PRETRAINED_MLP, horizon)
    optimizers = {name: make(0.01, horizon) for name, (make, _) in chosen.items()}
    costs = evaluate.costs(family, optimizers | {"learned": learned.optimizer(theta), "per-parameter MLP": smaller.optimizer(its_theta)}, steps=20)
    tests = {name: c[..., 1] for name, c in evaluate.compare(family, learned, theta, count, horizon, seed, chosen).items()}
    tests["per-parameter MLP"] = learned_curves(family, smaller.optimizer, its_theta, jax.random.split(jax.random.key(seed), count), horizon)
    for name, test in tests.items():
        test = np.median(test, 0)  # [settings, points], of the starts
        line = test[evaluate.figures(test, evaluate.final_loss).argmin()]
        rows += [{"panel": "a conv net", "line": name, "x": i * evaluate.EVERY * costs[name][0], "y": y} for i, y in enumerate(line)]
    return picture(rows, {"a conv net": dict(yscale="log", xlabel="seconds", ylabel="test loss")}), rows


# ---------------------------------------------------------------- what it takes to learn one

def meta_training(settings):
    """Yields (Run, row of numbers) after each outer step of the settings' first family."""
    key, name = jax.random.key(settings.seed), meta_train.families(settings)[0]
    run, programs = meta_train.compiled(*meta_train.make_outer(settings), key)
    outer_step = programs[name].result()
    while run.step < settings.outer_steps:
        begin = time.perf_counter()
        run, row = jax.block_until_ready(outer_step(run, key))  # two at once would wait for each other's sums
        yield run, row | {"seconds": time.perf_counter() - begin}


def longer(seed, runs=3, looks=4, every=256, count=64):
    """Meta-training three times as long as the default's, looked at on held-out tasks. Before: the outer rate stays as it starts. After:
    it falls. Handed out: its average over the outer steps, with the step size fitted. An hour or more for three seeds."""
    family, horizon, rows = tasks.mlp("held_out"), meta_train.Settings.horizon, []
    learned = model.LEARNED[meta_train.Settings.optimizer]()
    keys = jax.random.split(jax.random.key(0), count)
    adam = tuned_adam(family, keys, horizon)
    for run, (name, decay) in itertools.product(range(runs), {"before": 1e12, "after": meta_train.Settings.decay_steps}.items()):
        settings = meta_train.Settings(seed=seed + run, outer_steps=looks * every, decay_steps=decay)
        for state, row in meta_training(settings):
            if state.step % every:
                continue
            common = {"x": int(state.step), "seed": settings.seed}
            rows.append({"panel": "outer loss", "line": name, "y": float(row["smoothed"]), **common})
            variants = {name: state.theta}
            if name == "after":
                variants["handed out"] = meta_train.fit_step_size(settings, state.average)
            for line, theta in variants.items():
                curves = learned_curves(family, learned.optimizer, theta, keys, horizon)
                found = {panel: float(np.mean(evaluate.best(curves, value) < evaluate.best(adam, value)))
                         for panel, value in (("mean", evaluate.mean_loss), ("final", evaluate.final_loss))}
                rows += [{"panel": panel, "line": line, "y": y, **common} for panel, y in found.items()]
                print(line, common, found, flush=True)
    titles = {"outer loss": "outer loss, running mean", "mean": "share with a lower mean test loss than tuned Adam",
              "final": "share with a lower final test loss"}
    return picture(rows, {panel: dict(title=title, xlabel="outer step") for panel, title in titles.items()}), rows


def loss_ratio(settings, theta, adam, keys, family):
    """Geometric mean over held-out tasks of the mean test loss under theta, over that of Adam, tuned per task."""
    learned = model.LEARNED[settings.optimizer](**meta_train.sizes(settings))
    curves = learned_curves(family, learned.optimizer, theta, keys, settings.horizon)
    ratios = np.log(evaluate.best(curves, evaluate.mean_loss) / evaluate.best(adam, evaluate.mean_loss))
    return float(np.exp(np.minimum(ratios, np.log(10)).mean()))


RATIO = "mean test loss on held-out tasks / tuned Adam's"


def architectures(seed, runs=3, minutes=3.0, looks=3, count=32):
    """Every learned optimizer of model.py, meta-trained on the same tasks for the same time (P2 figure 2a). Forty minutes."""
    family, keys, rows = tasks.mlp("held_out"), jax.random.split(jax.random.key(seed), count), []
    adam = tuned_adam(family, keys, meta_train.Settings.horizon)
    for optimizer, run in itertools.product(model.LEARNED, range(runs)):
        settings = meta_train.Settings(optimizer=optimizer, seed=seed + run, outer_steps=10 ** 6)
        spent, look = 0.0, 0
        for state, row in meta_training(settings):
            spent += row["seconds"]
            if spent > 60 * minutes * (look + 1) / looks:
                look += 1
                rows.append({"panel": RATIO, "line": optimizer, "x": minutes * look / looks, "seed": settings.seed,
                             "outer_steps": int(state.step), "y": loss_ratio(settings, state.average, adam, keys, family)})
                print(rows[-1], flush=True)
            if look == looks:
                break
    return picture(rows, {RATIO: dict(xlabel=f"minutes of meta-training, {runs} seeds")}), rows


def num_tasks(seed, runs=2, steps=96, count=64, numbers=(1, 4, 16, 64, 256)):
    """How many tasks an optimizer must learn from before it is good on others (P2 figure 2b). A quarter of an hour."""
    family, keys, rows = tasks.mlp("held_out"), jax.random.split(jax.random.key(seed), count), []
    adam = tuned_adam(family, keys, meta_train.Settings.horizon)
    for number, run in itertools.product(numbers, range(runs)):
        settings = meta_train.Settings(num_tasks=number, seed=seed + run, outer_steps=steps)
        *_, (state, _) = meta_training(settings)
        rows.append({"panel": RATIO, "line": "learned", "x": number, "seed": settings.seed,
                     "y": loss_ratio(settings, state.average, adam, keys, family)})
        print(rows[-1], flush=True)
    return picture(rows, {RATIO: dict(xscale="log", xlabel="tasks learned from")}), rows


def targets(seed, runs=3, steps=96, images=500, count=8):
    """Meta-trained for the training loss or for one on held-out batches: which has the lower test loss on few images, where the
    training loss is the same? (P1: one for held-out batches generalises better.) Six minutes."""
    family, keys, rows = tasks.dataset(letter_data(images, seed)), jax.random.split(jax.random.key(seed), count), []
    panel = f"a net on {images} images"
    for target, run in itertools.product(meta_train.SPLITS, range(runs)):
        settings = meta_train.Settings(target=target, seed=seed + run, outer_steps=steps)
        *_, (state, _) = meta_training(settings)
        optimizer, theta = model.LEARNED[settings.optimizer](**meta_train.sizes(settings)).optimizer, jax.tree.map(lambda x: x[None], state.average)
        curves = np.asarray(evaluate.learning_curves(family, optimizer, theta, keys, settings.horizon))[:, 0]
        rows += [{"panel": panel, "line": f"learned for {target}, seed {settings.seed}", "step": i * evaluate.EVERY, "x": max(train, 1e-5), "y": test}
                 for i, (train, test) in enumerate(np.median(curves, 0))]
        print(rows[-1], flush=True)
    axes = dict(xscale="log", xlabel="training loss (median of the starts, from the right to the left)", ylabel="test loss")
    return picture(rows, {panel: axes}), rows


def self_training(seed, path, steps=400, horizon=100, rates=(1e-3, 3e-3, 1e-2, 3e-2), beyond=3):
    """The learned optimizer moves the theta of a new one, from scratch, and on beyond its own horizon; beside Adam (P2 figure 8)."""
    common = dict(optimizer="per_parameter_mlp", seed=seed, horizon=horizon, truncation=horizon, outer_steps=beyond * steps)
    movers = {"learned": dict(outer_optimizer=path)} | {f"Adam {rate:g}": dict(learning_rate=rate, decay_steps=1e12) for rate in rates}
    rows = []
    for name, options in movers.items():
        curve = [float(row["smoothed"]) for _, row in meta_training(meta_train.Settings(**common, **options))]
        rows += [{"panel": "a new optimizer, learned by", "line": name, "x": i + 1, "y": curve[i]} for i in range(9, len(curve), 10)]
    figure = picture(rows, {rows[0]["panel"]: dict(xlabel="outer step (dotted: the longest that the mover was trained for)",
                                                   ylabel="outer loss, running mean")})
    figure.axes[0].axvline(steps, color="black", lw=1, ls=":")
    return figure, rows


def greedy(values, size):
    """An order [size] of settings, given values [tasks, settings], low ones good: each lowers most what the best so far gets on average."""
    order, reached = [], np.full(len(values), np.inf)
    for _ in range(size):
        gains = np.minimum(reached[:, None], values).mean(0)
        gains[order] = np.inf
        order.append(int(gains.argmin()))
        reached = np.minimum(reached, values[:, order[-1]])
    return order


def settings_list(seed, count=12, unseen=6, size=32, horizon=400):
    """NAdamW's settings to try in order, in the spirit of P2's opt_list: `greedy` on meta-training tasks of all families, of 200 random
    settings. The picture tries them on held-out tasks, beside the same settings as they were drawn. A quarter of an hour."""
    settings, make, rows = evaluate.NADAMW_DRAWS, functools.partial(evaluate.nadamw, horizon=horizon), []

    def ends(pool, count):
        """Roots of the final test losses, relative to the start: [tasks of all families, settings]."""
        found = []
        for name, family in tasks.FAMILIES.items():
            keys = jax.random.split(jax.random.key(2 ** 30 + seed), count)
            curves = evaluate.kept_curves(family(pool), make, jax.tree.map(jnp.asarray, settings), keys, horizon)[..., 1]
            found.append(np.sqrt(np.clip(evaluate.figures(curves, evaluate.final_loss) / curves[..., 0], 0, 1)))
        return np.concatenate(found)

    order = greedy(ends("meta_train", count), size)
    print("evaluate.NADAMW_LIST is the beginning of", order, flush=True)
    held_out = ends("held_out", unseen)
    for line, chosen in (("the list", order), ("as drawn", list(range(size)))):
        best = np.minimum.accumulate(held_out[:, chosen], 1).mean(0)
        rows += [{"panel": "NAdamW", "line": line, "x": i + 1, "y": y, "setting": setting} for i, (setting, y) in enumerate(zip(chosen, best))]
    return picture(rows, {"NAdamW": dict(xscale="log", xlabel="settings tried on each task", ylabel="root of the final test loss / start")}), rows


def by_name(*functions):
    return {f.__name__.replace("_", "-"): f for f in functions}


EXPERIMENTS = by_name(gallery, landscape, truncation_bias, variance, cost, scaling, race, longer, settings_list, architectures, num_tasks, targets)
BEHAVIOURS = by_name(generalisation, regularisation, adaptation, validation_feature, wall_clock, self_training)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".")
    parser.add_argument("name", choices=[*EXPERIMENTS, *BEHAVIOURS])
    parser.add_argument("--theta", metavar="FILE",
                        help=f"whose behaviour it is, for {', '.join(BEHAVIOURS)} (default: the shipped optimizer's)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--out", default="figures", help="folder for the picture and the table")
    options = parser.parse_args(arguments)
    path = os.path.join(options.out, options.name)
    start = time.time()
    try:
        os.makedirs(options.out, exist_ok=True)
        run = EXPERIMENTS.get(options.name)
        if run and options.theta:
            raise ValueError(f"{options.name} is not about an optimizer that is there already: leave --theta away.")
        if not run:
            theta = options.theta or evaluate.PRETRAINED
            for file in (theta, *[evaluate.PRETRAINED_MLP] * (options.name == "wall-clock")):
                model.load(file)  # a wrong file is found at once
            run = functools.partial(BEHAVIOURS[options.name], path=theta)
    except (OSError, ValueError) as error:
        parser.error(f"{error}")
    figure, rows = run(options.seed)
    try:
        figure.savefig(path + ".png", dpi=90)
        with open(path + ".csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        parser.error(f"{error}")
    print(f"{time.time() - start:.0f} s; {path}.png and {path}.csv")


if __name__ == "__main__":
    evaluate.configure_jax()
    main()
