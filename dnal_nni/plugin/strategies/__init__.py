"""Searches over NNI's model spaces."""
