"""nnkit and its peers at the same work, side by side in one process. Nothing here runs under pytest's timer."""
