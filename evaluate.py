"""Compare a learned optimizer, the shipped one or your own, with tuned hand-designed ones: `python evaluate.py [theta.npz]`.

The tasks are held out (letters, and on the test split fonts, that meta-training never saw). Every optimizer starts from
the same parameters, sees the same batches and may know how many steps there will be. Every baseline is tuned per task, with
hindsight, anew for each figure: the best of ten learning rates counts, or, of NAdamW and Adam8p, of ten settings of all that
they have. The learned optimizer runs once, untuned.
"""
import argparse
import concurrent.futures
import functools
import hashlib
import json
import os
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import estimators
import model
import tasks

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PRETRAINED, PRETRAINED_MLP = (os.path.join(os.path.dirname(os.path.abspath(__file__)), name)  # the README says by what commands
                              for name in ("pretrained.npz", "pretrained_mlp.npz"))
EVERY = 20    # steps between two measurements
BATCHES = 8   # batches a measurement averages over, the same ones each time
RATES = np.float32(10.0 ** np.arange(-4.5, 0.1, 0.5))  # of the adaptive baselines; SGD, 30 times as much, momentum, 3 times


def settings_at_random(seed, count, ranges):
    """{name: [count] between the two numbers given for it, evenly on a logarithmic scale}."""
    draws = np.random.default_rng(seed).uniform(size=(count, len(ranges)))
    return {name: np.float32(tasks.log_uniform(u, low, high)) for u, (name, (low, high)) in zip(draws.T, ranges.items())}


def nadamw(setting, horizon):
    """NAdamW at one of NADAMW_DRAWS: its b1 and b2 are 1 less the decays, its warm-up a share of the horizon."""
    return model.nadamw(setting["learning_rate"], 1 - setting["b1"], 1 - setting["b2"], setting["eps"],
                        weight_decay=setting["weight_decay"], warmup=setting["warmup"] * horizon, horizon=horizon)


def adam8p(setting, horizon):
    """Adam8p at a random setting; P2's decays are for 10,000 steps, so they are faster here by as much as the training is shorter."""
    faster = 10000 / horizon
    return model.adam8p(setting["learning_rate"], 1 - setting["b1"], 1 - setting["b2"], setting["eps"], setting["l1"], setting["l2"],
                        faster * setting["linear"], faster * setting["exponential"])


NADAMW = dict(learning_rate=(1e-4, 1), b1=(1e-2, 1), b2=(1e-4, 1), eps=(1e-9, 1e-2), weight_decay=(1e-5, 1), warmup=(1e-3, 0.3))
ADAM8P = dict(learning_rate=(1e-8, 10), b1=(1e-4, 1), b2=(1e-6, 1), eps=(1e-10, 1e3), l1=(1e-8, 10), l2=(1e-8, 10),
              linear=(1e-7, 1e-4), exponential=(1e-6, 1e-3))  # P2 appendix D
BASELINES = {  # name: (optimizer(setting, horizon), settings)
    "SGD": (lambda rate, horizon: model.sgd(30 * rate), RATES),
    "momentum": (lambda rate, horizon: model.momentum(3 * rate), RATES),
    "RMSProp": (lambda rate, horizon: model.rmsprop(rate), RATES),
    "Adam": (lambda rate, horizon: model.adam(rate), RATES),
    "Adam + cosine": (lambda rate, horizon: model.nadamw(rate, nesterov=False, horizon=horizon), RATES),
    "Muon + cosine": (lambda rate, horizon: model.muon(rate, 0.8, horizon), RATES),  # the decay: by trial on meta-training tasks
}
NADAMW_DRAWS = settings_at_random(0, 200, NADAMW)
NADAMW_LIST = [43, 174, 185, 113, 75, 117, 52, 194, 179, 162]  # of these draws, in the order to try them: `experiments.settings_list`
SEARCHES = {"NAdamW, list of 10": (nadamw, {name: values[NADAMW_LIST] for name, values in NADAMW_DRAWS.items()}),
            "Adam8p, 10 draws": (adam8p, settings_at_random(1, 10, ADAM8P))}


