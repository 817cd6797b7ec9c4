"""The program as its users meet it: runs, resumes after kill -9, refuses what it can't do."""
import argparse
import csv
import dataclasses
import functools
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random, tree

import data
import estimators
import evaluate
import machine
import meta_train
import model
import objective
import tasks
from settings import ESTIMATORS, Settings
from test_model import adam

ROOT = Path(__file__).parent.parent
TINY = ("--tasks", "function,mlp", "--optimizer", "per_parameter_mlp", "--horizon", 20,
        "--truncation", 20, "--seed", 3)
FILE_SIZE = resource.RLIMIT_FSIZE
SETTINGS = meta_train.Settings(tasks=("function", "mlp"), optimizer="per_parameter_mlp", horizon=20,
                               truncation=20, seed=3)
log_of = lambda folder: [row | {"seconds": 0} for row in csv.DictReader(
    (folder / "log.csv").read_text().splitlines())]
steps_logged = lambda folder: [int(row["step"]) for row in log_of(folder)]
outer_steps_done = lambda folder: (model.about(folder / "theta.npz")["outer_steps_done"]
                                   if (folder / "theta.npz").exists() else -1)
contents = lambda folder: {str(path.relative_to(folder)): path.is_file() and path.read_bytes()
                           for path in folder.rglob("*")}
rate_of = lambda theta: jnp.exp(theta["log_lr"] + theta["log_scale"])


def bowl(pool="meta_train"):
    """A family that compiles in no time; each split has its own minimum."""
    return tasks.TaskFamily(
        "bowl", lambda key: random.uniform(key, (3,), minval=0.5),
        lambda task, key: {"x": 1 + random.normal(key, (3,))},
        lambda task, key, split: 0.1 * (data.SPLITS.index(split) + random.normal(key, (3,))),
        lambda task, params, batch: jnp.sum(task * (params["x"] - batch) ** 2))


@functools.cache
def rates(horizon=400):
    """A learned optimizer that does, too: SGD of a learned rate."""
    def update(theta, grads, state, params=None, **losses):
        return tree.map(lambda g: -rate_of(theta) * jnp.nan_to_num(g), grads), state
    return model.LearnedOptimizer(
        lambda key: dict(zip(("log_lr", "log_scale"), 0.1 * random.normal(key, (2,)) - 1.5)),
        lambda theta: model.Optimizer(lambda params: (), functools.partial(update, theta)))


made = functools.cache(meta_train.make_outer)
make_outer = lambda settings: made(dataclasses.replace(  # what else a run is told changes no step
    settings, outer_steps=1, minutes=1.0, save_seconds=1.0))


def play(monkeypatch):
    monkeypatch.setitem(tasks.FAMILIES, "function", bowl)
    monkeypatch.setitem(tasks.FAMILIES, "mlp", bowl)
    monkeypatch.setitem(model.LEARNED, "per_parameter_mlp", rates)
    monkeypatch.setattr(meta_train, "make_outer", make_outer)
    for module, name in (meta_train, "finish"), (evaluate, "picture"):
        monkeypatch.setattr(module, name, lambda *_: None)


toys = pytest.fixture(play, name="toys")


