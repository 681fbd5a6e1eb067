"""The demo in the browser: plain and accelerated decoding side by side, and what the speed costs.

Needs gradio (`pip install varaccel[app]`).
"""

import os

# gradio sends telemetry unless this is set before it is imported
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
