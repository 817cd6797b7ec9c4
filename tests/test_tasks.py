"""Every family: its tasks, its padding, its loss against plain numpy; and its data."""
import functools
import itertools
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random, tree

import data
import kinds
import machine
import model
import parts
import settings
import tasks

LETTERS = "03b9d407d8b1b8182d2d1a16deb63409de266572a374cfb5dc229099d3808417"
TEXTS = "3824de479e62b47a35f377f9755c5be09ec322e54197739f0e1598e680171231"
N = 32
rows = lambda arrays, index: tree.map(lambda x: x[index], arrays)
each_family = pytest.mark.parametrize("name", tasks.FAMILIES)


def start(family, key):
    keys = random.split(key, 3)
    task = family.sample(keys[0])
    return task, family.init(task, keys[1]), family.batch(task, keys[2], "train")


@functools.cache
def drawn(name):
    """N tasks, their parameters, their batches."""
    begin = functools.partial(start, tasks.FAMILIES[name]())
    return jax.jit(jax.vmap(begin))(random.split(random.key(0), N))


@functools.cache
def slopes(name):
    """Jitted f(tasks, params, batches) -> (losses, gradients), their derivatives along a line."""
    def slope(task, params, batch):
        loss = functools.partial(tasks.FAMILIES[name]().loss, task, batch=batch)
        return jax.jvp(jax.value_and_grad(loss), (params,), (tree.map(jnp.ones_like, params),))
    return jax.jit(jax.vmap(slope))


@each_family
def test_tasks_differ_but_not_those_of_one_key_and_the_held_out_pool_has_other_data(name):
    def program(family):  # all its data stand in it
        return jax.jit(functools.partial(start, family)).lower(random.key(0)).as_text()
    task, make = drawn(name)[0], tasks.FAMILIES[name]
    assert program(make.__wrapped__()) == program(make()) != program(make("held_out"))
    flat = np.concatenate([np.float64(x).reshape(N, -1) for x in task.values()], 1)
    assert len(np.unique(flat, axis=0)) == N
    letters = np.ndim(task.get("classes")) == 2
    assert not letters or all(len(set(row.tolist())) == 10 for row in task["classes"])


def padding(params):
    """Masks of what must not matter: weights that begin at zero, and the biases behind them."""
    masks = {k: np.array(x) == 0 for k, x in params.items()}
    return {k: masks[k[:-2]].all(1) if k.endswith("/b") else mask for k, mask in masks.items()}


@each_family
def test_padding_changes_no_loss_and_no_gradient_and_two_derivatives_are_finite(name):
    (task, params, batch), masks = drawn(name), padding(drawn(name)[1])
    assert 0.1 < np.mean(np.concatenate([mask.ravel() for mask in masks.values()])) < 0.9
    noisy = {k: jnp.where(masks[k], 7.0, p) for k, p in params.items()}
    zeros = tree.map(jnp.zeros_like, params)
    found, other, flat = (slopes(name)(task, p, batch) for p in (params, noisy, zeros))
    assert all(np.isfinite(x).all() for x in tree.leaves((found, flat)))
    tree.map(np.testing.assert_array_equal, found[0], other[0])
    for k, mask in masks.items():
        assert (np.array(found[0][1][k])[mask] == 0).all()


sigmoid = lambda x: 1 / (1 + np.exp(-x))
ACTIVATIONS = (lambda x: np.maximum(x, 0), np.tanh, lambda x: x * sigmoid(x),
               lambda x: np.where(x > 0, x, 0.2 * x))


