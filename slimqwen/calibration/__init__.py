"""One forward pass over calibration text that leaves the sums and counts of every importance criterion."""
