"""Merge methods, one file each: what they do with matrices, and the formula."""

from svdmerge.core.params import Action

# What each method does with a matrix. Vectors are averaged by all of them.
MATRIX_ACTION = {"axis": Action.DECOMPOSE, "average": Action.AVERAGE}
