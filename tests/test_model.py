"""Optimizers against plain loops in float64, written from the formulas; then how they are used."""
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evaluate
import machine
import model

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHAPES = {"empty": (0, 3), "kernel": (3, 3, 4, 2), "matrix": (5, 7), "scalar": (), "vector": (6,)}
DECAYS = np.array([0.5, 0.9, 0.99, 0.999, 0.9999])[:, None]
TIMES = np.array([3, 10, 30, 100, 300, 1000, 3000, 10000, 300000])
SINES = np.array([1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000])
NAN, NONE = np.nan, (np.full(8, np.nan, np.float32),) * 2  # a loss that is NaN is missing


def drawn(names=SHAPES, steps=8):
    """Parameters and gradients, [steps, ...]; two rows and a column have none, as in padding, and
    half the kernel loses its, of which one is large."""
    rng = np.random.default_rng(0)
    params = {k: np.asarray(rng.standard_normal(shape), np.float32) for k, shape in SHAPES.items()}
    grads = {k: np.float32(rng.standard_normal((25, *x.shape)) / 2) for k, x in params.items()}
    grads["matrix"][:, :2] = grads["matrix"][..., 6] = grads["kernel"][2:, ..., 1] = 0
    grads["kernel"][:, 0, 0, 0, 0] *= 30
    return {k: params[k] for k in names}, {k: grads[k][:steps] for k in names}


def close(found, wanted, far):  # that share of the largest
    np.testing.assert_allclose(found, wanted, rtol=0, atol=far * np.max(np.abs(wanted), initial=0))


@functools.partial(jax.jit, static_argnums=(0, 4))
def run(make, theta, params, rows, told=lambda _, grads, losses=(None, None): (grads, losses)):
    """-> make(theta)'s updates, and parameters before them; told(params, *row) -> grads, losses."""
    optimizer = make(theta)

    def step(carry, row):
        params, state = carry
        grads, (loss, valid_loss) = told(params, *row)
        updates, state = optimizer.update(grads, state, params, loss=loss, valid_loss=valid_loss)
        return (jax.tree.map(jnp.add, params, updates), state), (updates, params)

    return jax.lax.scan(step, (params, optimizer.init(params)), rows)[1]


def check(make, theta, rule, steps=8, names=SHAPES, losses=()):
    """rule(gs, w) -> update is a recipe for one tensor: of its gradients up to now, [t, ...]."""
    params, grads = drawn(names, steps)
    updates, path = run(make, theta, params, (grads, *losses))
    for k in names:
        for t in range(steps):
            close(updates[k][t], rule(np.float64(grads[k][:t + 1]), np.float64(path[k][t])), 1e-4)


