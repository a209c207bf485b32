"""Tuning of singular values on Ray Train or in this process."""
