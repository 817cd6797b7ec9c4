"""Pictures of the tasks and the papers' experiments on estimators, a function each: `python experiments.py NAME`."""
import argparse
import csv
import functools
import itertools
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

COLORS = {"truncated_backprop": "C0", "es": "C1", "merged": "C2", "pes": "C4", "combined": "C3"}


def make(name, problem, sigma, **options):
    """The estimator of that name; truncated_backprop goes without noise."""
    sigma = 0.0 if name == "truncated_backprop" else sigma
    return getattr(estimators, name)(problem, sigma=sigma, **options)


def descend(estimator, optimizer, count, theta, key):
    """theta after each of `count` steps of an optimizer along the estimates -> [count, P]."""
    def body(carry, key):
        theta, state, particles = carry
        gradient, particles, _ = estimator.estimate(theta, particles, key)
        updates, state = optimizer.update(gradient, state)
        theta = jax.tree.map(jnp.add, theta, updates)
        return (theta, state, particles), ravel_pytree(theta)[0]

    start_key, key = jax.random.split(key)
    start = theta, optimizer.init(theta), estimator.init(theta, start_key)
    return jax.lax.scan(body, start, jax.random.split(key, count))[1]


def episode_loss(problem, horizon, theta, key, cap=10.0):
    """The mean loss of one episode at theta; what is above the cap counts as the cap."""
    start_key, key = jax.random.split(key)
    unroll = estimators.make_unroll(problem, horizon, horizon, cap)
    return unroll(theta, problem.reset(theta, start_key), jnp.int32(horizon), key)[0]


# ---------------------------------------------------------------- what there is to learn from

