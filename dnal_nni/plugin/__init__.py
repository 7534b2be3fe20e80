"""The package as Microsoft NNI 3.0 sees it."""
