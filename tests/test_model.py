"""Optimizers against independent NumPy loops."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model

SHAPES = {"kernel": (3, 3, 2, 4), "matrix": (5, 7), "vector": (6,), "scalar": (), "empty": (0, 3)}


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32) for k, shape in SHAPES.items()}


def run(optimizer, steps=30, **losses):
    """Parameters after each step, fed with the gradients tree(1), tree(2), ..."""
    params, path = tree(0), []
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for t in range(1, steps + 1):
        updates, state = update(tree(t, scale=0.1 * t), state, params, **losses)
        params = jax.tree.map(jnp.add, params, updates)
        path.append(params)
    return path


def check(optimizer, rule, steps=30):
    """`rule(memory, g, w, t) -> step` is a NumPy recipe for a single tensor; memory is a dict it may use."""
    path = run(optimizer, steps)
    for name in SHAPES:
        w, memory = np.float64(tree(0)[name]), {}
        for t in range(1, steps + 1):
            w = w + rule(memory, np.float64(tree(t, scale=0.1 * t)[name]), w, t)
            np.testing.assert_allclose(path[t - 1][name], w, rtol=2e-5, atol=2e-5)


def test_sgd():
    check(model.sgd(0.1), lambda memory, g, w, t: -0.1 * g)


def test_momentum():
    def rule(memory, g, w, t):
        memory["m"] = 0.8 * memory.get("m", 0) + g
        return -0.1 * memory["m"]
    check(model.momentum(0.1, 0.8), rule)


def test_rmsprop():
    def rule(memory, g, w, t):
        memory["v"] = 0.9 * memory.get("v", 0) + 0.1 * g ** 2
        return -0.01 * g / (np.sqrt(memory["v"]) + 1e-8)
    check(model.rmsprop(0.01), rule)


def adam_rule(memory, g, w, t, rate=0.01):
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g ** 2
    return -rate * (memory["m"] / (1 - 0.9 ** t)) / (np.sqrt(memory["v"] / (1 - 0.999 ** t)) + 1e-8)


def test_adam():
    check(model.adam(0.01), adam_rule)


def test_muon():
    def rule(memory, g, w, t):
        rate, adam = 0.01 * (0.5 + 0.5 * np.cos(np.pi * min((t - 1) / 20, 1))), adam_rule(memory, g, w, t)
        if g.ndim < 2:
            return rate / 0.01 * adam
        o = orthogonal_by_svd(0.9 * memory["m"] + 0.1 * g, g.shape).reshape(g.shape)
        return -0.3 * rate * o / np.sqrt(np.mean(o ** 2)) if o.size else o
    check(model.muon(0.01, 0.9, horizon=20), rule)


def test_padding_changes_no_step_of_muon():
    """Rows and columns that never have a gradient stand still, and the others step as if they were alone."""
    g, optimizer = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32), model.muon(0.01)
    step = lambda g: np.array(optimizer.update({"w": jnp.array(g)}, optimizer.init({"w": jnp.array(g)}))[0]["w"])
    np.testing.assert_allclose(step(np.pad(g, ((0, 5), (2, 0)))), np.pad(step(g), ((0, 5), (2, 0))), rtol=1e-4)


def test_nadamw():
    def rule(memory, g, w, t):
        rate = 0.01 * min(1, t / 5)
        rate *= 0.5 + 0.5 * np.cos(np.pi * min(max((t - 1 - 5) / (20 - 5), 0), 1))
        adam_rule(memory, g, w, t)
        ahead = 0.9 * memory["m"] / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9 ** t)
        return -rate * (ahead / (np.sqrt(memory["v"] / (1 - 0.999 ** t)) + 1e-8) + 0.3 * w)
    check(model.nadamw(0.01, weight_decay=0.3, warmup=5, horizon=20), rule)


def test_adam8p():
    def rule(memory, g, w, t):
        rate = 0.01 * max(1 - (t - 1) * 0.1, 0) * np.exp(-0.02 * (t - 1))
        return rate / 0.01 * adam_rule(memory, g + 0.3 * np.sign(w) + 2 * 0.2 * w, w, t)
    check(model.adam8p(0.01, 0.9, 0.999, 1e-8, 0.3, 0.2, 0.1, 0.02), rule)


def test_the_component_lstm_against_a_plain_loop_over_parameters():
    learned, sigmoid = model.component_lstm(hidden=3), lambda x: 1 / (1 + np.exp(-x))
    theta = learned.init(jax.random.key(0)) | {"lstm0/b": jnp.linspace(-1, 1, 12), "lstm1/b": jnp.linspace(1, -1, 12)}
    path, wide = run(learned.optimizer(theta), steps=3), {k: np.float64(x) for k, x in theta.items()}
    for name in SHAPES:
        for place, w in np.ndenumerate(np.float64(tree(0)[name])):
            state = [(np.zeros(3), np.zeros(3)) for _ in range(2)]
            for t in range(1, 4):
                g = float(tree(t, scale=0.1 * t)[name][place])
                x = np.array([np.log(abs(g)) / 10, np.sign(g)]) if abs(g) >= np.exp(-10) else np.array([-1, np.exp(10) * g])
                for layer in range(2):
                    h, c = state[layer]
                    inputs = np.concatenate([x, h])
                    i, candidate, f, o = np.split(inputs @ wide[f"lstm{layer}/w"] / np.sqrt(len(inputs)) + wide[f"lstm{layer}/b"], 4)
                    c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(candidate)
                    x = sigmoid(o) * np.tanh(c)
                    state[layer] = x, c
                w = w + 0.1 * x @ wide["step/w"]
                np.testing.assert_allclose(path[t - 1][name][place], w, rtol=1e-4, atol=1e-5)


PACE = {name: 1.0 if len(shape) > 1 else 0.2 for name, shape in SHAPES.items()}  # where theta slows biases down to a fifth
SLOW_BIASES = {"log_bias": jnp.log(0.2)}
LEARNED = [model.per_parameter_mlp, functools.partial(model.per_parameter_mlp, layers=2), model.hierarchical]


@pytest.mark.parametrize("make", LEARNED)
def test_steps_shrink_beyond_the_horizon(make):
    """With a silent output layer they are Adam's until then, and (horizon / t)^2 of them afterwards; each tensor at its pace."""
    learned = make(horizon=4)
    theta = learned.init(jax.random.key(0)) | {"log_lr": jnp.log(0.01)} | SLOW_BIASES
    if "clip/log_multiple" in theta:
        theta["clip/log_multiple"] = jnp.float32(20)  # no clipping
    optimizer, adam, params = learned.optimizer(theta), model.adam(0.01), tree(0)
    state, adams = optimizer.init(params), adam.init(params)
    update = jax.jit(optimizer.update)
    for t in range(1, 9):
        mine, state = update(tree(t), state, params, loss=1.0, valid_loss=2.0)
        theirs, adams = adam.update(tree(t), adams)
        share = 1 if t <= 4 else (4 / t) ** 2
        for name, factor in PACE.items():
            np.testing.assert_allclose(mine[name], factor * share * theirs[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("horizon,speed,pace", [(20, 20, 1), (6400, 1 / 16, 1 / 8)])
def test_the_hierarchical_optimizer_sees_time_relative_to_the_horizon(horizon, speed, pace):
    """All silent but the weight of tanh(t / 30 - 1) in the step's size: Adam's steps times exp of that, at a time that is relative."""
    learned = model.hierarchical(horizon=horizon)
    theta = learned.init(jax.random.key(0)) | {"log_lr": jnp.log(0.01), "clip/log_multiple": jnp.float32(20)} | SLOW_BIASES
    theta["steer"] = theta["steer"].at[32 + 1, 0].set(1)  # after the LSTM's 32, the times 10, 30, ...
    optimizer, adam, params = learned.optimizer(theta), model.adam(0.01), tree(0)
    state, adams = optimizer.init(params), adam.init(params)
    update = jax.jit(optimizer.update)
    for t in range(1, 26):
        mine, state = update(tree(t), state, params)
        theirs, adams = adam.update(tree(t), adams)
        share = pace * min(horizon / t, 1) ** 2 * np.exp(np.tanh(speed * min(t, horizon) / 30 - 1))
        for name, factor in PACE.items():
            np.testing.assert_allclose(mine[name], factor * share * theirs[name], rtol=1e-4, atol=1e-7)


def test_paces():
    """Wide weights, biases and the steps of long trainings are slow, without weights nothing is a bias, and backprop leaves the
    biases' pace alone."""
    vectors = {"x": jnp.zeros(3), "y": jnp.zeros(())}
    np.testing.assert_allclose([model.paces(SLOW_BIASES, t, 25, vectors) for t in (1, 25, 50)], [[1, 1], [1, 1], [0.25, 0.25]])
    np.testing.assert_allclose([model.paces(SLOW_BIASES, t, 6400, vectors) for t in (1, 6400, 12800)], np.outer([4, 4, 1], [1, 1]) / 32)
    net = {"b": jnp.zeros(1), "kernel": jnp.zeros((3, 3, 8, 2)), "none": jnp.zeros((0, 1)), "w": jnp.zeros((32, 1))}
    np.testing.assert_allclose(model.paces(SLOW_BIASES, 800, 400, net), np.array([0.2, 32 / 72, 1, 1]) / 4, rtol=1e-6)
    assert jax.grad(lambda theta: jnp.sum(model.paces(theta, 1, 400, net)))(SLOW_BIASES)["log_bias"] == 0


@pytest.mark.parametrize("make", LEARNED)
def test_anchored_with_a_silent_output_layer_is_adam(make):
    learned = make()
    theta = learned.init(jax.random.key(0)) | {"log_lr": jnp.log(0.01)} | SLOW_BIASES
    if "clip/log_multiple" in theta:
        theta["clip/log_multiple"] = jnp.float32(20)  # no clipping
    path = run(learned.optimizer(theta), loss=1.0, valid_loss=2.0)
    for name, factor in PACE.items():
        for mine, adams in zip(path, run(model.adam(0.01 * factor))):
            np.testing.assert_allclose(mine[name], adams[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", LEARNED)
def test_the_papers_output_form(make):
    """With d = 2 and a = 100 everywhere, every parameter moves by -0.001 * 2 * exp(0.1) at every step, beyond the horizon, too."""
    learned = make(anchored=False, horizon=3)
    theta = learned.init(jax.random.key(0))
    theta |= {"step/w": 0 * theta["step/w"], "step/b": jnp.float32([2, 100])}
    assert "log_lr" not in theta
    for t, params in enumerate(run(learned.optimizer(theta), 5), 1):
        jax.tree.map(lambda p, p0: np.testing.assert_allclose(p, p0 - t * 0.002 * np.exp(0.1), rtol=1e-5, atol=1e-6),
                     params, tree(0))


@pytest.mark.parametrize("anchored,rms", [(False, False), (True, True)])
def test_per_parameter_mlp_against_a_loop(anchored, rms):
    """Both output forms, written out with NumPy one tensor at a time, from P1's feature list; without g^2, which is then 0, as in P1's
    code. In a training of 6,400 steps time runs at a sixteenth, and the anchored steps have an eighth of their length."""
    learned = model.per_parameter_mlp(hidden=8, layers=2, rms=rms, anchored=anchored, horizon=6400)
    theta = learned.init(jax.random.key(3))
    keys = jax.random.split(jax.random.key(4), 3)
    for key, name in zip(keys, ("step/w", "direct/d", "direct/a") if anchored else ()):
        theta[name] = jax.random.normal(key, theta[name].shape)
    theta |= {"log_bias": jnp.log(0.3)} if anchored else {}
    np_theta = {k: np.float64(x) for k, x in theta.items()}

    def rule(memory, g, w, t):
        if not g.size:
            return g
        g, w, shape = g.ravel(), w.ravel(), g.shape
        columns = [g, w]
        decays = [0.5, 0.9, 0.99, 0.999, 0.9999]
        for b in decays:
            memory["m", b] = b * memory.get(("m", b), 0) + (1 - b) * g
            memory["v", b] = b * memory.get(("v", b), 0) + (1 - b) * g ** 2
        columns += [memory["m", b] for b in decays]
        columns += [memory["m", b] / np.sqrt(rms * memory["v", b] + 1e-6) for b in decays]
        columns = [np.clip(x / np.sqrt(1e-5 + np.mean(x ** 2)), -5, 5) for x in columns]
        own = np.stack(columns)
        columns += [np.full(len(g), np.tanh(t / 16 / tau - 1)) for tau in (3, 10, 30, 100, 300, 1000, 3000, 10000, 300000)]
        h = np.stack(columns, 1)
        for i in range(2):
            h = np.maximum(h @ np_theta[f"mlp{i}/w"] / np.sqrt(h.shape[1]) + np_theta[f"mlp{i}/b"], 0)
        if anchored:
            adam = memory["m", 0.9] / (1 - 0.9 ** t) / (np.sqrt(memory["v", 0.999] / (1 - 0.999 ** t)) + 1e-8)
            d, a = (h @ np_theta["step/w"]).T
            d, a = d - d.mean() + np_theta["direct/d"] @ own, a + np_theta["direct/a"] @ own
            return (-(1 if len(shape) > 1 else 0.3) / 8 * np.exp(np_theta["log_lr"] + np.minimum(a, 1)) * (adam + d)).reshape(shape)
        d, a = (h @ np_theta["step/w"] + np_theta["step/b"]).T
        return (-0.001 * d * np.exp(0.001 * a)).reshape(shape)
    check(learned.optimizer(theta), rule)


def test_loss_features():
    """P2 appendix C.2.2, and the figures that follow from it for a loss that falls by a tenth at each step."""
    average, features = model.LossAverage(jnp.float32(0), jnp.float32(0), jnp.int32(0)), []
    for t in range(4):
        average = model.observe(average, jnp.float32(0.9 ** t), model.TRAIN_DECAY)
        features.append(float(model.surprise(average, jnp.float32(0.9 ** t))))
    np.testing.assert_allclose(features, [0, -0.06, -0.12, -0.18], atol=0.01)
    assert model.surprise(average, jnp.float32(1e9)) == 5 and model.surprise(average, jnp.float32(jnp.nan)) == 0
    for ignored in (None, jnp.float32(jnp.nan), jnp.float32(jnp.inf)):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, model.observe(average, ignored, 0.9), average))
        slope = jax.grad(lambda mean: sum(model.observe(average._replace(mean=mean), ignored, 0.9)[:2]))(average.mean)
        assert slope == 1  # nor does backprop see it


@pytest.mark.parametrize("steady", [True, False])
def test_signal_to_noise(steady):
    """Pure noise has 0 decibels, whatever the decay and the step. A steady gradient has as many as an average takes off
    noise: one over the sum of its squared weights. A parameter without any gradient does not count."""
    steps, n = 60, 1 if steady else 20000
    gradients = np.ones((steps, n)) if steady else np.random.default_rng(0).standard_normal((steps, n))
    gradients = np.concatenate([gradients, np.zeros((steps, n))], 1)
    decays = np.array([[0.5], [0.9], [0.99], [0.999], [0.9999]])
    weights = (1 - decays) * decays ** np.arange(steps)[::-1]  # [5, steps], of the gradients in an average
    m, v = (jnp.float32(weights @ x) for x in (gradients, gradients ** 2))
    zeros = jnp.zeros(2 * n)
    powers = model.tensor_means(zeros, zeros, m, v, model.directions(m, v, jnp.int32(steps)), [2 * n])[2]
    found = model.signal_to_noise(powers, jnp.int32(steps))[0]
    share = weights / weights.sum(1, keepdims=True)
    ratio = 1 / (share ** 2).sum(1) if steady else np.ones(5)
    np.testing.assert_allclose(found, 10 * np.log10(ratio + 0.1), atol=2e-3 if steady else 0.3)


def test_features_are_normalised_over_what_ever_had_a_gradient():
    x, seen = np.float32([[3, 4, 100, 7], [1, 0, 0, 0]]), np.array([True, True, False, True])  # the third was never seen
    found = np.asarray(model.normalised(jnp.asarray(x), jnp.asarray(seen)))
    np.testing.assert_allclose(found[0], [3 / np.sqrt(74 / 3), 4 / np.sqrt(74 / 3), 5, 7 / np.sqrt(74 / 3)], rtol=1e-5)
    np.testing.assert_allclose(found[1], [np.sqrt(3), 0, 0, 0], rtol=1e-4)


def test_tensor_means():
    """All that the LSTM is told, in float64, a tensor at a time; of m and v over the decays, too."""
    rng = np.random.default_rng(0)
    g, w, m, v, directions = (rng.standard_normal(shape) for shape in ((7,), (7,), (5, 7), (5, 7), (5, 7)))
    v = v ** 2 + 0.1
    found = model.tensor_means(*map(jnp.float32, (g, w, m, v, directions)), [4, 3])
    for i, part in enumerate((slice(0, 4), slice(4, 7))):
        M, V, W, G, D = (x[..., part] for x in (m, v, w, g, directions))
        np.testing.assert_allclose(found[0][i], [M.mean(), V.mean(), W.mean()], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[1][i], [(M ** 2).mean(), (V ** 2).mean(), (W ** 2).mean(), (G ** 2).mean()], rtol=1e-4)
        np.testing.assert_allclose(found[2][i], (D ** 2).mean(1), rtol=1e-4)
        assert found[3][i] == 0  # all have a gradient


def test_at_rest_is_what_has_lost_its_gradient():
    g, v = jnp.float32([0, 0, 1, 2, 0, 0]), jnp.zeros((5, 6)).at[:, :4].set([[0, 1, 1, 1]])  # the last three: never any
    found = model.tensor_means(g, g, v, v, v, [4, 2, 0])
    np.testing.assert_allclose(found[3], [1 / 3, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(found[1][:, 3], [5 / 4, 0, 0], rtol=1e-6)


def orthogonal_by_svd(x, shape):
    """`model.orthogonal` in float64: the polynomial acts on the singular values alone."""
    if len(shape) < 2:
        return np.zeros(x.size)
    left, s, right = np.linalg.svd(np.float64(x).reshape(-1, shape[-1]), full_matrices=False)
    s = s / np.sqrt(np.sum(s * s) + 1e-12)
    for _ in range(2):
        s = 3.4445 * s - 4.775 * s ** 3 + 2.0315 * s ** 5
    return np.ravel((left * s) @ right)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 3, 2, 5), (5, 1), (7,), (), (0, 3)])
def test_orthogonal_against_singular_values(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.testing.assert_allclose(model.orthogonal(jnp.ravel(x), shape), orthogonal_by_svd(x, shape), rtol=1e-4, atol=1e-5)
    slope = jax.grad(lambda x: jnp.sum(jnp.sin(model.orthogonal(x, shape))))
    assert np.isfinite(slope(jnp.zeros(x.size))).all()  # where no gradient was ever seen
    if len(shape) > 1 and x.size:  # all singular values are near one, and the size of x doesn't matter
        s = np.linalg.svd(np.reshape(model.orthogonal(1e3 * jnp.ravel(x), shape), (-1, shape[-1])))[1]
        assert 0.6 < s.min() and s.max() < 1.3


def test_a_steered_step_against_a_loop():
    """A tensor has its own pace and its own weights of the features that d reads."""
    rng, hidden, n = np.random.default_rng(0), 5, 7
    draw = lambda *shape: np.float32(0.3 * rng.standard_normal(shape))
    theta = {"step/w": draw(hidden, 2), "direct/d": draw(model.ODD), "direct/a": draw(model.ODD + 2), "log_lr": draw()}
    h, features, adam, steer = draw(hidden, n), draw(model.ODD + 2, n), draw(n), draw(1 + model.ODD)
    pushes = [theta["step/w"][:, 0] @ h[:, i] for i in range(n)]
    wanted = np.zeros(n)
    for i in range(n):
        d = pushes[i] - np.mean(pushes)
        d += sum((theta["direct/d"][f] + np.tanh(steer[1 + f])) * features[f, i] for f in range(model.ODD))
        a = theta["step/w"][:, 1] @ h[:, i] + theta["direct/a"] @ features[:, i] + steer[0]
        wanted[i] = -0.25 * np.exp(theta["log_lr"] + min(a, 1)) * (adam[i] + d)
    found = model.step(jax.tree.map(jnp.asarray, theta), *map(jnp.asarray, (h, features, adam)), 0.25, jnp.asarray(steer))
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


def test_each_tensor_gets_its_own_message_whatever_its_place():
    learned, theta = hierarchical_theta()
    theta |= {"log_bias": jnp.float32(-1), "steer": 0.1 * jax.random.normal(jax.random.key(5), theta["steer"].shape)}
    update = jax.jit(lambda *args: learned.optimizer(theta).update(*args, loss=1.0, valid_loss=2.0))

    def moved(order):
        shapes = {"matrix": (3, 40), "vector": (5,), "other": (2, 2)}
        params = [0.3 * jax.random.normal(jax.random.key(len(name)), shapes[name]) for name in order]
        state = learned.optimizer(theta).init(params)
        for t in range(4):
            grads = [jax.random.normal(jax.random.fold_in(jax.random.key(t), len(name)), shapes[name]) for name in order]
            updates, state = update(grads, state, params)
        return dict(zip(order, updates))

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7),
                 moved(["matrix", "vector", "other"]), moved(["other", "matrix", "vector"]))


