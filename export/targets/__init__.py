"""What runs INT8: for each target its rules and its receipt."""