def learning_curve(family, optimizer, key, horizon):
    """Train one sampled task for `horizon` steps -> mean losses [1 + horizon / EVERY, 2] on the train and test split."""
    task_key, init_key, step_key, measure_key = jax.random.split(key, 4)
    task = family.sample(task_key)

    def measure(inner):
        batch_loss = lambda split: jax.vmap(lambda k: family.loss(task, inner.params, family.batch(task, k, split)))
        keys = jax.random.split(measure_key, BATCHES)
        return jnp.stack([jnp.mean(batch_loss("train")(keys)), jnp.mean(batch_loss("test")(keys))])

    def segment(inner, key):
        step = lambda inner, key: (tasks.inner_step(family, optimizer, task, inner, key), None)
        inner, _ = jax.lax.scan(step, inner, jax.random.split(key, EVERY))
        return inner, measure(inner)

    start = tasks.init_inner(family, optimizer, task, init_key)
    _, losses = jax.lax.scan(segment, start, jax.random.split(step_key, horizon // EVERY))
    return jnp.concatenate([measure(start)[None], losses])


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def learning_curves(family, make_optimizer, hyper, keys, horizon):
    """`learning_curve` of every task (keys [n]) under every optimizer make_optimizer(hyper[h]) -> [n, h, points, 2]."""
    settings = len(jax.tree.leaves(hyper)[0])
    i, j = jnp.divmod(jnp.arange(len(keys) * settings), settings)

    def one(shared, row):
        keys, hyper = shared
        return learning_curve(family, make_optimizer(jax.tree.map(lambda x: x[row[1]], hyper)), keys[row[0]], horizon)

    curves = estimators.over_devices(one, len(i), alone=True)((keys, hyper), (i, j))
    return curves.reshape(len(keys), settings, *curves.shape[1:])


def kept_curves(family, make_optimizer, hyper, keys, horizon):
    """`learning_curves`, kept on disk for when the same program meets the same numbers again: tuning is most of a comparison."""
    lowered = learning_curves.lower(family, make_optimizer, hyper, keys, horizon)
    content = hashlib.sha256(lowered.as_text().encode())
    for x in jax.tree.leaves((hyper, jax.random.key_data(keys))):
        content.update(np.asarray(x).tobytes())
    path = os.path.join(matplotlib.get_cachedir(), f"learned_optimizer_curves_{content.hexdigest()[:20]}.npz")
    try:
        return model.read_npz(path)["curves"]
    except (ValueError, KeyError):  # none yet, or damaged
        curves = np.asarray(lowered.compile()(hyper, keys))
    try:
        model.write_npz(path, {"curves": curves})
    except OSError:
        pass  # a read-only home costs the time again, nothing else
    return curves


def compare(family, learned, theta, num_tasks, horizon, seed=0, baselines=BASELINES):
    """Learning curves of all optimizers on the same tasks -> {name: [tasks, settings, points, 2]}; "learned" has one setting."""
    keys = jax.random.split(jax.random.key(seed), num_tasks)
    runs = {name: (kept_curves, functools.partial(make, horizon=horizon), jax.tree.map(jnp.asarray, settings))
            for name, (make, settings) in baselines.items()}
    runs["learned"] = learning_curves, learned.optimizer, jax.tree.map(lambda x: jnp.asarray(x)[None], theta)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # one compiles while the other runs
        curves = pool.map(lambda run: np.asarray(run[0](family, *run[1:], keys, horizon)), runs.values())
        return dict(zip(runs, curves))


def figures(curves, value):
    """value(losses [..., points]) of every run: [n, h, points] -> [n, h]; infinite if one of its losses is not finite."""
    return np.where(np.isfinite(curves).all(-1), value(curves), np.inf)


def best(curves, value):
    """value(losses) of each task's test (or train) curves, at its best setting: [n, h, points] -> [n]."""
    return figures(curves, value).min(1)


mean_loss = lambda losses: losses[..., 1:].mean(-1)
final_loss = lambda losses: losses[..., -1]


def steps_to(curve, loss):
    """The first measured step at which a curve [points] is down to `loss`, at least one measurement; inf if it never is."""
    reached = np.nonzero(curve <= loss)[0]
    return max(reached[0], 1) * EVERY if len(reached) else np.inf


def summary(curves):
    """The comparison as a dict for Python's json (what diverged is Infinity there); see the README for what each figure means.

    Against each baseline: shares of tasks and speed-up, and for each the interval that holds 95% of what other tasks might give.
    """
    learned = curves["learned"]
    start = learned[:, 0, 0, 1]  # test loss before training, [n]

    def table(pick):
        """Of the relative figures [n, h] of each optimizer, `pick` takes one setting's for each task."""
        return {name: {f"{split}_{label}_{statistic.__name__}": float(statistic(pick(figures(c[..., i], value) / start[:, None])))
                       for i, split in enumerate(("train", "test"))
                       for label, value in (("mean_loss", mean_loss), ("final_loss", final_loss))
                       for statistic in (np.mean, np.median)}
                for name, c in curves.items()}

    test = learned[:, 0, :, 1]  # [n, points]
    diverged = ~np.isfinite(learned).all((1, 2, 3)) | ~(test[:, -1] <= start)
    versus = {}
    for name in [name for name in curves if name != "learned"]:
        wins = lambda value: best(learned[..., 1], value) < best(curves[name][..., 1], value)
        logs = np.log(speedups(test, curves[name][..., 1]))
        versus[name] = {"win_mean": float(wins(mean_loss).mean()), "win_mean_95": bootstrap(wins(mean_loss)),
                        "win_final": float(wins(final_loss).mean()), "win_final_95": bootstrap(wins(final_loss)),
                        "speedup": float(np.exp(logs.mean())), "speedup_95": np.exp(bootstrap(logs)).tolist()}
    return {"tasks": len(start), "horizon": (test.shape[1] - 1) * EVERY, "diverged": int(diverged.sum()),
            "tuned": table(lambda x: x.min(1)), "off_the_shelf": table(lambda x: x[:, x.mean(0).argmin()]), "versus": versus}


def bootstrap(x, draws=2000):
    """The central 95% of the mean of x [n] over random choices of n of its entries, with repetition -> [low, high]."""
    chosen = np.random.default_rng(0).integers(0, len(x), (draws, len(x)))
    return np.quantile(np.asarray(x)[chosen].mean(1), (0.025, 0.975)).tolist()


def speedups(learned, adam):
    """For each task, how many times fewer steps the learned optimizer needs than tuned Adam (or another) -> [n].

    learned [n, points], adam [n, h, points], test losses. If Adam gets down to the loss the learned one ends at, in s of
    the T steps, the task counts s / T; if it never does, the learned one needed s' steps to Adam's final loss: T / s'. A
    learned run that is not finite ends at infinity, where Adam is at once: s is EVERY.
    """
    rates = []
    for mine, others in zip(learned, adam):
        other, horizon = others[figures(others, final_loss).argmin()], (len(mine) - 1) * EVERY
        steps = steps_to(other, figures(mine, final_loss))
        rates.append(steps / horizon if np.isfinite(steps) else horizon / min(steps_to(mine, other[-1]), horizon))
    return np.array(rates)


def costs(family, optimizers, steps=50, turns=9):
    """{name: (seconds of an inner step, bytes of the optimizer's state)} on one task: medians of runs taken in turn."""
    key, programs = jax.random.key(0), {}
    task = family.sample(key)
    for name, optimizer in optimizers.items():
        step = lambda inner, key, optimizer=optimizer: (tasks.inner_step(family, optimizer, task, inner, key), None)
        train = jax.jit(lambda inner, step=step: jax.lax.scan(step, inner, jax.random.split(key, steps))[0])
        inner = tasks.init_inner(family, optimizer, task, key)
        jax.block_until_ready(train(inner))  # compiles
        programs[name] = train, inner
    times = {name: [] for name in programs}
    for _ in range(turns):
        for name, (train, inner) in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(train(inner))
            times[name].append((time.perf_counter() - begin) / steps)
    return {name: (float(np.median(times[name])), sum(x.nbytes for x in jax.tree.leaves(inner.opt_state)))
            for name, (_, inner) in programs.items()}


def print_summary(name, result):
    """The tables of `summary` for a family of tasks."""
    columns = [f"{split}_{label}_{s}" for split in ("train", "test") for label in ("mean_loss", "final_loss")
               for s in ("mean", "median")]
    print(f"\n{name}: {result['tasks']} tasks, {result['horizon']} steps; losses relative to the start")
    print(f"{'':20}{'train: mean loss':>18}{'final loss':>18}{'test: mean loss':>18}{'final loss':>18}")
    for regime, label in (("off_the_shelf", "one setting for all"), ("tuned", "best for each task")):
        print(f"{label:20}" + f"{'mean':>9}{'median':>9}" * 4)
        for name, row in result[regime].items():
            if regime == "tuned" or name != "learned":
                print(f"{name:20}" + "".join(f"{row[c]:9.3f}" for c in columns))
    print(f"{'learned, against':20}{'lower mean test loss':>24}{'lower final test loss':>24}{'times as fast':>24}")
    for name, against in result["versus"].items():
        print(f"{name:20}" + "".join(f"{against[c]:11.0%} ({low:.0%} to {high:.0%})".rjust(24) for c in ("win_mean", "win_final")
                                     for low, high in [against[c + "_95"]])
              + "{:.2f} ({:.2f} to {:.2f})".format(against["speedup"], *against["speedup_95"]).rjust(24))
    print(f"diverged runs of the learned optimizer: {result['diverged']}")


def picture(path, curves):
    """Test curves of four tasks, and per task how far the learned optimizer ends up below tuned Adam."""
    figure, axes = plt.subplots(1, 5, figsize=(18, 3.4), layout="constrained")
    steps = np.arange(curves["learned"].shape[2]) * EVERY
    for i, axis in enumerate(axes[:4]):
        for name in ("Adam", "Adam + cosine", "Muon + cosine", "learned"):
            test = curves[name][i, ..., 1]
            axis.plot(steps, test[figures(test, mean_loss).argmin()], label=name, color={"learned": "C3"}.get(name),
                      lw=2 if name == "learned" else 1.2)
        axis.set(title=f"task {i}", xlabel="step", ylabel="test loss" if i == 0 else None)
    axes[0].legend()
    log2 = lambda name, value: np.log2(np.maximum(best(curves[name][..., 1], value), 1e-30))  # some functions are solved exactly
    ratio = lambda value: log2("learned", value) - log2("Adam", value)
    for value, label in ((mean_loss, "mean test loss"), (final_loss, "final test loss")):
        axes[4].hist(np.clip(ratio(value), -1, 1), bins=np.linspace(-1, 1, 41), alpha=0.6, label=label)
    axes[4].axvline(0, color="black", lw=1)
    axes[4].set(title="all tasks", xlabel="log2(learned / tuned Adam)", ylabel="tasks")
    axes[4].margins(y=0.35)  # room for the legend
    axes[4].legend(loc="upper right")
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ---------------------------------------------------------------- kinds of task that nothing here is ever meta-trained on

def wide_and_deep():
    """The mlp family beyond what meta-training saw: four hidden layers of 128 units."""
    family = tasks.mlp("held_out", max_depth=4, max_width=128)
    largest = dict(depth=jnp.int32(4), widths=jnp.full(4, 128))
    return family._replace(sample=lambda key: family.sample(key)._replace(**largest))


def mlp_with_batches(size, max_batch):
    """The mlp family with training batches of that one size."""
    family = tasks.mlp("held_out", max_batch=max_batch)

    def sample(key):
        task = family.sample(key)
        return task._replace(letters=task.letters._replace(batch_size=jnp.int32(size)))

    return family._replace(sample=sample)


def one_example():
    """The mlp family with batches of a single training example."""
    return mlp_with_batches(1, max_batch=64)


def full_batch():
    """The mlp family with 256 training examples, all of them in every batch: gradients without noise, and soon overfitted."""
    family = mlp_with_batches(256, max_batch=256)
    same = lambda key, split: jax.random.key(0) if split == "train" else key
    return family._replace(batch=lambda task, key, split: family.batch(task, same(key, split), split))


def plain_weights(key, shapes):
    """{name: standard normal / sqrt(rows) of that shape}."""
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, shape) / np.sqrt(shape[0]) for k, (name, shape) in zip(keys, shapes.items())}


