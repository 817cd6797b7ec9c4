"""Estimators against closed forms, value and scale."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import estimators
from estimators import InnerProblem
from experiments import influence_balancing

# A linear state with a quadratic loss: s <- A s + B theta, loss |s|^2 / 2 + c.s. With noise on theta the smoothed
# meta-gradient equals the plain one (the loss is quadratic in theta), so one closed form serves every estimator.
A = np.float32([[0.9, 0.2], [-0.3, 0.8]])
B = np.float32([[1.0, 0.5, 0.0], [0.0, -0.5, 1.0]])
C = np.float32([0.3, -0.2])
THETA = {"a": jnp.float32([0.4, -0.7]), "b": jnp.float32(0.5)}
T = 8


def flat(theta):
    return jnp.concatenate([theta["a"], theta["b"][None]])


def quadratic():
    def reset(theta, key):
        return flat(theta)[:2]  # the start is learned too

    def step(theta, state, key):
        state = A @ state + B @ flat(theta)
        return state, 0.5 * jnp.sum(state ** 2) + jnp.sum(C * state)

    return InnerProblem(reset, step)


def truth():
    """The exact gradient of the episode (float64, forward sensitivities)."""
    theta = np.float64([0.4, -0.7, 0.5])
    s, ds, gradients = theta[:2].copy(), np.eye(3)[:2], []
    for _ in range(T):
        s, ds = A @ s + B @ theta, A @ ds + B
        gradients.append((s + C) @ ds)
    return np.mean(gradients, 0)


def draws(estimator, count, theta=THETA, warm=T):
    """Mean and standard error of `count` estimates at a fixed theta, after the first `warm` calls have staggered them."""
    def body(carry, key):
        gradient, particles, metrics = estimator.estimate(theta, carry, key)
        return particles, flat(gradient)

    particles = estimator.init(theta, jax.random.key(0))
    _, gradients = jax.jit(lambda p: jax.lax.scan(body, p, jax.random.split(jax.random.key(1), warm + count)))(particles)
    gradients = np.float64(gradients[warm:])
    blocks = gradients.reshape(-1, T * 5, 3).mean(1)  # successive estimates share trajectories: block by episodes
    return gradients.mean(0), blocks.std(0, ddof=1) / np.sqrt(len(blocks))


@pytest.mark.parametrize("truncation", [1, 2, 4])
def test_pes_is_unbiased_over_the_whole_horizon(truncation):
    estimator = estimators.pes(quadratic(), num_pairs=64, truncation=truncation, horizon=T, sigma=0.1, cap=1e6)
    mean, error = draws(estimator, 4000)
    assert (error < 0.02 * np.abs(truth()).max()).all()
    np.testing.assert_array_less(np.abs(mean - truth()), 3 * error + 1e-3)


@pytest.mark.parametrize("truncation, share", [(1, 0.86), (4, 0.58)])
def test_combined_is_unbiased_too_at_a_lower_error(truncation, share):
    """Its standard error is at most this share of PES's; without the control variate it is above that."""
    whole = dict(num_pairs=8, truncation=truncation, horizon=T, sigma=0.1, cap=1e6)
    mean, error = draws(estimators.combined(quadratic(), **whole), 4000)
    _, pes_error = draws(estimators.pes(quadratic(), **whole), 4000)
    assert (error < 0.02 * np.abs(truth()).max()).all() and (error < share * pes_error).all()
    np.testing.assert_array_less(np.abs(mean - truth()), 3 * error + 1e-3)


@pytest.mark.parametrize("w, make", [(0, estimators.es), (1, estimators.truncated_backprop)])
def test_combined_without_history_at_weights_0_and_1_is_es_and_backprop_draw_by_draw(w, make):
    options = dict(num_pairs=4, truncation=2, horizon=T, sigma=0.1, cap=1e6)
    ours, theirs = estimators.combined(quadratic(), history=False, **options), make(quadratic(), **options)
    a, b = ours.init(THETA, jax.random.key(0)), theirs.init(THETA, jax.random.key(0))
    estimate = jax.jit(lambda a, b, key: (ours.estimate(THETA, a, key), theirs.estimate(THETA, b, jax.random.clone(key))))
    for i in range(2 * T):
        a = a._replace(variances=estimators.Variances(jnp.full(3, 1.0 - w), jnp.full(3, float(w)), jnp.int32(1)))
        (g, a, metrics), (h, b, _) = estimate(a, b, jax.random.key(i))
        np.testing.assert_allclose(flat(g), flat(h), rtol=1e-5)
        np.testing.assert_allclose(metrics["weight"], w, atol=1e-6)


