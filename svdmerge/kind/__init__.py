"""Decomposable models from end to end: train, take apart, recombine, transfer."""
