"""A learned optimizer is a function from meta-parameters theta to an optimizer like any other.

In order: what they are made of; the papers' two, whole; what this project adds, one thing after the
other; and, put together from these, the optimizers that are meta-trained.

P1: Metz et al. 2019, arXiv 1810.10180. P2: Metz et al. 2020, arXiv 2009.11243. Inside, all tensors'
parameters are one row, those of one shape side by side, so that one program serves them all. Arrays
are feature-major: [features, parameters], [features, tensors] or, of one shape's tensors,
[features, count, size].
"""
import functools
import json
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn, random, tree
from jax.flatten_util import ravel_pytree

import machine
from optimizers import (  # noqa: F401
    Optimizer, adam, bounded, careful, going_back, momentum, muon, nadamw, news, orthogonal,
    rmsprop, sgd, steps_of)
from tensors import by_shape, each, in_order, mean, per_tensor, row, shapes_of, sizes


class LearnedOptimizer(NamedTuple):
    """Those below are made once for the same arguments, so that what is compiled is found again."""
    init: Callable       # init(key) -> theta, a flat dict of float32 arrays
    optimizer: Callable  # optimizer(theta) -> Optimizer


# ---------------------------------------------------------------- what they are made of

DECAYS = np.float32([0.5, 0.9, 0.99, 0.999, 0.9999])[:, None]  # of the averages of g and g^2
B1, B2 = 1, 3  # Adam's two among them
HORIZON = 400  # steps of a training, where nothing else is said
TIMES = np.float32([3, 10, 30, 100, 300, 1000, 3000, 10000, 300000])  # P1's, in steps


def learned(init_state, update):
    """The LearnedOptimizer of init_state(theta, shapes) -> state and update(theta, g, w, shapes,
    state, losses) -> (change [n], state); of gradients g [n] and parameters w [n] of all tensors.

    They ask for a meta-parameter where they need it: theta(name, shape, spread, middle), at first
    normal (cut off at +-2) of that scale. So `init` finds out what there is by trying them.
    """
    def optimizer(theta):
        def look_up(name, *_):
            return theta[name]

        def step(grads, state, params, *, loss, valid_loss):
            (ws, back), (gs, _) = in_order(params), in_order(grads)
            (w, unravel), (g, _) = ravel_pytree(ws), ravel_pytree(gs)
            losses = loss, valid_loss
            change, state = update(look_up, g, w, shapes_of(ws), state, losses)
            return back(unravel(change)), state

        def start(params):
            return init_state(look_up, shapes_of(in_order(params)[0]))

        return careful(start, step)

    def init(key):
        asked, theta = {}, {}
        one, shapes, nothing = jnp.zeros(1), [(1, 1)], jnp.float32(jnp.nan)

        def note(name, shape, spread=0.0, middle=0.0):
            asked[name] = shape, np.float32(spread), np.float32(middle)
            return jnp.zeros(shape)

        def try_out():
            state = init_state(note, shapes)
            return update(note, one, one, shapes, state, (nothing, nothing))

        jax.eval_shape(try_out)
        keys = random.split(key, len(asked))
        for key, (name, (shape, spread, middle)) in zip(keys, asked.items()):
            theta[name] = jnp.full(shape, middle)
            if spread:
                theta[name] += spread * random.truncated_normal(key, -2, 2, shape, jnp.float32)
        return theta

    return LearnedOptimizer(init, optimizer)


def weights(theta, name, inputs, outputs):
    """-> ([inputs, outputs], [outputs]). In theta all weights are of size 1: so noise on theta and
    steps of theta move what a layer puts out as little in a wide layer as in a narrow one."""
    w = theta(f"{name}/w", (inputs, outputs), 1.0)
    return w / inputs ** 0.5, theta(f"{name}/b", (outputs,))


def product(w, x):
    """[inputs, outputs], [inputs, ...] -> [outputs, ...]."""
    return jnp.tensordot(w.T, x, 1)


