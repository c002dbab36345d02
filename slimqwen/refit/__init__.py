"""Refitting a cut: the matrices that write into the residual stream, solved for in closed form, without gradients."""
