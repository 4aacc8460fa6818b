"""Any exporter's graph in the one form that the rest works on."""
