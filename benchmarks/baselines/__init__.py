"""Other algorithms, written here to compare with."""
