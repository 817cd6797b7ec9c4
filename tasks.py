"""A task family is four functions: sample a task, initialise it, draw a batch, compute its loss.

A task is a pytree of arrays (widths, noise levels, ... are data, never shapes), so thousands of
different tasks share one compiled step. What is smaller than the family's largest is padded, and
masked: the padding changes no loss and no gradient.
"""
import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn, random, tree

import data
import tables
from parts import (
    ACTIVATION, CORES, GATES, SCALE, chance, choice, cross_entropy, deep_net, dense, draw, first,
    hidden, log_uniform, masked, net_ranges, often_zero, padded, patches, size, through, uniform)

VALID_EVERY = 10  # inner steps from one inner_valid batch to the next (P2 appendix C.1)


class TaskFamily(NamedTuple):
    """What makes one is cached: jit finds its programs by the identity of these functions."""
    name: str
    sample: Callable  # sample(key) -> task, a pytree of arrays
    init: Callable    # init(task, key) -> params, a pytree of float32 arrays
    batch: Callable   # batch(task, key, split) -> batch; split, one of data.SPLITS, is static
    loss: Callable    # loss(task, params, batch) -> scalar
    measure: Callable = lambda task, params: jnp.zeros(0)  # on a whole test set, if there is one
    # shared() -> arrays too large to be written into programs; `evaluate.runs` hands them to those,
    # and calls sample(key, *shared()):
    shared: Callable = lambda: ()


class Inner(NamedTuple):
    """A task in training."""
    params: Any
    opt_state: Any
    step: jax.Array  # inner steps done


def init_inner(family, optimizer, task, key):
    """Fresh parameters of the task, and a fresh state of the optimizer."""
    params = family.init(task, key)
    return Inner(params, optimizer.init(params), jnp.int32(0))


def inner_step(family, optimizer, task, inner, key):
    """One training step.

    The optimizer is also told the loss of this batch and, at every tenth step, that of an
    inner_valid batch (P2 section 3.3; NaN at the others). Those designed by hand ignore both.
    """
    train_key, valid_key = random.split(key)
    params = inner.params
    batch = family.batch(task, train_key, "train")
    loss, grads = jax.value_and_grad(family.loss, argnums=1)(task, params, batch)

    def validate():
        batch = family.batch(task, valid_key, "inner_valid")
        return family.loss(task, params, batch)

    valid_loss = lax.cond(inner.step % VALID_EVERY == 0, validate, lambda: jnp.nan)
    updates, opt_state = optimizer.update(
        grads, inner.opt_state, params, loss=loss, valid_loss=valid_loss)
    params = tree.map(jnp.add, params, updates)
    return Inner(params, opt_state, inner.step + 1)


FEW = {"train": 1.0, "inner_valid": 0.1}  # splits that can be small; their sizes, relative
FRACTION = log_uniform(0.005, 1.0)


@functools.cache
def few_examples(family, share):
    """The family, but in such a share of its tasks only a fraction of the examples is there to
    train on, and to validate with. Those of letters and texts heed it: OF_EXAMPLES."""
    def sample(key):
        u = random.uniform(random.fold_in(key, 2 ** 31), (3,))  # no other number of the task's
        fraction = jnp.where(u[0] < share, FRACTION(u[1]), 1.0)
        task = family.sample(key)
        return task | {"fraction": fraction, "offset": u[2]} if isinstance(task, dict) else task

    return family._replace(sample=sample) if share else family


# ---------------------------------------------------------------- letters

NOISE = often_zero(uniform(0.0, 0.3))
LETTERS = dict(
    input_scale=SCALE,
    input_noise=NOISE,  # standard deviation, fresh in every batch; ink is 1, paper 0
    label_noise=NOISE)  # share of training examples that are filed under a wrong class for good
STRIDE = 5  # neighbours are alike; no divisor in common with 24 or 504, examples of a letter
CLASSES = 10  # letters of a task


