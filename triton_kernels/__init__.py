"""Triton twins of Tilewright's ops, for GPUs that the CUDA extension was not built for, AMD's included.

One module per op, with the signatures of `tilewright.ops`. They hold no vendor's intrinsics. Launchers neither
synchronise nor read values from the device, so a CUDA graph can capture them; memory beyond the results comes from
torch's allocator. Importing a module here imports triton; importing tilewright does not.
"""
