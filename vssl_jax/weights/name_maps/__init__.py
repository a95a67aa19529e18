"""Tables from published parameter names to ours."""
