"""An optimizer is a pair (init, update); a learned optimizer is a function from meta-parameters to such a pair.

Hand-designed and learned optimizers share one signature (optax's), so nothing that trains with them knows which it runs.
P1: Metz et al. 2019, arXiv 1810.10180. P2: Metz et al. 2020, arXiv 2009.11243. Inside, arrays are feature-major:
[features, parameters], with the long axis last.
"""
import functools
import json
import os
import zipfile
import zlib
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


class Optimizer(NamedTuple):
    init: Callable    # init(params) -> state
    update: Callable  # update(grads, state, params, *, loss=None, valid_loss=None) -> (updates, state); params += updates


class LearnedOptimizer(NamedTuple):
    """Those below are made once for the same arguments, so that what is compiled for one is found again."""
    init: Callable       # init(key) -> theta, a flat dict of float32 arrays
    optimizer: Callable  # optimizer(theta) -> Optimizer


# ---------------------------------------------------------------- designed by hand

def sgd(learning_rate):
    """updates = -learning_rate * g."""
    def update(grads, state, params=None, **extra):
        return jax.tree.map(lambda g: -learning_rate * g, grads), state
    return Optimizer(lambda params: (), update)


def momentum(learning_rate, decay=0.9):
    """m <- decay * m + g; updates = -learning_rate * m."""
    def update(grads, m, params=None, **extra):
        m = jax.tree.map(lambda m, g: decay * m + g, m, grads)
        return jax.tree.map(lambda m: -learning_rate * m, m), m
    return Optimizer(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def rmsprop(learning_rate, decay=0.9, eps=1e-8):
    """v <- decay * v + (1 - decay) * g^2; updates = -learning_rate * g / (sqrt(v) + eps)."""
    def update(grads, v, params=None, **extra):
        v = jax.tree.map(lambda v, g: decay * v + (1 - decay) * g * g, v, grads)
        return jax.tree.map(lambda g, v: -learning_rate * g / (jnp.sqrt(v) + eps), grads, v), v
    return Optimizer(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def scheduled(learning_rate, t, warmup, horizon):
    """The learning rate at step t (from 0): it rises linearly over `warmup` steps; with a `horizon` (in steps) it then falls to 0
    there along a cosine."""
    rate = learning_rate * jnp.minimum(1.0, (t + 1) / jnp.maximum(warmup, 1))
    if horizon is not None:
        rate *= 0.5 + 0.5 * jnp.cos(jnp.pi * jnp.clip((t - warmup) / (horizon - warmup), 0.0, 1.0))
    return rate


def adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    """Kingma and Ba 2015, with constant learning rate."""
    return nadamw(learning_rate, b1, b2, eps, nesterov=False)


def nadamw(learning_rate, b1=0.9, b2=0.999, eps=1e-8, *, nesterov=True, weight_decay=None, warmup=0, horizon=None):
    """Adam with Nesterov momentum and decoupled weight decay, its rate `scheduled` (P2 section 4.2)."""
    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return zeros, zeros, jnp.int32(0)

    def update(grads, state, params=None, **extra):
        m, v, t = state
        rate = scheduled(learning_rate, t, warmup, horizon)
        t = t + 1
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, grads)
        m_hat = jax.tree.map(lambda m: m / (1 - b1 ** t), m)
        if nesterov:
            m_hat = jax.tree.map(lambda m, g: b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1 ** t), m, grads)
        updates = jax.tree.map(lambda m_hat, v: -rate * m_hat / (jnp.sqrt(v / (1 - b2 ** t)) + eps), m_hat, v)
        if weight_decay is not None:
            updates = jax.tree.map(lambda u, p: u - rate * weight_decay * p, updates, params)
        return updates, (m, v, t)
    return Optimizer(init, update)


def adam8p(learning_rate, b1, b2, eps, l1, l2, linear, exponential):
    """Adam with eight things to tune (P2 appendix D): penalties l1 |w| + l2 w^2, and a rate that falls by `linear` of its start
    at each step, and exponentially."""
    unit = adam(1.0, b1, b2, eps)

    def update(grads, state, params, **extra):
        rate = learning_rate * jnp.maximum(1 - state[2] * linear, 0) * jnp.exp(-state[2] * exponential)
        grads = jax.tree.map(lambda g, p: g + l1 * jnp.sign(p) + 2 * l2 * p, grads, params)
        updates, state = unit.update(grads, state)
        return jax.tree.map(lambda u: rate * u, updates), state
    return Optimizer(unit.init, update)