def filled(learned, unit=True, **given):
    """Meta-parameters of which none is special; and in float64, with weights as layers use them,
    who may be stored at size 1."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(learned.init, jax.random.key(0))
    theta, inside = {}, {}
    for k, x in shapes.items():
        layer = k.endswith("/w") and k != "step/w"
        theta[k] = np.float32(given.get(k, (0.9 if layer else 0.3) * rng.standard_normal(x.shape)))
        inside[k] = np.float64(theta[k]) / (np.sqrt(len(theta[k])) if layer else 1)
    return theta if unit else {k: np.float32(x) for k, x in inside.items()}, inside


def total(x, decay):
    """The sum over time, in which what is older by a step counts `decay` as much."""
    return np.tensordot(decay ** np.arange(len(x))[::-1], x, 1)


def adam(gs, w, rate=0.01, ahead=0, b1=0.9):
    t = len(gs)
    m = (1 - b1) * total(gs, b1) / (1 - b1 ** (t + ahead))
    m = b1 * m + (1 - b1) * gs[-1] / (1 - b1 ** t) if ahead else m
    return -rate * m / (np.sqrt(0.001 * total(gs ** 2, 0.999) / (1 - 0.999 ** t)) + 1e-8)


def cosine(gs, warmup=0):
    """A rate of 0.01, in the step of the last of these gradients, of 20."""
    share = np.clip((len(gs) - 1 - warmup) / (20 - warmup), 0, 1)
    return 0.01 * min(1, len(gs) / max(warmup, 1)) * (0.5 + 0.5 * np.cos(np.pi * share))


def nadamw(gs, w):
    rate = cosine(gs, 5)
    return adam(gs, w, rate, ahead=1) - rate * 0.3 * w


def by_svd(x, shape):
    """`orthogonal`: its polynomial acts on the singular values alone."""
    if len(shape) < 2:
        return np.zeros(x.size)
    left, s, right = np.linalg.svd(np.float64(x).reshape(-1, shape[-1]), full_matrices=False)
    s = s / np.sqrt(np.sum(s * s) + 1e-12)
    for _ in range(2):
        s = 3.4445 * s - 4.775 * s ** 3 + 2.0315 * s ** 5
    return np.ravel((left * s) @ right)


def muon(gs, w):
    if w.ndim < 2 or not w.size:
        return adam(gs, w, cosine(gs), b1=0.8)
    o = by_svd(0.16 * total(gs, 0.8) + 0.2 * gs[-1], w.shape).reshape(w.shape)
    return -0.3 * cosine(gs) * o / np.sqrt(np.mean(o[np.abs(o) > 1e-12] ** 2))


def baseline(name, setting):
    return (evaluate.BASELINES | evaluate.LISTS)[name][0](setting, 20)


@pytest.mark.parametrize("optimizer, rule", [
    (baseline("SGD", 0.1 / 30), lambda gs, w: -0.1 * gs[-1]),
    (baseline("momentum", 0.1 / 3), lambda gs, w: -0.1 * total(gs, 0.9)),
    (model.momentum(0.1, 0.8), lambda gs, w: -0.1 * total(gs, 0.8)),
    (baseline("RMSProp", 1.0),
     lambda gs, w: -gs[-1] / (np.sqrt(0.1 * total(gs ** 2, 0.9)) + 1e-8)),
    (baseline("Adam", 0.01), adam), (baseline("Muon + cosine", 0.01), muon),
    (baseline("Adam + cosine", 0.01), lambda gs, w: adam(gs, w, cosine(gs))),
    (baseline("NAdamW, list of 10", (0.01, 0.1, 0.001, 1e-8, 0.3, 0.25)), nadamw)])
def test_those_designed_by_hand(optimizer, rule):
    check(lambda _: optimizer, {}, rule, steps=25)


def average(x):
    return x.mean(-1) if x.shape[-1] else np.zeros(x.shape[:-1])


def seen(gs, w, rms=True):
    """-> averages m, v, Adam's direction with each m, [5, n]; and P1's features [12, n]."""
    t = len(gs)
    m, v = (np.stack([(1 - b) * total(x, b) for b in DECAYS[:, 0]]) for x in (gs, gs ** 2))
    adams = m / (1 - DECAYS ** t) / (np.sqrt(v[3] / (1 - 0.999 ** t)) + 1e-8)
    return m, v, adams, np.concatenate([[gs[-1], w], m, m / np.sqrt(rms * v + 1e-6)])


def mlp(T, layers, x, shared, bound=5):
    """-> (last layer, normalised features)."""
    x = np.clip(x / np.sqrt(1e-5 + average(x ** 2))[:, None], -bound, bound)
    h = np.concatenate([x, np.tile(shared[:, None], x.shape[1])])
    for i in range(layers):
        h = np.maximum(T[f"mlp{i}/w"].T @ h + T[f"mlp{i}/b"][:, None], 0)
    return h, x


def step(T, anchored, h, x, adam, pace, steer):
    """The papers' form, or ours."""
    d, a = T["step/w"].T @ h
    if not anchored:
        return -0.001 * (d + T["step/b"][0]) * np.exp(0.001 * (a + T["step/b"][1]))
    d = d - average(d) + (T["direct/d"] + np.tanh(steer[1:])) @ x[:len(steer) - 1]
    a = a + T["direct/a"] @ x + steer[0]
    return -pace * np.exp(T["log_lr"] + np.minimum(a, 1)) * (adam + d)


