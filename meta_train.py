"""Meta-train a learned optimizer: `python meta_train.py`, and nothing else, learns one that beats
tuned Adam.

The loop is in `train`: save now and then, and take the next outer step. From there to the maths of
one: `updates`, `outer_step`, and in estimators.py `estimate`, `run_pair`, `unroll`.
"""
import argparse
import contextlib
import csv
import dataclasses
import fcntl
import functools
import inspect
import json
import os
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
import tasks
from evaluate import number

COUNT, NATURAL = number(int, 1, 2 ** 31 - 1), number(int, 0, 2 ** 31 - 1)
STEPS, SOME = number(int, 1, 10 ** 7), number(int, 0, 10 ** 5)  # of what takes memory
POSITIVE, NOT_NEGATIVE = number(float, 1e-30), number(float, 0)
ESTIMATORS = "truncated_backprop", "es", "merged", "pes", "combined"


def families(text):
    """An argparse type: names of families, joined by commas, or all -> a tuple."""
    names = tuple(tasks.FAMILIES) if text == "all" else tuple(text.split(","))
    if set(names) <= set(tasks.FAMILIES) and len(set(names)) == len(names):
        return names
    known = ",".join(tasks.FAMILIES)
    raise argparse.ArgumentTypeError(f"must be all, or some of {known}, not {text}")