def hierarchical_theta(make=model.hierarchical, seed=1):
    """Meta-parameters whose output layer is not silent."""
    learned = make()
    theta = learned.init(jax.random.key(seed))
    names = [name for name in ("step/w", "direct/d", "direct/a") if name in theta]
    return learned, theta | {name: 0.1 * jax.random.normal(key, theta[name].shape)
                             for name, key in zip(names, jax.random.split(jax.random.key(2), len(names)))}


def returns_of(losses):
    """A plain version of `model.remember` -> at each loss, whether it is time to go back; and the index of the best in the end."""
    seen, since, mean, best, at, noise, bends, answers = 0, [], None, None, None, 0.0, 0, []
    for i, loss in enumerate(losses):
        mean = loss if mean is None else (mean + loss) / 2
        since.append(loss)
        if len(since) > 2:
            bends += 1
            noise += ((since[-1] - 2 * since[-2] + since[-3]) ** 2 / 6 - noise) / min(bends, 10)
        if best is None or mean <= best - 0.1 * abs(best) - 0.5 * noise ** 0.5:
            best, at = mean, i
        answers.append(seen > 2 and mean - best > 1.5 * noise ** 0.5 + 0.1 * abs(losses[0]))
        if answers[-1]:
            mean, since = best, [best, best]
        seen += 1
    return answers, at


