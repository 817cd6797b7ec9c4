"""What task families are made of: ranges that a task draws from, and layers with padding."""
import jax.numpy as jnp
import numpy as np
from jax import lax, nn, random

# ---------------------------------------------------------------- ranges of what a task draws

def uniform(low, high):
    return lambda u: low + (high - low) * u


def log_uniform(low, high):
    return lambda u: low * (high / low) ** u


def first(n, most):
    """A mask of the first n of `most`."""
    return jnp.arange(most) < n


def size(low, high):
    """Log-uniform and rounded, as a mask: so many of `high` are real, the others padding."""
    value = log_uniform(low, high)
    return lambda u: first(jnp.round(value(u)), high)


def choice(n, lowest=0):
    return lambda u: lowest + (n * u).astype(int)


def chance(probability):
    return lambda u: u < probability


def often_zero(value):
    """Zero in half of the tasks."""
    return lambda u: jnp.where(u < 0.5, 0.0, value(2 * u - 1))


def draw(key, ranges):
    """{name: range} -> {name: range(u)}, u uniform in [0, 1)."""
    u = random.uniform(key, (len(ranges),))
    return {name: ranges[name](x) for name, x in zip(ranges, u)}


# ---------------------------------------------------------------- layers

ACTIVATIONS = (nn.relu, jnp.tanh, nn.silu, lambda x: nn.leaky_relu(x, 0.2))
ACTIVATION = choice(len(ACTIVATIONS))
SCALE = log_uniform(0.5, 2.0)


def masked(real, x):
    """x where it is real, else 0."""
    return jnp.where(jnp.broadcast_to(real, x.shape), x, 0.0)


def padded(key, scale, layers):
    """{name: (rows, columns)} -> weights, as `name`, and biases, as `name/b`.

    Rows and columns are masks of what is real, or numbers where all are. Weights are normal of
    standard deviation scale / sqrt(real rows), and zero in the padding; biases are zero.
    """
    masks = {}
    for name, sides in layers.items():
        rows, columns = (first(n, n) if isinstance(n, int) else n for n in sides)
        masks[name] = jnp.outer(rows, columns)
    draws = random.normal(key, (sum(real.size for real in masks.values()),))
    params = {}
    for name, real in masks.items():
        w, draws = jnp.split(draws, [real.size])
        fan_in = jnp.max(jnp.sum(real, 0), initial=1)
        w = w.reshape(real.shape) * scale / jnp.sqrt(fan_in)
        params[name] = masked(real, w)
        params[f"{name}/b"] = jnp.zeros(real.shape[1])
    return params


def dense(params, name, x):
    """[..., rows] -> [..., columns]."""
    x = x @ params[name]
    return x + jnp.broadcast_to(params[f"{name}/b"], x.shape)


def hidden(task, params, name, x, real):
    """A dense layer with the task's activation; all are computed, for backprop through a branch
    costs more."""
    x = dense(params, name, x)
    return masked(real, lax.select_n(task["activation"], *(f(x) for f in ACTIVATIONS)))


def patches(x, stride):
    """The 3x3 neighbourhoods of every stride-th pixel: [B, H, W, C] -> [B, h, w, 9 C].

    Around the image are zeros. A convolution is then one matmul; XLA's own has a slow gradient
    inside a scan on a CPU.
    """
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        x[:, i:i + height:stride, j:j + width:stride]
        for i, j in np.ndindex(3, 3)]
    return jnp.concatenate(shifted, -1)


def cross_entropy(logits, y, real=None):
    """Mean over what is real, in nats: logits [..., C], y [...] int, real [...]."""
    labels = nn.one_hot(y, logits.shape[-1])
    losses = -jnp.vecdot(labels, nn.log_softmax(logits))
    return jnp.mean(losses, where=real)


def units(task, i):
    """Of hidden layer i; one beyond the depth has none."""
    return task[f"width{i}"] & (i < task["depth"])


def net_ranges(max_depth, max_width, max_batch):
    """What tasks with a fully connected net draw, of that many hidden layers at most."""
    return dict(
        depth=choice(max_depth, lowest=1),
        **{f"width{i}": size(8, max_width) for i in range(max_depth)},
        activation=ACTIVATION,
        batch_size=size(max_batch / 8, max_batch),
        init_scale=SCALE)


def deep_net(task, key, inputs, outputs, max_depth):
    """Parameters of a fully connected net of the task's depth and widths."""
    rows = units(task, 0)
    layers = {"w0": (inputs, rows)}
    for i in range(1, max_depth):
        layers[f"w{i}"] = rows, units(task, i)
        rows = jnp.where(i < task["depth"], units(task, i), rows)
    layers["out"] = rows, outputs
    return padded(key, task["init_scale"], layers)


def through(task, params, x, max_depth):
    """What that net makes of x [B, inputs]."""
    x = hidden(task, params, "w0", x, units(task, 0))
    for i in range(1, max_depth):
        h = hidden(task, params, f"w{i}", x, units(task, i))
        x = jnp.where(i < task["depth"], h, x)
    return dense(params, "out", x)


# ---------------------------------------------------------------- recurrent cores

def vanilla(a, b, h, c):
    """-> the next h, c; a and b are what input and state give to each of up to four gates."""
    return jnp.tanh(a[0] + b[0]), c


def gru(a, b, h, c):
    _, reset, keep, _ = (nn.sigmoid(x + y) for x, y in zip(a, b))
    new = jnp.tanh(a[0] + reset * b[0])
    return (1 - keep) * new + keep * h, c


def lstm(a, b, h, c):
    new, keep, write, show = (x + y for x, y in zip(a, b))
    c = nn.sigmoid(keep + 1) * c + nn.sigmoid(write) * jnp.tanh(new)
    return nn.sigmoid(show) * jnp.tanh(c), c


CORES = vanilla, gru, lstm
GATES = 1, 3, 4  # that each of them has