def residual(channels=12, blocks=2):
    """Classification of letters by a residual net of 3x3 convolutions, the mean over all positions, and a linear head."""
    choose, letter_batch = tasks.letter_batches("held_out", 32)
    inside = {f"block{i}/{j}": (9 * channels, channels) for i in range(blocks) for j in range(2)}
    shapes = {"in": (9, channels), **inside, "out": (channels, 10)}
    rows = lambda b, x: jnp.expand_dims(b, tuple(range(x.ndim - 1)))

    def sample(key):
        class_key, key = jax.random.split(key)
        return choose(class_key, jax.random.uniform(key, (4,)))

    def init(task, key):
        return plain_weights(key, shapes) | {f"{name}/b": jnp.zeros(shape[1]) for name, shape in shapes.items()}

    def loss(task, params, batch):
        x, y, weight = batch
        layer = lambda name, x: x @ params[name] + rows(params[f"{name}/b"], x)
        h = layer("in", tasks.patches(x.reshape(-1, 8, 8, 1), 2))  # [B, 4, 4, channels]
        for i in range(blocks):
            inner = layer(f"block{i}/0", tasks.patches(jax.nn.relu(h), 1))
            h = h + layer(f"block{i}/1", tasks.patches(jax.nn.relu(inner), 1))
        logits = layer("out", jnp.mean(jax.nn.relu(h), (1, 2)))
        return tasks.weighted_mean(tasks.cross_entropy(logits, y), weight)

    return tasks.TaskFamily("residual", sample, init, letter_batch, loss)