@pytest.mark.parametrize("kind", ["overfits", "noise", "still falling", "overfits twice"])
def test_when_it_is_time_to_go_back(kind):
    rng = np.random.default_rng(0)
    t = np.arange(40)
    losses = {"overfits": 2.3 - t * (t < 8) / 8 + 0.1 * (t - 8) * (t >= 8) + 0.05 * rng.standard_normal(40),
              "noise": 1 + np.exp(-t / 5) + 0.3 * rng.standard_normal(40),
              "still falling": 2 * 0.9 ** t, "overfits twice": 2 - np.abs(t % 20 - 10) / -10.0}[kind]
    record = model.hierarchical().optimizer(model.hierarchical().init(jax.random.key(0))).init({"w": jnp.zeros(1)}).record
    step, answers = jax.jit(model.remember), []
    for i, loss in enumerate(losses):
        missing, back = step(record, jnp.float32(np.nan), jnp.full(1, -1.0))
        assert not back and jax.tree.all(jax.tree.map(jnp.array_equal, missing, record))
        record, back = step(record, jnp.float32(loss), jnp.full(1, float(i)))
        answers.append(bool(back))
    wanted, at = returns_of(losses.tolist())
    assert answers == wanted and record.params[0] == at and record.returns == sum(wanted)
    assert any(wanted) == kind.startswith("overfits")


