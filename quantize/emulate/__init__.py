"""Emulations: arithmetic and training methods computed in ordinary floats, to see what they do to numbers. Never faster."""
