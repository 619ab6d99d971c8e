"""How long a meta-step takes, in jmeta and in other libraries: `python -m benchmarks.speed`.

All systems of a case get the same arrays, the same initial weights and the same number of threads, run in turn, and
must give the same loss before and after the first outer update. `cases` says what is timed, `jax_systems` and
`torch_systems` hold the contestants, `measure` times them, `report` writes the tables and the picture.
"""
