"""The program as its users meet it: runs, resumes after kill -9, refuses what it can't do."""
import concurrent.futures
import csv
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import evaluate
import meta_train
import model
import tasks

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ["--tasks", "function", "--optimizer", "per_parameter_mlp", "--horizon", 20, "--truncation", 20, "--num-pairs", 2, "--seed", 3, "--fit", 4,
        "--compare", 4]
STEPS = 80


def start(*arguments, cwd, prelude="import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"):
    """meta_train.py as a process of its own; the prelude makes Ctrl-C work there even if it is ignored here."""
    code = f"{prelude}; import runpy, sys; sys.path.insert(0, {ROOT!r}); sys.argv = sys.argv[1:]; " \
           "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, os.path.join(ROOT, "meta_train.py"), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments, **options):
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def theta_of(folder):
    return {k: np.asarray(x) for k, x in model.load(folder / "theta.npz")[1].items()}


def steps_logged(folder):
    with open(folder / "log.csv") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = run(*TINY, "--outer-steps", STEPS, "--out", folder, cwd=folder.parent)
    assert code == 0, err
    return folder, out


def test_a_run_ends_with_the_table_and_all_files(whole):
    folder, out = whole
    assert {"theta.npz", "checkpoint.npz", "log.csv", "curves.png", "comparison-function.png", "table.json"} == set(os.listdir(folder))
    assert all(words in out for words in ("first outer step", "steps of biases multiplied by", "4 tasks", "learned, against"))
    assert steps_logged(folder) == list(range(1, STEPS + 1))
    assert json.loads((folder / "table.json").read_text())["function"]["tasks"] == 4
    facts = model.about(folder / "theta.npz")
    assert facts["outer_steps_done"] == STEPS and facts["seed"] == 3 and facts["tasks"] == "function"
    assert all(np.isfinite(x).all() for x in theta_of(folder).values())
    programs = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(matplotlib.get_cachedir(), "learned_optimizer_programs")
    assert any("outer_step" in name for name in os.listdir(programs))


def wait_for_steps(process, folder, more):
    """Until there is a checkpoint and the log has grown by `more` rows."""
    deadline, begin = time.time() + 120, None
    while begin is None or len(steps_logged(folder)) < begin + more:
        assert time.time() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
        if begin is None and (folder / "checkpoint.npz").exists():
            begin = len(steps_logged(folder))


def test_kill_and_resume_is_bit_identical(whole, tmp_path):
    folder = tmp_path / "run"
    process = start(*TINY, "--outer-steps", STEPS, "--save-seconds", 0.1, "--out", folder, cwd=tmp_path)
    wait_for_steps(process, folder, 15)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    model.load(folder / "theta.npz")  # whole, wherever the kill hit
    process = start("--resume", folder, cwd=tmp_path)
    deadline = time.time() + 120
    while model.about(folder / "theta.npz")["outer_steps_done"] < STEPS:
        assert time.time() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()  # it would go on to fit and to compare
    process.communicate()
    mine, reference = (model.read_npz(x / "checkpoint.npz") for x in (folder, whole[0]))
    assert all((mine[k] == reference[k]).all() for k in reference if k.startswith("leaf"))
    assert steps_logged(folder) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_scheduler_save_and_leave_and_meanwhile_no_other_run_may(number, tmp_path):
    folder = tmp_path / "run"
    process = start(*TINY, "--outer-steps", 100000, "--save-seconds", 0.1, "--out", folder, cwd=tmp_path)
    wait_for_steps(process, folder, 5)
    if number == signal.SIGINT:
        code, out, err = run("--resume", folder, cwd=tmp_path)
        assert code == 2 and "Another run is at work" in err and "Traceback" not in err
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped" in out and "Traceback" not in err
    about = model.about(folder / "theta.npz")
    assert about["outer_steps_done"] == steps_logged(folder)[-1] and about["fit"] == 0  # it says that it is not fitted yet


