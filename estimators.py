"""The meta-gradient of any unrolled computation: one formula, and the five estimators it holds.

All estimate the gradient, with respect to theta, of the mean loss over an episode of T steps
(`horizon`) from unrolls of K steps (`truncation`, or fewer) of N antithetic pairs (`num_pairs`).
For pair n, in the truncation it is now in,

    g_n =  w rp_n  +  (1 - w) dL_n / (2 sigma^2) eps_n  +  dL_n / (2 sigma^2) xi_n
           '----- the current truncation -----'     '- earlier truncations -'

    truncated_backprop   w = 1, earlier truncations dropped; sigma may be 0: one trajectory a pair
    es                   w = 0, earlier truncations dropped
    merged               w by inverse variance, earlier truncations dropped (P1)
    pes                  w = 0, earlier truncations kept (P3)
    combined             w by inverse variance, earlier truncations kept,
                         there with dL - 2 eps.(w rp) in place of dL

where dL = L(theta + eps) - L(theta - eps), L is the mean loss of the truncation, rp its pathwise
gradient (mean of both signs), eps ~ N(0, sigma^2), and xi the sum of the trajectory's earlier ones.
Those that drop earlier truncations are biased when K < T. Both signs of a pair share everything
random: task, initialisation, batches. The last truncation of an episode ends with it, and counts as
much if that makes it short. Starts are staggered over the episode. Resets are part of the unroll,
so that learned initial states get a gradient. P1: Metz et al. 2019. P3: Vicol et al. 2021.
"""
import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random, tree
from jax.flatten_util import ravel_pytree

import machine


class InnerProblem(NamedTuple):
    reset: Callable  # reset(theta, key) -> state
    step: Callable   # step(theta, state, key) -> (state, loss)


class Estimator(NamedTuple):
    init: Callable      # init(theta, key) -> particles
    estimate: Callable  # estimate(theta, particles, key, lengths=None) -> (gradient,
    #                     particles, metrics); lengths [N]: steps of each pair (None: K)


class Particles(NamedTuple):
    state: Any         # [N, signs, ...] of the inner problem, at the end of the last truncation
    xi: jax.Array      # [N, P], sum of the perturbations since the reset; [N, 1] zeros if dropped
    t: jax.Array       # [N], place in the episode; from T on, the next truncation resets
    variances: Any     # running means of those of rp and ES [P], and how many: where w needs them


def estimator(problem, *, weight, history, num_pairs, truncation, horizon, sigma, cap=10.0,
              clip=jnp.inf, floor=1e-30, varying=False):
    """The formula above; ValueError for what can't work. `weight`: w is 0, 1, or from the "sample"
    itself (P1), or "running", from earlier ones, see `weights`; `floor` is added to variances.
    `history`: earlier truncations are kept, each sign has its own state; `varying`: lengths come.

    A loss that is not finite, or not below `cap`, counts as `cap`. Each pair's rp is scaled to a
    norm of at most `clip`, dropped if not finite. What w rp explains of dL tells nothing of the
    past, so history goes without it (after P3's PES-Analytic): a bias of order sigma^2 at most."""
    check(weight, num_pairs, truncation, horizon, sigma)
    unroll = make_unroll(problem, truncation, cap)
    signs, whole = np.float32([1, -1] if sigma else [0]), not (varying or horizon % truncation)
    variance = sigma ** 2 or 1  # without noise, eps and xi are zero

    def init(theta, key):
        size = flat(theta)[0].size
        like = jax.eval_shape(problem.reset, theta, key)  # no values: the first truncation resets
        state = tree.map(lambda x: jnp.zeros((num_pairs, len(signs), *x.shape), x.dtype), like)
        xi = jnp.zeros((num_pairs, size if history else 1), jnp.float32)
        none = jnp.zeros(size, jnp.float32)
        variances = (none, none, jnp.int32(0)) if weight == "running" else ()
        unit = truncation if whole else 1
        phases = horizon // unit * np.arange(num_pairs) // num_pairs  # evenly spread
        return Particles(state, xi, jnp.int32(horizon + unit * phases), variances)

    def estimate(theta, particles, key, lengths=None):
        theta, unravel = flat(theta)
        state, xi, t, variances = particles
        keys = jax.vmap(random.split)(random.split(key, num_pairs))  # [N, 2]
        draw = functools.partial(random.normal, shape=theta.shape, dtype=theta.dtype)
        eps = sigma * jax.vmap(draw)(keys[:, 0])
        over = t >= horizon
        t, xi = jnp.where(over, t - horizon, t), jnp.where(over[:, None], 0, xi)
        taken = jnp.minimum(truncation if lengths is None else lengths, horizon - t)
        cut = None if whole and lengths is None else taken
        pair = functools.partial(run_pair, unroll, unravel, signs, weight != 0, clip)
        rows = state, over, cut, eps, keys[:, 1]
        L, rp, state, counts = machine.over_devices(pair, num_pairs)(theta, rows)
        dL = (L[:, 0] - L[:, -1])[:, None]  # [N, 1]
        es = dL * eps / (2 * variance)
        w, variances, metrics = weights(weight, rp, es, counts["dropped"], variances, floor)
        past = (dL - 2 * jnp.sum(eps * w * rp, 1, keepdims=True)) * xi / (2 * variance)
        gradient = jnp.mean(w * rp + (1 - w) * es + past, 0)
        metrics |= {"loss": jnp.mean(L)} | tree.map(jnp.sum, counts)
        if history:
            xi = xi + eps
        else:  # the positive sign carries on for both
            state = tree.map(lambda x: jnp.broadcast_to(x[:, :1], x.shape), state)
        return unravel(gradient), Particles(state, xi, t + taken, variances), metrics
    return Estimator(init, estimate)