def gallery(seed, count=6, horizon=200):
    """Every family of tasks: its size and speed, what its data look like, and Adam, tuned per task, on a few of its tasks."""
    figure, axes = plt.subplots(2, len(tasks.FAMILIES), figsize=(18, 7), layout="constrained")
    keys, rows = jax.random.split(jax.random.key(seed), count), []
    for (name, make_family), (top, bottom) in zip(tasks.FAMILIES.items(), axes.T):
        family = make_family()
        task = family.sample(keys[0])
        examples = np.array(family.batch(task, keys[0], "train")[0])
        if name == "rnn":
            lines = ["".join(tasks.SYMBOLS[i] for i in row).replace("\n", " ") for row in examples]
            top.text(0, 1, "\n".join(lines), family="monospace", size=12, va="top")
            top.axis("off")
        elif name == "function":
            x = jnp.linspace(-4, 4, 401)
            for kind, label in enumerate([f.__name__ for f in tasks.FUNCTIONS] + ["quadratic", "norm"]):
                shown = task._replace(kind=jnp.int32(kind), log=jnp.bool(False))
                along = lambda a: family.loss(shown, {"x": a * jnp.ones(64)}, family.batch(shown, keys[0], "test"))
                y = np.array(jax.vmap(along)(x))
                top.plot(x, y / y.max(), lw=1, label=label)
            top.set(xlabel="all coordinates", ylabel="loss / largest")
            top.legend(fontsize="x-small")
        else:
            top.imshow(examples[:24].reshape(4, 6, 8, 8).swapaxes(1, 2).reshape(32, 48), cmap="gray_r")
            top.axis("off")
        train = lambda: np.array(evaluate.learning_curves(family, model.adam, jnp.float32(evaluate.RATES), keys, horizon))[..., 1]
        curves = train()
        pace = count * len(evaluate.RATES) * horizon / seconds(train)
        for curve in curves:  # [rates, points]
            final = np.where(np.isfinite(curve).all(1), curve[:, -1], np.inf)
            bottom.semilogy(np.arange(curve.shape[1]) * evaluate.EVERY, curve[final.argmin()] / curve[0, 0])
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
    figure, axes = plt.subplots(2, 3, figsize=(13, 6), layout="constrained")
    rows = []

    def draw(axis, title, label, x, y, sigma):
        smoothed = smooth(x, y, sigma)
        axis.plot(x, y, lw=0.6, label="outer loss")
        axis.plot(x, smoothed, lw=2, label=f"smoothed, sigma = {sigma}")
        axis.set(title=title, xlabel=label)
        axis.legend()
        rows.extend({"panel": title, "x": a, "loss": b, "smoothed": c} for a, b, c in zip(x, y, smoothed))

    momenta = np.linspace(0, 0.99, 4000)
    for axis, horizon in zip(axes[0], (10, 50, 200)):
        unroll = estimators.make_unroll(quartic(horizon), horizon, horizon, jnp.inf)
        final = lambda m: unroll({"momentum": m}, quartic(horizon).reset(None, None), jnp.int32(0), jax.random.key(0))[0]
        draw(axis, f"quartic, {horizon} steps", "momentum", momenta, np.array(jax.jit(jax.vmap(final))(jnp.float32(momenta))), 0.01)
    learned = model.per_parameter_mlp()
    theta_key, direction_key, key = jax.random.split(jax.random.key(seed), 3)
    theta, unravel = ravel_pytree(learned.init(theta_key))
    direction = jax.random.normal(direction_key, theta.shape)
    offsets = np.linspace(-0.5, 0.5, 600)
    for axis, horizon in zip(axes[1], (10, 50, 200)):
        problem = meta_train.inner_problem(tasks.mlp(), learned, "train", horizon)
        at = lambda key, x: episode_loss(problem, horizon, unravel(theta + x * direction), key)
        losses = jax.jit(lambda key, x: estimators.over_devices(at, len(offsets))(key, x))(key, jnp.float32(offsets))
        draw(axis, f"per-parameter MLP, {horizon} steps", "theta along a random direction", offsets, np.array(losses), 0.02)
    return figure, rows


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
    """Learning Adam's log learning rate from unrolls of K of the T steps (P1 figure 3), and influence balancing (P3)."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    problem, rows = noisy_quadratic(), []
    grid = np.linspace(-6, 0, 121)
    keys = jax.random.split(jax.random.key(seed), 64)
    loss = lambda x: jnp.mean(jax.vmap(lambda key: episode_loss(problem, horizon, {"log_lr": x}, key))(keys))
    best = float(np.exp(grid[np.argmin(jax.jit(lambda x: jax.lax.map(loss, x))(jnp.float32(grid)))]))
    axes[0].axhline(best, color="black", lw=1, ls=":", label="best")
    truncations = (5, 20, 50, horizon)
    for (name, color), line in zip(COLORS.items(), ("-", "--", ":", "-", "--")):
        ends = []
        for truncation in truncations:
            estimator = make(name, problem, 0.1, num_pairs=8, truncation=truncation, horizon=horizon, cap=1e6)
            count = episodes * horizon // truncation
            run = jax.jit(functools.partial(descend, estimator, model.nadamw(0.03, nesterov=False, horizon=count), count))
            at_best = {"log_lr": jnp.float32(np.log(best))}
            ends.append([float(np.exp(run(at_best, jax.random.key(seed + i))[-1, 0])) for i in range(3)])
        rows += [{"panel": "learning rate", "estimator": name, "x": k, "value": e} for k, es in zip(truncations, ends) for e in es]
        axes[0].plot(truncations, np.median(ends, 1), "o-", color=color, label=name)
        axes[0].fill_between(truncations, np.min(ends, 1), np.max(ends, 1), color=color, alpha=0.2)
        estimator = make(name, influence_balancing(), 0.1, num_pairs=500, truncation=1, horizon=10 ** 7, cap=1e6)
        run = jax.jit(functools.partial(descend, estimator, model.sgd(1e-4), 3000))
        path = np.array(run({"x": jnp.float32(0.5)}, jax.random.key(seed)))[:, 0]
        axes[1].plot(path, color=color, ls=line, label=name)
        rows += [{"panel": "influence balancing", "estimator": name, "x": i, "value": path[i]} for i in range(0, len(path), 100)]
    axes[0].set(xscale="log", yscale="log", xlabel=f"truncation K of T = {horizon} steps", ylabel="learning rate in the end",
                title="Adam's learning rate, learned (median, range of 3 seeds)")
    axes[1].axhline(-1 / 6, color="black", lw=1, ls=":")
    axes[1].set(xlabel="outer step", ylabel="theta", title="influence balancing, K = 1")
    for axis in axes:
        axis.legend()
    return figure, rows


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


def unroll_variance(axis, seed):
    """P1's optimizer, untrained, on the mlp family: variance of one pair's estimate, summed over theta, against the unroll's
    length; at a step size that suits the tasks, and at one that is far too large."""
    learned, rows = model.per_parameter_mlp(), []
    lengths, rates, pairs = (1, 10, 50, 200), (0.01, 0.3), 16
    theta = learned.init(jax.random.key(seed))
    for length in lengths:
        problem = meta_train.inner_problem(tasks.mlp(), learned, "valid", length)
        estimator = estimators.merged(problem, num_pairs=pairs, truncation=length, horizon=length, sigma=0.01, cap=meta_train.CAP)
        run = jax.jit(functools.partial(estimates, estimator, 6))
        for rate in rates:
            gradients, metrics = run(theta | {"log_lr": jnp.float32(np.log(rate))}, jax.random.key(seed))
            found = {"smoothed backprop": jnp.mean(metrics["variance_rp"]), "es": jnp.mean(metrics["variance_es"]),
                     "merged": pairs * jnp.sum(jnp.var(gradients, 0, ddof=1))}
            rows += [{"panel": "unroll", "estimator": f"{name}, lr {rate}", "x": length, "value": float(v)}
                     for name, v in found.items()]
    for name, color in (("smoothed backprop", "C0"), ("es", "C1"), ("merged", "C2")):
        for rate, line in zip(rates, ("-", "--")):
            label = f"{name}, lr {rate}"
            axis.loglog(lengths, [row["value"] for row in rows if row["estimator"] == label], "o" + line, color=color, label=label)
    axis.set(xlabel="unrolled steps", ylabel="variance of a pair's estimate", title="per-parameter MLP")
    return rows


def history_variance(axis, seed, counts=(1, 2, 4, 8, 16, 32, 64), size=50):
    """PES against the number of truncations S of an episode, and its closed form: sum over t of (t P + 1) |g_t|^2."""
    rows = []
    draw = jax.random.normal(jax.random.key(seed), (max(counts), size))
    for label, color, at in (("the same in all", "C4", lambda s: jnp.tile(draw[:1] / s / jnp.linalg.norm(draw[0]), (s, 1))),
                             ("independent", "C5", lambda s: draw[:s] / jnp.linalg.norm(draw[:s]))):
        exact, measured = [], []
        for s in counts:
            g = at(s)
            estimator = estimators.pes(straight(g), num_pairs=1, truncation=1, horizon=s, sigma=0.1, cap=1e6)
            run = jax.jit(functools.partial(estimates, estimator, 2000 * s + s - 1))
            gradients = run({"x": jnp.zeros(size)}, jax.random.key(seed))[0][s - 1:]  # whole episodes
            episodes = gradients.reshape(2000, s, size).sum(1)
            measured.append(float(jnp.sum(jnp.var(episodes, 0, ddof=1))))
            exact.append(float(jnp.sum((jnp.arange(1, s + 1) * size + 1) * jnp.sum(g ** 2, 1))))
        axis.loglog(counts, exact, color=color, lw=1)
        axis.loglog(counts, measured, "o", color=color, label=f"pes, gradients {label}")
        rows += [{"panel": "history", "estimator": f"pes, {label}", "x": s, "value": m, "closed_form": e}
                 for s, m, e in zip(counts, measured, exact)]
    axis.set(xlabel="truncations per episode", ylabel="variance of an episode's estimate", title="P3's closed form (lines)")
    return rows


def crossover(axis, seed, count=2000, horizon=16):
    """Mean squared error against K and N on the linear-quadratic problem: truncated backprop errs by its bias alone."""
    problem, theta, rows = linear_quadratic(), {"x": jnp.array([0.4, -0.7, 0.5])}, []
    truth = jax.grad(lambda theta: episode_loss(problem, horizon, theta, jax.random.key(0), cap=jnp.inf))(theta)["x"]
    truncations = (1, 2, 4, 8)
    for name, color in (("truncated_backprop", "C0"), ("pes", "C4"), ("combined", "C3")):
        for pairs, line in ((4, "-"), (64, "--")) if name != "truncated_backprop" else ((16, "-"),):
            errors = []
            for truncation in truncations:
                estimator = make(name, problem, 0.1, num_pairs=pairs, truncation=truncation, horizon=horizon, cap=1e6)
                gradients, _ = jax.jit(functools.partial(estimates, estimator, count))(theta, jax.random.key(seed))
                errors.append(float(jnp.mean(jnp.sum((gradients[200:] - truth[None]) ** 2, 1))))
            axis.loglog(truncations, errors, "o" + line, color=color, label=name + ("" if pairs == 16 else f", N = {pairs}"))
            rows += [{"panel": "crossover", "estimator": name, "pairs": pairs, "x": k, "value": e}
                     for k, e in zip(truncations, errors)]
    axis.set_xscale("log", base=2)
    axis.set(xlabel=f"truncation K of T = {horizon} steps", ylabel="mean squared error", title="linear-quadratic problem",
             ylim=(0.02, None))  # room for the legend
    return rows


def variance(seed):
    """Variance against the unroll's length (P1 figure 4) and the number of truncations (P3), and where bias outweighs it."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    rows = sum((draw(axis, seed) for draw, axis in zip((unroll_variance, history_variance, crossover), axes)), [])
    for axis in axes:
        axis.legend()
    return figure, rows


