"""What theta is learned for: the outer loss; and a fixed pool of tasks to learn from."""
import functools
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

import evaluate
import model

TARGETS = {"valid": "outer_valid", "train": "train"}  # where the outer loss's batches come from


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


# end_root is capped where the loss is ten times the start, at the end, if b is not known.
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
