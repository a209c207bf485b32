"""What each method does with matrices. Imports no torch, for `plan` needs none."""

from svdmerge.core.params import Action

# Vectors are averaged by all of them.
MATRIX_ACTION = {"axis": Action.DECOMPOSE, "average": Action.AVERAGE}
