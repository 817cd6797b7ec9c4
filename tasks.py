"""A task family is four functions: sample a task, initialise its parameters, draw a batch, compute a loss.

A task is a pytree of arrays (widths, noise levels, ... as data, never as shapes), so thousands of different tasks
share one compiled step under `vmap`. What is smaller than the largest member of the family is padded, and masked.
The last two functions start and step the training of one task with whatever optimizer they are handed.
"""
import functools
import os
import zipfile
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib import ft2font
from pydoc_data import topics

SPLITS = ("train", "inner_valid", "outer_valid", "test")
VALID_EVERY = 10  # inner steps from one inner_valid batch to the next (P2 appendix C.1)


class TaskFamily(NamedTuple):
    """Those below, but for `dataset`, are made once for the same arguments, so that what is compiled for one is found again."""
    name: str
    sample: Callable  # sample(key) -> task, a pytree of arrays
    init: Callable    # init(task, key) -> params, a pytree of float32 arrays
    batch: Callable   # batch(task, key, split) -> batch; split is one of SPLITS and static
    loss: Callable    # loss(task, params, batch) -> scalar


class Inner(NamedTuple):
    """A task in training: its parameters, the optimizer's state, and the number of inner steps done."""
    params: Any
    opt_state: Any
    step: jax.Array


def init_inner(family, optimizer, task, key):
    """Fresh parameters of `task` and a fresh state of `optimizer`."""
    params = family.init(task, key)
    return Inner(params, optimizer.init(params), jnp.int32(0))


def inner_step(family, optimizer, task, inner, key):
    """One training step. The optimizer also reads the loss of this batch and, at every tenth step, of one inner_valid batch
    (P2 section 3.3; NaN at the others); the hand-designed ones ignore both, and XLA then removes the second batch."""
    train_key, valid_key = jax.random.split(key)
    loss, grads = jax.value_and_grad(family.loss, argnums=1)(
        task, inner.params, family.batch(task, train_key, "train"))
    valid_loss = jax.lax.cond(inner.step % VALID_EVERY == 0,
                              lambda: family.loss(task, inner.params, family.batch(task, valid_key, "inner_valid")), lambda: jnp.nan)
    updates, opt_state = optimizer.update(
        grads, inner.opt_state, inner.params, loss=loss, valid_loss=valid_loss)
    return Inner(jax.tree.map(jnp.add, inner.params, updates), opt_state, inner.step + 1)


# ---------------------------------------------------------------- data: letters in the fonts that matplotlib ships

# Classes are split by alphabet (meta-training never sees a held-out letter; Cyrillic letters that look Latin are
# left out), examples by font (no split sees the fonts of another; each mixes sans and serif, upright and slanted).
ALPHABETS = {"meta_train": "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                           "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθικλμνξπρστυφχψω",
             "held_out": "БГДЖЗИЙЛПУФЦЧШЩЪЫЬЭЮЯбвгджзийклмнптфцчшщъыьэюя"}
FONTS = {"train": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono",
                   "DejaVuSansMono-BoldOblique", "DejaVuSerif", "STIXGeneralBolIta"),
         "inner_valid": ("DejaVuSansMono-Bold", "DejaVuSerif-BoldItalic", "STIXGeneralBol"),
         "outer_valid": ("DejaVuSans-BoldOblique", "DejaVuSerif-Italic", "STIXGeneral"),
         "test": ("DejaVuSansMono-Oblique", "DejaVuSerif-Bold", "STIXGeneralItalic")}
PIXELS, VARIANTS = 16, 8  # images are PIXELS x PIXELS; each letter is drawn VARIANTS times in each font
SIDE = 3 * PIXELS         # they are drawn three times too large, then averaged down


