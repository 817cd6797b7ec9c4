"""Meta-train a learned optimizer: `python meta_train.py`, and nothing else, learns one that beats
tuned Adam.

The loop is in `train`: save now and then, and take the next outer step. From there to the maths of
one: `advance`, `outer_step`, and in estimators.py `estimate`, `run_pair`, `unroll`.
"""
import argparse
import contextlib
import csv
import dataclasses
import fcntl
import functools
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random, tree
from jax.flatten_util import ravel_pytree

import estimators
import evaluate
import machine
import model
import objective
import tasks
from evaluate import number
from settings import COUNT, Settings, arguments, make_family, make_learned, whole_settings

FREE = (  # may change in a resumed run
    "outer_steps", "minutes", "save_seconds", "decay_steps", "caution", "compare")
PATIENCE = 100  # outer steps in a row that may come to nothing


class Run(NamedTuple):
    """All that an outer step reads and writes; what a checkpoint holds."""
    theta: dict
    average: dict    # of theta, later outer steps counting more
    opt_state: Any
    particles: dict  # of each family
    step: jax.Array
    smoothed: dict   # running mean of each family's outer loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def bounded_adjoint(x, bound):
    """x itself; but what backprop sends back has a norm of at most `bound`. In a finished gradient
    what grew from step to step (P1's first pathology) has drowned the rest: too late to clip."""
    return x


bounded_adjoint.defvjp(
    lambda x, bound: (x, None), lambda bound, _, g: (estimators.clip_norm(g, bound)[0],))


@jax.custom_vjp
def finite_adjoint(x):
    """x itself; but what backprop sends back, in second derivatives, too, is 0 where it is not
    finite."""
    return x


finite_adjoint.defvjp(
    lambda x: (finite_adjoint(x), None),
    lambda _, g: (tree.map(lambda x: jnp.nan_to_num(x, posinf=0, neginf=0), g),))


def inner_problem(settings, family, learned, pool=None):
    """Training one task of `family` with the learned optimizer, as something to unroll.

    The loss after an inner step is the OuterLoss of a few batches of the target's split. Each
    episode has a new task or, with a pool (see `objective.make_pool`), one of that.
    """
    def loss(task, params, batch):
        return family.loss(task, finite_adjoint(params), batch)

    finite, split = family._replace(loss=loss), objective.TARGETS[settings.target]
    outer_loss = objective.OUTER_LOSSES[settings.outer_loss].loss

    def measure(task, inner, key):
        def one(key):
            return loss(task, inner.params, family.batch(task, key, split))

        n = settings.outer_batches
        keys = random.split(key, n) if n > 1 else key[None]
        return jnp.mean(machine.over_rows(one, keys))

    def reset(theta, key):
        task_key, init_key, batch_key = random.split(key, 3)
        best = jnp.float32(0)
        if pool is not None:
            keys, all_best = pool
            i = random.randint(task_key, (), 0, len(keys))
            task_key, best = keys[i], all_best[i]
        task = family.sample(task_key)
        inner = tasks.init_inner(finite, learned.optimizer(theta), task, init_key)
        return task, inner, measure(task, inner, batch_key), best

    def step(theta, state, key):
        task, inner, start, best = state
        step_key, batch_key = random.split(key)
        inner = inner._replace(params=bounded_adjoint(inner.params, settings.adjoint))
        inner = tasks.inner_step(finite, learned.optimizer(theta), task, inner, step_key)
        value, progress = measure(task, inner, batch_key), inner.step / settings.horizon
        return (task, inner, start, best), outer_loss(value, start, progress, best)

    return estimators.InnerProblem(reset, step)


