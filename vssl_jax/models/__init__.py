"""Network parts: pure functions of parameters, tokens and indices."""
