"""No network: must be set before the hub client is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
