"""The papers' networks, built from width tables, and how any network and its weights are loaded."""
