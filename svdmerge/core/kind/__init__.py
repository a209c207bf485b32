"""Decomposable models: weights that are rank-one components, switched by class.

The first components of a layer are learngenes, which every class uses; tailors follow, in groups,
and a class uses those of its own groups. Reference: KIND, arXiv 2408.07337.

Letters used in shapes besides the package's:

    r       components of a layer: learngenes first, tailors next, group by group
    g       groups: learngenes, then each tailor group
    y       classes
    b, t    samples, and tokens of a sample
"""
