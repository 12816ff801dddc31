"""What holoslide costs and gains, measured: `python -m benchmarks.<name>`; results are kept in results/."""

import holoslide  # noqa: F401 - before PyTorch, which reads at its start what holoslide sets
