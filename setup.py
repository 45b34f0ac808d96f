"""Build gan_kernels: one library for the CPU and, where there is a toolkit, one for CUDA.

Environment:
    GAN_KERNELS_CUDA      1 builds the CUDA library or fails, 0 leaves it out; unset: if it can be.
    GAN_KERNELS_SANITIZE  1: the CPU library has the address and undefined-behaviour sanitizers.
    TORCH_CUDA_ARCH_LIST  CUDA architectures, as PyTorch reads it; unset: those of PyTorch itself.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, include_paths, library_paths

TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI as of PyTorch 2.10
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))


def run_nvcc(*arguments):
    """Return whether nvcc is there and succeeds, and what it prints."""
    command = [Path(CUDA_HOME or "") / "bin" / "nvcc", *arguments]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError:
        return False, ""
    return done.returncode == 0, done.stdout


def nvcc_version():
    """Return nvcc's version, such as 13.0, or None where there is no nvcc."""
    found = re.search(r"release (\d+\.\d+)", run_nvcc("--version")[1])
    return found and found[1]


def toolkit_libraries():
    """Return the toolkit's library folders; nvcc knows them even where it is only a wrapper."""
    found = re.search(r"TOP=(.*)", run_nvcc("--dryrun", "-c", "csrc/penalty_cuda.cu")[1])
    top = Path(found[1].strip() if found else CUDA_HOME)
    return [str(path) for path in (top / "lib64", top / "lib") if path.is_dir()]


def architectures():
    """Return those of TORCH_CUDA_ARCH_LIST, or PyTorch's own as far as this nvcc knows them."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if wish:
        return wish
    known = re.findall(r"compute_(\d+)", run_nvcc("--list-gpu-arch")[1])
    # not torch.cuda.get_arch_list(), which is empty where PyTorch 2.10 sees no GPU
    wanted = re.findall(r"sm_(\d+)", torch._C._cuda_getArchFlags() or "")
    both = sorted({int(number) for number in known} & {int(number) for number in wanted})
    # PTX of the newest, for GPUs that come after it
    return ";".join(f"{number // 10}.{number % 10}" for number in both) + "+PTX" if both else ""


def compile_error():
    """Return nvcc's first error about an empty file, as of a compiler too new for it, or None."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.touch()
        compiler = ["-ccbin", os.environ["CC"]] if "CC" in os.environ else []  # as PyTorch calls it
        output = ["-o", source.with_suffix(".o")]
        succeeded, printed = run_nvcc(*compiler, "-std=c++20", "-c", source, *output)
    if succeeded:
        return None
    lines = printed.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[0])


def cuda_obstacle():
    """Say in a few words why CUDA cannot be built here; None when it can."""
    if torch.version.cuda is None:
        return "this PyTorch has no CUDA"
    nvcc = nvcc_version()
    if nvcc is None:
        return "nvcc was not found"
    if nvcc.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is {nvcc} but PyTorch was built for CUDA {torch.version.cuda}"
    if not architectures():
        return f"nvcc {nvcc} knows no architecture of this PyTorch"
    error = compile_error()
    return error and f"nvcc {nvcc} compiles nothing here: {error}"


def cuda_wanted():
    """Return whether to build for CUDA, having said why not."""
    wish = os.environ.get("GAN_KERNELS_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"GAN_KERNELS_CUDA must be 0 or 1, not {wish!r}")
    obstacle = "GAN_KERNELS_CUDA=0" if wish == "0" else cuda_obstacle()
    if obstacle and wish == "1":
        raise SystemExit(f"GAN_KERNELS_CUDA=1, but {obstacle}")
    if obstacle:
        print(f"gan_kernels: building for the CPU only: {obstacle}")
    return not obstacle


def cpu_extension():
    flags = [TARGET, "-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
    link = []
    if os.environ.get("GAN_KERNELS_SANITIZE") == "1":
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        flags += [*sanitize, "-O1", "-g", "-fno-omit-frame-pointer"]
        link += sanitize
    return Extension(
        "gan_kernels._cpu",
        [f"csrc/{name}.cpp" for name in ("info_loss", "library", "norm", "penalty")],
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["c10", "torch", "torch_cpu"],
        depends=HEADERS,
        extra_compile_args={"cxx": flags},
        extra_link_args=link,
        language="c++",
        py_limited_api=True,
    )


def cuda_extension():
    nvcc, wanted = nvcc_version(), architectures()
    os.environ["TORCH_CUDA_ARCH_LIST"] = wanted
    # PyTorch's table of compilers that fit an nvcc is another opinion: nvcc has just compiled.
    os.environ["TORCH_DONT_CHECK_COMPILER_ABI"] = "1"
    named = wanted.replace(";", " ")
    print(f"gan_kernels: building for the CPU and CUDA {nvcc} ({named})")
    return Extension(
        "gan_kernels._cuda",
        [
            "csrc/info_loss_cuda.cu",
            "csrc/norm_cuda.cu",
            "csrc/library_cuda.cpp",
            "csrc/penalty_cuda.cu",
        ],
        include_dirs=include_paths(device_type="cuda"),
        library_dirs=library_paths(device_type="cuda") + toolkit_libraries(),
        # The CUDA run time is linked statically: PyTorch's may be another minor version.
        libraries=["c10", "torch", "torch_cpu", "torch_cuda", "cudart_static", "rt", "dl"],
        depends=HEADERS,
        define_macros=[
            ("USE_CUDA", None),
            ("GAN_KERNELS_NVCC", f'"{nvcc}"'),
            ("GAN_KERNELS_ARCHITECTURES", f'"{named}"'),
        ],
        extra_compile_args={
            "cxx": [TARGET, "-std=c++20", "-O2", "-g0", "-Wall"],
            "nvcc": [TARGET, "-std=c++20", "-O3"],
        },
        language="c++",
        py_limited_api=True,
    )


class Build(BuildExtension):
    def run(self):
        """Build, having removed what an earlier build with CUDA left and this one does not make."""
        if not any(extension.name == "gan_kernels._cuda" for extension in self.extensions):
            folders = [self.build_lib, "csrc"] if self.inplace else [self.build_lib]
            for folder in folders:
                for stale in Path(folder, "gan_kernels").glob("_cuda.*"):
                    stale.unlink()
        super().run()


if __name__ == "__main__":
    setup(
        ext_modules=[cpu_extension(), *([cuda_extension()] if cuda_wanted() else [])],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
