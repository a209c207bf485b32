"""Pure algorithms: tensors and numbers in, tensors or frozen dataclasses out.

No files, no clock, no environment, no global random state, no Ray. Letters used in shapes:

    m, n    rows (outputs) and columns (inputs) of a matrix
    r       min(m, n)
    k       rank-one components kept
    c       candidate components of one matrix, all sources together
    b, d    examples, and features of an example
    y       classes
"""
