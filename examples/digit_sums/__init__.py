"""The DRIFT experiment in miniature: transfers a text expert's arithmetic to a model that reads handwritten digits."""

import logging

# PEFT imports bitsandbytes if it is installed; it then warns about missing 4-bit support, which is not needed here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
