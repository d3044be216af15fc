"""The DRIFT experiment in miniature: a text expert's arithmetic, given to a model that reads handwritten digits."""
