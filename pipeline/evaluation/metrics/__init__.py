"""Figures of texts. Nothing here knows the model: texts in, numbers out."""
