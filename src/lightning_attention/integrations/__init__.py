"""Our models in the software of others."""
