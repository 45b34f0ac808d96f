"""CUDA without a GPU: the .cu files compiled by g++, run on the CPU and watched for faults.

    library = load("gan_kernels_emulated", sources())
    with emulated(library):             # torch.ops.gan_kernels computes on CPU tensors with the
        gan_kernels.info_loss(...)      # CUDA kernels; a fault of theirs is a RuntimeError

emulator.cpp says what counts as a fault. Nothing here knows the kernels.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SANITIZED = os.environ.get("GAN_KERNELS_SANITIZE") == "1"
CXX = os.environ.get("CXX", "g++")
COMPILE = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-DUSE_CUDA"]
WATCH = ["-fsanitize=thread"]
LINK = ["-shared", "-Wl,-Bsymbolic,-z,defs"]  # our stand-ins before PyTorch's functions
if SANITIZED:
    WATCH = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    WATCH += ["-fno-omit-frame-pointer"]
    LINK += WATCH


def sources():
    """Return {name: text} of what is compiled into the CUDA library, and its headers."""
    paths = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/*.cu"), *ROOT.glob("csrc/library*.cpp")]
    return {path.name: path.read_text() for path in sorted(paths)}


def translate(text, namespace):
    """Return CUDA's syntax as C++, and the operators registered for the CPU in a namespace."""
    text = re.sub(
        r"extern __shared__(?: __align__\(\d+\))? ([\w ]+) (\w+)\[\];",
        r"\1* \2 = static_cast<\1*>(::emulated::dynamic_shared());",
        text,
    )
    text = re.sub(
        r"__shared__ ([\w:<>, ]+) (\w+)((?:\[[^]]*\])*);",
        r"auto& \2 = ::emulated::shared<\1\3>([] {});",
        text,
    )
    text = re.sub(
        r"(\w+(?:<[^<>;(){}]*>)?)\s*<<<(.*?)>>>",
        r'::emulated::Launch{"\1", \2}([&](const auto&... arguments) UNWATCHED '
        r"{ \1(arguments...); })",
        text,
        flags=re.DOTALL,
    )
    text = re.sub(r"(STABLE_TORCH_LIBRARY\w*\()gan_kernels\b", rf"\g<1>{namespace}", text)
    text = re.sub(r"(STABLE_TORCH_LIBRARY_IMPL\(\w+, )CUDA\b", r"\1CPU", text)
    return re.sub(r"__CUDA(CC|_ARCH)__", "EMULATED_ARCHITECTURE", text)


def build(texts, namespace):
    """Return the path of a library with these sources, compiled unless it has been before."""
    if os.uname().sysname != "Linux" or shutil.which(CXX) is None:
        pytest.skip(f"the CUDA emulation needs Linux and a C++ compiler, and {CXX} was not found")
    from torch.utils.cpp_extension import include_paths, library_paths  # which looks for CUDA

    flags = [*COMPILE, *(f"-I{path}" for path in [HERE, *include_paths()])]
    link = [*LINK, *(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch", "-ltorch_cpu"]
    target = re.search('TARGET = "(.*?)"', (ROOT / "setup.py").read_text())[1]
    built_with = [CXX, *flags, *WATCH, *link, target, namespace, torch.__version__]
    ours = [path.read_text() for path in sorted(HERE.iterdir()) if path.is_file()]
    key = hashlib.sha256(repr([built_with, ours, texts]).encode()).hexdigest()[:16]
    library = ROOT / "build" / "emulation" / f"{namespace}-{key}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.parent / "lock"):  # tests run in two processes
        if not library.exists():
            compile_library(library, texts, namespace, flags, link, target)
    return library


def compile_library(library, texts, namespace, flags, link, target):
    """Compile these sources, in place of the namespace's library of before."""
    for old in library.parent.glob(f"{namespace}-*.so"):
        old.unlink()
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        commands = [[*flags, "-O2", HERE / "emulator.cpp"]]
        for name, text in texts.items():
            path = Path(folder, name)
            path.write_text(translate(text, namespace))
            if path.suffix != ".h":
                build_info = ['-DGAN_KERNELS_NVCC="none"', '-DGAN_KERNELS_ARCHITECTURES="emulated"']
                commands.append([*flags, *WATCH, target, *build_info, "-x", "c++", path])
        for i, command in enumerate(commands):
            commands[i] = [CXX, *command, "-c", "-o", Path(folder, f"{i}.o")]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compiler, commands))
        whole = Path(folder, "whole.so")
        compiler([CXX, *(command[-1] for command in commands), *link, "-o", whole])
        whole.rename(library)


def compiler(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def load(namespace, texts):
    """Register the operators of the library with these sources in a namespace; return it."""
    path = build(texts, namespace)
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


@contextlib.contextmanager
def emulated(library):
    """Within, the operators of gan_kernels are those of this library, on CPU tensors."""
    with watching(library), torch.library._scoped_library("gan_kernels", "IMPL") as replaced:
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"):
            namespace, _, name = name.partition("::")
            if namespace == "gan_kernels_emulated":
                operator = getattr(torch.ops.gan_kernels_emulated, name).default
                replaced.impl(name, operator, "CPU")
        yield


@contextlib.contextmanager
def watching(library):
    """Within, the library checks every use of the tensors that are made here."""
    if SANITIZED:  # which check in their own way
        yield
        return
    library.watch_memory(True)
    try:
        yield
    finally:
        library.watch_memory(False)
