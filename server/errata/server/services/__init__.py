"""The API's services: each parses, checks, asks the ledger or an engine, and answers. They hold no state."""