def test_a_full_disk_ends_the_run_but_not_the_last_save(whole, tmp_path):
    """With files limited to 20 kB the first checkpoint can't be written: one sentence, and no partial file in its place."""
    folder = tmp_path / "run"
    os.makedirs(folder)
    for name in ("checkpoint.npz", "theta.npz", "log.csv"):
        (folder / name).write_bytes((whole[0] / name).read_bytes())
    before = (folder / "checkpoint.npz").read_bytes()
    code, out, err = run("--resume", folder, "--outer-steps", 100000, "--minutes", 0.01, cwd=tmp_path, prelude="import resource; "
                         "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))")
    assert code == 2 and "Traceback" not in err and "File too large" in err, err
    assert (folder / "checkpoint.npz").read_bytes() == before


def test_minutes_that_have_passed_leave_a_save_and_a_clock_that_jumps_changes_nothing(whole, tmp_path):
    folder = tmp_path / "run"
    process = start(*TINY, "--outer-steps", 5, "--minutes", 1e-9, "--out", folder, cwd=tmp_path)
    deadline = time.time() + 120
    while not (folder / "curves.png").exists():
        assert time.time() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()  # it would go on to fit and to compare
    process.communicate()
    assert steps_logged(folder) == [] and model.about(folder / "theta.npz")["outer_steps_done"] == 0
    jumps = "import itertools, time; days = itertools.cycle((-1e6, 1e6, 0)); clock = time.time; time.time = lambda: clock() + next(days)"
    process = start("--resume", folder, "--minutes", 5, cwd=tmp_path, prelude=jumps)
    while model.about(folder / "theta.npz")["outer_steps_done"] < 5:
        assert time.time() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert steps_logged(folder) == [1, 2, 3, 4, 5]
    with open(folder / "log.csv") as mine, open(whole[0] / "log.csv") as reference:  # the same numbers but for the seconds
        assert [row[:-1] for row in csv.reader(mine)] == [row[:-1] for row in itertools.islice(csv.reader(reference), 6)]


def test_user_errors_end_in_one_sentence_and_write_nothing(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "damaged" / "checkpoint.npz").write_bytes((whole[0] / "checkpoint.npz").read_bytes()[:5000])
    np.savez(tmp_path / "foreign" / "checkpoint.npz", x=np.ones(3))
    (tmp_path / "stranger").mkdir()
    np.savez(tmp_path / "stranger" / "checkpoint.npz", settings=np.array(5))
    shutil.copytree(whole[0], tmp_path / "older")  # a checkpoint of another layout: one array less
    arrays = model.read_npz(tmp_path / "older" / "checkpoint.npz")
    np.savez(tmp_path / "older" / "checkpoint.npz", **{name: x for name, x in arrays.items() if name != "leaf0007"})
    log = (tmp_path / "older" / "log.csv").read_bytes()
    before = sorted(os.listdir(tmp_path))
    for arguments in (["--nonsense"], ["--tasks", "mlp,chess"], ["--tasks", "mlp,mlp"], ["--tasks", ""], ["--optimizer", "adam"],
                      ["--output", "relu"],
                      ["--estimator", "rtrl"], ["--target", "test"], ["--seed", 10 ** 20],
                      ["--outer-steps", "many"], ["--outer-steps", 0], ["--outer-steps", 2 ** 31], ["--minutes", -1], ["--minutes", "nan"],
                      ["--horizon", 30, "--truncation", 30], ["--horizon", 400, "--truncation", 300],
                      ["--estimator", "pes", "--sigma", 0], ["--sigma", -1], ["--num-pairs", 0], ["--estimator", "merged", "--num-pairs", 1],
                      ["--clip", 0], ["--fit", -1], ["--decay-steps", "nan"], ["--compare", 3],
                      ["--out", whole[0]], ["--out", tmp_path / "file"], ["--out", tmp_path / "file" / "run"], ["--out", "/proc/run"],
                      ["--resume", tmp_path / "nowhere"], ["--resume", tmp_path / "empty"],
                      ["--resume", tmp_path / "damaged"], ["--resume", tmp_path / "foreign"], ["--resume", tmp_path / "stranger"], ["--resume", ""],
                      ["--resume", whole[0], "--seed", 4], ["--resume", whole[0], "--estimator", "es"],
                      ["--resume", whole[0], "--out", tmp_path / "other"], ["--resume", tmp_path / "older"]):
        monkeypatch.setattr(sys, "argv", ["meta_train.py", "--devices", "2", *map(str, arguments)])  # as JAX has here
        with pytest.raises(SystemExit) as stopped:
            meta_train.main()
        sentence = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and sentence.startswith("meta_train.py: error: "), (arguments, sentence)
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "older" / "log.csv").read_bytes() == log


