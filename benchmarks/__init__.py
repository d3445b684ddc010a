"""Accuracy, training and cost of the package, measured: `python -m benchmarks --help`."""