# ---------------------------------------------------------------- what they cost, and which to use

def cost(seed, pairs=2):
    """Seconds and memory of backprop through K steps of the default optimizer, beside those of the unroll alone."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    learned, rows = model.hierarchical(), []
    key = jax.random.key(seed)
    theta, keys = learned.init(key), jax.random.split(key, pairs)
    for length in (25, 50, 100, 200, 400):
        problem = meta_train.inner_problem(tasks.mlp(), learned, "valid", length, adjoint=1.0)
        estimator = estimators.truncated_backprop(problem, num_pairs=pairs, truncation=length, horizon=length, cap=meta_train.CAP)
        forward = estimators.over_devices(functools.partial(episode_loss, problem, length), pairs)
        arguments = (theta, keys), (theta, estimator.init(theta, key), key)
        programs = [jax.jit(f).lower(*xs).compile() for f, xs in zip((forward, estimator.estimate), arguments)]
        times = np.array([[seconds(f, *xs) for f, xs in zip(programs, arguments)] for _ in range(12)][1:])  # in turn
        memory = [f.memory_analysis().temp_size_in_bytes / 1e6 for f in programs]
        rows.append({"K": length, "forward_seconds": np.median(times[:, 0]), "backprop_seconds": np.median(times[:, 1]),
                     "ratio": np.median(times[:, 1] / times[:, 0]), "forward_megabytes": memory[0], "backprop_megabytes": memory[1]})
    column = lambda name: [row[name] for row in rows]
    axes[0].plot(column("K"), column("ratio"), "o-")
    axes[0].set(xlabel="unrolled steps K", ylabel="backprop / forward, seconds", ylim=(0, 1.1 * max(column("ratio"))))
    for name in ("forward", "backprop"):
        axes[1].plot(column("K"), column(name + "_megabytes"), "o-", label=name)
    axes[1].set(xlabel="unrolled steps K", ylabel="megabytes of scratch memory", ylim=(0, None))
    axes[1].legend()
    return figure, rows


def scaling(seed, repeats=7):
    """Seconds and scratch memory of one estimate as one thing after another grows, each relative to its smallest; slopes of log to log."""
    def sums(n):
        """Tasks of n parameters that cost next to nothing but the optimizer's step."""
        return tasks.TaskFamily("sums", sample=lambda key: jax.random.normal(key, (n,)), init=lambda task, key: {"x": jnp.zeros(n)},
                                batch=lambda task, key, split: (), loss=lambda task, params, batch: jnp.mean((params["x"] - task) ** 2))

    mlp, default = tasks.mlp(), model.hierarchical()
    cases = [("pairs N, K = 20", n, default, mlp, n, 20) for n in (2, 4, 8, 16)]
    cases += [("steps K, N = 2", k, default, mlp, 2, k) for k in (10, 20, 40, 80)]
    cases += [("size of theta", None, model.hierarchical(lstm=2 * size, hidden=size), mlp, 2, 20) for size in (8, 16, 32, 64)]
    cases += [("size of a task", n, default, sums(n), 2, 20) for n in (1000, 10000, 100000)]
    cases += [("devices, a pair on each", n, default, mlp, n, 20) for n in range(1, jax.local_device_count() + 1)]
    rows = []
    for grows, x, learned, family, pairs, length in cases:
        problem = meta_train.inner_problem(family, learned, "valid", length, adjoint=1.0)
        estimator = estimators.truncated_backprop(problem, num_pairs=pairs, truncation=length, horizon=length, cap=meta_train.CAP)
        key = jax.random.key(seed)
        theta = learned.init(key)
        arguments = theta, estimator.init(theta, key), key
        program = jax.jit(estimator.estimate).lower(*arguments).compile()
        times = [seconds(program, *arguments) for _ in range(repeats)][1:]
        rows.append({"grows": grows, "x": x or sum(leaf.size for leaf in theta.values()), "seconds": np.median(times),
                     "megabytes": program.memory_analysis().temp_size_in_bytes / 1e6})
        print(rows[-1], flush=True)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharex=True)
    for axis, name in zip(axes, ("seconds", "megabytes")):
        for grows in dict.fromkeys(row["grows"] for row in rows):
            x, y = np.array([[row["x"], row[name]] for row in rows if row["grows"] == grows]).T
            slope = np.polyfit(np.log(x), np.log(y), 1)[0] if len(x) > 1 else np.nan
            axis.loglog(x / x[0], y / y[0], "o-", label=f"{grows}: {slope:.2f}")
        axis.set(xlabel="growth", ylabel=f"growth of {name}")
        axis.legend(title="slope")
    return figure, rows


