"""The engine: plan, decompose, select, assemble on Ray Core tasks or in this process."""
