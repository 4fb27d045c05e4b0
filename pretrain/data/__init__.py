"""Datasets: prepare them, verify them, read them in one global order, and measure n-gram baselines on them."""
