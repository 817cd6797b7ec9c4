"""Estimators against closed forms, value and scale."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import estimators
import machine
import meta_train
from estimators import InnerProblem
from experiments import descend
from settings import ESTIMATORS as NAMES

# A linear state, s <- A s + B theta from theta[:2], and the loss |s|^2 / 2 + C s.
# Noise on theta leaves the gradient of the mean loss as it is, so one closed form serves all
# estimators. The state also tells with which theta it was made.
A = np.float32([[0.9, 0.2], [-0.3, 0.8]])
B = np.float32([[1.0, 0.5, 0.0], [0.0, -0.5, 1.0]])
C = np.float32([0.3, -0.2])
THETA = {"a": jnp.float32([0.4, -0.7]), "b": jnp.float32(0.5)}
T, SIGMA, KEY = 8, 0.1, jax.random.key
EVERY = ("truncated_backprop", 0.0), *((name, SIGMA) for name in NAMES)
LIMITS = dict(cap=4.7, clip=3.5)
MOST = 0.55  # of theta[0], where a trajectory is to go bad


flat = lambda theta: ravel_pytree(theta)[0]


def reset(theta, key):
    return flat(theta)[:2], flat(theta)


def step(theta, state, key, most=np.inf):
    s = (A @ state[0] + B @ flat(theta)) * jnp.where(flat(theta)[0] < most, 1, jnp.inf)
    return (s, flat(theta)), 0.5 * jnp.sum(s ** 2) + jnp.sum(C * s)


QUADRATIC = InnerProblem(reset, step)


def make(name, problem=QUADRATIC, num_pairs=6, truncation=2, horizon=T, sigma=SIGMA, **options):
    return getattr(estimators, name)(problem, num_pairs=num_pairs, truncation=truncation,
                                     horizon=horizon, sigma=sigma, **options)


@functools.cache
def limited(name, sigma, K=2, varying=False):
    """-> (first particles, jitted estimate), on two devices; LIMITS are met now and then."""
    problem = InnerProblem(reset, functools.partial(step, most=MOST))
    estimator = make(name, problem, sigma=sigma, truncation=K, varying=varying, **LIMITS)
    both = jax.NamedSharding(machine.sharding(6).mesh, jax.sharding.PartitionSpec())
    assert both.mesh.size == 2
    start = jax.device_put(estimator.init(THETA, KEY(0)), both)  # so that it is compiled once
    return start, jax.jit(estimator.estimate, out_shardings=both)


@np.errstate(invalid="ignore")
def unrolled(theta, s, ds, steps, cap=np.inf, most=np.inf):
    """From the state s [2] and its derivative ds [2, 3], in float64 -> (losses, their gradients,
    s, ds); a loss from `cap` on counts as that and has no gradient."""
    losses, gradients, bad = [], [], 1 if theta[0] < most else np.inf
    for _ in range(steps):
        s, ds = (A @ s + B @ theta) * bad, (A @ ds + B) * bad
        loss = s @ s / 2 + C @ s
        losses.append(loss if loss < cap else cap)
        gradients.append((s + C) @ ds * (loss < cap))
    return losses, gradients, s, ds


def truth(truncation=T):
    """The exact gradient of the episode; or what is left if it is forgotten every K steps by which
    way theta got there."""
    theta, gradients = np.float64(flat(THETA)), []
    s, ds = theta[:2], np.eye(3)[:2]
    for _ in range(T // truncation):
        _, found, s, _ = unrolled(theta, s, ds, truncation)
        gradients, ds = gradients + found, np.zeros((2, 3))
    return np.mean(gradients, 0)


def by_hand(name, sigma, perturbations, K, cap, clip, lengths=None):
    """The formula in plain numpy, with the perturbations [N, 3] of each estimate -> for each its
    gradient, its metrics, and the number of clipped gradients."""
    theta, N = np.float64(flat(THETA)), len(perturbations[0])
    unit = 1 if T % K or lengths else K
    t = T + unit * (np.arange(N) * (T // unit) // N)  # staggered over an episode
    signs = [1, -1] if sigma else [0]
    states, xi, average = np.zeros((N, len(signs), 2)), np.zeros((N, 3)), None
    for i, noise in enumerate(perturbations):
        L, rp, capped, clipped = np.zeros((N, len(signs))), np.zeros((N, 3)), 0, 0
        for n, eps in enumerate(noise):
            fresh = t[n] >= T
            xi[n] *= not fresh
            t[n] -= T * fresh
            taken = min(K if lengths is None else lengths[n], T - t[n])  # an episode ends at T
            t[n] += taken
            for j, sign in enumerate(signs):
                moved = theta + sign * eps
                s, ds = (moved[:2], np.eye(3)[:2]) if fresh else (states[n, j], np.zeros((2, 3)))
                losses, gradients, states[n, j], _ = unrolled(moved, s, ds, taken, cap, MOST)
                L[n, j], capped = np.mean(losses), capped + losses.count(cap)
                rp[n] += np.mean(gradients, 0) / len(signs)
            norm = np.linalg.norm(rp[n])
            rp[n], clipped = rp[n] * clip / max(norm, clip), clipped + (norm > clip)
        there = np.isfinite(rp).all(1, keepdims=True)  # else it is dropped
        rp = np.where(there, rp, 0)
        slope = (L[:, :1] - L[:, -1:]) / (2 * sigma ** 2 or 1)
        es = slope * noise
        new = np.stack([np.where(there, rp, es).var(0, ddof=1), es.var(0, ddof=1)])
        weight = float(name == "truncated_backprop")
        if name == "merged" or name == "combined" and i:
            of_rp, of_es = new if name == "merged" else average
            floor = 1e-8 / 4 if name == "merged" else 0
            weight = (of_es + floor) / (of_rp + of_es + 2 * floor)
        w = weight if name == "truncated_backprop" else weight * there
        average = new if i == 0 else 0.99 * average + 0.01 * new
        past = slope * xi - np.sum(noise * w * rp, 1, keepdims=True) * xi / (sigma ** 2 or 1)
        yield np.mean(w * rp + (1 - w) * es + past, 0), {
            "loss": np.mean(L), "capped": capped, "weight": np.mean(weight),
            "dropped": np.sum(~there) * (name not in ("es", "pes")),
            "variance_rp": new[0].sum(), "variance_es": new[1].sum()}, clipped
        if name in ("pes", "combined"):
            xi += noise
        else:
            states[:] = states[:, :1]


@pytest.mark.parametrize("name, sigma, K, lengths", [
    *((*every, 2, None) for every in EVERY), ("combined", SIGMA, 3, None),
    ("truncated_backprop", 0.0, T, None), ("merged", SIGMA, 4, (1, 2, 3, 4, 4, 3))])
def test_every_estimate_is_the_formula(name, sigma, K, lengths):
    """Draw by draw, caps, clips, staggered starts and resets, weights and histories included; the
    last truncation of an episode ends with it, and what went bad heals when it starts over."""
    theta, drawn, found = np.float64(flat(THETA)), [], []
    particles, estimate = limited(name, sigma, K, lengths is not None)
    given = () if lengths is None else (jnp.int32(lengths),)
    for i in range(12):
        gradient, particles, metrics = estimate(THETA, particles, KEY(i), *given)
        drawn.append(np.float64(particles.state[1][:, 0]) - theta)
        found.append((flat(gradient), metrics))
    spread = np.std(np.concatenate(drawn))
    assert spread == 0 if sigma == 0 else 0.07 < spread < 0.13
    wanted = [*by_hand(name, sigma, drawn, K, lengths=lengths, **LIMITS)]
    for (gradient, metrics), (g, theirs, _) in zip(found, wanted):
        np.testing.assert_allclose(gradient, g, rtol=1e-3, atol=1e-4)
        for k, x in metrics.items():
            np.testing.assert_allclose(x, theirs[k], rtol=1e-3, atol=1e-4)
    assert any(clipped and (theirs["capped"] or not sigma) for _, theirs, clipped in wanted)
    dropped = any(theirs["dropped"] for _, theirs, _ in wanted)
    assert dropped == (sigma > 0 and name not in ("es", "pes"))


def test_with_history_it_is_the_gradient_of_the_episode_and_without_that_of_truncations():
    errors = {}
    for name, K, wanted in (("pes", 1, T), ("combined", 1, T), ("es", 4, 4)):
        estimator = make(name, num_pairs=16, truncation=K, cap=1e6)
        _, gradients, _ = descend(estimator, 51 * 5 * T, THETA, KEY(1))
        found = np.concatenate([gradients["a"], gradients["b"][:, None]], 1)[5 * T:]
        blocks = found.reshape(-1, 5 * T, 3).mean(1)  # successive ones share trajectories
        errors[name] = blocks.std(0, ddof=1) / np.sqrt(len(blocks))
        assert (errors[name] < 0.03 * np.abs(truth()).max()).all()
        np.testing.assert_array_less(np.abs(blocks.mean(0) - truth(wanted)), 3.5 * errors[name])
    assert (np.abs(truth(4) - truth()) > 10 * errors["es"]).any()


@pytest.mark.parametrize("backend", ["cpu", "gpu"])  # one after another, or all of a device at once
@pytest.mark.parametrize("n", [1, 3, 8])
def test_rows_are_shared_out_and_come_back_in_order(n, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rows = {"x": jnp.arange(2.0 * n).reshape(n, 2), "i": jnp.arange(n)}
    f = machine.over_devices(lambda shared, row: shared["y"] @ row["x"] + row["i"], n)
    found = jax.jit(f)({"y": jnp.float32([1, 10])}, rows)
    np.testing.assert_array_equal(found, [23 * i + 10 for i in range(n)])


def test_both_signs_share_everything_random():
    """What depends on the keys alone cancels within each pair, exactly."""
    def step(theta, state, key):
        state = state + jax.random.uniform(key)
        return state, state + 0 * theta["x"][0]

    problem = InnerProblem(lambda theta, key: jax.random.uniform(key), step)
    estimator = make("combined", problem, truncation=4, cap=1e6)
    _, gradients, metrics = descend(estimator, 3, {"x": jnp.zeros(3)}, KEY(1))
    assert (gradients["x"] == 0).all() and len(set(metrics["loss"].tolist())) == 3


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_cannot_work_are_refused(name):
    few = [0, 1] if name in ("merged", "combined") else [0]  # there is no variance of one
    small = [-0.1, np.nan] if name == "truncated_backprop" else [-0.1, np.nan, 0.0]
    for option, values in {"num_pairs": few, "sigma": small, "truncation": [T + 1, 0]}.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{option}.* must"):
                make(name, **{option: value})


def test_each_first_truncation_resets_where_pairs_times_truncations_exceed_an_int32():
    problem = estimators.InnerProblem(lambda theta, key: theta, lambda theta, s, key: (s, s[0]))
    pes = estimators.pes(problem, num_pairs=500, truncation=1, horizon=10 ** 7, sigma=0.1)
    t = np.array(pes.init(jnp.ones(2), jax.random.key(0)).t)
    np.testing.assert_array_equal(t, 10 ** 7 + np.arange(500) * 10 ** 7 // 500)


def test_a_bounded_adjoint_is_the_identity_with_a_clipped_gradient():
    """Clipped is the norm over all arrays together: here that of [3, 4, 12] is 13."""
    x = {"a": jnp.float32([3, 4]), "b": jnp.float32(12)}
    for scale, bound, share in ((1, 14, 1), (1, 6.5, 0.5), (2, 6.5, 0.5), (np.inf, 1, 0)):
        def f(x):
            x = meta_train.bounded_adjoint(x, bound)
            return scale * sum(jnp.sum(y ** 2) / 2 for y in x.values()), x

        gradient, found = jax.jit(jax.grad(f, has_aux=True))(x)
        for k in x:
            np.testing.assert_array_equal(found[k], x[k])
            np.testing.assert_allclose(gradient[k], share * x[k], rtol=1e-6)


def quartic(horizon):
    """P1's landscape: (w - 4)(w - 3) w^2 after T steps from w = -1.2, as a function of momentum."""
    def loss(w):
        return (w - 4) * (w - 3) * w ** 2

    def step(theta, state, key):
        w, m, t = state
        m = theta["x"] * m + jax.grad(loss)(w)
        w, t = w - 0.01 * m, t + 1
        return (w, m, t), jnp.where(t == horizon, horizon * loss(w), 0.0)  # their mean: the last

    return InnerProblem(lambda *_: (jnp.float32(-1.2), jnp.float32(0), jnp.int32(0)), step)


