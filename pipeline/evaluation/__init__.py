"""Figures of a trained model on a data set, and the blocks of documents that they come from."""
