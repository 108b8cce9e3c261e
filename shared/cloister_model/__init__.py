"""The model that both sides must agree on to the bit: base, adapter, head, tokens, scores. Needs torch.

The sites train it, the coordinator judges it and exports it; it stands between ``cloister_shared`` and both sides so that
there is one of it. No optimiser, no noise, no network.
"""
