"""Guidance kernels in Triton, one file a family. Installed as `cfg_parallel.triton_kernels`; needs Triton."""
