"""The service: gRPC in front, one ledger, one MLflow registry, any number of versions from one copy of the weights."""