def test_the_outer_loss_is_the_root_of_the_relative_validation_loss_and_grows_with_time():
    family, learned = tasks.mlp(), model.per_parameter_mlp()
    theta = learned.init(jax.random.key(0))
    problem = meta_train.inner_problem(family, learned, "valid", horizon=40)
    state = problem.reset(theta, jax.random.key(1))
    task, inner, begin, baseline = state
    assert baseline is None
    assert begin == family.loss(task, inner.params, family.batch(
        task, jax.random.split(jax.random.key(1), 3)[2], "outer_valid"))
    state = task, inner._replace(step=jnp.int32(29)), begin, baseline
    step = jax.jit(problem.step)
    (_, after, *_), loss = step(theta, state, jax.random.key(2))
    step_key, batch_key = jax.random.split(jax.random.key(2))
    value = family.loss(task, after.params, family.batch(task, batch_key, "outer_valid"))
    np.testing.assert_allclose(loss, 10 * 0.75 ** 4 * np.sqrt(value / begin), rtol=1e-5)  # step 30 of 40
    _, loss = step(theta, (*state[:3], jnp.float32(0.6)), jax.random.key(2))
    np.testing.assert_allclose(loss, 10 * 0.75 ** 4 * (np.sqrt(value / begin) - 0.6) / 0.4, rtol=1e-5)


