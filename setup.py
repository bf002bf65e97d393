"""Build tt._core, the one extension module.  TT_BUILD = release (default) | debug | asan."""

import os
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

BUILD = os.environ.get("TT_BUILD", "release")
FLAVOURS = {
    # -g and the frame pointer cost nothing that could be measured and let `perf` name the loop's functions.
    "release": ["-O2", "-g", "-fno-omit-frame-pointer", "-fstack-protector-strong", "-D_FORTIFY_SOURCE=2"],
    "debug": ["-O0", "-g3"],
    "asan": [
        "-O1",
        "-g",
        "-fno-omit-frame-pointer",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ],
}
if BUILD not in FLAVOURS:
    raise SystemExit(f"TT_BUILD is {BUILD!r}: it must be one of {', '.join(FLAVOURS)}")
FLAGS = FLAVOURS[BUILD]
SOURCES = [name for name in sorted(glob("ext/*")) if name.endswith((".pyx", ".pxd", ".pxi", ".h"))]

core = Extension(
    "tt._core",
    sources=["ext/_core.pyx"],
    depends=SOURCES,  # rebuild on any change; also what puts the .pyx into the source distribution
    include_dirs=["ext"],
    extra_compile_args=["-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter", *FLAGS],
    extra_link_args=[flag for flag in FLAGS if flag.startswith("-fsanitize")],
)
setup(
    ext_modules=cythonize(
        [core],
        force=True,  # flavours differ in directives; by timestamp alone one would reuse another's C
        build_dir="build",
        include_path=[
            "ext"
        ],  # the module is tt._core but its file is ext/_core.pyx: a .pxd beside it is not found by itself
        annotate=True,  # build/ext/_core.html: tests/test_build.py reads the scores of the hot functions there
        compiler_directives={
            "language_level": 3,
            "cdivision": True,
            "wraparound": False,
            "boundscheck": BUILD != "release",
        },
    )
)