def dense(theta, name, x, outputs):
    """[inputs, ...] -> [outputs, ...]."""
    w, b = weights(theta, name, len(x), outputs)
    return product(w, x) + jnp.expand_dims(b, range(1, x.ndim))


def lstm_cell(theta, name, x, h, c):
    """x [inputs, n], h and c [hidden, n] -> the next (h, c)."""
    gates = dense(theta, name, joined(x, h), 4 * len(h))
    i, g, f, o = jnp.split(gates, 4)
    kept, new = nn.sigmoid(f + 1), nn.sigmoid(i)
    c = kept * c + new * jnp.tanh(g)
    return nn.sigmoid(o) * jnp.tanh(c), c


def joined(*parts):
    """[F, n] each, one below the other, kept whole: XLA would multiply each on its own."""
    return lax.optimization_barrier(jnp.concatenate(parts))


class Seen(NamedTuple):
    """What an optimizer sees in one step, this gradient included; of n parameters in all."""
    g: jax.Array        # [n], gradients
    w: jax.Array        # [n], parameters
    m: jax.Array        # [5, n], running averages of g
    v: jax.Array        # [5, n], of g^2
    t: jax.Array        # steps done
    shapes: list        # of the tensors
    horizon: int        # steps of the whole training
    losses: Any = None  # [2], how both losses compare with the recent training loss (P2)
    more: Any = None    # [F, tensors], means of what `p2` is given to average
    h: Any = None       # [lstm, tensors], what each tensor's LSTM makes of it (P2)


def memory_init(shapes):
    """(m, v, t) as in `Seen`, before the first step."""
    averages = jnp.zeros((len(DECAYS), sum(sizes(shapes))))
    return averages, averages, jnp.int32(0)


def remembered(memory, g):
    """The memory with one more gradient [n]; no bias correction (P1)."""
    m, v, t = memory
    m = DECAYS * m + (1 - DECAYS) @ g[None]
    v = DECAYS * v + (1 - DECAYS) @ (g * g)[None]
    return m, v, t + 1


def clock(seen):
    """The time that features see: HORIZON steps in any training; then it stands still."""
    return jnp.minimum(seen.t, seen.horizon) * (HORIZON / seen.horizon)


def tanh_times(seen):
    """P1's features of time, [9]."""
    return jnp.tanh(clock(seen) / TIMES - 1)


def parameter_features(seen):
    """What P1's optimizer knows of each parameter, [12, n]; all are odd in g and w."""
    relative = seen.m * lax.rsqrt(seen.v + 1e-6)
    return jnp.concatenate([seen.g[None], seen.w[None], seen.m, relative])


def normalised(x, real):
    """Each feature of a tensor over its root mean square there (P1), within +-5 (P2), of
    [F, count, size].

    P2 (appendix C.4) doesn't give its bound. Parameters that never had a gradient (`real` is false:
    padding, dead units) are not part of the mean, which backprop takes as given.
    """
    real = real.astype(x.dtype)
    count = jnp.vecdot(real, real)[None] + 1e-8
    power = jnp.vecdot(lax.stop_gradient(x * x), real[None]) / count  # [F, count]
    scale = lax.rsqrt(1e-5 + power)[..., None]
    return jnp.clip(x * scale, -5, 5)


def mlp(theta, units, layers, features, shared, seen):
    """-> (last hidden layer [units, ...], normalised features [F, ...]), lists as of `by_shape`.

    `shared` [S, tensors] is what all parameters of a tensor are told: to them it is a bias.
    """
    w, b = weights(theta, "mlp0", len(features) + len(shared), units)
    own, told = jnp.split(w, [len(features)])
    biases = told.T @ shared + b[:, None]  # [units, tensors]
    real = by_shape(seen.v[B2] > 0, seen.shapes)
    features = [*map(normalised, by_shape(features, seen.shapes), real)]
    hidden = []
    for x, bias in zip(features, by_shape(biases, seen.shapes, 1)):
        h = nn.relu(product(own, x) + bias)
        for i in range(1, layers):
            h = nn.relu(dense(theta, f"mlp{i}", h, units))
        hidden.append(h)
    return hidden, features


