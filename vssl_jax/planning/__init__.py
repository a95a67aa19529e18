"""`--plan`, benchmarks and compilation ahead of time."""