def letter_tasks(pool, max_batch, ranges):
    """-> (sample, batch) for classification of ten letters of that pool.

    A task draws these ranges; batch_size and LETTERS must be among them. A batch is images [B, 64],
    labels [B] and a mask [B] of the task's batch size (of all, in other splits than training).
    """
    images = tree.map(jnp.asarray, data.small_letters(pool))
    letters, examples, _ = images["train"].shape
    rng = np.random.default_rng(0)
    noise = jnp.float32(rng.standard_normal((4096, 64)))  # indexing is cheaper than drawing
    luck = jnp.float32(rng.uniform(size=(CLASSES, examples)))
    wrong = jnp.asarray(rng.integers(1, CLASSES, luck.shape))

    def sample(key):
        class_key, key = random.split(key)
        u = random.uniform(class_key, (letters,))
        _, classes = lax.top_k(u, CLASSES)
        return draw(key, ranges) | {"classes": classes}

    def pick(task, split, u):
        """An example of a class, u uniform in [0, 1): of those that the task has to learn from."""
        n = images[split].shape[1]
        if "fraction" not in task or split not in FEW:
            return (u * n).astype(int)
        count = jnp.clip(FEW[split] * task["fraction"] * examples, 1, n)
        start = (task["offset"] * n).astype(int)
        return (start + STRIDE * (u * count).astype(int)) % n

    def batch(task, key, split):
        u = random.uniform(key, (3, max_batch))
        y = (u[0] * CLASSES).astype(int)
        example = pick(task, split, u[1])
        x = images[split][task["classes"][y], example]
        grain = noise[(u[2] * len(noise)).astype(int)]
        x = (x + task["input_noise"] * grain) * task["input_scale"]
        if split == "train":
            mislabelled = luck[y, example] < task["label_noise"]
            y = jnp.where(mislabelled, (y + wrong[y, example]) % CLASSES, y)
        return x, y, task["batch_size"] | (split != "train")

    return sample, batch


# ---------------------------------------------------------------- the families

@functools.cache
def mlp(pool="meta_train", max_depth=2, max_width=32, max_batch=64):
    """Fully connected nets on 8x8 letters (P2's and TaskSet's mlp, with P1's disjoint classes).

    Batch: see `letter_tasks`. Loss: mean cross-entropy, in nats.
    """
    ranges = net_ranges(max_depth, max_width, max_batch)
    sample, batch = letter_tasks(pool, max_batch, ranges | LETTERS)

    def init(task, key):
        return deep_net(task, key, 64, CLASSES, max_depth)

    def loss(task, params, batch):
        x, y, real = batch
        return cross_entropy(through(task, params, x, max_depth), y, real)

    return TaskFamily("mlp", sample, init, batch, loss)


@functools.cache
def wide(pool="meta_train"):
    """`mlp` with layers of up to 64 units."""
    return mlp(pool, max_width=64)._replace(name="wide")


@functools.cache
def table(pool="meta_train"):
    """Fully connected nets on made-up tables of 32 to 2,700 rows, 4 to 256 columns.

    Batch: see `table_tasks`. Loss: mean cross-entropy, in nats; where a target is to be told, half
    the squared error.
    """
    sample, batch = tables.table_tasks(pool)

    def outputs(task):
        return first(jnp.where(task["regression"], 1, task["classes"]), tables.CLASSES)

    def init(task, key):
        return deep_net(task, key, task["inputs"], outputs(task), 2)

    def loss(task, params, batch):
        x, y, target, real = batch
        out = through(task, params, x, 2)
        error = 0.5 * jnp.mean((out[:, 0] - target) ** 2, where=real)
        logits = jnp.where(outputs(task)[None], out, -1e9)
        return jnp.where(task["regression"], error, cross_entropy(logits, y, real))

    return TaskFamily("table", sample, init, batch, loss)