def test_a_validation_loss_that_has_risen_ends_the_training():
    """Back to the parameters of the lowest validation loss, and from there on hardly anything moves; the papers' form knows no such end."""
    for anchored in (True, False):
        learned, theta = hierarchical_theta(lambda: model.hierarchical(anchored=anchored))
        params, path, update = tree(0), [], jax.jit(learned.optimizer(theta).update)
        state = learned.optimizer(theta).init(params)
        for t, valid_loss in enumerate([2.0, 1.5, 1.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0]):
            path.append(params["matrix"])
            updates, state = update(tree(t + 1), state, params, loss=1.0, valid_loss=valid_loss)
            params = jax.tree.map(jnp.add, params, updates)
        distance = [float(jnp.max(jnp.abs(params["matrix"] - p))) for p in path]
        if anchored:
            assert state.record.returns > 0 and np.argmin(distance) == 3 and distance[3] < 1e-3 * distance[0]
        else:
            assert state.record == () and np.argmin(distance) == len(path) - 1


def test_hierarchical_reads_both_losses_and_each_message_matters():
    learned, theta = hierarchical_theta()
    update = jax.jit(lambda theta, *args, **losses: learned.optimizer(theta).update(*args, **losses))

    def moved(theta, losses):
        params, state = tree(0), learned.optimizer(theta).init(tree(0))
        for t, (loss, valid_loss) in enumerate(losses):
            updates, state = update(theta, tree(t), state, params, loss=loss, valid_loss=valid_loss)
        return updates["matrix"]

    theta["clip/log_multiple"] = jnp.float32(-1)  # low enough to clip
    same = [(1.0, 1.0), (0.9, 0.95), (0.8, 0.9)]
    base = moved(theta, same)
    assert (moved(theta, [(1.0, 1.0), (0.9, 0.95), (1.8, 0.9)]) != base).any()
    assert (moved(theta, [(1.0, 1.0), (0.9, 0.95), (0.8, 1.9)]) != base).any()
    assert (moved(theta, [(None, None)] * 3) != base).any()
    for name in ("initial/h", "initial/c", "initial/feedback", "initial/context", "condition/w", "context/w", "feedback/w",
                 "lstm/w", "mlp0/w", "mlp1/w", "steer", "step/w", "direct/d", "direct/a", "log_lr",
                 "clip/log_rate", "clip/log_multiple"):
        assert (moved(theta | {name: theta[name] + 0.5}, same) != base).any(), name


