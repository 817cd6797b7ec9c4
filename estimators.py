"""The meta-gradient of any unrolled computation: truncated backprop, evolution strategies (ES), and persistent ES (PES).

All estimate the gradient, with respect to theta, of the mean loss over an episode of T steps (`horizon`) from unrolls of
K steps (`truncation`) of N antithetic pairs of trajectories (`num_pairs`). For pair n, in the truncation it is now in,

    g_n =  w rp_n  +  (1 - w) dL_n / (2 sigma^2) eps_n  +  dL_n / (2 sigma^2) xi_n
           '----- the current truncation -----'     '- earlier truncations -'

    truncated_backprop   w = 1, earlier truncations dropped
    es                   w = 0, earlier truncations dropped
    pes                  w = 0, earlier truncations kept: of the three the only one without bias when K < T

where dL = L(theta + eps) - L(theta - eps), L is the mean loss of the truncation, rp its pathwise gradient,
eps ~ N(0, sigma^2), and xi the sum of the trajectory's earlier perturbations. Both signs of a pair share everything
random: task, initialisation, batches. P1: Metz et al. 2019, section 3. P3: Vicol et al. 2021, arXiv 2112.13835.

Starts are staggered, so that the pairs together cover all parts of an episode; until its first reset a trajectory only
pretends to be where its counter says. A trajectory resets at the start of a truncation, inside the differentiated and
perturbed unroll, with that particle's own theta, so that learned initial states receive their gradient.
"""
import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree


class InnerProblem(NamedTuple):
    reset: Callable  # reset(theta, key) -> state
    step: Callable   # step(theta, state, key) -> (state, loss)


class Estimator(NamedTuple):
    init: Callable      # init(theta, key) -> particles
    estimate: Callable  # estimate(theta, particles, key) -> (gradient, particles, metrics)


class Particle(NamedTuple):
    """One antithetic pair of trajectories; an estimator's `particles` are N of them, stacked."""
    state: Any    # of the inner problem at the end of the last truncation; pes stacks both signs' states, [2, ...]
    xi: Any       # sum of the perturbations since the reset, shaped like theta (pes), or () (the others)
    t: jax.Array  # steps since the reset; once it is T, the next truncation begins with a reset


def truncated_backprop(problem, *, num_pairs, truncation, horizon, sigma=0.0, cap=10.0, clip=jnp.inf):
    """Backprop through one truncation (P1 section 2): little noise, but how theta shaped the start goes unseen.

    With sigma = 0 there is no pair, but one trajectory at theta. With sigma > 0 the gradient is that of the smoothed
    loss (P1's reparameterisation gradient), the mean of both signs, at twice the cost. Each particle's gradient is
    scaled down to a norm of at most `clip`; a non-finite one is replaced by zero and counted.
    """
    unroll = make_unroll(problem, truncation, horizon, cap)
    signs = (1, -1) if sigma else (0,)

    def smoothed(theta, eps, particle, key):
        at = lambda sign: jax.tree.map(lambda x, e: x + sign * e, theta, eps)
        shared = lambda: jax.random.clone(key)  # both signs meet the same task, batches and reset
        losses, rest = zip(*(unroll(at(sign), particle.state, particle.t, shared()) for sign in signs))
        return sum(losses) / len(losses), rest[0]

    def pair(theta, particle, key):
        eps_key, key = jax.random.split(key)
        eps = perturbation(eps_key, theta, sigma)
        (loss, (state, capped)), gradient = jax.value_and_grad(smoothed, has_aux=True)(theta, eps, particle, key)
        gradient, dropped = clip_norm(gradient, clip)
        particle = Particle(state, (), advance(particle.t, truncation, horizon))
        return gradient, particle, {"loss": loss, "capped": capped, "dropped": dropped}

    return over_pairs(pair, problem, num_pairs, truncation, horizon)


def es(problem, *, num_pairs, truncation, horizon, sigma, cap=10.0):
    """Antithetic evolution strategies on one truncation (P1 section 3): smooth, but as short-sighted as backprop.

    Both signs start from the same state, and the positive one carries on, as in P1's released code.
    """
    unroll = make_unroll(problem, truncation, horizon, cap)

    def pair(theta, particle, key):
        eps_key, key = jax.random.split(key)
        eps = perturbation(eps_key, theta, sigma)
        loss, (states, capped) = jax.vmap(unroll, (0, None, None, None))(
            at_signs(theta, eps, jnp.float32([1, -1])), particle.state, particle.t, key)
        slope = (loss[0] - loss[1]) / (2 * sigma ** 2)
        gradient = jax.tree.map(lambda e: slope * e, eps)
        particle = Particle(first(states), (), advance(particle.t, truncation, horizon))
        return gradient, particle, {"loss": loss, "capped": capped, "dropped": jnp.int32(0)}

    return over_pairs(pair, problem, num_pairs, truncation, horizon)