@functools.cache
def conv(pool="meta_train", max_batch=32):
    """One or two 3x3 convolutions and a linear head, on 8x8 letters; batch and loss as in `mlp`.

    TaskSet's conv_fc and conv_pooling, without their padding per layer and missing biases.
    """
    channels = size(2, 8)
    sample, batch = letter_tasks(pool, max_batch, dict(
        batch_size=size(max_batch / 8, max_batch),
        **LETTERS,
        depth=choice(2, lowest=1),
        channels0=channels,
        channels1=channels,
        strides=choice(3),  # 0: 2, 1; 1: 1, 2; 2: 2, 2
        head=choice(3),     # 0: sees all positions; 1: their mean; 2: their maximum
        activation=ACTIVATION,
        init_scale=SCALE))

    def init(task, key):
        one, two, _, read = conv_masks(task)
        return padded(key, task["init_scale"], {
            "w0": (9, one),
            "w1": (jnp.tile(one, 9), two),
            "out": (read.ravel(), CLASSES)})

    return TaskFamily("conv", sample, init, batch, conv_loss)


def conv_masks(task):
    """Of both convolutions' channels, the 4x4 positions, what the head reads [16, channels]."""
    one, two = task["channels0"], task["channels1"]
    deep = task["depth"] == 2
    even = jnp.arange(4) % 2 == 0  # with strides 2, 2 every other position in each direction
    positions = ~deep | (task["strides"] < 2) | jnp.outer(even, even).ravel()
    read = jnp.where(task["head"] == 0, positions, first(1, 16))
    read = jnp.outer(read, jnp.where(deep, two, one))
    return one, two & deep, positions, read


def conv_loss(task, params, batch):
    x, y, real = batch
    one, two, positions, read = conv_masks(task)

    def layer(stride, other):
        image = x.reshape(-1, 8, 8, 1)
        h = hidden(task, params, "w0", patches(image, stride), one)
        return h[:, ::other, ::other], patches(h, other)

    h, around = lax.cond(
        task["strides"] == 1,
        lambda: layer(1, 2),
        lambda: layer(2, 1))
    deeper = hidden(task, params, "w1", around, two)
    h = jnp.where(task["depth"] == 2, deeper, h).reshape(len(x), 16, -1)
    there, head = positions[None, :, None], task["head"]
    mean = jnp.mean(h, 1, where=there, keepdims=True)
    most = jnp.max(h, 1, where=there, keepdims=True, initial=-jnp.inf)
    h = jnp.where(head == 0, h, jnp.where(head == 1, mean, most))  # [B, 16, channels]
    h = masked(read, h).reshape(len(x), -1)
    return cross_entropy(dense(params, "out", h), y, real)


@functools.cache
def autoencoder(pool="meta_train", max_code=12, max_batch=64):
    """8x8 letters through a bottleneck, one hidden layer on each side (TaskSet's mlp_ae, mlp_vae).

    Loss: mean over the pixels of the absolute or squared error; variational tasks add a tenth of
    the code's divergence from a standard normal, in nats a pixel.
    Batch: images [B, 64], normal draws [B, max_code], a mask [B].
    """
    sample, letter_batch = letter_tasks(pool, max_batch, dict(
        batch_size=size(max_batch / 8, max_batch),
        **LETTERS,  # label_noise has no effect
        width=size(8, 24),
        code=size(2, max_code),
        activation=ACTIVATION,
        init_scale=SCALE,
        output=choice(3),  # 0: tanh; 1: sigmoid; 2: linear
        absolute=chance(1 / 3),
        variational=chance(1 / 3)))

    def init(task, key):
        units = task["width"]
        return padded(key, task["init_scale"], {
            "in": (64, units),
            "encode": (units, moments(task)),
            "decode": (task["code"], units),
            "out": (units, 64)})

    def batch(task, key, split):
        letter_key, key = random.split(key)
        x, _, real = letter_batch(task, letter_key, split)
        return x, random.normal(key, (max_batch, max_code)), real

    return TaskFamily("autoencoder", sample, init, batch, autoencoder_loss)


def moments(task):
    """A mask of the code's mean and log deviation, side by side."""
    return jnp.concatenate([task["code"], task["code"] & task["variational"]])


