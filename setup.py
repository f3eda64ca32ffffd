"""Builds the compiled host extension, and the CUDA one where it can.

Settings are environment variables: ODYSSEUS_BUILD_CUDA=0 leaves CUDA out, CUDA_HOME says where to find it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = Path("csrc")  # relative to ROOT, as setuptools wants sources to be
OLDEST_CUDA = 13
ARCHITECTURES = ("80", "90a", "100a")
PORTABLE = "90"  # also embedded as PTX, which drivers compile for devices newer than ARCHITECTURES


def find_nvcc() -> Path | None:
    """The compiler, from CUDA_HOME, PATH or the nvidia-cuda-nvcc wheel; None where there is none."""
    candidates = []
    if os.environ.get("CUDA_HOME"):
        candidates.append(Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc")
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    if spec := importlib.util.find_spec("nvidia"):
        for folder in spec.submodule_search_locations or ():
            candidates += sorted(Path(folder).glob("cu*/bin/nvcc")) + sorted(Path(folder).glob("cuda_nvcc/bin/nvcc"))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))  # where it is installed, and often not on PATH
    return next((nvcc for nvcc in candidates if nvcc.is_file() and is_new_enough(nvcc)), None)


def is_new_enough(nvcc: Path) -> bool:
    """Whether the toolkit has the declarations that csrc/cuda uses; says so where it has not."""
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)", text)
    if found is not None and int(found[1]) >= OLDEST_CUDA:
        return True
    print(f"odysseus_kernels: expected CUDA {OLDEST_CUDA} or newer for {nvcc}, got: {text.strip()}", file=sys.stderr)
    return False


def architectures(nvcc: Path) -> list[str]:
    """Those of ARCHITECTURES that this nvcc knows; its list leaves out the "a" variants, which come with the plain."""
    known = subprocess.run([str(nvcc), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in ARCHITECTURES if f"sm_{name.removesuffix('a')}" in known]


def toolkit_folders(nvcc: Path, source: str) -> tuple[list[str], list[str]]:
    """Folders of headers and of libraries, as nvcc itself uses them: it may be a link or a script from elsewhere."""
    plan = subprocess.run([str(nvcc), "--dryrun", "-c", source], capture_output=True, text=True, check=True).stderr
    flags = {name: value for name, _, value in (line[3:].partition("=") for line in plan.splitlines())}
    includes = [flag[2:] for flag in shlex.split(flags.get("INCLUDES", "")) if flag.startswith("-I")]
    libraries = [flag[2:] for flag in shlex.split(flags.get("LIBRARIES", "")) if flag.startswith("-L")]
    # The wheels keep them where their nvcc does not look.
    libraries += [str(Path(flags["TOP"]) / name) for name in ("lib64", "lib") if "TOP" in flags]
    return includes, [folder for folder in libraries if Path(folder).is_dir()]


class BuildExt(build_ext):
    """Compiles in parallel, .cu files through nvcc, and says in one line what was built."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Builds one extension; CUDA sources are compiled to objects first and linked with the rest."""
        sources = [source for source in ext.sources if source.endswith(".cu")]
        ext.sources = [source for source in ext.sources if not source.endswith(".cu")]
        nvcc = find_nvcc() if sources else None
        if nvcc is not None:
            includes, libraries = toolkit_folders(nvcc, sources[0])
            ext.sources += cuda_bindings()
            ext.extra_objects += self.compile_cuda(sources, nvcc)
            ext.define_macros.append(("ODYSSEUS_CUDA", "1"))
            ext.include_dirs += includes
            ext.library_dirs += libraries
            # Static, so that the module loads on machines without a driver or a toolkit.
            ext.extra_link_args += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        super().build_extension(ext)
        print(f"odysseus_kernels: built the host extension{describe_cuda(sources, nvcc)}", file=sys.stderr)

    def compile_cuda(self, sources: list[str], nvcc: Path) -> list[str]:
        """Object files of the given CUDA sources."""
        targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures(nvcc)]
        targets.append(f"-gencode=arch=compute_{PORTABLE},code=compute_{PORTABLE}")
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "-DODYSSEUS_CUDA=1", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        objects = [Path(self.build_temp) / f"{source}.o" for source in sources]

        def compile_one(source: str, target: Path) -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([str(nvcc), *flags, *targets, "-c", source, "-o", str(target)], check=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, sources, objects))  # the list passes on what a compilation raised
        return [str(target) for target in objects]


def describe_cuda(sources: list[str], nvcc: Path | None) -> str:
    """What to say about the CUDA part."""
    if nvcc is not None:
        return f" with {len(sources)} CUDA files ({nvcc}; {', '.join('sm_' + name for name in architectures(nvcc))})"
    if os.environ.get("ODYSSEUS_BUILD_CUDA") == "0":
        return " without CUDA (ODYSSEUS_BUILD_CUDA=0)"
    return f" without CUDA (no nvcc of CUDA {OLDEST_CUDA} or newer found)"


def cuda_sources() -> list[str]:
    """CUDA files of the project, unless they were switched off."""
    if os.environ.get("ODYSSEUS_BUILD_CUDA") == "0":
        return []
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / CSRC / "cuda").rglob("*.cu"))


def cuda_bindings() -> list[str]:
    """C++ files that need the CUDA code; pybind11 stays out of .cu files, which nvcc compiles slowly enough."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / CSRC / "cuda").rglob("*.cpp"))


def headers() -> list[str]:
    """Headers of all sources."""
    return sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / CSRC).rglob("*") if path.suffix in {".h", ".inl", ".cuh"}
    )


def needs_recompile(made: str, source: str) -> bool:
    """Whether an object file is older than its source or any header: one of another header's making may not link."""
    newest = max((ROOT / path).stat().st_mtime for path in (source, *headers()))
    return Path(made).stat().st_mtime <= newest


def make_extension() -> Pybind11Extension:
    """The one extension module; headers are named so that changing one rebuilds it."""
    host = sorted(str(path.relative_to(ROOT)) for path in (ROOT / CSRC).rglob("*.cpp") if "cuda" not in path.parts)
    return Pybind11Extension(
        "odysseus_kernels._C",
        host + cuda_sources(),
        # CUDA sources, too: they are taken out of the sources before it is asked what has changed.
        depends=headers() + cuda_sources(),
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra"],
    )


ParallelCompile("ODYSSEUS_BUILD_JOBS", default=0, needs_recompile=needs_recompile).install()
setup(ext_modules=[make_extension()], cmdclass={"build_ext": BuildExt})
