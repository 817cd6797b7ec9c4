"""Every family: padding, vmap, sampling, training; and each family's loss against an independent computation."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
import tasks

FAMILIES = {name: make() for name, make in tasks.FAMILIES.items()}
each_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def family(name):
    return FAMILIES[name]


def start(family, key):
    task_key, key = jax.random.split(key)
    task = family.sample(task_key)
    return task, family.init(task, key)


@each_family
def test_a_thousand_tasks_differ_and_begin_finite(family):
    keys = jax.random.split(jax.random.key(0), 1000)

    @jax.jit
    @jax.vmap
    def first(key):
        key, batch_key = jax.random.split(key)
        task, params = start(family, key)
        return task, family.loss(task, params, family.batch(task, batch_key, "train"))

    sampled, losses = first(keys)
    assert np.isfinite(losses).all()
    rows = np.concatenate([np.float64(x).reshape(1000, -1) for x in jax.tree.leaves(sampled)], 1)
    assert len(np.unique(rows, axis=0)) == 1000
    again, _ = first(keys)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, sampled, again))


@each_family
def test_the_held_out_pool_has_other_data(name, family):
    held_out, key = tasks.FAMILIES[name]("held_out"), jax.random.key(0)
    mine, other = (f.batch(f.sample(key), key, "train") for f in (family, held_out))
    if name == "function":  # there the tasks themselves are the data
        mine, other = family.sample(key), held_out.sample(key)
    assert not jax.tree.all(jax.tree.map(jnp.array_equal, mine, other))


@each_family
def test_vmapped_training_equals_a_loop_over_tasks(family):
    adam, n = model.adam(0.01), 32

    def train(key):
        task_key, init_key, step_key = jax.random.split(key, 3)
        task = family.sample(task_key)
        inner = tasks.init_inner(family, adam, task, init_key)
        step = lambda inner, key: (tasks.inner_step(family, adam, task, inner, key), None)
        return jax.lax.scan(step, inner, jax.random.split(step_key, 2))[0].params

    keys = jax.random.split(jax.random.key(1), n)
    batched, one = jax.jit(jax.vmap(train))(keys), jax.jit(train)
    for i in range(n):
        # Adam's first steps have size 0.01 whatever the gradient: where rounding decides its sign, they differ
        far = [np.abs(batched[k][i] - x) > 1e-4 * (1 + np.abs(x)) for k, x in one(keys[i]).items()]
        assert np.mean(np.concatenate([x.ravel() for x in far])) < 1e-3


def padding(name, params):
    """Masks of the entries that must not matter: weights that begin at exactly zero, and the biases behind them."""
    masks = {k: np.array(x) == 0 for k, x in params.items()}
    biases = {"rnn": {"b": "x", "b_out": "out"}}.get(name, {k: f"w{k[1:]}" for k in params if k[0] == "b"})
    return masks | {b: masks[w].all(0) for b, w in biases.items()}


def real_weights(name, task):
    """How many weights a task has, by hand."""
    if name == "mlp":
        widths = [int(w) for w in task.widths[:int(task.depth)]]
        return sum(a * b for a, b in zip([64, *widths], [*widths, 10]))
    if name == "conv":
        (c, d), deep = map(int, task.channels), int(task.depth) == 2
        read = 1 if task.head else 4 if deep and task.strides == 2 else 16
        return 9 * c + deep * 9 * c * d + read * (d if deep else c) * 10
    if name == "autoencoder":
        w, c = int(task.width), int(task.code)
        return 64 * w + w * c * (1 + int(task.variational)) + c * w + w * 64
    if name == "rnn":
        w, e, n = int(task.width), int(task.embedding), len(tasks.SYMBOLS)
        return n * e + (e + w) * w * (1, 3, 4)[int(task.core)] + w * n
    return int(task.size)


@each_family
def test_perturbing_padding_changes_no_loss_and_no_gradient(name, family):
    value = jax.jit(jax.value_and_grad(family.loss, argnums=1))
    for i in range(8):
        task, params = start(family, jax.random.key(i))
        batch = family.batch(task, jax.random.key(i), "train")
        masks = padding(name, params)
        matrices = [k for k in params if k[0] != "b"]
        assert sum(int((~masks[k]).sum()) for k in matrices) == real_weights(name, task)
        loss, grads = value(task, params, batch)
        noisy_loss, noisy_grads = value(task, {k: jnp.where(masks[k], 7.0, p) for k, p in params.items()}, batch)
        assert loss == noisy_loss
        for k in params:
            np.testing.assert_array_equal(grads[k], noisy_grads[k])
            assert (np.array(grads[k])[masks[k]] == 0).all()


@each_family
def test_adam_lowers_the_loss(name, family):
    rates = jnp.float32([1e-2, 1e-1])

    def curve(key, rate):
        task_key, init_key, key, test_key = jax.random.split(key, 4)
        task = family.sample(task_key)
        begin = tasks.init_inner(family, model.adam(rate), task, init_key)
        step = lambda inner, key: (tasks.inner_step(family, model.adam(rate), task, inner, key), None)
        end, _ = jax.lax.scan(step, begin, jax.random.split(key, 40))
        batch = family.batch(task, test_key, "test")
        return family.loss(task, end.params, batch) / family.loss(task, begin.params, batch)

    keys = jax.random.split(jax.random.key(3), 10)
    ratios = jax.jit(jax.vmap(jax.vmap(curve, (None, 0)), (0, None)))(keys, rates).min(1)  # [tasks], at the best rate
    assert (ratios < 1).sum() >= 9


ACTIVATIONS = (lambda x: np.maximum(x, 0), np.tanh, lambda x: x / (1 + np.exp(-x)), lambda x: np.where(x > 0, x, 0.2 * x))
sigmoid = lambda x: 1 / (1 + np.exp(-x))


def nll(logits, y):
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, y[..., None], -1)[..., 0]


def plain_conv(task, p, batch):
    x, y, weight = batch
    conv = lambda x, i, stride: np.float64(jax.lax.conv_general_dilated(
        x, p[f"w{i}"].reshape(3, 3, -1, 8).astype(np.float32), (stride, stride), ((1, 1), (1, 1)) if stride == 1 else ((1, 0), (1, 0)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"))) + p[f"b{i}"]
    act, first = ACTIVATIONS[task.activation], np.float32(x.reshape(-1, 8, 8, 1))
    a, b = ((2, 1), (1, 2), (2, 2))[task.strides] if task.depth == 2 else (2, 1)
    h = act(conv(first, 0, a))
    if task.depth == 2:
        h = act(conv(np.float32(h), 1, b))
    places = h.reshape(len(h), -1, 8)
    if task.head:
        logits = (places.mean(1) if task.head == 1 else places.max(1)) @ p["w2"][:8] + p["b2"]
    else:
        w = p["w2"].reshape(4, 4, 8, 10)[::4 // h.shape[1], ::4 // h.shape[2]]
        logits = h.reshape(len(h), -1) @ w.reshape(-1, 10) + p["b2"]
    return np.average(nll(logits, y), weights=weight)


def plain_autoencoder(task, p, batch):
    x, draws, weight = batch
    act, c = ACTIVATIONS[task.activation], int(task.code)
    code = act(x @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"]
    mean, deviation = code[:, :c], np.exp(code[:, 12:12 + c])
    z = mean + (deviation * draws[:, :c] if task.variational else 0)
    out = act(z @ p["w2"][:c] + p["b2"]) @ p["w3"] + p["b3"]
    out = (np.tanh, lambda x: 2 * sigmoid(x) - 1, lambda x: x)[task.output](out)
    error = out - x / task.letters.input_scale
    error = (np.abs(error) if task.absolute else error ** 2).mean(1)
    if task.variational:
        error += 0.1 * (0.5 * (mean ** 2 + deviation ** 2 - 1) - np.log(deviation)).sum(1) / 64
    return np.average(error, weights=weight)


def plain_rnn(task, p, batch):
    characters, weight = batch
    w, losses = int(task.width), 0.0
    h, c = np.zeros((2, len(characters), w))
    gate = lambda i, m: m[..., 16 * i:16 * i + w]
    for t in range(int(task.length)):
        x = p["embed"][characters[:, t]]
        a, b = ([gate(i, v) for i in range(4)] for v in (x @ p["x"] + p["b"], h @ p["h"][:w]))
        if task.core == 0:
            h = np.tanh(a[0] + b[0])
        elif task.core == 1:
            z = sigmoid(a[2] + b[2])
            h = (1 - z) * np.tanh(a[0] + sigmoid(a[1] + b[1]) * b[0]) + z * h
        else:
            c = sigmoid(a[1] + b[1] + 1) * c + sigmoid(a[2] + b[2]) * np.tanh(a[0] + b[0])
            h = sigmoid(a[3] + b[3]) * np.tanh(c)
        losses += (nll(h @ p["out"][:w] + p["b_out"], characters[:, t + 1]) * weight[:, t]).sum()
    return losses / weight.sum()


def plain_mlp(task, p, batch):
    x, y, weight = batch
    for i in range(int(task.depth)):
        x = ACTIVATIONS[task.activation](x @ p[f"w{i}"] + p[f"b{i}"]) * (np.arange(32) < task.widths[i])
    return np.average(nll(x @ p["w2"] + p["b2"], y), weights=weight)


def plain_function(task, p, batch):
    n = int(task.size)
    x, axes, s = p["x"][:n], task.axes[:n, :n], task.spectrum[:n]
    np.testing.assert_allclose(axes @ axes.T, np.eye(n), atol=1e-5)
    turned = axes @ x
    value = (lambda: sum(100 * (x[i + 1] + 1 - (x[i] + 1) ** 2) ** 2 + x[i] ** 2 for i in range(n - 1)),
             lambda: sum(0.5 * (y ** 4 - 16 * y ** 2 + 5 * y) + 39.16617 for y in x - 2.903534),
             lambda: 20 + np.e - 20 * np.exp(-0.2 * np.sqrt((x ** 2).mean())) - np.exp(np.cos(2 * np.pi * x).mean()),
             lambda: x[0] ** 2 + sum(x[i] ** 2 / (x[i - 1] ** 2 + 1) for i in range(1, n)),
             lambda: np.log((np.exp(x) + np.exp(-x)).sum() / (2 * n)),
             lambda: 0.5 * (s * turned ** 2).sum(),
             lambda: (s * np.abs(turned) ** task.power).sum())[task.kind]()
    return task.scale * (np.log(1 + 100 * value) if task.log else value)


@each_family
def test_the_loss_against_a_plain_computation(name, family):
    seen, loss = set(), jax.jit(family.loss)
    for i in range(24):
        task, params = start(family, jax.random.key(100 + i))
        params = {k: p + 0.3 * (np.array(~padding(name, params)[k]) if k[0] == "b" else 0) for k, p in params.items()}
        batch = family.batch(task, jax.random.key(i), "train")
        as_numpy = lambda tree: jax.tree.map(lambda x: np.array(x) if jnp.issubdtype(x.dtype, jnp.integer) else np.float64(x), tree)
        plain = globals()[f"plain_{name}"](as_numpy(task), as_numpy(params), as_numpy(batch))
        np.testing.assert_allclose(loss(task, params, batch), plain, rtol=2e-4, atol=1e-6 * float(getattr(task, "scale", 1)))
        seen.add(int(getattr(task, {"conv": "strides", "autoencoder": "output", "rnn": "core", "function": "kind"}.get(name, "activation"))))
    assert len(seen) == {"mlp": 4, "function": 7}.get(name, 3)


def test_noise_and_sparsity_of_a_function_are_in_its_training_gradient_alone():
    family, slope = FAMILIES["function"], jax.jit(jax.value_and_grad(tasks.function().loss, argnums=1))
    task, params = start(family, jax.random.key(0))
    task = task._replace(size=jnp.int32(64), noise=jnp.float32(0.5), scale=jnp.float32(3), sparsity=jnp.float32(0.4))
    exact, clean = slope(task, params, family.batch(task, jax.random.key(0), "test"))
    noise, alive = [], []
    for i in range(50):
        batch = family.batch(task, jax.random.key(i), "train")
        value, noisy = slope(task, params, batch)
        assert abs(value - exact) <= 1e-5 * abs(exact)
        gone = np.array(noisy["x"]) == 0
        alive.append(~gone)
        noise.append(np.array(noisy["x"] - clean["x"])[~gone])
    np.testing.assert_allclose(np.mean(alive), 0.6, atol=0.03)
    np.testing.assert_allclose(np.concatenate(noise).std(), 0.5 * 3, rtol=0.05)
