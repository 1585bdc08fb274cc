"""Versions in MLflow: what is published of an edit, and the outbox that publishes it.

MLflow reads its settings from the environment when it is imported, so they are set here, before any module of this
package imports it. What the environment says already is left as it is.
"""

import os

_QUIET = {
    "MLFLOW_CONFIGURE_LOGGING": "false",  # its records go to the server's own handlers
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the outbox retries, and a request that did arrive is not repeated
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",
}
for _name, _value in _QUIET.items():
    os.environ.setdefault(_name, _value)