def truncated_truth(truncation):
    """What a truncated estimator sees: the same, but with the sensitivity of the state forgotten every K steps."""
    theta = np.float64([0.4, -0.7, 0.5])
    s, gradients = theta[:2].copy(), []
    for t in range(T):
        if t % truncation == 0:
            ds = np.eye(3)[:2] if t == 0 else np.zeros((2, 3))
        s, ds = A @ s + B @ theta, A @ ds + B
        gradients.append((s + C) @ ds)
    return np.mean(gradients, 0)


def test_the_closed_form_is_right():
    def loss(theta):
        problem, state, losses = quadratic(), quadratic().reset(theta, None), []
        for _ in range(T):
            state, loss = problem.step(theta, state, None)
            losses.append(loss)
        return sum(losses) / T
    np.testing.assert_allclose(flat(jax.grad(loss)(THETA)), truth(), rtol=1e-5)


@pytest.mark.parametrize("truncation", [2, 4])
@pytest.mark.parametrize("name", ["es", "truncated_backprop", "smoothed_backprop"])
def test_truncated_estimators_miss_what_came_before(name, truncation):
    make, sigma = {"es": (estimators.es, 0.1), "truncated_backprop": (estimators.truncated_backprop, 0.0),
                   "smoothed_backprop": (estimators.truncated_backprop, 0.1)}[name]
    estimator = make(quadratic(), num_pairs=64, truncation=truncation, horizon=T, sigma=sigma, cap=1e6)
    mean, error = draws(estimator, 2000)
    np.testing.assert_array_less(np.abs(mean - truncated_truth(truncation)), 3 * error + 1e-3)
    assert (np.abs(mean - truth()) > 10 * error).any()  # and that is not the gradient of the episode


def test_without_truncation_all_agree():
    whole = dict(num_pairs=64, truncation=T, horizon=T, cap=1e6)
    for estimator in (estimators.es(quadratic(), sigma=0.1, **whole), estimators.pes(quadratic(), sigma=0.1, **whole)):
        mean, error = draws(estimator, 2000)
        np.testing.assert_array_less(np.abs(mean - truth()), 3 * error + 1e-3)
    exact = estimators.truncated_backprop(quadratic(), **whole)
    gradient, _, _ = exact.estimate(THETA, exact.init(THETA, jax.random.key(0)), jax.random.key(1))
    np.testing.assert_allclose(flat(gradient), truth(), rtol=1e-5)


@pytest.mark.parametrize("make, noise, right", [
    (estimators.pes, {"sigma": 0.1}, True), (estimators.truncated_backprop, {}, False)])
def test_influence_balancing(make, noise, right):
    estimator = make(influence_balancing(), num_pairs=500, truncation=1, horizon=10 ** 7, cap=1e6, **noise)

    def body(carry, key):
        theta, particles = carry
        gradient, particles, _ = estimator.estimate(theta, particles, key)
        return (jax.tree.map(lambda x, g: x - 1e-4 * g, theta, gradient), particles), None

    theta = {"x": jnp.float32(0.5)}
    start = theta, estimator.init(theta, jax.random.key(0))
    (theta, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, jax.random.split(jax.random.key(1), 3000)))(start)
    if right:
        assert abs(float(theta["x"]) + 1 / 6) < 0.005
    else:
        assert float(theta["x"]) > 1.0


def test_every_trajectory_resets_after_the_horizon_and_starts_are_staggered():
    problem = InnerProblem(lambda theta, key: jnp.float32(0), lambda theta, s, key: (s + 1, s + 1))
    estimator = estimators.pes(problem, num_pairs=4, truncation=2, horizon=8, sigma=1.0, cap=1e6)
    theta = {"x": jnp.float32(0)}
    particles = estimator.init(theta, jax.random.key(0))
    assert particles.pairs.t.tolist() == [8, 10, 12, 14]
    seen, estimate = [], jax.jit(estimator.estimate)
    for i in range(8):
        before = particles
        _, particles, _ = estimate(theta, particles, jax.random.key(i))
        seen.append(particles.pairs.t.tolist())
        # xi gains one perturbation a truncation and loses all of them exactly with the state
        fresh = np.array(before.pairs.t) >= 8
        assert (np.array(particles.pairs.state[:, 0])[fresh] == 2).all()
        change = np.array(particles.pairs.xi - jnp.where(fresh[:, None], 0, before.pairs.xi))
        assert np.abs(change).max() < 5 and (change != 0).all()
    assert seen[0] == [2, 4, 6, 8] and sorted(seen[-1]) == [2, 4, 6, 8] and seen[0] == seen[4]


