"""What opens an artefact: one module for each library, and `open`, the door to them."""
