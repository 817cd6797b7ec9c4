"""The mlp family: padding leaks nothing, splits are disjoint, draws are deterministic."""
import jax
import jax.numpy as jnp
import numpy as np

import model
import tasks

FAMILY = tasks.mlp()


def small_task():
    """A task well below the family's maximum sizes, without noise."""
    task = FAMILY.sample(jax.random.key(5))
    letters = task.letters._replace(batch_size=jnp.int32(13), input_noise=jnp.float32(0), label_noise=jnp.float32(0))
    return task._replace(letters=letters, depth=jnp.int32(1), widths=jnp.int32([11, 9]), activation=jnp.int32(1))


def real(task, params):
    """The unpadded net inside a task's padded parameters, for depth 1."""
    width = int(task.widths[0])
    return {"w0": params["w0"][:, :width], "b0": params["b0"][:width], "w1": params["w2"][:width], "b1": params["b2"]}


def plain_loss(task, params, batch):
    """An independent tanh net of depth 1 on the batch's real examples."""
    x, y, _ = jax.tree.map(lambda a: a[:13], batch)  # the batch size of `small_task`
    logits = jnp.dot(jnp.tanh(jnp.dot(x, params["w0"]) + params["b0"][None]), params["w1"]) + params["b1"][None]
    logits = logits - logits.max(1, keepdims=True)
    return jnp.mean(jnp.log(jnp.exp(logits).sum(1)) - logits[jnp.arange(len(y)), y])


def test_adam_trains_the_padded_and_the_unpadded_net_identically():
    task, adam = small_task(), model.adam(0.01)
    inner = tasks.init_inner(FAMILY, adam, task, jax.random.key(0))
    params = real(task, inner.params)
    state = adam.init(params)
    step = jax.jit(lambda inner, key: tasks.inner_step(FAMILY, adam, task, inner, key))
    draw = jax.jit(lambda key: FAMILY.batch(task, jax.random.split(key)[0], "train"))

    @jax.jit
    def plain_step(params, state, batch):
        updates, state = adam.update(jax.grad(plain_loss, argnums=1)(task, params, batch), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for t in range(50):
        params, state = plain_step(params, state, draw(jax.random.key(t)))
        inner = step(inner, jax.random.key(t))
    assert inner.step == 50
    for k, p in params.items():
        np.testing.assert_allclose(real(task, inner.params)[k], p, atol=2e-5)


def test_a_validation_loss_comes_at_every_tenth_step():
    told = model.Optimizer(lambda params: jnp.zeros(2), lambda grads, state, params, loss, valid_loss: (grads, jnp.stack([loss, valid_loss])))
    task = small_task()
    inner = tasks.init_inner(FAMILY, told, task, jax.random.key(0))
    params = inner.params
    step = jax.jit(lambda inner, key: tasks.inner_step(FAMILY, told, task, inner, key))
    losses = [FAMILY.loss(task, params, FAMILY.batch(task, key, split))
              for key, split in zip(jax.random.split(jax.random.key(7)), ("train", "inner_valid"))]
    for t in range(21):
        inner = step(inner._replace(params=params), jax.random.key(7))
        np.testing.assert_allclose(inner.opt_state, losses if t in (0, 10, 20) else [losses[0], np.nan], rtol=1e-5)


def test_what_dead_units_cost_a_learned_optimizer():
    """Padding dilutes per-tensor statistics, so a learned optimizer's steps differ a little: bounded here, not hidden."""
    learned = model.hierarchical()
    theta = learned.init(jax.random.key(0))
    theta |= {"step/w": 0.05 * jax.random.normal(jax.random.key(2), theta["step/w"].shape)}
    optimizer, task = learned.optimizer(theta), small_task()
    inner = tasks.init_inner(FAMILY, optimizer, task, jax.random.key(0))
    params = real(task, inner.params)
    state, start = optimizer.init(params), params
    padded_step = jax.jit(lambda inner, key: tasks.inner_step(FAMILY, optimizer, task, inner, key))

    @jax.jit
    def plain_step(params, state, padded, step, key):
        batch_key, valid_key = jax.random.split(key)
        loss, grads = jax.value_and_grad(plain_loss, argnums=1)(task, params, FAMILY.batch(task, batch_key, "train"))
        valid = FAMILY.loss(task, padded, FAMILY.batch(task, valid_key, "inner_valid"))
        valid = jnp.where(step % 10 == 0, valid, jnp.nan)
        updates, state = optimizer.update(grads, state, params, loss=loss, valid_loss=valid)
        return jax.tree.map(jnp.add, params, updates), state

    for t in range(20):
        params, state = plain_step(params, state, inner.params, inner.step, jax.random.key(t))
        inner = padded_step(inner, jax.random.key(t))
    distance = lambda a, b: float(jnp.sqrt(sum(jnp.sum((a[k] - b[k]) ** 2) for k in a)))
    shift = distance(real(task, inner.params), params) / distance(params, start)
    assert 0 < shift < 0.3


def test_tasks_differ_are_deterministic_and_stay_in_range():
    many = jax.vmap(FAMILY.sample)(jax.random.split(jax.random.key(0), 500))
    again = jax.vmap(FAMILY.sample)(jax.random.split(jax.random.key(0), 500))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, many, again))
    assert len(np.unique(np.asarray(many.init_scale))) > 490
    assert set(np.unique(many.depth)) == {1, 2} and set(np.unique(many.activation)) == {0, 1, 2, 3}
    for x, low, high in ((many.widths, 8, 32), (many.letters.batch_size, 8, 64), (many.init_scale, 0.5, 2), (many.letters.input_noise, 0, 0.3)):
        assert x.min() >= low and x.max() <= high and x.max() - x.min() > 0.8 * (high - low)
    assert all(len(set(row)) == 10 for row in np.asarray(many.letters.classes))