def orthogonal(x, shape):
    """Roughly the nearest to x [n] of the matrices whose singular values are all one; x is taken as a matrix with a column for
    each entry of the last dimension of `shape`. Zero for vectors and scalars.

    Jordan et al. 2024: two rounds of Muon's polynomial take singular values of 0.05 to 1 times x's norm to 0.6 to 1.2.
    """
    if len(shape) < 2:
        return jnp.zeros_like(x)
    x = x.reshape(-1, shape[-1]) * jax.lax.rsqrt(jnp.sum(x * x) + 1e-12)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(2):
        a = x @ x.T
        x = 3.4445 * x + (2.0315 * a @ a - 4.775 * a) @ x
    return (x.T if tall else x).ravel()


def muon(learning_rate, decay=0.95, horizon=None):
    """Jordan et al. 2024: matrices step along their `orthogonal` Nesterov momentum, at a root mean square of 0.3 times the rate (of
    entries that have a gradient), so that Adam's rates suit it; all else steps by Adam's rule."""
    unit = adam(1.0, decay)

    def update(grads, state, params=None, **extra):
        rate = scheduled(learning_rate, state[2], 0, horizon)
        updates, state = unit.update(grads, state)

        def scaled_step(u, m, g):
            if g.ndim < 2:
                return rate * u
            o = orthogonal((decay * m + (1 - decay) * g).ravel(), g.shape)
            return (-0.3 * rate * jnp.sqrt(jnp.sum(o != 0) / (jnp.vecdot(o, o) + 1e-12)) * o).reshape(g.shape)
        return jax.tree.map(scaled_step, updates, state[0], grads), state
    return Optimizer(unit.init, update)


# ---------------------------------------------------------------- what the learned optimizers are made of

DECAYS = np.float32([0.5, 0.9, 0.99, 0.999, 0.9999])[:, None]  # of the running averages of g (P1, P2) and g^2 (P2)
B1, B2 = 1, 3                                                    # Adam's two among them
ODD = 2 + 2 * len(DECAYS)  # features of P1 that change sign with the gradient and the parameter; they come first


HORIZON = 400  # steps of a training, where nothing else is said; what features see as one
TIMES = np.float32([3, 10, 30, 100, 300, 1000, 3000, 10000, 300000])  # scales of P1's features of time, in steps


def tanh_times(t):
    """P1's features of time, [9]."""
    return jnp.tanh(t / TIMES - 1)


def relative(t, horizon):
    """The time that features see: step t of `horizon` as one of HORIZON; after the last, time stands still."""
    return jnp.minimum(t, horizon) * (HORIZON / horizon)


def averages(x, g):
    """The five running averages x [5, n] with one more g [n]; no bias correction."""
    return DECAYS * x + (1 - DECAYS) @ g[None]


def sizes(params):
    return [x.size for x in jax.tree.leaves(params)]


def by_tensor(x, sizes):
    """[..., parameters] -> a list of each tensor's [..., n]."""
    return jnp.split(x, np.cumsum(sizes)[:-1], axis=-1)


def mean(x):
    """Over the last axis; 0 where that is empty. XLA's code for CPUs is faster for a product than for a sum."""
    n = x.shape[-1]
    return x @ np.full(n, 1 / max(n, 1), np.float32)


def per_tensor(x, sizes):
    """Means over each tensor's parameters: [F, parameters] -> [tensors, F]."""
    return jnp.stack([mean(part) for part in by_tensor(x, sizes)])


def normalised(x, seen):
    """Each feature of a tensor over its root mean square there (P1; not centred), within +-5: [F, n] -> the same.

    P2 (appendix C.4) clips, too, and calls it crucial; its bound is not given. Parameters that never had a gradient
    (`seen` [n] is false: padding, dead units) are not part of the mean. Backprop takes the root mean squares as
    given, an approximation that makes it faster by a tenth.
    """
    seen = seen.astype(x.dtype)
    power = jax.lax.stop_gradient(x * x) @ seen / (jnp.vecdot(seen, seen) + 1e-8)  # [F]
    return jnp.clip(x * jax.lax.rsqrt(1e-5 + power)[:, None], -5, 5)


def parameter_features(g, w, m, v):
    """What P1's optimizer knows of each parameter: g, w [n], m, v [5, n] -> [12, n]."""
    return jnp.concatenate([g[None], w[None], m, m * jax.lax.rsqrt(v + 1e-6)])


