"""The experiments of the papers, at the scale of one GPU."""
