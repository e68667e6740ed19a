"""Encoders, gates, fusion, heads, and how a trained model is stored. Knows nothing of data or clusters."""