@pytest.fixture
def theta(tmp_path, monkeypatch):
    """A theta.npz that compiles in no time, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "CACHE", tmp_path)
    monkeypatch.setitem(model.LEARNED, "per_parameter_mlp", rates)
    model.save("theta.npz", "per_parameter_mlp", rates().init(random.key(0)))


def one_baseline(monkeypatch):
    """Adam by three names, to compile less."""
    for name in ("SGD", "momentum", "RMSProp"):
        monkeypatch.delitem(evaluate.BASELINES, name)
    for name in ("Adam + cosine", "Muon + cosine"):
        monkeypatch.setitem(evaluate.BASELINES, name, evaluate.BASELINES["Adam"])


def main(*arguments):
    """The command in this process, with the devices that JAX has here."""
    sys.argv = ["meta_train.py", "--devices", "2", *map(str, arguments)]
    meta_train.main()


def refused(program, arguments, monkeypatch, capsys):
    """The one sentence with which a program refuses its arguments."""
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(program).main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in err, arguments
    assert err.splitlines()[-1].startswith(f"{program}.py: error: "), (arguments, err)
    return err.splitlines()[-1]


def wait_until(ready, *processes):
    deadline = time.monotonic() + 600
    while not ready():
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.02)


def start(*arguments, cwd):
    """A process that runs meta_train.py with the toys, and not too fast."""
    code = (f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; import time, pytest\n"
            "import meta_train, test_meta_train; test_meta_train.play(pytest.MonkeyPatch())\n"
            "meta_train.report = lambda *_: time.sleep(0.05); sys.argv[0] = 'meta_train.py'\n"
            "meta_train.main()")
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=cwd,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_ends_with_the_table_and_all_files(tmp_path, monkeypatch, capsys):
    """The only one without toys."""
    one_baseline(monkeypatch)
    folder = tmp_path / "run"
    main(*TINY, *"--tasks function --outer-steps 9 --compare 4 --out".split(), folder)
    said = capsys.readouterr().out
    assert set(os.listdir(folder)) == {"theta.npz", "checkpoint.npz", "log.csv", "curves.png",
                                       "comparison-function.png", "table.json"}
    assert steps_logged(folder) == list(range(1, 10)) and "learned, against" in said
    assert json.loads((folder / "table.json").read_text())["function"]["tasks"] == 4
    facts, (_, theta) = model.about(folder / "theta.npz"), model.load(folder / "theta.npz")
    assert dict(outer_steps_done=9, seed=3, tasks=["function"]).items() <= facts.items()
    assert facts["sizes"] == {"horizon": 20, "without": []}
    stored = machine.read_npz(folder / "checkpoint.npz")
    for i, (name, x) in enumerate(sorted(theta.items()), len(theta)):  # the average's leaves
        shorter = np.float32(np.log(0.7)) if name == "log_lr" else 0
        np.testing.assert_array_equal(x, stored[f"leaf{i:04}"] + shorter)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of five steps."""
    folder = tmp_path_factory.mktemp("small") / "run"
    folder.mkdir()  # by another that was killed in its first save
    (folder / "partial-checkpoint.npz").write_text("")
    with pytest.MonkeyPatch.context() as monkeypatch:
        play(monkeypatch)
        main(*TINY, "--outer-steps", 5, "--out", folder)
    return folder


def test_kill_and_resume_is_bit_identical(toys, small, tmp_path):
    """And what a run began with is needed no more once it has saved."""
    folder, whole, begin = tmp_path / "run", tmp_path / "whole", tmp_path / "theta.npz"
    shutil.copy(small / "theta.npz", begin)
    arguments = *TINY, "--begin", begin, "--outer-steps", 40
    process = start(*arguments, "--save-seconds", 0.1, "--out", folder, cwd=tmp_path)
    wait_until(lambda: outer_steps_done(folder) > 0, process)
    process.kill()
    process.communicate()
    assert outer_steps_done(folder) < 40 and model.load(folder / "theta.npz")  # not cut off
    begin.unlink()
    process = start("--resume", folder, cwd=tmp_path)
    main(*TINY, "--begin", small / "theta.npz", "--outer-steps", 40, "--out", whole)
    assert process.communicate(timeout=600)[1] == "" and process.returncode == 0
    mine, reference = (machine.read_npz(x / "checkpoint.npz") for x in (folder, whole))
    assert all((mine[k] == x).all() for k, x in reference.items() if k.startswith("leaf"))
    assert log_of(folder) == log_of(whole) and steps_logged(folder) == list(range(1, 41))


