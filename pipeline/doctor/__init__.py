"""A cluster looked over before its first run: one module a kind of check."""
