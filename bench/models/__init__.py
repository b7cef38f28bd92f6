"""The models that are measured, written as bundles; all but digits and MiniLM have random weights."""
