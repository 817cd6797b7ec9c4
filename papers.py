"""The papers' two learned optimizers, and one they compare with: functions from meta-parameters
theta to an optimizer like any other.

P1: Metz et al. 2019, arXiv 1810.10180. P2: Metz et al. 2020, arXiv 2009.11243. Inside, all tensors'
parameters are one row, those of one shape side by side, so that one program serves them all. Arrays
are feature-major: [features, parameters], [features, tensors] or, of one shape's tensors,
[features, count, size].
"""
import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn, random

from optimizers import bounded, careful, news
from tensors import by_shape, each, in_order, mean, per_tensor, row, sizes, spread


class LearnedOptimizer(NamedTuple):
    """What makes one is cached: jit finds its programs by the identity of these functions."""
    init: Callable       # init(key) -> theta, a flat dict of float32 arrays
    optimizer: Callable  # optimizer(theta) -> Optimizer


# ---------------------------------------------------------------- what they are made of

DECAYS = np.float32([0.5, 0.9, 0.99, 0.999, 0.9999])[:, None]  # of the averages of g and g^2
TIMES = np.float32([3, 10, 30, 100, 300, 1000, 3000, 10000, 300000])  # P1's, in steps


def learned(init_state, update):
    """The LearnedOptimizer of init_state(theta, shapes) -> state and update(theta, g, w, shapes,
    state, losses) -> (change [n], state); of gradients g [n] and parameters w [n] of all tensors.

    To them theta is a function: theta(name, shape, spread, middle) is a meta-parameter, at first
    middle + spread times a normal cut off at +-2. `init` runs them once to see what they ask for.
    """
    def optimizer(theta):
        def look_up(name, *_):
            return theta[name]

        def step(grads, state, params, *, loss, valid_loss):
            (w, shapes, back), (g, *_) = in_order(params), in_order(grads)
            change, state = update(look_up, g, w, shapes, state, (loss, valid_loss))
            return back(change), state

        def start(params):
            return init_state(look_up, in_order(params)[1])

        return careful(start, step)

    def init(key):
        asked, theta = {}, {}
        one, shapes = jnp.zeros(1), [(1, 1)]
        nothing = jnp.float32(jnp.nan)

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
    """-> ([inputs, outputs], [outputs])."""
    w = theta(f"{name}/w", (inputs, outputs), inputs ** -0.5)
    return w, theta(f"{name}/b", (outputs,))


@jax.custom_vjp
def matmul(w, x):
    """[inputs, outputs], [inputs, n] -> [outputs, n]. XLA has a fast program for each product here,
    forward and backward, and would pick others by itself. No forward-mode derivatives."""
    return lax.optimization_barrier(w.T) @ x


matmul.defvjp(
    lambda w, x: (matmul(w, x), (w, x)),
    lambda kept, g: (kept[1] @ g.T, kept[0] @ g))


def product(w, x):
    """[inputs, outputs], [inputs, ...] -> [outputs, ...]."""
    found = matmul(w, lax.collapse(x, 1))
    return found.reshape(w.shape[1], *x.shape[1:])


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
    time: jax.Array     # form.time(t), for features of it
    shapes: list        # of the tensors
    losses: Any = None  # [2 or more], how both losses compare with the recent training loss (P2)
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


def tanh_times(seen):
    """P1's features of time, [9]."""
    return jnp.tanh(seen.time / TIMES - 1)


def parameter_features(seen):
    """What P1's optimizer knows of each parameter, [12, n]; all are odd in g and w."""
    relative = seen.m * lax.rsqrt(seen.v + 1e-6)
    return jnp.concatenate([seen.g[None], seen.w[None], seen.m, relative])


def mlp(theta, units, layers, features, shared, shapes, bound):
    """-> (last hidden layer [units, ...], features [F, ...]), lists as of `by_shape`. Each feature
    comes over its root mean square in its tensor (P1).

    `shared` [S, tensors] is what all parameters of a tensor are told: to them it is a bias.
    """
    w, b = weights(theta, "mlp0", len(features) + len(shared), units)
    own, told = jnp.split(w, [len(features)])
    biases = told.T @ shared + b[:, None]  # [units, tensors]
    hidden, normal = [], []
    for x, bias in zip(by_shape(features, shapes), by_shape(biases, shapes, 1)):
        scale = lax.rsqrt(1e-5 + mean(x * x))
        x = jnp.clip(x * spread(scale, x.shape[-1]), -bound, bound)
        normal.append(x)
        h = nn.relu(product(own, x) + bias)
        for i in range(1, layers):
            h = nn.relu(dense(theta, f"mlp{i}", h, units))
        hidden.append(h)
    return hidden, normal


