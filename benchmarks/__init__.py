"""Measurements side by side in one process: medians of alternating runs, printed as ratios, written as JSON."""