def test_each_cue_steers_the_pace():
    """With a silent output layer, the logarithm of the update over Adam's is the one cue that `steer` has a weight for."""
    learned = model.hierarchical()
    theta, params = learned.init(jax.random.key(0)), tree(0)
    update = jax.jit(lambda theta, state, grads, loss, valid: learned.optimizer(theta).update(
        grads, state, params, loss=loss, valid_loss=valid))
    grads = [tree(1), tree(2), tree(3) | {"matrix": tree(3)["matrix"].at[0].set(0)}]
    losses, valid_losses = [1.0, 0.9, 1.2], [1.1, np.nan, 1.3]  # no validation loss in the second step
    state = learned.optimizer(theta).init(params)
    for g, loss, valid in zip(grads[:2], losses, valid_losses):
        _, state = update(theta, state, g, loss, valid)
    last = lambda steer: update(theta | {"steer": steer}, state, grads[2], losses[2], valid_losses[2])
    plain, after = last(theta["steer"])
    one_each = 0.01 * jnp.eye(len(theta["steer"]))[:, :, None] * (jnp.arange(theta["steer"].shape[1]) == 0)[None, None]  # only the pace is steered
    steered, _ = jax.vmap(last)(one_each)
    cue = 100 * np.log(steered["matrix"] / plain["matrix"][None])  # [cues, 5, 7]
    m, v, mean, variance = np.zeros((5, 35)), np.zeros(35), 0.0, 0.0
    decays = np.array([[0.5], [0.9], [0.99], [0.999], [0.9999]])
    for g, loss in zip(grads, losses):
        g = np.ravel(g["matrix"])
        m, v = decays * m + (1 - decays) * g, 0.999 * v + 0.001 * g * g
        mean = 0.9 * mean + 0.1 * loss
        variance = 0.9 * variance + 0.1 * (mean - loss) ** 2
    seen, valid_mean = 1 - 0.9 ** 3, (0.8 * 0.2 * 1.1 + 0.2 * 1.3) / (1 - 0.8 ** 2)
    score = lambda x: np.clip((x - mean / seen) / np.sqrt(variance / seen), -5, 5)
    agreement = ((m / (1 - decays ** 3)) ** 2 / (v / (1 - 0.999 ** 3))).mean(1)
    noise = ((1 - decays) ** 2 * decays ** np.array([[0, 2, 4]])).sum(1) / (1 - decays[:, 0] ** 3) ** 2
    wanted = [*after.h[2], *np.tanh(3 / np.array([10, 30, 100, 300, 1000, 3000]) - 1), score(1.2), score(valid_mean),
              *(10 * np.log10(agreement / noise + 0.1)), 5 * 7 / 35]  # leaves in order: empty, kernel, matrix
    np.testing.assert_allclose(cue, np.tile(np.array(wanted)[:, None, None], (1, 5, 7)), rtol=2e-3, atol=2e-3)


