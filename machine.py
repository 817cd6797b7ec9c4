"""What the machine gives: devices, other processes, files that are whole or absent, one cache."""
import contextlib
import functools
import hashlib
import json
import os
import sys
import threading
import tokenize
import zipfile
import zlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax.experimental import multihost_utils

CACHE = matplotlib.get_cachedir()  # compiled programs, baselines' curves; may be deleted


def configure_jax(devices=None):
    """In float32; one CPU device per core, since small steps don't fill two, unless JAX was told
    how many; and compiled programs are kept."""
    jax.config.update("jax_enable_x64", False)
    told = jax.config.jax_num_cpu_devices > 0 or "device_count" in os.environ.get("XLA_FLAGS", "")
    devices = devices or (None if told else os.cpu_count())
    if devices not in (None, jax.config.jax_num_cpu_devices):  # else an error once JAX has begun
        jax.config.update("jax_num_cpu_devices", devices)
    if not jax.config.jax_compilation_cache_dir:
        folder = os.path.join(CACHE, "learned_optimizer_programs")
        jax.config.update("jax_compilation_cache_dir", folder)


# ---------------------------------------------------------------- rows on devices

def sharding(n, alone=False):
    """How to lay out n rows (a multiple of the number of processes) over devices.

    Each process gives equally many, the most that divide n; `alone`, only this one gives any.
    """
    processes = [jax.local_devices(i) for i in range(jax.process_count())]
    if alone:
        processes = [jax.local_devices()]
    most = range(1, len(processes[0]) + 1)
    share = max(d for d in most if n % (d * len(processes)) == 0)
    devices = [device for process in processes for device in process[:share]]
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("rows",), axis_types=auto, devices=devices)
    return jax.NamedSharding(mesh, jax.P("rows"))


def over_rows(f, rows):
    """f(row) of each row, stacked. A CPU takes them one after another, elsewhere all go at once.

    So on a CPU a row stays in the cache, and of its branches only one is computed.
    """
    if len(jax.tree.leaves(rows)[0]) == 1:
        only = f(jax.tree.map(lambda x: x[0], rows))
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), only)
    if jax.default_backend() == "cpu":
        return jax.lax.map(f, rows)
    return jax.vmap(f)(rows)


def over_devices(f, n, alone=False):
    """-> g(shared, n rows) = f(shared, row) of each row, stacked, on the devices of `sharding`."""
    def each(shared, rows):
        return over_rows(functools.partial(f, shared), rows)

    rows, everywhere = sharding(n, alone), jax.P()
    return jax.shard_map(
        each, mesh=rows.mesh, in_specs=(everywhere, rows.spec), out_specs=rows.spec,
        check_vma=False)


# ---------------------------------------------------------------- several processes

def connect(coordinator, processes, process, wait):
    """Makes this process one of several, which share the rows; a ConnectionError if it can't be."""
    jax.config.update("jax_enable_recoverability", True)  # or JAX would abort this process, too
    never = 10 ** 5  # seconds: it is `together` that limits the waiting
    with together(wait, "is --coordinator right, and has each been started?"):
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator, processes, process,
            initialization_timeout=never, heartbeat_timeout_seconds=never,
            shutdown_timeout_seconds=5)
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # one of them tells what happens


@contextlib.contextmanager
def together(wait, advice):
    """What is inside needs the other processes: a ConnectionError if one is gone.

    If one is silent for `wait` seconds this process ends, with one sentence: a thread that waits
    for another machine can't be told anything.
    """
    def end():
        print(f"{os.path.basename(sys.argv[0])}: error: no answer from the other processes for "
              f"{wait:g} s; {advice}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(wait, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConnectionError(f"other processes can't be reached ({reason}); {advice}") from error
    finally:
        timer.cancel()


def gathered(tree):
    """The tree with its rows from all processes, in numpy arrays."""
    return multihost_utils.process_allgather(tree, tiled=True)


# ---------------------------------------------------------------- files

@contextlib.contextmanager
def whole(path):
    """The name of a file to be written, which takes the place of `path` once it is complete; of a
    pipe, itself."""
    if os.path.exists(path) and not os.path.isfile(path):
        yield path
        return
    folder, name = os.path.split(path)
    partial = os.path.join(folder, f"partial-{name}")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def write_json(path, values):
    with whole(path) as partial, open(partial, "w") as file:
        json.dump(values, file, indent=2)


def digest(arrays):
    """Of the names, kinds, shapes and values of a dict of arrays."""
    found = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        found.update(f"{name} {x.dtype} {x.shape}".encode() + x.tobytes())
    return np.array(found.hexdigest())


def write_npz(path, arrays):
    """All or nothing: the file at `path` is the old one or the new one, never a part of it."""
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    with whole(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **arrays, sha256=digest(arrays))


def read_npz(path):
    """-> dict of the arrays in it; nothing is unpickled. ValueError, one sentence, if it can't be
    read, or if it is one of ours and not what was written."""
    damages = (OSError, ValueError, EOFError, TypeError, RuntimeError, MemoryError, SyntaxError,
               AttributeError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        written = arrays.pop("sha256", None)  # files that others wrote have none
        if written is not None and written != digest(arrays):
            raise ValueError("its values are not those that were written")
        return {name: x for name, x in arrays.items() if isinstance(x, np.ndarray)}
    except FileNotFoundError:
        raise ValueError(f"There is no file {path}.") from None
    except damages as error:
        reason = str(error).split(". ")[0]  # what numpy says further of pickles is bad advice
        raise ValueError(f"{path} is damaged or not an .npz file ({reason}).") from None


def kept(name, make):
    """The arrays of make(), from the cache if they are there; a damaged copy is made again."""
    path = os.path.join(CACHE, f"learned_optimizer_{name}.npz")
    try:
        return read_npz(path)
    except ValueError:
        arrays = make()
    with contextlib.suppress(OSError):  # a read-only home costs the time again, nothing else
        write_npz(path, arrays)
    return arrays
