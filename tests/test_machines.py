"""Several devices and several processes: the same theta as on one, and an end when a process is lost."""
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import estimators
import meta_train
import model
from test_meta_train import ROOT, TINY, run, start, steps_logged, theta_of

WIDE = [*TINY, "--num-pairs", 8, "--save-seconds", 0.1]


def free_address():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def wait_until(ready, *processes):
    deadline = time.time() + 120
    while not ready():
        assert time.time() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)


def outer_steps_done(folder):
    return model.about(folder / "theta.npz")["outer_steps_done"] if (folder / "theta.npz").exists() else 0


def start_pair(*arguments, cwd):
    address = free_address()
    return [start(*arguments, "--devices", 1, "--coordinator", address, "--processes", 2, "--process", i, cwd=cwd) for i in range(2)]


def test_two_processes_and_then_eight_devices_find_the_theta_of_one_device(tmp_path):
    """Two processes do 24 steps; one device does twelve, and eight the rest. Few steps: what rounding differs by grows tenfold every
    five steps. At the end two go on, and one of them is killed."""
    folder, other = tmp_path / "many", tmp_path / "other"
    pair = start_pair(*WIDE, "--outer-steps", 24, "--out", folder, cwd=tmp_path)
    for arguments in ([*WIDE, "--outer-steps", 12, "--devices", 1, "--out", other], ["--resume", other, "--outer-steps", 24, "--devices", 8]):
        process = start(*arguments, cwd=tmp_path)
        done = int(arguments[arguments.index("--outer-steps") + 1])
        wait_until(lambda: outer_steps_done(other) == done, process)
        process.kill()  # it would go on to fit and to compare
        process.communicate()
    wait_until(lambda: outer_steps_done(folder) == 24, pair[0])
    assert pair[1].wait(60) == 0 and "pairs on" not in pair[1].communicate()[0]  # process 0 stays, to fit and to compare
    pair[0].kill()
    assert "pairs on 2 devices" in pair[0].communicate()[0]
    assert steps_logged(folder) == steps_logged(other) == list(range(1, 25))
    mine, reference = (model.read_npz(x / "checkpoint.npz") for x in (folder, other))
    for i in range(2 * len(theta_of(folder))):  # theta and its average
        np.testing.assert_allclose(mine[f"leaf{i:04}"], reference[f"leaf{i:04}"], rtol=1e-3, atol=1e-5)

    pair = start_pair("--resume", folder, "--outer-steps", 100000, cwd=tmp_path)
    wait_until(lambda: outer_steps_done(folder) > 30, *pair)
    pair[1].kill()
    out, err = pair[0].communicate(timeout=60)
    assert pair[0].returncode == 2 and "Traceback" not in err, err
    assert err.splitlines()[-1].endswith(f"end them all, and go on with --resume {folder}."), err
    assert outer_steps_done(folder) > 30 and all(np.isfinite(x).all() for x in theta_of(folder).values())
    pair[1].communicate()


def test_processes_that_hang_or_are_not_there_end_the_others_in_time(tmp_path):
    code = (f"import argparse, sys; sys.path.insert(0, {ROOT!r}); import meta_train, numpy as np\n"
            "from jax.experimental import multihost_utils\n"
            "machines = argparse.Namespace(coordinator=sys.argv[1], processes=2, process=int(sys.argv[2]), wait=60.0)\n"
            "meta_train.connect(machines)\n"
            "while True:\n"
            "    with meta_train.together(4.0, 'the folder'):\n"
            "        both = multihost_utils.process_allgather(np.array([machines.process]))\n"
            "    assert both.tolist() == [[0], [1]]\n"
            "    print('together', file=sys.stderr, flush=True)\n")
    address = free_address()
    pair = [subprocess.Popen([sys.executable, "-c", code, address, str(i)], stderr=subprocess.PIPE, text=True) for i in range(2)]
    while "together" not in pair[1].stderr.readline():
        assert pair[1].poll() is None
    pair[1].send_signal(signal.SIGSTOP)
    begin = time.time()
    sentence = pair[0].communicate(timeout=60)[1].splitlines()[-1]
    pair[1].kill()
    assert pair[0].returncode == 2 and time.time() - begin < 20
    assert sentence == "meta_train.py: error: no answer from the other processes for 4 s; end them all, and go on with --resume the folder."
    begin = time.time()
    code, out, err = run(*TINY, "--coordinator", free_address(), "--processes", 2, "--process", 1, "--wait", 1, cwd=tmp_path)
    assert code == 2 and time.time() - begin < 30 and not os.listdir(tmp_path)
    assert err.splitlines()[-1].startswith("meta_train.py: error: no answer from the other processes for 1 s; is --coordinator right")


@pytest.mark.parametrize("n, processes, local, expected", [(8, 2, 4, 8), (6, 2, 2, 2), (6, 3, 4, 6), (4, 1, 3, 2), (2, 2, 8, 2)])
def test_each_process_gives_the_same_number_of_devices(n, processes, local, expected, monkeypatch):
    devices = [[f"device {j} of process {i}" for j in range(local)] for i in range(processes)]
    monkeypatch.setattr(estimators.jax, "process_count", lambda: processes)
    monkeypatch.setattr(estimators.jax, "local_devices", lambda i=0: devices[i])
    monkeypatch.setattr(estimators.jax, "make_mesh", lambda shape, names, axis_types, devices: devices)
    monkeypatch.setattr(estimators.jax, "NamedSharding", lambda mesh, spec: mesh)
    chosen = estimators.sharding(n)
    assert len(chosen) == expected == len(set(chosen))
    assert all(sum(device in chosen for device in process) == expected // processes for process in devices)
    assert len(estimators.sharding(n, alone=True)) == max(d for d in range(1, local + 1) if n % d == 0)


@pytest.mark.parametrize("arguments", [["--devices", 0], ["--devices", "two"], ["--wait", 0], ["--processes", 2], ["--process", 0],
                                       ["--coordinator", "here"], ["--coordinator", "here:there", "--processes", 2, "--process", 0],
                                       ["--coordinator", "here:80"], ["--coordinator", "here:80", "--processes", 2],
                                       ["--coordinator", "here:80", "--processes", 2, "--process", 2],
                                       ["--coordinator", "here:80", "--processes", 2, "--process", -1]])
def test_wrong_machines_are_refused_in_one_sentence(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["meta_train.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        meta_train.main()
    assert stopped.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith("meta_train.py: error: ")
    assert not os.listdir(tmp_path)
