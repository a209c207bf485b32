"""Targets on which methods are compared: same examples, same head, same test rows."""
