"""An optimizer is a pair (init, update), with optax's signature. Here are what all of them promise,
those designed by hand, and what this project puts around learned ones: a way back to the best
parameters."""
import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, tree


class Optimizer(NamedTuple):
    init: Callable    # init(params) -> state
    update: Callable  # update(grads, state, params, *, loss=None, valid_loss=None, value=None)
    #                   -> (updates, state); updates are added to the parameters


# ---------------------------------------------------------------- what all of them promise

def careful(init, update):
    """The Optimizer of a rule that only ever meets float32 tensors, a gradient for each, and losses
    that are float32 scalars, NaN where there is none.

    Parameters may be of any real floating-point type, and none at all. Updates have their types; a
    state's types never change, and each of its arrays is its own, so that it can be donated.
    `value` is the loss where that is missing. ValueError for other numbers and for gradients that
    are not shaped like the parameters.
    """
    def start(params):
        state = init(tree.map(float32, params)) if tree.leaves(params) else ()
        return tree.map(lambda x: jnp.array(x, kept_type(x), copy=True), state)

    def step(grads, state, params=None, *, loss=None, valid_loss=None, value=None, **extra):
        if layout(grads) != layout(params):
            raise ValueError("update(grads, state, params) needs gradients of the same structure "
                             "and shapes as the parameters.")
        if not tree.leaves(params):
            return params, state
        found = update(
            tree.map(float32, grads), state, tree.map(float32, params),
            loss=scalar(value if loss is None else loss), valid_loss=scalar(valid_loss))
        return tree.map(lambda x, old: x.astype(jnp.result_type(old)), found, (params, state))

    return Optimizer(start, step)


def kept_type(x):
    return jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype


def layout(params):
    return tree.structure(params), [jnp.shape(x) for x in tree.leaves(params)]


def float32(x):
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError("Parameters and gradients must be real floating-point numbers, not "
                         f"{x.dtype}: leave others out, or give their parts.")
    if any(jax.typeof(x).sharding.spec):
        raise ValueError("Parameters can't be divided along the explicit axes of a mesh: make the "
                         "mesh with jax.sharding.AxisType.Auto.")
    return x.astype(jnp.float32)


def steps_of(horizon):
    number = type(horizon) is int or isinstance(horizon, np.integer)  # no bool
    if not (number and 0 < horizon < 2 ** 31):
        raise ValueError("horizon is the number of steps that a training takes, a positive "
                         f"integer, not {horizon}.")
    return int(horizon)


def scalar(loss):
    try:
        return jnp.asarray(jnp.nan if loss is None else loss, jnp.float32).reshape(())
    except (TypeError, OverflowError):
        raise ValueError(f"A loss must be one real number, not {loss}.") from None


# ---------------------------------------------------------------- designed by hand

def leafwise(averages, step):
    """The Optimizer of a rule with `averages` running averages of each leaf.

    step(t, g, p, *averages) -> (update, *averages), for a leaf's gradient g and parameters p.
    """
    def init(params):
        return jnp.int32(0), *(tree.map(jnp.zeros_like, params) for _ in range(averages))

    def update(grads, state, params, **losses):
        t, *old = state
        found = tree.map(functools.partial(step, t), grads, params, *old)
        inner = tree.structure((0,) * (1 + averages))
        updates, *new = tree.transpose(tree.structure(grads), inner, found)
        return updates, (t + 1, *new)

    return careful(init, update)


def sgd(learning_rate):
    return leafwise(0, lambda t, g, p: (-learning_rate * g,))


def momentum(learning_rate, decay=0.9):
    def step(t, g, p, m):
        m = decay * m + g
        return -learning_rate * m, m

    return leafwise(1, step)


def rmsprop(learning_rate, decay=0.9, eps=1e-8):
    def step(t, g, p, v):
        v = decay * v + (1 - decay) * g * g
        return -learning_rate * g / (jnp.sqrt(v) + eps), v

    return leafwise(1, step)


def scheduled(learning_rate, t, warmup, horizon):
    """The rate at step t (from 0): it rises over `warmup` steps; a cosine ends it at a horizon."""
    rate = learning_rate * jnp.minimum(1.0, (t + 1) / jnp.maximum(warmup, 1))
    if horizon is None:
        return rate
    share = jnp.clip((t - warmup) / jnp.maximum(steps_of(horizon) - warmup, 1), 0.0, 1.0)
    return rate * (0.5 + 0.5 * jnp.cos(jnp.pi * share))


def adam_direction(t, g, m, v, b1, b2, eps=1e-8, nesterov=False):
    """-> (bias-corrected m / sqrt(v), m, v) with one more gradient, after t others."""
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    m_hat = m / (1 - b1 ** (t + 1))
    if nesterov:
        ahead = b1 * m / (1 - b1 ** (t + 2))
        m_hat = ahead + (1 - b1) * g / (1 - b1 ** (t + 1))
    v_hat = v / (1 - b2 ** (t + 1))
    return m_hat / (jnp.sqrt(v_hat) + eps), m, v


def nadamw(learning_rate, b1=0.9, b2=0.999, eps=1e-8, *,
           nesterov=True, weight_decay=0.0, warmup=0, horizon=None):
    """Adam with Nesterov momentum and decoupled weight decay, `scheduled` (P2 section 4.2)."""
    def step(t, g, p, m, v):
        direction, m, v = adam_direction(t, g, m, v, b1, b2, eps, nesterov)
        rate = scheduled(learning_rate, t, warmup, horizon)
        return -rate * (direction + weight_decay * p), m, v

    return leafwise(2, step)


