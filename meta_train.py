"""Meta-train a learned optimizer: `python meta_train.py`, and nothing else, learns one that beats tuned Adam.

The loop in `train` is the whole program: estimate the meta-gradient, clip it, let Adam move theta, average. At the end
`fit_step_size` mends by trial what backprop was seen to get wrong: the size of the steps, of biases and of all.
"""
import time

LAUNCH = time.monotonic()  # importing JAX is a part of the wait

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import fcntl
import functools
import json
import os
import signal
import sys
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree

import estimators
import evaluate
import model
import tasks


def flag(default, why):
    return dataclasses.field(default=default, metadata={"why": why})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every field is a flag. The defaults are those of the README's figures; RECIPES holds what the others need."""
    tasks: str = flag("mlp", "what it learns from: families of tasks, joined by commas, or all")
    num_tasks: int = flag(0, "tasks of each family, each measured against its own tuned Adam (0: ever new ones, against their start)")
    optimizer: str = flag("hierarchical", f"what to meta-train: {', '.join(model.LEARNED)}")
    output: str = flag("anchored", "form of the optimizer's step: anchored (on Adam's) or papers")
    estimator: str = flag("truncated_backprop", "of the meta-gradient: truncated_backprop, es, merged, pes or combined")
    target: str = flag("valid", "the loss that theta is for: valid (held-out batches, as both papers advise) or train")
    outer_steps: int = flag(320, "updates of theta in all; a finished run can be resumed with more")
    minutes: float = flag(7.8, "stop then even if steps are left, fit and compare; counted from each launch")
    save_seconds: float = flag(30.0, "time between two saves")
    seed: int = flag(0, "of theta, tasks and noise")
    horizon: int = flag(model.HORIZON, "T, inner steps of an episode")
    truncation: int = flag(model.HORIZON, "K, inner steps of one unroll; only K = T leaves backprop without truncation bias")
    num_pairs: int = flag(2, "N, antithetic pairs (of trajectories; without noise each pair is a single one)")
    sigma: float = flag(0.0, "standard deviation of the smoothing noise on theta; all but truncated_backprop need some")
    adjoint: float = flag(1.0, "largest norm of the signal that backprop sends from one inner step's parameters to those before")
    clip: float = flag(0.3, "largest norm of one trajectory's pathwise gradient")
    learning_rate: float = flag(6e-3, "of the outer Adam at its start")
    decay_steps: float = flag(32.0, "outer steps after which that rate has halved; later it falls like 1 / step")
    outer_optimizer: str = flag("", "theta.npz of a learned optimizer, told of the outer steps, that moves theta in Adam's place, without its rate and decay")
    fit: int = flag(128, "meta-training tasks of each family that fit the step size at the end (0: leave it; anchored only)")
    compare: int = flag(64, "held-out tasks of each family in the comparison at the end")


RECIPES = {"truncated_backprop": {},
           "es": dict(outer_steps=5000, decay_steps=500.0, truncation=20, num_pairs=16, sigma=0.01, learning_rate=1e-3),
           "merged": dict(sigma=0.01),
           "pes": dict(outer_steps=5000, decay_steps=500.0, truncation=20, num_pairs=16, sigma=0.01, learning_rate=1e-3),
           "combined": dict(outer_steps=1000, decay_steps=100.0, truncation=100, num_pairs=4, sigma=0.01)}
MACHINES = [  # flags that are not kept with a run: a resumed one can have others
    ("devices", int, os.cpu_count(), "CPU devices of this process, which share the pairs"),
    ("coordinator", str, "", "address HOST:PORT of process 0, if several processes share the pairs; or auto, where JAX can tell"),
    ("processes", int, None, "how many there are"),
    ("process", int, None, "which one this is, from 0"),
    ("wait", float, 300.0, "seconds after which this process ends if an outer step, with its compiling, is not over: another may be gone")]