def transformer(width=24, heads=2, length=16, size=8):
    """Character-level language modelling by one block of causal attention and a feed-forward layer, both on normalised inputs."""
    text, n = {split: jnp.asarray(x) for split, x in tasks.texts("held_out").items()}, len(tasks.SYMBOLS)
    shapes = {"place": (length, width), "query": (width, width), "key": (width, width), "value": (width, width),
              "mix": (width, width), "up": (width, 4 * width), "down": (4 * width, width), "out": (width, n)}

    def init(task, key):
        embed_key, key = jax.random.split(key)
        return plain_weights(key, shapes) | {"embed": jax.random.normal(embed_key, (n, width))}

    def batch(task, key, split):
        start = jax.random.randint(key, (size, 1), 0, len(text[split]) - length)
        return text[split][start + jnp.arange(length + 1)[None]]

    def loss(task, params, characters):
        h = params["embed"][characters[:, :-1]] + params["place"][None]  # [B, length, width]
        x = jax.nn.standardize(h)
        q, k, v = ((x @ params[name]).reshape(size, length, heads, -1) for name in ("query", "key", "value"))
        h = h + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(h.shape) @ params["mix"]
        h = h + jax.nn.relu(jax.nn.standardize(h) @ params["up"]) @ params["down"]
        return jnp.mean(tasks.cross_entropy(jax.nn.standardize(h) @ params["out"], characters[:, 1:]))

    return tasks.TaskFamily("transformer", lambda key: (), init, batch, loss)


