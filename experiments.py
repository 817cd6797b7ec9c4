"""The papers' experiments, a generator each: `python experiments.py NAME`.

It yields rows (panel, line, x, y), in which x and y may be arrays. They are printed as they come,
kept in NAME.csv and drawn in NAME.png: a line goes through the medians of the rows that share an x,
their range is shaded. An interval is three such rows: the value, low and high.
"""
import argparse
import os
import signal
import timeit
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random, tree
from jax.flatten_util import ravel_pytree

import data
import estimators
import evaluate
import kinds
import machine
import meta_train
import model
import objective
import own
import tasks
from estimators import InnerProblem
from evaluate import EVERY, compare
from meta_train import inner_problem
from model import HORIZON
from settings import ADDITIONS, ESTIMATORS, Settings, whole_settings


def make(name, problem, truncation, horizon, num_pairs, sigma=0.1, cap=1e6):
    """The estimator of that name; backprop goes without noise."""
    if name == "truncated_backprop":
        sigma = 0.0
    return getattr(estimators, name)(
        problem, truncation=truncation, horizon=horizon, num_pairs=num_pairs,
        sigma=sigma, cap=cap)


@partial(jax.jit, static_argnames=("estimator", "count", "optimizer"))
def descend(estimator, count, theta, key, optimizer=model.sgd(0.0)):
    """So many outer steps, by default all at one theta -> thetas, gradients, metrics, stacked."""
    def step(carry, key):
        theta, opt_state, particles = carry
        gradient, particles, metrics = estimator.estimate(theta, particles, key)
        updates, opt_state = optimizer.update(gradient, opt_state, theta)
        theta = tree.map(jnp.add, theta, updates)
        return (theta, opt_state, particles), (theta, gradient, metrics)

    start_key, key = random.split(key)
    start = theta, optimizer.init(theta), estimator.init(theta, start_key)
    return lax.scan(step, start, random.split(key, count))[1]


# ---------------------------------------------------------------- what the outer loss looks like

def quartic(horizon, momentum):
    """(w - 4)(w - 3) w^2, at most 10, after T steps of SGD from w = -1.2 (P1 figure 2)."""
    w, m = -1.2, 0.0
    for _ in range(horizon):
        m = momentum * m + 4 * w ** 3 - 21 * w ** 2 + 24 * w
        w = w - 0.01 * m
    return jnp.minimum((w - 4) * (w - 3) * w ** 2, 10)


def landscape(seed):
    """The longer the unroll, the more jagged it is; noise on theta smooths it (P1 figure 2)."""
    theta_key, direction_key, reset_key, key = random.split(random.key(seed), 4)
    learned = model.per_parameter_mlp()
    theta, unravel = ravel_pytree(learned.init(theta_key))
    direction = random.normal(direction_key, theta.shape)

    def along(horizon, x):
        settings = Settings(target="train", horizon=horizon, adjoint=np.inf)
        problem = inner_problem(settings, tasks.mlp(), learned)
        unroll = estimators.make_unroll(problem, horizon, 10.0)
        moved = unravel(theta + (x - 0.5) * direction)
        return unroll(moved, problem.reset(moved, reset_key), False, None, key)[0]

    x = np.linspace(0, 0.99, 2000)
    weights = jax.nn.softmax(-5000 * (x[:, None] - x[None]) ** 2)  # of Gaussian noise, sigma 0.01
    for title, loss in (("momentum on a quartic", quartic), ("a direction of theta", along)):
        for horizon in (10, 50, 200):
            y = lax.map(partial(loss, horizon), jnp.float32(x))
            yield f"outer loss against {title}, {horizon} steps", "as it is", x, y
            yield f"outer loss against {title}, {horizon} steps", "smoothed", x, weights @ y


# ---------------------------------------------------------------- where truncation leads

def adams_rate():
    """Adam on `mlp` tasks; theta is the log of its rate."""
    learned = model.LearnedOptimizer(lambda key: 0.0, lambda theta: model.adam(jnp.exp(theta)))
    settings = Settings(target="train", outer_loss="mean", adjoint=np.inf)
    return inner_problem(settings, tasks.mlp(), learned)