def papers_step(theta, hidden, features, odd, seen):
    """0.001 d exp(0.001 a), with d and a linear in the last hidden layer (P1, P2): [n].

    A step is given what `mlp` finds, how many features are odd (they come first), and what is seen.
    """
    units = len(hidden[0])
    w = theta("step/w", (units, 2), units ** -0.5)
    b = theta("step/b", (2,))
    d, a = product(w, row(hidden)) + b[:, None]
    return -0.001 * d * jnp.exp(0.001 * a)


# ---------------------------------------------------------------- P1: a small MLP per parameter

def p1(units, layers, rms, horizon, step):
    """A parameter's features and the time go through an MLP, with the same weights everywhere.

    Without `rms` no feature knows of g^2.
    """
    horizon = steps_of(horizon)

    def update(theta, g, w, shapes, memory, losses):
        memory = remembered(memory, g)
        seen = Seen(g, w, *memory, shapes, horizon)
        known = seen if rms else seen._replace(v=jnp.zeros_like(seen.v))
        features, shared = parameter_features(known), each(tanh_times(seen), shapes)
        hidden, normal = mlp(theta, units, layers, features, shared, seen)
        return step(theta, hidden, normal, len(features), seen), memory

    return learned(lambda theta, shapes: memory_init(shapes), update)


@functools.cache
def component_lstm(units=20, horizon=HORIZON):
    """Andrychowicz et al. 2016, as P2 (appendix F.1) compares with; it ignores the horizon.

    Two LSTM layers read a gradient's size (over a range of e^20) and its sign apart.
    """
    def init_state(theta, shapes):
        nothing = jnp.zeros((units, sum(sizes(shapes))))
        return ((nothing, nothing),) * 2

    def update(theta, g, w, shapes, state, losses):
        small = jnp.abs(g) < np.exp(-10)
        size = jnp.where(small, -1.0, jnp.log(jnp.abs(g) + 1e-30) / 10)
        sign = jnp.where(small, np.exp(10) * g, jnp.sign(g))
        x, after = jnp.stack([size, sign]), []
        for i, (h, c) in enumerate(state):
            x, c = lstm_cell(theta, f"lstm{i}", x, h, c)
            after.append((x, c))
        return 0.1 * theta("step/w", (units,), 0.01) @ x, tuple(after)

    return learned(init_state, update)


# ---------------------------------------------------------------- P2: an LSTM per tensor, too

TRAIN_DECAY, VALID_DECAY = 0.9, 0.8  # P2 has 0.95 for the second, in episodes of 10,000 steps
FEEDBACK, CONTEXT, CONDITION = 16, 18, 17  # messages: MLP to LSTM, LSTM to LSTM, LSTM to MLP
SINES = np.float32([1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000])  # of time


def unbiased(average, decay, count):
    """A running average that began at 0, as if it had begun with the first of `count` values."""
    return average / (1 - decay ** jnp.maximum(count, 1))


def observe(average, loss, decay):
    """The running (mean, variance, count, last) of a loss, [4], with one more, if that is news (P2
    appendix C.2.2)."""
    mean, variance, count, last = average
    there = news(loss, count, last)
    told = jnp.where(there, loss, 0.0)  # where there is none, the derivative is finite, too
    deviation = jnp.sqrt(unbiased(variance, decay, count) + 1e-30)
    loss = bounded(told, unbiased(mean, decay, count), 30 * deviation)
    mean = decay * mean + (1 - decay) * loss
    variance = decay * variance + (1 - decay) * (mean - loss) ** 2
    seen = jnp.stack([mean, variance, count + 1, told])
    return jnp.where(there, seen, average)


