"""Building blocks of the networks. Nothing here imports any other part of lalia.

Sequences are channels-first ``[B, D, T]``, masks are float ``[B, 1, T]`` (1 = valid), a speaker is a vector ``[B,
G, 1]``.
"""