@pytest.mark.parametrize("arguments, wanted", [
    ("", dict(truncation=400)), ("--horizon 40", dict(truncation=40)),
    ("--horizon 40 --truncation 20", dict(truncation=20)),
    ("--horizon 40 --estimator pes", dict(truncation=40)),
    ("--recipe p1 --truncation 40", dict(truncation=40)),
    ("--recipe p2 --horizon 80", dict(truncation=40)),
    ("--estimator pes --sigma 1", dict(truncation=200, sigma=1.0, outer_steps=1600)),
    ("--without averaging,caution --caution 2", dict(averaging="last", caution=2.0, warmup=10)),
    ("--recipe p1 --clip 2", dict(truncation=200, adjoint=np.inf, clip=2.0, warmup=1, b1=0.5))])
def test_what_is_said_counts_then_the_recipe_then_what_is_left_out_then_what_suits(
        arguments, wanted, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["meta_train.py", *arguments.split()])
    assert wanted.items() <= vars(meta_train.parse(argparse.ArgumentParser())[0]).items()


def test_a_run_can_begin_with_an_optimizer_that_is_there(toys, small, tmp_path):
    settings = dataclasses.replace(SETTINGS, begin=str(small / "theta.npz"))
    run = make_outer(settings)[0](random.key(5))
    _, theta = model.load(settings.begin)
    theta["log_lr"] -= np.log(0.7)  # what is handed out steps shorter than what was learned
    assert tree.all(tree.map(np.allclose, run.theta, theta)) and run.step == 0
    shipped = dict(optimizer="hierarchical", begin=evaluate.PRETRAINED)
    for other in (dict(optimizer="p1"), shipped | {"without": ("relative_time",)}):
        with pytest.raises(ValueError, match="another kind"):
            make_outer(dataclasses.replace(settings, **other))
    make_outer(dataclasses.replace(settings, **shipped))
    model.save(tmp_path / "bare.npz", "per_parameter_mlp", theta)  # of an unknown horizon
    make_outer(dataclasses.replace(settings, begin=str(tmp_path / "bare.npz")))


def test_few_examples_reach_learning(toys, monkeypatch):
    shares = []
    monkeypatch.setattr(tasks, "few_examples", lambda family, x: shares.append(x) or family)
    make_outer(dataclasses.replace(SETTINGS, few=0.25))
    assert shares == 2 * [0.25]


def interrupted(monkeypatch, interruption):
    """interruption(run) before each outer step; it may return another Run."""
    begin, steps = make_outer(SETTINGS)
    changed = {name: lambda run, key, step=step: step(interruption(run) or run, key)
               for name, step in steps.items()}
    monkeypatch.setattr(meta_train, "make_outer", lambda settings: (begin, changed))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_scheduler_save_and_leave_and_meanwhile_no_other_run_may(
        number, toys, tmp_path, monkeypatch, capsys):
    folder, handler = tmp_path / "run", signal.getsignal(number)
    def interruption(run):
        if run.step == 3:
            arguments = "--devices", 2, "--resume", folder
            assert "Another run is at work" in refused("meta_train", arguments, monkeypatch, capsys)
            os.kill(os.getpid(), number)
    interrupted(monkeypatch, interruption)
    main(*TINY, "--save-seconds", 1e-9, "--out", folder)
    assert f"stopped; go on with --resume {folder}" in capsys.readouterr().out
    assert outer_steps_done(folder) == steps_logged(folder)[-1] == 4
    assert signal.getsignal(number) == handler


def test_a_full_disk_ends_the_run_but_not_the_last_save(small, toys, tmp_path, monkeypatch, capsys):
    folder, (soft, hard) = shutil.copytree(small, tmp_path / "run"), resource.getrlimit(FILE_SIZE)
    resource.setrlimit(FILE_SIZE, (3000, hard))  # bytes
    try:
        arguments = "--devices", 2, "--resume", folder, "--outer-steps", 9
        assert "File too large" in refused("meta_train", arguments, monkeypatch, capsys)
    finally:
        resource.setrlimit(FILE_SIZE, (soft, hard))
    assert contents(folder) == contents(small)


