"""Steps compiled for TPU slices that are described, not there, and scripts that start real runs.

Programs: `compile_table` compiles the lines of `compile_table.txt`, `efficiency` works out from
them what a slice gives.
"""