SPLITS = {"valid": "outer_valid", "train": "train"}  # where the batches of the outer loss come from
PATIENCE = 100  # outer steps in a row that may come to nothing
MULTIPLES = 2.0 ** np.arange(-1.5, 0.6, 0.5)  # of the step size, tried by `fit_step_size`
BIASES = 2.0 ** np.arange(0, -5, -1)  # of the step size of biases, likewise


class Run(NamedTuple):
    """All that an outer step reads and writes; what a checkpoint holds."""
    theta: dict
    average: dict        # of theta over all outer steps, later ones counting more: what is handed out
    opt_state: Any
    particles: dict      # of each family
    step: jax.Array
    smoothed: dict       # running mean of each family's outer loss


def outer_loss(loss, start, progress, baseline=None):
    """10 (t/T)^4 sqrt(l / l_0): what a loss l counts after inner step t of T (progress = t/T) in a task that began at l_0.

    Dividing by l_0 makes tasks comparable. The rest is this project's: the root lets neither the tasks that can be solved
    dominate, as the logarithm would, nor those that can't, as l / l_0 would; and where training ends matters more than how
    it begins. The 1e-6 keeps the root differentiable at l = 0. With the root b that a task's best baseline reaches, the
    root r becomes (r - b) / (1 - b), as P2 (section 3.2) normalises: 1 is the start, 0 as good as the baseline.
    """
    root = jnp.sqrt(loss / start + 1e-6)
    if baseline is not None:
        root = (root - baseline) / (1 - baseline)
    return 10 * progress ** 4 * root


CAP = 10 * 10 ** 0.5  # the outer loss of ten times the start, at the end (without a baseline); P1 caps the loss itself at 10


class Pool(NamedTuple):
    """M tasks of a family, and what Adam, tuned for each, reaches there."""
    keys: jax.Array       # [M], for the family's `sample`
    baselines: jax.Array  # [M], for `outer_loss`; at most 0.9, since P2 caps what such a division gives, too


def inner_problem(family, learned, target, horizon, adjoint=jnp.inf, pool=None):
    """Training one task of `family` with the learned optimizer, as something an estimator can unroll.

    The loss after an inner step is `outer_loss` of one outer_valid (or train) batch. Each episode has a new task or, with a
    Pool, one of that.
    """
    split, plain_loss = SPLITS[target], family.loss
    family = family._replace(loss=lambda task, params, batch: plain_loss(task, estimators.finite_adjoint(params), batch))

    def draw(key):
        if pool is None:
            return family.sample(key), None
        i = jax.random.randint(key, (), 0, len(pool.keys))
        return family.sample(pool.keys[i]), pool.baselines[i]

    def reset(theta, key):
        task_key, init_key, batch_key = jax.random.split(key, 3)
        task, baseline = draw(task_key)
        inner = tasks.init_inner(family, learned.optimizer(theta), task, init_key)
        return task, inner, family.loss(task, inner.params, family.batch(task, batch_key, split)), baseline

    def step(theta, state, key):
        task, inner, start, baseline = state
        step_key, batch_key = jax.random.split(key)
        inner = inner._replace(params=estimators.bounded_adjoint(inner.params, adjoint))
        inner = tasks.inner_step(family, learned.optimizer(theta), task, inner, step_key)
        loss = family.loss(task, inner.params, family.batch(task, batch_key, split))
        return (task, inner, start, baseline), outer_loss(loss, start, inner.step / horizon, baseline)

    return estimators.InnerProblem(reset, step)


def families(settings):
    """The names of the families that theta learns from."""
    return list(tasks.FAMILIES) if settings.tasks == "all" else settings.tasks.split(",")


def sizes(settings):
    """The arguments of the optimizer to be learned; saved with it."""
    if settings.optimizer == "component_lstm":
        return {}
    return {"anchored": settings.output == "anchored", "horizon": settings.horizon}


@functools.cache
def watched(family, target):
    """The family with the batches of the outer loss where `evaluate.learning_curves` asks for the test split's."""
    return family._replace(batch=lambda task, key, split: family.batch(task, key, SPLITS[target] if split == "test" else split))


