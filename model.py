"""A learned optimizer is a function from meta-parameters theta to an optimizer like any other.

What this project adds to those of the papers, one thing after the other; put together from these,
the optimizers that are meta-trained; and how they are kept.
"""
import functools
import inspect
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import random, tree

import machine
from optimizers import (  # noqa: F401
    Optimizer, adam, careful, going_back, momentum, muon, nadamw, orthogonal, rmsprop, sgd,
    steps_of)
from papers import (
    DECAYS, Form, LearnedOptimizer, component_lstm, joined, p1, p2, product, tanh_times)
from tensors import by_shape, each, mean, per_tensor, row

HORIZON = 400  # steps of a training, where nothing else is said
B1, B2 = 1, 3  # Adam's two among DECAYS


# ---------------------------------------------------------------- what this project adds

def directions(seen):
    """Adam's direction for each of the five momenta, [5, n]."""
    m_hat = seen.m / (1 - DECAYS ** seen.t)
    v_hat = seen.v[B2] / (1 - DECAYS[B2, 0] ** seen.t)
    return m_hat / (jnp.sqrt(v_hat + 1e-30) + 1e-8)[None]  # 1e-30: differentiable without g


def relative_time(horizon, t):
    """Steps of a training, as if it took HORIZON of them; after its end the time stands still."""
    return jnp.minimum(t, horizon) * (HORIZON / horizon)


def unit_weights(learned):
    """The same with a theta in which all weights of layers are of size 1, so that noise and outer
    steps change what a wide layer puts out no more than a narrow one's."""
    def scaled(theta, power):
        names = [f"{name[:-2]}/w" for name in theta if name.endswith("/b") and name != "step/b"]
        return theta | {name: theta[name] * len(theta[name]) ** power for name in names}

    return LearnedOptimizer(
        lambda key: scaled(learned.init(key), 0.5),
        lambda theta: learned.optimizer(scaled(theta, -0.5)))


def anchored_step(pace, steered_by=()):
    """The step -pace lr exp(min(a, 1)) (adam + d), which scales and bends Adam's; at first
    a = d = 0.

    d and a are linear in the last hidden layer and the features, so that a weight decay or another
    momentum is learned in a few steps. What the layer adds to d has mean zero, and what d reads
    directly is odd: to push a whole tensor one way kills ReLU units, which costs much later and is
    seen in no derivative. Hence the limit of 1, too. pace(theta, seen): [tensors]. `steered_by` are
    functions of what is seen -> [F, tensors]: linear in them, each tensor adds to its a (steer[0])
    and, within +-1, to the weights of what its d reads (all others).
    """
    def change(theta, hidden, features, odd, seen):
        w = theta("step/w", (len(hidden[0]), 2))
        of_d = theta("direct/d", (odd,))
        of_a = theta("direct/a", (len(features[0]),))
        log_lr = theta("log_lr", (), 0.0, np.log(0.01))
        slow = pace(theta, seen)
        steer = jnp.zeros((1 + odd, len(seen.shapes)))
        if steered_by:
            read = joined(*(f(seen) for f in steered_by))
            steer = theta("steer", (len(read), 1 + odd)).T @ read

        def one(h, x, adam, steer, slow):
            hidden_d, hidden_a = product(w, h)
            direct = of_d[:, None] + jnp.tanh(steer[1:, :, 0])
            d = hidden_d - mean(hidden_d)[:, None]
            d += jnp.einsum("fc,fcn->cn", direct, x[:odd])
            a = hidden_a + jnp.tensordot(of_a, x, 1) + steer[0]
            return -slow * jnp.exp(log_lr + jnp.minimum(a, 1.0)) * (adam + d)

        adam = by_shape(directions(seen)[B1], seen.shapes)
        steer, slow = (by_shape(x, seen.shapes, 1) for x in (steer, slow))
        return row([*map(one, hidden, features, adam, steer, slow)])

    return change


def count(which, shapes, axis):
    """How many inputs (axis=2) or units (axis=1) of each tensor have a weight in `which`, [n] ->
    [tensors]. Units are the last dimension, inputs all others."""
    counts = []
    for shape, x in zip(dict.fromkeys(shapes), by_shape(which, shapes)):
        inputs, units = math.prod(shape[:-1]), math.prod(shape[-1:])
        x = x.reshape(len(x), inputs, units)
        counts.append(jnp.sum(jnp.any(x, axis), 1))
    return jnp.concatenate(counts)


