"""Every diffusers pipeline that uses guidance, in a tiny size: one device against two processes.

`pipelines.csv` lists them, `families/` has what is special about each, `build.py` makes the rest from the classes' own
signatures, `compare.py` runs one, and `python tests/sweep` runs them all and writes docs/supported_pipelines.*.
`graphs.py`, on a GPU (`python tests/sweep --graphs`): one device against the same with CUDA graphs.
"""
