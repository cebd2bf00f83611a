"""Screening training data before training: rank its rows, and predict the shift that training on it would give."""