def dense_init(key, name, inputs, outputs):
    """A layer's meta-parameters before `scaled`: weights of standard deviation 0.88 (a normal cut off at +-2), zero biases."""
    return {f"{name}/w": jax.random.truncated_normal(key, -2, 2, (inputs, outputs)), f"{name}/b": jnp.zeros(outputs)}


def scaled(theta):
    """Theta with each hidden layer's weights divided by sqrt(inputs).

    Outside they are of size 1, so that one noisy step of the outer optimizer, or one sigma of an estimator, moves what a
    layer puts out as little in a wide layer as in a narrow one.
    """
    return {k: x / np.sqrt(len(x)) if k.endswith("/w") and k != "step/w" else x for k, x in theta.items()}


def dense(theta, name, x):
    """[rows, inputs] -> [rows, outputs]."""
    return x @ theta[f"{name}/w"] + theta[f"{name}/b"][None]


def joined(*parts):
    """[rows, inputs] side by side, kept whole: XLA would multiply each part on its own, in many small and slow products."""
    return jax.lax.optimization_barrier(jnp.concatenate(parts, 1))


def step_init(key, hidden, own, anchored, odd=ODD):
    """The output layer. Anchored, it starts at zero: an untrained optimizer is Adam at a learning rate of 0.01, but for `paces`
    and, in `hierarchical`, the clipping of gradients and `remember`."""
    if anchored:
        return {"step/w": jnp.zeros((hidden, 2)), "direct/d": jnp.zeros(odd), "direct/a": jnp.zeros(own),
                "log_lr": jnp.float32(np.log(0.01)), "log_bias": jnp.float32(0)}
    return {"step/w": jax.random.truncated_normal(key, -2, 2, (hidden, 2)) / np.sqrt(hidden), "step/b": jnp.zeros(2)}


def paces(theta, t, horizon, params):
    """What anchored steps of each tensor are multiplied by at step t -> [tensors]. None of the four factors is P1's or P2's.

    Weights (two dimensions or more): the more inputs a unit sums up, the more one step changes the sum, so beyond 32 inputs
    (all but the last dimension) steps shrink in proportion (Yang et al. 2021, muP; a large embedding, whose inputs are zero
    but for one, is slowed for nothing). Biases (fewer dimensions, beside a tensor of weights) have a pace of their own: a few
    long steps push a narrow layer of ReLUs below zero on all inputs, for good. Backprop can't see such a jump, so it is kept
    away from this pace. Beyond HORIZON, a longer training takes shorter steps, like horizon^(-3/4), by trial on meta-training
    tasks: it leads farther if its steps have one direction, and less far if they are a random walk. After the horizon they
    fall like 1 / t^2, since full ones would ruin most tasks.
    """
    shapes = [x.shape for x in jax.tree.leaves(params)]
    weights, inputs = np.array([len(s) > 1 for s in shapes]), np.array([max(np.prod(s[:-1]), 1) for s in shapes])
    biases = jnp.exp(jax.lax.stop_gradient(theta["log_bias"])) if weights.any() else 1.0
    return jnp.where(weights, np.minimum(1, 32 / inputs), biases) * min(HORIZON / horizon, 1) ** 0.75 / jnp.maximum(t / horizon, 1) ** 2


def step(theta, h, features, adam_direction, pace, steer=None):
    """From a tensor's last hidden layer h [H, n] and the features [F, n] it was made of to its parameters' change [n].

    The papers' form is 0.001 d exp(0.001 a), with d and a linear in h. The anchored form, this project's departure,
    scales and bends Adam's step: pace lr exp(min(a, 1)) (m_hat / sqrt(v_hat) + d), see `paces`. There d and a also read the
    features directly, so that a weight decay or another momentum is learned in a few steps; `steer` [1 + odd] adds to a
    and, within +-1, to the weights of what d reads. What h adds to d has mean zero, and what d reads directly changes sign
    with the gradient and the parameter: pushing a whole tensor one way kills ReLU units, which costs much later and shows in
    no derivative. Hence the limit of 1 on a, too.
    """
    d, a = theta["step/w"].T @ h
    if "log_lr" not in theta:
        return -0.001 * (d + theta["step/b"][0]) * jnp.exp(0.001 * (a + theta["step/b"][1]))
    direct, bias = theta["direct/d"], 0.0
    if steer is not None:
        direct, bias = direct + jnp.tanh(steer[1:]), steer[0]
    weights = jnp.stack([jnp.pad(direct, (0, len(features) - len(direct))), theta["direct/a"]])  # one product is faster than two
    bend, scale = weights @ features
    push = adam_direction + d - theta["step/w"][:, 0] @ mean(h) + bend
    return -pace * jnp.exp(theta["log_lr"] + jnp.minimum(a + scale + bias, 1.0)) * push


