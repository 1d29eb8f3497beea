"""Our own loop over a DeepSpeed engine, and what it needs."""

import logging

# DeepSpeed looks for a GPU while it is imported, and warns if there is none. The line `engine` of a run says it too
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
