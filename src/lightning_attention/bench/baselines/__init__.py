"""Other algorithms for the same operator, written here to compare with."""