def directions(m, v, t):
    """Adam's direction for each of the five momenta: [5, n], [5, n] -> [5, n].

    The 1e-30 keeps the square root differentiable where no gradient was ever seen.
    """
    m_hat, v_hat = m / (1 - DECAYS ** t), v[B2:B2 + 1] / (1 - DECAYS[B2, 0] ** t)
    return m_hat / (jnp.sqrt(v_hat + 1e-30) + 1e-8)


def tensor_means(g, w, m, v, directions, sizes):
    """What a tensor's parameters tell together, in one product: g, w [n], m, v, directions [5, n] -> [tensors, 3] means of m, v, w;
    [tensors, 4] means of the squares of m, v, w, g; [tensors, 5] of the directions; and the share of parameters at rest, [tensors].

    A parameter at rest had a gradient once and has none in this step: dying units show. Those that never had one (padding, dead
    units) count neither there nor in the directions' means.
    """
    seen = v[B2] > 0
    over_decays = lambda x: sum(x) / len(DECAYS)  # on two cores jnp.mean takes longer than all the rest
    rows = [over_decays(m), over_decays(v), w, over_decays(m * m), over_decays(v * v), w * w, g * g, *directions ** 2, seen, seen & (g == 0)]
    means, squares, powers, counts = jnp.split(per_tensor(jnp.stack(rows), sizes), [3, 7, 7 + len(DECAYS)], axis=1)
    seen, rest = counts.T
    return means, squares, powers / (seen[:, None] + 1e-8), rest / (seen + 1e-8)


def signal_to_noise(powers, t):
    """How well the gradients of a tensor agree over the span of each average: mean squares of the five directions [tensors, 5] -> the
    same shape, in decibels above gradients of pure noise."""
    decays = DECAYS[:, 0]
    noise = (1 - decays) / (1 + decays) * (1 + decays ** t) / (1 - decays ** t)  # of an average of white noise of power 1
    return 10 * jnp.log10(powers / noise[None] + 0.1)


# ---------------------------------------------------------------- P1: one small MLP, run on each parameter

class Memory(NamedTuple):
    m: jax.Array  # [5, parameters], running averages of g over the raveled parameters
    v: jax.Array  # [5, parameters], of g^2
    t: jax.Array  # steps done


def memory_init(params):
    zeros = jnp.zeros((len(DECAYS), sum(sizes(params))))
    return Memory(zeros, zeros, jnp.int32(0))


@functools.cache
def per_parameter_mlp(hidden=32, layers=1, rms=True, anchored=True, horizon=HORIZON):
    """P1's optimizer (its released code; `layers=2` is as deep as the later LOLv2): features of one parameter and the time go
    through `layers` hidden layers of `hidden` units to a direction and a magnitude, with the same weights everywhere.
    Without `rms` no feature knows of g^2, as in P1; with it and two layers it is the MLP that P2 compares with (appendix F.1).
    `horizon` is the number of steps that a training takes, see `relative` and `paces`.
    """
    def init(key):
        keys = jax.random.split(key, layers + 1)
        theta = dense_init(keys[0], "mlp0", ODD + len(TIMES), hidden)  # the time is the same for all: a bias
        for i in range(1, layers):
            theta |= dense_init(keys[i], f"mlp{i}", hidden, hidden)
        return theta | step_init(keys[-1], hidden, ODD, anchored)

    def optimizer(theta):
        theta = scaled(theta)

        def update(grads, memory, params, **extra):
            w, unravel = ravel_pytree(params)
            g, _ = ravel_pytree(grads)
            m, v, t = averages(memory.m, g), averages(memory.v, g * g), memory.t + 1
            w_own, w_time = jnp.split(theta["mlp0/w"], [ODD])
            bias = tanh_times(relative(t, horizon)) @ w_time + theta["mlp0/b"]
            count = sizes(params)
            pace = paces(theta, t, horizon, params) if anchored else [None] * len(count)

            def tensor(features, seen, adam_direction, pace):
                features = normalised(features, seen)
                h = w_own.T @ features + bias[:, None]
                for i in range(1, layers):
                    h = theta[f"mlp{i}/w"].T @ jax.nn.relu(h) + theta[f"mlp{i}/b"][:, None]
                return step(theta, jax.nn.relu(h), features, adam_direction, pace)

            features = parameter_features(g, w, m, v if rms else jnp.zeros_like(v))
            parts = (by_tensor(x, count) for x in (features, v[B2] > 0, directions(m, v, t)[B1]))
            return unravel(jnp.concatenate([*map(tensor, *parts, pace)])), Memory(m, v, t)

        return Optimizer(memory_init, update)

    return LearnedOptimizer(init, optimizer)