def test_hierarchical_clips_at_a_multiple_of_the_running_gradient_size():
    """A gradient of ones, then of a thousand: the second acts like the limit, 10 x the running size."""
    learned = model.hierarchical()
    theta = learned.init(jax.random.key(0))
    params = {"w": jnp.zeros(4)}
    state, update = learned.optimizer(theta).init(params), jax.jit(learned.optimizer(theta).update)
    _, state = update({"w": jnp.ones(4)}, state, params)
    _, state = update({"w": jnp.full(4, 1000.0)}, state, params)
    size = 0.99 * 0.01 + 0.01 * 1.0                      # after the first step
    limit = 10 * size / (1 - 0.99 ** 2)
    m = 0.5 * (0.5 * 1) + 0.5 * limit                    # the decay-0.5 momentum
    np.testing.assert_allclose(state.memory.m[0], np.full(4, m), rtol=1e-4)


@pytest.mark.parametrize("make", LEARNED)
def test_odd_tensors_frozen_tensors_and_non_finite_gradients(make):
    learned, theta = hierarchical_theta(make)
    optimizer = learned.optimizer(theta)
    state, update = optimizer.init(tree(0)), jax.jit(optimizer.update)
    frozen = tree(1) | {"matrix": jnp.zeros((5, 7))}
    for grads in (frozen, frozen, tree(2)):
        updates, state = update(grads, state, tree(0), loss=1.0)
        assert all(np.isfinite(x).all() and x.shape == SHAPES[k] and x.dtype == jnp.float32 for k, x in updates.items())
    if make is model.hierarchical:
        bad = tree(3) | {"vector": jnp.float32([np.nan, np.inf, -np.inf, 1, 2, 3])}
        updates, state = update(bad, state, tree(0), loss=jnp.nan, valid_loss=jnp.inf)
        updates, state = update(tree(4), state, tree(0), loss=1.0, valid_loss=1.0)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


