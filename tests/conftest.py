"""Strict mode: no silent broadcasting between ranks, and no random key used twice. And two
processes share the files, since a test keeps little more than one core busy."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Compiling is most of the time, here and in the processes that tests start.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax
import pytest

if jax.__version_info__ < (0, 11):  # a flag that later ones don't know
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # or a GPU rounds factors to 11 bits


@pytest.fixture(autouse=True)
def no_key_used_twice(request):
    """Only where most is drawn: it costs a quarter of the time, and where unrolls are vmapped, jax
    0.10 mistakes a scan over split keys, vmapped over keys, for reuse."""
    with jax.debug_key_reuse(request.module.__name__.split(".")[-1] == "test_tasks"):
        yield


def pytest_configure(config):
    if FOLDER in os.environ:
        config.pluginmanager.register(Told(config))
    config.addinivalue_line("filterwarnings", "error::DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:matplotlib.*")  # its own


# ---------------------------------------------------------------- two processes

FOLDER = "TESTS_FOLDER"  # where each says which files it has taken, the second what came of them


def pytest_runtestloop(session):
    """This process and a second one take files, long ones first, until none is left; what became of
    the second's tests is reported here as if they had run here."""
    config, option = session.config, session.config.option
    files = {}
    for item in session.items:
        files.setdefault(item.path, []).append(item)
    files = [files[path] for path in sorted(files, key=lambda path: -path.stat().st_size)]
    if FOLDER in os.environ:
        take(session, files, Path(os.environ[FOLDER]))
        return True
    if len(files) < 2 or option.collectonly or option.usepdb or session.testsfailed:
        return None  # pytest's own loop
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder) / "reports"
        reports.touch()
        second = subprocess.Popen(
            [sys.executable, "-m", "pytest", *map(str, config.invocation_params.args),
             f"--basetemp={folder}/temporary"],
            cwd=config.invocation_params.dir, env=os.environ | {FOLDER: folder},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            take(session, files, Path(folder))
            said, _ = second.communicate()
        finally:
            second.kill()
        if second.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise RuntimeError(f"The second process ended early:\n{said.decode()}")
        for line in reports.read_text().splitlines():
            report = config.hook.pytest_report_from_serializable(
                config=config, data=json.loads(line))
            config.hook.pytest_runtest_logreport(report=report)
    return True


def take(session, files, folder):
    """Runs the files that the other process hasn't taken."""
    for items in files:
        try:
            (folder / items[0].path.name).touch(exist_ok=False)
        except FileExistsError:
            continue
        for item, following in zip(items, [*items[1:], None]):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)


class Told:
    """A plugin that keeps the reports of the second process for the first."""
    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(Path(os.environ[FOLDER]) / "reports", "a") as file:
            print(json.dumps(data), file=file)
