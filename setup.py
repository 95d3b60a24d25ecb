"""The extension module; everything else is in pyproject.toml."""

import os
import sys
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

if sys.platform == "win32":
    raise SystemExit("LogKV does not support Windows: nobody has tested its mapped files and locks there")

flags = os.environ.get("LOGKV_CFLAGS", "").split()

setup(
    ext_modules=cythonize(
        [
            Extension(
                "logkv._core",
                ["ext/_core.pyx"],
                include_dirs=["ext"],
                depends=["setup.py", *sorted(glob("ext/*"))],
                # Cython 3.3 crashes where there is no memory for the names of a constructor's keywords.
                define_macros=[("CYTHON_VECTORCALL_TPNEW", "0")],
                extra_compile_args=["-O3", "-std=gnu11", "-fno-strict-aliasing", *flags],
                extra_link_args=flags,
            )
        ],
        include_path=["ext"],
        build_dir="build",
        annotate=bool(os.environ.get("LOGKV_ANNOTATE")),
    )
)