@pytest.mark.parametrize("make", LEARNED)
def test_update_in_jit_vmap_scan_and_grad(make):
    learned, theta = hierarchical_theta(make)

    def train(theta, params, steps=3):
        optimizer = learned.optimizer(theta)

        def step(carry, t):
            params, state = carry
            grads = jax.tree.map(lambda p: p * (1 + t), params)
            updates, state = optimizer.update(grads, state, params, loss=jnp.float32(1))
            return (jax.tree.map(jnp.add, params, updates), state), None
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
        return params

    loss = jax.jit(lambda theta, params: sum(jnp.sum(p ** 2) for p in train(theta, params).values()))
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), tree(0), tree(1))
    batched = jax.jit(jax.vmap(train, (None, 0)))(theta, both)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-5), batched,
                 jax.jit(train)(theta, tree(1)))
    gradient = jax.jit(jax.grad(loss))(theta, tree(0))
    assert all(np.isfinite(g).all() for g in gradient.values())
    key, eps = "log_lr", 1e-2
    shift = lambda s: loss(theta | {key: theta[key] + s}, tree(0))
    np.testing.assert_allclose(gradient[key], (shift(eps) - shift(-eps)) / (2 * eps), rtol=2e-2)


@pytest.mark.parametrize("make", [lambda: model.adam(0.1), *(lambda make=m: make().optimizer(make().init(jax.random.key(0)))
                                                             for m in LEARNED)])
def test_the_second_call_does_not_recompile(make):
    optimizer, calls = make(), []

    @jax.jit
    def update(grads, state, params, loss):
        calls.append(1)
        return optimizer.update(grads, state, params, loss=loss)

    state = optimizer.init(tree(0))
    for t in range(3):
        _, state = update(tree(t), state, tree(0), jnp.float32(t))
    assert len(calls) == 1