def own_training(steps=20, count=8):
    """A learned optimizer's own meta-training (after P2 figure 8): the parameters are a small per-parameter MLP's theta, the loss
    is its mean root relative loss over a short training of fresh functions."""
    learned, family = model.per_parameter_mlp(hidden=8), tasks.function("held_out")

    def batch(task, key, split):
        return jax.random.split(jax.random.fold_in(key, tasks.SPLITS.index(split)), count)

    def loss(task, theta, keys):
        optimizer = learned.optimizer(theta)

        def unroll(key):
            task_key, init_key, key = jax.random.split(key, 3)
            inner_task = family.sample(task_key)
            value = lambda inner: family.loss(inner_task, inner.params, family.batch(inner_task, key, "test"))

            def step(inner, key):
                inner = tasks.inner_step(family, optimizer, inner_task, inner, key)
                return inner, value(inner)

            start = tasks.init_inner(family, optimizer, inner_task, init_key)
            losses = jax.lax.scan(step, start, jax.random.split(key, steps))[1]
            return jnp.mean(jnp.sqrt(jnp.minimum(losses / value(start), 10.0) + 1e-6))

        return jnp.mean(estimators.over_rows(unroll, keys))  # vmapped on a CPU, LAPACK's QR in `sample` can wait for itself for good

    return tasks.TaskFamily("own_training", lambda key: (), lambda task, key: learned.init(key), batch, loss)


