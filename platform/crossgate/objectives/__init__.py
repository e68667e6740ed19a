"""Losses as plain functions of tensors, equal on any number of ranks."""
