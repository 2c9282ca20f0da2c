"""One set of weights run in several ways over a dataset: accuracy against cost."""
