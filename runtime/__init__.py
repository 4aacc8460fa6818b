"""Running an artefact: on a device this and models.spec are all that is needed."""
