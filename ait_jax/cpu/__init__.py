"""Workarounds for what XLA does slowly on CPU, or takes too much memory for.

Each module names one slowness. Nothing here changes what is computed, but for the order of float
sums; on other platforms the operations are the plain ones. Importing this package, `huge_pages`,
`convolutions` or `freed_memory` imports nothing heavy.
"""
