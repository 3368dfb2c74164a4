"""What megatron-core needs of Transformer Engine: the table against its source, the check against made packages."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rocm.platform.transformer_engine import NEEDS, PACKAGE, USES, VITAL, Need, missing

ROOT = Path(__file__).resolve().parents[2]
CORE = Path(str(importlib.util.find_spec("megatron.core").origin)).parent  # type: ignore[union-attr]

# What megatron-core reads besides symbols: the package, its version and its modules; what it takes from versions below
# 2.3 (`cast_to_fp8`, `attention.apply_rotary_pos_emb`), and the compiled part for Mamba and LLaVA.
ELSEWHERE = re.compile(
    r"(\.__version__|\.common|\.common\.recipe|\.pytorch(\.(distributed|ops|cpp_extensions|cpu_offload|module\.\w+))?|"
    r"\.pytorch\.cpp_extensions\.(cast_to_fp8|rmsnorm_fwd)|\.pytorch\.attention\.apply_rotary_pos_emb)?"
)


def taken(file: Path) -> Iterator[str]:
    """Dotted names of Transformer Engine that a file imports or reads as attributes."""
    tree = ast.parse(file.read_text())
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    names[alias.asname or PACKAGE] = alias.name if alias.asname else PACKAGE

    def dotted(node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return names.get(node.id, "")
        above = dotted(node.value) if isinstance(node, ast.Attribute) else ""
        return f"{above}.{node.attr}" if above and isinstance(node, ast.Attribute) else ""

    yield from names.values()
    yield from filter(None, (dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)))


def test_the_table_has_all_that_megatron_core_takes() -> None:
    known = {need.name for need in NEEDS}
    files = [file for file in CORE.rglob("*.py") if PACKAGE in file.read_text()]
    unknown = set()
    for file in files:
        for name in taken(file):
            whole_or_member = name in known or name.rpartition(".")[0] in known
            if not whole_or_member and not ELSEWHERE.fullmatch(name.removeprefix(PACKAGE)):
                unknown.add(f"{file.relative_to(CORE)}: {name}")
    assert len(files) > 40 and unknown == set()


@pytest.mark.parametrize("need", NEEDS, ids=lambda need: f"{need.use}-{need.name.rpartition('.')[2]}")
def test_each_row_is_in_the_file_that_it_names(need: Need) -> None:
    source = (CORE / need.at).read_text() + (CORE / "packed_seq_params.py").read_text()  # attention gets its fields
    symbol = need.name.removesuffix(".forward").rpartition(".")[2]
    words = [symbol, *need.keywords, *need.members]
    assert need.use in USES and [word for word in words if not re.search(rf"\b{word}\b", source)] == []


def build(folder: Path, version: str = "2.12.0.dev0+40434cf6", lacks: str = "", takes_no: str = "") -> None:
    """A package with every symbol of the table, but without the symbol or module `lacks` and the keyword `takes_no`."""
    modules: dict[tuple[str, ...], list[str]] = {("",): [f"__version__ = {version!r}"]}
    for name in dict.fromkeys(need.name for need in NEEDS):
        *path, symbol = name.split(".")[1:]
        if lacks not in (*path, symbol) and symbol != "forward":
            modules.setdefault(tuple(path), []).append(stub(name, symbol, takes_no))
    for path, lines in modules.items():
        place = folder.joinpath(PACKAGE, *path)
        place.mkdir(parents=True, exist_ok=True)
        (place / "__init__.py").write_text("\n".join(lines) + "\n")


def stub(name: str, symbol: str, takes_no: str) -> str:
    """A class that stands for a symbol: it can be called and has the members as the table's rows of `name` want."""

    def parameters(of: str) -> str:
        rows = [need for need in NEEDS if need.name == of]
        positional = [f"_{number}=None" for number in range(max((row.positional for row in rows), default=0))]
        keywords = dict.fromkeys(
            key for row in rows for key in row.keywords if f"{of}.{key}" != f"{PACKAGE}.{takes_no}"
        )
        return ", ".join([*positional, *(f"{key}=None" for key in keywords)])

    members = [member for need in NEEDS if need.name == name for member in need.members]
    return "\n".join([
        f"class {symbol}:",
        f"    def __init__(self, {parameters(name)}): pass",
        f"    def forward({parameters(f'{name}.forward') or 'self'}): pass",
        *(f"    {member} = None" for member in members),
    ])  # fmt: skip


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path for a package of the test's own; what was imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == PACKAGE}
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("version", ["2.11.0", "2.12.0.dev0+40434cf6", "2.15.0.dev0+rocm7.15.0a20260716.a07e607"])
def test_a_complete_one_lacks_nothing_whatever_its_number(there: Path, version: str) -> None:
    build(there, version)
    assert missing() == []


