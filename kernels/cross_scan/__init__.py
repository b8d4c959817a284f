"""Selective scans of a grid along four orders of its cells."""
