"""Searches over NNI's model spaces."""

# ahead of its one-shot part, which we import: the other way round, NNI puts stand-ins in the place of its strategies
import nni.nas.strategy  # noqa: F401
