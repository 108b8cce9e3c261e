"""The command line, and what needs both sides: the demo. Only this package may import client and server."""