def pes(problem, *, num_pairs, truncation, horizon, sigma, cap=10.0):
    """Persistent evolution strategies (P3): each sign lives its own trajectory under fresh noise in every truncation,
    and a loss is credited to all the noise its trajectory has met, the current included."""
    unroll = make_unroll(problem, truncation, horizon, cap)

    def pair(theta, particle, key):
        eps_key, key = jax.random.split(key)
        eps = perturbation(eps_key, theta, sigma)
        loss, (states, capped) = jax.vmap(unroll, (0, 0, None, None))(
            at_signs(theta, eps, jnp.float32([1, -1])), particle.state, particle.t, key)
        xi = jax.tree.map(lambda x, e: jnp.where(particle.t >= horizon, 0, x) + e, particle.xi, eps)
        slope = (loss[0] - loss[1]) / (2 * sigma ** 2)
        gradient = jax.tree.map(lambda x: slope * x, xi)
        particle = Particle(states, xi, advance(particle.t, truncation, horizon))
        return gradient, particle, {"loss": loss, "capped": capped, "dropped": jnp.int32(0)}

    return over_pairs(pair, problem, num_pairs, truncation, horizon, persistent=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def bounded_adjoint(x, bound):
    """x itself; but the gradient that backprop sends back through it has a norm of at most `bound`, and is 0 if not finite.

    Put on the state of an unroll at each step, it stops the signal from growing from step to step (P1 section 2.3, the
    product of Hessians) where that happens, and changes nothing elsewhere. Clipping the finished gradient is too late:
    by then the exploded part has drowned the rest.
    """
    return x


bounded_adjoint.defvjp(lambda x, bound: (x, None),
                       lambda bound, _, gradient: (clip_norm(gradient, bound)[0],))


# ---------------------------------------------------------------- what the estimators share

def make_unroll(problem, truncation, horizon, cap):
    """unroll(theta, state, t, key) -> (mean loss of K steps, (state, number of capped losses)); starts over if t is T.

    A loss that is not finite, or above `cap`, counts as `cap` and carries no gradient (P1 section 4). In the backward
    pass each step is computed again from its state instead of being stored.
    """
    def unroll(theta, state, t, key):
        reset_key, key = jax.random.split(key)
        state = jax.tree.map(lambda new, old: jnp.where(t >= horizon, new, old), problem.reset(theta, reset_key), state)

        def step(state, key):
            state, loss = problem.step(theta, state, key)
            good = jnp.isfinite(loss) & (loss < cap)
            return state, (jnp.where(good, loss, cap), ~good)

        step = jax.checkpoint(step, policy=lambda primitive, *_, **__: "random" in primitive.name)
        state, (losses, capped) = jax.lax.scan(step, state, jax.random.split(key, truncation))
        return jnp.mean(losses), (state, jnp.sum(capped))

    return unroll


def over_pairs(pair, problem, num_pairs, truncation, horizon, persistent=False):
    """The Estimator that runs `pair` on N particles at once and averages their gradients."""
    if horizon % truncation:
        raise ValueError(f"the horizon ({horizon}) must be a multiple of the truncation ({truncation})")

    def init(theta, key):
        state = jax.vmap(problem.reset, (None, 0))(theta, jax.random.split(key, num_pairs))
        phase = jnp.arange(num_pairs) * (horizon // truncation) // num_pairs
        xi = ()
        if persistent:
            state = jax.tree.map(lambda x: jnp.stack([x, x], 1), state)
            xi = jax.tree.map(lambda x: jnp.zeros((num_pairs, *x.shape)), theta)
        return Particle(state, xi, horizon - phase * truncation)

    def estimate(theta, particles, key):
        gradients, particles, metrics = jax.vmap(pair, (None, 0, 0))(theta, particles, jax.random.split(key, num_pairs))
        gradient = jax.tree.map(lambda g: jnp.mean(g, 0), gradients)
        return gradient, particles, {"loss": jnp.mean(metrics["loss"]), "capped": jnp.sum(metrics["capped"]),
                                     "dropped": jnp.sum(metrics["dropped"])}

    return Estimator(init, estimate)


def advance(t, truncation, horizon):
    return jnp.where(t >= horizon, 0, t) + truncation


def perturbation(key, theta, sigma):
    """eps ~ N(0, sigma^2), shaped like theta; one draw for all of it."""
    raveled, unravel = ravel_pytree(theta)
    return unravel(sigma * jax.random.normal(key, raveled.shape) if sigma else jnp.zeros_like(raveled))


def at_signs(theta, eps, signs):
    """theta + sign * eps for every sign, stacked."""
    return jax.tree.map(lambda x, e: jax.vmap(lambda s: x + s * e)(signs), theta, eps)


def first(states):
    return jax.tree.map(lambda x: x[0], states)


def clip_norm(gradient, clip):
    """The gradient with norm at most `clip`, or zeros if it is not finite; and whether it was dropped, 0 or 1."""
    raveled, unravel = ravel_pytree(gradient)
    norm = jnp.sqrt(jnp.sum(raveled * raveled))
    good = jnp.isfinite(norm)
    scale = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-30))
    return unravel(jnp.where(good, scale * raveled, 0.0)), (~good).astype(int)
