"""The service on a Ray cluster: the deployments, and the generator that works in another process."""
