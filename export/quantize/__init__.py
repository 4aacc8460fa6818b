"""From float graph and ranges to INT8, by a plan."""
