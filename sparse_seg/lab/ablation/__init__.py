"""The ablation: a grid of networks and ways to run them, declared in YAML, run cell by cell."""