def test_both_signs_share_everything_random():
    """A loss that depends on the key alone must cancel within each pair, exactly."""
    def step(theta, state, key):
        state = state + 0.5 * jax.random.normal(key)
        return state, state + 0 * theta["x"][0]

    problem = InnerProblem(lambda theta, key: jax.random.normal(key), step)
    theta = {"x": jnp.zeros(3)}
    for make in (estimators.es, estimators.pes, estimators.combined):
        estimator = make(problem, num_pairs=3, truncation=4, horizon=8, sigma=0.1)
        particles = estimator.init(theta, jax.random.key(0))
        for i in range(3):
            gradient, particles, _ = jax.jit(estimator.estimate)(theta, particles, jax.random.key(i))
            assert (np.array(gradient["x"]) == 0).all()


def test_smoothed_backprop_of_a_linear_loss_is_that_without_noise():
    """Both signs, and the unroll without noise, meet the same keys."""
    problem = InnerProblem(lambda theta, key: jnp.float32(0), lambda theta, s, key: (s, theta["x"] * jax.random.normal(key)))
    theta, options = {"x": jnp.float32(0)}, dict(num_pairs=3, truncation=4, horizon=4, cap=1e6)
    found = [e.estimate(theta, e.init(theta, jax.random.key(0)), jax.random.key(1))[0]["x"]
             for e in (estimators.truncated_backprop(problem, sigma=sigma, **options) for sigma in (0.0, 0.1))]
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_bad_losses_are_capped_and_counted_and_leave_theta_finite():
    def step(theta, state, key):  # the loss is theta up to step 3, then 100, then inf, then NaN
        losses = jnp.stack([theta["x"], theta["x"], theta["x"], theta["x"] * 100, theta["x"] / 0.0, theta["x"] * jnp.nan])
        return state + 1, losses[state]

    problem = InnerProblem(lambda theta, key: jnp.int32(0), step)
    theta = {"x": jnp.float32(1)}
    for make, noise in ((estimators.truncated_backprop, {}), (estimators.es, {"sigma": 0.01}), (estimators.pes, {"sigma": 0.01})):
        estimator = make(problem, num_pairs=2, truncation=6, horizon=6, cap=10.0, **noise)
        gradient, _, metrics = estimator.estimate(theta, estimator.init(theta, jax.random.key(0)), jax.random.key(1))
        signs = 2 if noise else 1
        assert np.isfinite(gradient["x"]) and metrics["capped"] == 3 * 2 * signs
        assert abs(metrics["loss"] - (3 * 1 + 3 * 10) / 6) < 0.05
        assert metrics["dropped"] == (0 if noise else 2)  # 0 * inf in the backward pass: the gradient is discarded


