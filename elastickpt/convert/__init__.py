"""Conversions: one form of a checkpoint becomes another, by programs of the language, without torch."""
