"""What holoslide costs and gains, measured: `python -m benchmarks.<name>`; results are kept in results/."""
