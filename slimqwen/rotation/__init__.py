"""Cutting the residual stream in coordinates of its own: one rotation of the whole model before channels are dropped.

RMSNorm without a gain commutes with any orthogonal Q, so with every norm's gain folded into what reads it, a model whose
writers and readers are all rotated by Q computes the same function. `basis` chooses Q from calibration, so that the dropped
coordinates carry least; `residual` says what becomes of each tensor; `mtp` what an MTP module, which shares lm_head with
the backbone, needs beside it. SliceGPT (2401.15024) rotates layer by layer and pays with a matrix on every skip
connection; one rotation for the whole model needs none, and the result is an ordinary checkpoint.
"""
