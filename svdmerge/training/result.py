"""What tuning found: accuracies side by side, and said plainly where it did not pay."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model on the target: same drawn training examples, same test examples as every row."""

    name: str
    accuracy: float
    """On the test examples; of a language model, the share of their tokens that are the likeliest.
    """
    trained: int
    """Values trained, without the head."""
    trained_with_head: int
    seconds: float
    """Features, head and training; of a cached part, what it took when it was computed."""
    loo_error: float | None
    """Mean leave-one-out loss of the head in closed form on the training examples, in nats.

    Of a tuned model it is too good: its features were trained on the very examples left out. Of a
    language model that was not tuned, nats per token: nothing was fitted to the training examples.
    """
    nll: float | None = None
    """Of a language model: mean over test texts of nats per predicted token. The least is best."""
    perplexity: float | None = None
    """exp(nll)."""

    @property
    def merit(self) -> float:
        """What rows are compared by; the more the better."""
        return self.accuracy if self.nll is None else -self.nll


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceScore:
    """A source by its leave-one-out error on the training examples; the test takes no part.

    Of a language target that is its nats per token on them.
    """

    name: str
    loo_error: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPoint:
    """Mean training loss and accuracy over an epoch, as its steps saw them."""

    loss: float
    accuracy: float
    held_out_loss: float | None = None
    """After the epoch, on the examples held out; None without `validation_share`."""
    held_out_accuracy: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneResult:
    """Tuning's outcome. `rows` holds base, best source, merged, and merged + tuned, in order."""

    rows: tuple[Row, ...]
    sources: tuple[SourceScore, ...]
    """All sources, best first."""
    best_source: str
    curve: tuple[EpochPoint, ...]
    notes: tuple[str, ...]
    verdict: str
    resumed: bool
    out: str
    num_train: int
    num_test: int
    num_classes: int
    """0 of a language target."""
    classes: tuple[str, ...] = ()
    """Names by label, where the examples' folders give them."""
    seconds: float = 0.0
    """The training itself, over all attempts."""
    best_epoch: int | None = None
    """Whose values were kept, by the held-out loss; 0 for none trained, None without a share."""
    num_held_out: int = 0
    held_out_gain: float | None = None
    """By how much the best epoch's loss on them was below the untrained one's, in nats, whether or
    not it was kept."""
    held_out_error: float | None = None
    """Standard error of that paired difference; half of it is what training must gain to be kept.
    None of a single example."""

    def row(self, name: str) -> Row:
        """The row of this name. Raises: KeyError."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_json(self) -> str:
        """The result as JSON."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> "TuneResult":
        """The result that `to_json` wrote."""
        raw: dict[str, Any] = json.loads(text)
        raw["rows"] = tuple(Row(**r) for r in raw["rows"])
        raw["sources"] = tuple(SourceScore(**s) for s in raw["sources"])
        raw["curve"] = tuple(EpochPoint(**p) for p in raw["curve"])
        raw["notes"] = tuple(raw["notes"])
        raw["classes"] = tuple(raw["classes"])
        return TuneResult(**raw)


def verdict(
    *, tuned: Row, merged: Row, others: tuple[Row, ...], num_test: int, error: float | None = None
) -> str:
    """Whether tuning beats the merge as it is, and every other row, in plain sentences.

    `error` is the standard error of the difference, by default that of two accuracies on so many
    examples: what smaller differences are not told apart by.
    """
    if error is None:
        # As if the two were independent, and no less than one example: both too wide, neither zero.
        spread = sum(r.accuracy * (1 - r.accuracy) for r in (tuned, merged))
        error = max(math.sqrt(max(spread, 0.0) / num_test), 1 / num_test)
    gain = tuned.merit - merged.merit
    figures = f"{_figure(tuned)} after, {_figure(merged)} before"
    if abs(gain) <= error:
        told = f"Tuning made no clear difference to the merged model: {figures}"
    elif gain < 0:
        told = f"Tuning is WORSE than not tuning: {figures}"
    else:
        told = f"Tuning helped the merged model: {figures}"
    told += f" (standard error {error:.3f} on {num_test} test examples)."
    best = max(others, key=lambda r: r.merit)
    if best.merit > tuned.merit:
        return f"{told} {best.name} does better untuned, {_figure(best)}: use it instead."
    return told


def _figure(row: Row) -> str:
    return f"{row.accuracy:.3f}" if row.nll is None else f"{row.nll:.3f} nats per token"
