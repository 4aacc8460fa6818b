"""The whole export, stage after stage."""