KINDS = {f.__name__: f for f in (wide_and_deep, one_example, full_batch, residual, transformer, own_training)}


# ---------------------------------------------------------------- the command line

def configure_jax(devices=None):
    """One device per core, since small steps don't fill two from one; and compiled programs are kept for the next launch.

    They are in matplotlib's cache folder, or wherever the environment's JAX_COMPILATION_CACHE_DIR says.
    """
    devices = devices or os.cpu_count()
    if devices != jax.config.jax_num_cpu_devices:  # once JAX has begun, setting it is an error
        jax.config.update("jax_num_cpu_devices", devices)
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.join(matplotlib.get_cachedir(), "learned_optimizer_programs"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".")
    parser.add_argument("theta", nargs="?", default=PRETRAINED, help="meta-parameters written by meta_train.py (default: the shipped ones)")
    parser.add_argument("--family", choices=[*tasks.FAMILIES, *KINDS], default="mlp", help="of the tasks (default: mlp)")
    parser.add_argument("--data", metavar="FILE", help="compare on your own data instead: an .npz file with x_train, y_train, x_test, y_test")
    parser.add_argument("--net", choices=("mlp", "conv"), default="mlp", help="what is trained on your data (default: mlp)")
    parser.add_argument("--tasks", type=int, help="tasks to compare on (default: 128 held-out ones; 8 starts on your data)")
    parser.add_argument("--horizon", type=int, default=model.HORIZON,
                        help=f"inner steps, a multiple of {EVERY}; the optimizers are told, if they ask (default: {model.HORIZON})")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks, initialisations and batches")
    parser.add_argument("--json", metavar="FILE", help="also write the table here")
    parser.add_argument("--picture", metavar="FILE", help="where to draw (default: comparison-<family or data>.png beside theta)")
    options = parser.parse_args()
    if options.tasks is None:
        options.tasks = 8 if options.data else 128
    if options.tasks < 4 or options.horizon < EVERY or options.horizon % EVERY or abs(options.seed) >= 2 ** 31:
        parser.error(f"--tasks must be at least 4, --horizon a positive multiple of {EVERY}, and --seed smaller than 2^31.")
    try:
        learned, theta = model.load(options.theta, options.horizon)
        family = (tasks.dataset(model.read_npz(options.data), options.net) if options.data
                  else tasks.FAMILIES[options.family]("held_out") if options.family in tasks.FAMILIES
                  else KINDS[options.family]()._replace(name=options.family))
        target = options.picture or os.path.join(os.path.dirname(options.theta), f"comparison-{family.name}.png")
        for file in (target, options.json):
            if file and not os.path.isdir(os.path.dirname(file) or "."):
                raise ValueError(f"There is no folder to write {file} to.")
    except ValueError as error:
        parser.error(str(error))
    print(f"{options.theta}: {model.about(options.theta)}")
    start = time.time()
    curves = compare(family, learned, theta, options.tasks, options.horizon, options.seed, BASELINES | SEARCHES)
    result = summary(curves) | {"costs": costs(family, {"Adam": model.adam(0.01), "learned": learned.optimizer(theta)})}
    print_summary(family.name, result)
    (adam_time, adam_bytes), (time_taken, state_bytes) = (result["costs"][name] for name in ("Adam", "learned"))
    print(f"a step takes {time_taken / adam_time:.2f} times as long as Adam's ({1e6 * time_taken:.0f} us), so in seconds it is "
          f"{result['versus']['Adam']['speedup'] * adam_time / time_taken:.2f} times as fast; its state is "
          f"{state_bytes / adam_bytes:.1f} times Adam's")
    try:
        if options.json:
            with open(options.json, "w") as file:
                json.dump(result, file, indent=2)
        picture(target, curves)
    except (OSError, ValueError) as error:  # a ValueError is matplotlib's, for a kind of picture that it does not know
        parser.error(f"The comparison is done, but could not be written: {error}.")
    print(f"{time.time() - start:.0f} s; picture: {target}")


if __name__ == "__main__":
    configure_jax()
    main()