@pytest.mark.parametrize("name", ["truncated_backprop", "es", "merged", "pes", "combined"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_trajectory_is_counted_and_heals_when_it_starts_over(name, poison):
    """Of two pairs one is at its middle, where its state goes bad: its losses are capped, the others' gradient stays finite."""
    noise = {} if name == "truncated_backprop" else {"sigma": 0.01}
    estimator = getattr(estimators, name)(quadratic(), num_pairs=2, truncation=T // 2, horizon=T, **noise)
    step, key = jax.jit(estimator.estimate), jax.random.key
    _, clean, _ = step(THETA, estimator.init(THETA, key(0)), key(1))
    assert clean.pairs.t.tolist() == [T // 2, T]
    bad = clean._replace(pairs=clean.pairs._replace(state=clean.pairs.state.at[0].set(poison)))
    for i, capped in ((2, T // 2 * (2 if noise else 1)), (3, 0), (4, 0)):
        expected, clean, _ = step(THETA, clean, key(i))
        found, bad, metrics = step(THETA, bad, key(i))
        assert metrics["capped"] == capped and np.isfinite(flat(found)).all()
        assert np.array_equal(found["a"], expected["a"]) == (capped == 0) or name == "combined"  # its variances remember


def test_clipping_scales_each_trajectory_to_the_norm():
    estimator = estimators.truncated_backprop(quadratic(), num_pairs=1, truncation=T, horizon=T, clip=0.5)
    gradient, _, _ = estimator.estimate(THETA, estimator.init(THETA, jax.random.key(0)), jax.random.key(1))
    np.testing.assert_allclose(flat(gradient), 0.5 * truth() / np.linalg.norm(truth()), rtol=1e-5)


def test_a_bounded_adjoint_is_the_identity_with_a_clipped_gradient():
    x = {"a": jnp.float32([3, 4]), "b": jnp.float32(0)}
    pull = lambda scale, bound: jax.grad(lambda x: scale * jnp.sum(estimators.bounded_adjoint(x, bound)["a"] ** 2))(x)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, estimators.bounded_adjoint(x, 1.0), x))
    np.testing.assert_allclose(pull(1.0, 100.0)["a"], [6, 8])       # a norm of 10 passes
    np.testing.assert_allclose(pull(1.0, 5.0)["a"], [3, 4])         # and is halved by a bound of 5
    np.testing.assert_allclose(pull(jnp.inf, 5.0)["a"], [0, 0])


def test_bounding_the_adjoint_keeps_a_chaotic_unroll_from_drowning_the_gradient():
    """The logistic map doubles small differences at each step; theta also enters the loss directly, with gradient 1."""
    def problem(bound):
        def step(theta, x, key):
            x = estimators.bounded_adjoint(x, bound)
            x = (3.99 + 1e-6 * theta["x"]) * x * (1 - x)
            return x, theta["x"] + 1e-3 * x
        return InnerProblem(lambda theta, key: jnp.float32(0.3), step)
    for bound, low, high in ((1e30, 1e3, np.inf), (1e-2, 0.99, 1.01)):
        estimator = estimators.truncated_backprop(problem(bound), num_pairs=1, truncation=80, horizon=80)
        theta = {"x": jnp.float32(0)}
        gradient, _, _ = estimator.estimate(theta, estimator.init(theta, jax.random.key(0)), jax.random.key(1))
        assert low < abs(gradient["x"]) < high


@pytest.mark.parametrize("backend", ["cpu", "gpu"])  # one after another, or all of a device at once
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_rows_are_shared_out_and_come_back_in_order(n, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rows = {"x": jnp.arange(2.0 * n).reshape(n, 2), "i": jnp.arange(n)}
    found = jax.jit(estimators.over_devices(lambda shared, row: shared["y"] @ row["x"] + row["i"], n))({"y": jnp.float32([1, 10])}, rows)
    np.testing.assert_array_equal(found, [2 * i + 10 * (2 * i + 1) + i for i in range(n)])


def test_a_horizon_that_truncations_do_not_fill_is_refused():
    with pytest.raises(ValueError, match="multiple"):
        estimators.es(quadratic(), num_pairs=2, truncation=3, horizon=8, sigma=0.1)


def quartic(horizon):
    """P1's pathological landscape: (w - 4)(w - 3) w^2 after T steps of momentum SGD from w = -1.2, as a function of the momentum."""
    loss = lambda w: (w - 4) * (w - 3) * w ** 2

    def step(theta, state, key):
        w, m, t = state
        m = theta["x"] * m + jax.grad(loss)(w)
        w, t = w - 0.01 * m, t + 1
        return (w, m, t), jnp.where(t == horizon, horizon * loss(w), 0.0)  # their mean over the episode is the last loss

    return InnerProblem(lambda theta, key: (jnp.float32(-1.2), jnp.float32(0), jnp.int32(0)), step)


@pytest.mark.parametrize("horizon, mean, sd", [(10, 63.9, 0.19), (25, 87.8, 20.3), (50, 88.7, 12.6), (100, 44.5, 22.8), (200, 0.5, None)])
def test_the_merge_works_where_variance_shows_and_fails_where_it_does_not(horizon, mean, sd):
    """P1's merge on its quartic, against a NumPy reimplementation and quadrature: the true gradients are 63.9, 88.8, 88.7,
    71.4, 69.2. ES alone has a standard deviation of 7.7 to 21; from 100 steps on backprop mostly sees flat ground."""
    options = dict(num_pairs=128, truncation=horizon, horizon=horizon, sigma=0.01, cap=1e9)
    theta, count = {"x": jnp.float32(0.93)}, 300

    def draw(estimator):
        def body(particles, key):
            gradient, particles, metrics = estimator.estimate(theta, particles, key)
            return particles, (gradient["x"], metrics["weight"])
        start = estimator.init(theta, jax.random.key(0))
        return jax.jit(lambda p: jax.lax.scan(body, p, jax.random.split(jax.random.key(1), count)))(start)[1]

    gradients, weights = draw(estimators.merged(quartic(horizon), **options))
    if sd:
        np.testing.assert_allclose(np.mean(gradients), mean, atol=4 * sd / np.sqrt(count))
        np.testing.assert_allclose(np.std(gradients), sd, rtol=0.25)
    else:
        assert abs(np.mean(gradients)) < 5 and np.mean(weights) > 0.9  # 69.2 it is not
    if horizon == 100:  # a long memory of the variance mends it
        gradients, _ = draw(estimators.combined(quartic(horizon), **options))
        assert abs(np.mean(gradients[50:]) - 71.4) < 4 * np.std(gradients[50:]) / np.sqrt(count - 50) < 10
