"""A PTX interpreter: runs GPU kernels on the CPU, as nvcc and Triton emitted them, with checks. See machine.py."""

from .library import PtxError
from .machine import Finding, Instruction, Kernel, Module, PtxFault, Report, Traffic, empty, on_device, undefined_bytes

__all__ = [
    "Finding",
    "Instruction",
    "Kernel",
    "Module",
    "PtxError",
    "PtxFault",
    "Report",
    "Traffic",
    "empty",
    "on_device",
    "undefined_bytes",
]
