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

SPLITS = ("train", "inner_valid", "outer_valid", "test")


class TaskFamily(NamedTuple):
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
    """One training step. The optimizer also reads the loss of this batch and of one inner_valid batch (P2 section 3.3);
    the hand-designed ones ignore both, and XLA then removes the second batch."""
    train_key, valid_key = jax.random.split(key)
    loss, grads = jax.value_and_grad(family.loss, argnums=1)(
        task, inner.params, family.batch(task, train_key, "train"))
    valid_loss = family.loss(task, inner.params, family.batch(task, valid_key, "inner_valid"))
    updates, opt_state = optimizer.update(
        grads, inner.opt_state, inner.params, loss=loss, valid_loss=valid_loss)
    return Inner(jax.tree.map(jnp.add, inner.params, updates), opt_state, inner.step + 1)


# ---------------------------------------------------------------- data: letters in the fonts that matplotlib ships

# Classes are split by alphabet (meta-training never sees a held-out letter; Cyrillic letters that look Latin are
# left out), examples by font (no split sees the fonts of another; each mixes sans, mono and serif, upright and slanted).
ALPHABETS = {"meta_train": "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                           "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθικλμνξπρστυφχψω",
             "held_out": "БГДЖЗИЙЛПУФЦЧШЩЪЫЬЭЮЯбвгджзийклмнптфцчшщъыьэюя"}
FONTS = {"train": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono",
                   "DejaVuSansMono-BoldOblique", "DejaVuSerif", "STIXGeneralBolIta"),
         "inner_valid": ("DejaVuSansMono-Bold", "DejaVuSerif-BoldItalic", "STIXGeneralBol"),
         "outer_valid": ("DejaVuSans-BoldOblique", "DejaVuSerif-Italic", "STIXGeneral"),
         "test": ("DejaVuSansMono-Oblique", "DejaVuSerif-Bold", "STIXGeneralItalic")}
PIXELS, VARIANTS = 16, 8  # images are PIXELS x PIXELS; each letter is drawn VARIANTS times in each font


