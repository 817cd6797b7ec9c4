"""Several devices and processes: the theta of one device, and an end when a process is lost."""
import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np

import machine
import meta_train
from test_meta_train import (  # noqa: F401
    ROOT, TINY, made, main, outer_steps_done, start, steps_logged, toys, wait_until)


def free_address():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def test_two_processes_and_then_two_devices_find_the_theta_of_one_device(
        toys, tmp_path, monkeypatch):  # noqa: F811
    """One of the processes is killed: the other ends with one sentence, and its save goes on."""
    monkeypatch.setattr(meta_train, "make_outer", made.__wrapped__)
    wide = *TINY, "--tasks", "function", "--num-pairs", 8
    folder, address = tmp_path / "many", free_address()
    both = "--devices", 1, "--coordinator", address, "--processes", 2, "--process"
    pair = [start(*wide, "--save-seconds", 0.1, "--outer-steps", 10 ** 6, "--out", folder, *both, i,
                  cwd=tmp_path) for i in (0, 1)]
    wait_until(lambda: outer_steps_done(folder) > 5, *pair)
    pair[1].kill()
    out, err = pair[0].communicate(timeout=600)
    pair[1].communicate()
    assert pair[0].returncode == 2 and "Traceback" not in err and "pairs on 2 devices" in out
    assert err.splitlines()[-1].endswith(f"end them all, and go on with --resume {folder}."), err
    steps = outer_steps_done(folder) + 5
    folder = shutil.copytree(folder, tmp_path / "copy")
    main("--resume", folder, "--outer-steps", steps)
    assert steps_logged(folder) == list(range(1, steps + 1))
    first = machine.jax.devices()[:1]
    monkeypatch.setattr(machine.jax, "local_devices", lambda *_: first)
    main(*wide, "--outer-steps", steps, "--out", tmp_path / "one")
    many, one = (machine.read_npz(x / "checkpoint.npz") for x in (folder, tmp_path / "one"))
    for i in range(4):  # theta and its average
        np.testing.assert_allclose(many[f"leaf{i:04}"], one[f"leaf{i:04}"], rtol=1e-3)


def test_processes_that_hang_or_are_not_there_end_the_others_in_time(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import machine, numpy as np\n"
            "process = int(sys.argv[2])\n"
            "machine.connect(sys.argv[1], 2, process, 600.0)\n"
            "while True:\n"
            "    with machine.together(4.0, 'the advice'):\n"
            "        both = machine.gathered(np.array([process]))\n"
            "    assert both.tolist() == [0, 1]\n"
            "    print('together', file=sys.stderr, flush=True)\n")
    address = free_address()
    pair = [subprocess.Popen([sys.executable, "-c", code, address, str(i)], stderr=subprocess.PIPE,
                             text=True) for i in (0, 1)]
    while "together" not in pair[1].stderr.readline():
        assert pair[1].poll() is None
    pair[1].send_signal(signal.SIGSTOP)
    alone = start(*TINY, "--coordinator", free_address(), "--processes", 2, "--process", 1,
                  "--wait", 1, cwd=tmp_path)
    sentence = pair[0].communicate(timeout=600)[1].splitlines()[-1]
    pair[1].kill()
    pair[1].communicate()
    assert pair[0].returncode == 2
    assert sentence.endswith("error: no answer from the other processes for 4 s; the advice")
    sentence = alone.communicate(timeout=600)[1].splitlines()[-1]
    assert alone.returncode == 2 and not os.listdir(tmp_path)
    assert sentence.startswith("meta_train.py: error: no answer from the other processes for 1 s;")


def test_a_number_of_devices_that_jax_was_told_stays():
    code = ("import jax, machine; machine.configure_jax(); print(jax.device_count(), "
            "jax.numpy.ones(1).dtype)")
    told = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}, {"JAX_NUM_CPU_DEVICES": "1"}
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                             env=os.environ | x | {"JAX_ENABLE_X64": "1"}) for x in told]
    assert [process.communicate()[0] for process in both] == [b"1 float32\n"] * 2