# ---------------------------------------------------------------- before them: an LSTM, run on each parameter

def lstm_cell(gates, c):
    """Input gate, candidate, forget gate, output gate, all before their nonlinearity, and the cell -> the next (h, c)."""
    i, g, f, o = gates
    c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


@functools.cache
def component_lstm(hidden=20, horizon=HORIZON):
    """Andrychowicz et al. 2016: two LSTM layers read each parameter's gradient, its size (over a range of e^20) and its sign
    apart, and remember what they like; the step is a tenth of what the second puts out. Of the horizon it makes nothing."""
    def init(key):
        keys = jax.random.split(key, 3)
        return {**dense_init(keys[0], "lstm0", 2 + hidden, 4 * hidden), **dense_init(keys[1], "lstm1", 2 * hidden, 4 * hidden),
                "step/w": 0.01 * jax.random.truncated_normal(keys[2], -2, 2, (hidden,))}

    def optimizer(theta):
        theta = scaled(theta)

        def update(grads, state, params, **extra):
            g, unravel = ravel_pytree(grads)
            small = jnp.abs(g) < np.exp(-10)
            x = jnp.stack([jnp.where(small, -1.0, jnp.log(jnp.abs(g) + 1e-30) / 10), jnp.where(small, np.exp(10) * g, jnp.sign(g))])
            layers = []
            for i, (h, c) in enumerate(state):
                gates = theta[f"lstm{i}/w"].T @ jnp.concatenate([x, h]) + theta[f"lstm{i}/b"][:, None]
                layers.append(lstm_cell(jnp.split(gates, 4), c))
                x = layers[-1][0]
            return unravel(0.1 * theta["step/w"] @ x), tuple(layers)

        zeros = lambda params: jnp.zeros((hidden, sum(sizes(params))))
        return Optimizer(lambda params: ((zeros(params),) * 2,) * 2, update)

    return LearnedOptimizer(init, optimizer)


# ---------------------------------------------------------------- P2: an LSTM per tensor steers an MLP per parameter

BRAKE = 8.0  # after each return to the best parameters, steps are exp(-BRAKE) times as long
TRAIN_DECAY, VALID_DECAY = 0.9, 0.8  # P2 has 0.95 for the second, in episodes of 10,000 steps


class LossAverage(NamedTuple):
    """Running mean and variance of a loss, and the number of losses seen (P2 appendix C.2.2)."""
    mean: jax.Array
    variance: jax.Array
    count: jax.Array


def observe(average, loss, decay):
    """The average with one more loss; a missing (None) or non-finite one changes nothing."""
    if loss is None:
        return average
    there = jnp.isfinite(loss)
    loss = jnp.where(there, loss, 0.0)  # where there is none, the derivative is finite, too
    mean = decay * average.mean + (1 - decay) * loss
    seen = LossAverage(mean, decay * average.variance + (1 - decay) * (mean - loss) ** 2, average.count + 1)
    return jax.tree.map(lambda new, old: jnp.where(there, new, old), seen, average)


def correction(average, decay):
    return 1 / (1 - decay ** average.count + 1e-8)


def surprise(train, loss):
    """How many running standard deviations a loss lies above the running training loss, within +-5; 0 at first, or if not finite."""
    c = correction(train, TRAIN_DECAY)
    loss = jnp.where(jnp.isfinite(loss), loss, c * train.mean)
    score = (loss - c * train.mean) * jax.lax.rsqrt(c * train.variance + 1e-8)
    return jnp.where(train.count > 0, jnp.clip(score, -5, 5), 0.0)


class Record(NamedTuple):
    """What the validation loss was so far, and the parameters at its best."""
    count: jax.Array    # of losses
    latest: jax.Array   # [2], the losses before the next
    noise: jax.Array    # variance of a loss
    mean: jax.Array     # running mean of the losses, the newest counting half
    first: jax.Array    # the first loss
    best: jax.Array     # the lowest mean, see `remember`
    params: jax.Array   # [parameters], where it was met
    returns: jax.Array  # how often those were gone back to