def pace(T, horizon, gs, grads):
    """Of a tensor with gradients gs, [t, ...]; grads: those of all, [T, ...]."""
    t, ever, weights = len(gs), np.any(gs, 0), [x[:len(gs)] for x in grads if np.ndim(x) > 2]
    inputs = sum(ever[i].any() for i in np.ndindex(ever.shape[:-1]))
    bias = 0.25 if weights else 1
    own = min(1, 32 / max(inputs, 1)) ** T["width_power"] if ever.ndim > 1 else bias
    units = [unit for x in weights for unit in np.moveaxis(x, -1, 0) if unit.any()]
    resting = sum(not unit[-1].any() for unit in units) / max(len(units), 1)
    return own * np.exp(-3 * resting) * min(400 / horizon, 1) ** 0.75 / max(t / horizon, 1) ** 2


@pytest.mark.parametrize("options, names", [
    ({}, SHAPES),  # P1's as its code has it: one layer, no g^2, no bound on the features
    (dict(without=model.ADDITIONS, layers=2, rms=False, horizon=6400), SHAPES),
    (dict(horizon=6400, layers=2), SHAPES), (dict(horizon=5), SHAPES),
    (dict(without=("paces",), horizon=5), ("matrix", "vector")),
    (dict(horizon=5), ("scalar", "vector"))])  # without weights nothing is a bias
def test_per_parameter_mlp_and_p1(options, names):
    ours, horizon = bool(options), options.get("horizon")
    learned = model.per_parameter_mlp(units=8, **options) if ours else model.p1()
    on = set(model.ADDITIONS) - set(options.get("without", ())) if ours else set()
    theta, T = filled(learned, "unit_weights" in on, log_lr=-3)

    def rule(gs, w):
        t = len(gs)
        m, v, adams, x = seen(gs.reshape(t, -1), w.ravel(), options.get("rms", ours))
        times = np.tanh((min(t, horizon) * 400 / horizon if on else t - 1) / TIMES - 1)
        h, x = mlp(T, options.get("layers", 1), x, times, 5 if ours else np.inf)
        slow = pace(T, horizon, gs, drawn(names)[1].values()) if "paces" in on else 1
        return step(T, "anchored_step" in on, h, x, adams[1], slow, np.zeros(13)).reshape(w.shape)

    check(learned.optimizer, theta, rule, names=names)


def lstm(T, name, x, h, c):
    i, g, f, o = np.split(np.concatenate([x, h], -1) @ T[f"{name}/w"] + T[f"{name}/b"], 4, -1)
    i, f, o = (1 / (1 + np.exp(-x)) for x in (i, f + 1, o))
    c = f * c + i * np.tanh(g)
    return o * np.tanh(c), c


@pytest.mark.parametrize("rest", [(7,), (1, 7), (2, 0), (2, 3)])
def test_a_product_and_its_derivatives(rest):
    rng = np.random.default_rng(0)
    w, x, g = (rng.standard_normal(s).astype("f") for s in ((3, 4), (3, *rest), (4, *rest)))
    found, back = jax.vjp(model.product, w, x)
    summed = (range(1, x.ndim),) * 2
    wanted = np.tensordot(w.T, x, 1), np.tensordot(x, g, summed), np.tensordot(w, g, 1)
    for one, other in zip((found, *back(g)), wanted):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_component_lstm():
    learned = model.component_lstm(units=3)
    theta, T = filled(learned, unit=False)

    def rule(gs, w):
        state = np.zeros((2, 2, *w.shape, 3))
        for g in gs:
            small = np.abs(g) < np.exp(-10)
            size = np.where(small, -1, np.log(np.abs(g) + 1e-30) / 10)
            x = np.stack([size, np.where(small, np.exp(10) * g, np.sign(g))], -1)
            for i in range(2):
                state[i] = x, _ = lstm(T, f"lstm{i}", x, *state[i])
        return 0.1 * x @ T["step/w"]

    check(learned.optimizer, theta, rule)


