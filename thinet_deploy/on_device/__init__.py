"""What runs on devices: Python 3.8, the standard library and numpy, no other part of this package."""