def test_one_outer_loss_that_is_not_finite_leaves_the_gradient_of_the_others():
    """It carries none itself: with the third of three broken, the gradient is that of the first two."""
    learned = model.per_parameter_mlp(hidden=4)
    theta, key = learned.init(jax.random.key(0)), jax.random.key(1)

    def problem(factor):  # what the outer losses, and the loss at the start, are multiplied by
        family = bowl(3)._replace(loss=lambda task, x, batch: jnp.sum(task * x["x"] ** 2) * batch,
                                  batch=lambda task, key, split: factor if split == "outer_valid" else 1.0)
        return meta_train.inner_problem(family, learned, "valid", 3)

    def value(theta, factors):
        state, total = problem(1.0).reset(theta, key), 0.0
        for factor in factors:
            state, loss = problem(factor).step(theta, state, key)
            total += jnp.where(jnp.isfinite(loss), loss, 10.0)
        return total

    found, wanted = (jax.grad(value)(theta, factors) for factors in ([1.0, 1.0, jnp.nan], [1.0, 1.0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), found, wanted)
    assert any(np.abs(x).max() > 1e-4 for x in wanted.values())


def test_a_training_batch_that_is_not_finite_does_not_cut_the_way_back():
    """The later losses know of the steps before it as they do if that step is left out: here SGD with a learned rate, the second of
    three batches broken."""
    learned = model.LearnedOptimizer(None, lambda theta: model.Optimizer(lambda params: (), lambda grads, state, params, **losses: (
        jax.tree.map(lambda g: -theta["rate"] * jnp.nan_to_num(g), grads), state)))
    family = bowl(3)._replace(batch=lambda task, key, split: 1.0, loss=lambda task, x, factor: jnp.sum(task * x["x"] ** 2) * factor)
    theta, key = {"rate": jnp.float32(0.1)}, jax.random.key(1)

    def value(theta, factors):
        state = meta_train.inner_problem(family, learned, "valid", 3).reset(theta, key)
        for factor in factors:
            broken = family._replace(batch=lambda task, key, split: factor if split == "train" else 1.0)
            state, loss = meta_train.inner_problem(broken, learned, "valid", 3, adjoint=1e9).step(theta, state, key)
        return loss

    def closed_form(rate):
        task, inner, start, _ = meta_train.inner_problem(family, learned, "valid", 3).reset(theta, key)
        x = inner.params["x"] * (1 - 2 * rate * task) ** 2
        return 10 * jnp.sqrt(jnp.sum(task * x ** 2) / start + 1e-6)

    found, wanted = jax.grad(value)(theta, [1.0, jnp.nan, 1.0])["rate"], jax.grad(closed_form)(0.1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert abs(wanted) > 0.1


def test_a_pool_holds_what_adam_reaches_at_its_best_rate_on_each_of_its_tasks():
    """Each task's share of the way, by a plain loop; and what an episode draws is one of the pool's tasks."""
    family, settings = bowl(3), meta_train.Settings(num_tasks=5, horizon=40)
    pool = meta_train.make_pool(settings, family)
    progress, keys = np.array([0.5, 1.0]), jax.random.split(jax.random.key(2 ** 31), 5)
    for i, key in enumerate(keys):
        task_key, init_key, *_ = jax.random.split(key, 4)
        task, shares = family.sample(task_key), []
        assert (family.sample(pool.keys[i]) == task).all()
        for rate in evaluate.RATES:
            adam, x = model.adam(rate), family.init(task, init_key)
            state, losses = adam.init(x), [family.loss(task, x, ())]
            for _ in range(40):
                updates, state = adam.update({"x": 2 * task * x["x"]}, state)
                x = {"x": x["x"] + updates["x"]}
                losses.append(family.loss(task, x, ()))
            roots = np.sqrt(np.array(losses)[[20, 40]] / losses[0])
            shares.append((progress ** 4 * roots).sum() / (progress ** 4).sum())
        np.testing.assert_allclose(pool.baselines[i], min(min(shares), 0.9), rtol=1e-2)
    reset = jax.jit(meta_train.inner_problem(family, model.per_parameter_mlp(), "valid", 40, pool=pool).reset)
    theta, known, drawn = model.per_parameter_mlp().init(jax.random.key(0)), jax.vmap(family.sample)(pool.keys), set()
    for key in jax.random.split(jax.random.key(0), 40):
        task, _, _, baseline = reset(theta, key)
        drawn.add(int(jnp.argmin(jnp.sum(abs(known - task[None]), 1))))
        assert (known == task[None]).all(1).any() and baseline == pool.baselines[jnp.argmin(jnp.sum(abs(known - task[None]), 1))]
    assert drawn == set(range(5))


def bowl(size):
    """A family that compiles in no time."""
    return tasks.TaskFamily("bowl", sample=lambda key: jax.random.uniform(key, (size,), minval=0.5),
                            init=lambda task, key: {"x": jax.random.normal(key, (size,))}, batch=lambda task, key, split: (),
                            loss=lambda task, params, batch: jnp.sum(task * params["x"] ** 2))


def test_a_run_that_only_explodes_stops_and_leaves_the_last_good_save(monkeypatch, tmp_path, capsys):
    """Every task's loss is NaN after the third outer step: theta stays as it was, and after PATIENCE such steps the run ends."""
    monkeypatch.setitem(meta_train.tasks.FAMILIES, "function", lambda: bowl(2))
    monkeypatch.setattr(meta_train, "PATIENCE", 20)
    settings = meta_train.Settings(tasks="function", optimizer="per_parameter_mlp", horizon=20, truncation=20, outer_steps=100,
                                   save_seconds=1e-9)
    begin, outer_steps = meta_train.make_outer(settings)
    run, programs = meta_train.compiled(begin, outer_steps, jax.random.key(0))
    good = programs["function"].result()
    monkeypatch.setitem(meta_train.tasks.FAMILIES, "function",
                        lambda: bowl(2)._replace(loss=lambda task, params, batch: jnp.nan * jnp.sum(params["x"])))
    bad = meta_train.make_outer(settings)[1]["function"]
    program = concurrent.futures.Future()
    program.set_result(lambda run, key: (good if run.step < 3 else bad)(run, key))
    with pytest.raises(ValueError, match="20 outer steps in a row"):
        meta_train.train(settings, str(tmp_path), run, {"function": program})
    assert model.about(tmp_path / "theta.npz")["outer_steps_done"] == 3
    assert all(np.isfinite(x).all() for x in theta_of(tmp_path).values())
    with open(tmp_path / "log.csv") as file:
        assert [int(row["capped"]) for row in csv.DictReader(file)] == [0] * 3 + [40] * 20


def test_a_learned_optimizer_can_move_theta(monkeypatch, tmp_path):
    """One that was never trained is Adam at a rate of 0.01; the program's own Adam begins at a tenth of its rate."""
    monkeypatch.setitem(meta_train.tasks.FAMILIES, "function", lambda: bowl(2))
    model.save(tmp_path / "mover.npz", "per_parameter_mlp", model.per_parameter_mlp().init(jax.random.key(5)))
    moves = []
    for extra in (dict(outer_optimizer=str(tmp_path / "mover.npz")), dict(learning_rate=0.01)):
        settings = meta_train.Settings(tasks="function", optimizer="per_parameter_mlp", horizon=20, truncation=20, **extra)
        begin, outer_steps = meta_train.make_outer(settings)
        run = begin(jax.random.key(0))
        after, _ = outer_steps["function"](run, jax.random.key(0))
        moves.append({name: np.array(after.theta[name] - x) for name, x in run.theta.items()})
    for name in moves[0]:
        np.testing.assert_allclose(moves[0][name], 10 * moves[1][name], rtol=1e-2, atol=2e-5)  # of differences of rounded numbers
    assert np.abs(moves[0]["log_lr"]) > 0.009


def test_families_take_turns(monkeypatch, tmp_path, capsys):
    families, key = meta_train.tasks.FAMILIES, jax.random.key(0)
    monkeypatch.setitem(families, "mlp", lambda: bowl(2))
    monkeypatch.setitem(families, "function", lambda: bowl(2)._replace(loss=lambda task, params, batch: jnp.float32(2)))
    settings = meta_train.Settings(tasks="mlp,function", optimizer="per_parameter_mlp", horizon=20, truncation=20, outer_steps=5)
    begin, outer_steps = meta_train.make_outer(settings)
    alone = meta_train.make_outer(dataclasses.replace(settings, tasks="mlp"))
    one, _ = outer_steps["mlp"](begin(key), key)
    same, _ = alone[1]["mlp"](alone[0](key), key)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, one.theta, same.theta)) and jnp.isnan(one.smoothed["function"])
    two, row = outer_steps["function"](one, key)
    np.testing.assert_allclose(row["loss"], 10 * np.mean(np.linspace(0.05, 1, 20) ** 4), rtol=1e-4)  # it never falls
    assert row["gradient"] == 0 and row["step"] == 2 and two.smoothed["mlp"] == one.smoothed["mlp"]
    run, programs = meta_train.compiled(begin, outer_steps, key)
    run = meta_train.train(settings, str(tmp_path), run, programs)
    with open(tmp_path / "log.csv") as file:
        assert [row["family"] for row in csv.DictReader(file)] == ["mlp", "function", "mlp", "function", "mlp"]
    assert run.step == 5 and "first outer step" in capsys.readouterr().out