def papers_step(theta, hidden, features, odd, seen):
    """-0.001 d exp(0.001 a), with d and a linear in the last hidden layer (P1, P2): [n].

    A step is given what `mlp` finds, how many features are odd (they come first), and what is seen.
    """
    d, a = dense(theta, "step", row(hidden), 2)
    return -0.001 * d * jnp.exp(0.001 * a)


class Form(NamedTuple):
    """What in the papers' optimizers can be exchanged; as it stands, it is the papers'."""
    step: Callable = papers_step
    bound: float = np.inf           # of normalised features
    time: Callable = lambda t: t - 1  # of step t, the first being 1, for features of time
    valid_decay: float = 0.95       # of the running validation loss (P2)
    gap: Callable = lambda train, valid: ()  # of both running losses: what else is told of them
    least: float = 0.0              # the smallest deviation of losses (P2), over the first
    # Functions of what is seen that P2's tensors and parameters are told of besides:
    lstm_inputs: tuple = ()  # -> [F, tensors]
    mlp_inputs: tuple = ()   # -> [F, n], all odd in g and w


# ---------------------------------------------------------------- P1: a small MLP per parameter

@functools.cache
def p1(units=32, layers=1, rms=False, form=Form()):
    """A parameter's features and the time go through an MLP, with the same weights everywhere
    (P1's released code; the later LOLv2 has two layers).

    Without `rms`, as in P1, no feature knows of g^2.
    """
    def update(theta, g, w, shapes, memory, losses):
        memory = remembered(memory, g)
        seen = Seen(g, w, *memory, form.time(memory[2]), shapes)
        known = seen if rms else seen._replace(v=jnp.zeros_like(seen.v))
        features, shared = parameter_features(known), each(tanh_times(seen), shapes)
        hidden, normal = mlp(theta, units, layers, features, shared, shapes, form.bound)
        return form.step(theta, hidden, normal, len(features), seen), memory

    return learned(lambda theta, shapes: memory_init(shapes), update)