def influence_balancing():
    """Theta's drive reaches the loss with the wrong sign first, with the right one later (P3)."""
    a = 0.5 * (jnp.eye(23) + jnp.eye(23, k=1))
    drive = jnp.sign(9.5 - jnp.arange(23))

    def step(theta, state, key):
        state = a @ state + theta * drive
        return state, 0.5 * (state[0] - 1) ** 2

    return InnerProblem(lambda theta, key: jnp.ones(23), step)


def truncation_bias(seed):
    """Where an unroll of K < T steps pushes Adam's rate from about the best (P1 figure 3; over an
    episode, after a first one; three seeds), and theta in influence balancing (P3)."""
    problem, balancing = adams_rate(), influence_balancing()
    best = np.float32(np.log(0.025))
    for name in ESTIMATORS:
        for truncation in (5, 20, 100, HORIZON):
            estimator, count = make(name, problem, truncation, HORIZON, 16), HORIZON // truncation
            for i in range(3):
                _, gradients, _ = descend(estimator, 2 * count, best, random.key(seed + i))
                push = -gradients[count:].mean()
                yield "push on the log of Adam's rate against K", name, truncation, push
        estimator, start = make(name, balancing, 1, 10 ** 7, 500), np.float32(0.5)
        thetas, _, _ = descend(estimator, 3000, start, random.key(seed), model.sgd(1e-4))
        steps, path = np.arange(0, 3000, 100), thetas[::100]
        yield "influence balancing against steps (best: -1/6)", name, steps, path


# ---------------------------------------------------------------- how noisy the estimates are

def unroll_variance(seed):
    """Of one pair's estimate for a fresh per-parameter MLP, against the unroll's length; at a step
    size that suits the tasks, and at one that is far too large (P1 figure 4)."""
    learned, key = model.per_parameter_mlp(), random.key(seed)
    for length in (1, 10, 50, 200):
        settings = Settings(horizon=length, adjoint=np.inf)
        problem = inner_problem(settings, tasks.mlp(), learned)
        cap = objective.OUTER_LOSSES[settings.outer_loss].cap
        estimator = make("merged", problem, length, length, 16, 0.01, cap)
        for rate in (0.01, 0.3):
            theta = learned.init(key) | {"log_lr": jnp.float32(np.log(rate))}
            _, gradients, metrics = descend(estimator, 7, theta, key)
            variances = (x[1:].var(0, ddof=1) for x in gradients.values())
            y = 16 * sum(x.sum() for x in variances)
            yield "variance against unrolled steps", f"merged, lr {rate}", length, y
            for term in ("rp", "es"):
                y = metrics[f"variance_{term}"][1:].mean()
                yield "variance against unrolled steps", f"{term}, lr {rate}", length, y


def history_variance(seed, counts=(1, 2, 4, 8, 16, 32, 64)):
    """Of PES over an episode of S truncations, where the t-th loss is the t-th of P = 64 entries of
    theta, over sqrt(S); in closed form the sum over t of (t P + 1) / S (P3)."""
    for s in counts:
        problem = InnerProblem(
            lambda theta, key: jnp.int32(0),
            lambda theta, t, key: (t + 1, theta[t] / s ** 0.5))
        estimator = make("pes", problem, 1, s, 1)
        _, gradients, _ = descend(estimator, s * 2001, jnp.zeros(64), random.key(seed))
        episode = gradients[s:].reshape(2000, s, 64).sum(1)
        yield "variance of PES against truncations", "measured", s, episode.var(0, ddof=1).sum()
        yield "variance of PES against truncations", "closed form", s, 32 * (s + 1) + 1


