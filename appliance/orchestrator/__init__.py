"""The side towards the central orchestrator: what we register there, and how it is brought about."""
