"""Measurements, always of several implementations side by side. Needs `lightning-attention[bench]`."""