def linear_quadratic():
    """A linear state, whose start is learned, too, under a quadratic loss."""
    a = jnp.array([[0.9, 0.2], [-0.3, 0.8]])
    b = jnp.array([[1.0, 0.5, 0.0], [0.0, -0.5, 1.0]])

    def step(theta, state, key):
        state = a @ state + b @ theta
        return state, 0.5 * jnp.vdot(state, state)

    return InnerProblem(lambda theta, key: theta[:2], step)


def crossover(seed):
    """Truncated backprop errs by its bias alone; where does the noise of others outweigh that?"""
    problem, key = linear_quadratic(), random.key(seed)
    theta = jnp.array([0.4, -0.7, 0.5])
    exact = make("truncated_backprop", problem, 16, 16, 16)
    _, truth, _ = descend(exact, 1, theta, key)
    for name in ("truncated_backprop", "pes", "combined"):
        for n in (4, 64):
            for truncation in (1, 2, 4, 8):
                estimator = make(name, problem, truncation, 16, n)
                _, gradients, _ = descend(estimator, 2001, theta, key)
                errors = (gradients[201:] - truth) ** 2
                yield "squared error", f"{name}, N = {n}", truncation, errors.sum(1).mean()


def variance(seed):
    """Against the unroll's length and the number of truncations; and where bias outweighs it."""
    for part in (unroll_variance, history_variance, crossover):
        yield from part(seed)


# ---------------------------------------------------------------- what it takes to learn one

def cost(seed):
    """Of backprop through K steps of the default optimizer, beside ES, which only unrolls."""
    learned, key = model.hierarchical(), random.key(seed)
    theta = learned.init(key)
    for length in (25, 50, 100, 200, 400):
        problem = inner_problem(Settings(horizon=length), tasks.mlp(), learned)
        for name in ("es", "merged"):
            estimator = make(name, problem, length, length, 2, 0.01)
            given = theta, estimator.init(theta, key), key
            program = jax.jit(estimator.estimate).lower(*given).compile()
            times = timeit.repeat(
                lambda: jax.block_until_ready(program(*given)), number=1, repeat=11)
            yield "seconds against K", name, length, times
            yield "bytes against K", name, length, program.memory_analysis().temp_size_in_bytes


def progress(seed, runs, clock, looks, cases, **common):
    """Meta-trains {line: settings}, `runs` seeds of each, and looks at them after so many outer
    "steps" or "seconds" -> (line, x, Settings, Run)."""
    for line, options in cases.items():
        for i in range(runs):
            settings = whole_settings(common | options | {"seed": seed + i})
            start, outer_steps = meta_train.make_outer(settings)
            run = start(random.key(settings.seed))
            meta_train.advance(settings, run, outer_steps)  # compiles, which doesn't count
            spent = 0
            for x in looks:
                while spent < x:
                    run, row = meta_train.advance(settings, run, outer_steps)
                    spent += row.get(clock, 1)
                yield line, x, settings, jax.device_get(run)


ADAM = {"Adam": evaluate.BASELINES["Adam"]}


def against_adam(value, *how):
    """The value of test losses over tuned Adam's, at most ten times that (geometric mean over
    tasks), and the share of tasks where it is lower."""
    curves = compare(*how, ADAM)
    adam, mine = (evaluate.best(curves[k][..., 1], value) for k in ("Adam", "learned"))
    ratios = np.minimum(mine / adam, 10)
    return np.exp(np.log(ratios).mean()), (mine < adam).mean()


def ratios(count, seed, runs, clock, looks, cases):
    """Rows of `progress`: the outer loss; and `against_adam` on `count` held-out tasks."""
    for line, x, settings, run in progress(seed, runs, clock, looks, cases):
        y, share = against_adam(
            evaluate.mean_loss, tasks.mlp("held_out"), meta_train.make_learned(settings),
            meta_train.handed_out(settings, run), count, settings.horizon, seed)
        yield f"outer loss against {clock}", line, x, run.smoothed["mlp"]
        yield f"mean test loss / tuned Adam's against {clock}", line, x, y
        yield f"share of tasks where it is lower against {clock}", line, x, share


