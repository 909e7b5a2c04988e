"""The conversion language: a text says where each tensor of a file lies in the whole model."""