def outer_losses(curves):
    """Mean capped `outer_loss` over the episodes that `evaluate.learning_curves` ran on `watched` tasks: [n, h, points, 2] -> [n, h]."""
    losses = np.asarray(curves)[..., 1]
    progress = np.linspace(0, 1, losses.shape[-1])[None, None, 1:]
    values = np.array(outer_loss(losses[..., 1:], losses[..., :1], progress))
    return np.where(np.isfinite(values), np.minimum(values, CAP), CAP).mean(2)


def make_pool(settings, family):
    """The Pool of `settings.num_tasks` tasks, the same for all seeds; or None. Adam's runs are kept on disk."""
    if not settings.num_tasks:
        return None
    print(f"Adam is tuned on {settings.num_tasks} tasks of {family.name}, unless that was done before", flush=True)
    keys = jax.random.split(jax.random.key(2 ** 31), settings.num_tasks)
    losses = outer_losses(evaluate.kept_curves(watched(family, settings.target), model.adam, jnp.float32(evaluate.RATES), keys, settings.horizon))
    worst = outer_losses(np.ones((1, 1, settings.horizon // evaluate.EVERY + 1, 2)))  # what a task counts that stays where it began
    sampled = jax.vmap(lambda key: jax.random.split(key, 4)[0])(keys)  # as `evaluate.learning_curve` does
    return Pool(sampled, jnp.minimum(jnp.float32(losses.min(1) / worst[0, 0]), 0.9))


def make_outer(settings):
    """-> (start(key) -> Run, {family: outer_step(run, key) -> (run, row of numbers)}), all jitted.

    An outer step learns from one family; `train` takes them in turn.
    """
    learned = model.LEARNED[settings.optimizer](**sizes(settings))
    clip = {} if settings.estimator in ("es", "pes") else {"clip": settings.clip}
    make = functools.partial(
        getattr(estimators, settings.estimator), num_pairs=settings.num_pairs, truncation=settings.truncation,
        horizon=settings.horizon, sigma=settings.sigma, cap=CAP, **clip)
    each = {}
    for name in families(settings):
        family = tasks.FAMILIES[name]()
        pool = make_pool(settings, family)
        each[name] = make(inner_problem(family, learned, settings.target, settings.horizon, settings.adjoint, pool))
    outer = model.nadamw(settings.learning_rate, nesterov=False, warmup=10)
    if settings.outer_optimizer:
        mover, its_theta = model.load(settings.outer_optimizer, settings.outer_steps)
        outer = mover.optimizer(its_theta)

    def start(key):
        theta_key, particle_key = jax.random.split(key)
        theta = learned.init(theta_key)
        moved = theta if settings.outer_optimizer else ravel_pytree(theta)[0]
        particles = {name: estimator.init(theta, particle_key) for name, estimator in each.items()}
        smoothed = dict.fromkeys(each, jnp.float32(jnp.nan))
        return Run(theta, theta, outer.init(moved), particles, jnp.int32(0), smoothed)

    def outer_step(name, run, key):
        key = jax.random.fold_in(key, run.step)
        gradient, particles, metrics = each[name].estimate(run.theta, run.particles[name], key)
        gradient, _ = ravel_pytree(gradient)  # one long vector is faster to compile than a dict of small arrays
        theta, unravel = ravel_pytree(run.theta)
        average, _ = ravel_pytree(run.average)
        clipped = jnp.clip(gradient, -0.1, 0.1)  # P2: without this no training occurs
        loss, before = metrics["loss"], run.smoothed[name]
        if settings.outer_optimizer:  # there are no validation losses of the outer problem (P2 appendix F.4)
            updates, opt_state = outer.update(unravel(clipped), run.opt_state, run.theta, loss=loss, valid_loss=loss)
            updates, rate = ravel_pytree(updates)[0], 1.0
        else:  # most is learned early; what comes later needs averaging
            updates, opt_state = outer.update(clipped, run.opt_state)
            rate = 1 / (1 + run.step / settings.decay_steps)
        smoothed = jnp.where(jnp.isnan(before), loss, 0.97 * before + 0.03 * loss)
        row = metrics | {"step": run.step + 1, "smoothed": smoothed, "gradient": jnp.linalg.norm(gradient)}
        theta = theta + rate * updates
        average = average + 2 / (run.step + 2) * (theta - average)  # weights 1, 2, 3, ...: the noise of single steps averages out
        return Run(unravel(theta), unravel(average), opt_state, run.particles | {name: particles}, run.step + 1,
                   run.smoothed | {name: smoothed}), row

    rows = estimators.sharding(settings.num_pairs)
    everywhere = jax.NamedSharding(rows.mesh, jax.sharding.PartitionSpec())
    particles = dict.fromkeys(each, estimators.Particles(rows, everywhere))  # the pairs are shared out, the rest is copied
    layout = Run(everywhere, everywhere, everywhere, particles, everywhere, everywhere)
    return (jax.jit(start, out_shardings=layout, compiler_options={"xla_backend_optimization_level": 0}),  # it runs once
            {name: jax.jit(functools.partial(outer_step, name), in_shardings=(layout, everywhere), out_shardings=(layout, everywhere))
             for name in each})


def compiled(start, outer_steps, key):
    """A fresh Run and each family's outer step, as a Future of the compiled program: most of the start-up is spent here.

    Training begins when the first is there; the others compile meanwhile, a core or two for each.
    """
    like = jax.eval_shape(start, key)
    pool = concurrent.futures.ThreadPoolExecutor(max(1, os.cpu_count() // 2))
    programs = {name: pool.submit(step.lower(like, key).compile) for name, step in outer_steps.items()}
    pool.shutdown(wait=False)
    return start(key), programs


def train(settings, folder, run, programs, wait=300.0):
    """Outer steps until they or the minutes run out -> Run, whole and in numpy arrays. Saves now and then, and at the end.

    Ctrl-C and SIGTERM are heard after the step they fall in: an exception could come between a step and its row in the log,
    or get lost in one of JAX's callbacks. Several processes do the same outer steps, stop together if one is to stop, and the
    first of them writes; see `together` for `wait`. ValueError after PATIENCE steps in a row that nothing finite came of;
    what is on disk is then from before them.
    """
    key, names = jax.random.key(settings.seed), families(settings)
    print(f"{'step':>6} {'family':11} {'loss':>7} {'smoothed':>8} {'gradient':>8} {'capped':>6} {'dropped':>7} {'s/step':>7} {'left':>6}")
    first, start = int(run.step), time.monotonic()
    saved, fruitless = start, 0
    stop = threading.Event()
    defaults = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    with open(os.devnull if jax.process_index() else os.path.join(folder, "log.csv"), "a", newline="") as log:
        try:
            while True:
                family = names[int(run.step) % len(names)]
                due = time.monotonic() > saved + settings.save_seconds and not fruitless
                with together(wait, folder):
                    flags = np.array([stop.is_set(), seconds_left(settings) <= 0, due])
                    stopped, late, due = multihost_utils.process_allgather(flags[None], tiled=True).any(0)
                    if stopped or late or run.step >= settings.outer_steps:
                        break
                    if due:
                        log.flush()
                        save(settings, folder, run)
                        saved = time.monotonic()
                    outer_step = programs[family].result()
                    before = time.monotonic()
                    run, row = outer_step(run, key)
                    row = jax.device_get(row) | {"seconds": time.monotonic() - before}
                row = {"step": int(row["step"]), "family": family, "loss": row["loss"], "smoothed": row["smoothed"]} | row
                if not log.tell():
                    csv.writer(log).writerow(row)
                csv.writer(log).writerow([x if isinstance(x, (str, int)) else f"{x:.6g}" for x in row.values()])
                if row["step"] == first + 1:
                    print(f"first outer step {time.monotonic() - LAUNCH:.1f} s after launch")
                    start = time.monotonic()
                if (row["step"] - 1) // len(names) % 10 == 9 or row["capped"] or row["dropped"]:
                    print_progress(row, settings, (time.monotonic() - start) / max(row["step"] - first - 1, 1))
                fruitless = 0 if row["gradient"] > 0 else fruitless + 1
                if fruitless == PATIENCE:
                    raise ValueError(f"{PATIENCE} outer steps in a row gave no finite loss or gradient; what {folder} holds is from before "
                                     "them. Begin anew with a lower --learning-rate.")
            log.flush()
            with together(wait, folder):
                run = save(settings, folder, run)
        finally:
            for program in programs.values():
                program.cancel()  # if it is still to be compiled
            for number, default in defaults.items():
                signal.signal(number, default)
    if stopped:
        raise KeyboardInterrupt
    return run


def fit_step_size(settings, theta):
    """Theta with the steps of biases, and then all steps, multiplied by what makes the mean outer loss of fresh meta-training tasks least.

    Along the step size, backprop's slope was seen to disagree with finite differences. Two numbers need no gradient: five multiples
    of each are tried; of all steps' outer losses, parabolas tell the rest. A theta without log_lr can't be fitted. The tasks are neither
    those of `make_pool` nor those of `evaluate.compare`.
    """
    learned = model.LEARNED[settings.optimizer](**sizes(settings))
    keys = jax.random.split(jax.random.key(2 ** 31 + settings.seed), settings.num_tasks + settings.fit)[settings.num_tasks:]

    def trial(theta, logarithm, multiples):
        """Outer losses [tasks, multiples] with that entry of theta raised."""
        variants = jax.tree.map(lambda x: jnp.stack([x] * len(multiples)), theta)
        variants[logarithm] += jnp.log(jnp.float32(multiples))
        watch = [watched(tasks.FAMILIES[name](), settings.target) for name in families(settings)]
        values = np.concatenate([outer_losses(evaluate.learning_curves(family, learned.optimizer, variants, keys, settings.horizon))
                                 for family in watch])
        print(f"{logarithm}: outer loss " + ", ".join(f"{v:.4f} at {m:.2f} x" for m, v in zip(multiples, values.mean(0))), flush=True)
        return values

    bias = BIASES[trial(theta, "log_bias", BIASES).mean(0).argmin()]
    theta = theta | {"log_bias": theta["log_bias"] + jnp.float32(np.log(bias))}
    multiple = cautious_minimum(MULTIPLES, trial(theta, "log_lr", MULTIPLES))
    print(f"steps of biases multiplied by {bias:.3g}, then all by {multiple:.3g}")
    return theta | {"log_lr": theta["log_lr"] + jnp.float32(np.log(multiple))}


def cautious_minimum(multiples, values):
    """Where the mean over tasks of values [tasks, multiples] is least, less two standard errors; within their range.

    Each task has its parabola over the logarithm of the multiple. That its slope differs from task to task makes the lowest
    point of the mean one uncertain; of what can't be told apart from it, the shortest steps are the safest.
    """
    x = np.log(multiples)
    curvatures, slopes, _ = np.polyfit(x, values.T, 2)  # [tasks] each
    curvature = curvatures.mean()
    if curvature <= 0:
        return multiples[np.argmin(values.mean(0))]
    lowest = -slopes.mean() / (2 * curvature)
    error = (slopes + 2 * curvatures * lowest).std() / np.sqrt(len(values)) / (2 * curvature)
    return float(np.exp(np.clip(lowest - 2 * error, x[0], x[-1])))


# ---------------------------------------------------------------- several processes

def connect(machines):
    """Makes this process one of several, which share the pairs of each estimate; a ConnectionError if it can't be."""
    if not machines.coordinator:
        return
    given = {} if machines.coordinator == "auto" else dict(coordinator_address=machines.coordinator)
    jax.config.update("jax_enable_recoverability", True)  # or JAX would abort this process when another one ends
    never = 10 ** 5  # seconds: it is `together` that limits the waiting
    with together(machines.wait):
        jax.distributed.initialize(**given, num_processes=machines.processes, process_id=machines.process,
                                   initialization_timeout=never, heartbeat_timeout_seconds=never, shutdown_timeout_seconds=5)
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # one of them tells what happens


@contextlib.contextmanager
def together(wait, folder=None):
    """What is inside needs the other processes. A ConnectionError if one is gone; if one is silent for `wait` seconds, the end.

    Nothing can be told to a thread that waits for another machine, so then the process ends here, with one sentence.
    """
    if folder and not jax.distributed.is_initialized():
        yield  # there are no others
        return
    advice = f"; end them all, and go on with --resume {folder}." if folder else "; is --coordinator right, and has each been started?"

    def end():
        print(f"meta_train.py: error: no answer from the other processes for {wait:g} s{advice}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(wait, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise ConnectionError(f"the other processes can't be reached ({str(error).splitlines()[0][:200]}){advice}") from error
    finally:
        timer.cancel()


# ---------------------------------------------------------------- on disk and on screen

def save(settings, folder, run):
    """theta.npz for use, checkpoint.npz to go on from, curves.png to look at; each is replaced whole or not at all -> Run.

    The first process writes what it gathers from all, so that a run can go on with other devices and processes.
    """
    run = multihost_utils.process_allgather(run, tiled=True)
    if jax.process_index() == 0:
        model.write_npz(os.path.join(folder, "checkpoint.npz"), {
            "settings": np.array(json.dumps(dataclasses.asdict(settings))),
            **{f"leaf{i:04}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(run))}})
        save_theta(dataclasses.replace(settings, fit=0), folder, run)  # it tells that it is not fitted yet
        draw_curves(folder)
    return run


def save_theta(settings, folder, run):
    model.save(os.path.join(folder, "theta.npz"), settings.optimizer, run.average, sizes=sizes(settings),
               outer_steps_done=int(run.step), **dataclasses.asdict(settings))


def restore(path, arrays, fresh):
    """The Run in a checkpoint, shaped like `fresh`."""
    like, treedef = jax.tree.flatten(fresh)
    leaves = [arrays.get(f"leaf{i:04}") for i in range(len(like))]
    if any(x is None or x.shape != y.shape or x.dtype != y.dtype for x, y in zip(leaves, like)):
        raise ValueError(f"{path} was written by another version of this program; it can be evaluated but not resumed.")
    return treedef.unflatten([jax.device_put(x, y.sharding) for x, y in zip(leaves, like)])


def draw_curves(folder):
    with open(os.path.join(folder, "log.csv")) as file:
        rows = list(csv.DictReader(file))
    figure, axes = evaluate.plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for i, family in enumerate(dict.fromkeys(row["family"] for row in rows)):
        column = lambda name: [float(row[name]) for row in rows if row["family"] == family]
        axes[0].plot(column("step"), column("loss"), color=f"C{i}", lw=0.5, alpha=0.3)
        axes[0].plot(column("step"), column("smoothed"), color=f"C{i}", label=family)
        axes[1].semilogy(column("step"), column("gradient"), color=f"C{i}", lw=0.7)
    axes[0].set(xlabel="outer step", ylabel="outer loss")
    if rows:
        axes[0].legend()
    axes[1].set(xlabel="outer step", ylabel="norm of the meta-gradient")
    partial = os.path.join(folder, "curves.partial.png")
    figure.savefig(partial, dpi=90)
    evaluate.plt.close(figure)
    os.replace(partial, os.path.join(folder, "curves.png"))


def seconds_left(settings):
    return LAUNCH + 60 * settings.minutes - time.monotonic()


def print_progress(row, settings, pace):
    left = min((settings.outer_steps - row["step"]) * pace, seconds_left(settings))
    print(f"{row['step']:6} {row['family']:11} {row['loss']:7.3f} {row['smoothed']:8.4f} {row['gradient']:8.3f} {row['capped']:6} "
          f"{row['dropped']:7} {row['seconds']:7.2f} {max(left, 0) / 60:5.1f}m", flush=True)


@contextlib.contextmanager
def alone(folder):
    """Inside, no other run can use the folder; however this process ends, it can then. ValueError if one is at work there."""
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another run is at work in {folder}: wait for it, or choose another folder.") from None
        yield
    finally:
        os.close(held)


def keep_rows(path, steps):
    """Drops what the log says of outer steps that were lost with the process that made them."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if "family" not in (reader.fieldnames or ["family"]):
            raise ValueError(f"{path} was written by another version of this program; its run can be evaluated but not resumed.")
        rows = [row for row in reader if row["family"] and int(row["step"]) <= steps]  # the last row may be a part of one
    with open(path + ".partial", "w", newline="") as file:
        if rows:
            writer = csv.DictWriter(file, reader.fieldnames)
            writer.writeheader()
            writer.writerows(rows)
    os.replace(path + ".partial", path)


def print_comparison(settings, folder, run):
    """Held-out tasks: a table for each family on screen, all in table.json, and comparison-<family>.png in the folder."""
    learned, results = model.LEARNED[settings.optimizer](**sizes(settings)), {}
    for name in families(settings):
        curves = evaluate.compare(tasks.FAMILIES[name]("held_out"), learned, run.average, settings.compare, settings.horizon)
        results[name] = evaluate.summary(curves)
        evaluate.print_summary(name, results[name])
        evaluate.picture(os.path.join(folder, f"comparison-{name}.png"), curves)
    with open(os.path.join(folder, "table.json"), "w") as file:
        json.dump(results, file, indent=2)


# ---------------------------------------------------------------- the command line

def parse():
    """-> (settings, folder, the arrays of the checkpoint to go on from, or None, the machines, the parser for its errors)."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".", argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Settings):
        parser.add_argument("--" + field.name.replace("_", "-"), type=field.type,
                            help=f"{field.metadata['why']} (default: {field.default})")
    parser.add_argument("--out", help="folder of the run (default: runs/<date>-<time>)")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder, on these or other machines")
    for name, kind, default, why in MACHINES:
        parser.add_argument("--" + name, type=kind, default=default, help=f"{why} (default: {default})")
    given = vars(parser.parse_args())
    folder, resume = given.pop("out", None), given.pop("resume", None)
    machines = argparse.Namespace(**{name: given.pop(name) for name, *_ in MACHINES})
    arrays = None
    try:
        if resume is not None:
            if folder:
                raise ValueError("--resume names the folder already; leave --out away.")
            folder, path = resume, os.path.join(resume, "checkpoint.npz")
            arrays = model.read_npz(path)
            try:
                stored = dict(json.loads(str(arrays["settings"])))
            except (KeyError, ValueError, TypeError):
                stored = {}
            if set(stored) != {field.name for field in dataclasses.fields(Settings)}:
                raise ValueError(f"{path} is not a checkpoint of this program.")
            for name in given:
                if name not in ("outer_steps", "minutes", "decay_steps", "fit", "compare") and given[name] != stored[name]:
                    raise ValueError(f"{folder} was begun with {name} = {stored[name]}, not {given[name]}: "
                                     "resume it without that flag, or start a new run.")
            given = stored | given
        settings = Settings(**RECIPES.get(given.get("estimator", Settings.estimator), {}) | given)
        check(settings)
        check_machines(machines)
        folder = folder or time.strftime("runs/%Y%m%d-%H%M%S")
    except ValueError as error:
        parser.error(str(error))
    return settings, folder, arrays, machines, parser


def check_machines(machines):
    """ValueError, with one sentence, for a number or address that can't be."""
    for name in ("devices", "wait"):
        if not getattr(machines, name) > 0:
            raise ValueError(f"--{name} must be positive, not {getattr(machines, name)}.")
    if machines.coordinator in ("", "auto"):
        if (machines.processes, machines.process) != (None, None):
            raise ValueError("--processes and --process need --coordinator HOST:PORT, the same for all.")
    elif not machines.coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"--coordinator must be HOST:PORT or auto, not {machines.coordinator}.")
    elif machines.processes is None or machines.process is None or not 0 <= machines.process < machines.processes:
        raise ValueError("--coordinator needs --processes P and, for each of them, another --process from 0 to P - 1.")


def check(settings):
    """ValueError, with one sentence, for settings that can't work."""
    for name, allowed in (("optimizer", model.LEARNED), ("output", ("anchored", "papers")),
                          ("estimator", RECIPES), ("target", SPLITS)):
        if getattr(settings, name) not in allowed:
            raise ValueError(f"--{name} must be one of {', '.join(allowed)}, not {getattr(settings, name)}.")
    for name in families(settings):
        if name not in tasks.FAMILIES or families(settings).count(name) > 1:
            raise ValueError(f"--tasks must be all, or some of {', '.join(tasks.FAMILIES)} joined by commas, not {settings.tasks}.")
    for name in ("outer_steps", "minutes", "save_seconds", "horizon", "truncation", "num_pairs", "adjoint", "clip", "learning_rate",
                 "decay_steps"):
        if not getattr(settings, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {getattr(settings, name)}.")
    for name in ("seed", "outer_steps"):
        if abs(getattr(settings, name)) >= 2 ** 31:
            raise ValueError(f"--{name.replace('_', '-')} must be smaller than 2^31, not {getattr(settings, name)}.")
    for name in ("num_tasks", "fit"):
        if getattr(settings, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, it is {getattr(settings, name)}.")
    if settings.compare < 4:
        raise ValueError(f"--compare must be at least 4, not {settings.compare}.")
    if settings.horizon % settings.truncation or settings.horizon % evaluate.EVERY:
        raise ValueError(f"--horizon must be a multiple of --truncation and of {evaluate.EVERY}, "
                         f"not {settings.horizon} with {settings.truncation}.")
    if not settings.sigma >= 0 or settings.estimator != "truncated_backprop" and not settings.sigma:
        least = "at least 0" if settings.estimator == "truncated_backprop" else "positive"
        raise ValueError(f"--sigma must be {least} for {settings.estimator}, not {settings.sigma}.")


def main():
    settings, folder, arrays, machines, parser = parse()
    try:
        evaluate.configure_jax(machines.devices)
        connect(machines)
        if settings.num_pairs % jax.process_count():
            raise ValueError(f"--num-pairs must be a multiple of the {jax.process_count()} processes, not {settings.num_pairs}.")
        first = jax.process_index() == 0
        if first and not arrays and os.path.exists(folder):
            raise ValueError(f"{folder} exists already: choose another --out, or go on with --resume {folder}.")
        begin, outer_steps = make_outer(settings)
        if first and not arrays:
            os.makedirs(folder)
        with alone(folder) if first else contextlib.nullcontext():
            run, programs = compiled(begin, outer_steps, jax.random.key(settings.seed))
            if arrays:
                run = restore(folder, arrays, run)
            if first and arrays:
                keep_rows(os.path.join(folder, "log.csv"), int(run.step))
            print(f"{folder}: {settings}\n{sum(x.size for x in run.theta.values())} meta-parameters, "
                  f"pairs on {len(run.step.sharding.device_set)} devices")
            run = train(settings, folder, run, programs, machines.wait)
            if not first:
                return  # what follows is not shared
            if settings.fit and "log_lr" in run.theta:
                run = run._replace(average=fit_step_size(settings, run.average))
                save_theta(settings, folder, run)  # the checkpoint keeps the average to go on from
            print_comparison(settings, folder, run)
        print(f"{time.monotonic() - LAUNCH:.0f} s since launch; results in {folder}")
    except KeyboardInterrupt:
        print("stopped; " + (f"python meta_train.py --resume {folder} goes on from the last save"
                             if os.path.exists(os.path.join(folder, "checkpoint.npz")) else "nothing was saved yet"))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
