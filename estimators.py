"""The meta-gradient of any unrolled computation: truncated backprop, evolution strategies (ES), persistent ES, and both.

All estimate the gradient, with respect to theta, of the mean loss over an episode of T steps (`horizon`) from unrolls of
K steps (`truncation`) of N antithetic pairs of trajectories (`num_pairs`). For pair n, in the truncation it is now in,

    g_n =  w rp_n  +  (1 - w) dL_n / (2 sigma^2) eps_n  +  dL_n / (2 sigma^2) xi_n
           '----- the current truncation -----'     '- earlier truncations -'

    truncated_backprop   w = 1, earlier truncations dropped
    es                   w = 0, earlier truncations dropped
    merged               w by inverse variance, earlier truncations dropped (P1)
    pes                  w = 0, earlier truncations kept (P3)
    combined             w by inverse variance, earlier truncations kept, there with dL - 2 eps.(w rp) in place of dL

where dL = L(theta + eps) - L(theta - eps), L is the mean loss of the truncation, rp its pathwise gradient,
eps ~ N(0, sigma^2), and xi the sum of the trajectory's earlier perturbations. Those that drop earlier truncations are
biased when K < T. All raise ValueError if K does not divide T; a loss that is not finite or not below `cap` counts as `cap`.
Both signs of a pair share everything random: task, initialisation, batches. P1: Metz et al. 2019,
section 3. P3: Vicol et al. 2021, arXiv 2112.13835.

Starts are staggered, so that the pairs together cover all parts of an episode: a trajectory's first episode is cut short,
as if it began where its counter says. A trajectory resets at the start of a truncation, inside the differentiated and
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
    estimate: Callable  # estimate(theta, particles, key) -> (gradient, particles, metrics: mean loss, numbers of capped losses and dropped gradients)


class Particle(NamedTuple):
    """One antithetic pair of trajectories."""
    state: Any    # of the inner problem at the end of the last truncation; [2, ...], one for each sign, in pes, merged and combined
    xi: Any       # [P], sum of the perturbations since the reset (pes, combined; zeros in merged), or () (the others)
    t: jax.Array  # steps since the reset; from T on, the next truncation begins with a reset and T is taken off


class Variances(NamedTuple):
    """Running averages of the variance over the pairs, for each meta-parameter: [P] each; and how many went in."""
    rp: jax.Array
    es: jax.Array
    count: jax.Array


class Particles(NamedTuple):
    """What an estimator carries from one estimate to the next."""
    pairs: Particle  # N of them, stacked
    variances: Any   # combined's weights come from them, merged keeps them unread; () for the others


def truncated_backprop(problem, *, num_pairs, truncation, horizon, sigma=0.0, cap=10.0, clip=jnp.inf):
    """Backprop through one truncation (P1 section 2): little noise, but how theta shaped the start goes unseen.

    With sigma = 0 there is no pair, but one trajectory at theta. With sigma > 0 the gradient is that of the smoothed
    loss (P1's reparameterisation gradient), the mean of both signs, at twice the cost. Each particle's gradient is
    scaled down to a norm of at most `clip`; a non-finite one is replaced by zero and counted.
    """
    def pair(unroll, theta, particle, key):
        eps_key, key = jax.random.split(key)

        def smoothed(theta):
            shared = lambda: jax.random.clone(key)  # both signs meet the same task, batches and reset
            thetas = at_signs(theta, sigma * jax.random.normal(eps_key, theta.shape)) if sigma else [theta]
            losses, rest = zip(*(unroll(theta, particle.state, particle.t, shared()) for theta in thetas))
            return sum(losses) / len(losses), rest[0]

        (loss, (state, capped)), gradient = jax.value_and_grad(smoothed, has_aux=True)(theta)
        gradient, dropped = clip_norm(gradient, clip)
        particle = Particle(state, (), advance(particle.t, truncation, horizon))
        return gradient, particle, {"loss": loss, "capped": capped, "dropped": dropped}

    return over_pairs(pair, problem, num_pairs, truncation, horizon, cap)


def es(problem, *, num_pairs, truncation, horizon, sigma, cap=10.0):
    """Antithetic evolution strategies on one truncation (P1 section 3): smooth, but as short-sighted as backprop.

    Both signs start from the same state, and the positive one carries on, as in P1's released code.
    """
    def pair(unroll, theta, particle, key):
        eps_key, key = jax.random.split(key)
        eps = sigma * jax.random.normal(eps_key, theta.shape)
        loss, (states, capped) = over_rows(lambda theta: unroll(theta, particle.state, particle.t, key), at_signs(theta, eps))
        slope = (loss[0] - loss[1]) / (2 * sigma ** 2)
        particle = Particle(first(states), (), advance(particle.t, truncation, horizon))
        return slope * eps, particle, {"loss": loss, "capped": capped, "dropped": jnp.int32(0)}

    return over_pairs(pair, problem, num_pairs, truncation, horizon, cap)


def pes(problem, *, num_pairs, truncation, horizon, sigma, cap=10.0):
    """Persistent evolution strategies (P3): each sign lives its own trajectory under fresh noise in every truncation,
    and a loss is credited to all the noise its trajectory has met, the current included."""
    def pair(unroll, theta, particle, key):
        eps_key, key = jax.random.split(key)
        eps = sigma * jax.random.normal(eps_key, theta.shape)
        loss, (states, capped) = over_rows(lambda row: unroll(*row, particle.t, key), (at_signs(theta, eps), particle.state))
        xi = jnp.where(particle.t >= horizon, 0, particle.xi) + eps
        slope = (loss[0] - loss[1]) / (2 * sigma ** 2)
        particle = Particle(states, xi, advance(particle.t, truncation, horizon))
        return slope * xi, particle, {"loss": loss, "capped": capped, "dropped": jnp.int32(0)}

    return over_pairs(pair, problem, num_pairs, truncation, horizon, cap, persistent=True)


def combined(problem, *, num_pairs, truncation, horizon, sigma, cap=10.0, clip=jnp.inf, history=True, running=True):
    """The whole formula: inverse-variance weights (P1 section 3) for the current truncation, PES's term (P3) for earlier ones.

    The weights come from earlier estimates (`running`), so that they are independent of what they weigh, or from the
    very same sample, as in P1, which is biased where that sample does not show the variance. Without `history` the
    earlier truncations are dropped and both signs start alike. `clip` is that of truncated_backprop, before the merge.

    The part of dL that w rp explains, 2 eps.(w rp), tells nothing of the past, so the history term goes without it (a
    control variate, after P3's PES-Analytic). That keeps the mean exactly where the loss's curvature in theta does not
    depend on the state; elsewhere it moves by an amount of order sigma^2, as smoothing itself does.
    ValueError for fewer than two pairs, whose variance can't be told. Metrics also hold the mean weight and the terms' variances.
    A meta-parameter that backprop is kept from (`model.paces` does so) has rp = 0 without variance: w is 1, and nothing of ES is left.
    """
    if num_pairs < 2:
        raise ValueError(f"inverse-variance weights need at least 2 pairs, not {num_pairs}")

    def pair(unroll, theta, particle, key):
        eps_key, key = jax.random.split(key)
        eps = sigma * jax.random.normal(eps_key, theta.shape)

        def mean_loss(thetas):
            losses, rest = over_rows(lambda row: unroll(*row, particle.t, key), (thetas, particle.state))
            return jnp.mean(losses), (losses, rest)

        gradients, (loss, (states, capped)) = jax.grad(mean_loss, has_aux=True)(at_signs(theta, eps))
        rp, dropped = clip_norm(jnp.sum(gradients, 0), clip)
        xi = jnp.where(particle.t >= horizon, 0, particle.xi)
        carried = (states, xi + eps) if history else (both(first(states)), xi)
        particle = Particle(*carried, advance(particle.t, truncation, horizon))
        slope = (loss[0] - loss[1]) / (2 * sigma ** 2)
        return (rp, eps, xi, slope), particle, {"loss": loss, "capped": capped, "dropped": dropped}

    def merge(terms, variances):
        rp, eps, xi, slope = terms  # [N, P], [N, P], [N, P], [N]
        es = slope[:, None] * eps
        sample = jnp.var(rp, 0, ddof=1), jnp.var(es, 0, ddof=1)
        v_rp, v_es = variances[:2] if running else sample
        w = (v_es + 1e-30) / (v_es + v_rp + 2e-30)  # [P]
        if running:
            w = jnp.where(variances.count > 0, w, 0.0)
        explained = (eps * rp) @ w / sigma ** 2  # [N]
        past = (slope - explained)[:, None] * xi
        average = lambda old, new: jnp.where(variances.count > 0, 0.99 * old + 0.01 * new, new)
        variances = Variances(average(variances.rp, sample[0]), average(variances.es, sample[1]), variances.count + 1)
        spread = {name: jnp.sum(jnp.var(x, 0, ddof=1)) for name, x in (("rp", rp), ("es", es), ("history", past))}
        metrics = {"weight": jnp.mean(w)} | {f"variance_{name}": x for name, x in spread.items()}
        return w * jnp.mean(rp, 0) + (1 - w) * jnp.mean(es, 0) + jnp.mean(past, 0), variances, metrics

    return over_pairs(pair, problem, num_pairs, truncation, horizon, cap, persistent=True, merge=merge)


merged = functools.partial(combined, history=False, running=False)  # P1's estimator


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def bounded_adjoint(x, bound):
    """x itself; but the gradient that backprop sends back through it has a norm of at most `bound`, and is 0 if not finite.

    Put on what goes from step to step of an unroll (arrays of floats only), it stops the signal from growing on its way (P1
    section 2.3, the product of Hessians) where that happens, and changes nothing elsewhere. Clipping the finished gradient is
    too late: by then the exploded part has drowned the rest.
    """
    return x


bounded_adjoint.defvjp(lambda x, bound: (x, None),
                       lambda bound, _, gradient: (clip_norm(gradient, bound)[0],))


@jax.custom_vjp
def finite_adjoint(x):
    """x itself; but what backprop sends back through it, at any order of differentiation, is 0 where it is not finite.

    Put on the parameters that a loss reads, it keeps a loss that is not finite from cutting the way from later steps to earlier ones.
    """
    return x


finite_adjoint.defvjp(lambda x: (finite_adjoint(x), None),
                      lambda _, gradient: (jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), gradient),))


# ---------------------------------------------------------------- what the estimators share

def make_unroll(problem, truncation, horizon, cap):
    """unroll(theta, state, t, key) -> (mean loss of K steps, (state, number of capped losses)); starts over if t is T.

    A loss that is not finite, or above `cap`, counts as `cap` and carries no gradient (P1 section 4). In the backward
    pass each step is computed again from its state; only that and its random bits are stored.
    """
    def unroll(theta, state, t, key):
        reset_key, key = jax.random.split(key)
        state = jax.lax.cond(t >= horizon, lambda: problem.reset(theta, reset_key), lambda: state)

        def step(state, key):
            state, loss = problem.step(theta, state, key)
            good = jnp.isfinite(loss) & (loss < cap)
            return state, (jnp.where(good, loss, cap), ~good)

        step = jax.checkpoint(step, policy=lambda primitive, *_, **__: "random" in primitive.name)
        state, (losses, capped) = jax.lax.scan(step, state, jax.random.split(key, truncation))
        return jnp.mean(losses), (state, jnp.sum(capped))

    return unroll


def mean(gradients, variances):
    """The merge of all but `combined`: the mean over the pairs."""
    return jnp.mean(gradients, 0), variances, {}


def over_pairs(pair, problem, num_pairs, truncation, horizon, cap, persistent=False, merge=mean):
    """The Estimator that runs pair(unroll, theta, particle, key) on N particles and merges what they find to one gradient.

    There and in `merge` theta is one vector, [P].
    """
    if horizon % truncation:
        raise ValueError(f"the horizon ({horizon}) must be a multiple of the truncation ({truncation})")
    unroll = make_unroll(problem, truncation, horizon, cap)

    def init(theta, key):
        zeros, xi = jnp.zeros(ravel_pytree(theta)[0].shape), ()
        state = jax.eval_shape(problem.reset, theta, key)  # the values don't matter: the first truncation begins with a reset
        if persistent:
            state, xi = jax.eval_shape(both, state), zeros
        state, xi = jax.tree.map(lambda x: jnp.zeros((num_pairs, *x.shape), x.dtype), (state, xi))
        phase = jnp.arange(num_pairs) * (horizon // truncation) // num_pairs
        variances = () if merge is mean else Variances(zeros, zeros, jnp.int32(0))
        return Particles(Particle(state, xi, horizon + phase * truncation), variances)

    def estimate(theta, particles, key):
        theta, unravel = ravel_pytree(theta)
        rows = particles.pairs, jax.random.split(key, num_pairs)
        one = lambda theta, row: pair(lambda x, *rest: unroll(unravel(x), *rest), theta, *row)
        found, pairs, metrics = over_devices(one, num_pairs)(theta, rows)
        gradient, variances, more = merge(found, particles.variances)
        metrics = {"loss": jnp.mean(metrics["loss"]), "capped": jnp.sum(metrics["capped"]),
                   "dropped": jnp.sum(metrics["dropped"])} | more
        return unravel(gradient), Particles(pairs, variances), metrics

    return Estimator(init, estimate)


def sharding(n, alone=False):
    """How to lay out n rows over as many devices as divide n: the same number from each process; `alone`, from this one only.
    n must be a multiple of the number of processes."""
    processes = [jax.local_devices()] if alone else [jax.local_devices(i) for i in range(jax.process_count())]
    share = max(d for d in range(1, len(processes[0]) + 1) if n % (d * len(processes)) == 0)
    devices = [device for process in processes for device in process[:share]]
    mesh = jax.make_mesh((len(devices),), ("rows",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    return jax.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))


def over_rows(f, rows):
    """f(row) of each row, stacked. A CPU takes them one after another: what a row needs then stays in its cache, its branches stay
    branches, and XLA's code for CPUs is slower with a batch dimension than without. Other devices take all at once."""
    return jax.lax.map(f, rows) if jax.default_backend() == "cpu" else jax.vmap(f)(rows)


def over_devices(f, n, alone=False):
    """-> a function of (shared, n rows) that gives f(shared, row) of each row, stacked; the devices of `sharding` share them out."""
    def each(shared, rows):
        return over_rows(functools.partial(f, shared), rows)

    rows, everywhere = sharding(n, alone), jax.sharding.PartitionSpec()
    return jax.shard_map(each, mesh=rows.mesh, in_specs=(everywhere, rows.spec), out_specs=rows.spec, check_vma=False)


def advance(t, truncation, horizon):
    return jnp.where(t >= horizon, t - horizon, t) + truncation


def at_signs(theta, eps):
    return jnp.stack([theta + eps, theta - eps])


def first(states):
    return jax.tree.map(lambda x: x[0], states)


def both(state):
    return jax.tree.map(lambda x: jnp.stack([x, x]), state)


def clip_norm(gradient, clip):
    """The gradient with norm at most `clip`, or zeros if it is not finite; and whether it was dropped, 0 or 1."""
    raveled, unravel = ravel_pytree(gradient)
    norm = jnp.sqrt(jnp.sum(raveled * raveled))
    good = jnp.isfinite(norm)
    scale = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-30))
    return unravel(jnp.where(good, scale * raveled, 0.0)), (~good).astype(int)