truncated_backprop = functools.partial(estimator, weight=1, history=False, sigma=0.0)
es = functools.partial(estimator, weight=0, history=False)
merged = functools.partial(
    estimator, weight="sample", history=False, floor=1e-8 / 4)  # P1: 1e-8, of terms twice ours
pes = functools.partial(estimator, weight=0, history=True)
combined = functools.partial(estimator, weight="running", history=True)
MERGING = ("sample", "running")
FORGET = 0.99  # decay of the running variances, per estimate


def flat(theta):
    """-> (theta as one float32 row [P], how to put such a row back). ValueError for integers."""
    row, unravel = ravel_pytree(theta)
    if not all(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in tree.leaves(theta)):
        raise ValueError("theta must hold real floating-point numbers alone; leave out all others")
    return row.astype(jnp.float32), lambda x: unravel(x.astype(row.dtype))


def check(weight, num_pairs, truncation, horizon, sigma):
    if num_pairs < 1 + (weight in MERGING):
        raise ValueError(f"num_pairs must be at least {1 + (weight in MERGING)}, not {num_pairs}")
    if not (1e-15 < sigma < 1e15 or sigma == 0 and weight == 1):
        raise ValueError(f"sigma must be positive (0 for backprop alone), not {sigma}")
    if not 1 <= truncation <= horizon < 2 ** 30:
        raise ValueError(f"the truncation ({truncation}) must be from 1 to the horizon "
                         f"({horizon}), and that below 2^30")


def run_pair(unroll, unravel, signs, differentiate, clip, theta, row):
    """Both signs of one pair -> losses L [signs], rp [P], states, and numbers of what went wrong.
    theta [P]; row: states [signs, ...], whether their episode is over, how many steps they take
    (None: all K), eps [P] and the key that both share."""
    state, over, taken, eps, key = row

    def mean_loss(theta):
        def one(sign):
            moved, state = sign
            return unroll(unravel(moved), state, over, taken, key)

        thetas = theta[None] + signs[:, None] * eps[None]
        losses, states, capped = machine.over_rows(one, (thetas, state))
        return jnp.mean(losses), (losses, states, jnp.sum(capped))
    if differentiate:
        gradient, (losses, states, capped) = jax.grad(mean_loss, has_aux=True)(theta)
        rp, dropped = clip_norm(gradient, clip)
    else:
        losses, states, capped = mean_loss(theta)[1]
        rp, dropped = jnp.zeros_like(theta), 0
    return losses, rp, states, {"capped": capped, "dropped": dropped}


def weights(weight, rp, es, dropped, variances, floor):
    """-> (w [N, P] or [1, 1], running variances, metrics), of both terms, [N, P] each.

    w = v_es / (v_es + v_rp), of variances over the pairs: of this very sample, as in P1, biased
    where a sample doesn't show the variance; or running ones of earlier samples, independent of
    what they weigh. A meta-parameter that backprop is kept from has rp = 0, so w is near 1: ES
    hardly moves it either. A pair whose rp was dropped [N] gives ES alone.
    """
    if weight not in MERGING:
        return jnp.full((1, 1), weight), variances, {}
    there = jnp.logical_not(dropped)[:, None]
    both = jnp.stack([jnp.where(there, rp, es), es])
    new = jnp.var(both, 1, ddof=1)  # [2, P]
    v_rp, v_es = new if weight == "sample" else variances[:2]
    w = (v_es + floor) / (v_es + v_rp + 2 * floor)
    if weight == "running":
        *old, count = variances
        w = jnp.where(count > 0, w, 0.0)
        forget = jnp.where(count > 0, FORGET, 0.0)
        average = (forget * before + (1 - forget) * x for before, x in zip(old, new))
        variances = *average, count + 1
    return jnp.where(there, w[None], 0), variances, {
        "weight": jnp.mean(w),
        "variance_rp": jnp.sum(new[0]),
        "variance_es": jnp.sum(new[1])}


def make_unroll(problem, truncation, cap):
    """unroll(theta, state, over, taken, key) -> (mean loss of `taken` steps (None: all K), state,
    number of capped losses).

    It resets if the episode is `over`. A capped loss carries no gradient (P1's code). Going
    backward, each step is computed again from its state; random bits are kept.
    """
    def unroll(theta, state, over, taken, key):
        reset_key, key = random.split(key)
        state = lax.cond(over, lambda: problem.reset(theta, reset_key), lambda: state)

        def step(before, row):
            i, key = row
            state, loss = problem.step(theta, before, key)
            good = jnp.isfinite(loss) & (loss < cap)
            loss, capped = jnp.where(good, loss, cap).astype(jnp.float32), ~good
            if taken is not None:
                there = i < taken
                state = tree.map(functools.partial(jnp.where, there), state, before)
                loss = jnp.where(there, loss, 0)
                capped = capped & there
            return state, (loss, capped)

        step = jax.checkpoint(step, policy=lambda primitive, *_, **__: "random" in primitive.name)
        rows = jnp.arange(truncation), random.split(key, truncation)
        state, (losses, capped) = lax.scan(step, state, rows)
        return jnp.sum(losses) / (truncation if taken is None else taken), state, jnp.sum(capped)
    return unroll


def clip_norm(gradient, clip):
    """The gradient with a norm of at most `clip`, or zeros if not finite; and 1 if it wasn't."""
    flat, unravel = ravel_pytree(gradient)
    norm = jnp.linalg.norm(flat)
    good = jnp.isfinite(norm)
    scale = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-30))
    return unravel(jnp.where(good, scale * flat, 0.0)), (~good).astype(int)