def heard(losses):
    """Those that are finite and not just the one before handed on again."""
    losses = losses[np.isfinite(losses)]
    return losses[np.diff(losses, prepend=NAN) != 0]


def going_back(updates, path, losses):
    """The updates, but back to the best parameters when it is time; NaN is no loss."""
    known, since, mean, best, noise, returns, told = [], [], None, None, 0.0, 0, NAN
    for loss, update, params in zip(losses, updates, path):
        back = False
        if np.isfinite(loss) and loss != told:
            told = loss
            if known:
                limit = 3 * (noise ** 0.5 + abs(known[0]))
                loss = min(max(loss, mean - limit), mean + limit)
            mean = loss if mean is None else (mean + loss) / 2
            known, since = [*known, loss], [*since, loss]
            if len(since) > 2:
                bend = (since[-1] - 2 * since[-2] + since[-3]) ** 2 / 6
                noise += (bend - noise) / min(max(len(known) - 2, 1), 100)
            if best is None or mean <= best - 0.1 * abs(best) - 0.5 * noise ** 0.5:
                best, there = mean, params
            limit = best + 4.25 * noise ** 0.5 + 0.1 * abs(known[0])
            back = len(known) > 3 and min(since[-2:]) > limit
            if back:
                mean, since, returns = best, [best, best], returns + 1
        brake = np.exp(-8 * returns)
        yield {k: brake * u + back * (there[k] - params[k]) for k, u in update.items()}


def hierarchical(T, on, horizon, grads, path, losses):
    """P2's optimizer, with those of our additions that are `on` -> the updates [n] at each step."""
    losses = np.where(np.isfinite(losses), losses, NAN)
    past, shapes = {k: [] for k in grads[0]}, {k: SHAPES[k] for k in grads[0]}
    h, c, feedback = ({k: T[f"initial/{x}"] for k in shapes} for x in ("h", "c", "feedback"))
    context, rate, size = T["initial/context"], *[np.exp(T["clip/log_rate"])] * 2
    decay, signals = 0.8 if "relative_time" in on else 0.95, "signal_to_noise" in on
    for t, (gs, ws) in enumerate(zip(grads, path), 1):
        limit = np.exp(T["clip/log_multiple"]) * size / (1 - (1 - rate) ** t)
        gs = {k: np.clip(np.nan_to_num(g), -limit, limit) for k, g in gs.items()}
        power = np.mean([average(g * g) for g in gs.values()])
        size = (1 - rate) * size + rate * np.sqrt(1e-8 + power)
        train, valid = (heard(x[:t]) for x in losses)
        bias, smooth = 1 - 0.9 ** len(train), total(valid, decay) / total(1 + 0 * valid, decay)
        means = [0.1 * total(train[:i], 0.9) for i in range(1, len(train) + 1)]
        least = 0.02 * train[0] if "generalisation_gap" in on else 0
        spread = np.sqrt(0.1 * total((means - train) ** 2, 0.9) / bias + least ** 2 + 1e-8)
        surprises = np.array([losses[0, t - 1], smooth]) - means[-1] / bias
        surprises = np.nan_to_num(np.clip(surprises / spread, -5, 5))
        if "generalisation_gap" in on:
            gap = np.log((abs(smooth) + 1e-6) / (abs(means[-1] / bias) + 1e-6))
            surprises = np.append(surprises, np.nan_to_num(np.clip(gap, -3, 3)))
        clock, updates, told = min(t, horizon) * 400 / horizon, {}, []
        clock = clock if "relative_time" in on else t - 1
        past = {k: [*past[k], gs[k]] for k in shapes}
        shaped = {k: np.reshape(past[k], (t, *shape)) for k, shape in shapes.items()}
        for k, shape in shapes.items():
            w, (m, v, adams, odd) = ws[k], seen(np.array(past[k]), ws[k])
            means = np.array([average(np.ravel(x)) for x in (m, v, w)])
            spreads = [np.var(x) if x.size else 0 for x in (m, v, w)]
            known = np.array([*means, *spreads, np.linalg.norm(w), np.linalg.norm(gs[k])])
            noise = ((1 - DECAYS) / (1 + DECAYS) * (1 + DECAYS ** t) / (1 - DECAYS ** t))[:, 0]
            real = average(v[3] > 0) + 1e-8
            signal = 10 * np.log10(average(adams ** 2) / real / noise + 0.1)
            rest = 5 * average((v[3] > 0) & (gs[k] == 0)) / real
            x = [*np.clip(np.log(1e-8 + np.abs(known)), -5, 5), *np.sign(means), -1 if shape else 1,
                 *(np.log([max(n, 1) for n in (*shape, 1, 1, 1, 1)[:4]]) - 1),
                 *([*signal / 10, rest] if signals else []),
                 *surprises, *context, *feedback[k]]
            if t <= horizon or "relative_time" not in on:
                h[k], c[k] = lstm(T, "lstm", x, h[k], c[k])
            told.append(h[k] @ T["context/w"] + T["context/b"])
            odd = [*odd, by_svd(m[0] + m[1], shape)] if "orthogonal_momentum" in on else odd
            shared = np.array([
                *(h[k] @ T["condition/w"] + T["condition/b"]), np.log(len(shapes)) - 1,
                np.log(w @ w + 1e-8) / 2, np.log(max(len(w), 1)), *np.sin(clock / (np.pi * SINES))])
            features = np.array([*odd, np.log(np.abs(w) + 1e-8), *v, *1 / np.sqrt(v + 1e-6)])
            hidden, features = mlp(T, 2, features, shared)
            feedback[k] = average(hidden) @ T["feedback/w"] + T["feedback/b"]
            cues = [*h[k], *np.tanh(clock / TIMES[1:7] - 1), *surprises]
            cues += [*signal, rest] if signals else []
            steer = cues @ T["steer"] if "steer" in T else np.zeros(1 + len(odd))
            slow = pace(T, horizon, shaped[k], shaped.values()) if "width_power" in T else 1
            updates[k] = step(T, "anchored_step" in on, hidden, features, adams[1], slow, steer)
        context = np.mean(told, 0)
        yield updates


