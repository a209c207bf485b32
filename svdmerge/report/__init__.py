"""What a run tells people: the model card and tables."""
