"""The README is true: its tree is the repository's, its commands and recipe work."""

import re
import subprocess
from pathlib import Path

import yaml
from typer.main import get_command

from svdmerge.cli import app
from svdmerge.kind.recipe import parse_kind_recipe
from svdmerge.recipe import Recipe, parse_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def tracked() -> set[str]:
    """Files of the repository, or of the checkout where git is not at hand."""
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_the_tree_names_exactly_what_is_there() -> None:
    block = README.split("## The tree")[1].split("```")[1]
    named = set[str]()
    for line in block.strip().splitlines():
        name = line.split()[0]
        named.add(name.rstrip("/") if not line.startswith(" ") else f"svdmerge/{name.rstrip('/')}")
    files = {f for f in tracked() if not f.startswith(".")}
    top = {f.split("/")[0] for f in files if "/" in f}
    inside = {"/".join(f.split("/")[:2]) for f in files if f.startswith("svdmerge/")}
    expected = top | inside - {"svdmerge/__init__.py", "svdmerge/py.typed"}
    assert named == expected


def test_the_recipe_is_valid_and_shows_every_key() -> None:
    parse_recipe(yaml.safe_load(README.split("```yaml")[1].split("```")[0]))
    assert set(Recipe.model_fields) <= set(re.findall(r"^(\w+):", README, flags=re.MULTILINE))


def test_the_configuration_of_decomposable_models_is_valid() -> None:
    blocks = README.split("## Decomposable models")[1].split("```yaml")
    recipe, drawing = (
        parse_kind_recipe(yaml.safe_load(block.split("```")[0])) for block in blocks[1:3]
    )
    assert drawing.draw is not None
    assert drawing.model != drawing.draw.learngenes_of  # it would replace what it starts from
    assert recipe.train is not None
    assert recipe.transfer is not None
    assert recipe.recombine is not None


def test_every_command_shown_exists() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    shown = set(re.findall(r"^svdmerge ([\w-]+)", "\n".join(blocks), flags=re.MULTILINE))
    assert shown
    assert shown <= set(commands)


def test_both_commands_make_their_own_environment() -> None:
    commands = re.findall(r"^python3 -m venv .*$", README, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        venv = re.match(r"python3 -m venv (\S+)", command)
        assert venv is not None
        assert f"{venv[1]}/bin/pip install -c constraints.txt" in command
