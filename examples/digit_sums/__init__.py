"""The DRIFT experiment in miniature: a text expert's arithmetic, given to a model that reads handwritten digits."""

import logging

# Which PEFT loads if it is installed, and which says what it lacks for the 4 bits that nobody needs here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
