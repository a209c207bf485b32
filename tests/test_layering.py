"""Who may import whom, read from the source; nothing is imported but in programs of their own."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "svdmerge"

TOP_LEVEL = {"pyproject.toml", "pipelines", "svdmerge", "cluster", "tests", "README.md"}
BESIDE = {"LICENSE", "constraints.txt"}

LEAVES = {"errors", "progress"}
# Parts of svdmerge that each part may import besides itself and the leaves.
MAY_IMPORT = {
    "errors": set[str](),
    "progress": set[str](),
    "recipe": {"core.params", "core.methods.registry"},
    "core": set[str](),
    "storage": {"core"},
    "engine": {"core", "storage", "recipe"},
    "training": {"core", "storage", "recipe"},
    "peers": {"core"},
    "report": {"core", "storage", "recipe"},
}
FORBIDDEN = {
    "core": {"ray", "pyarrow", "fsspec", "safetensors", "huggingface_hub", "transformers", "yaml"},
    "storage": {"ray"},
    "report": {"ray"},
    "peers": {"ray", "pyarrow", "fsspec", "safetensors", "huggingface_hub", "transformers", "yaml"},
}
# What a user waits for before anything is computed must not wait for torch or Ray.
LIGHT_MODULES = ("svdmerge.recipe", "svdmerge.storage.checkpoint", "svdmerge.core.params")
LIGHT_WHEN_THERE = ("svdmerge.engine.plan", "svdmerge.cli")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(folder: Path) -> dict[str, ast.Module]:
    return {
        module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path))
        for path in sorted(folder.rglob("*.py"))
    }


MODULES = sources(PACKAGE)
PIPELINES = sources(ROOT / "pipelines")


def imported(module: str, nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Absolute names of what the import statements among the nodes name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not in functions, not for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from at_import_time(node)


def part_of(module: str) -> str:
    """`svdmerge.core.svd` -> `core`."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", sorted(m for m in MODULES if part_of(m) in MAY_IMPORT))
def test_a_module_imports_only_what_its_layer_may(module: str) -> None:
    part = part_of(module)
    allowed = MAY_IMPORT[part] | {part} | (LEAVES if part not in LEAVES else set())
    for target in imported(module, ast.walk(MODULES[module])):
        if target == "svdmerge" or not target.startswith("svdmerge."):
            assert target.split(".")[0] not in FORBIDDEN.get(part, set()), f"{module}: {target}"
            continue
        inside = target.removeprefix("svdmerge.")
        assert any(inside == a or inside.startswith(f"{a}.") for a in allowed), (
            f"{module} imports {target}; {part} may import {sorted(allowed)}"
        )


def test_nothing_imports_the_command_line() -> None:
    for module, tree in MODULES.items():
        if module.split(".")[-1] != "__main__":
            assert "svdmerge.cli" not in set(imported(module, ast.walk(tree))), module


def test_the_library_never_prints_outside_the_command_line() -> None:
    for module, tree in MODULES.items():
        calls = [
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
        ]
        assert part_of(module) == "cli" or not calls, f"{module}: print in lines {calls}"


def test_pipelines_only_combine_the_library() -> None:
    for module, tree in PIPELINES.items():
        heads = {target.split(".")[0] for target in imported(module, ast.walk(tree))}
        assert not heads & {"torch", "numpy", "safetensors"}, module


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {t for t in imported(module, at_import_time(tree)) if t in MODULES and t != module}
        for module, tree in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_repository_has_its_six_top_level_names() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    top = {path.split("/")[0] for path in listed}
    others = {name for name in top - TOP_LEVEL - BESIDE if not name.startswith(".")}
    assert not others


def light_programs() -> list[str]:
    modules = [*LIGHT_MODULES, *(m for m in LIGHT_WHEN_THERE if m in MODULES)]
    programs = [f"import {module}" for module in modules]
    if "svdmerge.cli" in MODULES:
        programs.append("import svdmerge.cli; sys.argv = ['svdmerge', '--help']; run()")
    return programs


@pytest.mark.parametrize("program", light_programs())
def test_neither_torch_nor_ray_is_imported_before_it_is_needed(program: str) -> None:
    text = f"""
import sys
def run():
    try:
        svdmerge.cli.main()
    except SystemExit as end:
        assert not end.code, end.code
{program}
heavy = sorted({{"torch", "ray", "transformers", "jaxtyping"}} & set(sys.modules))
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
