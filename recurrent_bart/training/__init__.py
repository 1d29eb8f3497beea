"""Training loop on a DeepSpeed engine, and the preparation of a run."""

import logging

# DeepSpeed warns at import if there is no GPU. The line `engine` of a run already names the device
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