def test_minutes_count_from_each_launch_and_a_clock_that_jumps_changes_nothing(
        small, toys, tmp_path, monkeypatch):
    clock, late, days = time.monotonic, [0.0], iter(np.tile((-1e6, 1e6, 0), 10 ** 5))
    monkeypatch.setattr(time, "monotonic", lambda: clock() + late[0])
    monkeypatch.setattr(time, "time", lambda: 1.8e9 + next(days))
    interrupted(monkeypatch, lambda run: late.append(late.pop() + 1e4 * (int(run.step) == 1)))
    main(*TINY, "--outer-steps", 5, "--minutes", 5, "--out", tmp_path / "run")
    assert steps_logged(tmp_path / "run") == [1, 2] and outer_steps_done(tmp_path / "run") == 2
    folder = shutil.copytree(tmp_path / "run", tmp_path / "copy")  # of the other we have the lock
    main("--resume", folder, "--minutes", 5)
    assert log_of(folder) == log_of(small)
    assert [row["family"] for row in log_of(folder)] == [*SETTINGS.tasks * 2, "function"]  # in turn
    (begin, steps), rows = make_outer(SETTINGS), []
    meta_train.train(SETTINGS, tmp_path, begin(random.key(3)), rows, steps, time.monotonic())
    assert rows == [] and outer_steps_done(tmp_path) == 0


def test_a_run_that_only_explodes_stops_and_leaves_the_last_good_save(toys, tmp_path, monkeypatch):
    """Theta is NaN from the fourth outer step on."""
    monkeypatch.setattr(meta_train, "PATIENCE", 20)
    interrupted(monkeypatch, lambda run: run._replace(
        theta=tree.map(lambda x: x * (jnp.nan if run.step >= 3 else 1), run.theta)))
    begin, steps = meta_train.make_outer(SETTINGS)
    for most, kind, why in ((100, ValueError, "20 outer steps in a row"),
                            (9, FloatingPointError, "not finite any more")):
        rows, settings = [], dataclasses.replace(SETTINGS, save_seconds=1e-9, outer_steps=most)
        with pytest.raises(kind, match=why):
            meta_train.train(settings, tmp_path, begin(random.key(0)), rows, steps)
        assert [row["capped"] for row in rows] == ([0] * 3 + [40] * 20)[:most]
        assert steps_logged(tmp_path) == [1, 2, 3] and outer_steps_done(tmp_path) == 3
        assert all(np.isfinite(x).all() for x in model.load(tmp_path / "theta.npz")[1].values())


def test_too_little_memory_is_told_and_no_other_error_is_taken_for_it(monkeypatch, capsys):
    for words, told in (("RESOURCE_EXHAUSTED: Out of memory", True), ("INTERNAL: a bug", False)):
        def fail(*_):
            raise jax.errors.JaxRuntimeError(words)
        monkeypatch.setattr(meta_train, "run_all", fail)
        with pytest.raises(SystemExit if told else jax.errors.JaxRuntimeError):
            main()
        assert ("choose fewer --num-pairs" in capsys.readouterr().err) == told


def test_a_folder_that_another_run_has_filled_meanwhile_is_left_alone(
        small, toys, tmp_path, monkeypatch, capsys):
    def slow(settings):
        shutil.copytree(small, tmp_path / "run")
        return make_outer(settings)

    monkeypatch.setattr(meta_train, "make_outer", slow)
    said = refused("meta_train", [*TINY, "--devices", 2, "--out", tmp_path / "run"],
                   monkeypatch, capsys)
    assert "Another run has written" in said
    assert log_of(tmp_path / "run") == log_of(small)


