"""The models that are measured, written as bundles by `python -m bench models`; all but digits and MiniLM of random weights."""