def test_splits_share_no_font_and_alphabets_no_letter():
    fonts = [font for split in tasks.SPLITS for font in tasks.FONTS[split]]
    assert len(fonts) == len(set(fonts)) == 16
    assert not set(tasks.ALPHABETS["meta_train"]) & set(tasks.ALPHABETS["held_out"])
    assert all(len(set(letters)) == len(letters) for letters in tasks.ALPHABETS.values())
    for name, images in tasks.letters().items():
        alphabet, split = name.split("/")
        assert images.shape == (len(tasks.ALPHABETS[alphabet]), 8 * len(tasks.FONTS[split]), 16, 16)
        ink = images.reshape(*images.shape[:2], -1).mean(-1)
        assert ink.min() > 2


def test_batches_come_from_their_split_with_the_tasks_noise():
    task = small_task()
    clean = {split: FAMILY.batch(task, jax.random.key(3), split) for split in tasks.SPLITS}

    def pixels(split):
        drawn, shifts = tasks.letters()[f"meta_train/{split}"], (-1, 0, 1) if split == "train" else (0,)
        images = np.concatenate([np.roll(drawn, (i, j), (2, 3)) for i in shifts for j in shifts], 1)
        return images.reshape(*images.shape[:2], 8, 2, 8, 2).mean((3, 5)) / 255

    mean = pixels("train").mean((0, 1))
    for split, (x, y, weight) in clean.items():
        images = (pixels(split) - mean)[task.letters.classes]
        for i in range(5):
            match = np.abs(images[y[i]].reshape(-1, 64) * task.letters.input_scale - x[i][None]).max(1).min()
            assert match < 1e-4  # a grey level is 0.004
        assert weight.sum() == (13 if split == "train" else 64)
    noisy = task._replace(letters=task.letters._replace(input_noise=jnp.float32(0.2), label_noise=jnp.float32(0.25)))
    x, y, _ = jax.vmap(lambda k: FAMILY.batch(noisy, k, "train"))(jax.random.split(jax.random.key(0), 300))
    x0, y0, _ = jax.vmap(lambda k: FAMILY.batch(task, k, "train"))(jax.random.split(jax.random.key(0), 300))
    np.testing.assert_allclose((x - x0).std(), 0.2 * task.letters.input_scale, rtol=0.02)
    assert abs((y != y0).mean() - 0.25) < 0.05
    valid = FAMILY.batch(noisy, jax.random.key(0), "outer_valid")
    assert (valid[1] == FAMILY.batch(task, jax.random.key(0), "outer_valid")[1]).all()


def test_a_damaged_cache_is_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.matplotlib, "get_cachedir", lambda: str(tmp_path))
    tasks.letters.cache_clear()
    first = tasks.letters()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    tasks.letters.cache_clear()
    again = tasks.letters()
    tasks.letters.cache_clear()
    assert all((first[k] == again[k]).all() for k in first)
    assert np.load(path)["held_out/test"].shape == first["held_out/test"].shape


def test_no_page_of_text_is_in_two_pools_or_splits():
    symbols = np.array(list(tasks.SYMBOLS))
    parts = {(pool, split): "".join(symbols[x]) for pool in tasks.ALPHABETS for split, x in tasks.texts(pool).items()}
    for text in tasks.topics.topics.values():
        clean = "".join(c if c in tasks.SYMBOLS else tasks.SYMBOLS[-1] for c in text.lower())
        assert sum(clean in part for part in parts.values()) == 1
    assert min(map(len, parts.values())) > 10000