def seconds(program, *arguments):
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


RACE = {"truncated_backprop": dict(truncation=100, num_pairs=2), "es": dict(truncation=20, num_pairs=8),
        "merged": dict(truncation=100, num_pairs=2), "pes": dict(truncation=20, num_pairs=8),
        "combined": dict(truncation=50, num_pairs=2)}


def race(seed, limit=5.0, points=4, horizon=100):
    """The outer loss of P1's optimizer on unseen draws of meta-training tasks against seconds, for all five estimators."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    learned, rows = model.per_parameter_mlp(), []
    problem = meta_train.inner_problem(tasks.mlp(), learned, "valid", horizon, adjoint=1.0)
    keys = jax.random.split(jax.random.key(seed + 1000), 32)
    losses = estimators.over_devices(functools.partial(episode_loss, problem, horizon), len(keys))
    test = jax.jit(lambda theta: jnp.mean(losses(theta, keys)))
    for name, color in COLORS.items():
        estimator = make(name, problem, 0.01, horizon=horizon, cap=meta_train.CAP, **RACE[name])
        adam = model.adam(3e-3)
        curves = []
        for run in range(3):
            key = jax.random.key(seed + run)
            theta = learned.init(key)
            particles, state = estimator.init(theta, key), adam.init(theta)
            if not run:
                step = outer_step(estimator, adam).lower(theta, state, particles, key).compile()
            curve, done, spent, i = [float(test(theta))], [0], 0.0, 0
            for point in range(points):
                while spent < limit * (point + 1) / points:
                    before, i = time.time(), i + 1
                    theta, state, particles = jax.block_until_ready(step(theta, state, particles, jax.random.fold_in(key, i)))
                    spent += time.time() - before
                curve.append(float(test(theta)))
                done.append(i)
            curves.append(curve)
            rows += [{"estimator": name, "seed": seed + run, "seconds": limit * p / points, "outer_steps": i, "loss": x}
                     for p, (i, x) in enumerate(zip(done, curve))]
        times = np.linspace(0, limit, points + 1)
        axis.plot(times, np.median(curves, 0), color=color, label=name)
        axis.fill_between(times, np.min(curves, 0), np.max(curves, 0), color=color, alpha=0.2)
    axis.set(xlabel="seconds of meta-training", ylabel="outer loss", title="median and range of 3 seeds")
    axis.legend()
    return figure, rows


def outer_step(estimator, optimizer):
    """One jitted step of the outer loop: (theta, optimizer state, particles, key) -> the first three."""
    @jax.jit
    def step(theta, state, particles, key):
        gradient, particles, _ = estimator.estimate(theta, particles, key)
        updates, state = optimizer.update(gradient, state)
        return jax.tree.map(jnp.add, theta, updates), state, particles
    return step


# ---------------------------------------------------------------- why longer is not better

def longer(seed, runs=3, looks=8, every=128, count=64):
    """Meta-training three times as long as the default's, looked at on held-out tasks. Before: the outer rate stays as it starts. After:
    it falls. Handed out: its average over the outer steps, with the step size fitted. More than an hour for three seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained", sharex=True)
    family, horizon, rows = tasks.mlp("held_out"), meta_train.Settings.horizon, []
    learned = model.LEARNED[meta_train.Settings.optimizer]()
    keys = jax.random.split(jax.random.key(0), count)
    watch = lambda make, hyper: np.array(evaluate.learning_curves(family, make, hyper, keys, horizon)[..., 1])
    adam = watch(model.adam, jnp.float32(evaluate.RATES))
    for run, (name, decay) in itertools.product(range(runs), {"before": 1e12, "after": meta_train.Settings.decay_steps}.items()):
        settings = meta_train.Settings(seed=seed + run, outer_steps=looks * every, decay_steps=decay)
        for state, row in meta_training(settings):
            if state.step % every:
                continue
            variants = {name: state.theta}
            if name == "after":
                variants["handed out"] = meta_train.fit_step_size(settings, state.average)
            curves = watch(learned.optimizer, jax.tree.map(lambda *x: jnp.stack(x), *variants.values()))
            for i, variant in enumerate(variants):
                win = lambda value: float(np.mean(evaluate.best(curves[:, i:i + 1], value) < evaluate.best(adam, value)))
                rows.append({"theta": variant, "seed": settings.seed, "outer_step": int(state.step), "smoothed": float(row["smoothed"]),
                             "win_mean": win(evaluate.mean_loss), "win_final": win(evaluate.final_loss)})
                print(rows[-1], flush=True)
    titles = ("outer loss, running mean", "lower mean test loss than tuned Adam", "lower final test loss than tuned Adam")
    for axis, column, title in zip(axes, ("smoothed", "win_mean", "win_final"), titles):
        for name, color in (("before", "C0"), ("after", "C1"), ("handed out", "C3")):
            if (name, column) == ("handed out", "smoothed"):
                continue
            y = np.array([row[column] for row in rows if row["theta"] == name]).reshape(runs, looks)
            x = every * np.arange(1, looks + 1)
            axis.plot(x, y.T, color=color, alpha=0.4, lw=1)
            axis.plot(x, y.mean(0), color=color, label=name)
        axis.set(xlabel="outer step", title=title, ylabel="" if column == "smoothed" else "share of held-out tasks")
        axis.legend()
    return figure, rows