def nll(logits, y):
    picked = np.take_along_axis(logits, y[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - picked


def plain_mlp(task, p, batch):
    x, y, real = batch
    for i in range(task["depth"]):
        x = ACTIVATIONS[task["activation"]](x @ p[f"w{i}"] + p[f"w{i}/b"])
    return nll(x @ p["out"] + p["out/b"], y)[real].mean()


plain_wide = plain_mlp


def plain_table(task, p, batch):
    x, y, target, real = batch
    for i in range(task["depth"]):
        x = ACTIVATIONS[task["activation"]](x @ p[f"w{i}"] + p[f"w{i}/b"])
    out = x @ p["out"] + p["out/b"]
    losses = nll(out[:, :task["classes"]], y)
    return (0.5 * (out[:, 0] - target) ** 2 if task["regression"] else losses)[real].mean()


def plain_conv(task, p, batch):
    x, y, real = batch
    act = ACTIVATIONS[task["activation"]]
    one, two = ((2, 1), (1, 2), (2, 2))[task["strides"]] if task["depth"] == 2 else (2, 1)
    h = x.reshape(-1, 8, 8, 1)
    for name, stride in (("w0", one), ("w1", two))[:task["depth"]]:
        w = np.float32(p[name]).reshape(3, 3, h.shape[3], 8)
        h = act(np.float64(jax.lax.conv_general_dilated(
            np.float32(h), w, (stride, stride), [(1, 2 - stride)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"))) + p[f"{name}/b"])
    w = p["out"].reshape(4, 4, 8, 10)[::4 // h.shape[1], ::4 // h.shape[2]].reshape(-1, 10)
    h = (h.reshape(len(h), -1), h.mean((1, 2)), h.max((1, 2)))[task["head"]]
    return nll(h @ w[:h.shape[1]] + p["out/b"], y)[real].mean()


def plain_autoencoder(task, p, batch):
    x, draws, real = batch
    act, variational = ACTIVATIONS[task["activation"]], task["variational"]
    code = act(x @ p["in"] + p["in/b"]) @ p["encode"] + p["encode/b"]
    mean, deviation = code[:, :12], np.exp(code[:, 12:])
    z = mean + variational * deviation * draws
    out = act(z @ p["decode"] + p["decode/b"]) @ p["out"] + p["out/b"]
    out = (np.tanh(out), 2 * sigmoid(out) - 1, out)[task["output"]]
    error = np.abs(out - x / task["input_scale"]) ** (2 - task["absolute"])
    divergence = 0.5 * (mean ** 2 + deviation ** 2 - 1) - np.log(deviation)
    return (error.mean(1) + variational * 0.1 * divergence.sum(1) / 64)[real].mean()


def plain_rnn(task, p, batch):
    characters, real = batch
    losses, h, c = [], np.zeros((8, 16)), 0
    for t in range(16):
        a = np.split(p["embed"][characters[:, t]] @ p["x"] + p["x/b"], 4, 1)
        b = np.split(h @ p["h"], 4, 1)
        if task["core"] == 0:
            h = np.tanh(a[0] + b[0])
        elif task["core"] == 1:
            z = sigmoid(a[2] + b[2])
            h = (1 - z) * np.tanh(a[0] + sigmoid(a[1] + b[1]) * b[0]) + z * h
        else:
            c = sigmoid(a[1] + b[1] + 1) * c + sigmoid(a[2] + b[2]) * np.tanh(a[0] + b[0])
            h = sigmoid(a[3] + b[3]) * np.tanh(c)
        losses.append(nll(h @ p["out"] + p["out/b"], characters[:, t + 1]))
    return np.stack(losses, 1)[real].mean()


def plain_function(task, p, batch):
    n = task["size"].sum()
    x, axes, s = p["x"][:n], task["axes"][:n, :n], task["spectrum"][:n]
    np.testing.assert_allclose(axes @ axes.T, np.eye(n), atol=1e-5)
    np.testing.assert_allclose(s, task["condition"] ** -(np.arange(n) / (n - 1)), rtol=1e-4)
    y, waves = x - 2.903534, np.cos(2 * np.pi * x)
    value = (
        (100 * (x[1:] + 1 - (x[:-1] + 1) ** 2) ** 2 + x[:-1] ** 2).sum(),
        (0.5 * (y ** 4 - 16 * y ** 2 + 5 * y) + 39.16617).sum(),
        20 + np.e - 20 * np.exp(-0.2 * np.sqrt((x ** 2).mean())) - np.exp(waves.mean()),
        x[0] ** 2 + (x[1:] ** 2 / (x[:-1] ** 2 + 1)).sum(),
        np.log((np.exp(x) + np.exp(-x)).sum() / (2 * n)),
        0.5 * (s * (axes @ x) ** 2).sum(),
        (s * np.abs(axes @ x) ** task["power"]).sum())[task["kind"]]
    return task["scale"] * (np.log(1 + 100 * value) if task["log"] else value)


@pytest.mark.parametrize("name, varied, values", [
    ("mlp", "activation", 4), ("wide", "depth", 2), ("conv", "strides", 3), ("rnn", "core", 3),
    ("autoencoder", "output", 3), ("function", "kind", 7), ("table", "regression", 2)])
def test_the_loss_against_plain_numpy(name, varied, values):
    task, params, batch = drawn(name)
    shaken = {k: params[k] + 0.3 * ~mask for k, mask in padding(params).items() if k[-2:] == "/b"}
    arrays = task, params | shaken, batch
    (found, _), _ = slopes(name)(*arrays)
    exact = tree.map(lambda x: np.float64(x) if x.dtype == np.float32 else np.array(x), arrays)
    for i in range(N):
        plain = globals()[f"plain_{name}"](*rows(exact, i))
        scale = task["scale"][i] if name == "function" else 1
        np.testing.assert_allclose(found[i], plain, rtol=2e-4, atol=1e-6 * scale)
    assert len(set(task[varied].tolist())) == values


def test_a_validation_loss_comes_at_every_tenth_step():
    def keep(grads, state, params, loss, valid_loss):
        return tree.map(jnp.zeros_like, grads), jnp.stack([loss, valid_loss])
    (task, params, _), family = rows(drawn("mlp"), 0), tasks.mlp()
    told = model.Optimizer(None, keep)
    inner = tasks.Inner(params, jnp.zeros(2), jnp.int32(0))
    step = jax.jit(lambda inner, key: tasks.inner_step(family, told, task, inner, key))
    losses = [family.loss(task, params, family.batch(task, key, split))
              for key, split in zip(random.split(random.key(7)), ("train", "inner_valid"))]
    for t in range(21):
        inner = step(inner, random.key(7))
        expected = [losses[0], losses[1] if t in (0, 10, 20) else np.nan]
        np.testing.assert_allclose(inner.opt_state, expected, rtol=1e-5)


def test_splits_share_no_font_and_alphabets_no_letter_and_each_letter_has_ink():
    make = runpy.run_path(str(data.CORPUS / "make.py"))
    fonts = [font for split in data.SPLITS for font in make["FONTS"][split].split()]
    both = "".join(make["ALPHABETS"].values())
    assert len(fonts) == len(set(fonts)) == 16 and len(set(both)) == len(both)
    for name, images in data.letters().items():
        alphabet, split = name.split("/")
        number = len(make["ALPHABETS"][alphabet]), 8 * len(make["FONTS"][split].split())
        assert images.shape == (*number, 16, 16) and images.mean((2, 3)).min() > 2


def test_batches_come_from_their_split_with_the_tasks_noise():
    batch, none = jax.jit(tasks.mlp().batch, static_argnums=2), jnp.float32(0)
    task = rows(drawn("mlp")[0], 5) | dict(
        batch_size=parts.first(13, 64), input_noise=none, label_noise=none)
    noisy, wrong = task | dict(input_noise=none + 0.2), task | dict(label_noise=none + 0.25)
    for split in data.SPLITS:  # train comes first
        shifts = (-1, 0, 1) if split == "train" else (0,)
        images = np.concatenate([np.roll(data.letters()[f"meta_train/{split}"], (i, j), (2, 3))
                                 for i in shifts for j in shifts], 1)
        images = images.reshape(*images.shape[:2], 8, 2, 8, 2).mean((3, 5)) / 255
        mean = images.mean((0, 1)) if split == "train" else mean
        images = (images - mean)[task["classes"]] * task["input_scale"]
        x, y, real = batch(task if split == "train" else wrong, random.key(3), split)
        for i in range(5):
            distance = np.abs(images[y[i]].reshape(-1, 64) - x[i][None]).max(1)
            assert distance.min() < 1e-4  # a grey level is 0.004
        assert real.sum() == (13 if split == "train" else 64)
    many = jax.vmap(lambda task, key: batch(task, key, "train")[:2], (None, 0))
    (x, y), (x1, y1), (x2, y2) = (
        [np.array(a).reshape(300 * 64, -1) for a in many(t, random.split(random.key(0), 300))]
        for t in (task, noisy, wrong))
    np.testing.assert_allclose((x1 - x).std(), 0.2 * task["input_scale"], rtol=0.02)
    assert (y1 == y).all() and (x2 == x).all() and abs((y2 != y).mean() - 0.25) < 0.05
    examples = [(label.item(), image.tobytes()) for label, image in zip(y, x)]
    filed = dict(zip(examples, y2[:, 0]))
    assert [filed[example] for example in examples] == y2[:, 0].tolist()  # for good


def distinct(batch, task, split):
    """What many batches of a task hold: the set of their rows."""
    found = jax.vmap(lambda key: batch(task, key, split))(random.split(random.key(1), 100))
    flat = [np.array(x).reshape(100 * len(x[0]), -1) for x in found]
    return {row.tobytes() for row in np.concatenate([np.float32(x) for x in flat], 1)}


def test_few_examples_are_all_that_is_seen_in_training_and_validating():
    family = settings.make_family(settings.Settings(few=0.5), "mlp")
    many = jax.vmap(family.sample)(random.split(random.key(0), 400))
    fraction = many["fraction"]
    assert 0.4 < (fraction == 1).mean() < 0.6 and 0.005 <= fraction.min() < 0.01
    other = np.stack([many["depth"], many["width0"].sum(1), many["init_scale"], many["offset"]])
    assert (np.abs(np.corrcoef(fraction, other)[0, 1:]) < 0.2).all()
    assert tasks.few_examples(tasks.mlp(), 0.0) is tasks.mlp()

    batch, none = jax.jit(family.batch, static_argnums=2), jnp.float32(0)
    task = rows(drawn("mlp")[0], 5) | dict(
        batch_size=parts.first(64, 64), input_noise=none, label_noise=none, offset=none + 0.3)
    few, fewest, all_of_them = (task | {"fraction": none + x} for x in (39.9 / 504, 2.9 / 504, 1))
    numbers = [len(distinct(batch, few, split)) for split in data.SPLITS]
    assert numbers[:2] == [400, 40] and min(numbers[2:]) > 200
    assert [len(distinct(batch, fewest, split)) for split in data.SPLITS[:2]] == [30, 10]
    assert len(distinct(batch, all_of_them, "train")) > 1000

    text = data.texts("meta_train")
    batch = jax.jit(lambda *given: tasks.rnn().batch(*given)[:1], static_argnums=2)
    task = rows(drawn("rnn")[0], 0) | dict(fraction=none + 1e-3, offset=none + 0.9995)
    assert 150 < len(distinct(batch, task, "train")) <= 0.001 * len(text["train"]) + 2
    assert len(distinct(batch, task, "outer_valid")) > 390


def test_tables_are_what_they_are_said_to_be():
    rng = np.random.default_rng(data.POOLS.index("meta_train"))
    own, both, luck = (rng.standard_normal((4096, n)) for n in (256, 4, 10))
    u = rng.uniform(size=4096)
    batch, task = jax.jit(tasks.table().batch, static_argnums=2), rows(drawn("table")[0], 1)
    plain = task | dict(kinds=jnp.zeros(256, int), inputs=parts.first(256, 256),
                        examples=jnp.float32(90.9), common=jnp.float32(0.6), luck=jnp.float32(0.5),
                        rare=jnp.float32(1.5), classes=jnp.int32(3), apart=jnp.float32(0),
                        centers=jnp.zeros((10, 256)), spread=jnp.ones(256))
    T, where = tree.map(np.float64, plain), {}
    shown = 0.4 ** 0.5 * own + 0.6 ** 0.5 * both @ T["loads"]
    says = np.tanh(T["bend"] * shown @ T["a"]) @ T["b"] - T["middle"] + 0.5 * luck
    for split in data.SPLITS:
        found = jax.vmap(lambda key: batch(plain, key, split))(random.split(random.key(1), 20))
        x, y, target = (np.array(a).reshape(20 * 64, -1) for a in found[:3])
        index = np.abs(np.clip(shown, -10, 10)[:, None, :3] - x[None, :, :3]).sum(-1).argmin(0)
        np.testing.assert_allclose(x, np.clip(shown, -10, 10)[index], atol=1e-4)
        np.testing.assert_allclose(target[:, 0], says[index, 0] / 1.25 ** 0.5, atol=1e-3)
        best = (says[index, :3] - [0, 0.75, 1.5]).argmax(1)
        assert (y[:, 0] == best).mean() > 0.999
        where[split] = set(index.tolist())
    assert [len(where[split]) for split in ("train", "inner_valid")] == [90, 9]
    assert sum(map(len, where.values())) == len(set().union(*where.values()))
    centers, group = 2 * np.eye(10, 256), (u ** 2.5 * 3).astype(int)
    around = plain | dict(
        apart=jnp.float32(2), centers=jnp.float32(centers), spread=jnp.full(256, 3.0))
    x, y, *_ = map(np.array, batch(around, random.key(0), "test"))
    near = (shown + centers[group]) / 3
    index = np.abs(near[:, None, :3] - x[None, :, :3]).sum(-1).argmin(0)
    assert (np.bincount(y) > 2).all() and y.tolist() == group[index].tolist()
    np.testing.assert_allclose(x, near[index], atol=1e-4)
    many = jax.jit(jax.vmap(tasks.table().sample))(random.split(random.key(2), 100))
    T = {k: np.float64(many[k])[many["apart"] > 0] for k in ("apart", "centers", "spread")}
    far = T["centers"].var(1).sum(1) * 10 / 9 / T["apart"] ** 2  # all columns, over what is said
    np.testing.assert_allclose(far.mean(), 1, rtol=0.05)
    squares = (T["centers"] ** 2).mean((0, 1)).sum(), (T["spread"] ** 2 - 1).mean(0).sum()
    np.testing.assert_allclose(*squares, rtol=0.1)
    kinds = jnp.arange(256) % 6
    whole = plain | dict(kinds=kinds, examples=jnp.float32(2700), common=jnp.float32(0))
    x = jax.vmap(lambda key: batch(whole, key, "train")[0])(random.split(random.key(1), 200))
    x = np.array(x).reshape(-1, 256)
    for i, size in enumerate((1, 0.95, 0.90, 1, 1, 0)):  # what is huge is cut off at 10
        mean, power = x[:, kinds == i].mean(), (x[:, kinds == i] ** 2).mean()
        assert abs(mean) < 0.03 and abs(power - size) < 0.05


def test_no_60_characters_in_a_row_are_in_two_pools_or_splits():
    where = {}
    for place in itertools.product(data.POOLS, data.SPLITS):
        text = data.texts(place[0])[place[1]]
        assert len(text) > 10000 and text.max() < len(data.SYMBOLS)
        for i in range(len(text) - 59):
            assert where.setdefault(text[i:i + 60].tobytes(), place) == place


@pytest.mark.parametrize("name, digest", [("letters", LETTERS), ("texts", TEXTS)])
def test_all_releases_have_the_same_data(name, digest):
    assert str(machine.digest(machine.read_npz(data.CORPUS / f"{name}.npz"))) == digest


@functools.cache
def of_kind(name):
    return start(kinds.KINDS[name](), random.key(0))


def test_kinds_by_batches_and_sizes():
    for name, count in (("one_example", 1), ("full_batch", 256)):
        family, (task, _, (x, _, real)) = kinds.KINDS[name](), of_kind(name)
        again, _, _ = family.batch(task, random.key(7), "train")
        assert real.sum() == count and (x == again).all() == (name == "full_batch")
        tests = [family.batch(task, random.key(i), "test")[0] for i in range(2)]
        assert (tests[0] != tests[1]).any()
    _, params, _ = of_kind("wide_and_deep")
    weights = sum(jnp.count_nonzero(x) for x in params.values())
    assert weights == 64 * 128 + 3 * 128 ** 2 + 128 * 10


def test_a_residual_net_is_one_of_convolutions(monkeypatch):
    monkeypatch.setattr(parts, "cross_entropy", lambda logits, *_: logits)
    task, params, (x, y, real) = of_kind("residual")

    def convolved(name, x, stride=1):
        kernel = params[name].reshape(3, 3, x.shape[-1], -1)
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"))

    h = convolved("in", x.reshape(-1, 8, 8, 1), 2)
    for i in range(2):
        h = h + convolved(f"block{i}/1", jax.nn.relu(convolved(f"block{i}/0", jax.nn.relu(h))))
    logits = jax.nn.relu(h).mean((1, 2)) @ params["out"]
    found = kinds.residual().loss(task, params, (x, y, real))
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)


def test_a_transformer_looks_back_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(parts, "cross_entropy", lambda logits, *_: logits)
    task, params, characters = of_kind("transformer")
    changed = characters.at[:, 5].add(1) % len(data.SYMBOLS)
    family = kinds.transformer()
    before, after = (np.array(family.loss(task, params, x)) for x in (characters, changed))
    moved = np.abs(before - after).max((0, 2)) > 1e-6
    assert moved.tolist() == [False] * 5 + [True] * 11
