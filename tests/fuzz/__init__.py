"""Random damage to the files that the project reads: each must end in success or in one of the project's own errors."""