def test_a_missing_symbol_is_told_with_what_stands_in(there: Path) -> None:
    build(there, lacks="apply_fused_qkv_rotary_pos_emb")
    (line,) = missing()
    assert line.startswith("transformer_engine.pytorch.attention.rope.apply_fused_qkv_rotary_pos_emb is missing")
    assert "transformer/attention.py" in line and "FUSED_SINGLE_QKV_ROPE=0" in line
    assert missing(VITAL) == []


def test_a_missing_module_is_told(there: Path) -> None:
    build(there, lacks="router")
    assert len(missing(VITAL)) == 3 and all(
        "pytorch.router." in line and "is missing" in line for line in missing(VITAL)
    )


def test_what_an_older_version_need_not_have_is_not_asked_for(there: Path) -> None:
    build(there, version="2.6.0.dev0+f141f34b", lacks="router")
    assert missing() == []


def test_a_missing_keyword_is_told(there: Path) -> None:
    build(there, takes_no="pytorch.Linear.tp_size")
    (line,) = missing()
    assert line.startswith("transformer_engine.pytorch.Linear takes no tp_size: ")


def test_too_few_arguments_by_position_are_told(there: Path) -> None:
    build(there)
    (there / PACKAGE / "pytorch/cross_entropy/__init__.py").write_text("def parallel_cross_entropy(a, b, c): pass\n")
    (line,) = missing()
    assert "parallel_cross_entropy takes 3 arguments by position, not 7" in line and "FUSION_IMPL=native" in line


def test_any_keyword_and_a_signature_that_cannot_be_read_will_do(there: Path) -> None:
    build(there)
    (there / PACKAGE / "pytorch/cross_entropy/__init__.py").write_text(
        "class parallel_cross_entropy:\n    __signature__ = 1\n"
    )
    (there / PACKAGE / "pytorch/optimizers/__init__.py").write_text(
        "def FusedAdam(**any): pass\ndef FusedSGD(*any, **more): pass\n"
        "multi_tensor_applier = multi_tensor_l2norm = multi_tensor_scale = print\n"
    )
    assert missing() == []


def test_a_missing_member_is_told(there: Path) -> None:
    build(there)
    recipes = there / PACKAGE / "common/recipe/__init__.py"
    recipes.write_text(recipes.read_text().replace("    HYBRID = None\n", ""))
    assert [line.partition(":")[0] for line in missing()] == ["transformer_engine.common.recipe.Format has no HYBRID"]


def test_a_module_that_cannot_be_imported_is_told_with_its_error(there: Path) -> None:
    build(there)
    broken = there / PACKAGE / "pytorch/router/__init__.py"
    broken.write_text("raise ImportError('libtransformer_engine.so:\\n undefined symbol: hipFoo')\n")
    assert all("can't be imported (libtransformer_engine.so: undefined symbol: hipFoo)" in line for line in missing())
    assert len(missing()) == 3


@pytest.mark.parametrize(
    "error", ["ImportError('undefined symbol')", "OSError('libamdhip64.so.7')", "AssertionError('no')"]
)
def test_an_import_that_fails_is_its_own_error(there: Path, error: str) -> None:
    build(there)
    (there / PACKAGE / "pytorch/__init__.py").write_text(f"raise {error}\n")
    with pytest.raises((ImportError, OSError, AssertionError), match=error.split("'")[1]):
        missing()


def test_none_at_all_is_a_module_that_is_not_found(there: Path) -> None:
    with pytest.raises(ModuleNotFoundError) as raised:
        missing()
    assert raised.value.name == PACKAGE


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, megatron_rocm.platform.transformer_engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sources_are_compared_as_installed_packages_are(tmp_path: Path) -> None:
    """tools/compare_transformer_engine.py over two states of a repository: a complete one, and one that lacks two."""

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path, *words], check=True)

    git("init", "-q")
    for tag, lacks, takes_no in (("whole", "", ""), ("less", "parallel_cross_entropy", "pytorch.Linear.tp_size")):
        shutil.rmtree(tmp_path / PACKAGE, ignore_errors=True)
        build(tmp_path, lacks=lacks, takes_no=takes_no)
        (tmp_path / "build_tools").mkdir(exist_ok=True)
        (tmp_path / "build_tools/VERSION.txt").write_text("2.12.0.dev0\n")
        git("add", "-A")
        git("commit", "-qm", tag)
        git("tag", tag)
    tool = [sys.executable, str(ROOT / "tools/compare_transformer_engine.py"), str(tmp_path), "whole", "less"]
    done = subprocess.run(tool, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert done.stdout.splitlines() == [
        "pytorch.Linear (layers): less: no tp_size=",
        "pytorch.cross_entropy.parallel_cross_entropy (loss): less: missing",
        "1 of 2 lack nothing that our runs can come to: whole",
    ]
