"""The measurements: our server beside its peers, in one run.  `make bench` runs them all; README.md says how."""
