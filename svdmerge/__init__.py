"""Many fine-tuned models of one base merged by singular components, and tuned by a few."""

__version__ = "0.1.0"
