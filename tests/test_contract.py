"""What every optimizer promises, learned or designed by hand: types, donation, trees, losses."""
import collections
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import tree

import model

LEARNED = {"hierarchical": model.hierarchical(lstm=4, units=3),
           "per_parameter_mlp": model.per_parameter_mlp(4, 2),
           "component_lstm": model.component_lstm(3)}
OPTIMIZERS = {name: x.optimizer(x.init(jax.random.key(0))) for name, x in LEARNED.items()} | {
    "sgd": model.sgd(0.1), "momentum": model.momentum(0.1), "rmsprop": model.rmsprop(0.01),
    "adam": model.adam(0.01), "muon": model.muon(0.01, horizon=9),
    "nadamw": model.nadamw(0.01, weight_decay=0.1, warmup=2, horizon=9)}
SHAPES = {"again": (3, 4), "b": (4,), "empty": (2, 0), "scalar": (), "w": (3, 4)}
MIXED = dict(zip(SHAPES, ("bfloat16", "float16", "float32", "bfloat16", "float16")))
each = pytest.mark.parametrize("name", OPTIMIZERS)


def drawn(kind, steps=6):
    """Parameters, gradients: numbers of few bits, which all types hold exactly."""
    rng = np.random.default_rng(0)
    both = [{k: rng.standard_normal((*more, *shape)) for k, shape in SHAPES.items()}
            for more in ((), (steps,))]
    both[1]["again"][:, 1] = 0
    types = MIXED if kind == "mixed" else dict.fromkeys(SHAPES, kind)
    return [{k: jnp.asarray(np.round(8 * x) / 8, types[k]) for k, x in part.items()}
            for part in both]


def train(optimizer, params, state, grads):
    """Each gradient counts twice, in two halves of a step, as optax.MultiSteps would have it."""
    def half(carry, grad):
        params, state, sums, i = carry
        sums = tree.map(jnp.add, sums, grad)

        def whole():
            losses = dict(loss=1.0, valid_loss=np.float64(2))
            updates, after = optimizer.update(sums, state, params, **losses)
            return tree.map(jnp.add, params, updates), after, tree.map(jnp.zeros_like, sums)

        found = jax.lax.cond(i % 2 == 1, whole, lambda: (params, state, sums))
        return (*found, i + 1), None

    carry = params, state, tree.map(jnp.zeros_like, params), jnp.int32(0)
    return jax.lax.scan(half, carry, tree.map(lambda x: jnp.repeat(x, 2, 0), grads))[0][:2]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_all(names, params, states, grads):
    return {name: train(OPTIMIZERS[name], params[name], states[name], grads) for name in names}


def kinds(x, axis=0):
    return tree.map(lambda x: (x.shape[axis:], x.dtype, x.weak_type), x)


PLAIN = {}  # what float32 gives


@pytest.mark.parametrize("names", [*zip(LEARNED), tuple(OPTIMIZERS.keys() - LEARNED.keys())])
@pytest.mark.parametrize("kind", ["float32", "mixed", "float64"])
def test_all_types_in_jit_with_donation_scan_vmap_and_accumulation(names, kind):
    with jax.enable_x64(kind == "float64"):
        (params, grads), own = drawn(kind), {name: drawn(kind)[0] for name in names}
        states = {name: OPTIMIZERS[name].init(params) for name in names}
        before = {name: kinds((params, states[name])) for name in names}
        for name in names:
            step = jax.vmap(OPTIMIZERS[name].update, (0, None, None))
            many = jax.eval_shape(step, grads, states[name], params)
            assert kinds(many, 1) == before[name]  # nor is the next step compiled anew
        after = train_all(names, own, states, grads)
        assert kinds(after) == before
        for name in names:
            OPTIMIZERS[name].init(params)  # neither these nor theta were given away with a state
    for name in names:
        plain = PLAIN.setdefault(name, {k: np.float64(x) for k, x in after[name][0].items()})
        for k, x in after[name][0].items():
            begin = np.float64(params[k])
            rounding = 12 * float(jnp.finfo(x.dtype).eps) * np.max(np.abs(begin), initial=1) + 1e-5
            np.testing.assert_allclose(np.float64(x), plain[k], rtol=0, atol=rounding)
            assert name == "component_lstm" or not x.size or np.abs(plain[k] - begin).max() > 1e-3


Pair = collections.namedtuple("Pair", "a b")
ONES = jnp.ones((2, 3))
MESH = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
DIVIDED = jax.device_put(ONES, jax.NamedSharding(MESH, jax.sharding.PartitionSpec("x")))
ALIKE, REAL = "same structure and shapes", "real floating-point numbers"