def surprise(train, loss):
    """How many running deviations a loss lies above the running training loss, within +-5; 0 at
    first, and for one that is not finite."""
    mean, variance, count, _ = train
    mean, variance = (unbiased(x, TRAIN_DECAY, count) for x in (mean, variance))
    loss = jnp.where(jnp.isfinite(loss), loss, mean)
    score = (loss - mean) * lax.rsqrt(variance + 1e-8)
    return jnp.where(count > 0, jnp.clip(score, -5, 5), 0.0)


def tensor_means(seen, more):
    """Of m, v, w [3, tensors]; of the squares of m, v, w, g [4, tensors]; and of more rows [n]."""
    m, v, w, g = seen.m, seen.v, seen.w, seen.g
    over_decays = (sum(x) / len(DECAYS) for x in (m, v, m * m, v * v))
    m1, v1, m2, v2 = over_decays
    rows = jnp.stack([m1, v1, w, m2, v2, w * w, g * g, *more])
    return jnp.split(per_tensor(by_shape(rows, seen.shapes)), [3, 7])


def statistics(means, squares, shapes):
    """What P2's LSTM knows of each tensor, [16, tensors]."""
    norms = jnp.sqrt(sizes(shapes)[None] * squares[2:] + 1e-16)  # of w and g
    values = jnp.concatenate([means, squares[:3] - means ** 2, norms])
    logs = jnp.clip(jnp.log(1e-8 + jnp.abs(values)), -5, 5)
    scalar = np.float32([[-1.0 if shape else 1.0 for shape in shapes]])
    sides = np.float32([(*shape, 1, 1, 1, 1)[:4] for shape in shapes])
    log_sides = np.log(np.maximum(sides.T, 1)) - 1
    return jnp.concatenate([logs, jnp.sign(means), scalar, log_sides])


def tensor_facts(squares, seen):
    """What P2's MLP knows of each tensor: how many there are, its norm and size, and the time."""
    count = sizes(seen.shapes)
    log_norm = 0.5 * jnp.log(count * squares[2] + 1e-8)
    tensors = np.full(len(count), np.log(len(count)) - 1, np.float32)
    log_count = np.float32(np.log(np.maximum(count, 1)))
    sines = jnp.sin(clock(seen) / (np.pi * SINES))
    facts = jnp.stack([tensors, log_norm, log_count])
    return jnp.concatenate([facts, each(sines, seen.shapes)])


def clipped(theta, g, state):
    """g within a multiple of its running size; and the rate at which that forgets (P2 C.2.3)."""
    multiple = jnp.exp(theta("clip/log_multiple", (), 0.0, np.log(10)))
    rate = jnp.exp(theta("clip/log_rate", (), 0.0, np.log(0.01)))
    _, _, t = state.memory
    limit = multiple * state.size / (1 - (1 - rate) ** (t + 1))
    return jnp.clip(jnp.nan_to_num(g), -limit, limit), rate


def loss_features(state, losses):
    """-> (running averages of both losses, how both compare with the training loss's, [2]).

    Overfitting shows in the second.
    """
    loss, valid_loss = losses
    train = observe(state.train, loss, TRAIN_DECAY)
    valid = observe(state.valid, valid_loss, VALID_DECAY)
    mean, _, count, _ = valid
    of_valid = surprise(train, unbiased(mean, VALID_DECAY, count))
    of_valid = jnp.where(count > 0, of_valid, 0.0)
    return train, valid, jnp.stack([surprise(train, loss), of_valid])


class HierarchicalState(NamedTuple):
    memory: tuple        # m, v, t
    h: jax.Array         # [lstm, tensors]
    c: jax.Array         # [lstm, tensors]
    feedback: jax.Array  # [16, tensors], each tensor's MLP to its LSTM
    context: jax.Array   # [18], all LSTMs to each
    train: jax.Array     # [4], of the training loss, see `observe`
    valid: jax.Array     # [4], of the validation loss
    size: jax.Array      # running root of the mean over tensors of their mean g^2


