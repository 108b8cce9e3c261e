"""The client's side: everything that runs in an organisation that owns text."""