SMALL = functools.partial(model.hierarchical, lstm=4, units=3, horizon=5)
LEARNED = SMALL(), model.per_parameter_mlp(units=8, horizon=5)
LOSSES = np.float32([[1, 0.9, 1.2, NAN, np.inf, 0.7, 0.7, 0.6], [2, 1, 1, 1.2, 3, 4, -np.inf, 5]])


@pytest.mark.parametrize("off", [
    (), model.ADDITIONS, *(model.ADDITIONS[i:i + 2] for i in range(0, len(model.ADDITIONS), 2))])
def test_the_hierarchical_optimizer_and_what_can_be_left_out(off):
    """Without all it is P2's. Gradients are clipped, or not finite; so are losses; one rises."""
    learned = SMALL(without=off)
    theta, T = filled(learned, "unit_weights" not in off, log_lr=-3, **{"clip/log_multiple": -1})
    assert ("steer" in T) == (not {"anchored_step", "steering"} & set(off))
    names = ("matrix", "scalar", "vector") if 0 < len(off) < 3 else SHAPES
    params, grads = drawn(names)
    grads["vector"][3, :3] = NAN, np.inf, -np.inf
    found = run(learned.optimizer, theta, params, (grads, tuple(LOSSES)))
    updates, path, grads = ([{k: np.float64(x[t].ravel()) for k, x in y.items()} for t in range(8)]
                            for y in (*found, grads))
    wanted = hierarchical(T, set(model.ADDITIONS) - set(off), 5, grads, path, LOSSES)
    if "going_back" not in off:
        wanted = going_back(wanted, path, LOSSES[1])
    for mine, theirs in zip(updates, wanted):
        close(*(np.concatenate([x[k] for k in names]) for x in (mine, theirs)), 1e-3)