# ---------------------------------------------------------------- how a learned optimizer behaves: f(seed, path of its theta)

def against_adam(family, path, count, horizon, seed):
    """Test curves [tasks, 1, points] of the optimizer at `path`, and [tasks, rates, points] of Adam, on the same tasks."""
    curves = evaluate.compare(family, *model.load(path), count, horizon, seed, {"Adam": evaluate.BASELINES["Adam"]})
    return curves["learned"][..., 1], curves["Adam"][..., 1]


def generalisation(seed, path, count=16, horizon=400, longer=2000):
    """The optimizer against tuned Adam on every family, on kinds of task that nothing is ever meta-trained on, and on longer runs."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    cases = {name: (make("held_out"), horizon) for name, make in tasks.FAMILIES.items()}
    cases |= {name: (make(), horizon) for name, make in evaluate.KINDS.items()}
    cases |= {f"{name}, {longer} steps": (tasks.FAMILIES[name]("held_out"), longer) for name in ("mlp", "function")}
    rows = []
    for place, (name, (family, steps)) in enumerate(cases.items()):
        mine, adam = against_adam(family, path, count, steps, seed)
        logs = np.log(evaluate.speedups(mine[:, 0], adam))
        wins = {win: float(np.mean(evaluate.best(mine, value) < evaluate.best(adam, value)))
                for win, value in (("win_mean", evaluate.mean_loss), ("win_final", evaluate.final_loss))}
        low, high = np.exp(evaluate.bootstrap(logs))
        rows.append({"kind": name, "speedup": np.exp(logs.mean()), "low": low, "high": high, **wins,
                     "diverged": int((~(mine[:, 0, -1] <= mine[:, 0, 0])).sum())})
        print(rows[-1], flush=True)
        axis.plot([low, high], [place, place], color="C0" if name in tasks.FAMILIES else "C1")
        axis.plot(rows[-1]["speedup"], place, "o", color="C0" if name in tasks.FAMILIES else "C1")
    axis.axvline(1, color="black", lw=1)
    axis.set_yticks(range(len(cases)), list(cases))
    axis.set(xscale="log", xlabel="times as fast as Adam, tuned per task (95% of draws of the tasks)")
    axis.invert_yaxis()
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
    learned, theta = model.load(path)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    rows = []
    for axis, (name, optimizer) in zip(axes, {"SGD": model.sgd(0.01), "Adam": model.adam(0.01), "learned": learned.optimizer(theta)}.items()):
        paths = np.array(valley_paths(optimizer, steps))
        start, end = np.linalg.norm(paths[:, 0].sum(1)) / np.sqrt(2), np.linalg.norm(paths[:, -1].sum(1)) / np.sqrt(2)
        rows.append({"optimizer": name, "distance_along_the_diagonal": end / start,
                     "distance_from_it": np.abs(np.diff(paths[:, -1])).mean()})
        axis.plot(*paths.transpose(2, 1, 0), color="C0", lw=0.8)
        axis.plot(*paths[:, -1].T, "o", color="C3", ms=3)
        axis.set(title=f"{name}: {end / start:.2f} of the way from the origin left", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    return figure, rows


def letter_data(rows, seed):
    """Ten held-out letters as `tasks.dataset` wants them: `rows` training images drawn from the training fonts, and all test images."""
    rng, data = np.random.default_rng(seed), tasks.letters()
    train, test = (data[f"held_out/{split}"][:10] for split in ("train", "test"))
    labels = np.arange(rows) % 10
    return {"x_train": train[labels, rng.integers(0, train.shape[1], rows)], "y_train": labels,
            "x_test": test.reshape(-1, *test.shape[2:]), "y_test": np.repeat(np.arange(10), test.shape[1])}


def adaptation(seed, path, count=4, horizon=400):
    """Width, batch size and size of the data set, against Adam at eight fixed learning rates (P2 figure 5)."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    learned, theta = model.load(path)
    rates, rows = np.float32(10.0 ** np.linspace(-4, -0.5, 8)), []
    keys = jax.random.split(jax.random.key(seed), count)
    one = jax.tree.map(lambda x: jnp.asarray(x)[None], theta)
    sweeps = {"width": ((4, 8, 16, 32, 64, 128), (8, 32)), "batch size": ((2, 8, 32, 64, 256), (8, 64)),
              "training images": ((50, 100, 200, 500, 2000), (560, 560))}
    for axis, (name, (values, (low, high))) in zip(axes, sweeps.items()):
        ends = []
        for value in values:
            data = letter_data(value if name == "training images" else 500, seed)
            sizes = {"width": dict(width=value), "batch size": dict(max_batch=value)}.get(name, {})
            family = tasks.dataset(data, **sizes)
            adam = evaluate.kept_curves(family, model.adam, jnp.asarray(rates), keys, horizon)
            mine = np.asarray(evaluate.learning_curves(family, learned.optimizer, one, keys, horizon))
            ends.append(np.median(np.concatenate([adam, mine], 1)[:, :, -1, 1], 0))  # [9], of the starts
            rows += [{"sweep": name, "value": value, "optimizer": f"Adam {rate:.1e}" if rate else "learned", "test_loss": loss}
                     for rate, loss in zip((*rates, None), ends[-1])]
        for i, line in enumerate(np.transpose(ends)):
            axis.loglog(values, line, color="C3" if i == 8 else plt.cm.Blues(0.3 + 0.08 * i), lw=2 if i == 8 else 1,
                        label="learned" if i == 8 else f"Adam {rates[i]:.0e}")
        axis.axvspan(low, high * 1.001, color="gray", alpha=0.2)
        axis.set(xlabel=name, ylabel="final test loss", ylim=(None, 5))
    axes[0].legend(fontsize="x-small")
    return figure, rows


