"""Live torch state as fragments. The only package that uses names that torch keeps private."""