def remember(record, loss, w):
    """-> (the record with one more validation loss, met at parameters w [n]; whether it is time to go back to the best).

    That is when the mean lies above the best by a tenth of the first loss and, on top, 1.5 standard deviations of a single loss.
    Those come from second differences of the losses, which a steady rise or fall does not change. (A fifth of what was gained was
    tried: it also ends trainings that only begin with a jump.) To be a new best, a mean has to be a tenth and half a standard deviation
    lower than the last: of many noisy means the lowest is lucky, and with few examples it is met long after overfitting began.
    """
    if loss is None:
        return record, False

    def seen():
        k = record.count
        mean = jnp.where(k > 0, 0.5 * (record.mean + loss), loss)
        bend = (loss - 2 * record.latest[1] + record.latest[0]) ** 2 / 6
        noise = jnp.where(k > 1, record.noise + (bend - record.noise) / jnp.clip(k - 1, 1, 10), 0.0)
        sigma, first = jnp.sqrt(noise), jnp.where(k > 0, record.first, loss)
        better = (k == 0) | (record.best - mean >= 0.5 * sigma + 0.1 * jnp.abs(record.best))
        best, params = jnp.where(better, mean, record.best), jnp.where(better, w, record.params)
        back = (k > 2) & (mean - best > 1.5 * sigma + 0.1 * jnp.abs(first))
        mean, latest = jnp.where(back, best, mean), jnp.where(back, best, jnp.stack([record.latest[1], loss]))
        return Record(k + 1, latest, noise, mean, first, best, params, record.returns + back), back

    return jax.lax.cond(jnp.isfinite(loss), seen, lambda: (record, False))


def log_size(x):
    return jnp.clip(jnp.log(1e-8 + jnp.abs(x)), -5, 5)


class HierarchicalState(NamedTuple):
    memory: Memory
    h: jax.Array          # [tensors, lstm]
    c: jax.Array          # [tensors, lstm]
    feedback: jax.Array   # [tensors, 16], each tensor's MLP to its LSTM
    context: jax.Array    # [18], all LSTMs to each
    train: LossAverage
    valid: LossAverage
    record: Record        # or () where the output is not anchored
    size: jax.Array       # running average of the root of the mean over tensors of their gradients' mean squares


FEEDBACK, CONTEXT, CONDITION = 16, 18, 17  # sizes of P2's three messages: MLP to LSTM, LSTM to LSTM, LSTM to MLP