WRONG = {"meta_train": f"""--nonsense; --tasks mlp,chess; --tasks mlp,mlp; --tasks=; --caution 0;
    --optimizer adam; --recipe p3; --without adam; --estimator rtrl; --target test; --clip 0;
    --seed {10 ** 20}; --outer-steps many; --outer-steps 0; --outer-steps {2 ** 31}; --minutes -1;
    --minutes nan; --horizon 30 --truncation 30; --jitter 1; --shortest 0; --sigma -1;
    --num-pairs 0; --estimator merged --num-pairs 1; --compare 3; --decay-steps nan; --out small;
    --out file; --out file/run; --out partial-small; --out /proc/run; --resume nowhere;
    --resume empty; --resume damaged; --resume foreign; --resume stranger; --resume=;
    --resume small --seed 4; --resume less; --resume former; --learning-rate inf;
    --resume small --estimator es; --resume small --out other; --devices 0; --devices two; --wait 0;
    --wait inf; --processes 2; --process 0; --coordinator here; --coordinator here:80;
    --coordinator here:there --processes 2 --process 0; --coordinator here:80 --processes 2;
    --coordinator here:80 --processes 2 --process 2;
    --coordinator here:80 --processes 2 --process -1; --num-tasks {2 ** 31}; --num-tasks -1;
    --num-pairs {2 ** 31 - 1}; --devices 1000000; --horizon 0; --horizon {2 ** 31}; --truncation 0;
    --b1 1; --outer-loss root; --save-seconds 0; --adjoint 0; --learning-rate -1; --few 1.1;
    --few 1 --tasks function,table; --begin missing.npz; --begin foreign.npz; --begin theta.npz;
    --recipe p2 --sigma 0; --recipe p2 --truncation 500""",
         "evaluate": f"""missing.npz; foreign.npz; other.npz; --tasks 3; --tasks 0; --tasks many;
    theta.npz --horizon 30; --nonsense; --family chess; --seed {2 ** 31};
    theta.npz --data missing.npz; theta.npz --data other.npz; theta.npz --data file;
    theta.npz --json here --picture here; theta.npz --json {"x" * 300}/table.json;
    theta.npz --tasks {2 ** 31}; theta.npz --horizon 0; theta.npz --horizon {2 ** 31 + 4};
    theta.npz --net rnn; theta.npz --net conv; theta.npz theta.npz;
    theta.npz --data other.npz --family mlp; theta.npz --picture no/such/folder/picture.png;
    theta.npz --picture empty; theta.npz --json no/such/folder/table.json;
    theta.npz --json theta.npz""",
         "experiments": f"""nothing; landscape --seed x; landscape --theta theta.npz;
    landscape --out file/x; landscape --seed -1; landscape --seed {10 ** 20};
    regularisation --theta missing.npz; wall-clock --theta foreign.npz; own-data;
    landscape --data other.npz; own-data --data missing.npz; own-data --data other.npz"""}


@pytest.mark.parametrize("program", WRONG)
def test_wrong_uses_end_in_one_sentence_and_write_nothing(
        program, small, toys, theta, tmp_path, monkeypatch, capsys):
    """Nor into the cache: Adam is not yet tuned for --recipe p2."""
    Path("file").write_text("")
    Path("foreign.npz").write_bytes(b"PK not really")
    np.savez("other.npz", x=np.ones(2))
    for name in ("empty", "damaged", "foreign", "stranger"):
        Path(name).mkdir()
    Path("damaged/checkpoint.npz").write_bytes((small / "checkpoint.npz").read_bytes()[:5000])
    np.savez("foreign/checkpoint.npz", x=np.ones(3))
    np.savez("stranger/checkpoint.npz", settings=np.array(5))
    shutil.copytree(small, "small")
    shutil.copytree(small, "partial-small")
    shutil.copytree(small, "less")  # a checkpoint with an array less
    arrays = machine.read_npz("less/checkpoint.npz")
    np.savez("less/checkpoint.npz", **{k: x for k, x in arrays.items() if k != "leaf0007"})
    Path("former").mkdir()  # as versions wrote it that kept no log and named families in a string
    stored = json.loads(str(arrays.pop("settings"))) | {"tasks": "mlp"}
    Path("moved").mkdir()  # by a learned optimizer that was told of all outer steps
    moved = stored | {"tasks": SETTINGS.tasks, "outer_optimizer": "theta.npz"}
    np.savez("moved/checkpoint.npz", settings=json.dumps(moved), **arrays)
    kept = {k: x for k, x in arrays.items() if k != "log"}
    np.savez("former/checkpoint.npz", settings=json.dumps(stored), **kept)
    before = contents(tmp_path)
    for arguments in WRONG[program].split(";"):
        devices = ["--devices", 2] * (program == "meta_train" and "--devices" not in arguments)
        refused(program, [*arguments.split(), *devices], monkeypatch, capsys)
    arguments = "--devices", 2, "--resume", "moved", "--outer-steps", 9
    said = refused("meta_train", arguments, monkeypatch, capsys)
    assert "begun with another outer_steps" in said
    assert contents(tmp_path) == before


