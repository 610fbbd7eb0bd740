"""The mathematics: one operator, several ways to run it."""