@functools.cache
def component_lstm(units=20):
    """Andrychowicz et al. 2016; P2 (appendix F.1) compares with a GRU of that kind, twice 20 units.

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

TRAIN_DECAY = 0.9  # of the running training loss
FEEDBACK, CONTEXT, CONDITION = 16, 18, 17  # messages: MLP to LSTM, LSTM to LSTM, LSTM to MLP
SINES = np.float32([1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000])  # of time


def unbiased(average, decay, count):
    """A running average that began at 0, as if it had begun with the first of `count` values."""
    return average / (1 - decay ** jnp.maximum(count, 1))


def observe(average, loss, decay):
    """The running (mean, variance, count, last, first) of a loss, [5], with one more (P2 appendix
    C.2.2). Ours: only if that is news, and within 30 deviations."""
    mean, variance, count, last, first = average
    there = news(loss, count, last)
    told = jnp.where(there, loss, 0.0)  # where there is none, the derivative is finite, too
    deviation = jnp.sqrt(unbiased(variance, decay, count) + 1e-30)
    loss = bounded(told, unbiased(mean, decay, count), 30 * deviation)
    mean = decay * mean + (1 - decay) * loss
    variance = decay * variance + (1 - decay) * (mean - loss) ** 2
    first = jnp.where(count > 0, first, told)
    after = jnp.stack([mean, variance, count + 1, told, first])
    return jnp.where(there, after, average)


def surprise(train, loss, least):
    """How many running deviations, each at least that share of the first loss, a loss lies above
    the running training loss, within +-5; 0 at first, and for one that is not finite."""
    mean, variance, count, _, first = train
    mean, variance = (unbiased(x, TRAIN_DECAY, count) for x in (mean, variance))
    loss = jnp.where(jnp.isfinite(loss), loss, mean)
    score = (loss - mean) * lax.rsqrt(variance + (least * first) ** 2 + 1e-8)
    return jnp.where(count > 0, jnp.clip(score, -5, 5), 0.0)


def tensor_means(seen):
    """Of m, v, w [3, tensors], and of the squares of m, v, w, g [4, tensors]."""
    m, v, w, g = seen.m, seen.v, seen.w, seen.g
    m1, v1, m2, v2 = (mean(x.T) for x in (m, v, m * m, v * v))  # over the decays
    rows = jnp.stack([m1, v1, w, m2, v2, w * w, g * g])
    return jnp.split(per_tensor(by_shape(rows, seen.shapes)), [3])


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
    """What P2's MLP knows of each tensor: how many there are, its norm (at least 1e-4, here) and
    size, and the time."""
    count = sizes(seen.shapes)
    log_norm = 0.5 * jnp.log(count * squares[2] + 1e-8)
    tensors = np.full(len(count), np.log(len(count)) - 1, np.float32)
    log_count = np.float32(np.log(np.maximum(count, 1)))
    sines = jnp.sin(seen.time / (np.pi * SINES))
    facts = jnp.stack([tensors, log_norm, log_count])
    return jnp.concatenate([facts, each(sines, seen.shapes)])


def clip_rate(theta):
    """At which the running size of g forgets (P2 C.2.3)."""
    return jnp.exp(theta("clip/log_rate", (), 0.0, np.log(0.01)))


def clipped(theta, g, state):
    """g within a multiple of its running size; and the rate at which that forgets (P2 C.2.3)."""
    multiple = jnp.exp(theta("clip/log_multiple", (), 0.0, np.log(10)))
    rate = clip_rate(theta)
    _, _, t = state.memory
    limit = multiple * state.size / (1 - (1 - rate) ** (t + 1))
    return jnp.clip(jnp.nan_to_num(g), -limit, limit), rate


def loss_features(state, losses, form):
    """-> (running averages of both losses, how both compare with the training loss's, [2 or more]).

    Overfitting shows in the second.
    """
    loss, valid_loss = losses
    train = observe(state.train, loss, TRAIN_DECAY)
    valid = observe(state.valid, valid_loss, form.valid_decay)
    low = unbiased(train[0], TRAIN_DECAY, train[2])
    high = unbiased(valid[0], form.valid_decay, valid[2])
    of_train = surprise(train, loss, form.least)
    of_valid = jnp.stack([surprise(train, high, form.least), *form.gap(low, high)])
    both = (train[2] > 0) & (valid[2] > 0)
    of_valid = jnp.where(both, of_valid, 0.0)
    return train, valid, jnp.concatenate([of_train[None], of_valid])


class HierarchicalState(NamedTuple):
    memory: tuple        # m, v, t
    h: jax.Array         # [lstm, tensors]
    c: jax.Array         # [lstm, tensors]
    feedback: jax.Array  # [16, tensors], each tensor's MLP to its LSTM
    context: jax.Array   # [18], all LSTMs to each
    train: jax.Array     # [5], of the training loss, see `observe`
    valid: jax.Array     # [5], of the validation loss
    size: jax.Array      # running mean of the root of (the mean over tensors of their mean g^2)


@functools.cache
def p2(lstm=64, units=32, form=Form(bound=5.0)):
    """P2 section 3.3 and appendix C: first the LSTM of each tensor, then the MLP of each parameter.

    What LSTMs and messages begin with is learned. P2 bounds normalised features (appendix C.4; its
    text doesn't say at what) and has one feature more, the weights of 100 steps ago. Once the time
    stands still the LSTM rests.
    """
    def init_state(theta, shapes):
        feedback = each(theta("initial/feedback", (FEEDBACK,), 0.1), shapes)
        context = theta("initial/context", (CONTEXT,), 0.1)
        h = each(theta("initial/h", (lstm,)), shapes)
        c = each(theta("initial/c", (lstm,)), shapes)
        size = clip_rate(theta)  # as if it had been 1
        memory, none = memory_init(shapes), jnp.zeros(5)
        return HierarchicalState(memory, h, c, feedback, context, none, none, size)

    def update(theta, g, w, shapes, state, losses):
        g, rate = clipped(theta, g, state)
        memory = remembered(state.memory, g)
        train, valid, compared = loss_features(state, losses, form)
        t = memory[2]
        seen = Seen(g, w, *memory, form.time(t), shapes, compared)
        means, squares = tensor_means(seen)
        size = jnp.sqrt(1e-8 + jnp.mean(squares[3]))  # of g
        size = (1 - rate) * state.size + rate * size

        known = (
            statistics(means, squares, shapes),
            *(f(seen) for f in form.lstm_inputs),
            each(compared, shapes),
            each(state.context, shapes),
            state.feedback)
        h, c = lstm_cell(theta, "lstm", jnp.concatenate(known), state.h, state.c)
        rests = form.time(t - 1) == seen.time
        h = jnp.where(rests, state.h, h)
        c = jnp.where(rests, state.c, c)
        seen = seen._replace(h=h)

        odd = jnp.concatenate([parameter_features(seen), *(f(seen) for f in form.mlp_inputs)])
        log_w = jnp.log(jnp.abs(w)[None] + 1e-8)
        features = jnp.concatenate([odd, log_w, seen.v, lax.rsqrt(seen.v + 1e-6)])
        shared = joined(dense(theta, "condition", h, CONDITION), tensor_facts(squares, seen))
        hidden, features = mlp(theta, units, 2, features, shared, shapes, form.bound)
        change = form.step(theta, hidden, features, len(odd), seen)

        feedback = dense(theta, "feedback", per_tensor(hidden), FEEDBACK)
        context = mean(dense(theta, "context", h, CONTEXT))
        return change, HierarchicalState(memory, h, c, feedback, context, train, valid, size)

    return learned(init_state, update)
