"""The stages of a build, each from the files of earlier ones to files of its own; pipeline.py knows their order."""