def p2(lstm, units, horizon, step, rows=(), cues=(), views=()):
    """P2 section 3.3 and appendix C: first the LSTM of each tensor, then the MLP of each parameter.

    What may be added are functions of what is seen: `rows` -> a list of [n], whose means over each
    tensor are seen, too; `cues` -> [F, tensors], which the LSTMs read; `views` -> [F, n], odd
    features that the MLP reads. All initial states are learned.
    """
    horizon = steps_of(horizon)

    def init_state(theta, shapes):
        feedback = each(theta("initial/feedback", (FEEDBACK,), 0.1), shapes)
        context = theta("initial/context", (CONTEXT,), 0.1)
        h = each(theta("initial/h", (lstm,)), shapes)
        c = each(theta("initial/c", (lstm,)), shapes)
        size = jnp.exp(theta("clip/log_rate", (), 0.0, np.log(0.01)))
        memory, none = memory_init(shapes), jnp.zeros(4)
        return HierarchicalState(memory, h, c, feedback, context, none, none, size)

    def update(theta, g, w, shapes, state, losses):
        g, rate = clipped(theta, g, state)
        memory = remembered(state.memory, g)
        train, valid, losses = loss_features(state, losses)
        seen = Seen(g, w, *memory, shapes, horizon, losses)
        averaged = [row for f in rows for row in f(seen)]
        means, squares, more = tensor_means(seen, averaged)
        seen = seen._replace(more=more)
        size = jnp.sqrt(1e-8 + jnp.mean(squares[3]))  # of g
        size = (1 - rate) * state.size + rate * size

        known = [statistics(means, squares, shapes)]
        known += [cue(seen) for cue in cues]
        known += [each(losses, shapes), each(state.context, shapes), state.feedback]
        h, c = lstm_cell(theta, "lstm", jnp.concatenate(known), state.h, state.c)
        rests = seen.t > horizon
        h, c = jnp.where(rests, state.h, h), jnp.where(rests, state.c, c)
        seen = seen._replace(h=h)

        odd = [parameter_features(seen), *(view(seen) for view in views)]
        odd = jnp.concatenate(odd)
        log_w = jnp.log(jnp.abs(w)[None] + 1e-8)
        even = log_w, seen.v, lax.rsqrt(seen.v + 1e-6)
        shared = joined(dense(theta, "condition", h, CONDITION), tensor_facts(squares, seen))
        features = jnp.concatenate([odd, *even])
        hidden, features = mlp(theta, units, 2, features, shared, seen)
        change = step(theta, hidden, features, len(odd), seen)

        feedback = dense(theta, "feedback", per_tensor(hidden), FEEDBACK)
        context = mean(dense(theta, "context", h, CONTEXT))
        return change, HierarchicalState(memory, h, c, feedback, context, train, valid, size)

    return learned(init_state, update)


# ---------------------------------------------------------------- what this project adds

def directions(seen):
    """Adam's direction for each of the five momenta, [5, n]."""
    m_hat = seen.m / (1 - DECAYS ** seen.t)
    v_hat = seen.v[B2] / (1 - DECAYS[B2, 0] ** seen.t)
    return m_hat / (jnp.sqrt(v_hat + 1e-30) + 1e-8)[None]  # 1e-30: differentiable without g


