"""What theta is learned for: the outer loss; and two step sizes that are fitted to it by trial."""
import functools
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random, tree

import evaluate
import model

TARGETS = {"valid": "outer_valid", "train": "train"}  # where the outer loss's batches come from
MULTIPLES = 2.0 ** np.linspace(-1.5, 0.5, 5)  # of the step size, tried by `fit_step_size`
BIASES = 2.0 ** -np.arange(5)  # of the step size of biases, likewise


class OuterLoss(NamedTuple):
    """What a loss counts for theta: loss(l, l_0, t / T, b), or `cap` where that is more or not
    finite; l is the loss after inner step t of T, l_0 that before the first, b l_0 Adam's best
    (b = 0 if it isn't known)."""
    loss: Callable
    cap: float


def mean(loss, start, progress, best):
    """The loss itself (P1)."""
    return loss


def normalised(loss, start, progress, best):
    """1 at the start, 0 where Adam's is best (P2 section 3.2; our reading of its words)."""
    return (loss / start - best) / (1 - best)


def end_root(loss, start, progress, best):
    """10 (t/T)^4 r, where r is the root of the loss over its start, scaled like `normalised`.

    The root lets neither the tasks that can be solved dominate, as the logarithm would, nor those
    that can't, as l / l_0 would; and where training ends matters more than how it begins. The 1e-6
    keeps it differentiable at l = 0.
    """
    root, best = jnp.sqrt(loss / start + 1e-6), jnp.sqrt(best)
    return 10 * progress ** 4 * ((root - best) / (1 - best))


# end_root is capped where the loss is ten times the start, at the end.
OUTER_LOSSES = {"mean": OuterLoss(mean, 10.0), "normalised": OuterLoss(normalised, 10.0),
                "end_root": OuterLoss(end_root, 10 * 10 ** 0.5)}


@functools.cache
def watched(family, target):
    """The family with the batches of the outer loss where the test split's are asked for."""
    def batch(task, key, split):
        return family.batch(task, key, TARGETS[target] if split == "test" else split)
    return family._replace(batch=batch)


def make_pool(family, count, horizon, target):
    """M = `count` tasks, the same for all seeds -> (keys [M], best [M]); None for no tasks.

    The keys are for `family.sample`, the best losses of Adam, at any rate and time, over the start,
    for an OuterLoss; at most 0.8 (ours), lest there be next to nothing to divide by.
    """
    if not count:
        return None
    print(f"Adam is tuned on {count} tasks of {family.name}: minutes, if it wasn't done before",
          flush=True)
    keys = random.split(random.key(2 ** 31), count)
    family = watched(family, target)
    curves = evaluate.kept_runs(family, model.adam, evaluate.RATES, keys, horizon)["curves"]
    losses = curves[..., 1] / curves[..., :1, 1]
    sampled = jax.vmap(lambda key: random.split(key, 4)[0])(keys)  # as in `evaluate.run`
    return sampled, jnp.minimum(np.nanmin(losses, (1, 2)), 0.8)


def lowest(multiples, values):
    """Where the mean over tasks of values [tasks, multiples] is least."""
    return multiples[values.mean(0).argmin()]


def safest(multiples, values):
    """The smallest multiple whose values [tasks, multiples] can't be told from those at the lowest
    mean: the mean difference is at most two of its standard errors."""
    worse = values - values[:, [values.mean(0).argmin()]]
    error = worse.std(0) / len(values) ** 0.5
    return multiples[(worse.mean(0) <= 2 * error).argmax()]


def fit_step_size(learned, theta, families, keys, horizon, target, outer_loss):
    """Theta with the steps of biases, then all, multiplied by what makes the outer loss least.

    Along the step size, backprop's slope was seen to disagree with finite differences. Two numbers
    need no gradient: five multiples of each are tried on the tasks of keys [n], of each TaskFamily.
    Of all steps' the safest is taken, see `safest`. Theta needs log_bias and log_lr.
    """
    def fitted(theta, entry, multiples, choose):
        variants = tree.map(lambda x: jnp.stack([x] * len(multiples)), theta)
        variants[entry] += jnp.log(jnp.float32(multiples))
        runs = [evaluate.runs(watched(family, target), learned.optimizer, variants, keys, horizon)
                for family in families]
        losses = np.concatenate([run["curves"] for run in runs])[..., 1]
        progress = np.linspace(0, 1, losses.shape[2])[None, None, 1:]
        values = outer_loss.loss(losses[..., 1:], losses[..., :1], progress, 0.0)
        values = np.fmin(values, outer_loss.cap).mean(2)  # [tasks, multiples]; NaN is the cap
        losses = f"{values.mean(0).round(4)} at {multiples.round(2)} x"
        print(f"{entry}: outer loss {losses}", flush=True)
        multiple = choose(multiples, values)
        return theta | {entry: theta[entry] + jnp.float32(np.log(multiple))}, multiple

    theta, bias = fitted(theta, "log_bias", BIASES, lowest)
    theta, every = fitted(theta, "log_lr", MULTIPLES, safest)
    print(f"steps of biases multiplied by {bias:.3g}, then all by {every:.3g}")
    return theta
