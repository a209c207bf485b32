import importlib
import inspect
import pickle
import pkgutil

import pytest

import svdmerge
from svdmerge.errors import RecipeError, SvdmergeError


def every_error() -> list[type[SvdmergeError]]:
    """All classes of the tree, those of modules that define their own included."""
    for module in pkgutil.walk_packages(svdmerge.__path__, "svdmerge."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, queue = [], [SvdmergeError]
    while queue:
        kind = queue.pop()
        found.append(kind)
        queue.extend(kind.__subclasses__())
    return sorted(set(found), key=lambda kind: kind.__qualname__)


def test_every_error_survives_pickling_with_its_type_arguments_and_text() -> None:
    kinds = every_error()
    assert len(kinds) > 5
    for kind in kinds:
        names = list(inspect.signature(kind).parameters)
        error = kind(*(f"{name} of it" for name in names))
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is kind
        assert back.args == error.args
        assert str(back) == str(error)
        assert vars(back) == vars(error)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("what",), "what"),
        (("what", "why"), "what\nwhy"),
        (("what", "", "fix"), "what\nfix"),
        (("what", "why", "fix"), "what\nwhy\nfix"),
    ],
)
def test_an_error_tells_what_why_and_the_fix_a_line_each(parts: tuple[str, ...], text: str) -> None:
    assert str(RecipeError(*parts)) == text