def rearranged(w, order, wanted):
    """The rows of w, which are in an `order` {name: how many}, as `wanted`."""
    parts = dict(zip(order, np.split(w, np.cumsum([*order.values()])[:-1])))
    return np.concatenate([parts[name] for name in wanted.split()])


def test_p2_is_the_authors_own():
    """Their library's RNNMLPLOpt (google/learned_optimization, commit 32186aa) made these updates
    in 40 steps; it doesn't bound features, and validation losses don't count as steps here."""
    told = machine.read_npz(os.path.join(ROOT, "tests", "rnn_mlp_lopt.npz"))
    theirs = model.part(told, "theta/")
    mlp = dict(g=1, w=1, log_w=1, m=5, v=5, relative=5, rsqrt=5, sines=11, tensors=1, norm=1,
               count=1, condition=17)
    rnn = dict(context=18, feedback=16, norm_g=1, scalar=1, m=1, sign_m=1, v=1, sign_v=1, w=1,
               sign_w=1, norm_w=1, sides=4, losses=2, var_m=1, var_v=1, var_w=1, h=64)
    theta = {
        "mlp0/w": rearranged(theirs.pop("mlp0/w"), mlp, "g w m relative log_w v rsqrt condition "
                                                        "tensors norm count sines"),
        "lstm/w": rearranged(theirs.pop("lstm/w"), rnn, "m v w var_m var_v var_w norm_w norm_g "
                             "sign_m sign_v sign_w scalar sides losses context feedback h"),
        "clip/log_multiple": np.log(np.float32(10)), "clip/log_rate": np.log(np.float32(0.01))}
    for kind in ("w", "b"):
        out = theirs.pop(f"mlp2/{kind}")
        theta[f"step/{kind}"], theta[f"feedback/{kind}"] = np.split(out, [2], -1)
    params, grads, wanted = ({name[-1]: x for name, x in told.items() if name.startswith(kind)}
                             for kind in ("params", "gradients", "updates"))
    losses = told["losses"], told["valid_losses"]
    learned = model.p2(form=model.Form())
    updates, _ = run(learned.optimizer, theta | theirs, params, (grads, losses))
    for k, found in updates.items():
        close(found, wanted[k], 1e-3)


STILL = model.Optimizer(lambda params: (), lambda grads, state, *_, **__: (grads, state))
with_returns = functools.partial(run, lambda _: model.going_back(STILL), {})


def test_when_it_is_time_to_go_back():
    """Losses come at every other step, and some are handed on in between."""
    (noise, more), t = np.random.default_rng(0).standard_normal((2, 40)), np.arange(40)
    ones = np.ones((80, 1), np.float32)
    for goes_back, losses in ((True, np.where(t < 8, 2.3 - t / 8, 0.5 + 0.1 * t) + 0.05 * noise),
                              (True, 2 + np.abs(t % 20 - 10) / 10), (False, 2 * 0.9 ** t),
                              (False, 1 + np.exp(-t / 5) + 0.3 * more)):
        losses = np.float32(np.stack([losses, np.where(t % 3, losses, NAN)], 1).ravel())
        updates, path = with_returns({"w": ones[0]}, ({"w": ones}, (losses, losses)))
        wanted = going_back([{"w": ones[0]}] * 80, [{"w": w} for w in path["w"]], losses)
        np.testing.assert_allclose(updates["w"], [x["w"] for x in wanted], rtol=1e-5)
        assert (updates["w"].min() < 0) == goes_back


def test_neither_noise_nor_one_outlier_ends_a_training():
    """Noise of a tenth of the first loss, on plateaus of 400 or 2,000: two of a hundred may end."""
    def share(losses):
        def ends(x):
            return with_returns(jnp.float32(0), (jnp.ones_like(x), (x, x)))[0].min() < 0
        return np.mean(jax.vmap(ends)(jnp.float32(losses)))

    losses = 0.45 + 0.1 * np.random.default_rng(0).standard_normal((1000, 2000))
    losses[:, 0] = 1
    assert share(losses[:, :400]) <= 0.02 and share(losses) <= 0.02
    calm = np.tile(0.5 + 0.5 * 0.9 ** np.arange(40), (36, 1))
    assert share(calm + 1e3 * np.eye(36, 40, 4)) == 0
    assert share(losses + np.maximum(0, np.arange(2000) - 400) / 100) == 1