def race(seed):
    """The default optimizer, learned with each estimator, each as it suits that. Three hours."""
    cases = {name: dict(estimator=name) for name in ESTIMATORS}
    return ratios(32, seed, 3, "seconds", (60, 120, 240, 480), cases)


def ablation(seed):
    """The default without each thing that this project adds: 40 outer steps, then four looks."""
    looks = {"mlp": (tasks.mlp("held_out"), HORIZON, 16),
             "1,200 steps": (tasks.mlp("held_out"), 3 * HORIZON, 16),
             "wide_and_deep": (kinds.wide_and_deep(), HORIZON, 4),
             "200 images": (letters(seed, 200), HORIZON, 16)}
    cases = {"(all)": {}} | {name: {"without": (name,)} for name in ADDITIONS}
    for name, _, settings, run in progress(seed, 3, "steps", [40], cases):
        theta = meta_train.handed_out(settings, run)
        for panel, (family, horizon, count) in looks.items():
            learned = meta_train.make_learned(replace(settings, horizon=horizon))
            y, _ = against_adam(
                evaluate.final_loss, family, learned, theta, count, horizon, seed)
            yield f"final test loss / tuned Adam's: {panel}", "without", name, y


def architectures(seed):
    """The learned optimizers with nothing of ours, learned for the same time (P2 figure 2a), and
    the default. 40 minutes."""
    names = "component_lstm", "per_parameter_mlp", "p1", "p2"
    cases = {name: dict(optimizer=name, without=ADDITIONS) for name in names} | {"ours": {}}
    return ratios(32, seed, 3, "seconds", (60, 120, 180), cases)


def num_tasks(seed):
    """How many tasks to learn from before it is good on others (P2 figure 2b). 15 minutes."""
    cases = {f"{n} tasks": dict(num_tasks=n) for n in (1, 4, 16, 64, 256)}
    return ratios(64, seed, 2, "steps", (24, 48, 96), cases)


