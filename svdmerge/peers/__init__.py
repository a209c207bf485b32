"""Trained comparators: each is a space of weights around a frozen model; one trainer serves all."""
