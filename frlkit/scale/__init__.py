"""Many runs: grids of them, and the machines that carry them out."""