def with_valid_loss(optimizer, horizon, given):
    """The optimizer, told given(loss, past validation losses [horizon], t) instead of the validation loss."""
    def update(grads, state, params, *, loss=None, valid_loss=None):
        state, past, t = state
        past = past.at[t].set(valid_loss)
        updates, state = optimizer.update(grads, state, params, loss=loss, valid_loss=given(loss, past, t))
        return updates, (state, past, t + 1)

    return model.Optimizer(lambda params: (optimizer.init(params), jnp.zeros(horizon), jnp.int32(0)), update)


def validation_feature(seed, path, count=64, horizon=400):
    """The same optimizer with its validation input as it is, cut, taken at a random earlier step, or replaced by the training loss."""
    learned, theta = model.load(path)
    keys, family = jax.random.split(jax.random.key(seed), count), tasks.mlp("held_out")
    earlier = lambda loss, past, t: past[(jax.random.uniform(jax.random.fold_in(jax.random.key(seed), t)) * (t + 1)).astype(int)]
    variants = {"as it is": lambda loss, past, t: past[t], "cut": lambda loss, past, t: None, "of an earlier step": earlier,
                "the training loss": lambda loss, past, t: loss}
    figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
    one, finals, rows = jax.tree.map(lambda x: jnp.asarray(x)[None], theta), {}, []
    for name, given in variants.items():
        make_optimizer = lambda theta, given=given: with_valid_loss(learned.optimizer(theta), horizon, given)
        finals[name] = np.log(np.asarray(evaluate.learning_curves(family, make_optimizer, one, keys, horizon))[:, 0, -1, 1])
        change = finals[name] - finals["as it is"]
        low, high = np.exp(evaluate.bootstrap(change))
        rows.append({"validation_loss": name, "final_test_loss_ratio": np.exp(change.mean()), "low": low, "high": high})
        axis.plot([low, high], [name, name], "C0")
        axis.plot(rows[-1]["final_test_loss_ratio"], name, "oC0")
    axis.axvline(1, color="black", lw=1)
    axis.set(xlabel="final test loss, relative to the optimizer as it is", title="what the validation loss is replaced by")
    axis.invert_yaxis()
    return figure, rows


