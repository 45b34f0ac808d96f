"""What every test needs: the scripts importable, and the devices there are."""

import multiprocessing
import os
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
pytest.register_assert_rewrite("helpers")

from emulation import emulated, load, sources  # noqa: E402
from helpers import child, no_network  # noqa: E402

# on a busy machine threads of small tensors wait for each other; those of processes begun here, too
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test in a folder of its own, with no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    timeout = socket.getdefaulttimeout()
    yield
    socket.setdefaulttimeout(timeout)


@pytest.fixture(autouse=True)
def no_tf32():
    """On a GPU cuDNN would use it by default, or a test before may have switched it on."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request):
    """Each test that asks for it runs on the CPU and, where there is one, on a GPU."""
    torch.manual_seed(0)
    return request.param


@pytest.fixture(scope="session")
def cuda_library():
    """The CUDA kernels compiled for the CPU, once."""
    return load("gan_kernels_emulated", sources())


@pytest.fixture(params=["cpu", "cuda" if torch.cuda.is_available() else "emulated"])
def kernels(request):
    """Each test that asks for it runs on the CPU's kernels, and on CUDA's: on a GPU or emulated."""
    torch.manual_seed(0)
    if request.param == "emulated":
        with emulated(request.getfixturevalue("cuda_library")):
            yield request.param
    else:
        yield request.param


@pytest.fixture(scope="session")
def start():
    """Starts main(flags) of a script in a process of its own (helpers.child), within moments."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torchvision", "scipy.stats", "matplotlib.figure", "pytest"]
        + [f"sklearn.{part}" for part in ("datasets", "ensemble", "neural_network", "mixture")]
    )  # but no script: what a process is, it learns from the environment when imported
    forkserver.ensure_running()

    def begin(name, *flags, environment=None, prepare=None, limit=None):
        command = (name, [str(flag) for flag in flags], environment or {}, prepare, limit)
        process = context.Process(target=child, args=command)
        process.start()
        return process

    return begin