def outer_step(settings, estimator, outer, name, run, key):
    """Theta moves once, by an estimate on tasks of that family -> (Run, row of numbers)."""
    taken = lengths(settings, run.step, key)
    key = random.fold_in(key, run.step)
    gradient, particles, row = estimator.estimate(run.theta, run.particles[name], key, taken)
    clipped = tree.map(lambda g: jnp.clip(g, -0.1, 0.1), gradient)  # P2: else nothing is learned
    loss = row["loss"]  # told as both losses (P2 appendix F.4)
    changes, opt_state = outer.update(
        clipped, run.opt_state, run.theta, loss=loss, valid_loss=loss)
    falling = 1 / (1 + run.step / settings.decay_steps)  # most is learned early
    rate = 1.0 if settings.outer_optimizer else falling  # a learned one slows down itself
    theta = tree.map(lambda x, change: x + rate * change, run.theta, changes)
    later = 2 / (run.step + 2)  # weights 1, 2, 3, ...: the noise of single steps averages out
    share = later if settings.averaging == "later" else 1.0
    average = tree.map(lambda x, new: x + share * (new - x), run.average, theta)
    before = run.smoothed[name]
    smoothed = jnp.where(jnp.isnan(before), loss, 0.97 * before + 0.03 * loss)
    norm = jnp.linalg.norm(ravel_pytree(gradient)[0])
    row = {"step": run.step + 1, "smoothed": smoothed, "gradient": norm} | row
    return Run(theta, average, opt_state, run.particles | {name: particles},
               run.step + 1, run.smoothed | {name: smoothed}), row


def lengths(settings, step, key):
    """Steps of each pair's next unroll, [N]: their mean grows with the outer step (P1's curriculum;
    P2's second phase), each is drawn within `jitter` of it. None: all are of --truncation."""
    first, last = min(settings.shortest, settings.truncation), settings.truncation
    mean = first + (last - first) * jnp.minimum(step / settings.growing, 1)
    j = settings.jitter
    if first == last and not j:
        return None
    key = random.fold_in(key, step.astype(jnp.uint32) + jnp.uint32(2 ** 31))  # no step is so late
    shares = random.uniform(key, (settings.num_pairs,), minval=1 - j, maxval=1 + j)
    return jnp.maximum(jnp.round(mean * shares), 1).astype(int)


def make_outer(settings):
    """-> (start(key) -> Run, {family: outer step(run, key)}), jitted, with the pairs shared out."""
    learned, begin, each = make_learned(settings), begun(settings), {}
    outer = model.adam(settings.learning_rate, settings.b1, warmup=settings.warmup)
    if settings.outer_optimizer:
        mover, its_theta = model.load(settings.outer_optimizer, settings.outer_steps)
        outer = mover.optimizer(its_theta)
    cap = objective.OUTER_LOSSES[settings.outer_loss].cap
    longest = round(settings.truncation * (1 + settings.jitter))
    varying = lengths(settings, jnp.int32(0), random.key(0)) is not None
    for name in settings.tasks:
        family = make_family(settings, name)
        pool = objective.make_pool(family, settings.num_tasks, settings.horizon, settings.target)
        problem = inner_problem(settings, family, learned, pool)
        each[name] = getattr(estimators, settings.estimator)(
            problem, num_pairs=settings.num_pairs, truncation=min(longest, settings.horizon),
            horizon=settings.horizon, sigma=settings.sigma, cap=cap, clip=settings.clip,
            varying=varying)

    def start(key):
        theta_key, particle_key = random.split(key)
        theta = begin or learned.init(theta_key)
        particles = {name: estimator.init(theta, particle_key) for name, estimator in each.items()}
        unknown = dict.fromkeys(each, jnp.float32(jnp.nan))
        opt_state = outer.init(theta)
        return Run(theta, theta, opt_state, particles, jnp.int32(0), unknown)

    rows = machine.sharding(settings.num_pairs)
    everywhere = jax.NamedSharding(rows.mesh, jax.P())
    particles = dict.fromkeys(each, estimators.Particles(rows, rows, rows, everywhere))
    layout = Run(everywhere, everywhere, everywhere, particles, everywhere, everywhere)

    def jitted(name):
        step = functools.partial(outer_step, settings, each[name], outer, name)
        both = layout, everywhere
        return jax.jit(step, in_shardings=both, out_shardings=both)

    once = {"xla_backend_optimization_level": 0}  # it runs once: compiling is all it costs
    start = jax.jit(start, out_shardings=layout, compiler_options=once)
    return start, {name: jitted(name) for name in each}


