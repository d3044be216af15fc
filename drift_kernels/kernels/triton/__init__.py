"""The triton backend: kernels that Triton compiles for the GPU, or runs in its interpreter.

jit, layout         Triton, if it is installed; columns by name
access, codes       access to rows, coefficients and elements; one-byte codes
random              bits for stochastic rounding
update, bias, sums  the kernels
backend             the launches; the module that `backends.load` returns
"""
