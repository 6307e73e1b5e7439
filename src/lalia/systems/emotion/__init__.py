"""Valence and arousal of each turn of a dialogue, with a state that is carried from turn to turn."""