def wall_clock(seed, path, count=4, horizon=400, width=128):
    """A conv net of some 50,000 parameters: test loss against seconds (P1's headline), baselines tuned."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    family, learned, rows = tasks.dataset(letter_data(1000, seed), "conv", width), model.load(path), []
    chosen = {name: evaluate.BASELINES[name] for name in ("momentum", "RMSProp", "Adam", "Adam + cosine")}
    curves = evaluate.compare(family, *learned, count, horizon, seed, chosen)
    makers = {name: functools.partial(make, 0.01, horizon) for name, (make, _) in chosen.items()}
    costs = evaluate.costs(family, {name: make() for name, make in makers.items()} | {"learned": learned[0].optimizer(learned[1])}, steps=20)
    for i, (name, c) in enumerate(curves.items()):
        test = np.median(c[..., 1], 0)  # [settings, points], of the starts
        line = test[np.where(np.isfinite(test).all(1), test[:, -1], np.inf).argmin()]
        seconds_spent = np.arange(len(line)) * evaluate.EVERY * costs[name][0]
        axis.semilogy(seconds_spent, line, color="C3" if name == "learned" else f"C{i + 4}", label=name)
        rows += [{"optimizer": name, "seconds": s, "test_loss": x} for s, x in zip(seconds_spent, line)]
    axis.set(xlabel="seconds", ylabel="test loss", title="a conv net; the baselines at the rate that ends lowest")
    axis.legend()
    return figure, rows


# ---------------------------------------------------------------- what it takes to learn one

def meta_training(settings):
    """Yields (Run, row of numbers) after each outer step of the settings' first family."""
    key, name = jax.random.key(settings.seed), meta_train.families(settings)[0]
    run, programs = meta_train.compiled(*meta_train.make_outer(settings), key)
    while run.step < settings.outer_steps:
        run, row = jax.block_until_ready(programs[name].result()(run, key))  # two at once would wait for each other's sums
        yield run, row


def loss_ratio(settings, theta, adam, keys, family):
    """Geometric mean over held-out tasks of the mean test loss under theta, over that of Adam, tuned per task."""
    learned = model.LEARNED[settings.optimizer](**meta_train.sizes(settings))
    one = jax.tree.map(lambda x: jnp.asarray(x)[None], theta)
    curves = np.asarray(evaluate.learning_curves(family, learned.optimizer, one, keys, settings.horizon))[..., 1]
    ratios = np.log(evaluate.best(curves, evaluate.mean_loss) / evaluate.best(adam, evaluate.mean_loss))
    return float(np.exp(np.minimum(ratios, np.log(10)).mean()))


def held_out_adam(family, keys, horizon):
    return evaluate.kept_curves(family, model.adam, jnp.asarray(evaluate.RATES), keys, horizon)[..., 1]