def draw_letter(font, letter, rng):
    """One letter, turned by up to 15 degrees, scaled by up to 15% and shifted by up to 2 pixels -> [16, 16] uint8."""
    side = 3 * PIXELS  # drawn three times too large, then averaged down
    font.set_size(rng.uniform(0.75, 1.0) * side, 72)
    font.set_text(letter, rng.uniform(-15, 15))
    font.draw_glyphs_to_bitmap(antialiased=False)
    ink = np.asarray(font.get_image())[:side, :side]
    top, left = ((side - n) // 2 + rng.integers(-5, 6) for n in ink.shape)
    top, left = (int(np.clip(a, 0, side - n)) for a, n in zip((top, left), ink.shape))
    canvas = np.zeros((side, side), np.float32)
    canvas[top:top + ink.shape[0], left:left + ink.shape[1]] = ink
    return canvas.reshape(PIXELS, 3, PIXELS, 3).mean((1, 3)).astype(np.uint8)


def draw_letters():
    """All letters in all fonts -> {"<alphabet>/<split>": [letters, fonts * VARIANTS, 16, 16] uint8}. About a second."""
    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    fonts = {name: ft2font.FT2Font(os.path.join(folder, name + ".ttf")) for names in FONTS.values() for name in names}
    rng = np.random.default_rng(0)
    return {f"{alphabet}/{split}": np.stack([
        np.stack([draw_letter(fonts[name], letter, rng) for name in FONTS[split] for _ in range(VARIANTS)])
        for letter in letters]) for alphabet, letters in ALPHABETS.items() for split in SPLITS}


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
        np.savez_compressed(temporary, **data)
        os.replace(temporary, path)
    except OSError:
        pass  # a read-only home costs a second at each start, nothing else
    return data


def pooled(images, shifts):
    """[C, E, 16, 16] uint8 -> [C, E * shifts^2, 64] float32 in [0, 1]: 2x2 means of copies moved by each pair of shifts."""
    moved = np.concatenate([np.roll(images, (i, j), (2, 3)) for i in shifts for j in shifts], 1)
    return np.float32(moved.reshape(*moved.shape[:2], 8, 2, 8, 2).mean((3, 5)).reshape(*moved.shape[:2], 64) / 255)


# ---------------------------------------------------------------- the mlp family

ACTIVATIONS = (jax.nn.relu, jnp.tanh, jax.nn.silu, lambda x: jax.nn.leaky_relu(x, 0.2))


class MLPTask(NamedTuple):
    classes: jax.Array      # [10] int, rows of the letters
    depth: jax.Array        # hidden layers
    widths: jax.Array       # [max_depth] units of each hidden layer
    activation: jax.Array   # index into ACTIVATIONS
    batch_size: jax.Array
    init_scale: jax.Array   # standard deviation of a weight times sqrt(its fan-in)
    input_scale: jax.Array
    input_noise: jax.Array  # standard deviation, fresh in every batch of every split; ink is 1, paper 0
    label_noise: jax.Array  # probability that a training example is filed for good under a wrong class


def mlp(alphabet="meta_train", max_depth=2, max_width=32, max_batch=64, num_classes=10):
    """Classification of 8x8 letters by fully connected nets (P2's and TaskSet's `mlp`, with P1's disjoint classes).

    Every task draws its own letters, depth, widths, activation, batch size, scales of initialisation and input, and
    noise on inputs and labels. The alphabet's mean training image is taken off all images. Loss: mean cross-entropy in
    nats. Batch: images [B, 64], labels [B], weights [B]; the weights mask what exceeds the task's batch size (training
    only: the other splits always use all of max_batch).
    """
    images = {split: pooled(letters()[f"{alphabet}/{split}"], shifts=(-1, 0, 1) if split == "train" else (0,))
              for split in SPLITS}
    mean = images["train"].mean((0, 1))
    images = {split: jnp.asarray(x - mean) for split, x in images.items()}  # [C, E, 64]
    weights = 64 * max_width + (max_depth - 1) * max_width ** 2 + max_width * num_classes
    rng = np.random.default_rng(0)
    noise = jnp.asarray(rng.standard_normal((4096, 64)), jnp.float32)  # drawn once: indexing is cheaper than drawing
    examples = images["train"].shape[1]
    luck = jnp.asarray(rng.uniform(size=(num_classes, examples)), jnp.float32)  # example is mislabelled if luck < label_noise
    wrong = jnp.asarray(rng.integers(1, num_classes, (num_classes, examples)))  # ... by this many classes

    def sample(key):
        class_key, key = jax.random.split(key)
        u = iter(jax.random.uniform(key, (8 + max_depth,)))  # one call for all: a random call is slow to compile
        between = lambda low, high: low * (high / low) ** next(u)  # log-uniform
        return MLPTask(
            classes=jax.lax.top_k(jax.random.uniform(class_key, (images["train"].shape[0],)), num_classes)[1],
            depth=1 + (max_depth * next(u)).astype(int),
            widths=jnp.stack([jnp.round(between(8, max_width)) for _ in range(max_depth)]).astype(int),
            activation=(len(ACTIVATIONS) * next(u)).astype(int),
            batch_size=jnp.round(between(8, max_batch)).astype(int),
            init_scale=between(0.5, 2.0),
            input_scale=between(0.5, 2.0),
            input_noise=jnp.maximum(0, 0.6 * next(u) - 0.3),  # half of the tasks have none
            label_noise=jnp.maximum(0, 0.6 * next(u) - 0.3))

    def shapes(task):
        """(rows, real rows, columns, real columns) of every layer's weights; a layer beyond the depth has no real ones."""
        rows, real_rows = 64, 64
        for i in range(max_depth):
            real = jnp.where(i < task.depth, task.widths[i], 0)
            yield rows, real_rows, max_width, real
            rows, real_rows = max_width, jnp.where(i < task.depth, task.widths[i], real_rows)
        yield rows, real_rows, num_classes, num_classes

    def init(task, key):
        draws, params = jax.random.normal(key, (weights,)), {}
        for i, (rows, real_rows, columns, real_columns) in enumerate(shapes(task)):
            real = (jnp.arange(rows)[:, None] < real_rows) & (jnp.arange(columns)[None] < real_columns)
            draw, draws = draws[:rows * columns].reshape(rows, columns), draws[rows * columns:]
            params[f"w{i}"] = jnp.where(real, draw * task.init_scale / jnp.sqrt(real_rows), 0.0)
            params[f"b{i}"] = jnp.zeros(columns)
        return params

    def batch(task, key, split):
        u = jax.random.uniform(key, (3, max_batch))  # one call: random numbers are a good part of a small step
        y, e, n = (u * np.float32([[num_classes], [images[split].shape[1]], [len(noise)]])).astype(int)
        x = images[split][task.classes[y], e] + task.input_noise * noise[n]  # [B, 64]
        if split != "train":
            return x * task.input_scale, y, jnp.ones(max_batch)
        y = jnp.where(luck[y, e] < task.label_noise, (y + wrong[y, e]) % num_classes, y)
        return x * task.input_scale, y, (jnp.arange(max_batch) < task.batch_size).astype(jnp.float32)

    def loss(task, params, batch):
        x, y, weight = batch
        for i in range(max_depth):
            h = x @ params[f"w{i}"] + params[f"b{i}"][None]
            h = jax.lax.select_n(task.activation, *(f(h) for f in ACTIVATIONS))
            h = jnp.where(jnp.arange(max_width)[None] < task.widths[i], h, 0.0)
            x = h if i == 0 else jnp.where(i < task.depth, h, x)  # a layer beyond the depth is skipped
        logits = x @ params[f"w{max_depth}"] + params[f"b{max_depth}"][None]  # [B, 10]
        nll = -jnp.vecdot(jax.nn.one_hot(y, num_classes), jax.nn.log_softmax(logits))
        return jnp.sum(weight * nll) / jnp.sum(weight)

    return TaskFamily("mlp", sample, init, batch, loss)
