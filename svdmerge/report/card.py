"""The model card of a merge, in the Hub's conventions."""

import re
from collections.abc import Sequence

import yaml


def model_card(
    *, title: str, base: str, sources: Sequence[tuple[str, float, int]], recipe_yaml: str,
    summary: str,
) -> str:  # fmt: skip
    """A README.md: front matter, what was merged, how much was kept of each source, the recipe.

    `sources`: reference, weight, components kept.
    """
    front = yaml.safe_dump(
        {
            "base_model": [base, *(name for name, _, _ in sources)],
            "base_model_relation": "merge",
            "library_name": "transformers",
            "tags": ["merge", "svdmerge"],
        },
        sort_keys=False,
        allow_unicode=True,
    )
    rows = "\n".join(f"| {escape(name)} | {w:g} | {kept} |" for name, w, kept in sources)
    return f"""---
{front}---
# {escape(title)}

{summary}

| source | weight | components kept |
|---|---|---|
{rows}

Base: {escape(base)}. Each kept component's source is in `provenance/components.parquet`.

## Recipe

```yaml
{recipe_yaml.replace("```", "'''")}```
"""


def escape(text: str) -> str:
    """Text that stands in Markdown as it is: what sources wrote is never markup."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~])", r"\\\1", text.replace("\n", " "))