@pytest.mark.parametrize("learned", LEARNED)
def test_a_fresh_optimizer_is_adam_but_for_paces(learned):
    with jax.debug_key_reuse(True):
        theta = jax.jit(learned.init)(jax.random.key(0))
    assert 0.75 < np.std(theta["mlp0/w"]) < 1 and 1.8 < np.abs(theta["mlp0/w"]).max() < 2
    theta |= {k: np.float32(20) for k in theta if "multiple" in k}

    def rule(gs, w):
        return adam(gs, w) * pace(theta, 5, gs, drawn()[1].values())

    check(learned.optimizer, theta, rule, losses=[NONE])


def test_any_structure_vmap_and_grad():
    """Names, and how a missing loss is told, change no step; backprop bears zero gradients, too."""
    learned, names = LEARNED[0], ("empty", "matrix", "scalar")
    theta, (params, grads) = filled(learned, log_lr=-8)[0], drawn(names)
    grads["matrix"][:2] = 0

    def trained(theta, params, rows):
        updates, _ = run(learned.optimizer, theta, params, rows)
        losses = [jnp.sum(jnp.sin(200 * jnp.sum(x, 0))) for x in jax.tree.leaves(updates)]
        return sum(losses), updates

    slope, plain = jax.jit(jax.grad(trained, has_aux=True))(theta, params, (grads, NONE))
    many = {k: np.stack([x] * 3) for k, x in theta.items()}
    many["log_lr"] += np.float32([0, 0.01, -0.01])
    params, grads = ([x["empty"], {"z": (x["matrix"], x["scalar"])}] for x in (params, grads))
    vmapped = jax.jit(jax.vmap(trained, (0, None, None)))
    (_, up, down), updates = vmapped(many, params, (grads,))
    for x, y in zip(jax.tree.leaves(updates), plain.values()):
        close(x[0], y, 1e-4)
    np.testing.assert_allclose(slope["log_lr"], (up - down) / 0.02, rtol=2e-2)
    assert all(np.isfinite(x).all() for x in slope.values())