@functools.cache
def hierarchical(lstm=32, hidden=16, anchored=True, horizon=HORIZON):
    """P2's optimizer (section 3.3 and appendix C; the papers' sizes are lstm=64, hidden=32).

    Per tensor, an LSTM reads statistics of momenta, second moments, weights, gradient and shape, how the training and
    the validation loss compare with the recent training loss, what the tensor's MLP reported, and the mean of all LSTMs.
    Per parameter, an MLP with two hidden layers reads that parameter's features, sinusoids of time, and the LSTM's
    message. Gradients are clipped at a learned multiple of their running size; all initial states are learned.
    `horizon` is the number of steps that a training takes, see `relative` and `paces`; after them the LSTM rests.
    Left out: P2's copy of the weights of 100 steps ago. Added: the LSTM also reads how well the gradients agree and how
    many have vanished, and where the output is anchored, these, the time, the losses and the LSTM steer the step directly, the MLP
    also reads a matrix's `orthogonal` momentum, and a validation loss that has clearly risen ends the training: back to the
    parameters where it was best, see `remember`.
    """
    timescales = np.float32([1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000])
    odd = ODD + anchored  # P1's and the orthogonal momentum, which changes sign with the gradients, too
    own = odd + 1 + 2 * len(DECAYS)  # features of a parameter; what all parameters of a tensor share enters as a bias
    shared = CONDITION + 3 + len(timescales)

    def init(key):
        keys = iter(jax.random.split(key, 9))
        return {
            **dense_init(next(keys), "lstm", 24 + FEEDBACK + CONTEXT + lstm, 4 * lstm),
            **dense_init(next(keys), "condition", lstm, CONDITION),
            **dense_init(next(keys), "context", lstm, CONTEXT),
            **dense_init(next(keys), "mlp0", own + shared, hidden),
            **dense_init(next(keys), "mlp1", hidden, hidden),
            **dense_init(next(keys), "feedback", hidden, FEEDBACK),
            **step_init(next(keys), hidden, own, anchored, odd),
            **({"steer": jnp.zeros((lstm + 6 + 2 + len(DECAYS) + 1, 1 + odd))} if anchored else {}),
            "initial/h": jnp.zeros(lstm), "initial/c": jnp.zeros(lstm),
            "initial/feedback": 0.1 * jax.random.normal(next(keys), (FEEDBACK,)),
            "initial/context": 0.1 * jax.random.normal(next(keys), (CONTEXT,)),
            "clip/log_multiple": jnp.float32(np.log(10)), "clip/log_rate": jnp.float32(np.log(0.01)),
        }

    def optimizer(theta):
        theta = scaled(theta)

        def opt_init(params):
            each = lambda name: jnp.tile(theta[f"initial/{name}"], (len(sizes(params)), 1))
            none, zero = LossAverage(jnp.float32(0), jnp.float32(0), jnp.int32(0)), jnp.float32(0)
            record = Record(jnp.int32(0), jnp.zeros(2), zero, zero, zero, zero, ravel_pytree(params)[0], jnp.int32(0)) if anchored else ()
            return HierarchicalState(memory_init(params), each("h"), each("c"), each("feedback"),
                                     theta["initial/context"], none, none, record, jnp.exp(theta["clip/log_rate"]))

        def clipped(g, state, count):
            """Gradient [parameters], elementwise within a multiple of its running size; and that size, updated."""
            rate, t = jnp.exp(theta["clip/log_rate"]), state.memory.t + 1
            limit = jnp.exp(theta["clip/log_multiple"]) * state.size / (1 - (1 - rate) ** t)
            g = jnp.clip(jnp.nan_to_num(g), -limit, limit)
            size = jnp.sqrt(1e-8 + jnp.mean(per_tensor(g[None] ** 2, count)))
            return g, (1 - rate) * state.size + rate * size

        def loss_features(train, valid, loss):
            """Both losses against the recent training loss -> [2]; overfitting shows in the second."""
            valid_mean = correction(valid, VALID_DECAY) * valid.mean
            return jnp.stack([0.0 if loss is None else surprise(train, loss),
                              jnp.where(valid.count > 0, surprise(train, valid_mean), 0.0)])

        def statistics(means, squares, params):
            """What P2's LSTM knows of each tensor: the first two of `tensor_means` -> [tensors, 16]."""
            norms = jnp.sqrt(np.array(sizes(params))[:, None] * squares[:, 2:] + 1e-16)  # of w and g
            logs = log_size(jnp.concatenate([means, squares[:, :3] - means ** 2, norms], 1))  # [tensors, 8]
            shapes = [(*x.shape, 1, 1, 1, 1)[:4] for x in jax.tree.leaves(params)]
            scalar = [1.0 if x.ndim == 0 else -1.0 for x in jax.tree.leaves(params)]
            known = np.concatenate([np.array(scalar)[:, None], np.log(np.maximum(shapes, 1)) - 1], 1)
            return jnp.concatenate([logs, jnp.sign(means), known], 1)

        def tensor(features, seen, adam_direction, bias, pace, steer):
            """One tensor's parameters: features [own, n], bias [hidden] -> change [n], mean of the last hidden layer."""
            features = normalised(features, seen)
            h = jax.nn.relu(theta["mlp0/w"][:own].T @ features + bias[:, None])
            h = jax.nn.relu(theta["mlp1/w"].T @ h + theta["mlp1/b"][:, None])
            return step(theta, h, features, adam_direction, pace, steer), mean(h)

        def update(grads, state, params, *, loss=None, valid_loss=None, **extra):
            count, (w, unravel) = np.array(sizes(params)), ravel_pytree(params)
            each = lambda x: jnp.tile(x, (len(count), 1))  # what is the same for all tensors
            g, size = clipped(ravel_pytree(grads)[0], state, count)
            m, v, t = averages(state.memory.m, g), averages(state.memory.v, g * g), state.memory.t + 1
            train, valid = observe(state.train, loss, TRAIN_DECAY), observe(state.valid, valid_loss, VALID_DECAY)

            adams = directions(m, v, t)
            means, squares, powers, rest = tensor_means(g, w, m, v, adams, count)
            signal, rest = signal_to_noise(powers, t), 5 * rest[:, None]
            surprises = loss_features(train, valid, loss)
            x = joined(statistics(means, squares, params), signal / 10, rest, each(surprises), each(state.context), state.feedback, state.h)
            h, c = lstm_cell(jnp.split(dense(theta, "lstm", x), 4, axis=1), state.c)
            h, c = jnp.where(t > horizon, state.h, h), jnp.where(t > horizon, state.c, c)
            clock = relative(t, horizon)

            logs = [jnp.full(len(count), np.log(len(count)) - 1), 0.5 * jnp.log(count * squares[:, 2] + 1e-8),
                    np.log(np.maximum(count, 1))]
            time = jnp.sin(clock / (np.pi * timescales))
            condition = joined(dense(theta, "condition", h), jnp.stack(logs, 1), each(time))  # [tensors, shared]
            bias = condition @ theta["mlp0/w"][own:] + theta["mlp0/b"][None]
            record, jump, pace, steer, matrix = (), 0, [None] * len(count), [None] * len(count), []
            if anchored:
                # together these two are close to a Nesterov momentum of decay 0.8, the best of Muon's on meta-training tasks
                shapes = [x.shape for x in jax.tree.leaves(params)]
                matrix = [jnp.concatenate([*map(orthogonal, by_tensor(m[0] + m[B1], count), shapes)])[None]]
                record, back = remember(state.record, valid_loss, w)
                jump = jnp.where(back, record.params - w, 0)
                pace = paces(theta, t, horizon, params) * jnp.exp(-BRAKE * record.returns)
                # P1's times from 10 to 3000 steps; the others hardly change in an episode
                steer = joined(h, each(tanh_times(clock)[1:7]), each(surprises), signal, rest) @ theta["steer"]
            features = jnp.concatenate([parameter_features(g, w, m, v), *matrix, jnp.log(jnp.abs(w)[None] + 1e-8), v, jax.lax.rsqrt(v + 1e-6)])
            parts = (by_tensor(x, count) for x in (features, v[B2] > 0, adams[B1]))
            updates, reports = zip(*map(tensor, *parts, bias, pace, steer))
            return unravel(jnp.concatenate(updates) + jump), HierarchicalState(
                Memory(m, v, t), h, c, dense(theta, "feedback", jnp.stack(reports)),
                jnp.mean(dense(theta, "context", h), 0), train, valid, record, size)

        return Optimizer(opt_init, update)

    return LearnedOptimizer(init, optimizer)