def letters(seed, images=500, **sizes):
    """Ten held-out letters as a task: so many training images, no two the same; all test images."""
    rng, drawn = np.random.default_rng(seed), data.letters()
    *train, test = (drawn[f"held_out/{split}"][:10] for split in data.SPLITS)
    train = [rng.permutation(x)[:images // 10] for x in np.concatenate(train, 1)]
    return own.family(own.understood({
        "x_train": np.concatenate(np.stack(train, 1)),
        "y_train": np.arange(images) % 10,
        "x_test": np.concatenate(test),
        "y_test": np.repeat(range(10), test.shape[1])}), **sizes)


def targets(seed):
    """Learned for training or for held-out batches: the test loss where the training loss is the
    same, on few images (P1); beside Adam, at the rate that ends lowest. 6 minutes."""
    cases = {split: {"target": split} for split in objective.TARGETS}
    for split, _, settings, run in progress(seed, 3, "steps", [96], cases):
        how = meta_train.make_learned(settings), meta_train.handed_out(settings, run)
        curves = compare(letters(seed), *how, 8, HORIZON, seed, ADAM)
        names = {"learned": f"for {split}, seed {settings.seed}", "Adam": "Adam, tuned"}
        for name, c in curves.items():
            setting = evaluate.figures(c[..., 1], evaluate.final_loss).mean(0).argmin()
            train, test = np.median(c[:, setting], 0).T
            yield "test loss against training loss", names[name], train, test


def self_training(seed, path):
    """It moves the theta of a new optimizer, from scratch, told of a third of the steps or of all;
    beside Adam (P2 figure 8). Hours."""
    cases = {f"learned, told of {n}": dict(outer_optimizer=path, outer_steps=n)
             for n in (400, 1200)}
    for rate in (1e-3, 3e-3, 1e-2, 3e-2):
        cases[f"Adam {rate}"] = dict(learning_rate=rate)
    for name, x, _, run in progress(
            seed, 3, "steps", range(40, 1201, 40), cases, optimizer="per_parameter_mlp",
            horizon=100, truncation=100, decay_steps=1e12):
        yield "outer loss of a new optimizer, moved by", name, x, run.smoothed["mlp"]


# ---------------------------------------------------------------- how one behaves: f(seed, path)

def generalisation(seed, path):
    """Every family, kinds that nothing is ever meta-trained on, and five times as many steps."""
    for line, makers, pool, steps in (
            ("learned from", tasks.FAMILIES, ["held_out"], HORIZON),
            ("held-out kinds", kinds.KINDS, [], HORIZON),
            ("longer", tasks.FAMILIES, ["held_out"], 5 * HORIZON)):
        for name, make in makers.items():
            curves = compare(make(*pool), *model.load(path, steps), 16, steps, seed, ADAM)
            versus = evaluate.summary(curves)["versus"]["Adam"]
            interval = versus["speedup"], *versus["speedup_95"]
            yield "times as fast as tuned Adam", line, f"{name} {steps}", interval


def regularisation(seed, path):
    """On (x - y)^2 / 2 all points of the diagonal are as good: who drifts along it to the origin?
    (x + y)^2 / 2 takes the test loss's place (P2 figure 4)."""
    def loss(task, params, split):
        sign = 1 if split == "test" else -1
        return 0.5 * (params[0] + sign * params[1]) ** 2

    valley = tasks.TaskFamily(
        "valley", lambda key: (), lambda task, key: random.normal(key, (2,)),
        lambda task, key, split: split, loss)
    for name, c in compare(valley, *model.load(path, 1000), 64, 1000, seed).items():
        y = np.sqrt(c[:, c.shape[1] // 2, :, 1].mean(0))  # of ten settings, Adam's 0.01
        yield "distance along the valley", name, EVERY * np.arange(len(y)), y / y[0]


def adaptation(seed, path):
    """Other widths, batches and data sets, against Adam at each of its rates (P2 figure 5)."""
    for panel, *values in (("width", 4, 8, 16, 32, 64, 128),
                           ("max_batch", 2, 8, 32, 64, 256),
                           ("images", 50, 100, 200, 500, 1000)):
        for x in values:
            family = letters(seed, **{panel: x})
            curves = compare(family, *model.load(path, HORIZON), 4, HORIZON, seed, ADAM)
            ends = {name: c[:, :, -1, 1].T for name, c in curves.items()}  # [settings, starts]
            yield panel, "learned", x, ends["learned"][0]
            for rate, end in zip(evaluate.RATES, ends["Adam"]):
                yield panel, f"Adam {rate:.0e}", x, end


def validation_feature(seed, path):
    """What its validation loss is worth: final test losses where it is told something else."""
    (learned, theta), ends = model.load(path, HORIZON), []

    def told(which, theta):
        optimizer = learned.optimizer(theta)

        def update(*given, loss, valid_loss):
            valid_loss = (valid_loss, jnp.nan, loss + 0 * valid_loss)[which]
            return optimizer.update(*given, loss=loss, valid_loss=valid_loss)

        return optimizer._replace(update=update)

    for i, name in enumerate(("as it is", "cut", "the training loss")):
        changed = learned._replace(optimizer=partial(told, i))
        curves = compare(tasks.mlp("held_out"), changed, theta, 64, HORIZON, seed, {})
        ends.append(np.log(curves["learned"][:, 0, -1, 1]))
        change = ends[i] - ends[0]
        y = np.exp([change.mean(), *evaluate.bootstrap(change)])
        yield "final test loss / that as it is", "learned", name, y


def wall_clock(seed, path):
    """A conv net of some 50,000 parameters against seconds (P1's headline)."""
    learned, theta = model.load(path, HORIZON)
    family = letters(seed, 1000, net="conv", width=128)
    optimizers = {name: make(0.01, HORIZON) for name, (make, _) in evaluate.BASELINES.items()}
    costs = evaluate.costs(family, optimizers | {"learned": learned.optimizer(theta)}, 20)
    for name, c in compare(family, learned, theta, 4, HORIZON, seed).items():
        tests = evaluate.tuned(c[..., 1], evaluate.final_loss)  # [starts, points]
        seconds, _ = costs[name]
        x = np.float32(seconds * EVERY * np.arange(tests.shape[1]))
        yield "test loss of a conv net against seconds", name, x, tests


def own_data(seed, path, families):
    """Eight starts of a small net on each of your own files; the baselines at the best of ten rates
    for each start and, at the end, at the one that is best for all. Test losses over their start,
    at least 0.02; geometric means over starts."""
    def over_starts(losses):  # [starts, ..., points]
        relative = np.maximum(losses / losses[..., :1], 0.02)
        return np.exp(np.log(relative).mean(0))

    baselines = {name: evaluate.BASELINES[name] for name in ("Adam + cosine", "Muon + cosine")}
    ends = []
    for name, family in families.items():
        curves = compare(family, *model.load(path, HORIZON), 8, HORIZON, seed, baselines)
        for line, c in curves.items():
            y = over_starts(evaluate.tuned(c[..., 1], evaluate.final_loss))
            yield f"{name}: test loss", line, EVERY * np.arange(len(y)), y
            ends.append((line, name, y[-1]))
            if line in baselines:
                at_each_rate = over_starts(c[..., 1])[:, -1]
                ends.append((f"{line}, one rate", name, np.nanmin(at_each_rate)))
    adam = {name: end for line, name, end in ends if line == "Adam + cosine"}
    for line, name, end in ends:
        yield "final test loss / that of Adam + cosine", line, name, end / adam[name]


# ---------------------------------------------------------------- the command line

STUDIES = (landscape, truncation_bias, variance, cost, race, ablation, architectures, num_tasks,
           targets)
BEHAVIOURS = (generalisation, regularisation, adaptation, validation_feature, wall_clock,
              self_training, own_data)
LOG, BOTH = dict(yscale="log"), dict(xscale="log", yscale="log")
LOOKS = {variance: BOTH, targets: BOTH, adaptation: BOTH | {"ylim": (0.5, 10)},
         generalisation: LOG, own_data: LOG}
EXPERIMENTS = {f.__name__.replace("_", "-"): f for f in STUDIES + BEHAVIOURS}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("name", choices=EXPERIMENTS)
    add("--theta", help="FILE whose behaviour it is, for "
                        f"{', '.join(name for name, f in EXPERIMENTS.items() if f in BEHAVIOURS)}")
    add("--data", nargs="+", metavar="FILE", help="whose learning curves own-data draws")
    add("--seed", type=evaluate.number(int, 0, 2 ** 31 - 1), default=0, help="of everything random")
    add("--out", default="figures", help="folder for the picture and the table")
    o = parser.parse_args()
    experiment, given, rows = EXPERIMENTS[o.name], [o.seed], []
    try:
        if experiment in BEHAVIOURS:
            given.append(o.theta or evaluate.PRETRAINED)
            model.load(given[1])  # a wrong file is found at once
        elif o.theta:
            raise ValueError(f"{o.name} is not about a learned optimizer: leave out --theta.")
        if (experiment is own_data) != bool(o.data):
            raise ValueError("own-data, and no other, needs --data FILE, one or more.")
        if o.data:
            given.append({x: own.family(own.understood(own.read(x))) for x in o.data})
        os.makedirs(o.out, exist_ok=True)
        with machine.whole(f"{o.out}/{o.name}.csv") as part, open(part, "w") as table:
            print("panel,line,x,y", file=table)
            for panel, line, x, y in experiment(*given):
                print(panel, line, x, y, flush=True)
                for point in np.broadcast(x, y):
                    rows.append((panel, line, *point))
                    print('"%s","%s","%s",%.6g' % rows[-1], file=table)
        evaluate.picture(f"{o.out}/{o.name}.png", rows, LOOKS.get(experiment, {}))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{o.out}/{o.name}.png and {o.out}/{o.name}.csv")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    machine.configure_jax()
    main()
