"""Reads and writes encoders: load, initial weights, imports, exports, model cards."""
