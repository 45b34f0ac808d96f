"""setup.py: what is built for which toolkit, with an nvcc made for the test."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

SETUP = Path(__file__).parent.parent / "setup.py"
NVCC = """#!/bin/sh
case "$*" in
    --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
    --list-gpu-arch) printf "compute_%s\\n" {known} ;;
    --dryrun*) echo "#\\$ TOP={folder}" >&2 ;;
    *) {compile} ;;
esac
"""
TOO_NEW = 'echo "In file included from" >&2; echo "x.h:1:2: error: -- unsupported GNU" >&2; exit 1'


@pytest.fixture
def setup():
    spec = importlib.util.spec_from_file_location("gan_kernels_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(setup, monkeypatch, tmp_path):
    """Makes an nvcc of this version, which knows these architectures and compiles like that."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    flags = "sm_70 sm_90 sm_100 sm_120a compute_120"
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: flags, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in ("GAN_KERNELS_CUDA", "TORCH_CUDA_ARCH_LIST", "TORCH_DONT_CHECK_COMPILER_ABI", "CC"):
        os.environ.pop(name, None)
    for module in (setup, cpp_extension):
        monkeypatch.setattr(module, "CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib64").mkdir()

    def make(version="13.2", known="75 90 100 103 120", compile='test -f "$3"'):
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.write_text(NVCC.format(version=version, known=known, compile=compile, folder=tmp_path))
        nvcc.chmod(0o755)

    return make


@pytest.mark.parametrize("unset", [None, "", " "])
def test_builds_for_the_architectures_of_pytorch_that_nvcc_knows(setup, toolkit, unset, tmp_path):
    toolkit()
    if unset is not None:
        os.environ["TORCH_CUDA_ARCH_LIST"] = unset
    assert setup.cuda_wanted()
    extension = setup.cuda_extension()
    macros = dict(extension.define_macros)
    assert macros["GAN_KERNELS_ARCHITECTURES"] == '"9.0 10.0 12.0+PTX"'
    assert macros["GAN_KERNELS_NVCC"] == '"13.2"'
    assert str(tmp_path / "lib64") in extension.library_dirs
    codes = {flag.rpartition("=")[2] for flag in cpp_extension._get_cuda_arch_flags()}
    assert codes == {"sm_90", "sm_100", "sm_120", "compute_120"}


def test_volta_is_built_for_by_an_nvcc_that_knows_it(setup, toolkit):
    toolkit(known="60 70 75 90")
    assert setup.architectures() == "7.0;9.0+PTX"


def test_the_architectures_asked_for_are_kept(setup, toolkit):
    toolkit()
    os.environ["TORCH_CUDA_ARCH_LIST"] = "7.5 8.6+PTX"
    assert setup.cuda_wanted()
    macros = dict(setup.cuda_extension().define_macros)
    assert macros["GAN_KERNELS_ARCHITECTURES"] == '"7.5 8.6+PTX"'
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "7.5 8.6+PTX"


OBSTACLES = {
    "nvcc was not found": None,
    "nvcc is 12.8 but PyTorch was built for CUDA 13.0": {"version": "12.8"},
    "nvcc 13.2 knows no architecture of this PyTorch": {"known": "130"},
    "nvcc 13.2 compiles nothing here: x.h:1:2: error: -- unsupported GNU": {"compile": TOO_NEW},
    "nvcc 13.2 compiles nothing here: no message": {"compile": "exit 1"},
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_without_a_toolkit_that_fits_the_cpu_part_alone_is_built(setup, toolkit, obstacle, capsys):
    if OBSTACLES[obstacle] is not None:
        toolkit(**OBSTACLES[obstacle])
    assert not setup.cuda_wanted()
    assert f"building for the CPU only: {obstacle}\n" in capsys.readouterr().out
    os.environ["GAN_KERNELS_CUDA"] = "1"
    with pytest.raises(SystemExit) as stop:
        setup.cuda_wanted()
    assert stop.value.code == f"GAN_KERNELS_CUDA=1, but {obstacle}"  # the message, and exit code 1


def test_a_pytorch_without_cuda_needs_no_nvcc(setup, toolkit, monkeypatch, capsys):
    toolkit()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not setup.cuda_wanted()
    assert "this PyTorch has no CUDA" in capsys.readouterr().out


def test_cuda_left_out_on_request(setup, toolkit, monkeypatch, capsys):
    toolkit()
    monkeypatch.setattr(setup, "cuda_obstacle", None)  # nothing is asked of nvcc
    os.environ["GAN_KERNELS_CUDA"] = "0"
    assert not setup.cuda_wanted()
    os.environ["GAN_KERNELS_CUDA"] = "yes"
    with pytest.raises(SystemExit, match="must be 0 or 1, not 'yes'"):
        setup.cuda_wanted()


def test_the_compiler_tried_is_that_of_the_build(setup, toolkit):
    toolkit(compile='test "$1 $2" = "-ccbin my-c++"')
    assert setup.compile_error() is not None
    os.environ["CC"] = "my-c++"
    assert setup.compile_error() is None


def test_the_compiler_is_left_to_nvcc_to_judge(setup, toolkit, monkeypatch):
    """PyTorch's own table would refuse it, whatever compiler nvcc itself is told to use."""
    toolkit()
    monkeypatch.setitem(cpp_extension.CUDA_GCC_VERSIONS, "13.2", ((6, 0), (16, 0)))
    too_new = torch.torch_version.TorchVersion("99.0")
    with pytest.raises(RuntimeError, match="greater than the maximum"):
        cpp_extension._check_cuda_version("g++", too_new)
    setup.cuda_extension()
    cpp_extension._check_cuda_version("g++", too_new)
