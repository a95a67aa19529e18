"""Network modules: pure functions of parameters, tokens and indices."""
