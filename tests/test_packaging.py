"""What the program imports is declared, what is declared is pinned, and the supported Pythons agree everywhere."""

import ast
import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_rocm"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

# What an extra brings need not be installed where the tests run.
OF_EXTRAS = {
    "datasets": "datasets",
    "flash_attn": "flash-attn",
    "mlperf_logging": "mlperf-logging",
    "pynvml": "nvidia-ml-py",
    "transformer_engine": "transformer-engine",
    "wandb": "wandb",
}

# What comes with ROCm, of its version.
OF_ROCM = {"amdsmi"}

# What benchmarks compare with where somebody has installed it.
PEERS = {"datatrove", "mistral-common", "torchtitan"}


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


CORE = names(PROJECT["dependencies"])
OPTIONAL = {name for extra, found in EXTRAS.items() if extra != "dev" for name in names(found)}
DEV = names(EXTRAS["dev"])


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(top-level name, whether inside a function, line) of each absolute import."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name.partition(".")[0], lazy, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.level == 0:
                yield child.module.partition(".")[0], lazy, child.lineno
            yield from walk(child, lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    return walk(ast.parse(path.read_text(encoding="utf-8"), str(path)), False)


def undeclared(folders: list[Path], at_import: set[str], lazily: set[str]) -> list[str]:
    """ "file:line imports name" of each third-party import whose distribution is not allowed there."""
    providers = importlib.metadata.packages_distributions()
    files = (path for name in ("tests", "tools") for path in (ROOT / name).rglob("*.py"))
    ours = {"megatron_rocm", *(path.name for path in (ROOT / "tests").glob("*")), *(path.stem for path in files)}
    found = []
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        for name, lazy, line in imports(path):
            if name in sys.stdlib_module_names or name in ours | OF_ROCM:
                continue
            dists = {canonicalize_name(dist) for dist in providers.get(name, [OF_EXTRAS.get(name, name)])}
            if not dists & (at_import | lazily if lazy else at_import):
                found.append(f"{path.relative_to(ROOT)}:{line} imports {name} ({', '.join(sorted(dists))})")
    return found


def test_what_the_package_imports_is_declared():
    assert undeclared([PACKAGE], at_import=CORE, lazily=CORE | OPTIONAL) == []


def test_what_tests_and_tools_import_is_declared():
    folders = [ROOT / name for name in ("tests", "tools", "benchmarks", "examples")]
    everything = CORE | OPTIONAL | DEV
    assert undeclared(folders, at_import=everything, lazily=everything | {"tomli"} | PEERS) == []


def test_an_undeclared_import_is_found(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(
        "import os, yaml, moto\ndef f():\n    import wandb.sdk\n    from psutil import cpu_count\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert undeclared([tmp_path], {"pyyaml"}, {"psutil"}) == [
        "a.py:1 imports moto (moto)",
        "a.py:3 imports wandb (wandb)",
    ]


@functools.cache
def pins() -> dict[str, list[Requirement]]:
    """The lines of constraints.txt by name."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            found.setdefault(canonicalize_name(Requirement(line).name), []).append(Requirement(line))
    return found


def environment_of(python: str) -> dict[str, str]:
    return {**default_environment(), "python_version": python, "python_full_version": f"{python}.1"}


def pin_of(name: str, python: str) -> str | None:
    """The version that constraints.txt has for `name` under that Python; fails where there are two."""
    environment = environment_of(python)
    lines = pins().get(canonicalize_name(name), [])
    found = [line for line in lines if line.marker is None or line.marker.evaluate(environment)]
    assert len(found) <= 1, f"{name} is pinned twice for Python {python}"
    return next(iter(found[0].specifier)).version if found else None


def test_constraints_are_exact():
    lines = [line for found in pins().values() for line in found]
    assert [str(line) for line in lines if [spec.operator for spec in line.specifier] != ["=="] or line.extras] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_each_declared_dependency_is_pinned_within_its_bounds(python):
    environment = environment_of(python)
    for text in DECLARED:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate(environment):
            continue
        version = pin_of(wanted.name, python)
        assert version is not None, f"{wanted.name} has no pin for Python {python}"
        assert wanted.specifier.contains(version, prereleases=True), f"{wanted} against {version}"


def test_bounds_are_lower_ones():
    """Exact versions belong to constraints.txt. Two have an upper bound: the API we call, and what that API allows."""
    above = {
        Requirement(text).name
        for text in DECLARED
        if any(spec.operator != ">=" for spec in Requirement(text).specifier)
    }
    assert above == {"megatron-core", "transformer-engine"}


def test_everything_that_gets_installed_is_pinned():
    """The closure of what is declared, as far as the pinned versions are the ones installed here.

    What torch brings for a GPU is pinned by torch.
    """
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    of_torch = re.compile(r"(nvidia|cuda|triton|pytorch-triton|rocm)\b.*")
    todo = here([*PROJECT["dependencies"], *EXTRAS["dev"]])
    seen: set[tuple[str, str]] = set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            if installed_version(name) == pin_of(name, python):
                todo += [
                    further
                    for further in here(importlib.metadata.requires(name) or [], extra)
                    if not of_torch.fullmatch(further.name)
                ]
    assert [name for name, _ in sorted(seen) if pin_of(name, python) is None] == []
    assert {"numpy", "sympy", "pluggy"} <= {name for name, _ in seen}


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def here(requirements: list[str], extra: str = "") -> list[Requirement]:
    """Those of the requirements that hold for this Python."""
    found = [Requirement(text) for text in requirements]
    return [wanted for wanted in found if wanted.marker is None or wanted.marker.evaluate({"extra": extra})]


def test_the_supported_pythons_agree():
    spec = importlib.util.spec_from_file_location("make_venv", ROOT / "tools" / "make_venv.py")
    make_venv = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_venv)
    span = SpecifierSet(PROJECT["requires-python"])
    prefix = "Programming Language :: Python :: "
    assert [text.removeprefix(prefix) for text in PROJECT["classifiers"] if prefix in text] == list(PYTHONS)
    versions = [(3, minor) for minor in range(8, 17)]
    assert [f"3.{minor}" for _, minor in versions if span.contains(f"3.{minor}.0")] == list(PYTHONS)
    assert [f"3.{minor}" for _, minor in versions if make_venv.supported((3, minor))] == list(PYTHONS)


def test_the_whole_package_gets_into_a_wheel():
    """setuptools takes folders that have an __init__.py, and of them the Python files; C++ is compiled."""
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    sources = [path for path in files if path.parent == PACKAGE / "data" / "csrc"]
    assert {path.suffix for path in sources} == {".cpp"}
    compiled = [path for path in files if path.match("megatron_rocm/data/_native.*.so")]
    rest = set(files) - {*sources, *compiled}
    assert [str(path) for path in rest if not (path.parent / "__init__.py").exists()] == []
    assert [str(path) for path in rest if path.suffix != ".py"] == []


BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def build(folder: Path, hook: str, **environment: str) -> tuple[set[str], str]:
    """The names in what a hook of the build backend makes of a copy of this checkout, and what it printed."""
    source, out = folder / "source", folder / "out"
    out.mkdir()
    leave_out = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(PACKAGE, source / "megatron_rocm", ignore=leave_out)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, source)
    run = subprocess.run(
        [sys.executable, "-c", BUILD, hook, str(out)],
        cwd=source, env={**os.environ, **environment}, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (made,) = out.iterdir()
    if made.suffix == ".whl":
        return set(zipfile.ZipFile(made).namelist()), run.stdout
    with tarfile.open(made) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}, run.stdout


def modules() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}


def test_a_source_distribution_holds_what_a_build_needs(tmp_path):
    names, _ = build(tmp_path, "build_sdist")
    assert names >= {*modules(), "setup.py", "pyproject.toml", "megatron_rocm/data/csrc/native.cpp"}


def test_a_wheel_holds_the_compiled_module(tmp_path):
    if shutil.which("c++") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("no C++ compiler, or no Python.h")
    names, _ = build(tmp_path, "build_wheel")
    others = {name for name in names if ".dist-info/" not in name} - modules()
    assert others == {f"megatron_rocm/data/_native{sysconfig.get_config_var('EXT_SUFFIX')}"} and names > modules()


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_without_a_compiler_the_package_is_built_and_a_line_says_so(tmp_path, hook):
    names, said = build(tmp_path, hook, CC="/nonexistent/cc", CXX="/nonexistent/c++")
    assert not any(name.endswith(".so") for name in names) and (hook == "build_editable" or names > modules())
    (line,) = [line for line in said.splitlines() if line.startswith("megatron-rocm: ")]
    assert "megatron_rocm.data._native is not compiled" in line and "NumPy" in line


def test_without_pybind11_the_package_is_built(tmp_path):
    (tmp_path / "broken" / "pybind11").mkdir(parents=True)
    (tmp_path / "broken" / "pybind11" / "__init__.py").write_text("raise ImportError('no pybind11')")
    names, said = build(tmp_path, "build_wheel", PYTHONPATH=str(tmp_path / "broken"))
    assert names > modules() and "_native is not compiled (no pybind11)" in said
