"""The papers' tables, reproduced: `python -m benchmarks.papers`."""
