"""What stays and what merges: from calibration sums and a target shape to a plan that touches no weight."""
