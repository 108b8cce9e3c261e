"""Alembic's folder: one file a version of the registry's tables. Only ``database`` runs it, under the registry's lock."""
