"""Other servers on the same models, the same CPUs and the same load as ours."""