def test_save_and_load(tmp_path):
    path = tmp_path / "theta.npz"
    learned, theta = hierarchical_theta(lambda: model.hierarchical(lstm=8, hidden=4))
    model.save(path, "hierarchical", theta, sizes={"lstm": 8, "hidden": 4}, trained_on="mlp", steps=7)
    again, loaded = model.load(path)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, theta, loaded))
    assert again is learned  # it is made once for the same sizes
    assert model.load(path, horizon=1600)[0] is model.hierarchical(lstm=8, hidden=4, horizon=1600)
    assert model.about(path) | {"steps": 7, "trained_on": "mlp"} == model.about(path)


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "theta.npz"
    with pytest.raises(ValueError, match="no file"):
        model.load(path)
    theta = model.hierarchical().init(jax.random.key(0))
    model.save(path, "hierarchical", theta)
    whole = path.read_bytes()
    for damaged in (b"", b"not a zip", whole[:len(whole) // 2], whole[:200] + b"\0" * 50 + whole[250:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            model.load(path)
    np.savez(path, x=np.ones(3))
    with pytest.raises(ValueError, match="not one written"):
        model.load(path)
    np.savez(path, about=np.array({"name": "evil"}, dtype=object))
    with pytest.raises(ValueError, match="damaged"):
        model.load(path)
    model.save(path, "unheard_of", theta)
    with pytest.raises(ValueError, match="does not know"):
        model.load(path)
    model.save(path, "hierarchical", theta, sizes={"hidden": 5})
    with pytest.raises(ValueError, match="do not fit"):
        model.load(path)


def test_the_hierarchical_optimizer_against_a_plain_loop_over_tensors():
    """Every message and feature written out in float64, from the list in `model.hierarchical`; beyond the horizon the LSTM rests."""
    learned, horizon, sigmoid = model.hierarchical(lstm=4, hidden=3, horizon=3), 3, lambda x: 1 / (1 + np.exp(-x))
    theta = learned.init(jax.random.key(0))
    theta = {k: x + 0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, (k, x) in enumerate(theta.items())}
    theta["clip/log_multiple"] = jnp.float32(-1)  # low enough to clip
    T = {k: np.float64(x) / (np.sqrt(len(x)) if k.endswith("/w") and k != "step/w" else 1) for k, x in theta.items()}
    names, losses, valid_losses = sorted(SHAPES), [1.0, 0.9, 1.2, 0.8, 0.7], [1.1, 1.0, 1.3, 1.2, 1.1]
    update, decays = jax.jit(learned.optimizer(theta).update), np.array([0.5, 0.9, 0.99, 0.999, 0.9999])[:, None]
    params, state = tree(0), learned.optimizer(theta).init(tree(0))
    average = lambda x: x.mean(-1) if x.shape[-1] else np.zeros(x.shape[:-1])
    log_size = lambda x: np.clip(np.log(1e-8 + np.abs(x)), -5, 5)
    m, v = ({k: np.zeros((5, tree(0)[k].size)) for k in names} for _ in range(2))
    h, c, feedback = ({k: T[f"initial/{x}"] for k in names} for x in ("h", "c", "feedback"))
    context, rate, size = T["initial/context"], np.exp(T["clip/log_rate"]), np.exp(T["clip/log_rate"])
    mean, variance, valid = 0.0, 0.0, 0.0
    for t, (loss, valid_loss) in enumerate(zip(losses, valid_losses), 1):
        updates, state = update(tree(t), state, params, loss=loss, valid_loss=valid_loss)
        limit = np.exp(T["clip/log_multiple"]) * size / (1 - (1 - rate) ** t)
        grads = {k: np.clip(np.ravel(np.float64(x)), -limit, limit) for k, x in tree(t).items()}
        size = (1 - rate) * size + rate * np.sqrt(1e-8 + np.mean([average(g * g) for g in grads.values()]))
        mean, valid = 0.9 * mean + 0.1 * loss, 0.8 * valid + 0.2 * valid_loss
        variance = 0.9 * variance + 0.1 * (mean - loss) ** 2
        seen, clock = 1 - 0.9 ** t, min(t, horizon) * 400 / horizon
        score = lambda x: np.clip((x - mean / seen) / np.sqrt(variance / seen + 1e-8), -5, 5)
        surprises, told = [score(loss), score(valid / (1 - 0.8 ** t))], []
        for k in names:
            g, w, shape = grads[k], np.ravel(np.float64(params[k])), SHAPES[k]
            m[k], v[k] = decays * m[k] + (1 - decays) * g, decays * v[k] + (1 - decays) * g * g
            adam = m[k] / (1 - decays ** t) / (np.sqrt(v[k][3] / (1 - 0.999 ** t)) + 1e-8)
            statistics = [average(np.ravel(x)) for x in (m[k], v[k], w)]
            spreads = [average((np.ravel(x) - y) ** 2) for x, y in zip((m[k], v[k], w), statistics)]
            noise = ((1 - decays) / (1 + decays) * (1 + decays ** t) / (1 - decays ** t))[:, 0]
            cues = [*surprises, *(10 * np.log10(average(adam ** 2) / noise + 0.1)), 0.0]  # no parameter is at rest
            x = np.concatenate([
                log_size(np.array([*statistics, *spreads, np.linalg.norm(w), np.linalg.norm(g)])), np.sign(statistics),
                [1 if shape == () else -1], np.log([max(n, 1) for n in (*shape, 1, 1, 1, 1)[:4]]) - 1,
                np.array(cues[2:7]) / 10, [0.0], surprises, context, feedback[k], h[k]])
            i, candidate, f, o = np.split(x @ T["lstm/w"] + T["lstm/b"], 4)
            if t <= horizon:
                c[k] = sigmoid(f + 1) * c[k] + sigmoid(i) * np.tanh(candidate)
                h[k] = sigmoid(o) * np.tanh(c[k])
            told.append(h[k] @ T["context/w"] + T["context/b"])
            if not g.size:
                feedback[k] = T["feedback/b"]
                continue
            own = np.concatenate([[g, w], m[k], m[k] / np.sqrt(v[k] + 1e-6), [orthogonal_by_svd(m[k][0] + m[k][1], shape)],
                                  [np.log(np.abs(w) + 1e-8)], v[k], 1 / np.sqrt(v[k] + 1e-6)])
            own = np.clip(own / np.sqrt(1e-5 + average(own ** 2))[:, None], -5, 5)
            shared = np.concatenate([h[k] @ T["condition/w"] + T["condition/b"],
                                     [np.log(len(names)) - 1, np.log(np.linalg.norm(w)), np.log(len(w))],
                                     np.sin(clock / (np.pi * np.array([1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000])))])
            hidden = np.concatenate([own, np.tile(shared[:, None], len(w))])
            for layer in ("mlp0", "mlp1"):
                hidden = np.maximum(T[f"{layer}/w"].T @ hidden + T[f"{layer}/b"][:, None], 0)
            feedback[k] = average(hidden) @ T["feedback/w"] + T["feedback/b"]
            times = np.tanh(clock / np.array([10, 30, 100, 300, 1000, 3000]) - 1)
            steer = np.concatenate([h[k], times, cues]) @ T["steer"]
            d, a = T["step/w"].T @ hidden
            d = d - d.mean() + (T["direct/d"] + np.tanh(steer[1:])) @ own[:13]
            a = a + T["direct/a"] @ own + steer[0]
            pace = (min(1, 32 / np.prod(shape[:-1])) if len(shape) > 1 else np.exp(T["log_bias"])) / max(t / horizon, 1) ** 2
            wanted = -pace * np.exp(T["log_lr"] + np.minimum(a, 1)) * (adam[1] + d)
            np.testing.assert_allclose(np.ravel(updates[k]), wanted, rtol=2e-3, atol=2e-5)
        context = np.mean(told, 0)
        params = jax.tree.map(jnp.add, params, updates)
