"""The triton backend: kernels that Triton compiles for the GPU, or runs in its interpreter.

jit, layout       Triton, where it is installed; columns by their names
access, codes     how kernels reach rows, coefficients and elements; elements of one byte
random            bits for rounding
update            one kernel; likewise bias, and sums with two
backend           the launches: what `backends.load` takes for the backend
"""