def begun(settings):
    """The theta to begin with, if it is in a file."""
    if not settings.begin:
        return None
    learned, theta = model.load(settings.begin, settings.horizon)
    if learned is not make_learned(settings):  # each is made once, see LearnedOptimizer
        raise ValueError(f"{settings.begin} holds another kind of optimizer than what is to be "
                         "learned: choose its --optimizer and --without, or another file.")
    caution = model.about(settings.begin).get("caution", 1.0)
    return with_steps(1 / caution, theta)


def advance(settings, run, outer_steps):
    """-> (Run, row of numbers) after the next outer step; the families take turns."""
    name = settings.tasks[int(run.step) % len(settings.tasks)]
    before = time.monotonic()
    run, row = outer_steps[name](run, random.key(settings.seed))
    row = {k: x.item() for k, x in jax.device_get(row).items()}
    return run, {"family": name} | row | {"seconds": time.monotonic() - before}


def train(settings, folder, run, rows, outer_steps, deadline=np.inf,
          together=contextlib.nullcontext):
    """Outer steps until they run out or the deadline (of time.monotonic) comes -> Run. Saves now
    and then, and at the end. `rows` is the log; it grows.

    Several processes stop `together` if one of them is to. KeyboardInterrupt, after a save, if it
    was stopped; ValueError after PATIENCE steps in a row that nothing finite came of: what is on
    disk is then from before them.
    """
    saved, fruitless = time.monotonic(), 0
    print("  step family         loss smoothed gradient capped dropped  s/step   left")
    with stop_signals() as stops:
        while True:
            with together():
                now = time.monotonic()
                ends = run.step >= settings.outer_steps or now > deadline
                due = now > saved + settings.save_seconds and not fruitless
                state = np.array([[bool(stops), ends, due]])
                stopped, ends, due = machine.gathered(state).any(0)
                if stopped or ends:
                    break
                if due:
                    save(settings, folder, run, rows)
                    saved = time.monotonic()
                run, row = advance(settings, run, outer_steps)
            rows.append(row)
            report(settings, row, deadline)
            fruitless = 0 if row["gradient"] > 0 else fruitless + 1
            if fruitless == PATIENCE:
                raise ValueError(f"{PATIENCE} outer steps in a row gave no finite gradient. What "
                                 f"{folder} holds is from before them: begin anew with a lower "
                                 "--learning-rate.")
        with together():
            run = save(settings, folder, run, rows)
    print(f"{int(run.step)} outer steps done, saved in {folder}", flush=True)
    if stopped:
        raise KeyboardInterrupt
    return run


@contextlib.contextmanager
def stop_signals():
    """A list that Ctrl-C and SIGTERM make longer: they are heard after the step they fall in."""
    heard = []
    numbers = signal.SIGINT, signal.SIGTERM
    defaults = [signal.signal(number, lambda *_: heard.append(1)) for number in numbers]
    try:
        yield heard
    finally:
        for number, default in zip(numbers, defaults):
            signal.signal(number, default)


def report(settings, row, deadline):
    """A line on screen for the first of ten outer steps of each family, and for what went wrong."""
    turn = (row["step"] - 1) // len(settings.tasks)
    if turn % 10 and not row["capped"] and not row["dropped"]:
        return
    left = (settings.outer_steps - row["step"]) * row["seconds"]
    left = max(min(left, deadline - time.monotonic()), 0) / 60
    print("{step:6} {family:11} {loss:7.3f} {smoothed:8.4f} {gradient:8.3f} {capped:6} {dropped:7} "
          "{seconds:7.2f}".format(**row), f"{left:5.1f}m", flush=True)


# ---------------------------------------------------------------- on disk