def autoencoder_loss(task, params, batch):
    x, draws, real = batch
    h = hidden(task, params, "in", x, task["width"])
    coded = masked(moments(task), dense(params, "encode", h))
    mean, log_deviation = jnp.split(coded, 2, 1)
    deviation = jnp.exp(jnp.minimum(log_deviation, 5.0))
    z = mean + masked(task["code"] & task["variational"], deviation * draws)
    h = hidden(task, params, "decode", z, task["width"])
    out = dense(params, "out", h)
    outputs = jnp.tanh(out), 2 * nn.sigmoid(out) - 1, out
    error = lax.select_n(task["output"], *outputs) - x / task["input_scale"]
    error = jnp.where(task["absolute"], jnp.abs(error), error ** 2)
    divergence = 0.5 * (mean ** 2 + deviation ** 2 - 1) - jnp.log(deviation)
    divergence = masked(task["variational"], jnp.sum(divergence, 1))
    losses = jnp.mean(error, 1) + 0.1 / 64 * divergence
    return jnp.mean(losses, where=real)


@functools.cache
def rnn(pool="meta_train", max_length=16, max_batch=8):
    """Character-level language modelling of Python's documentation (TaskSet's char_rnn_lm).

    Loss: mean cross-entropy of the next character, in nats.
    Batch: characters [B, max_length + 1] int, a mask [B, max_length].
    """
    text = tree.map(jnp.asarray, data.texts(pool))
    n = len(data.SYMBOLS)
    ranges = dict(
        core=choice(3),
        width=size(8, 16),
        embedding=size(4, 12),
        length=size(4, max_length),
        batch_size=size(2, max_batch),
        init_scale=SCALE)

    def init(task, key):
        width = task["width"]
        gates = first(jnp.array(GATES)[task["core"]], 4)
        gates = jnp.outer(gates, width).ravel()
        params = padded(key, task["init_scale"], {
            "embed": (n, task["embedding"]),
            "x": (task["embedding"], gates),
            "h": (width, gates),
            "out": (width, n)})
        params["embed"] *= np.sqrt(n)  # it is indexed, not multiplied with
        del params["embed/b"], params["h/b"]
        return params

    def batch(task, key, split):
        rows = task["batch_size"] | (split != "train")
        real = jnp.outer(rows, task["length"])
        u = random.uniform(key, (max_batch, 1))
        if "fraction" in task and split in FEW:
            u = (task["offset"] + task["fraction"] * u) % 1
        start = (u * (len(text[split]) - max_length)).astype(int)
        return text[split][start + jnp.arange(max_length + 1)[None]], real

    sample = functools.partial(draw, ranges=ranges)
    return TaskFamily("rnn", sample, init, batch, rnn_loss)


def rnn_loss(task, params, batch):
    characters, real = batch
    embed = masked(task["embedding"], params["embed"])
    x = nn.one_hot(characters[:, :-1], len(embed)) @ embed
    x = dense(params, "x", x)  # [B, length, 4 width]

    def step(state, x):
        of_input = jnp.split(x, 4, 1)
        of_state = jnp.split(state[0] @ params["h"], 4, 1)
        state = lax.switch(task["core"], CORES, of_input, of_state, *state)
        h, c = (masked(task["width"], x) for x in state)
        return (h, c), h

    zeros = jnp.zeros((len(x), len(task["width"])))
    _, h = lax.scan(step, (zeros, zeros), jnp.swapaxes(x, 0, 1))
    logits = dense(params, "out", jnp.swapaxes(h, 0, 1))
    return cross_entropy(logits, characters[:, 1:], real)


def rosenbrock(x, real):
    valley = (x[1:] + 1) - (x[:-1] + 1) ** 2
    return jnp.sum(100 * valley ** 2 + x[:-1] ** 2, where=real[1:])


def styblinski_tang(x, real):
    x = x - 2.903534
    values = 0.5 * (x ** 4 - 16 * x ** 2 + 5 * x) + 39.16617
    return jnp.sum(values, where=real)


def ackley(x, real):
    n = jnp.sum(real)
    distance = jnp.sqrt(jnp.sum(x * x) / n + 1e-12)
    wave = jnp.sum(jnp.cos(2 * jnp.pi * x), where=real) / n
    return 20 - 20 * jnp.exp(-0.2 * distance) + jnp.e - jnp.exp(wave)