def draw_letter(font, letter, rng):
    """One letter, turned by up to 15 degrees, scaled by up to 15% and shifted by up to 2 pixels -> [48, 48] uint8."""
    font.set_size(rng.uniform(0.75, 1.0) * SIDE, 72)
    font.set_text(letter, rng.uniform(-15, 15))
    font.draw_glyphs_to_bitmap(antialiased=False)
    ink = np.asarray(font.get_image())[:SIDE, :SIDE]
    top, left = (min(max((SIDE - n) // 2 + int(rng.integers(-5, 6)), 0), SIDE - n) for n in ink.shape)
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    canvas[top:top + ink.shape[0], left:left + ink.shape[1]] = ink
    return canvas


def squares(images, n):
    """Sums over n x n pixels: [..., H, W] uint8 -> [..., H / n, W / n]. Many times faster than numpy's sum over two axes."""
    return sum(images[..., i::n, j::n].astype(np.uint16) for i in range(n) for j in range(n))


def draw_letters():
    """All letters in all fonts -> {"<alphabet>/<split>": [letters, fonts * VARIANTS, 16, 16] uint8}. About a second."""
    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    fonts = {name: ft2font.FT2Font(os.path.join(folder, name + ".ttf")) for names in FONTS.values() for name in names}
    rng, data = np.random.default_rng(0), {}
    for alphabet, letters in ALPHABETS.items():
        for split in SPLITS:
            large = np.stack([draw_letter(fonts[name], letter, rng)
                              for letter in letters for name in FONTS[split] for _ in range(VARIANTS)])
            small = (squares(large, 3) // 9).astype(np.uint8)
            data[f"{alphabet}/{split}"] = small.reshape(len(letters), -1, PIXELS, PIXELS)
    return data


@functools.cache
def letters():
    """The data set of `draw_letters`, kept in matplotlib's cache folder; a missing or damaged copy is drawn again."""
    path = os.path.join(matplotlib.get_cachedir(), "learned_optimizer_letters_1.npz")
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        data = draw_letters()
    try:
        temporary = f"{path}.{os.getpid()}.npz"
        np.savez(temporary, **data)
        os.replace(temporary, path)
    except OSError:
        pass  # a read-only home costs a second at each start, nothing else
    return data


def pooled(images, shifts):
    """[C, E, 16, 16] uint8 -> [C, E * shifts^2, 64] float32 in [0, 1]: 2x2 means of copies moved by each pair of shifts."""
    moved = np.concatenate([np.roll(images, (i, j), (2, 3)) for i in shifts for j in shifts], 1)
    return np.float32(squares(moved, 2) / 4 / 255).reshape(*moved.shape[:2], 64)


# ---------------------------------------------------------------- what the families share

ACTIVATIONS = (jax.nn.relu, jnp.tanh, jax.nn.silu, lambda x: jax.nn.leaky_relu(x, 0.2))


def activate(task, h):
    """The task's activation of h. Where tasks run one by one (CPU), only that one is computed; under `vmap` all four are."""
    return jax.lax.switch(task.activation, ACTIVATIONS, h)


def log_uniform(u, low, high):
    return low * (high / low) ** u


def weights(draws, scale, shape, rows, columns):
    """Normal weights of standard deviation scale / sqrt(real rows), zero in the padding -> [shape], and the unused draws.

    `rows` and `columns` are masks of what is real.
    """
    count = shape[0] * shape[1]
    real = rows[:, None] & columns[None]
    w = draws[:count].reshape(shape) * scale / jnp.sqrt(jnp.maximum(jnp.sum(rows), 1))
    return jnp.where(real, w, 0.0), draws[count:]


def cross_entropy(logits, y):
    """logits [..., C], y [...] int -> [...] in nats."""
    return -jnp.vecdot(jax.nn.one_hot(y, logits.shape[-1]), jax.nn.log_softmax(logits))


def weighted_mean(x, weight):
    return jnp.sum(weight * x) / jnp.sum(weight)


class Letters(NamedTuple):
    """What a task sees of the letters."""
    classes: jax.Array      # [10] int, rows of the data set
    batch_size: jax.Array
    input_scale: jax.Array
    input_noise: jax.Array  # standard deviation, fresh in every batch of every split; ink is 1, paper 0
    label_noise: jax.Array  # probability that a training example is filed for good under a wrong class


def letter_batches(pool, max_batch, num_classes=10):
    """-> (choose(key, u [4]) -> Letters, batch(letters, key, split)) on the alphabet of that pool.

    A batch is images [B, 64], labels [B], weights [B]; the weights mask what exceeds the task's batch size (training only:
    the other splits always use all of max_batch). The alphabet's mean training image is taken off all images.
    """
    images = {split: pooled(letters()[f"{pool}/{split}"], shifts=(-1, 0, 1) if split == "train" else (0,))
              for split in SPLITS}
    mean = images["train"].mean((0, 1))
    images = {split: jnp.asarray(x - mean) for split, x in images.items()}  # [C, E, 64]
    rng = np.random.default_rng(0)
    noise = jnp.asarray(rng.standard_normal((4096, 64)), jnp.float32)  # drawn once: indexing is cheaper than drawing
    examples = images["train"].shape[1]
    luck = jnp.asarray(rng.uniform(size=(num_classes, examples)), jnp.float32)  # example is mislabelled if luck < label_noise
    wrong = jnp.asarray(rng.integers(1, num_classes, (num_classes, examples)))  # ... by this many classes

    def choose(key, u):
        return Letters(
            classes=jax.lax.top_k(jax.random.uniform(key, (images["train"].shape[0],)), num_classes)[1],
            batch_size=jnp.round(log_uniform(u[0], max_batch / 8, max_batch)).astype(int),
            input_scale=log_uniform(u[1], 0.5, 2.0),
            input_noise=jnp.maximum(0, 0.6 * u[2] - 0.3),  # half of the tasks have none
            label_noise=jnp.maximum(0, 0.6 * u[3] - 0.3))

    def batch(task, key, split):
        u = jax.random.uniform(key, (3, max_batch))  # one call: random numbers are a good part of a small step
        y, e, n = (u * np.float32([[num_classes], [images[split].shape[1]], [len(noise)]])).astype(int)
        x = images[split][task.classes[y], e] + task.input_noise * noise[n]  # [B, 64]
        if split != "train":
            return x * task.input_scale, y, jnp.ones(max_batch)
        y = jnp.where(luck[y, e] < task.label_noise, (y + wrong[y, e]) % num_classes, y)
        return x * task.input_scale, y, (jnp.arange(max_batch) < task.batch_size).astype(jnp.float32)

    return choose, batch


# ---------------------------------------------------------------- the families

class MLPTask(NamedTuple):
    letters: Letters
    depth: jax.Array        # hidden layers
    widths: jax.Array       # [max_depth] units of each hidden layer
    activation: jax.Array   # index into ACTIVATIONS
    init_scale: jax.Array   # standard deviation of a weight times sqrt(its fan-in)


@functools.cache
def mlp(pool="meta_train", max_depth=2, max_width=32, max_batch=64, num_classes=10):
    """Classification of 8x8 letters by fully connected nets (P2's and TaskSet's `mlp`, with P1's disjoint classes).

    Every task draws its own letters, depth, widths, activation, batch size, scales of initialisation and input, and
    noise on inputs and labels. Loss: mean cross-entropy in nats. Batch: see `letter_batches`.
    """
    choose, letter_batch = letter_batches(pool, max_batch, num_classes)
    count = 64 * max_width + (max_depth - 1) * max_width ** 2 + max_width * num_classes

    def sample(key):
        class_key, key = jax.random.split(key)
        u = jax.random.uniform(key, (8 + max_depth,))  # one call for all: a random call is slow to compile
        wide, rest = u[1:1 + max_depth], u[1 + max_depth:]
        return MLPTask(
            letters=choose(class_key, rest[np.array([1, 3, 4, 5])]),
            depth=1 + (max_depth * u[0]).astype(int),
            widths=jnp.round(log_uniform(wide, 8, max_width)).astype(int),
            activation=(len(ACTIVATIONS) * rest[0]).astype(int),
            init_scale=log_uniform(rest[2], 0.5, 2.0))

    def init(task, key):
        draws, params = jax.random.normal(key, (count,)), {}
        rows = jnp.ones(64, bool)
        for i in range(max_depth):  # a layer beyond the depth has no real columns
            columns = jnp.arange(max_width) < jnp.where(i < task.depth, task.widths[i], 0)
            params[f"w{i}"], draws = weights(draws, task.init_scale, (len(rows), max_width), rows, columns)
            params[f"b{i}"] = jnp.zeros(max_width)
            rows = columns if i == 0 else jnp.where(i < task.depth, columns, rows)
        params[f"w{max_depth}"], _ = weights(draws, task.init_scale, (max_width, num_classes), rows, jnp.ones(num_classes, bool))
        return params | {f"b{max_depth}": jnp.zeros(num_classes)}

    def batch(task, key, split):
        return letter_batch(task.letters, key, split)

    def loss(task, params, batch):
        x, y, weight = batch
        for i in range(max_depth):
            h = activate(task, x @ params[f"w{i}"] + params[f"b{i}"][None])
            h = jnp.where(jnp.arange(max_width)[None] < task.widths[i], h, 0.0)
            x = h if i == 0 else jnp.where(i < task.depth, h, x)  # a layer beyond the depth is skipped
        logits = x @ params[f"w{max_depth}"] + params[f"b{max_depth}"][None]  # [B, 10]
        return weighted_mean(cross_entropy(logits, y), weight)

    return TaskFamily("mlp", sample, init, batch, loss)


class ConvTask(NamedTuple):
    letters: Letters
    depth: jax.Array       # convolutions, 1 or 2
    channels: jax.Array    # [2]
    strides: jax.Array     # 0: 2, 1; 1: 1, 2; 2: 2, 2
    head: jax.Array        # 0: all positions; 1: their mean; 2: their maximum
    activation: jax.Array
    init_scale: jax.Array


def patches(x, stride):
    """The 3x3 neighbourhoods of every stride-th pixel, zeros around: [B, H, W, C] -> [B, H / stride, W / stride, 9 C], rounded up.

    A convolution is then one matmul; XLA's own has a gradient many times slower inside a scan on a CPU.
    """
    (height, width), x = x.shape[1:3], jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([x[:, i:i + height:stride, j:j + width:stride] for i in range(3) for j in range(3)], -1)


@functools.cache
def conv(pool="meta_train", max_channels=8, max_batch=32, num_classes=10):
    """Classification of 8x8 letters by one or two 3x3 convolutions and a linear head (TaskSet's conv_fc and conv_pooling).

    Sampled beside what `mlp` samples: channels, the order of the strides, and whether the head sees all positions, their
    mean or their maximum. Not here: TaskSet's padding per layer and its missing biases. Loss and batch as in `mlp`.
    """
    choose, letter_batch = letter_batches(pool, max_batch, num_classes)
    shapes = ((9, max_channels), (9 * max_channels, max_channels), (16 * max_channels, num_classes))

    def sample(key):
        class_key, key = jax.random.split(key)
        u = jax.random.uniform(key, (11,))
        pick = lambda u, n: (n * u).astype(int)
        return ConvTask(letters=choose(class_key, u[:4]), depth=1 + pick(u[4], 2),
                        channels=jnp.round(log_uniform(u[5:7], max_channels / 4, max_channels)).astype(int),
                        strides=pick(u[7], 3), head=pick(u[8], 3),
                        activation=pick(u[9], len(ACTIVATIONS)), init_scale=log_uniform(u[10], 0.5, 2.0))

    def real_channels(task):
        """Masks of the channels of the first convolution, of the second, and of what the head reads."""
        first, second = (jnp.arange(max_channels) < n for n in task.channels)
        return first, second & (task.depth == 2), jnp.where(task.depth == 2, second, first)

    def positions(task):
        """Which of the 4x4 positions the head reads: with strides 2, 2 every other one in each direction."""
        every_other = jnp.arange(4) % 2 == 0
        return (every_other[:, None] & every_other[None]).ravel() | (task.strides < 2) | (task.depth == 1)

    def init(task, key):
        draws, params = jax.random.normal(key, (sum(np.prod(shape) for shape in shapes),)), {}
        first, second, last = real_channels(task)
        read = jnp.where(task.head == 0, positions(task), jnp.arange(16) == 0)
        rows = (jnp.ones(9, bool), jnp.tile(first, 9), (read[:, None] & last[None]).ravel())
        for i, (shape, columns) in enumerate(zip(shapes, (first, second, jnp.ones(num_classes, bool)))):
            params[f"w{i}"], draws = weights(draws, task.init_scale, shape, rows[i], columns)
            params[f"b{i}"] = jnp.zeros(shape[1])
        return params

    def batch(task, key, split):
        return letter_batch(task.letters, key, split)

    def loss(task, params, batch):
        x, y, weight = batch
        masks = real_channels(task)
        above = lambda x: x[None, None, None]  # one for each image and position
        layer = lambda i, x: jnp.where(above(masks[i]), activate(task, x @ params[f"w{i}"] + above(params[f"b{i}"])), 0.0)
        x = x.reshape(-1, 8, 8, 1)

        def wide(x):
            full = layer(0, patches(x, 1))
            return full[:, ::2, ::2], patches(full, 2)

        def narrow(x):
            half = layer(0, patches(x, 2))
            return half, patches(half, 1)

        half, around = jax.lax.cond(task.strides == 1, wide, narrow, x)
        deep = layer(1, around)
        h = jnp.where(task.depth == 2, deep, half).reshape(len(x), 16, max_channels)
        read = positions(task)[None, :, None]
        mean = jnp.sum(jnp.where(read, h, 0.0), 1) / jnp.sum(read)
        most = jnp.max(jnp.where(read, h, -jnp.inf), 1)
        one = jnp.zeros_like(h).at[:, 0].set(jnp.where(task.head == 1, mean, most))  # a pooled head reads position 0
        h = jnp.where(task.head == 0, jnp.where(read, h, 0.0), one)
        return weighted_mean(cross_entropy(h.reshape(len(x), -1) @ params["w2"] + params["b2"][None], y), weight)

    return TaskFamily("conv", sample, init, batch, loss)


class AutoencoderTask(NamedTuple):
    letters: Letters
    width: jax.Array        # of the hidden layers
    code: jax.Array         # of the bottleneck
    activation: jax.Array
    init_scale: jax.Array
    output: jax.Array       # 0: tanh, 1: sigmoid, 2: linear
    absolute: jax.Array     # whether the loss is L1, else L2
    variational: jax.Array  # whether the code is drawn, and its divergence from a standard normal part of the loss


@functools.cache
def autoencoder(pool="meta_train", max_width=24, max_code=12, max_batch=64):
    """8x8 letters through a bottleneck (TaskSet's mlp_ae and mlp_vae), one hidden layer on each side.

    Every task draws its own letters, noise, batch size, width, bottleneck, activation, initialisation, output and loss.
    Loss: mean over the pixels of the absolute or squared error; variational tasks add a tenth of the divergence, in nats a
    pixel. Not here: more layers, and TaskSet's sums over pixels. Batch: images [B, 64], normal draws [B, code], weights [B].
    """
    choose, letter_batch = letter_batches(pool, max_batch)
    shapes = ((64, max_width), (max_width, 2 * max_code), (max_code, max_width), (max_width, 64))

    def sample(key):
        class_key, key = jax.random.split(key)
        u = jax.random.uniform(key, (11,))
        return AutoencoderTask(
            letters=choose(class_key, u[:4]), width=jnp.round(log_uniform(u[4], 8, max_width)).astype(int),
            code=jnp.round(log_uniform(u[5], 2, max_code)).astype(int), activation=(len(ACTIVATIONS) * u[6]).astype(int),
            init_scale=log_uniform(u[7], 0.5, 2.0), output=(3 * u[8]).astype(int), absolute=u[9] < 1 / 3, variational=u[10] < 1 / 3)

    def masks(task):
        """Of the hidden layers, of the code, and of the code's mean and log deviation, side by side."""
        hidden, code = jnp.arange(max_width) < task.width, jnp.arange(max_code) < task.code
        return hidden, code, jnp.concatenate([code, code & task.variational])

    def init(task, key):
        draws, params = jax.random.normal(key, (sum(np.prod(shape) for shape in shapes),)), {}
        hidden, code, both = masks(task)
        pixels = jnp.ones(64, bool)
        for i, (shape, rows, columns) in enumerate(zip(shapes, (pixels, hidden, code, hidden), (hidden, both, hidden, pixels))):
            params[f"w{i}"], draws = weights(draws, task.init_scale, shape, rows, columns)
            params[f"b{i}"] = jnp.zeros(shape[1])
        return params

    def batch(task, key, split):
        letter_key, key = jax.random.split(key)
        x, _, weight = letter_batch(task.letters, letter_key, split)
        return x, jax.random.normal(key, (max_batch, max_code)), weight

    def loss(task, params, batch):
        x, draws, weight = batch
        hidden, code, both = masks(task)
        layer = lambda i, x: x @ params[f"w{i}"] + params[f"b{i}"][None]
        h = jnp.where(hidden[None], activate(task, layer(0, x)), 0.0)
        mean, log_deviation = jnp.split(jnp.where(both[None], layer(1, h), 0.0), 2, 1)
        deviation = jnp.exp(jnp.minimum(log_deviation, 5.0))
        divergence = 0.5 * (mean ** 2 + deviation ** 2 - 1) - jnp.log(deviation)
        z = mean + jnp.where(code[None] & task.variational, deviation * draws, 0.0)
        out = layer(3, jnp.where(hidden[None], activate(task, layer(2, z)), 0.0))
        out = jax.lax.select_n(task.output, jnp.tanh(out), 2 * jax.nn.sigmoid(out) - 1, out)  # the pixels lie within +-1, centred
        error = out - x / task.letters.input_scale
        error = jnp.mean(jnp.where(task.absolute, jnp.abs(error), error ** 2), 1)
        extra = jnp.where(task.variational, 0.1 / 64 * jnp.sum(divergence, 1), 0.0)
        return weighted_mean(error + extra, weight)

    return TaskFamily("autoencoder", sample, init, batch, loss)


SYMBOLS = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;'\"()[]{}<>=+-*/_|!#@`"  # of the rnn family; all else counts as the last


@functools.cache
def texts(pool):
    """{split: [characters] int, indices into SYMBOLS}: CPython's help topics; each belongs to one pool and one split."""
    code = np.full(128, len(SYMBOLS) - 1)
    code[[ord(c) for c in SYMBOLS]] = np.arange(len(SYMBOLS))
    pages = sorted(set(topics.topics.values()), key=len)
    pages = [page for page in pages if sum(page in other for other in pages) == 1]  # some pages hold others
    pages = [np.frombuffer(page.lower().encode("ascii", "replace"), np.uint8) for page in pages]
    mine = [page for i, page in enumerate(pages) if (i % 3 == 0) == (pool == "held_out")]
    return {split: code[np.concatenate(mine[i::len(SPLITS)])] for i, split in enumerate(SPLITS)}


class RNNTask(NamedTuple):
    core: jax.Array        # 0: vanilla, 1: GRU, 2: LSTM
    width: jax.Array
    embedding: jax.Array
    length: jax.Array      # of the sequences
    batch_size: jax.Array
    init_scale: jax.Array


@functools.cache
def rnn(pool="meta_train", max_width=16, max_embedding=12, max_length=16, max_batch=8):
    """Character-level language modelling of Python's documentation (TaskSet's char_rnn_lm).

    Every task draws its core (vanilla, GRU or LSTM), width, embedding, sequence length, batch size and scale of
    initialisation. Not here: word models and trainable initial states. Loss: mean cross-entropy of the next character, in
    nats. Batch: characters [B, length + 1] int, weights [B, length].
    """
    text = {split: jnp.asarray(x) for split, x in texts(pool).items()}
    n = len(SYMBOLS)
    shapes = {"embed": (n, max_embedding), "x": (max_embedding, 4 * max_width), "h": (max_width, 4 * max_width), "out": (max_width, n)}

    def sample(key):
        u = jax.random.uniform(key, (6,))
        between = lambda u, low, high: jnp.round(log_uniform(u, low, high)).astype(int)
        return RNNTask(core=(3 * u[0]).astype(int), width=between(u[1], 8, max_width), embedding=between(u[2], 4, max_embedding),
                       length=between(u[3], 4, max_length), batch_size=between(u[4], 2, max_batch), init_scale=log_uniform(u[5], 0.5, 2.0))

    def init(task, key):
        draws, params = jax.random.normal(key, (sum(np.prod(shape) for shape in shapes.values()),)), {}
        symbols, width, embedding = jnp.ones(n, bool), jnp.arange(max_width) < task.width, jnp.arange(max_embedding) < task.embedding
        gates = (jnp.arange(4)[:, None] < jnp.array([1, 3, 4])[task.core]) & width[None]  # a vanilla core has one, a GRU three
        real = {"embed": (symbols, embedding), "x": (embedding, gates.ravel()), "h": (width, gates.ravel()), "out": (width, symbols)}
        for name, shape in shapes.items():
            params[name], draws = weights(draws, task.init_scale, shape, *real[name])
        params["embed"] *= np.sqrt(n)  # it is indexed, not multiplied with
        return params | {"b": jnp.zeros(4 * max_width), "b_out": jnp.zeros(n)}

    def batch(task, key, split):
        start = (jax.random.uniform(key, (max_batch, 1)) * (len(text[split]) - max_length)).astype(int)
        real = (jnp.arange(max_batch) < task.batch_size)[:, None] & (jnp.arange(max_length) < task.length)[None]
        if split != "train":
            real = jnp.tile(jnp.arange(max_length) < task.length, (max_batch, 1))
        return text[split][start + jnp.arange(max_length + 1)[None]], real.astype(jnp.float32)

    def loss(task, params, batch):
        characters, weight = batch
        real = (jnp.arange(max_width) < task.width)[None]
        embed = jnp.where((jnp.arange(max_embedding) < task.embedding)[None], params["embed"], 0.0)

        def vanilla(a, b, h, c):
            return jnp.tanh(a[0] + b[0]), c

        def gru(a, b, h, c):
            z = jax.nn.sigmoid(a[2] + b[2])
            return (1 - z) * jnp.tanh(a[0] + jax.nn.sigmoid(a[1] + b[1]) * b[0]) + z * h, c

        def lstm(a, b, h, c):
            i, f, o = (jax.nn.sigmoid(x + y + k) for x, y, k in zip(a[1:], b[1:], (1, 0, 0)))
            c = i * c + f * jnp.tanh(a[0] + b[0])
            return o * jnp.tanh(c), c

        def step(state, x):
            h, c = state
            h, c = jax.lax.switch(task.core, (vanilla, gru, lstm), jnp.split(x, 4, 1), jnp.split(h @ params["h"], 4, 1), h, c)
            state = jnp.where(real, h, 0.0), jnp.where(real, c, 0.0)
            return state, state[0]

        x = jax.nn.one_hot(characters[:, :-1], n) @ (embed @ params["x"]) + params["b"][None, None]  # [B, length, 4 width]
        zeros = jnp.zeros((len(characters), max_width))
        _, h = jax.lax.scan(step, (zeros, zeros), jnp.swapaxes(x, 0, 1))
        logits = jnp.swapaxes(h, 0, 1) @ params["out"] + params["b_out"][None, None]
        return weighted_mean(cross_entropy(logits, characters[:, 1:]), weight)

    return TaskFamily("rnn", sample, init, batch, loss)


class FunctionTask(NamedTuple):
    kind: jax.Array      # index into FUNCTIONS
    size: jax.Array      # dimensions
    spectrum: jax.Array  # [max_size] curvatures of the quadratic and the norm; falling, the first is 1
    axes: jax.Array      # [max_size, max_size] orthogonal, a row for each curvature's direction; often the identity
    power: jax.Array     # of the norm
    start: jax.Array     # distance of a coordinate from the minimum, about
    scale: jax.Array     # the loss is multiplied by it
    log: jax.Array       # whether the loss is log(1 + 100 f), else f
    noise: jax.Array     # standard deviation of the noise on the training gradients, relative to the scale
    sparsity: jax.Array  # probability that a coordinate gets no gradient in a training step


def rosenbrock(x, real):
    pairs = real[1:]
    return jnp.sum(jnp.where(pairs, 100 * ((x[1:] + 1) - (x[:-1] + 1) ** 2) ** 2 + x[:-1] ** 2, 0.0))


def styblinski_tang(x, real):
    y = x - 2.903534
    return jnp.sum(jnp.where(real, 0.5 * (y ** 4 - 16 * y ** 2 + 5 * y) + 39.16617, 0.0))


def ackley(x, real):
    n = jnp.sum(real)
    distance = jnp.sqrt(jnp.sum(x * x) / n + 1e-12)
    wave = jnp.sum(jnp.where(real, jnp.cos(2 * jnp.pi * x), 0.0)) / n
    return 20 - 20 * jnp.exp(-0.2 * distance) + jnp.e - jnp.exp(wave)


def chain(x, real):
    """Each coordinate matters once the one before is small (losg's dependency chain)."""
    return x[0] ** 2 + jnp.sum(jnp.where(real[1:], x[1:] ** 2 / (x[:-1] ** 2 + 1), 0.0))


def log_sum_exp(x, real):
    return jax.nn.logsumexp(jnp.concatenate([x, -x]), where=jnp.concatenate([real, real])) - jnp.log(2.0 * jnp.sum(real))


FUNCTIONS = (rosenbrock, styblinski_tang, ackley, chain, log_sum_exp)  # beside the quadratic and the norm; all have minimum 0 at 0


@functools.cache
def function(pool="meta_train", max_size=64):
    """Functions with known minimum 0: quadratics, powers of norms, Rosenbrock, Styblinski-Tang, Ackley and others, in 2 to 64
    dimensions (TaskSet's quadratic and Wichrowska et al. 2017).

    Every task draws its kind, dimensions, spectrum, axes and start, and P2's wrappers: a scale, a logarithm, noisy and sparse
    training gradients. Both pools draw from the same kinds with different keys. Not here: the two-dimensional Beale, Branin,
    Matyas and Michalewicz, the snake and the min-max well. Batch: noise and mask of the gradient, [max_size] each.
    """
    def sample(key):
        key = jax.random.fold_in(key, pool == "held_out")
        axes_key, key = jax.random.split(key)
        u = jax.random.uniform(key, (11,))
        size = jnp.round(log_uniform(u[0], 2, max_size)).astype(int)
        real = jnp.arange(max_size) < size
        kind = (2 * len(FUNCTIONS) * u[1]).astype(int)  # half of them are quadratics and norms
        turned = real[:, None] & real[None] & (u[2] < 0.5) & (kind >= len(FUNCTIONS))
        axes, _ = jnp.linalg.qr(jnp.where(turned, jax.random.normal(axes_key, (max_size, max_size)), jnp.eye(max_size)))
        falling = jnp.minimum(jnp.arange(max_size) / jnp.maximum(size - 1, 1), 1)
        return FunctionTask(
            kind=jnp.minimum(kind, len(FUNCTIONS) + (u[3] < 0.5)), size=size,
            spectrum=jnp.where(real, log_uniform(u[4], 1.0, 1e4) ** -falling, 0.0),
            axes=axes, power=1 + 2 * u[5], start=log_uniform(u[6], 0.3, 3.0),
            scale=log_uniform(u[7], 1e-3, 1e3), log=u[8] < 0.2, noise=jnp.where(u[9] < 0.5, 0.0, log_uniform(2 * u[9] - 1, 1e-3, 1.0)),
            sparsity=jnp.maximum(0, 1.8 * u[10] - 0.9))

    def init(task, key):
        return {"x": jnp.where(jnp.arange(max_size) < task.size, task.start * jax.random.normal(key, (max_size,)), 0.0)}

    def batch(task, key, split):
        if split != "train":
            return jnp.zeros(max_size), jnp.ones(max_size)
        noise_key, key = jax.random.split(key)
        noise = task.noise * task.scale * jax.random.normal(noise_key, (max_size,))
        return noise, (jax.random.uniform(key, (max_size,)) >= task.sparsity).astype(jnp.float32)

    def loss(task, params, batch):
        noise, mask = batch
        real = jnp.arange(max_size) < task.size
        x = jnp.where(real, params["x"], 0.0)
        x = jnp.where(mask > 0, x, jax.lax.stop_gradient(x))
        turned = task.axes @ x
        norm = jnp.sum(task.spectrum * (turned ** 2 + 1e-12) ** (task.power / 2))
        values = (*(f(x, real) for f in FUNCTIONS), 0.5 * jnp.sum(task.spectrum * turned ** 2), norm)
        value = jnp.maximum(jax.lax.select_n(task.kind, *values), 0)  # rounding can miss a minimum by 1e-6
        value = task.scale * jnp.where(task.log, jnp.log1p(100 * value), value)
        push = jnp.vecdot(noise, x)
        return value + push - jax.lax.stop_gradient(push)  # the noise is in the gradient only

    return TaskFamily("function", sample, init, batch, loss)


def dataset(arrays, net="mlp", width=32, max_batch=64):
    """Your own data, an mlp or a conv net on it: every task is another start and another order of the batches.

    arrays: x_train, y_train, x_test, y_test (the layout of Keras's mnist.npz). x holds rows of features [n, F] or images
    [n, H, W] or [n, H, W, C] (conv), as any numbers; y holds labels, integers from 0 (loss: cross-entropy in nats), or float
    targets (half the squared error in units of their variance). Inputs are standardised. A fifth of the training rows
    serves inner_valid and outer_valid. ValueError, with one sentence, for anything else.
    """
    x, y, classes = check_dataset(arrays, net)
    order = np.random.default_rng(0).permutation(len(x["train"]))
    tenth = len(order) // 10
    rows = {"train": order[2 * tenth:], "inner_valid": order[:tenth], "outer_valid": order[tenth:2 * tenth], "test": np.arange(len(x["test"]))}
    source = {split: "test" if split == "test" else "train" for split in SPLITS}
    seen = np.float64(x["train"][rows["train"]])
    spread = np.broadcast_to(seen.std(0) if seen.ndim == 2 else seen.std(), seen.shape[1:]) + 1e-6  # of an image: one for all pixels
    center = seen.mean(0)
    if any(v.dtype != np.uint8 for v in x.values()):  # other numbers may not fit into float32, or into any type that JAX has
        x = {part: np.float32((v - center) / spread) for part, v in x.items()}
        center, spread = np.zeros_like(center), np.ones_like(spread)
    center, spread = jnp.float32(center), jnp.float32(spread)
    if not classes:
        targets = np.float64(y["train"][rows["train"]])
        y = {part: np.float32((v - targets.mean()) / (targets.std() + 1e-6)) for part, v in y.items()}
    data = {split: (jnp.asarray(x[source[split]][rows[split]]), jnp.asarray(y[source[split]][rows[split]])) for split in SPLITS}
    shape, out = x["train"].shape[1:], classes or 1
    if net == "conv":
        side = [-(-(-(-n // 2)) // 2) for n in shape[:2]]  # halved twice, rounded up
        shapes = (9 * (*shape, 1)[2], width // 2), (9 * (width // 2), width // 2), (side[0] * side[1] * (width // 2), out)
    else:
        shapes = (int(np.prod(shape)), width), (width, width), (width, out)

    def init(task, key):
        params = {}
        for i, (n, m) in enumerate(shapes):
            params[f"w{i}"] = jax.random.normal(jax.random.fold_in(key, i), (n, m)) * np.sqrt((1 if i == 2 else 2) / n)
            params[f"b{i}"] = jnp.zeros(m)
        return params

    def batch(task, key, split):
        x, y = data[split]
        i = jax.random.randint(key, (max_batch,), 0, len(x))
        return (x[i].astype(jnp.float32) - center[None]) / spread[None], y[i]

    def loss(task, params, batch):
        x, y = batch
        if net == "conv":
            x = x.reshape(*x.shape[:3], -1)
        else:
            x = x.reshape(len(x), -1)
        for i in range(2):
            x = patches(x, 2) if net == "conv" else x
            x = jax.nn.relu(x @ params[f"w{i}"] + jnp.expand_dims(params[f"b{i}"], tuple(range(x.ndim - 1))))
        out = x.reshape(len(x), -1) @ params["w2"] + params["b2"][None]
        return jnp.mean(cross_entropy(out, y) if classes else 0.5 * (out[:, 0] - y) ** 2)

    return TaskFamily("data", lambda key: (), init, batch, loss)


def check_dataset(arrays, net):
    """-> ({"train", "test"} inputs, targets, number of classes or 0). ValueError, with one sentence, for what can't be used."""
    missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in arrays]
    if missing:
        raise ValueError(f"The data lack {', '.join(missing)}: they must hold x_train, y_train, x_test and y_test.")
    for name, a in arrays.items():
        if name[1:] in ("_train", "_test") and (a.dtype.kind not in "buif" or not np.isfinite(a).all()):
            raise ValueError(f"{name} must hold finite numbers; it is of type {a.dtype}" + (" with NaN or infinity." if a.dtype.kind == "f" else "."))
    x, y = ({part: arrays[f"{v}_{part}"] for part in ("train", "test")} for v in "xy")
    for part, least in (("train", 20), ("test", 1)):
        if x[part].shape[1:] != x["train"].shape[1:] or x[part].ndim not in ((3, 4) if net == "conv" else (2, 3, 4)) or 0 in x[part].shape[1:]:
            raise ValueError(f"x_{part} has shape {x[part].shape}: a {net} net needs " + ("" if net == "conv" else "rows [n, F] or ")
                             + "images [n, H, W] or [n, H, W, C], the same for training and test.")
        if y[part].shape not in ((len(x[part]),), (len(x[part]), 1)):
            raise ValueError(f"y_{part} must hold one target for each of the {len(x[part])} rows of x_{part}; its shape is {y[part].shape}.")
        if len(x[part]) < least:
            raise ValueError(f"x_{part} has {len(x[part])} rows; at least {least} are needed.")
    y = {part: v.ravel() for part, v in y.items()}
    if (y["train"].dtype.kind == "f") != (y["test"].dtype.kind == "f"):
        raise ValueError(f"y_train is of type {y['train'].dtype} and y_test of type {y['test'].dtype}: "
                         "both must be labels (integers), or both float targets.")
    if y["train"].dtype.kind == "f":
        return x, {part: v.astype(np.float32) for part, v in y.items()}, 0
    y = {part: v.astype(np.int32) for part, v in y.items()}
    classes = int(y["train"].max()) + 1
    if y["train"].min() != 0 or classes < 2 or not (0 <= y["test"].min() and y["test"].max() < classes):
        raise ValueError(f"Labels must run from 0 to the number of classes less one; y_train has {y['train'].min()} to {classes - 1}, "
                         f"y_test {y['test'].min()} to {y['test'].max()}.")
    return x, y, classes


FAMILIES = {"mlp": mlp, "conv": conv, "autoencoder": autoencoder, "rnn": rnn, "function": function}
