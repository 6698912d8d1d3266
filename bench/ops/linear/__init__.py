"""The benchmarks of linear layers: `layers` has what int8 and sparse layers share."""
