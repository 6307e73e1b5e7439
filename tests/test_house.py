"""The rules of the house (CONTRIBUTING.md), counted and read from the source itself."""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from lalia.config import load_run_config
from lalia.system import SYSTEMS, System, system_class

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "lalia"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OURS = [path for folder in ("src", "tests", "benchmarks", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
FILE_LINES, FUNCTION_LINES, MEDIAN_LINES, TRAINER_LINES = 400, 60, 12, 250
#: packages of the extras; every module must import without them
EXTRAS = (
    "pocketsphinx", "espeakng_loader", "modelscope", "monotonic_alignment_search", "psutil", "hypothesis", "pytest",
    "opensmile", "mambapy", "mamba_ssm", "fastapi", "starlette", "uvicorn", "gradio", "openai", "websockets", "peft", "accelerate",
    "wandb", "gguf",
)  # fmt: skip


def name_of(path: Path) -> str:
    """``src/lalia/nn/align.py`` → ``lalia.nn.align``."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def imports(tree: ast.Module, module: str, package: bool = False) -> set[str]:
    """Every module that ``tree`` imports anywhere, inside functions and for type checkers too.

    ``from a import b`` counts as both ``a`` and ``a.b``, because ``b`` may be a module.
    """
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + package]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


@cache
def imports_of(path: Path) -> frozenset[str]:
    return frozenset(imports(tree_of(path), name_of(path), path.name == "__init__.py"))


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def slice_of(name: str) -> str:
    """``vits2`` for anything under ``lalia.systems.vits2``, else ''."""
    parts = name.split(".")
    return parts[2] if parts[:2] == ["lalia", "systems"] and len(parts) > 2 else ""


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- budgets --------------------------------------------------------------------------------------------------------
def test_files_and_functions_are_short() -> None:
    long_files = {shown(p): n for p in OURS if (n := len(p.read_text(encoding="utf-8").splitlines())) > FILE_LINES}
    assert not long_files, f"files above {FILE_LINES} lines: {long_files}"
    long_functions = [f"{shown(p)}:{f.name} has {length(f)}" for p in OURS for f in functions(p) if length(f) > FUNCTION_LINES]
    assert not long_functions, f"functions above {FUNCTION_LINES} lines: {long_functions}"
    median = statistics.median(length(f) for p in SOURCES for f in functions(p))
    assert median <= MEDIAN_LINES, f"the median function has {median} lines"
    assert len((PACKAGE / "train.py").read_text(encoding="utf-8").splitlines()) <= TRAINER_LINES


# --- the import graph -----------------------------------------------------------------------------------------------
def test_the_reader_of_imports_sees_every_form() -> None:
    tree = ast.parse(
        "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\ndef h():\n    import i\n"
        "if TYPE_CHECKING:\n    from lalia.systems.x import Y\n"
    )
    found = imports(tree, "lalia.nn.align")
    assert {"a.b", "c", "c.d", "lalia.nn", "lalia.nn.e", "lalia.f", "lalia.f.g", "i", "lalia.systems.x"} <= found
    assert "lalia.nn.e" in imports(ast.parse("from . import e"), "lalia.nn", package=True)


def test_a_slice_imports_no_other_slice_and_the_floor_imports_none() -> None:
    wrong = []
    for path in SOURCES:
        own = slice_of(name_of(path))
        wrong += [f"{shown(path)} imports {n}" for n in imports_of(path) if slice_of(n) and slice_of(n) != own]
    assert not wrong, "systems are reached by name, through lalia.system: " + "; ".join(wrong)


def test_nn_imports_nothing_of_lalia_but_nn() -> None:
    wrong = [
        f"{shown(path)} imports {name}"
        for path in SOURCES
        if inside(name_of(path), "lalia.nn")
        for name in imports_of(path)
        if inside(name, "lalia") and not inside(name, "lalia.nn") and name != "lalia"
    ]
    assert not wrong


def test_nothing_imports_the_command_line_or_the_server() -> None:
    upper = ("lalia.cli", "lalia.commands", "lalia.serve")
    wrong = [
        f"{shown(path)} imports {name}"
        for path in SOURCES
        if not inside(name_of(path), *upper, "lalia.__main__")
        for name in imports_of(path)
        if inside(name, *upper)
    ]
    assert not wrong


def test_torchaudio_is_nowhere() -> None:
    assert not [shown(path) for path in OURS if any(inside(name, "torchaudio", "librosa") for name in imports(tree_of(path), "x"))]
    assert "torchaudio" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


IMPORT_ALL = """
import importlib, pkgutil, socket, sys

def refuse(*_, **__):
    raise OSError("an import touched the network")

socket.socket.connect = socket.socket.connect_ex = socket.socket.bind = refuse
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = sys.argv[1].split(",")
sys.meta_path.insert(0, Absent())
import lalia
names = [m.name for m in pkgutil.walk_packages(lalia.__path__, "lalia.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_every_module_imports_without_network_and_without_extras() -> None:
    command = [sys.executable, "-c", IMPORT_ALL, ",".join(EXTRAS)]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.strip().splitlines()[-1]) == len([p for p in SOURCES if p.name != "__main__.py"]) - 1


# --- what code may not do -------------------------------------------------------------------------------------------
def dotted(node: ast.expr) -> str:
    """``torch.load`` for the callee of ``torch.load(…)``; '' for anything but names and attributes."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe_calls(tree: ast.Module) -> Iterator[str]:
    """Calls that would run code out of a file, or that do not say they will not."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "eval", "exec"):
            yield f"line {node.lineno}: {name}"
        if name in ("torch.load", "torch.hub.load") and keywords.get("weights_only") is not True:
            yield f"line {node.lineno}: {name} without weights_only=True"
        if keywords.get("weights_only") is False or keywords.get("allow_pickle") is True or keywords.get("shell") is True:
            yield f"line {node.lineno}: {name} with an unsafe option"


def swallowing(tree: ast.Module) -> Iterator[int]:
    """Lines of handlers that catch everything and do not raise."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(kind is None or dotted(kind) in ("Exception", "BaseException") for kind in kinds)
            if broad and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
                yield node.lineno


def test_no_code_is_run_out_of_files() -> None:
    assert list(unsafe_calls(ast.parse("torch.load(p)\npickle.load(f)\ntorch.load(p, weights_only=False)\nm.eval()"))) == [
        "line 1: torch.load without weights_only=True",
        "line 2: pickle.load",
        "line 3: torch.load without weights_only=True",
        "line 3: torch.load with an unsafe option",
    ]
    assert not [f"{shown(path)} {found}" for path in OURS for found in unsafe_calls(tree_of(path))]


def test_no_error_is_swallowed() -> None:
    bad = "try:\n    f()\nexcept Exception:\n    pass\ntry:\n    f()\nexcept (ValueError, BaseException):\n    raise\n"
    assert list(swallowing(ast.parse(bad))) == [3]
    assert not [f"{shown(path)}:{line}" for path in SOURCES for line in swallowing(tree_of(path))]


#: what must not stand in the code: where somebody's files lie, unfinished business, commented-out prints
FORBIDDEN = {
    "the path of one machine": re.compile(r"(?<![\w.}])/(?:home|root|mnt|work|Users|tmp)/\w"),
    "an open end": re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b"),
    "a package index": re.compile(r"(?:pypi\.org|pythonhosted\.org|tuna\.tsinghua|mirrors\.aliyun)"),
    "commented-out code": re.compile(r"^\s*#\s*(?:print\(|import \w+$|from \w+ import|return \w+$)"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_that_belongs_elsewhere_stands_in_the_code(what: str) -> None:
    texts = [path for path in [*OURS, *ROOT.glob("configs/**/*.yaml")] if path != Path(__file__).resolve()]
    hits = [
        f"{shown(path)}:{number}"
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FORBIDDEN[what].search(line)
    ]
    assert not hits, f"{what} in {', '.join(hits)}"


# --- what must be there ---------------------------------------------------------------------------------------------
def calls(nodes: list[ast.expr]) -> list[ast.Call]:
    return [node for node in nodes if isinstance(node, ast.Call)]


def undocumented(path: Path) -> Iterator[str]:
    """A module, public class or public function of more than a few lines without a docstring."""
    tree = tree_of(path)
    if not ast.get_docstring(tree):
        yield f"{shown(path)}: the module"
    for node in tree.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_") or ast.get_docstring(node):
            continue
        if isinstance(node, ast.FunctionDef) and any(dotted(d.func).endswith(".callback") for d in calls(node.decorator_list)):
            continue  # the program's options; its help text is given where the program is made
        fields_only = isinstance(node, ast.ClassDef) and not any(isinstance(item, ast.FunctionDef) for item in node.body)
        if not fields_only and length(node) > 5:
            yield f"{shown(path)}: {node.name}"


def test_public_things_are_documented() -> None:
    public = [path for path in SOURCES if not path.name.startswith("_") or path.name == "__init__.py"]
    missing = [item for path in public for item in undocumented(path)]
    assert not missing, "; ".join(missing)


def test_licence_is_there() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and len(text) > 10_000
    assert "Apache-2.0" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def test_every_configuration_loads(path: Path) -> None:
    name = load_run_config(path).system
    folder, stage = home_of(name)
    assert folder == path.parent.name
    assert not stage or path.stem in (stage, f"{stage}-tiny")


def home_of(name: str) -> tuple[str, str]:
    """Folder and stage of a system: ("vits2", "") of ``vits2``, ("omni", "base") of ``omni-base``.

    The folder is that of its module in the table. Systems of several stages are named after folder and stage.
    """
    folder = slice_of(SYSTEMS[name].partition(":")[0])
    assert name == folder or name.startswith(f"{folder}-")
    return folder, name[len(folder) + 1 :]


def test_every_system_of_the_table_is_one_folder_with_a_readme_and_configurations() -> None:
    homes = {home_of(name) for name in SYSTEMS}
    assert len(homes) == len(SYSTEMS)
    for name in SYSTEMS:
        assert issubclass(system_class(name), System)
    for folder, stage in homes:
        assert (PACKAGE / "systems" / folder / "README.md").is_file()
        configs = ROOT / "configs" / folder
        assert any((configs / f"{file}.yaml").is_file() for file in ([f"{stage}-tiny", stage] if stage else ["tiny"]))
        assert not stage or (PACKAGE / "systems" / folder / f"{stage}.py").is_file()
    assert {path.parent.name for path in (PACKAGE / "systems").glob("*/__init__.py")} == {folder for folder, _ in homes}


def test_no_system_is_named_twice() -> None:
    """A dictionary would keep the last of two without a word, so the source is read."""
    tree = tree_of(PACKAGE / "system.py")
    table = next(n.value for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "SYSTEMS")
    assert isinstance(table, ast.Dict)
    names = [key.value for key in table.keys if isinstance(key, ast.Constant)]
    assert len(names) == len(set(names)) == len(table.keys) == len(SYSTEMS)


# --- the table of requirements --------------------------------------------------------------------------------------
STATUSES = {"done", "open", "partly", "later"}
WANTED = [
    *(f"X-{number:02d}" for number in range(1, 17)),
    *(f"V-{number:02d}" for number in range(1, 58)),
    *(f"A{number}" for number in range(1, 22)),
    *(f"R{number}" for number in range(1, 31)),
    *(f"E-{number:02d}" for number in range(1, 25)),
    *(f"E-T{number:02d}" for number in range(1, 20)),
    *(f"O-{number:02d}" for number in range(1, 23)),
    *(f"O-T{number:02d}" for number in range(1, 18)),
]


def requirements() -> list[list[str]]:
    """Rows of docs/REQUIREMENTS.md as [id, what, where, tests, status]."""
    lines = (ROOT / "docs" / "REQUIREMENTS.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [row for row in rows if row[0] not in ("id", "trap")]


def named_tests(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def all_tests() -> set[str]:
    """``nn/test_align.py::test_tie`` of every test function there is."""
    tests = ROOT / "tests"
    paths = sorted(tests.rglob("test_*.py"))
    return {f"{p.relative_to(tests).as_posix()}::{f.name}" for p in paths for f in functions(p) if f.name.startswith("test_")}


def test_every_requirement_is_in_the_table_once() -> None:
    names = [row[0] for row in requirements()]
    assert sorted(names) == sorted(WANTED)
    assert all(len(row) == 5 and row[4] in STATUSES for row in requirements())


def test_every_test_named_in_the_table_exists_and_nothing_is_done_without_one() -> None:
    there = all_tests()
    wrong = [f"{row[0]}: no test {name}" for row in requirements() for name in named_tests(row[3]) if name not in there]
    wrong += [f"{row[0]}: done without a test" for row in requirements() if row[4] == "done" and not named_tests(row[3])]
    assert not wrong, "; ".join(wrong)


def test_every_place_named_in_the_table_exists() -> None:
    """Places are relative to the package or the repository; a bare name may belong to the folder of the place before it."""
    missing = []
    for row in requirements():
        folders = [PACKAGE, ROOT]
        for place in re.findall(r"`([\w/.]+\.\w+|[\w/]+/)`", row[2]) if row[4] in ("done", "open") else []:
            if not any((folder / place).exists() for folder in folders):
                missing.append(f"{row[0]}: {place}")
            folders.append((PACKAGE / place).parent)
    assert not missing
