"""The optional compiled module; all else is declared in pyproject.toml.

Where it can't be compiled (no C++ compiler, no Python.h) the package installs without it, and NumPy does its work.
"""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class Optional(build_ext):
    """Says in one line that the module is missing, and goes on."""

    def build_extension(self, ext):
        try:
            import pybind11

            ext.include_dirs.append(pybind11.get_include())
            super().build_extension(ext)
        except Exception as error:
            print(f"megatron-rocm: {ext.name} is not compiled ({error}): NumPy makes the same indexes, slower")


setup(
    ext_modules=[
        Extension(
            "megatron_rocm.data._native",
            ["megatron_rocm/data/csrc/native.cpp"],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": Optional},
)