@pytest.mark.parametrize("name, horizon, mean, sd", [
    ("merged", 10, 63.9, 0.19), ("merged", 100, 44.5, 22.8), ("combined", 100, 71.4, None)])
def test_where_its_variance_hides_the_merge_fails_and_a_long_memory_mends_it(
        name, horizon, mean, sd):
    """On P1's quartic, against a NumPy reimplementation and quadrature (the true gradients are
    63.9 and 71.4): over 100 steps backprop mostly sees flat ground."""
    estimator = make(name, quartic(horizon), 128, horizon, horizon, 0.01, cap=1e9)
    found = descend(estimator, 250, {"x": jnp.float32(0.93)}, KEY(1))[1]["x"][50:]
    error = np.std(found) / np.sqrt(len(found))
    np.testing.assert_allclose(np.mean(found), mean, atol=4 * error)
    assert error < 2.5
    if sd:
        np.testing.assert_allclose(np.std(found), sd, rtol=0.25)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_is_float32_under_x64_and_integers_have_none(name):
    with jax.enable_x64(True):
        problem = InnerProblem(
            lambda theta, key: jnp.zeros(()), lambda theta, s, key: (s, jnp.sum(theta ** 2) + s))
        estimator, theta = make(name, problem), jnp.float32([1, 2])
        given = theta, estimator.init(theta, KEY(0)), KEY(1)
        like = jax.eval_shape(estimator.estimate, *given)
        assert like[0].dtype == jnp.float32
        assert str(like[1]) == str(jax.eval_shape(lambda: given[1]))
    for use in (estimator.init, lambda *given: estimator.estimate(*given, KEY(0))):
        with pytest.raises(ValueError, match="floating-point"):
            use(jnp.arange(2), KEY(0))
