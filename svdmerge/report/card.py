"""The model card of a merge, in the Hub's conventions."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import yaml

from svdmerge.report.licence import UNKNOWN, combined

# Where parts of a card begin. No name can look so, for names have no line of their own.
_FIGURES, _RECIPE = "\n## Figures\n\n", "\n## Recipe\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class CardSource:
    """A source, as a card's table has it."""

    name: str
    revision: str
    weight: float
    kept: int
    """Components."""
    licence: str | None


def model_card(
    *, title: str, base: str, base_licence: str | None, sources: Sequence[CardSource],
    recipe_yaml: str, summary: str,
) -> str:  # fmt: skip
    """A README.md: front matter, what was merged, how much was kept of each source, the recipe."""
    licence, why = combined({base: base_licence} | {s.name: s.licence for s in sources})
    front = yaml.safe_dump(
        {
            "base_model": [base, *(s.name for s in sources)],
            "base_model_relation": "merge",
            "library_name": "transformers",
            "tags": ["merge", "svdmerge"],
        }
        | _licence_fields(licence),
        sort_keys=False,
        allow_unicode=True,
    )
    rows = "\n".join(
        f"| {escape(s.name)} | {s.revision[:12]} | {escape(s.licence or UNKNOWN)} "
        f"| {s.weight:g} | {s.kept} |"
        for s in sources
    )
    return f"""---
{front}---
# {escape(title)}

{summary}

| source | revision | licence | weight | components kept |
|---|---|---|---|---|
{rows}

Base: {escape(base)} ({escape(base_licence or UNKNOWN)}). Licence: {escape(licence)}, {escape(why)}.
Each kept component's source is in `provenance/components.parquet`.
{_RECIPE}
```yaml
{recipe_yaml.replace("```", "'''")}```
"""


def illustrated(card: str, *, pictures: Mapping[str, tuple[str, str]]) -> str:
    """The card with pictures (title and text, by path) before its recipe; those it had go."""
    head, line, recipe = card.partition(_RECIPE)
    head = head.partition(_FIGURES)[0]
    shown = "\n\n".join(
        f"![{escape(title)}]({path})\n\n{escape(told)}" for path, (title, told) in pictures.items()
    )
    return f"{head}{_FIGURES}{shown}\n{line}{recipe}" if pictures else f"{head}{line}{recipe}"


def _licence_fields(licence: str) -> dict[str, str]:
    # The hub knows no `unknown`: what cannot be established is named so beside its `other`.
    return {"license": licence} if licence != UNKNOWN else {
        "license": "other", "license_name": UNKNOWN
    }  # fmt: skip


def licence_in(card: str) -> str | None:
    """The licence that a model card's front matter states; None if it states none."""
    match = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    try:
        front: Any = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    stated = cast(Mapping[str, Any], front).get("license") if isinstance(front, dict) else None
    return stated.lower() if isinstance(stated, str) and stated else None


def escape(text: str) -> str:
    """Text that stands in Markdown as it is: what sources wrote is never markup."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~])", r"\\\1", text.replace("\n", " "))
