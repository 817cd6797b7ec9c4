"""All tensors as one row, those of one shape side by side, so that one program serves them all."""
import collections

import jax.numpy as jnp
import numpy as np
from jax import tree
from jax.flatten_util import ravel_pytree


def in_order(params):
    """-> (all numbers [n], those of tensors of one shape side by side; the tensors' shapes; f: such
    a row -> a tree like params)."""
    tensors, treedef = tree.flatten(params)
    order = sorted(range(len(tensors)), key=lambda i: tensors[i].shape)
    numbers, unravel = ravel_pytree([tensors[i] for i in order])

    def back(numbers):
        found = unravel(numbers)
        return treedef.unflatten([found[i] for i in np.argsort(order)])

    return numbers, [tensors[i].shape for i in order], back


def sizes(shapes):
    return np.array([int(np.prod(shape)) for shape in shapes], np.int32)


def by_shape(x, shapes, entries=None):
    """[..., n] -> a list, for each shape, of its tensors' parts, [..., count, size]. Of what each
    tensor has one of, entries=1: [..., tensors] -> [..., count, 1]."""
    counts = collections.Counter(shapes).items()
    sides = [(count, entries or int(np.prod(shape))) for shape, count in counts]
    ends = np.cumsum([count * size for count, size in sides])
    parts = jnp.split(x, ends[:-1], -1)
    return [part.reshape(*x.shape[:-1], *side) for part, side in zip(parts, sides)]


def row(parts):
    """The way back: a list of [..., count, size] -> [..., n]."""
    return jnp.concatenate([x.reshape(*x.shape[:-2], -1) for x in parts], -1)


def each(x, shapes):
    """What is the same for all tensors: [F] -> [F, tensors]."""
    return jnp.tile(x[:, None], (1, len(shapes)))


def mean(x):
    """Over the last axis; 0 where that is empty. On CPUs a product is faster than a sum."""
    n = x.shape[-1]
    return x @ np.full(n, 1 / max(n, 1), np.float32)


def spread(x, n):
    """[...] -> [..., n], all alike: going backward it is such a product, too."""
    return x[..., None] @ np.ones((1, n), np.float32)


def per_tensor(parts):
    """Means over each tensor's parameters: [F, count, size] of each shape -> [F, tensors]."""
    return jnp.concatenate([mean(part) for part in parts], -1)
