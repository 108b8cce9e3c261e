"""What both sides share: records, signing, sealing, vectors, privacy events, errors and settings.

Nothing here imports torch, flwr, a database or the packages above it; everything is a leaf.
"""

__version__ = "0.1.0"