def anchored_step(paced, steers=()):
    """The step pace lr exp(min(a, 1)) (adam + d), which scales and bends Adam's; at first
    a = d = 0.

    d and a are linear in the last hidden layer and the features, so that a weight decay or another
    momentum is learned in a few steps. What the layer adds to d has mean zero, and what d reads
    directly is odd: to push a whole tensor one way kills ReLU units, which costs much later and is
    seen in no derivative. Hence the limit of 1, too. `paced`: with `paces`. `steers`, like `cues`
    in `p2`, steer each tensor's step: they add to a and, within +-1, to the weights of what d
    reads.
    """
    def change(theta, hidden, features, odd, seen):
        w = theta("step/w", (len(hidden[0]), 2))
        of_d = theta("direct/d", (odd,))
        of_a = theta("direct/a", (len(features[0]),))
        log_lr = theta("log_lr", (), 0.0, np.log(0.01))
        pace = paces(theta, seen) if paced else jnp.ones(len(seen.shapes))
        steer = jnp.zeros((1 + odd, len(seen.shapes)))
        if steers:
            read = joined(*(f(seen) for f in steers))
            steer = theta("steer", (len(read), 1 + odd)).T @ read

        def one(h, x, adam, steer, pace):
            d, a = product(w, h)
            direct = of_d[:, None] + jnp.tanh(steer[1:, :, 0])
            bend = jnp.einsum("fc,fcn->cn", direct, x[:odd])
            push = adam + d - mean(d)[:, None] + bend
            scale = jnp.tensordot(of_a, x, 1)
            size = jnp.exp(log_lr + jnp.minimum(a + scale + steer[0], 1.0))
            return -pace * size * push

        adam = by_shape(directions(seen)[B1], seen.shapes)
        steer, pace = (by_shape(x, seen.shapes, 1) for x in (steer, pace))
        return row([*map(one, hidden, features, adam, steer, pace)])

    return change


def paces(theta, seen):
    """What anchored steps of each tensor are multiplied by, [tensors].

    Weights (two dimensions or more) of more than 32 inputs step shorter in proportion (muP, Yang et
    al. 2021). Biases, beside weights, have a pace of their own, kept from backprop: a few long ones
    push ReLUs below zero for good, a jump that it can't see. A training of more than HORIZON steps
    takes shorter ones, like horizon^(-3/4); after the horizon they fall like 1 / t^2.
    """
    weights = np.array([len(shape) > 1 for shape in seen.shapes])
    inputs = sizes([shape[:-1] for shape in seen.shapes])
    log_bias = lax.stop_gradient(theta("log_bias", ()))
    bias = jnp.exp(log_bias) if weights.any() else 1.0
    longer = min(HORIZON / seen.horizon, 1) ** 0.75
    over = jnp.maximum(seen.t / seen.horizon, 1) ** 2
    narrow = np.float32(np.minimum(1, 32 / np.maximum(inputs, 1)))
    return jnp.where(weights, narrow, bias) * longer / over


def agreement(seen):
    """The squares of `directions`; which parameters had a gradient once; and which rest now."""
    real = seen.v[B2] > 0
    return [*directions(seen) ** 2, real, real & (seen.g == 0)]


def signal_to_noise(seen, unit=1.0):
    """How well a tensor's gradients agree over the span of each average, [6, tensors]: in units of
    decibels above pure noise; and, last, five times the share of parameters at rest."""
    powers, real, rest = jnp.split(seen.more, [len(DECAYS), len(DECAYS) + 1])
    decays = DECAYS ** seen.t
    noise = (1 - DECAYS) / (1 + DECAYS)  # of averaged white noise, in the long run
    noise = noise * (1 + decays) / (1 - decays)
    signal = 10 * jnp.log10(powers / (real + 1e-8) / noise + 0.1)
    return jnp.concatenate([signal / unit, 5 * rest / (real + 1e-8)])


def bearings(seen):
    """The LSTM, the time (P1's, of 10 to 3000 steps) and the losses, [F, tensors]."""
    shared = jnp.concatenate([tanh_times(seen)[1:7], seen.losses])
    return jnp.concatenate([seen.h, each(shared, seen.shapes)])


def orthogonal_momentum(seen):
    """A matrix's momentum, made `orthogonal`: close to Nesterov's of decay 0.8; [1, n]."""
    momenta = by_shape(seen.m[0] + seen.m[B1], seen.shapes)
    kinds = dict.fromkeys(seen.shapes)
    rounds = [jax.vmap(functools.partial(orthogonal, shape=shape)) for shape in kinds]
    return row([f(x) for f, x in zip(rounds, momenta)])[None]