def paces(horizon, theta, seen):
    """What anchored steps of each tensor are multiplied by, [tensors].

    Weights (two dimensions or more) of more than 32 inputs step shorter, at first in proportion
    (muP, Yang et al. 2021). Biases, beside weights, step a quarter as far: a few long steps push
    ReLUs below zero for good, a jump that backprop can't see. Where units rest, that no example of
    the batch activates, all steps are shorter, by up to exp(3). A training of more than HORIZON
    steps takes shorter ones, like horizon^(-3/4); after the horizon they fall like 1 / t^2.
    """
    weights = np.array([len(shape) > 1 for shape in seen.shapes])
    bias = 0.25 if weights.any() else 1.0
    longer = min(HORIZON / horizon, 1) ** 0.75
    over = jnp.maximum(seen.t / horizon, 1) ** 2
    real = seen.v[B2] > 0  # ever had a gradient: neither padding, nor what is always zero
    power = theta("width_power", (), 0.0, 1.0)
    narrow = (32 / jnp.maximum(count(real, seen.shapes, 2), 32)) ** power
    moved = real & (seen.g != 0)
    ever, now = (weights @ count(x, seen.shapes, 1) for x in (real, moved))
    awake = jnp.exp(-3 * (ever - now) / jnp.maximum(ever, 1))
    return jnp.where(weights, narrow, bias) * awake * longer / over


def signal_to_noise(seen, scale=10):
    """How well a tensor's gradients agree over the span of each average, [6, tensors]: in decibels
    above pure noise (bels, if `scale` is 1); and, last, five times the share of parameters at rest.
    """
    real = seen.v[B2] > 0  # ever had a gradient
    rows = jnp.stack([*directions(seen) ** 2, real, real & (seen.g == 0)])
    means = per_tensor(by_shape(rows, seen.shapes))
    powers, real, rest = jnp.split(means, [len(DECAYS), len(DECAYS) + 1])
    decays = DECAYS ** seen.t
    noise = (1 - DECAYS) / (1 + DECAYS)  # of averaged white noise, in the long run
    noise = noise * (1 + decays) / (1 - decays)
    signal = scale * jnp.log10(powers / (real + 1e-8) / noise + 0.1)  # at most ten below it
    return jnp.concatenate([signal, 5 * rest / (real + 1e-8)])


def generalisation_gap(train, valid):
    """How far the running validation loss lies above the running training loss, in e-folds, within
    +-3. With it, losses deviate by 2% of the first one at least (Form.least)."""
    train, valid = (jnp.abs(x) + 1e-6 for x in (train, valid))
    return (jnp.clip(jnp.log(valid / train), -3, 3),)


def lstm_time_losses(seen):
    """The LSTM, the time (P1's, of 10 to 3000 steps) and the losses, [F, tensors]."""
    shared = jnp.concatenate([tanh_times(seen)[1:7], seen.losses])
    return jnp.concatenate([seen.h, each(shared, seen.shapes)])


def orthogonal_momentum(seen):
    """A matrix's momentum, made `orthogonal`: close to Nesterov's of decay 0.8; [1, n]."""
    momenta = by_shape(seen.m[0] + seen.m[B1], seen.shapes)
    found = [jax.vmap(functools.partial(orthogonal, shape=shape))(x)
             for shape, x in zip(dict.fromkeys(seen.shapes), momenta)]
    return row(found)[None]


ADDITIONS = ("anchored_step", "paces", "steering", "signal_to_noise", "orthogonal_momentum",
             "generalisation_gap", "going_back", "relative_time", "unit_weights")


def ours(paper, horizon, without, steered_by=()):
    """paper(form) with all that this project adds, less what is named, of ADDITIONS."""
    horizon = steps_of(horizon)
    if set(without) - set(ADDITIONS):
        raise ValueError(f"without must name some of {', '.join(ADDITIONS)}, not {without}.")
    pace = functools.partial(paces, horizon)
    if "paces" in without:
        pace = lambda theta, seen: jnp.ones(len(seen.shapes))
    steered_by = [f for f in steered_by if not {"steering", f.__name__} & {*without}]
    form = Form(bound=5.0)
    if "anchored_step" not in without:
        form = form._replace(step=anchored_step(pace, steered_by))
    if "generalisation_gap" not in without:
        form = form._replace(gap=generalisation_gap, least=0.02)
    if "signal_to_noise" not in without:
        form = form._replace(lstm_inputs=(functools.partial(signal_to_noise, scale=1),))
    if "orthogonal_momentum" not in without:
        form = form._replace(mlp_inputs=(orthogonal_momentum,))
    if "relative_time" not in without:
        time = functools.partial(relative_time, horizon)
        form = form._replace(time=time, valid_decay=0.8)
    found = paper(form=form)
    return found if "unit_weights" in without else unit_weights(found)


# ---------------------------------------------------------------- those that are meta-trained

@functools.cache
def per_parameter_mlp(units=32, layers=1, rms=True, horizon=HORIZON, without=()):
    """P1's optimizer, told of g^2, with our step, paces, time and unit weights. `horizon`: the
    steps that a training takes."""
    return ours(functools.partial(p1, units, layers, rms), horizon, without)