def test_a_log_keeps_the_rows_of_saved_steps_alone(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,family,loss\n1,mlp,3.5\n2,conv,3.25\n10,mlp,3\n1")  # cut off within the 11 of step 11
    meta_train.keep_rows(str(path), 10)
    assert path.read_text().split() == ["step,family,loss", "1,mlp,3.5", "2,conv,3.25", "10,mlp,3"]
    meta_train.keep_rows(str(path), 2)
    assert path.read_text().split() == ["step,family,loss", "1,mlp,3.5", "2,conv,3.25"]
    path.write_text("step,loss\n1,3.5\n")
    with pytest.raises(ValueError, match="another version"):
        meta_train.keep_rows(str(path), 1)
    assert path.read_text() == "step,loss\n1,3.5\n"


def test_the_average_weighs_later_thetas_more(monkeypatch):
    monkeypatch.setitem(meta_train.tasks.FAMILIES, "mlp", lambda: bowl(2))
    begin, outer_steps = meta_train.make_outer(meta_train.Settings(optimizer="per_parameter_mlp", horizon=20, truncation=20))
    run, seen = begin(jax.random.key(0)), []
    for _ in range(4):
        run, _ = outer_steps["mlp"](run, jax.random.key(1))
        seen.append(run.theta)
    for k, x in run.average.items():
        np.testing.assert_allclose(x, np.average([theta[k] for theta in seen], axis=0, weights=[1, 2, 3, 4]), atol=1e-6)
        assert k.endswith("/b") or k == "log_bias" or not jnp.array_equal(x, run.theta[k])


@pytest.mark.parametrize("estimator", meta_train.RECIPES)
def test_an_outer_step_moves_theta_by_adam_on_the_clipped_gradient(estimator, monkeypatch):
    monkeypatch.setitem(meta_train.tasks.FAMILIES, "mlp", lambda: bowl(3))
    settings = meta_train.Settings(**meta_train.RECIPES[estimator] | dict(
        optimizer="per_parameter_mlp", estimator=estimator, horizon=20, truncation=10, num_pairs=2))
    begin, outer_steps = meta_train.make_outer(settings)
    outer_step, first = outer_steps["mlp"], begin(jax.random.key(0))
    second, row = outer_step(first, jax.random.key(1))
    assert row["step"] == second.step == 1 and np.isfinite(row["loss"]) and row["gradient"] > 0
    rate = settings.learning_rate / 10  # the first of ten warm-up steps; Adam's first step is rate * sign
    for k in first.theta:
        change = np.abs(second.theta[k] - first.theta[k])
        assert change.max() < 1.01 * rate
    most = lambda run: max(float(np.abs(run.theta[k] - first.theta[k]).max()) for k in first.theta)
    assert most(second) > 0.9 * rate
    later, _ = outer_step(first._replace(step=jnp.int32(settings.decay_steps)), jax.random.key(1))
    np.testing.assert_allclose(most(later), rate / 2, rtol=0.1)


def test_the_fitted_step_size_is_the_lowest_point_of_a_parabola_less_two_standard_errors():
    multiples = 2.0 ** np.arange(-1.5, 0.6, 0.5)
    x = np.log(multiples)
    agreed = np.stack([3 + 0.2 * (x - np.log(0.6)) ** 2, 1 + 0.4 * (x - np.log(0.6)) ** 2])  # [2 tasks, 5]
    np.testing.assert_allclose(meta_train.cautious_minimum(multiples, agreed), 0.6)
    differing = np.stack([0.2 * (x - 0.1) ** 2, 0.2 * (x + 0.3) ** 2])  # lowest at 0.1 and -0.3: -0.1 +- 0.2 / sqrt(2)
    np.testing.assert_allclose(np.log(meta_train.cautious_minimum(multiples, differing)), -0.1 - 2 * 0.2 / np.sqrt(2))
    assert meta_train.cautious_minimum(multiples, (x - 5)[None] ** 2) == multiples[-1]
    assert meta_train.cautious_minimum(multiples, -(x - 0.1)[None] ** 2) == multiples[0]


@pytest.mark.parametrize("target, split", [("valid", "outer_valid"), ("train", "train")])
def test_the_fit_never_looks_at_the_test_split(target, split, monkeypatch):
    family, tried = tasks.mlp(), []

    def curves(watched, make_optimizer, variants, keys, horizon):
        tried.append([np.asarray(variants[name] - theta[name]) for name in ("log_bias", "log_lr")])
        task = family.sample(jax.random.key(1))
        assert jax.tree.all(jax.tree.map(jnp.array_equal, watched.batch(task, jax.random.key(2), "test"),
                                         family.batch(task, jax.random.key(2), split)))
        bias, every = (x[None, :, None, None] for x in tried[-1])
        later = 1 + (bias + 1.5) ** 2 + (every + 0.2) ** 2
        return np.where(np.arange(3)[None, None, :, None] == 0, 1, later) * np.ones((len(keys), 1, 1, 2))

    monkeypatch.setattr(meta_train.evaluate, "learning_curves", curves)
    theta = model.per_parameter_mlp().init(jax.random.key(0))
    fitted = meta_train.fit_step_size(meta_train.Settings(optimizer="per_parameter_mlp", target=target, horizon=40, fit=4), theta)
    quarter = np.log(0.25)  # the nearest to -1.5 of the five
    np.testing.assert_allclose(tried[0], [-np.log(2) * np.arange(5), np.zeros(5)], atol=1e-5)
    np.testing.assert_allclose(tried[1], [np.full(5, quarter), np.log(2) * np.arange(-1.5, 0.6, 0.5)], atol=1e-5)
    np.testing.assert_allclose(fitted["log_bias"] - theta["log_bias"], quarter, atol=1e-6)
    np.testing.assert_allclose(fitted["log_lr"] - theta["log_lr"], -0.2, atol=0.02)


def test_the_fit_slows_down_what_is_far_too_fast_and_compiles_once():
    """Adam (the output layer is silent) at a rate of 0.3; the losses, not the parabola, must say that less is better."""
    settings = meta_train.Settings(optimizer="per_parameter_mlp", horizon=20, truncation=20, fit=8)
    theta = model.per_parameter_mlp().init(jax.random.key(0)) | {"log_lr": jnp.log(0.3)}
    slower = meta_train.fit_step_size(settings, theta)
    assert slower["log_lr"] < theta["log_lr"] - 0.5
    compiled = evaluate.learning_curves._cache_size()
    meta_train.fit_step_size(settings, slower)
    assert evaluate.learning_curves._cache_size() == compiled


def test_the_fit_meets_no_task_of_the_pool(monkeypatch):
    met = []

    def level(family, make_optimizer, hyper, keys, horizon):
        met.append({x.tobytes() for x in np.array(jax.random.key_data(keys))})
        return np.ones((len(keys), len(jax.tree.leaves(hyper)[0]), 2, 2))

    monkeypatch.setattr(evaluate, "learning_curves", level)
    monkeypatch.setattr(evaluate, "kept_curves", level)
    settings = meta_train.Settings(tasks="function", num_tasks=4, fit=3, horizon=20, truncation=20)
    meta_train.make_pool(settings, tasks.function())
    meta_train.fit_step_size(settings, model.hierarchical().init(jax.random.key(0)))
    pool, *fits = met
    assert len(pool) == 4 and [len(fit) for fit in fits] == [3, 3] and not pool & set.union(*fits)


def test_the_fit_multiplies_the_step_size_and_nothing_else(whole):
    folder, out = whole
    assert model.about(folder / "theta.npz")["fit"] > 0
    multiples = re.search(r"steps of biases multiplied by (\S+), then all by (\S+)\n", out).groups()
    stored = model.read_npz(folder / "checkpoint.npz")
    learned, theta = model.load(folder / "theta.npz")
    names = sorted(theta)  # a checkpoint's first leaves are theta's and the average's, in the order of jax.tree.leaves
    before = {name: stored[f"leaf{len(names) + i:04}"] for i, name in enumerate(names)}
    for name, multiple in zip(("log_bias", "log_lr"), multiples):  # three digits are printed
        np.testing.assert_allclose(theta[name] - before[name], np.log(float(multiple)), atol=0.006)
    assert all((theta[name] == before[name]).all() for name in names if name not in ("log_bias", "log_lr"))
