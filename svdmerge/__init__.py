"""Merge many fine-tuned models of one base by their singular components; adapt by training a few."""

__version__ = "0.1.0"