@each
@pytest.mark.parametrize("params, grads, told, sentence", [
    ({"w": ONES}, {"w": ONES.T}, {}, ALIKE), ({"w": ONES}, {"v": ONES}, {}, ALIKE),
    (Pair(ONES, ONES), {"a": ONES, "b": ONES}, {}, ALIKE), ({"w": ONES}, None, {}, ALIKE),
    (None, {"w": ONES}, {}, ALIKE), ({"w": ONES + 1j}, {"w": ONES + 1j}, {}, REAL),
    ({"w": jnp.arange(3)}, {"w": jnp.arange(3)}, {}, REAL),
    ({"w": DIVIDED}, {"w": DIVIDED}, {}, "explicit axes"),
    ({"w": ONES}, {"w": ONES}, dict(loss=jnp.ones(2)), "one real number"),
    ({"w": ONES}, {"w": ONES}, dict(loss=1 + 1j), "one real number"),
    ({"w": ONES}, {"w": ONES}, dict(valid_loss=jnp.ones((1, 2))), "one real number")])
def test_what_is_refused(name, params, grads, told, sentence):
    optimizer = OPTIMIZERS[name]
    with pytest.raises(ValueError, match=sentence):
        optimizer.update(grads, optimizer.init({"w": ONES}), params, **told)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in LEARNED])
def test_plain_numbers_may_be_parameters(name):
    params, optimizer = {"w": 1.0}, OPTIMIZERS[name]
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert np.isfinite(updates["w"]) and updates["w"].dtype == jnp.float32


@each
def test_nothing_to_train(name):
    for nothing in ({}, {"group": {}}, [None]):
        state = OPTIMIZERS[name].init(nothing)
        assert OPTIMIZERS[name].update(nothing, state, nothing, loss=1.0) == (nothing, state)


def test_how_losses_may_be_told():
    echo = model.careful(lambda params: (), lambda grads, state, params, loss, valid_loss: (
        {"w": loss + 0 * ONES, "v": valid_loss}, state))
    params = {"w": ONES, "v": jnp.ones(())}
    for loss in (0.5, 1, jnp.bfloat16(0.5), jnp.full((1,), 0.5), np.float64(0.5)):
        for told in (dict(loss=loss), dict(value=loss), dict(loss=loss, value=7.0, other=1)):
            updates, _ = echo.update(params, (), params, valid_loss=loss, **told)
            for x in updates.values():
                np.testing.assert_array_equal(x, np.float32(loss) + np.zeros(x.shape))
    assert np.isnan(echo.update(params, (), params)[0]["v"])


def test_one_loss_of_1e20_is_forgotten():
    optimizer, params = OPTIMIZERS["hierarchical"], {"w": ONES}
    losses = np.float32([1 + 0.1 * np.random.default_rng(0).standard_normal(600)] * 2)
    losses[0, [40, 41]] = 1e20, 3e38

    def step(state, loss):
        updates, state = optimizer.update(params, state, params, loss=loss, valid_loss=loss)
        return state, updates["w"]

    path = jax.vmap(lambda row: jax.lax.scan(step, optimizer.init(params), row))
    (inner, record), found = path(losses)
    np.testing.assert_allclose(*inner.train[:, :2], rtol=0.05)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(*record.noise, rtol=0.05)


@pytest.mark.parametrize("horizon", [0, -5, np.nan, np.inf, 400.0, "400", True, 2 ** 31])
def test_a_horizon_is_a_positive_integer(horizon):
    def muon(horizon):
        return model.muon(0.1, horizon=horizon).update(ONES, model.muon(0.1).init(ONES), ONES)

    for make in (model.hierarchical, model.per_parameter_mlp, muon):
        with pytest.raises(ValueError, match="positive integer"):
            make(horizon=horizon)


def test_tensors_of_one_shape_are_one_program():
    shapes, optimizer = [(6, 4), (4,), (4, 4), (4, 3), (3,), (3, 2)], OPTIMIZERS["hierarchical"]

    def size(tensors):
        params = [jnp.zeros(shapes[i % 6]) for i in range(tensors)]
        state = jax.eval_shape(optimizer.init, params)
        return len(str(jax.make_jaxpr(optimizer.update)(params, state, params)).splitlines())

    assert size(96) < 2 * size(6)


def test_shipped_files_are_float32_under_x64():
    with jax.enable_x64(True):
        for name in ("pretrained.npz", "pretrained_mlp.npz"):
            _, theta = model.load(Path(__file__).parent.with_name(name))
            assert {x.dtype.name for x in theta.values()} == {"float32"}