def save(settings, folder, run, rows):
    """checkpoint.npz to go on from, theta.npz for use, log.csv and curves.png to look at -> Run, in
    numpy arrays. The first process writes what all have, so that a run can go on with others."""
    run = machine.gathered(run)
    if not all(np.isfinite(x).all() for x in run.average.values()):
        raise FloatingPointError(f"Theta is not finite any more. What {folder} holds is from "
                                 "before: begin anew with a lower --learning-rate.")
    if jax.process_index():
        return run
    arrays = {f"leaf{i:04}": x for i, x in enumerate(tree.leaves(run))}
    about = {"settings": json.dumps(dataclasses.asdict(settings)), "log": json.dumps(rows)}
    machine.write_npz(folder / "checkpoint.npz", arrays | about)
    theta = handed_out(settings, run)
    model.save(folder / "theta.npz", settings.optimizer, theta, sizes=arguments(settings),
               outer_steps_done=int(run.step), **dataclasses.asdict(settings))
    with machine.whole(folder / "log.csv") as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["step"])
        writer.writeheader()
        writer.writerows(rows)
    panels = {"smoothed": dict(title="outer loss, running mean"),
              "gradient": dict(title="norm of the meta-gradient", yscale="log")}
    lines = [
        (name, row["family"], row["step"], row[name])
        for name in panels for row in rows]
    evaluate.picture(folder / "curves.png", lines, {"xlabel": "outer step"}, panels)
    return run


def handed_out(settings, run):
    """The average of theta, with shorter steps than what was learned: on a task that is not like
    those, too long a step does more harm than too short a one."""
    return with_steps(settings.caution, run.average)


def with_steps(factor, theta):
    """Theta with steps so many times as long, if they are anchored."""
    if "log_lr" not in theta:
        return theta
    return theta | {"log_lr": theta["log_lr"] + np.float32(np.log(factor))}


def restore(folder, arrays, fresh):
    """The Run in a checkpoint, shaped like `fresh`."""
    like, treedef = tree.flatten(fresh)
    leaves = [arrays.get(f"leaf{i:04}", np.zeros(0)) for i in range(len(like))]
    for x, y in zip(leaves, like):
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise ValueError(f"{folder} was written by another version of this program; it can be "
                             "evaluated but not resumed.")
    return treedef.unflatten([jax.device_put(x, y.sharding) for x, y in zip(leaves, like)])


# ---------------------------------------------------------------- the command line

def parse(parser):
    """-> (settings, folder, checkpoint's arrays or None, the machine's flags). ValueErrors, too."""
    for field in dataclasses.fields(Settings):
        rule = {"type" if callable(field.type) else "choices": field.type}
        name, why = field.name.replace("_", "-"), field.metadata["why"]
        parser.add_argument(f"--{name}", help=f"{why} (default: {field.default})",
                            default=argparse.SUPPRESS, **rule)
    add = parser.add_argument
    add("--out", help="folder of the run (default: runs/<date>-<time>)")
    add("--resume", metavar="FOLDER", help="go on with the run in this folder, here or elsewhere")
    add("--devices", type=number(int, 1, 256),
        help="CPU devices of this process, which share the pairs")
    add("--coordinator", default="", help="HOST:PORT of process 0, if several share them; or auto")
    add("--processes", type=COUNT, help="how many there are")
    add("--process", type=int, help="which one this is, from 0")
    add("--wait", type=number(float, 1e-30, 10 ** 6), default=300.0,
        help="seconds until a silent peer is lost")
    flags, arrays = parser.parse_args(), None
    known = {field.name for field in dataclasses.fields(Settings)}
    chosen = {name: x for name, x in vars(flags).items() if name in known}
    check_processes(flags)
    folder = Path(flags.out or time.strftime("runs/%Y%m%d-%H%M%S"))
    if flags.resume is not None:
        if flags.out:
            raise ValueError("--resume names the folder already; leave --out away.")
        folder = Path(flags.resume)
        arrays = machine.read_npz(folder / "checkpoint.npz")
        stored = json.loads(str(arrays.get("settings", "0")))
        if not isinstance(stored, dict) or set(stored) != known or "log" not in arrays:
            raise ValueError(f"{folder} holds no checkpoint of this version of the program.")
        stored |= {name: tuple(x) for name, x in stored.items() if isinstance(x, list)}
        free = FREE[1:] if stored["outer_optimizer"] else FREE  # that is told of all outer steps
        changed = [name for name in chosen if name not in free and chosen[name] != stored[name]]
        if changed:
            raise ValueError(f"{folder} was begun with another {changed[0]}: resume it without "
                             "that flag, or start a new run.")
        chosen = stored | chosen
    elif folder.exists() and not all(x.name.startswith("partial-") for x in folder.iterdir()):
        raise ValueError(f"{folder} is there: choose another --out, or --resume {folder}.")
    return whole_settings(chosen), folder, arrays, flags