@pytest.mark.parametrize("target, split", [("valid", "outer_valid"), ("train", "train")])
@pytest.mark.parametrize("b, name, outer_batches", [
    (0, "end_root", 1), (0.36, "end_root", 1), (0, "mean", 2), (0.6, "normalised", 3)])
def test_the_outer_loss_by_hand(target, split, b, name, outer_batches):
    """After step 30 of 40; in new tasks, and in those of a pool, with Adam's best losses."""
    family, theta, key = bowl(), rates().init(random.key(0)), random.key(2)
    pool = (random.split(random.key(5), 2), jnp.float32([b, b])) if b else None
    problem = meta_train.inner_problem(
        Settings(target=target, horizon=40, outer_loss=name, outer_batches=outer_batches),
        family, rates(), pool)
    def mean(task, x, key):
        keys = random.split(key, outer_batches) if outer_batches > 1 else [key]
        losses = [family.loss(task, {"x": x}, family.batch(task, k, split)) for k in keys]
        return sum(losses) / outer_batches
    task, inner, begin, baseline = problem.reset(theta, random.key(1))
    assert not b or any((task == family.sample(key)).all() for key in pool[0])
    last, (step_key, batch_key) = random.split(random.key(1), 3)[2], random.split(key)
    np.testing.assert_allclose(begin, mean(task, inner.params["x"], last), rtol=1e-6)
    slope = 2 * task * (inner.params["x"] - family.batch(task, random.split(step_key)[0], "train"))
    x = inner.params["x"] - rate_of(theta) * slope
    value = mean(task, x, batch_key)
    state = task, inner._replace(step=jnp.int32(29)), begin, baseline
    (_, after, *_), loss = jax.jit(problem.step)(theta, state, key)
    np.testing.assert_allclose(after.params["x"], x, rtol=1e-5)
    root = 10 * 0.75 ** 4 * (np.sqrt(value / begin) - np.sqrt(b)) / (1 - np.sqrt(b))
    expected = dict(end_root=root, mean=value, normalised=(value / begin - b) / (1 - b))
    np.testing.assert_allclose(loss, expected[name], rtol=1e-4)


def test_batches_that_are_not_finite_leave_the_gradient_of_the_others():
    """As if their losses were zero: to train on, to measure, a fifth of both."""
    def slope(theta, value):
        family = bowl()._replace(
            batch=lambda task, key, split: (
                bowl().batch(task, key, split), jnp.where(random.uniform(key) < 0.2, value, 1.0)),
            loss=lambda task, params, batch: bowl().loss(task, params, batch[0]) * batch[1])
        problem = meta_train.inner_problem(Settings(horizon=20, adjoint=1e9), family, rates())
        unroll, key = estimators.make_unroll(problem, 20, 31.6), random.key(0)
        return unroll(theta, problem.reset(theta, key), True, None, key)[::2]
    found = jax.jit(jax.grad(slope, has_aux=True))
    theta = rates().init(random.key(0))
    left_out, _ = found(theta, 0.0)
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        broken, capped = found(theta, value)
        np.testing.assert_allclose(broken["log_lr"], left_out["log_lr"], rtol=1e-4)
        assert 0 < capped < 10 and abs(left_out["log_lr"]) > 0.1


def test_what_goes_back_from_step_to_step_is_bounded():
    """Here by next to nothing: of two steps' gradient only what each does by itself is left."""
    theta, key = rates().init(random.key(0)), random.key(1)
    problem = meta_train.inner_problem(Settings(horizon=20, adjoint=1e-20), bowl(), rates())
    def both(theta, state):
        after, loss = problem.step(theta, state, key)
        return loss + problem.step(theta, after, key)[1], after
    state = problem.reset(theta, key)
    found, after = jax.jit(jax.grad(both, has_aux=True))(theta, state)
    one = jax.jit(jax.grad(lambda theta, state: problem.step(theta, state, key)[1]))
    alone = one(theta, state)["log_lr"] + one(theta, after)["log_lr"]
    np.testing.assert_allclose(found["log_lr"], alone, rtol=1e-4)


