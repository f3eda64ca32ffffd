"""Builds the compiled host extension, and the CUDA one where it can.

Settings are environment variables: ODYSSEUS_BUILD_CUDA=0 leaves CUDA out, CUDA_HOME says where to find it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, naive_recompile
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = Path("csrc")  # relative to ROOT, as setuptools wants sources to be
ARCHITECTURES = ("80", "90a", "100a")


def find_nvcc() -> tuple[Path, Path] | None:
    """(nvcc, the toolkit's root), from CUDA_HOME, PATH or the nvidia-cuda-nvcc wheel; None where there is none."""
    candidates = []
    if os.environ.get("CUDA_HOME"):
        candidates.append(Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc")
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    if spec := importlib.util.find_spec("nvidia"):
        for folder in spec.submodule_search_locations or ():
            candidates += sorted(Path(folder).glob("cu*/bin/nvcc")) + sorted(Path(folder).glob("cuda_nvcc/bin/nvcc"))
    for nvcc in candidates:
        if nvcc.is_file():
            return nvcc, nvcc.resolve().parent.parent
    return None


class BuildExt(build_ext):
    """Compiles in parallel, .cu files through nvcc, and says in one line what was built."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Builds one extension; CUDA sources are compiled to objects first and linked with the rest."""
        sources = [source for source in ext.sources if source.endswith(".cu")]
        ext.sources = [source for source in ext.sources if not source.endswith(".cu")]
        toolkit = find_nvcc() if sources else None
        if toolkit is not None:
            nvcc, home = toolkit
            ext.extra_objects += self.compile_cuda(sources, nvcc)
            ext.define_macros.append(("ODYSSEUS_CUDA", "1"))
            libraries = next((str(home / name) for name in ("lib64", "lib") if (home / name).is_dir()), str(home))
            ext.library_dirs.append(libraries)
            # Static, so that the module loads on machines without a driver or a toolkit.
            ext.extra_link_args += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            ext.include_dirs.append(str(home / "include"))
        super().build_extension(ext)
        print(f"odysseus_kernels: built the host extension{describe_cuda(sources, toolkit)}", file=sys.stderr)

    def compile_cuda(self, sources: list[str], nvcc: Path) -> list[str]:
        """Object files of the given CUDA sources."""
        targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "-DODYSSEUS_CUDA=1", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        objects = []
        for source in sources:
            target = Path(self.build_temp) / f"{source}.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([str(nvcc), *flags, *targets, "-c", source, "-o", str(target)], check=True)
            objects.append(str(target))
        return objects


def describe_cuda(sources: list[str], toolkit: tuple[Path, Path] | None) -> str:
    """What to say about the CUDA part."""
    if toolkit is not None:
        return f" with {len(sources)} CUDA files ({toolkit[0]}; {', '.join('sm_' + name for name in ARCHITECTURES)})"
    if os.environ.get("ODYSSEUS_BUILD_CUDA") == "0":
        return " without CUDA (ODYSSEUS_BUILD_CUDA=0)"
    return " without CUDA (no nvcc found)" if cuda_sources() else " (there is no CUDA code)"


def cuda_sources() -> list[str]:
    """CUDA files of the project, unless they were switched off."""
    if os.environ.get("ODYSSEUS_BUILD_CUDA") == "0":
        return []
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / CSRC / "cuda").rglob("*.cu"))


def make_extension() -> Pybind11Extension:
    """The one extension module; headers are named so that changing one rebuilds it."""
    host = sorted(str(path.relative_to(ROOT)) for path in (ROOT / CSRC).rglob("*.cpp") if "cuda" not in path.parts)
    headers = sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / CSRC).rglob("*") if path.suffix in {".h", ".inl", ".cuh"}
    )
    return Pybind11Extension(
        "odysseus_kernels._C",
        host + cuda_sources(),
        depends=headers,
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra"],
    )


ParallelCompile("ODYSSEUS_BUILD_JOBS", default=0, needs_recompile=naive_recompile).install()
setup(ext_modules=[make_extension()], cmdclass={"build_ext": BuildExt})
