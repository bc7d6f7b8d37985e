"""For frameworks that rebuild their user's loader: ways to keep ours whole. Each module needs its framework."""
