"""From a checkpoint to a deployable artefact."""