def steps(path, horizon):
    """The parameters before each step of a small regression. (No softmax: there the mean gradient
    over classes is zero but for rounding, whose sign the LSTM reads, so that two builds part.)"""
    rng = np.random.default_rng(1)
    data = jnp.float32(rng.standard_normal((9, 16, 7)))  # batches of x (6) and noise

    def loss(params, i):
        x, y = data[i, :, :6], data[i, :, :1] + 0.1 * data[i, :, 6:]
        return jnp.mean((jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"] - y) ** 2)

    def told(params, t):
        value, grads = jax.value_and_grad(loss)(params, t % 8)
        return grads, (value, jnp.where(t % 10 == 0, loss(params, 8), NAN))

    learned, theta = model.load(path, horizon)
    shapes = {"b": (8,), "v": (8, 1), "w": (6, 8)}
    params = {k: jnp.float32(0.4 * rng.standard_normal(shape)) for k, shape in shapes.items()}
    _, path = run(learned.optimizer, theta, params, (jnp.arange(horizon + 1),), told)
    return np.concatenate([x.reshape(horizon + 1, -1) for x in path.values()], 1)


@pytest.mark.parametrize("name, horizon, every", [
    ("pretrained", 400, 50), ("pretrained", 20, 10), ("pretrained", 2000, 250),
    ("pretrained_mlp", 400, 50), ("pretrained_mlp", 20, 10)])
def test_a_shipped_optimizer_makes_the_steps_it_made(name, horizon, every):
    """steps.npz holds those of other programs, found by the function above with their model.py: of
    commit 37cdf3d and, of pretrained.npz, 2454899."""
    wanted = machine.read_npz(os.path.join(ROOT, "tests", "steps.npz"))[f"{name}_{horizon}"]
    close(steps(os.path.join(ROOT, f"{name}.npz"), horizon)[every::every], wanted, 1e-5)


def test_save_and_load(tmp_path):
    path, name, sizes = tmp_path / "theta.npz", "per_parameter_mlp", {"units": 4}
    learned = model.per_parameter_mlp(**sizes)
    theta, _ = filled(learned)
    model.save(path, name, theta, sizes=sizes, steps=7)
    again, loaded = model.load(path)
    assert again is learned and jax.tree.all(jax.tree.map(np.array_equal, theta, loaded))
    assert model.load(path, 1600)[0] is model.per_parameter_mlp(**sizes, horizon=1600)
    assert model.about(path) == {"name": name, "sizes": sizes, "steps": 7}

    whole, new = path.read_bytes(), functools.partial
    for i in range(0, len(whole), len(whole) // 99):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1:])
        try:
            assert jax.tree.all(jax.tree.map(np.array_equal, theta, model.load(path)[1]))
        except ValueError as error:
            assert "damaged" in str(error)
    writes = [(new(path.write_bytes, damage), "damaged") for damage in (
        b"", b"no zip", whole[:999], whole[:200] + b"\0" * 50 + whole[250:])]
    writes += [(new(np.savez, path, about=np.array({}, object)), "damaged"),  # it would be a pickle
               (new(np.savez, path, x=np.ones(3)), "not written"), (path.unlink, "no file")]
    writes += [(new(np.savez, path, about=facts), "not written") for facts in ("null", "[1]", "{}")]
    broken = theta | {"log_lr": np.float32(np.nan)}
    writes.append((new(model.save, path, name, broken, sizes={"units": 4}), "not fit"))
    for which, sizes, why in (("?", {}, "know"), (name, {"of": 1}, "know"),
                              (name, {"units": "a"}, "know"), (name, {}, "not fit")):
        writes.append((new(model.save, path, which, theta, sizes=sizes), why))
    told = new(model.save, path, name, theta, sizes={"units": 4, "horizon": 400})
    for longer, longest, why in (({"log_lr": 0}, 2000, "not fit"), (theta, 0, "know"),
                                 (theta | {"mlp0/b": np.ones(1)}, 2000, "not fit")):
        writes.append((new(told, longer=longer, longest=longest), why))
    for write, why in writes:
        write()
        with pytest.raises(ValueError, match=why):
            model.load(path)


def test_of_two_files_joined_what_is_loaded_is_told_how_long_a_training_is(tmp_path):
    shorter, longer, both = [tmp_path / f"{name}.npz" for name in ("400", "2000", "both")]
    learned, name = model.per_parameter_mlp(4), "per_parameter_mlp"
    theta, _ = filled(learned)
    far = jax.tree.map(lambda x: x + 1, theta)
    model.save(shorter, name, theta, sizes={"units": 4, "horizon": 400}, steps=7)
    model.save(longer, name, far, sizes={"units": 4, "horizon": 2000}, steps=8)
    model.join(both, shorter, longer)
    assert model.about(both) == model.about(shorter) | {"longest": 2000}
    for horizon, share in ((None, 0), (20, 0), (400, 0), (800, np.log(2) / np.log(5)), (2000, 1),
                           (10 ** 5, 1)):
        loaded = model.load(both, horizon)[1]
        assert theta.keys() == loaded.keys()
        for k, x in theta.items():
            close(loaded[k], x + share, 1e-6)
    other, bare, cautious = [tmp_path / f"{name}.npz" for name in ("other", "bare", "cautious")]
    model.save(other, name, theta, sizes={"units": 4, "rms": False, "horizon": 2000})
    model.save(bare, name, theta, sizes={"units": 4})
    model.save(cautious, name, far, sizes={"units": 4, "horizon": 2000}, caution=0.5)
    for wrong in ((longer, shorter), (shorter, shorter), (shorter, other), (bare, longer),
                  (both, longer), (shorter, cautious)):
        with pytest.raises(ValueError, match="the same kind"):
            model.join(both, *wrong)
