"""Data in and between the stages: images (images.py), discrete codes (codes.py), batches of either (loader.py)."""
