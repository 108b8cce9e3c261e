"""An audit that needs to trust nobody: a bundle of logs, the keys that the auditor pins, and checks that need no server and no network.

It knows no torch, no Flower and no database: ``cloister-verify`` runs from a plain installation.
"""