def chain(x, real):
    """Each coordinate matters once the one before is small (losg's dependency chain)."""
    squares = x ** 2
    return squares[0] + jnp.sum(squares[1:] / (squares[:-1] + 1))


def log_sum_exp(x, real):
    both = jnp.concatenate([x, -x])
    real = jnp.tile(real, 2)
    return nn.logsumexp(both, where=real) - jnp.log(jnp.sum(real))


FUNCTIONS = rosenbrock, styblinski_tang, ackley, chain, log_sum_exp  # all have minimum 0 at 0


@functools.cache
def function(pool="meta_train", max_size=64):
    """FUNCTIONS and, as often, quadratics and powers of norms, in up to 64 dimensions.

    After TaskSet's quadratic and Wichrowska et al. 2017. Both pools have the same kinds, with other
    keys. Batch: noise and mask of the gradient, [max_size] each.
    """
    others = len(FUNCTIONS)
    ranges = dict(
        size=size(2, max_size),
        kind=choice(2 * others),          # index into FUNCTIONS; beyond: quadratic, norm
        turned=chance(0.5),               # whether the axes of the last two are
        norm=chance(0.5),
        condition=log_uniform(1.0, 1e4),  # greatest over least curvature
        power=uniform(1.0, 3.0),          # of the norm
        start=log_uniform(0.3, 3.0),      # distance of a coordinate from the minimum, about
        scale=log_uniform(1e-3, 1e3),     # of the loss
        log=chance(0.2),                  # whether the loss is log(1 + 100 f), else f
        noise=often_zero(log_uniform(1e-3, 1.0)),  # on training gradients, relative to the scale
        sparsity=often_zero(uniform(0.0, 0.9)))    # share of coordinates without a gradient

    def sample(key):
        axes_key, key = random.split(random.fold_in(key, pool == "held_out"))
        task = draw(key, ranges)
        real = task["size"]
        falling = jnp.arange(max_size) / (jnp.sum(real) - 1)
        task["spectrum"] = masked(real, task["condition"] ** -falling)
        turned = task["turned"] & (task["kind"] >= others)
        normal = random.normal(axes_key, (max_size, max_size))
        axes = jnp.where(turned & jnp.outer(real, real), normal, jnp.eye(max_size))
        task["axes"], _ = jnp.linalg.qr(axes)
        task["kind"] = jnp.minimum(task["kind"], others + task["norm"])
        return task

    def init(task, key):
        x = task["start"] * random.normal(key, (max_size,))
        return {"x": masked(task["size"], x)}

    def batch(task, key, split):
        if split != "train":
            return jnp.zeros(max_size), jnp.ones(max_size, bool)
        noise_key, key = random.split(key)
        noise = task["noise"] * task["scale"] * random.normal(noise_key, (max_size,))
        return noise, random.uniform(key, (max_size,)) >= task["sparsity"]

    return TaskFamily("function", sample, init, batch, function_loss)


def function_loss(task, params, batch):
    noise, mask = batch
    real = task["size"]
    x = masked(real, params["x"])
    x = jnp.where(mask, x, lax.stop_gradient(x))
    squares = (task["axes"] @ x) ** 2
    quadratic = 0.5 * jnp.sum(task["spectrum"] * squares)
    powers = (squares + 1e-12) ** (task["power"] / 2)
    norm = jnp.sum(task["spectrum"] * powers)
    values = [f(x, real) for f in FUNCTIONS]
    value = lax.select_n(task["kind"], *values, quadratic, norm)
    value = jnp.maximum(value, 0)  # rounding can miss a minimum by 1e-6
    value = jnp.where(task["log"], jnp.log1p(100 * value), value)
    push = jnp.vecdot(noise, x)
    push -= lax.stop_gradient(push)  # the noise is in the gradient only
    return task["scale"] * value + push


FAMILIES = {f.__name__: f for f in (mlp, conv, autoencoder, rnn, function, table, wide)}
OF_EXAMPLES = FAMILIES.keys() - {"function", "table"}  # can have few, see `few_examples`
