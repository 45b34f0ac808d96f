"""Build gan_kernels: one library for the CPU and, where there is a toolkit, one for CUDA.

Environment:
    GAN_KERNELS_CUDA      1 builds the CUDA library or fails, 0 leaves it out; unset: if it can be.
    GAN_KERNELS_SANITIZE  1: the CPU library has the address and undefined-behaviour sanitizers.
    TORCH_CUDA_ARCH_LIST  CUDA architectures, as PyTorch reads it.
"""

import os
import re
import subprocess
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, include_paths, library_paths

TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI as of PyTorch 2.10
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))


def ask_nvcc(*arguments):
    """Return what nvcc prints, or nothing where there is no nvcc that runs."""
    command = [Path(CUDA_HOME or "") / "bin" / "nvcc", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout + done.stderr


def nvcc_version():
    """Return nvcc's version as (major, minor), or None where there is no nvcc."""
    found = re.search(r"release (\d+)\.(\d+)", ask_nvcc("--version"))
    return (int(found[1]), int(found[2])) if found else None


def toolkit_libraries():
    """Return the toolkit's library folders; nvcc knows them even where it is only a wrapper."""
    found = re.search(r"TOP=(.*)", ask_nvcc("--dryrun", "-c", "csrc/penalty_cuda.cu"))
    top = Path(found[1].strip() if found else CUDA_HOME)
    return [str(path) for path in (top / "lib64", top / "lib") if path.is_dir()]


def cuda_obstacle(nvcc):
    """Say in a few words why CUDA cannot be built here; None when it can."""
    if torch.version.cuda is None:
        return "this PyTorch has no CUDA"
    if nvcc is None:
        return "nvcc was not found"
    if nvcc[0] != int(torch.version.cuda.split(".")[0]):
        return f"nvcc is {nvcc[0]}.{nvcc[1]} but PyTorch was built for CUDA {torch.version.cuda}"
    return None


def default_architectures(nvcc):
    """Return the architectures from Turing to Blackwell that this nvcc can compile."""
    known = ["7.5", "8.0", "8.6", "9.0"] + (["10.0", "12.0"] if nvcc >= (12, 8) else [])
    return ";".join(known) + "+PTX"


def extensions():
    nvcc = nvcc_version()
    obstacle = cuda_obstacle(nvcc)
    wish = os.environ.get("GAN_KERNELS_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"GAN_KERNELS_CUDA must be 0 or 1, not {wish!r}")
    if wish == "1" and obstacle:
        raise SystemExit(f"GAN_KERNELS_CUDA=1, but {obstacle}")
    if wish == "0":
        obstacle = "GAN_KERNELS_CUDA=0"

    flags = [TARGET, "-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
    link = []
    if os.environ.get("GAN_KERNELS_SANITIZE") == "1":
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        flags += [*sanitize, "-O1", "-g", "-fno-omit-frame-pointer"]
        link += sanitize
    built = [
        Extension(
            "gan_kernels._cpu",
            [f"csrc/{name}.cpp" for name in ("info_loss", "layer_norm", "library", "penalty")],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["c10", "torch", "torch_cpu"],
            depends=HEADERS,
            extra_compile_args={"cxx": flags},
            extra_link_args=link,
            language="c++",
            py_limited_api=True,
        )
    ]
    if obstacle is None:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_architectures(nvcc))
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ")
        built.append(
            Extension(
                "gan_kernels._cuda",
                [
                    "csrc/info_loss_cuda.cu",
                    "csrc/layer_norm_cuda.cu",
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
                    ("GAN_KERNELS_NVCC", f'"{nvcc[0]}.{nvcc[1]}"'),
                    ("GAN_KERNELS_ARCHITECTURES", f'"{architectures}"'),
                ],
                extra_compile_args={
                    "cxx": [TARGET, "-std=c++20", "-O2", "-g0", "-Wall"],
                    "nvcc": [TARGET, "-std=c++20", "-O3"],
                },
                language="c++",
                py_limited_api=True,
            )
        )
        print(f"gan_kernels: building for the CPU and CUDA {nvcc[0]}.{nvcc[1]} ({architectures})")
    else:
        print(f"gan_kernels: building for the CPU only: {obstacle}")
    return built


class Build(BuildExtension):
    def run(self):
        """Build, having removed what an earlier build with CUDA left and this one does not make."""
        if not any(extension.name == "gan_kernels._cuda" for extension in self.extensions):
            folders = [self.build_lib, "csrc"] if self.inplace else [self.build_lib]
            for folder in folders:
                for stale in Path(folder, "gan_kernels").glob("_cuda.*"):
                    stale.unlink()
        super().run()


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
