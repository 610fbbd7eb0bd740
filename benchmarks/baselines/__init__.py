"""Other algorithms, implemented here to compare with."""