def check_processes(flags):
    alone = flags.processes is None and flags.process is None
    port = flags.coordinator.rpartition(":")[2]
    fine = alone and flags.coordinator in ("", "auto")
    if not fine and not (port.isdigit() and flags.process in range(flags.processes or 0)):
        raise ValueError("Several processes need --coordinator HOST:PORT and --processes P, the "
                         "same for all, and each another --process from 0 to P - 1, or auto alone.")


def finish(settings, folder, run):
    """Tables, on screen and in table.json, and pictures: of held-out tasks."""
    learned, theta, results = make_learned(settings), handed_out(settings, run), {}
    for name in settings.tasks:
        family = tasks.FAMILIES[name]("held_out")
        curves = evaluate.compare(family, learned, theta, settings.compare, settings.horizon)
        results[name] = evaluate.summary(curves)
        evaluate.print_summary(name, results[name])
        evaluate.compare_picture(folder / f"comparison-{name}.png", curves)
    machine.write_json(folder / "table.json", results)


def run_all(settings, folder, arrays, flags, deadline):
    together = contextlib.nullcontext
    machine.configure_jax(flags.devices)
    if flags.coordinator:
        machine.connect(flags.coordinator, flags.processes, flags.process, flags.wait)
        advice = f"end them all, and go on with --resume {folder}."
        together = functools.partial(machine.together, flags.wait, advice)
    if settings.num_pairs % jax.process_count():
        raise ValueError(f"--num-pairs must be a multiple of the {jax.process_count()} processes.")
    begin = "" if arrays else settings.begin  # a resumed run has its own theta
    start, outer_steps = make_outer(dataclasses.replace(settings, begin=begin))
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        there = folder / "checkpoint.npz"
        if there.exists() != bool(arrays) or arrays and (
                machine.read_npz(there)["log"] != arrays["log"]):
            raise ValueError(f"Another run has written to {folder} meanwhile: --resume {folder}, "
                             "or choose another --out.")
    run, rows = start(random.key(settings.seed)), []
    if arrays:
        run, rows = restore(folder, arrays, run), json.loads(str(arrays["log"]))
    count = sum(x.size for x in run.theta.values())
    devices = run.step.sharding.device_set
    print(f"{folder}: {settings}\n{count} meta-parameters, pairs on {len(devices)} devices")
    run = train(settings, folder, run, rows, outer_steps, deadline, together)
    if jax.process_index() == 0:  # what follows is not shared
        finish(settings, folder, run)


def main():
    begin, folder = time.monotonic(), Path()
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".")
    try:
        settings, folder, arrays, flags = parse(parser)
        run_all(settings, folder, arrays, flags, begin + 60 * settings.minutes)
        print(f"{time.monotonic() - begin:.0f} s; results in {folder}")
    except KeyboardInterrupt:
        saved = (folder / "checkpoint.npz").exists()
        print(f"stopped; go on with --resume {folder}" if saved else "stopped; nothing was saved")
    except BlockingIOError:
        parser.error(f"Another run is at work in {folder}: wait for it, or choose another folder.")
    except jax.errors.JaxRuntimeError as error:
        if not re.search("out of memory|resource_exhausted", str(error), re.I):
            raise
        parser.error("Out of memory: choose fewer --num-pairs, or a lower --truncation or "
                     "--compare.")
    except (OSError, ValueError, FloatingPointError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
