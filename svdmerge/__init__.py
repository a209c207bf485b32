"""Many fine-tuned models of one base merged by singular components, and tuned by a few.

`load_recipe`, `plan`, `run` and `tune` are the commands of those names; `Store` reads what they
leave. Nothing heavy is imported before one of them is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svdmerge.api import Planned, Ran, Store, plan, run, tune
    from svdmerge.errors import SvdmergeError
    from svdmerge.recipe import Recipe, load_recipe

__version__ = "0.1.0"
__all__ = [
    "Planned", "Ran", "Recipe", "Store", "SvdmergeError", "load_recipe", "plan", "run", "tune",
]  # fmt: skip

_ELSEWHERE = {
    "Recipe": "svdmerge.recipe",
    "SvdmergeError": "svdmerge.errors",
    "load_recipe": "svdmerge.recipe",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "svdmerge.api")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
