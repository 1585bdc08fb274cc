"""The ledger: what was asked, done, promoted and by whom. The truth; MLflow is its publication."""