@pytest.mark.parametrize("name", [*ESTIMATORS, "mover"])
def test_outer_steps_follow_adam_or_a_learned_optimizer_on_the_clipped_gradient(
        name, toys, tmp_path, monkeypatch):
    """Theta, its average (weights 1, 2, 3, 4) and the running mean of the loss, by hand."""
    mover = str(tmp_path / "mover.npz") if name == "mover" else ""
    model.save(tmp_path / "mover.npz", "per_parameter_mlp", dict.fromkeys(
        ("log_lr", "log_scale"), jnp.float32(0)))
    name = "es" if mover else name
    b1, warmup, averaging = (0.5, 1, "last") if name == "merged" else (0.9, 10, "later")
    settings = dataclasses.replace(
        SETTINGS, tasks=("function",), estimator=name, sigma=0.01, decay_steps=5.0,
        outer_optimizer=mover, b1=b1, warmup=warmup, averaging=averaging,
        shortest=10 if name == "merged" else 20)
    plain, cap = getattr(estimators, name), objective.OUTER_LOSSES["end_root"].cap
    def telling(*problem, **options):  # the gradient itself, not its norm alone
        assert options == dict(
            num_pairs=2, truncation=20, horizon=20, sigma=0.01, clip=0.3, cap=cap,
            varying=name == "merged")
        init, estimate = plain(*problem, **options)
        def told(*state):
            assert (state[3] is None) == (name != "merged")
            gradient, particles, row = estimate(*state)
            return gradient, particles, row | gradient
        return estimators.Estimator(init, told)
    monkeypatch.setattr(estimators, name, telling)
    begin, steps = made(settings)
    flat = lambda of: np.array([of["log_lr"], of["log_scale"]], float)
    run, losses, seen, gs = begin(random.key(0)), [], [], []
    x = flat(run.theta)
    for t in range(4):
        run, row = steps["function"](run, random.key(1))
        np.testing.assert_allclose(row["gradient"], np.linalg.norm(flat(row)), rtol=1e-5)
        gs.append(flat(row).clip(-0.1, 0.1))
        rate = settings.learning_rate * min((t + 1) / warmup, 1) / (1 + t / settings.decay_steps)
        x = x + (-gs[-1] if mover else adam(np.array(gs), None, rate, b1=b1))
        np.testing.assert_allclose(flat(run.theta), x, atol=2e-6)
        losses, seen = [*losses, row["loss"]], [*seen, x]
    counts = [0, 0, 0, 1] if averaging == "last" else [1, 2, 3, 4]
    np.testing.assert_allclose(flat(run.average), np.average(seen, 0, counts), atol=2e-6)
    smoothed = functools.reduce(lambda mean, loss: 0.97 * mean + 0.03 * loss, losses)
    np.testing.assert_allclose(run.smoothed["function"], smoothed, rtol=1e-5)
    assert run.step == row["step"] == 4 and len(set(map(float, losses))) == 4


@pytest.mark.parametrize("step, middle", [(0, 200), (50, 500), (100, 800), (1000, 800)])
def test_unrolls_grow_and_are_drawn_around_their_mean(step, middle):
    settings = dataclasses.replace(
        SETTINGS, num_pairs=4000, truncation=800, shortest=200, growing=100, jitter=0.2)
    found = meta_train.lengths(settings, jnp.int32(step), random.key(0))
    assert 0.8 * middle <= found.min() < 0.82 * middle < 1.18 * middle < found.max() <= 1.2 * middle
    np.testing.assert_allclose(found.mean(), middle, rtol=0.01)
    assert meta_train.lengths(SETTINGS, jnp.int32(step), random.key(0)) is None