# ---------------------------------------------------------------- on disk

LEARNED = {"per_parameter_mlp": per_parameter_mlp, "per_parameter_mlp_without_rms": functools.partial(per_parameter_mlp, rms=False),
           "hierarchical": hierarchical, "component_lstm": component_lstm}


def save(path, name, theta, **facts):
    """Writes theta, the optimizer's name (a key of LEARNED), and facts (JSON values) to an .npz file, atomically.

    The fact `sizes`, if there, holds the arguments the optimizer was made with; the rest tells what it was trained on.
    """
    about = json.dumps({"name": name, "sizes": {}, **facts})
    write_npz(path, {"about": np.array(about), **{f"theta/{k}": np.asarray(x) for k, x in theta.items()}})


def load(path, horizon=None):
    """-> (LearnedOptimizer, theta), for trainings of `horizon` steps, or else of as many as it was meta-trained for.

    ValueError, with one sentence, if the file is not one that `save` wrote.
    """
    arrays = read_npz(path)
    facts = about(path, arrays)
    theta = {k.removeprefix("theta/"): jnp.asarray(x) for k, x in arrays.items() if k.startswith("theta/")}
    try:
        learned = LEARNED[facts["name"]](**facts["sizes"] | ({"horizon": horizon} if horizon else {}))
    except (KeyError, TypeError):
        raise ValueError(f"{path} holds an optimizer this version does not know: {facts}.") from None
    wanted = jax.eval_shape(learned.init, jax.random.key(0))
    if {k: (x.shape, x.dtype) for k, x in theta.items()} != {k: (x.shape, x.dtype) for k, x in wanted.items()}:
        raise ValueError(f"{path} holds meta-parameters that do not fit a {facts['name']} of sizes {facts['sizes']}.")
    return learned, theta


def about(path, arrays=None):
    """The facts that `save` wrote beside theta: a dict with at least "name" and "sizes"."""
    try:
        return json.loads(str((arrays or read_npz(path))["about"]))
    except (KeyError, json.JSONDecodeError):
        raise ValueError(f"{path} is an .npz file, but not one written by this project.") from None


def write_npz(path, arrays):
    """All or nothing: the file at `path` is the old one or the new one, never a part of it."""
    temporary = f"{path}.partial"
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def read_npz(path):
    """-> dict of arrays. ValueError, with one sentence, if that can't be read; nothing in it is ever unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError:
        raise ValueError(f"There is no file {path}.") from None
    except (OSError, ValueError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or not an .npz file ({error}).") from None
