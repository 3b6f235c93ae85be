"""Milliseconds: of engines, of torch models, of single layers, and widths for a budget of them."""
