"""Kinds of task that nothing here is ever meta-trained on: `python evaluate.py --family NAME`."""
import jax.numpy as jnp
from jax import nn, random, tree

import data
import parts
import tasks


def fixed(name, family, **values):
    """The family under another name, with these entries the same in all of its tasks."""
    def sample(key):
        return family.sample(key) | values

    return family._replace(name=name, sample=sample)


def wide_and_deep():
    """Nets beyond what meta-training saw: four hidden layers of 128 units."""
    family = tasks.mlp("held_out", max_depth=4, max_width=128)
    widths = {f"width{i}": parts.first(128, 128) for i in range(4)}
    return fixed("wide_and_deep", family, depth=jnp.int32(4), **widths)


def one_example():
    """Batches of a single training example."""
    return fixed("one_example", tasks.mlp("held_out"), batch_size=parts.first(1, 64))


def full_batch():
    """256 training examples, all in every batch: gradients without noise, and soon overfitted."""
    family = tasks.mlp("held_out", max_batch=256)
    family = fixed("full_batch", family, batch_size=parts.first(256, 256))

    def batch(task, key, split):
        key = random.key(0) if split == "train" else key
        return family.batch(task, key, split)

    return family._replace(batch=batch)


def residual(channels=12, blocks=2, max_batch=32):
    """Letters by a residual net of 3x3 convolutions, the mean over all positions, a linear head."""
    sample, batch = tasks.letter_tasks("held_out", max_batch, dict(
        batch_size=parts.size(max_batch / 8, max_batch),
        **tasks.LETTERS))
    layers = {"in": (9, channels), "out": (channels, tasks.CLASSES)}
    for i in range(blocks):
        layers[f"block{i}/0"] = layers[f"block{i}/1"] = 9 * channels, channels

    def init(task, key):
        return parts.padded(key, 1.0, layers)

    def loss(task, params, batch):
        x, y, real = batch

        def convolve(name, x, stride=1):
            return parts.dense(params, name, parts.patches(x, stride))

        h = convolve("in", x.reshape(-1, 8, 8, 1), stride=2)  # [B, 4, 4, channels]
        for i in range(blocks):
            inside = convolve(f"block{i}/0", nn.relu(h))
            h = h + convolve(f"block{i}/1", nn.relu(inside))
        logits = parts.dense(params, "out", jnp.mean(nn.relu(h), (1, 2)))
        return parts.cross_entropy(logits, y, real)

    return tasks.TaskFamily("residual", sample, init, batch, loss)


def transformer(width=24, length=16, max_batch=8):
    """Character-level language modelling by a block of causal attention and a feed-forward layer.

    Their inputs, and the last layer's, are normalised. Batch: characters [B, length + 1] int.
    """
    text = tree.map(jnp.asarray, data.texts("held_out"))
    n = len(data.SYMBOLS)
    square = width, width
    layers = {
        "embed": (n, width),
        "place": (length, width),
        "query": square,
        "key": square,
        "value": square,
        "mix": square,
        "up": (width, 4 * width),
        "down": (4 * width, width),
        "out": (width, n)}

    def init(task, key):
        params = parts.padded(key, 1.0, layers)
        params = {name: params[name] for name in layers}  # no biases
        return params | {"embed": jnp.sqrt(n) * params["embed"]}  # it is indexed

    def batch(task, key, split):
        start = random.randint(key, (max_batch, 1), 0, len(text[split]) - length)
        return text[split][start + jnp.arange(length + 1)[None]]

    def loss(task, params, characters):
        h = params["embed"][characters[:, :-1]] + params["place"][None]  # [B, length, width]
        x = nn.standardize(h)

        def project(name):
            return (x @ params[name]).reshape(max_batch, length, 2, -1)  # two heads

        mixed = nn.dot_product_attention(
            project("query"),
            project("key"),
            project("value"),
            is_causal=True)
        h = h + mixed.reshape(h.shape) @ params["mix"]
        x = nn.relu(nn.standardize(h) @ params["up"])
        h = h + x @ params["down"]
        logits = nn.standardize(h) @ params["out"]
        return parts.cross_entropy(logits, characters[:, 1:])

    return tasks.TaskFamily("transformer", lambda key: (), init, batch, loss)


KINDS = {f.__name__: f for f in (wide_and_deep, one_example, full_batch, residual, transformer)}