# ---------------------------------------------------------------- those that are meta-trained

@functools.cache
def per_parameter_mlp(units=32, layers=1, rms=True, horizon=HORIZON, *, anchored=True, paced=True):
    """P1's optimizer (its released code; `layers=2` is as deep as the later LOLv2), with our step.

    Not `anchored` it is P1's own; there, no feature knows of g^2 (`rms=False`). `horizon`: the
    steps that a training takes.
    """
    return p1(units, layers, rms, horizon, anchored_step(paced) if anchored else papers_step)


@functools.cache
def hierarchical(lstm=32, units=16, horizon=HORIZON, *, anchored=True, paced=True, steered=True,
                 signal=True, matrix=True, returning=True):
    """P2's optimizer with all that this project adds, each of which an argument leaves out.

    `anchored`, `paced`, `steered`: the form of the step. `signal`: gradients' agreement is seen;
    `matrix`: the orthogonal momentum is. `returning`: `going_back`. Without any it is P2's own (of
    lstm=64, units=32), less its copy of the weights of 100 steps ago. `horizon`: the steps that a
    training takes; after them the LSTM rests.
    """
    steers = (bearings, signal_to_noise)[:1 + signal] if steered else ()
    step = anchored_step(paced, steers) if anchored else papers_step
    more = dict(rows=[agreement], cues=[functools.partial(signal_to_noise, unit=10.0)])
    views = [orthogonal_momentum] if matrix else []
    found = p2(lstm, units, horizon, step, views=views, **(more if signal else {}))
    if not returning:
        return found
    return LearnedOptimizer(found.init, lambda theta: going_back(found.optimizer(theta)))


ADDITIONS = ("anchored", "paced", "steered", "signal", "matrix", "returning")
LEARNED = {"per_parameter_mlp": per_parameter_mlp, "hierarchical": hierarchical,
           "component_lstm": component_lstm,
           "per_parameter_mlp_without_rms": functools.partial(per_parameter_mlp, rms=False)}


# ---------------------------------------------------------------- on disk

def save(path, name, theta, **facts):
    """Writes theta, the name (a key of LEARNED) and facts (JSON values) to an .npz file. The fact
    `sizes` holds the arguments the optimizer was made with; the rest, what it learned from."""
    about = json.dumps({"name": name, "sizes": {}, **facts})
    arrays = {f"theta/{k}": np.asarray(x) for k, x in theta.items()}
    machine.write_npz(path, {"about": np.array(about), **arrays})


def load(path, horizon=None):
    """-> (LearnedOptimizer, theta), for trainings of `horizon` steps (or as many as it knows).
    ValueError, with one sentence, if the file is not one that `save` wrote."""
    facts, arrays = about(path), machine.read_npz(path)
    theta = {name[6:]: x for name, x in arrays.items() if name.startswith("theta/")}
    name, arguments = facts["name"], facts["sizes"]
    if horizon is not None:
        arguments = arguments | {"horizon": steps_of(horizon)}
    try:
        found = LEARNED[name](**arguments)
        wanted = jax.eval_shape(found.init, random.key(0))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} holds an optimizer this version doesn't know: {facts}.") from None
    alike = theta.keys() == wanted.keys() and all(
        (x.shape, x.dtype) == (wanted[k].shape, wanted[k].dtype) and np.isfinite(x).all()
        for k, x in theta.items())
    if not alike:
        raise ValueError(f"{path} holds meta-parameters that do not fit a {name} of {arguments}.")
    return found, tree.map(jnp.asarray, theta)


def about(path):
    """The facts that `save` wrote beside theta: a dict with at least "name" and "sizes"."""
    try:
        facts = json.loads(str(machine.read_npz(path)["about"]))
        return {"name": facts["name"], "sizes": {**facts["sizes"]}} | facts
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path} is an .npz file, but not written by this project.") from None