def flag(default, why):
    return dataclasses.field(default=default, metadata={"why": why})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every field is a flag: of a type for argparse, or from what there is to choose from. RECIPES
    holds other defaults for other estimators."""
    tasks: families = flag(("mlp",), "families it learns from, joined by commas, or all")
    num_tasks: SOME = flag(0, "tasks of each, against tuned Adam (0: ever new)")
    optimizer: tuple(model.LEARNED) = flag("hierarchical", "what to meta-train")
    output: ("anchored", "papers") = flag("anchored", "papers: without what this project adds")
    estimator: ESTIMATORS = flag("truncated_backprop", "of the meta-gradient")
    target: tuple(evaluate.TARGETS) = flag("valid", "the loss it is for, held out or training")
    outer_steps: COUNT = flag(320, "updates of theta in all; a finished run can go on with more")
    minutes: POSITIVE = flag(7.8, "stop then even if steps are left; counted from each launch")
    save_seconds: POSITIVE = flag(30.0, "time between two saves")
    seed: number(int, 1 - 2 ** 31, 2 ** 31 - 1) = flag(0, "of theta, tasks and noise")
    horizon: STEPS = flag(model.HORIZON, "T, inner steps of an episode")
    truncation: STEPS = flag(model.HORIZON, "K, inner steps of one unroll; no bias if K = T")
    num_pairs: number(int, 1, 10 ** 5) = flag(2, "N, antithetic pairs (single ones without noise)")
    sigma: NOT_NEGATIVE = flag(0.0, "deviation of the noise on theta; 0 for backprop alone")
    adjoint: POSITIVE = flag(1.0, "largest norm of what backprop sends from step to step")
    clip: POSITIVE = flag(0.3, "largest norm of one pair's pathwise gradient")
    learning_rate: POSITIVE = flag(6e-3, "of the outer Adam at its start")
    decay_steps: POSITIVE = flag(32.0, "outer steps that halve that rate; then like 1 / step")
    outer_optimizer: str = flag("", "theta.npz of a learned optimizer in the outer Adam's place")
    fit: SOME = flag(128, "tasks of each family that fit the step size at the end (0: none)")
    compare: number(int, 4, 10 ** 5) = flag(64, "held-out tasks of each, compared at the end")


NOISY = dict(outer_steps=5000, decay_steps=500.0, truncation=20, num_pairs=16, sigma=0.01,
             learning_rate=1e-3)
RECIPES = {"es": NOISY, "pes": NOISY, "merged": dict(sigma=0.01),
           "combined": dict(outer_steps=1000, decay_steps=100.0, truncation=100, num_pairs=4,
                            sigma=0.01)}
FREE = "outer_steps", "minutes", "decay_steps", "fit", "compare"  # a resumed run can have others
PATIENCE = 100  # outer steps in a row that may come to nothing


class Run(NamedTuple):
    """All that an outer step reads and writes; what a checkpoint holds."""
    theta: dict
    average: dict    # of theta, later outer steps counting more: what is handed out
    opt_state: Any
    particles: dict  # of each family
    step: jax.Array
    smoothed: dict   # running mean of each family's outer loss


def inner_problem(family, learned, target, horizon, adjoint=jnp.inf, pool=None):
    """Training one task of `family` with the learned optimizer, as something to unroll.

    The loss after an inner step is `evaluate.outer_loss` of one batch of the target's split. Each
    episode has a new task or, with a pool (see `evaluate.make_pool`), one of that.
    """
    def loss(task, params, batch):
        return family.loss(task, estimators.finite_adjoint(params), batch)

    finite, split = family._replace(loss=loss), evaluate.TARGETS[target]

    def measure(task, inner, key):
        return loss(task, inner.params, family.batch(task, key, split))

    def reset(theta, key):
        task_key, init_key, batch_key = random.split(key, 3)
        baseline = jnp.float32(0)
        if pool is not None:
            keys, baselines = pool
            i = random.randint(task_key, (), 0, len(keys))
            task_key, baseline = keys[i], baselines[i]
        task = family.sample(task_key)
        inner = tasks.init_inner(finite, learned.optimizer(theta), task, init_key)
        return task, inner, measure(task, inner, batch_key), baseline

    def step(theta, state, key):
        task, inner, start, baseline = state
        step_key, batch_key = random.split(key)
        inner = inner._replace(params=estimators.bounded_adjoint(inner.params, adjoint))
        inner = tasks.inner_step(finite, learned.optimizer(theta), task, inner, step_key)
        value, progress = measure(task, inner, batch_key), inner.step / horizon
        return (task, inner, start, baseline), evaluate.outer_loss(value, start, progress, baseline)

    return estimators.InnerProblem(reset, step)


def arguments(settings):
    """Of the optimizer to be learned; saved with it."""
    known = inspect.signature(model.LEARNED[settings.optimizer]).parameters
    additions = [name for name in model.ADDITIONS if name in known]
    return {"horizon": settings.horizon} | dict.fromkeys(additions, settings.output != "papers")


def make_learned(settings):
    return model.LEARNED[settings.optimizer](**arguments(settings))


def outer_step(settings, estimator, outer, name, run, key):
    """Theta moves once, by an estimate on tasks of that family -> (Run, row of numbers)."""
    key = random.fold_in(key, run.step)
    gradient, particles, row = estimator.estimate(run.theta, run.particles[name], key)
    gradient, unravel = ravel_pytree(gradient)
    theta, average = (ravel_pytree(x)[0] for x in (run.theta, run.average))
    clipped, loss = jnp.clip(gradient, -0.1, 0.1), row["loss"]  # P2: else nothing is learned
    losses = dict(loss=loss, valid_loss=loss)  # the outer problem has no other (P2 appendix F.4)
    updates, opt_state = outer.update(clipped, run.opt_state, theta, **losses)
    rate = 1 / (1 + run.step / settings.decay_steps)  # most is learned early
    if settings.outer_optimizer:
        rate = 1.0  # it slows down by itself
    theta = theta + rate * updates
    later = 2 / (run.step + 2)  # weights 1, 2, 3, ...: the noise of single steps averages out
    average = average + later * (theta - average)
    before = run.smoothed[name]
    smoothed = jnp.where(jnp.isnan(before), loss, 0.97 * before + 0.03 * loss)
    row = {"step": run.step + 1, "smoothed": smoothed, "gradient": jnp.linalg.norm(gradient)} | row
    return Run(unravel(theta), unravel(average), opt_state, run.particles | {name: particles},
               run.step + 1, run.smoothed | {name: smoothed}), row


def in_tensors(optimizer, unravel):
    """The optimizer of a vector that to it is a dict of tensors."""
    def update(grads, state, params, **losses):
        updates, state = optimizer.update(unravel(grads), state, unravel(params), **losses)
        return ravel_pytree(updates)[0], state

    return model.Optimizer(lambda params: optimizer.init(unravel(params)), update)


def make_outer(settings):
    """-> (start(key) -> Run, {family: outer step(run, key)}), jitted, with the pairs shared out."""
    learned, each = make_learned(settings), {}
    for name in settings.tasks:
        family = tasks.FAMILIES[name]()
        pool = evaluate.make_pool(family, settings.num_tasks, settings.horizon, settings.target)
        problem = inner_problem(
            family, learned, settings.target, settings.horizon, settings.adjoint, pool)
        each[name] = getattr(estimators, settings.estimator)(
            problem, num_pairs=settings.num_pairs, truncation=settings.truncation,
            horizon=settings.horizon, sigma=settings.sigma, cap=evaluate.CAP, clip=settings.clip)
    outer = model.nadamw(settings.learning_rate, nesterov=False, warmup=10)
    if settings.outer_optimizer:
        mover, its_theta = model.load(settings.outer_optimizer, settings.outer_steps)
        _, unravel = ravel_pytree(learned.init(random.key(0)))
        outer = in_tensors(mover.optimizer(its_theta), unravel)

    def start(key):
        theta_key, particle_key = random.split(key)
        theta = learned.init(theta_key)
        particles = {name: estimator.init(theta, particle_key) for name, estimator in each.items()}
        unknown = dict.fromkeys(each, jnp.float32(jnp.nan))
        opt_state = outer.init(ravel_pytree(theta)[0])
        return Run(theta, theta, opt_state, particles, jnp.int32(0), unknown)

    rows = machine.sharding(settings.num_pairs)
    everywhere = jax.NamedSharding(rows.mesh, jax.sharding.PartitionSpec())
    particles = dict.fromkeys(each, estimators.Particles(rows, rows, rows, everywhere))
    layout = Run(everywhere, everywhere, everywhere, particles, everywhere, everywhere)

    def jitted(name):
        step = functools.partial(outer_step, settings, each[name], outer, name)
        both = layout, everywhere
        return jax.jit(step, in_shardings=both, out_shardings=both)

    once = {"xla_backend_optimization_level": 0}  # it runs once: compiling is all it costs
    start = jax.jit(start, out_shardings=layout, compiler_options=once)
    return start, {name: jitted(name) for name in each}


def updates(settings, run, outer_steps):
    """Yields (Run, row of numbers) after each outer step; the families take turns."""
    key = random.key(settings.seed)
    while True:
        name, before = settings.tasks[int(run.step) % len(settings.tasks)], time.monotonic()
        run, row = outer_steps[name](run, key)
        row = {k: x.item() for k, x in jax.device_get(row).items()}
        yield run, {"family": name} | row | {"seconds": time.monotonic() - before}


def train(settings, folder, run, rows, outer_steps, deadline=np.inf,
          together=contextlib.nullcontext):
    """Outer steps until they run out or the deadline (of time.monotonic) comes -> Run. Saves now
    and then, and at the end. `rows` is the log; it grows.

    Several processes stop `together` if one of them is to. KeyboardInterrupt, after a save, if it
    was stopped; ValueError after PATIENCE steps in a row that nothing finite came of: what is on
    disk is then from before them.
    """
    found, saved, fruitless = updates(settings, run, outer_steps), time.monotonic(), 0
    print(HEADER)
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
                run, row = next(found)
            rows.append(row)
            report(settings, row, deadline)
            fruitless = 0 if row["gradient"] > 0 else fruitless + 1
            if fruitless == PATIENCE:
                raise ValueError(f"{PATIENCE} outer steps in a row gave no finite gradient. What "
                                 f"{folder} holds is from before them: begin anew with a lower "
                                 "--learning-rate.")
        with together():
            run = save(settings, folder, run, rows)
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


HEADER = "  step family         loss smoothed gradient capped dropped  s/step   left"


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
    if jax.process_index():
        return run
    arrays = {f"leaf{i:04}": x for i, x in enumerate(tree.leaves(run))}
    about = {"settings": json.dumps(dataclasses.asdict(settings)), "log": json.dumps(rows)}
    machine.write_npz(folder / "checkpoint.npz", arrays | about)
    save_theta(dataclasses.replace(settings, fit=0), folder, run)  # it isn't fitted yet
    with machine.whole(folder / "log.csv") as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["step"])
        writer.writeheader()
        writer.writerows(rows)
    panels = {"smoothed": dict(title="outer loss, running mean"),
              "gradient": dict(title="norm of the meta-gradient", yscale="log")}
    lines = [(name, row["family"], row["step"], row[name]) for name in panels for row in rows]
    evaluate.picture(folder / "curves.png", lines, panels)
    return run


def save_theta(settings, folder, run):
    model.save(folder / "theta.npz", settings.optimizer, run.average, sizes=arguments(settings),
               outer_steps_done=int(run.step), **dataclasses.asdict(settings))


def restore(folder, arrays, fresh):
    """The Run in a checkpoint, shaped like `fresh`."""
    like, treedef = tree.flatten(fresh)
    leaves = [arrays.get(f"leaf{i:04}", np.zeros(0)) for i in range(len(like))]
    if any((x.shape, x.dtype) != (y.shape, y.dtype) for x, y in zip(leaves, like)):
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
    add("--process", type=NATURAL, help="which one this is, from 0")
    add("--wait", type=POSITIVE, default=300.0, help="seconds until a silent peer is lost")
    given = vars(parser.parse_args())
    known = {field.name for field in dataclasses.fields(Settings)}
    chosen = {name: given.pop(name) for name in known & set(given)}
    flags, arrays = argparse.Namespace(**given), None
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
        stored["tasks"] = tuple(stored["tasks"])
        changed = [name for name in chosen if name not in FREE and chosen[name] != stored[name]]
        if changed:
            raise ValueError(f"{folder} was begun with another {changed[0]}: resume it without "
                             "that flag, or start a new run.")
        chosen = stored | chosen
    elif folder.exists() and not all(x.name.startswith("partial-") for x in folder.iterdir()):
        raise ValueError(f"{folder} is there: choose another --out, or --resume {folder}.")
    whole = {"truncation": chosen["horizon"]} if "horizon" in chosen else {}
    settings = Settings(**whole | RECIPES.get(chosen.get("estimator"), {}) | chosen)
    if settings.horizon % evaluate.EVERY:
        raise ValueError(f"--horizon must be a multiple of {evaluate.EVERY}.")
    return settings, folder, arrays, flags


def check_processes(flags):
    alone = flags.processes is flags.process is None
    port = flags.coordinator.rpartition(":")[2]
    fine = alone and flags.coordinator in ("", "auto")
    if not fine and not (port.isdigit() and flags.process in range(flags.processes or 0)):
        raise ValueError("Several processes need --coordinator HOST:PORT and --processes P, the "
                         "same for all, and each another --process from 0 to P - 1, or auto alone.")


def finish(settings, folder, run):
    """The fit of the step size; then tables, on screen and in table.json, and pictures."""
    learned, results = make_learned(settings), {}
    if settings.fit and "log_bias" in run.average:
        count = settings.num_tasks + settings.fit
        keys = random.split(random.key(2 ** 31 + settings.seed), count)[settings.num_tasks:]
        families = [tasks.FAMILIES[name]() for name in settings.tasks]
        theta = evaluate.fit_step_size(
            learned, run.average, families, keys, settings.horizon, settings.target)
        run = run._replace(average=theta)
        save_theta(settings, folder, run)  # the checkpoint keeps the average to go on from
    for name in settings.tasks:
        family = tasks.FAMILIES[name]("held_out")
        curves = evaluate.compare(family, learned, run.average, settings.compare, settings.horizon)
        results[name] = evaluate.summary(curves)
        evaluate.print_summary(name, results[name])
        evaluate.compare_picture(folder / f"comparison-{name}.png", curves)
    with machine.whole(folder / "table.json") as partial:
        Path(partial).write_text(json.dumps(results, indent=2))


def run_all(settings, folder, arrays, flags, deadline):
    together = contextlib.nullcontext
    machine.configure_jax(flags.devices)
    if flags.coordinator:
        machine.connect(flags.coordinator, flags.processes, flags.process, flags.wait)
        advice = f"end them all, and go on with --resume {folder}."
        together = functools.partial(machine.together, flags.wait, advice)
    if settings.num_pairs % jax.process_count():
        raise ValueError(f"--num-pairs must be a multiple of the {jax.process_count()} processes.")
    start, outer_steps = make_outer(settings)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
    run, rows = start(random.key(settings.seed)), []
    if arrays:
        run, rows = restore(folder, arrays, run), json.loads(str(arrays["log"]))
    count, devices = sum(x.size for x in run.theta.values()), run.step.sharding.device_set
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
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
