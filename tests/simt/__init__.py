"""CUDA kernels, compiled by g++ and run on the CPU. What this emulation checks is in emulator/simt.h.

A package of its own, so that its files may have the names that they have in the folder above.
"""