@functools.cache
def hierarchical(lstm=32, units=16, horizon=HORIZON, without=()):
    """P2's optimizer with all that this project adds. `horizon`: the steps that a training takes;
    after them the LSTM rests."""
    paper = functools.partial(p2, lstm, units)
    found = ours(paper, horizon, without, (lstm_time_losses, signal_to_noise))
    if "going_back" in without:
        return found
    return LearnedOptimizer(found.init, lambda theta: going_back(found.optimizer(theta)))


LEARNED = {f.__name__: f for f in (per_parameter_mlp, hierarchical, component_lstm, p1, p2)}


def known(name, **arguments):
    """Those of the arguments that the one of that name takes."""
    taken = inspect.signature(LEARNED[name]).parameters
    return {k: x for k, x in arguments.items() if k in taken}


def made(name, **arguments):
    """The one LearnedOptimizer of these arguments, with defaults told or not, in any order."""
    signature = inspect.signature(LEARNED[name])
    told = signature.bind(**arguments).arguments
    defaults = {k: signature.parameters[k].default for k in told}
    return LEARNED[name](**{k: x for k, x in told.items() if x != defaults[k]})


# ---------------------------------------------------------------- on disk

def save(path, name, theta, longer={}, **facts):
    """Writes theta, the name (a key of LEARNED) and facts (JSON values) to an .npz file. The fact
    `sizes` holds the arguments the optimizer was made with; the rest, what it learned from. Of
    `longer`, see `join`."""
    arrays = {"about": json.dumps({"name": name, "sizes": {}, **facts})}
    for prefix, numbers in ("theta/", theta), ("longer/", longer):
        for k, x in numbers.items():
            arrays[prefix + k] = np.asarray(x, np.float32)
    machine.write_npz(path, arrays)


def join(path, shorter, longer):
    """Writes one file of two that were learned for shorter and for longer trainings: for one of T
    steps, `load` then gives what lies between them, by log T. ValueError if it can't be."""
    (_, theta), (other, far) = load(shorter), load(longer)
    facts, more = about(shorter), about(longer)
    first, longest = (x["sizes"].get("horizon", 0) for x in (facts, more))
    alike = load(shorter, longest or None)[0] is other
    alike = alike and facts.get("caution") == more.get("caution")
    if not alike or not 0 < first < longest or "longest" in facts | more:
        raise ValueError(f"{longer} must hold the same kind of optimizer as {shorter}, of the same "
                         "--caution, learned for longer trainings.")
    save(path, **facts | {"theta": theta, "longer": far, "longest": longest})


def load(path, horizon=None):
    """-> (LearnedOptimizer, theta), for trainings of `horizon` steps (or as many as it knows); of
    a file of two thetas, what lies between them, see `join`.

    ValueError, with one sentence, if the file is not one that `save` wrote."""
    facts, arrays = about(path), machine.read_npz(path)
    name, thetas = facts["name"], [part(arrays, "theta/")]
    arguments = {k: tuple(x) if isinstance(x, list) else x for k, x in facts["sizes"].items()}
    told = {} if horizon is None else {"horizon": steps_of(horizon)}
    try:
        here = arguments | known(name, **told)
        found = made(name, **here)
        wanted = jax.eval_shape(found.init, random.key(0))
        if "longest" in facts:
            thetas.append(part(arrays, "longer/"))
            ends = np.log([steps_of(arguments["horizon"]), steps_of(facts["longest"])])
            share = float(np.interp(np.log(here["horizon"]), ends, (0, 1)))
    except (KeyError, TypeError, ValueError, ArithmeticError):
        raise ValueError(f"{path} holds an optimizer this version doesn't know: {facts}.") from None
    if not all(fits(theta, wanted) for theta in thetas):
        raise ValueError(f"{path} holds meta-parameters that do not fit a {name} of {arguments}, "
                         "or are not finite.")
    theta = thetas[0]
    if "longest" in facts:
        theta = tree.map(lambda x, far: x + share * (far - x), *thetas)
    return found, tree.map(jnp.asarray, theta)


def fits(theta, wanted):
    """Whether it has those names, shapes and types, and all numbers are finite."""
    alike = theta.keys() == wanted.keys() and all(
        (x.shape, x.dtype) == (wanted[k].shape, wanted[k].dtype) for k, x in theta.items())
    return alike and all(np.isfinite(x).all() for x in theta.values())


def part(arrays, prefix):
    """Those of the arrays whose names begin with it, without it."""
    return {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}


def about(path):
    """The facts that `save` wrote beside theta: a dict with at least "name" and "sizes"."""
    try:
        facts = json.loads(str(machine.read_npz(path)["about"]))
        return {"name": facts["name"], "sizes": {**facts["sizes"]}} | facts
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path} is an .npz file, but not written by this project.") from None
