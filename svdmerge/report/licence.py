"""The licence that a merge of models can claim: the most restrictive of theirs, if there is one."""

from collections.abc import Mapping

# From the least demanding on, by the hub's identifiers: each asks for what those before it do.
PERMISSIVE = (
    "cc0-1.0", "unlicense", "0bsd", "mit", "isc", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "apache-2.0", "cc-by-4.0",
)  # fmt: skip
UNKNOWN = "unknown"


def combined(licences: Mapping[str, str | None]) -> tuple[str, str]:
    """The licence of a merge of models with these licences, or `unknown`; and why.

    One that is not permissive binds the whole if no other such stands beside it: what two of them
    ask for together is for a lawyer, not for a table.
    """
    missing = sorted(name for name, licence in licences.items() if not licence)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return UNKNOWN, f"{missing[0]}{more} states no licence"
    stated = {licence for licence in licences.values() if licence}
    binding = sorted(stated - set(PERMISSIVE))
    if len(binding) > 1:
        return UNKNOWN, f"{', '.join(binding)} bind the merge together"
    if binding:
        return binding[0], "the only one of its models' that is not permissive"
    strictest = max(stated, key=PERMISSIVE.index, default=UNKNOWN)
    return strictest, "the most demanding of its models'"
