"""Converters: one file for each step from one artifact to the next, found by the registry and loaded when needed."""