adam = functools.partial(nadamw, nesterov=False)  # Kingma and Ba 2015


def orthogonal(x, shape):
    """Roughly the nearest to x [n] of the matrices whose singular values are all one.

    x is taken as a matrix with a column for each entry of the last dimension of `shape`; zero for
    vectors and scalars. Two rounds of Muon's polynomial (Jordan et al. 2024) take singular values
    of 0.05 to 1 times x's norm to 0.6 to 1.2.
    """
    if len(shape) < 2 or 0 in shape:
        return jnp.zeros_like(x)
    x = x.reshape(-1, shape[-1]) * lax.rsqrt(jnp.sum(x * x) + 1e-12)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(2):
        a = x @ x.T
        x = 3.4445 * x + (2.0315 * a @ a - 4.775 * a) @ x
    return (x.T if tall else x).ravel()


def muon(learning_rate, decay=0.95, horizon=None):
    """Jordan et al. 2024: matrices step along their `orthogonal` Nesterov momentum, at a root mean
    square of 0.3 (of entries that have a gradient), so that Adam's rates suit it; else, Adam."""
    def step(t, g, p, m, v):
        direction, m, v = adam_direction(t, g, m, v, decay, 0.999)
        if g.ndim > 1:
            o = orthogonal((decay * m + (1 - decay) * g).ravel(), g.shape)
            size = jnp.sqrt((jnp.vecdot(o, o) + 1e-12) / jnp.sum(o != 0))
            direction = (0.3 * o / size).reshape(g.shape)
        return -scheduled(learning_rate, t, 0, horizon) * direction, m, v

    return leafwise(2, step)


# ---------------------------------------------------------------- ours: an end to overfitting

BRAKE = 8.0  # after each return to the best parameters, steps are exp(-BRAKE) times as long


class Record(NamedTuple):
    """What the validation loss was so far, and the parameters at its best."""
    told: jax.Array     # the last loss, as it was told
    count: jax.Array    # of losses
    latest: jax.Array   # [2], the last two, `bounded`
    noise: jax.Array    # variance of a loss, by second differences: a steady rise has none
    mean: jax.Array     # running mean of the losses, the newest counting half
    first: jax.Array    # the first loss
    best: jax.Array     # the lowest mean
    params: Any         # where it was met
    returns: jax.Array  # how often those were gone back to


def remember(record, loss, params):
    """-> (the record with one more validation loss, whether it is time to go back to the best).

    That is when the last two losses both lie above the best mean by 4.25 deviations of a loss, plus
    a tenth of the first one: noise alone hardly ever does that, and one outlier never. A mean is a
    new best only if it is lower than the best by a tenth of that and half a deviation: the lowest
    of many noisy means is luck, and with few examples it comes long after overfitting began.
    """
    k, (before, last) = record.count, record.latest
    limit = 3 * (jnp.sqrt(record.noise + 1e-30) + jnp.abs(record.first))
    new = bounded(loss, record.mean, limit)
    mean = jnp.where(k > 0, 0.5 * (record.mean + new), new)
    first = jnp.where(k > 0, record.first, new)

    bend = (new - 2 * last + before) ** 2 / 6  # of noise alone its mean is the variance
    noise = record.noise + (bend - record.noise) / jnp.clip(k - 1, 1, 100)
    noise = jnp.where(k > 1, noise, 0.0)
    sigma = jnp.sqrt(noise)

    lower = record.best - mean >= 0.5 * sigma + 0.1 * jnp.abs(record.best)
    better = (k == 0) | lower
    best = jnp.where(better, mean, record.best)
    kept = tree.map(lambda now, then: jnp.where(better, now, then), params, record.params)

    low = jnp.minimum(new, last)
    back = (k > 2) & (low - best > 4.25 * sigma + 0.1 * jnp.abs(first))
    mean = jnp.where(back, best, mean)  # it begins anew
    latest = jnp.where(back, best, jnp.stack([last, new]))
    returns = record.returns + back
    return Record(loss, k + 1, latest, noise, mean, first, best, kept, returns), back


def bounded(loss, center, limit):
    """No further from the center than the limit, if there is one already: a loss of 1e20 must not
    be all that a running average remembers."""
    limit = jnp.where(limit > 1e-12, limit, 1e15)
    return jnp.clip(loss, center - limit, center + limit)


def news(loss, count, last):
    """Whether a loss is finite and not just the last one handed on: equal ones count once."""
    return jnp.isfinite(loss) & ((count == 0) | (loss != last))


def going_back(optimizer):
    """The optimizer, but once the validation loss has clearly risen, parameters go back to where it
    was best, and hardly move any more."""
    def init(params):
        zero, none = jnp.float32(0), jnp.int32(0)
        record = Record(zero, none, jnp.zeros(2), zero, zero, zero, zero, params, none)
        return optimizer.init(params), record

    def update(grads, state, params, **losses):
        inner, record = state
        updates, inner = optimizer.update(grads, inner, params, **losses)
        loss = losses["valid_loss"]
        record, back = lax.cond(
            news(loss, record.count, record.told),
            lambda: remember(record, loss, params),
            lambda: (record, False))
        brake = jnp.exp(-BRAKE * record.returns)

        def move(u, p, best):
            return brake * u + jnp.where(back, best - p, 0.0)

        return tree.map(move, updates, params, record.params), (inner, record)

    return careful(init, update)
