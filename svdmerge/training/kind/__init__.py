"""Training of decomposable models on Ray Train: one loop, and what it learns behind a protocol."""