def architectures(seed, runs=3, minutes=3.0, looks=3, count=32, horizon=400):
    """Every learned optimizer of model.py, meta-trained on the same tasks for the same time (P2 figure 2a). Half an hour."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    family, keys, rows = tasks.mlp("held_out"), jax.random.split(jax.random.key(seed), count), []
    adam = held_out_adam(family, keys, horizon)
    for i, optimizer in enumerate(model.LEARNED):
        for run in range(runs):
            settings = meta_train.Settings(optimizer=optimizer, seed=seed + run, outer_steps=10 ** 6, horizon=horizon, truncation=horizon)
            spent, look, before = 0.0, 0, None
            for state, _ in meta_training(settings):
                now = time.perf_counter()
                spent, before = spent + (now - before if before else 0), now  # the first step is not counted: it was compiled
                if spent > 60 * minutes * (look + 1) / looks:
                    look += 1
                    rows.append({"optimizer": optimizer, "seed": settings.seed, "minutes": spent / 60, "outer_steps": int(state.step),
                                 "loss_ratio": loss_ratio(settings, state.average, adam, keys, family)})
                    print(rows[-1], flush=True)
                    before = time.perf_counter()
                if look == looks:
                    break
        found = [row for row in rows if row["optimizer"] == optimizer]
        ratios = np.array([row["loss_ratio"] for row in found]).reshape(runs, looks)
        times = minutes * np.arange(1, looks + 1) / looks
        axis.plot(times, np.median(ratios, 0), "o-", color=f"C{i}", label=optimizer)
        axis.fill_between(times, ratios.min(0), ratios.max(0), color=f"C{i}", alpha=0.2)
    axis.axhline(1, color="black", lw=1)
    axis.set(xlabel="minutes of meta-training", ylabel="mean test loss / tuned Adam's", title=f"median and range of {runs} seeds")
    axis.legend()
    return figure, rows


def num_tasks(seed, runs=2, steps=96, count=64, horizon=400, numbers=(1, 4, 16, 64, 256)):
    """How many tasks an optimizer must learn from before it is good on others (P2 figure 2b). A quarter of an hour."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    family, keys, rows = tasks.mlp("held_out"), jax.random.split(jax.random.key(seed), count), []
    adam = held_out_adam(family, keys, horizon)
    for number in numbers:
        for run in range(runs):
            settings = meta_train.Settings(num_tasks=number, seed=seed + run, outer_steps=steps, horizon=horizon, truncation=horizon)
            *_, (state, _) = meta_training(settings)
            rows.append({"num_tasks": number, "seed": settings.seed, "loss_ratio": loss_ratio(settings, state.average, adam, keys, family)})
            print(rows[-1], flush=True)
    ratios = np.array([row["loss_ratio"] for row in rows]).reshape(len(numbers), runs)
    axis.semilogx(numbers, np.median(ratios, 1), "o-")
    axis.fill_between(numbers, ratios.min(1), ratios.max(1), alpha=0.2)
    axis.axhline(1, color="black", lw=1)
    axis.set(xlabel="tasks learned from", ylabel="mean test loss / tuned Adam's, held-out tasks")
    return figure, rows


def self_training(seed, path, steps=400, horizon=100, rates=(1e-3, 3e-3, 1e-2, 3e-2), beyond=3):
    """The learned optimizer moves the theta of a new one, from scratch, and on beyond its own horizon; beside Adam (P2 figure 8)."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    common = dict(optimizer="per_parameter_mlp", seed=seed, horizon=horizon, truncation=horizon, outer_steps=beyond * steps)
    movers = {"learned": dict(outer_optimizer=path)} | {f"Adam {rate:g}": dict(learning_rate=rate, decay_steps=1e12) for rate in rates}
    rows = []
    for name, options in movers.items():
        curve = np.array([float(row["smoothed"]) for _, row in meta_training(meta_train.Settings(**common, **options))])
        axis.plot(1 + np.arange(len(curve)), curve, label=name, color="C3" if name == "learned" else None, lw=2 if name == "learned" else 1)
        rows += [{"mover": name, "outer_step": i + 1, "smoothed": curve[i]} for i in range(9, len(curve), 10)]
    axis.axvline(steps, color="black", lw=1, ls=":")
    axis.set(xlabel="outer step (dotted: the longest that the mover was trained for)", ylabel="outer loss, running mean")
    axis.legend()
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
            ratios = np.where(np.isfinite(curves).all(-1), curves[..., -1] / curves[..., 0], 1.0)
            found.append(np.sqrt(np.clip(ratios, 0, 1)))
        return np.concatenate(found)

    order = greedy(ends("meta_train", count), size)
    print("evaluate.NADAMW_LIST is the beginning of", order, flush=True)
    held_out = ends("held_out", unseen)
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, chosen in (("the list", order), ("as drawn", range(size))):
        best = np.minimum.accumulate(held_out[:, list(chosen)], 1).mean(0)
        axis.semilogx(1 + np.arange(size), best, label=name)
        rows += [{"order": name, "tried": i + 1, "setting": setting, "mean": mean} for i, (setting, mean) in enumerate(zip(chosen, best))]
    axis.set(xlabel="settings tried on each task", ylabel="root of the final test loss over its start, mean")
    axis.legend()
    return figure, rows


EXPERIMENTS = {"gallery": gallery, "landscape": landscape, "truncation-bias": truncation_bias, "variance": variance, "cost": cost,
               "scaling": scaling, "race": race, "longer": longer, "settings-list": settings_list, "architectures": architectures,
               "num-tasks": num_tasks}
BEHAVIOURS = {"generalisation": generalisation, "regularisation": regularisation, "adaptation": adaptation,
              "validation-feature": validation_feature, "wall-clock": wall_clock, "self-training": self_training}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".")
    parser.add_argument("name", choices=[*EXPERIMENTS, *BEHAVIOURS])
    parser.add_argument("--theta", metavar="FILE", help=f"whose behaviour it is, for {', '.join(BEHAVIOURS)} (default: the newest run's)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--out", default="figures", help="folder for the picture and the table")
    options = parser.parse_args(arguments)
    path = os.path.join(options.out, options.name)
    start = time.time()
    try:
        os.makedirs(options.out, exist_ok=True)
        run = EXPERIMENTS.get(options.name)
        if options.name in BEHAVIOURS:
            theta = options.theta or evaluate.newest_run()
            model.load(theta)  # a wrong file is found at once
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
