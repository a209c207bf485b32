"""One tree of errors: what was got, what was expected, what to do. All survive pickling."""


class SvdmergeError(Exception):
    """An error told in up to three lines: the subject and what was got; why; what to do.

    All state is in `args`, so instances pass through pickle (and so through Ray) unchanged.
    """

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, why, fix)

    def __str__(self) -> str:
        return "\n".join(line for line in self.args if line)


class RecipeError(SvdmergeError):
    """The recipe, or a command's arguments, are wrong; nothing was started."""


class CheckpointError(SvdmergeError):
    """A checkpoint's files or headers are missing, malformed or unsafe."""


class MismatchError(SvdmergeError):
    """A source does not fit the base: names, shapes or dtypes differ."""


class ContentError(SvdmergeError):
    """A tensor's content is unusable: NaN, Inf, or an integer buffer unlike the base's."""


class SolverError(SvdmergeError):
    """No solver decomposed a matrix."""


class StoreError(SvdmergeError):
    """The component store cannot be read or written, or contradicts itself."""


class OutputError(SvdmergeError):
    """The output folder is foreign, or does not hold what its manifest claims."""


class ResourceError(SvdmergeError):
    """A unit of work needs more than the machines or the recipe allow."""


class TrainingError(SvdmergeError):
    """Tuning cannot start or failed."""


class RetryableError(SvdmergeError):
    """A fault that a second try may cure: a store's hiccup, a lost connection."""
