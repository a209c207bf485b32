"""Whether class-gated models divert class knowledge, and what it is worth: an image benchmark."""
