"""How it holds up: the service under load, collections under kills."""
