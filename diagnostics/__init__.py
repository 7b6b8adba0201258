"""Are the numbers any good: residuals and tails, calibration, convergence."""
